"""What the sinks write, read back by other readers: TensorBoard's own loaders, the csv and json modules."""

import csv
import json
import math
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from grsd_callbacks.emission import Emission, Histogram
from grsd_callbacks.sinks import (
    JSONLinesSink,
    LoggerSink,
    MemorySink,
    Sink,
    SinkGroup,
    TensorBoardSink,
    as_sink,
    read_json_lines,
)

EDGES = (0.0, 1.0, 2.0, 4.0)


def draw():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([0, 1], [0, 1])
    return figure


def draw_with_pyplot():
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(1, 1), dpi=50)


def fail():
    raise RuntimeError("no figure today")


def full(step, **changes):
    """An emission with something of every kind."""
    parts = {
        "scalars": {"grsd_a/x": 0.5 * step, "grsd_a/y": -2.0},
        "histograms": {"grsd_h/energy": Histogram.from_buckets(EDGES, [0.0, 0.5, 1.5])},
        "texts": {"grsd_run/config": "**words**"},
        "figures": {"grsd_figures/map": draw},
        "record": {"energy": [0.5, math.nan]},
    }
    return Emission(step=step, **(parts | changes))


def read_events(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"histograms": 0, "scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalar_stream(folder):
    """(tag, step, value) of every scalar, by tag and then as written."""
    events = read_events(folder)
    return [(tag, e.step, e.value) for tag in sorted(events.Tags()["scalars"]) for e in events.Scalars(tag)]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class KeepingLogger(Logger):
    """A logger that is none of the known ones."""

    def __init__(self):
        self.calls = []

    name = version = "keeping"

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.calls.append(("metrics", step, metrics))

    def save(self):
        self.calls.append(("save",))


class MediaLogger(KeepingLogger):
    """The same with W&B's methods."""

    def log_text(self, key, columns=None, data=None, dataframe=None, step=None):
        self.calls.append(("text", key, columns, data, step))

    def log_image(self, key, images, step=None, **kwargs):
        self.calls.append(("image", key, [image.size for image in images], step))


class OtherMediaLogger(KeepingLogger):
    """Methods of the same names that mean something else."""

    def log_text(self, run_id, text):
        raise AssertionError("called with foreign arguments")

    log_image = log_text


class FailingLogger(KeepingLogger):
    """Raises at the first call only."""

    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step)
        if len(self.calls) == 1:
            raise OSError("the server is away")


# --- Emission and Histogram -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"counts": [1.0, 2.0]}, "one limit more than there are counts, got 4 edges and 2 counts"),
        ({"edges": [0.0, 1.0, 2.0, math.inf]}, "edges must be finite"),
        ({"edges": [0.0, 2.0, 2.0, 3.0]}, "edges must increase"),
        ({"counts": [1.0, -1.0, 0.0]}, "counts must not be negative"),
    ],
)
def test_histogram_refuses(changes, match):
    with pytest.raises(ValueError, match=match):
        Histogram(**({"edges": EDGES, "counts": [1, 2, 3]} | changes), minimum=0, maximum=1, total=0, sum_of_squares=0)
    with pytest.raises(ValueError, match=match):
        Histogram.from_buckets(**({"edges": EDGES, "counts": [1, 2, 3]} | changes))


def test_histogram_from_buckets_is_that_of_the_centres():
    counts = [0, 2, 3]
    values = np.repeat([0.5, 1.5, 3.0], counts)
    histogram = Histogram.from_buckets(torch.tensor(EDGES), torch.tensor(counts))
    assert (histogram.counts, histogram.edges) == (tuple(np.histogram(values, EDGES)[0]), EDGES)
    assert (histogram.total, histogram.sum_of_squares) == (values.sum(), (values**2).sum())
    assert (histogram.minimum, histogram.maximum) == (1.0, 4.0)


