"""What people do with a Trainer: stop early, keep the best, average, resume with other arguments, measure twice."""

import json
import warnings
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from grsd_callbacks import MeasurementWarning, ShellDynamicsCallback, ShellMonitor, read_json_lines
from grsd_callbacks.between import BetweenSteps

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`.*ModelCheckpoint"),
    pytest.mark.filterwarnings("ignore:grsd. measuring every . steps costs"),
]
X, Y = cases.digits()
OPTIONS = {"num_probe": 8, "every_n_steps": 2, "figures": False}


def module(net=cases.mlp, **options):
    cases.seed()
    return cases.Module(net(), nn.CrossEntropyLoss(), **options)


def callback(**options):
    return ShellDynamicsCallback(**{**OPTIONS, **options})


def steps(ours):
    return [s.step for s in ours.history]


# ---- values that others can watch ----


def test_latest_values_are_in_callback_metrics(tmp_path):
    ours = callback()
    trainer = cases.fit(module(), cases.classes(), tmp_path, [ours])
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("grsd_")}
    last = ours.history[-1]
    assert found["grsd_loss/probe"] == last.loss and found["grsd_spectrum/lambda_max"] == last.summary["lambda_max"]
    assert not any("shell" in name for name in found) and len(found) > 20
    assert float(trainer.callback_metrics["train_loss"]) > 0  # the user's own stays


def test_loggers_do_not_see_the_mirror(tmp_path):
    """Nothing is logged by it: no value of ours is drawn again between measurements."""
    ours = callback(every_n_steps=4)
    logger = CSVLogger(tmp_path, name="", version=0)
    trainer = cases.fit(module(), cases.classes(), tmp_path, [ours], logger=logger)
    cells = [step for tag, step, _ in cases.csv_cells(trainer, ours=True) if tag == "grsd_loss/probe"]
    assert cells == [0, 4, 8] and not any("grsd" in name for name in trainer.logged_metrics)


@pytest.mark.parametrize(("mode", "epochs"), [("min", 4), ("max", 3)])
def test_early_stopping_on_our_value(tmp_path, mode, epochs):
    """The probe's loss falls, so watching for the largest value ends the run after `patience` epochs."""
    ours = callback(every_n_steps=1, probe=(X, Y), num_probe=None)
    stop = EarlyStopping("grsd_loss/probe", mode=mode, patience=2, check_on_train_epoch_end=True)
    trainer = cases.fit(module(), cases.classes(), tmp_path, [ours, stop], max_epochs=4)
    losses = [s.loss for s in ours.history]
    assert losses == sorted(losses, reverse=True)
    assert trainer.current_epoch == epochs and stop.wait_count == (0 if mode == "min" else 2)


def test_best_checkpoint_by_our_value(tmp_path):
    ours = callback(every_n_steps=1)
    best = ModelCheckpoint(
        tmp_path, "{step}", monitor="grsd_spectrum/lambda_max", mode="max", save_top_k=1, every_n_train_steps=1
    )
    cases.fit(module(), cases.classes(), tmp_path, [ours, best], enable_checkpointing=True)
    largest = max(s.summary["lambda_max"] for s in ours.history[:-1])  # the last one is measured after the last save
    assert float(best.best_model_score) == largest
    assert torch.load(best.best_model_path, weights_only=True)["callbacks"]["ShellDynamicsCallback"]["last_step"] >= 0


# ---- averages, swaps, loads ----


class Swaps(pl.Callback):
    """An average put in place for a while, as moving averages do it for validation."""

    def __init__(self, at, back=True, every=False):
        self.at, self.back, self.every = at, back, every

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.at or self.every:
            saved = {name: value.clone() for name, value in pl_module.state_dict().items()}
            with torch.no_grad():
                for p in pl_module.parameters():
                    p.mul_(0.9)
            if self.back:
                pl_module.load_state_dict(saved)


BROKEN = "parameters were written to between two optimizer steps (weights loaded, averaged or clipped)"


@pytest.mark.parametrize("order", ["before", "after"])
def test_weights_loaded_in_mid_run_are_a_break(tmp_path, order):
    ours, swaps = callback(every_n_steps=1), Swaps(3, back=False)
    both = [swaps, ours] if order == "before" else [ours, swaps]
    cases.fit(module(), cases.classes(), tmp_path, both)
    reasons = {s.step: s.reasons.get("flux", "") for s in ours.history[1:]}
    expected = {3: BROKEN} if order == "after" else {}  # before ours it cannot be told from the optimizer's step
    assert {step: reason for step, reason in reasons.items() if reason} == expected


def test_replaced_data_and_other_tensors_are_watched_too():
    """`.data` that points elsewhere: what has come to stay is noticed, what is taken back is not."""
    net = nn.Linear(2, 1)
    watch, found = BetweenSteps(net), []
    for step in range(6):
        with torch.no_grad():
            net.bias.add_(1.0)
        watch.step_ended()
        kept = {name: p.data for name, p in net.named_parameters()}
        if step in (2, 4):
            for p in net.parameters():
                p.data = p.data + 1.0
                with torch.no_grad():
                    p.mul_(2.0)
        if step == 4:
            for name, p in net.named_parameters():
                p.data = kept[name]
        found.append(watch.written())
    assert found == [False, False, True, False, False, False]


def test_an_average_that_is_taken_back_is_no_break(tmp_path):
    ours = callback(every_n_steps=1)
    cases.fit(module(), cases.classes(), tmp_path, [ours, Swaps(3)])
    assert all("flux" not in s.reasons for s in ours.history[1:])


def test_what_every_step_does_is_no_break(tmp_path):
    ours = callback(every_n_steps=1)
    cases.fit(module(), cases.classes(), tmp_path, [ours, Swaps(0, back=False, every=True)])
    assert all("flux" not in s.reasons for s in ours.history[1:]) and len(ours.history) == 9


def test_weight_averaging_at_the_end_is_a_break(tmp_path):
    ours = callback(every_n_steps=1)
    average = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
    cases.fit(module(), cases.classes(), tmp_path, [average, ours], max_epochs=4)
    assert ours.history[-1].reasons["flux"] == BROKEN and ours.monitor.num_failed == 0
    assert all("flux" not in s.reasons for s in ours.history[1:-1])


# ---- resume with other arguments ----


def saved_run(folder, **options):
    ours = callback(**options)
    trainer = cases.fit(module(), cases.classes(), folder, [ours])
    trainer.save_checkpoint(folder / "end.ckpt")
    return ours


def resumed_run(folder, **options):
    ours = callback(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cases.fit(module(), cases.classes(), folder, [ours], folder / "end.ckpt", max_epochs=3)
    messages = [str(w.message) for w in caught if w.category is MeasurementWarning]
    return ours, [m for m in messages if "costs" not in m and "no logger" not in m]


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [
        ({}, {"shells_per_decade": 5}, "shells_per_decade"),
        ({}, {"params": "net.2.*"}, "params"),
        ({}, {"method": "krylov", "num_matvecs": 6}, "method"),
        ({}, {"num_probe": 12}, "num_probe, probe"),
        ({"probe": (X[:8], Y[:8])}, {"probe": (X[8:16], Y[8:16])}, "probe"),
        ({}, {"dtype": "float64", "shells_per_decade": 2}, "shells_per_decade, dtype"),
        ({}, {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "loss"),
    ],
)
def test_other_arguments_start_a_new_segment(tmp_path, before, after, names):
    old = saved_run(tmp_path, **before)
    ours, messages = resumed_run(tmp_path, **after)
    assert len(messages) == 1 and messages[0].startswith(f"grsd: {names} differ from those of the run that was saved")
    assert steps(ours) == [8, 10, 12] or steps(ours) == [10, 12]
    first = ours.history[0]
    assert first.reasons["flux"] == f"first measurement after a resume with other {names}"
    assert first.summary.get("kernel_drift", 0.0) == pytest.approx(0.0, abs=1e-6)
    assert first.flow_time >= old.history[-1].flow_time > 0
    assert all(len(s.edges) == len(first.edges) for s in ours.history)
    if "num_probe" in after:
        assert first.num_samples == 12
    if "probe" in after:
        assert torch.equal(ours.monitor.probe.inputs, X[8:16])


@pytest.mark.parametrize(
    "options", [{}, {"every_n_steps": 4}, {"transfer": True}, {"work": False}, {"num_matvecs": 8}, {"figures": True}]
)
def test_arguments_that_mix_nothing_continue_the_series(tmp_path, options):
    saved_run(tmp_path)
    ours, messages = resumed_run(tmp_path, **options)
    assert messages == [] and steps(ours)[:5] == [0, 2, 4, 6, 8]


def test_the_same_pair_continues_the_series(tmp_path):
    saved_run(tmp_path, probe=(X[:8], Y[:8]))
    ours, messages = resumed_run(tmp_path, probe=(X[:8], Y[:8]))
    assert messages == [] and steps(ours) == [0, 2, 4, 6, 8, 10, 12]


def test_a_loader_probe_is_the_saved_one_whatever_the_loader_gives_now(tmp_path):
    old = saved_run(tmp_path, probe=cases.classes())
    ours, messages = resumed_run(tmp_path, probe=cases.classes())
    assert messages == [] and torch.equal(ours.monitor.probe.inputs, old.monitor.probe.inputs)


def test_a_monitor_of_ones_own_notices_too():
    def monitor(**options):
        return ShellMonitor(cases.mlp(), "cross_entropy", (X[:8], Y[:8]), every_n_steps=1, **options)

    first = monitor()
    first.step(0, lr=0.1)
    second = monitor(shells_per_decade=4)
    with pytest.warns(MeasurementWarning, match="shells_per_decade differ from those of the run that was saved"):
        second.load_state_dict(first.state_dict())
    assert second.history == []
    third = monitor()
    third.load_state_dict(first.state_dict())
    assert len(third.history) == 1


# ---- several instances ----


def test_train_and_validation_probe_side_by_side(tmp_path):
    train, val = callback(), callback(probe=cases.loader(X[48:], Y[48:], 8, shuffle=False), name="val")
    logger = TensorBoardLogger(tmp_path, name="")
    saving = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=8)
    callbacks = [train, val, saving]
    trainer = cases.fit(module(), cases.classes(), tmp_path, callbacks, logger=logger, enable_checkpointing=True)
    assert steps(train) == steps(val) == [0, 2, 4, 6, 8] and torch.equal(val.monitor.probe.inputs, X[48:56])
    assert trainer.callback_metrics["grsd_loss/probe"] != trainer.callback_metrics["grsd_val_loss/probe"]
    states = torch.load(tmp_path / "saved.ckpt", weights_only=True)["callbacks"]
    assert {"ShellDynamicsCallback", "ShellDynamicsCallback[val]"} <= states.keys()
    folder = Path(logger.log_dir)
    assert len(read_json_lines(folder / "grsd.jsonl")) == len(read_json_lines(folder / "grsd_val.jsonl")) > 5


def test_two_instances_without_names_are_refused_by_lightning():
    with pytest.raises(RuntimeError, match="`callback.state_key` must be unique"):
        pl.Trainer(callbacks=[callback(), callback()], logger=False, enable_checkpointing=False, accelerator="cpu")


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ({"name": ""}, {"name": ""}, "name='' is that of two ShellDynamicsCallbacks; give each its own name="),
        (
            {"name": "a", "json_lines": "same.jsonl"},
            {"name": "b", "json_lines": "same.jsonl"},
            "json_lines='same.jsonl' is the file of two ShellDynamicsCallbacks; give each its own",
        ),
    ],
)
def test_colliding_instances_are_refused(tmp_path, one, other, message):
    trainer = cases.quiet_trainer(tmp_path, [callback(**one)])
    trainer.callbacks.append(callback(**other))  # after Lightning's own check
    with pytest.raises(ValueError, match=message):
        trainer.fit(module(), cases.classes())


# ---- limits, second fits, other loops ----


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit_train_batches": 3}, [0, 2, 4, 6]),
        ({"max_steps": 5}, [0, 2, 4, 5]),
        ({"fast_dev_run": 3}, [0, 2, 3]),
        ({"overfit_batches": 2}, [0, 2, 4]),
        ({"max_time": {"hours": 1}}, [0, 2, 4, 6, 8]),
        ({"min_epochs": 1, "max_epochs": 1}, [0, 2, 4]),
    ],
)
def test_limits(tmp_path, options, expected):
    ours = callback()
    trainer = cases.fit(module(), cases.classes(shuffle=False), tmp_path, [ours], **options)
    assert steps(ours) == expected and trainer.global_step == expected[-1] and ours.monitor.num_failed == 0


def test_max_time_that_is_up_at_once(tmp_path):
    ours = callback()
    trainer = cases.fit(module(), cases.classes(), tmp_path, [ours], max_time={"seconds": 0}, max_epochs=50)
    assert trainer.global_step <= 2 and steps(ours) in ([], list(range(trainer.global_step + 1)))


def test_a_second_fit_is_a_new_series_on_the_same_axis(tmp_path):
    ours, net = callback(probe=(X[:8], Y[:8])), module()
    logger = CSVLogger(tmp_path, name="", version=0)
    trainer = cases.quiet_trainer(tmp_path, [ours], logger=logger)
    trainer.fit(net, cases.classes())
    first = list(ours.history)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(net, cases.classes())
    assert [s.step for s in first] == [0, 2, 4, 6, 8] and steps(ours)[0] >= 8 and steps(ours)[-1] == 16
    assert ours.history[0].reasons["flux"] == "first measurement" and ours.history[0].loss == first[-1].loss
    assert (tmp_path / "version_0" / "grsd.jsonl").exists() and (tmp_path / "version_0" / "grsd_1.jsonl").exists()


def test_lbfgs_and_manual_optimization_keep_the_axis(tmp_path):
    ours = callback()
    net = module(optimizer=partial(torch.optim.LBFGS, lr=0.5, max_iter=3))
    cases.fit(net, cases.classes(), tmp_path, [ours])
    assert steps(ours) == [0, 2, 4, 6, 8]
    ours = callback(loss="mse", unpack=lambda batch: (batch[0], batch[0]), params="generator.*")
    cases.seed()
    cases.fit(cases.Adversarial(), cases.classes(), tmp_path, [ours])
    assert steps(ours) == [0, 2, 4, 6, 8] and ours.history[-1].health["nominal_flow_time"] == 1.0


@pytest.mark.parametrize("stop", ["exception", "ctrl-c"])
def test_a_run_that_is_stopped_leaves_all_it_measured(tmp_path, stop):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 5:
                raise KeyError("no more") if stop == "exception" else KeyboardInterrupt

    ours = callback(every_n_steps=1)
    logger = TensorBoardLogger(tmp_path, name="", version=0)
    with pytest.raises((KeyError, SystemExit)):
        cases.fit(module(), cases.classes(), tmp_path, [ours, Stops()], logger=logger)
    lines = read_json_lines(tmp_path / "version_0" / "grsd.jsonl")
    assert [e["step"] for e in lines if "grsd_loss/probe" in e["scalars"]] == steps(ours) == [0, 1, 2, 3, 4]
    assert "grsd_work/total" in {tag for e in lines if e["step"] == 4 for tag in e["scalars"]}


def test_any_other_logger_takes_numbers(tmp_path):
    class Own(pl.loggers.Logger):
        name, version = "own", 0

        def __init__(self):
            super().__init__()
            self.rows = []

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, metrics))

        def log_hyperparams(self, *args, **kwargs):
            pass

    own = Own()
    cases.fit(module(), cases.classes(), tmp_path, [callback()], logger=[own, CSVLogger(tmp_path)])
    assert [step for step, row in own.rows if "grsd_loss/probe" in row] == [0, 2, 4, 6, 8]


# ---- LightningCLI ----


class Model(cases.Module):
    def __init__(self, width: int = 8):
        super().__init__(cases.mlp(width), nn.CrossEntropyLoss())


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return cases.classes()


TRAINER = {
    "max_epochs": 1,
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Runs a command line in a folder of its own; what the callback was told, and did."""
    pytest.importorskip("jsonargparse")
    monkeypatch.chdir(tmp_path)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # LightningCLI sets both for good

    def run(*args):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = LightningCLI(Model, Data, seed_everything_default=0, save_config_callback=None, args=list(args))
        (ours,) = [c for c in found.trainer.callbacks if isinstance(c, ShellDynamicsCallback)]
        monitor, settings = ours.monitor, ours.monitor.settings
        said = [str(settings.dtype), settings.params, settings.shells_per_decade, ours.history[0].num_samples]
        return [steps(ours), *said, ours.name, monitor.loss.kind, monitor.figure_schedule.every_n_steps]

    return run


def test_cli_from_a_config_file(cli, tmp_path):
    arguments = {
        "loss": "cross_entropy",
        "probe": "auto",
        "num_probe": 6,
        "every_n_steps": 2,
        "max_overhead": None,
        "params": ["net.2.*", "net.0.bias"],
        "dtype": "float64",
        "shells_per_decade": 4,
        "json_lines": None,
        "figures": False,
        "figures_every_n_steps": 3,
        "name": "cli",
    }
    config = {
        "trainer": {
            **TRAINER,
            "callbacks": [{"class_path": "grsd_callbacks.ShellDynamicsCallback", "init_args": arguments}],
        }
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    found = cli("fit", "--config", "config.yaml")
    assert found == [[0, 2, 4], "torch.float64", ["net.2.*", "net.0.bias"], 4, 6, "cli", "cross_entropy", 3]


def test_cli_from_arguments(cli):
    plain = {name: str(value).lower() if isinstance(value, bool) else value for name, value in TRAINER.items()}
    words = [f"--trainer.{name}={value}" for name, value in plain.items()]
    words += ["--trainer.callbacks=grsd_callbacks.ShellDynamicsCallback"]
    words += [f"--trainer.callbacks.{a}" for a in ("every_n_steps=4", "params=net.2.*", "num_probe=5", "figures=false")]
    for word, cadence in (("auto", "auto"), ("7", 7), ("null", None)):
        found = cli("fit", *words, f"--trainer.callbacks.figures_every_n_steps={word}")
        assert found == [[0, 4], "None", "net.2.*", 3, 5, "", "cross_entropy", cadence]
