"""Loggers that are not TensorBoard get texts, tables and figures in their own way. Fakes have the real signatures."""

import pytest
from matplotlib.figure import Figure

from grsd_callbacks.emission import Emission
from grsd_callbacks.media import table_of
from grsd_callbacks.sinks import LoggerSink
from grsd_callbacks.tags import MEANING, meaning_card, meanings


class Logger:
    """Lightning's part, with somebody's experiment."""

    run_id = "run-7"

    def __init__(self, experiment=None):
        self.experiment = experiment
        self.metrics = []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((metrics, step))


class Comet:
    """comet_ml.Experiment."""

    def __init__(self):
        self.calls = []

    def log_text(self, text, step=None, metadata=None):
        self.calls.append(("text", text, step))

    def log_figure(self, figure_name=None, figure=None, overwrite=False, step=None):
        self.calls.append(("figure", figure_name, figure, step))


class MLflow:
    """mlflow.tracking.MlflowClient."""

    def __init__(self):
        self.calls = []

    def log_text(self, run_id, text, artifact_file):
        self.calls.append(("text", run_id, text, artifact_file))

    def log_figure(self, run_id, figure, artifact_file, *, save_kwargs=None):
        self.calls.append(("figure", run_id, figure, artifact_file))


class WandB(Logger):
    """lightning.pytorch.loggers.WandbLogger."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.calls.append(("table", key, columns, data, step))

    def log_image(self, key, images, step=None, **kwargs):
        self.calls.append(("image", key, [image.size for image in images], step))


def emission(**changes):
    parts = {"scalars": {"grsd_loss/probe": 1.0}, "texts": {"grsd_run/report": "words"}}
    return Emission(30, **{**parts, "figures": {"grsd_figures/loss": lambda: Figure((2, 1), dpi=50)}, **changes})


def test_comet_gets_text_and_figure():
    logger = Logger(Comet())
    LoggerSink(logger).write(emission())
    assert logger.metrics == [({"grsd_loss/probe": 1.0}, 30)]
    (text, figure) = logger.experiment.calls
    assert text == ("text", "grsd_run/report\n\nwords", 30)
    assert figure[:2] == ("figure", "grsd_figures/loss") and isinstance(figure[2], Figure) and figure[3] == 30


def test_mlflow_gets_files_of_its_run():
    logger = Logger(MLflow())
    LoggerSink(logger).write(emission())
    text, figure = logger.experiment.calls
    assert text == ("text", "run-7", "words", "grsd_run/report.md")
    assert figure[1] == "run-7" and figure[3] == "grsd_figures/loss/step_00000030.png"
    assert isinstance(figure[2], Figure)


def test_wandb_gets_tables():
    logger = WandB()
    LoggerSink(logger).write(emission(texts={MEANING: meaning_card(), "grsd_run/report": "words"}))
    table, text, image = logger.calls
    assert table[:3] == ("table", MEANING, ["tag", "unit", "meaning"])
    assert [tuple(row) for row in table[3]] == meanings(), "bars in the meaning do not end a cell"
    assert text == ("table", "grsd_run/report", ["text"], [["words"]], 30)
    assert image == ("image", "grsd_figures/loss", [(100, 50)], 30)


def test_a_logger_that_takes_only_figures_gets_only_these():
    class OnlyFigures:
        def __init__(self):
            self.names = []

        def log_figure(self, figure_name=None, figure=None, overwrite=False, step=None):
            self.names.append(figure_name)

    logger = Logger(OnlyFigures())
    LoggerSink(logger).write(emission())
    assert logger.experiment.names == ["grsd_figures/loss"]


def test_what_a_logger_raises_comes_after_the_scalars():
    class Failing(Comet):
        def log_figure(self, figure_name=None, figure=None, overwrite=False, step=None):
            raise ConnectionError("offline")

    logger = Logger(Failing())
    with pytest.raises(ConnectionError):
        LoggerSink(logger).write(emission())
    assert logger.metrics and logger.experiment.calls


def test_figures_are_not_drawn_for_loggers_that_cannot_show_them():
    drawn = []
    LoggerSink(Logger(object())).write(emission(figures={"grsd_figures/loss": lambda: drawn.append(True)}))
    assert drawn == []


@pytest.mark.parametrize("text", ["", "| a |", "a\nb\nc", "| a |\n|---|\nno"])
def test_other_texts_are_one_cell(text):
    assert table_of(text) == (["text"], [[text]])