def test_histogram_without_weight():
    histogram = Histogram.from_buckets(EDGES, [0, 0, 0])
    assert (histogram.minimum, histogram.maximum, histogram.total, histogram.sum_of_squares) == (0, 0, 0, 0)


@pytest.mark.parametrize("step", [1.0, "1", None])
def test_emission_refuses_a_step_that_is_no_integer(step):
    with pytest.raises(TypeError, match=f"step must be an integer, got {type(step).__name__}"):
        Emission(step=step)


def test_emission_takes_integers_of_other_libraries():
    assert type(Emission(step=np.int64(3)).step) is int
    assert Emission(step=torch.tensor(3)).step == 3


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_stream_is_exact(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step in (0, 3, 10):
        sink.write(full(step, figures={}))
    assert scalar_stream(tmp_path) == [  # before close: every write flushes
        ("grsd_a/x", 0, 0.0),
        ("grsd_a/x", 3, 1.5),
        ("grsd_a/x", 10, 5.0),
        ("grsd_a/y", 0, -2.0),
        ("grsd_a/y", 3, -2.0),
        ("grsd_a/y", 10, -2.0),
    ]
    sink.close()


def test_tensorboard_holds_every_kind(tmp_path):
    sink = TensorBoardSink(str(tmp_path))
    sink.write(full(7, layout={"grsd": {"alpha": ["Margin", ["a", "b", "c"]]}}))
    sink.close()
    events = read_events(tmp_path)
    (histogram,) = events.Histograms("grsd_h/energy")
    value = histogram.histogram_value
    assert (histogram.step, value.bucket_limit, value.bucket) == (7, [1.0, 2.0, 4.0], [0.0, 0.5, 1.5])
    assert (value.min, value.max, value.num) == (1.0, 4.0, 2.0)
    assert (value.sum, value.sum_squares) == (0.5 * 1.5 + 1.5 * 3.0, 0.5 * 1.5**2 + 1.5 * 3.0**2)
    (image,) = events.Images("grsd_figures/map")
    assert (image.step, image.width, image.height) == (7, 100, 50)
    (text,) = events.Tensors("grsd_run/config/text_summary")
    assert (text.step, text.tensor_proto.string_val[0]) == (7, b"**words**")
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert [path.parent for path in tmp_path.rglob("events*")] == [tmp_path]  # no extra runs


def test_tensorboard_dashboard_shows_our_buckets(tmp_path):
    """As the histogram plugin converts it: outer empty buckets are dropped, the rest lies between our edges."""
    from tensorboard.backend.event_processing import event_file_loader

    sink = TensorBoardSink(tmp_path)
    sink.write(full(1, scalars={}, texts={}, figures={}))
    sink.close()
    (file,) = tmp_path.iterdir()
    values = [value for event in event_file_loader.EventFileLoader(str(file)).Load() for value in event.summary.value]
    (value,) = [value for value in values if value.tag == "grsd_h/energy"]
    buckets = np.frombuffer(value.tensor.tensor_content, np.float32) if value.tensor.tensor_content else None
    buckets = np.array(value.tensor.float_val, np.float32) if buckets is None else buckets
    assert buckets.reshape(-1, 3).tolist() == [[1.0, 2.0, 0.5], [2.0, 4.0, 1.5]]


def test_tensorboard_leaves_gaps_for_what_it_cannot_draw(tmp_path):
    sink = TensorBoardSink(tmp_path)
    bad_histograms = {
        "grsd_h/nan": Histogram.from_buckets(EDGES, [1, math.nan, 1]),
        "grsd_h/inf": Histogram(EDGES, [1, 1, 1], minimum=-math.inf, maximum=1, total=1, sum_of_squares=1),
    }
    values = {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "float32": 1e39, "largest": 3.4028234e38, "ok": 1.0}
    sink.write(Emission(step=1, scalars=values, histograms=bad_histograms))
    sink.close()
    assert scalar_stream(tmp_path) == [("largest", 1, float(np.float32(3.4028234e38))), ("ok", 1, 1.0)]
    assert read_events(tmp_path).Tags()["histograms"] == []


def test_tensorboard_closes_only_its_own_writer(tmp_path):
    writer = SummaryWriter(tmp_path / "users")
    TensorBoardSink(writer).close()
    assert writer.all_writers is not None
    writer.close()
    sink = TensorBoardSink(tmp_path / "owned")
    sink.close()
    assert sink.writer.all_writers is None


@pytest.mark.parametrize("draw_one", [draw, draw_with_pyplot])
def test_figures_are_closed(tmp_path, draw_one):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    sink = TensorBoardSink(tmp_path)
    sink.write(full(1, figures={"grsd_figures/map": draw_one}))
    sink.close()
    logger = MediaLogger()
    LoggerSink(logger).write(full(1, figures={"grsd_figures/map": draw_one}))
    assert plt.get_fignums() == before


def test_figures_are_closed_when_the_writer_fails(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    def add_image(*args, **kwargs):
        raise OSError("disk full")

    before = plt.get_fignums()
    sink = TensorBoardSink(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(sink.writer, "add_image", add_image)
        sink.write(full(1, figures={"a": draw_with_pyplot}))
    sink.close()
    assert plt.get_fignums() == before


def test_a_figure_that_fails_costs_only_itself(tmp_path):
    sink = TensorBoardSink(tmp_path)
    with pytest.raises(RuntimeError, match="no figure today"):
        sink.write(full(1, figures={"grsd_figures/a": fail, "grsd_figures/b": draw}))
    sink.write(full(2))
    sink.close()
    events = read_events(tmp_path)
    assert [e.step for e in events.Scalars("grsd_a/x")] == [1, 2]
    assert [e.step for e in events.Histograms("grsd_h/energy")] == [1, 2]
    assert [e.step for e in events.Images("grsd_figures/b")] == [1]


@pytest.mark.parametrize("target", [None, 3, SimpleNamespace(add_scalar=print)])
def test_tensorboard_refuses(target):
    with pytest.raises(TypeError, match=f"writer_or_logdir must be .* got {type(target).__name__}"):
        TensorBoardSink(target)


# --- Lightning loggers ------------------------------------------------------------------------------------------------


def test_tensorboard_logger_gets_everything(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    sink = LoggerSink(logger)
    sink.write(full(4))
    sink.flush()
    sink.close()
    assert logger.experiment.all_writers is not None  # the user's
    logger.finalize("success")
    tags = read_events(logger.log_dir).Tags()
    assert tags["scalars"] == ["grsd_a/x", "grsd_a/y"]
    assert tags["histograms"] == ["grsd_h/energy"]
    assert tags["images"] == ["grsd_figures/map"]
    assert tags["tensors"] == ["grsd_run/config/text_summary"]
    assert scalar_stream(logger.log_dir) == [("grsd_a/x", 4, 2.0), ("grsd_a/y", 4, -2.0)]


def test_csv_logger_takes_late_keys_and_keeps_the_users_rows(tmp_path):
    logger = CSVLogger(tmp_path)
    sink = LoggerSink(logger)
    logger.log_metrics({"train_loss": 3.0}, step=0)
    sink.write(Emission(step=0, scalars={"a": 1.0, "gap": math.nan}))
    sink.write(Emission(step=5, scalars={"a": 2.0, "late": 0.25}))
    rows = read_csv(Path(logger.log_dir) / "metrics.csv")  # before finalize
    assert rows == [
        {"a": "", "late": "", "step": "0", "train_loss": "3.0"},
        {"a": "1.0", "late": "", "step": "0", "train_loss": ""},
        {"a": "2.0", "late": "0.25", "step": "5", "train_loss": ""},
    ]


def test_csv_logger_gets_no_row_without_values(tmp_path):
    logger = CSVLogger(tmp_path)
    LoggerSink(logger).write(Emission(step=0, scalars={"a": math.nan}, texts={"t": "words"}))
    assert not (Path(logger.log_dir) / "metrics.csv").exists()


def test_unknown_logger_gets_scalars_and_is_saved():
    logger = KeepingLogger()
    sink = LoggerSink(logger)
    sink.write(full(4, figures={"never": fail}))
    assert logger.calls == [("metrics", 4, {"grsd_a/x": 2.0, "grsd_a/y": -2.0}), ("save",)]
    sink.flush()
    sink.close()
    assert logger.calls[2:] == [("save",), ("save",)]


def test_logger_with_media_gets_texts_and_pictures():
    logger = MediaLogger()
    LoggerSink(logger).write(full(4))
    assert logger.calls[1:3] == [
        ("text", "grsd_run/config", ["text"], [["**words**"]], 4),
        ("image", "grsd_figures/map", [(100, 50)], 4),
    ]


def test_logger_with_foreign_methods_of_the_same_name_gets_scalars_only():
    logger = OtherMediaLogger()
    LoggerSink(logger).write(full(4))
    assert [call[0] for call in logger.calls] == ["metrics", "save"]


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_other_ranks_write_nothing(tmp_path, monkeypatch, make):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    sink = LoggerSink(make(tmp_path))
    sink.write(full(1, figures={"never": fail}))
    sink.flush()
    sink.close()
    assert list(tmp_path.iterdir()) == []


def test_dummy_logger_of_fast_dev_run_swallows_all():
    sink = LoggerSink(DummyLogger())
    sink.write(full(1, figures={"never": fail}))
    sink.flush()
    sink.close()


def test_no_figure_is_drawn_where_the_experiment_is_a_placeholder():
    logger = MediaLogger()
    logger.experiment = DummyLogger().experiment  # as on other ranks
    LoggerSink(logger).write(full(1, figures={"never": fail}))
    assert [call[0] for call in logger.calls] == ["metrics"]


def test_logger_that_raises_is_written_again_next_time():
    logger = FailingLogger()
    sink = LoggerSink(logger)
    with pytest.raises(OSError, match="the server is away"):
        sink.write(full(1))
    sink.write(full(2))
    assert [call[:2] for call in logger.calls] == [("metrics", 1), ("save",), ("metrics", 2), ("save",)]


@pytest.mark.parametrize("target", [None, "logs", SimpleNamespace(log_metrics=3)])
def test_logger_sink_refuses(target):
    with pytest.raises(TypeError, match=f"logger must be a Lightning logger .* got {type(target).__name__}"):
        LoggerSink(target)


# --- JSON lines -------------------------------------------------------------------------------------------------------

RECORD = {
    "energy": [0.1, 1 / 3, 5e-324, -0.0],
    "bad": {"nan": math.nan, "ends": [math.inf, -math.inf]},
    "words": "exact",
    "flag": True,
    "nothing": None,
    "count": 2**60,
}


def test_json_lines_round_trip_exactly(tmp_path):
    sink = JSONLinesSink(tmp_path / "deep" / "grsd.jsonl")
    sink.write(Emission(step=3, scalars={"a": math.nan, "b": 0.1}, texts={"t": "two\nlines"}, record=RECORD))
    sink.write(Emission(step=4))
    sink.flush()
    sink.close()
    first, second = read_json_lines(sink.path)
    assert second == {"step": 4}
    assert repr(first) == repr(
        {"step": 3, "scalars": {"a": math.nan, "b": 0.1}, "texts": {"t": "two\nlines"}, "record": RECORD}
    )


def test_json_lines_are_strict_json(tmp_path):
    sink = JSONLinesSink(tmp_path / "grsd.jsonl")
    sink.write(Emission(step=3, record=RECORD))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    (line,) = sink.path.read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["record"]["bad"] == {"nan": "nan", "ends": ["inf", "-inf"]}


def test_json_lines_take_tensors_and_arrays(tmp_path):
    sink = JSONLinesSink(tmp_path / "grsd.jsonl")
    tensor = torch.tensor([[0.1, math.inf]], dtype=torch.float64)
    sink.write(Emission(step=0, record={"t": tensor, "n": np.float64(0.1), "i": np.arange(2), "tuple": (1, 2)}))
    (line,) = read_json_lines(sink.path)
    assert line["record"] == {"t": [[0.1, math.inf]], "n": 0.1, "i": [0, 1], "tuple": [1, 2]}


def test_json_lines_refuse_what_json_cannot_hold_and_stay_usable(tmp_path):
    sink = JSONLinesSink(tmp_path / "grsd.jsonl")
    sink.write(Emission(step=0))
    with pytest.raises(TypeError, match=r"record\['a'\]\[1\] must be JSON-able .* got object"):
        sink.write(Emission(step=1, record={"a": [0, object()]}))
    sink.write(Emission(step=2))
    assert [line["step"] for line in read_json_lines(sink.path)] == [0, 2]


@pytest.mark.parametrize("kept", [1, 9, 12, 30])
def test_a_half_written_last_line_is_left_out_and_then_cut_off(tmp_path, kept):
    path = tmp_path / "grsd.jsonl"
    JSONLinesSink(path).write(Emission(step=0, scalars={"a": 1.0}))
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:kept])
    assert [line["step"] for line in read_json_lines(path)] == [0]
    JSONLinesSink(path).write(Emission(step=1, scalars={"a": 1.0}))
    assert [line["step"] for line in read_json_lines(path)] == [0, 1]


def test_a_file_of_one_half_line_or_none_is_empty(tmp_path):
    path = tmp_path / "grsd.jsonl"
    for content in (b"", b'{"st'):
        path.write_bytes(content)
        assert read_json_lines(path) == []
        JSONLinesSink(path).write(Emission(step=1))
        assert [line["step"] for line in read_json_lines(path)] == [1]


def test_a_write_that_fails_half_way_does_not_spoil_the_next(tmp_path, monkeypatch):
    sink = JSONLinesSink(tmp_path / "grsd.jsonl")
    sink.write(Emission(step=0))

    def fsync(number):
        sink.path.write_bytes(sink.path.read_bytes()[:-4])  # only a part reached the disk
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("os.fsync", fsync)
        sink.write(Emission(step=1))
    sink.write(Emission(step=2))
    assert [line["step"] for line in read_json_lines(sink.path)] == [0, 2]


@pytest.mark.parametrize(
    "content, number",
    [
        (b"epoch,loss\n1,2\n", 1),
        (b"some words", 1),
        (b'{"step": 1}\n{"loss": 1}\n', 2),
        (b'{"step": 1.5}\n', 1),
        (b'{"step": 1}\n\n', 2),
        (b'{"step": 1}\nwords', 2),
        (b"[1, 2]\n", 1),
        (b"\x89PNG\r\n\x1a\n\xff", 1),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, number):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"file.txt: line {number} was not written by this package"):
        read_json_lines(path)


@pytest.mark.parametrize("content", [b"epoch,loss\n1,2", b"a line without an end"])
def test_foreign_files_are_never_changed(tmp_path, content):
    path = tmp_path / "file.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="exists and was not written by this package; give another path"):
        JSONLinesSink(path).write(Emission(step=1))
    assert path.read_bytes() == content


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json_lines(tmp_path / "none.jsonl")


def test_json_lines_sink_can_be_pickled(tmp_path):
    sink = JSONLinesSink(tmp_path / "grsd.jsonl")
    sink.write(Emission(step=0))
    pickle.loads(pickle.dumps(sink)).write(Emission(step=1))
    assert [line["step"] for line in read_json_lines(sink.path)] == [0, 1]


@pytest.mark.parametrize("path", [None, 3, b"bytes"])
def test_json_lines_sink_refuses(path):
    with pytest.raises(TypeError, match=f"path must be a str or a path, got {type(path).__name__}"):
        JSONLinesSink(path)


# --- several at once, and choosing ------------------------------------------------------------------------------------


def test_a_group_writes_to_all_and_raises_what_failed(tmp_path):
    memory, logger = MemorySink(), FailingLogger()
    loggers = [logger, CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    group = SinkGroup([*loggers, memory, tmp_path / "grsd.jsonl"])
    with pytest.raises(OSError, match="the server is away"):
        group.write(full(1))
    group.write(full(2))
    group.flush()
    group.close()
    for each in loggers[1:]:
        each.finalize("success")
    assert [emission.step for emission in memory.emissions] == [1, 2]
    assert [row["grsd_a/x"] for row in read_csv(Path(loggers[1].log_dir) / "metrics.csv")] == ["0.5", "1.0"]
    assert [event.step for event in read_events(loggers[2].log_dir).Scalars("grsd_a/x")] == [1, 2]
    assert [line["step"] for line in read_json_lines(tmp_path / "grsd.jsonl")] == [1, 2]
    assert [call[:2] for call in logger.calls[:4]] == [("metrics", 1), ("save",), ("metrics", 2), ("save",)]


def test_as_sink_finds_the_sink(tmp_path):
    memory = MemorySink()
    writer = SummaryWriter(tmp_path / "writer")
    assert as_sink(memory) is memory
    assert isinstance(as_sink(tmp_path / "a.jsonl"), JSONLinesSink)
    assert isinstance(as_sink(writer), TensorBoardSink)
    assert isinstance(as_sink(KeepingLogger()), LoggerSink)
    assert [type(sink) for sink in as_sink([memory, KeepingLogger()]).sinks] == [MemorySink, LoggerSink]
    folder = as_sink(str(tmp_path / "folder"))
    assert isinstance(folder, TensorBoardSink)
    for sink in (memory, folder, as_sink(writer), as_sink([]), as_sink("a.jsonl"), as_sink(KeepingLogger())):
        assert isinstance(sink, Sink)
    folder.close()
    writer.close()


@pytest.mark.parametrize("target", [None, 3, sys.__stdout__, {"a": 1}])
def test_as_sink_refuses(target):
    with pytest.raises(TypeError, match=f"target must be a sink, .* got {type(target).__name__}"):
        as_sink(target)
    with pytest.raises(TypeError, match="target must be a sink"):
        SinkGroup([MemorySink(), target])


KILLED = """
import os, sys
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from grsd_callbacks.emission import Emission, Histogram
from grsd_callbacks.sinks import SinkGroup

folder = sys.argv[1]
loggers = [CSVLogger(folder, name="csv", version=0), TensorBoardLogger(folder, name="logger", version=0)]
group = SinkGroup([folder + "/writer", folder + "/grsd.jsonl", *loggers])
for step in range(25):
    histograms = {"h": Histogram.from_buckets([0.0, 1.0], [step])}
    group.write(Emission(step=step, scalars={"a": float(step)}, histograms=histograms, record={"step": step}))
os._exit(9)
"""


def test_a_killed_process_leaves_all_that_it_wrote(process_of, tmp_path):
    result = process_of(KILLED, tmp_path)
    assert result.returncode == 9, result.stderr
    expected = [("a", step, float(step)) for step in range(25)]
    for folder in ("writer", "logger/version_0"):
        assert scalar_stream(tmp_path / folder) == expected
        assert [event.step for event in read_events(tmp_path / folder).Histograms("h")] == list(range(25))
    rows = read_csv(tmp_path / "csv/version_0/metrics.csv")
    assert [("a", int(row["step"]), float(row["a"])) for row in rows] == expected
    lines = read_json_lines(tmp_path / "grsd.jsonl")
    assert [line["record"]["step"] for line in lines] == list(range(25))
