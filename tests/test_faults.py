"""Whatever goes wrong in a measurement: training goes on bit-identically, one warning, and the next one works."""

import gc
import inspect
import json
import math
import re
import sys
import warnings
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from torch.overrides import _get_current_function_mode_stack

import grsd_callbacks.callbacks.dynamics
import grsd_callbacks.monitor.measurer
import grsd_callbacks.monitor.shell_monitor
import grsd_callbacks.outlet
import grsd_callbacks.run
import grsd_callbacks.sinks
from grsd_callbacks import MeasurementWarning, MemorySink, ShellDynamicsCallback, ShellMonitor
from grsd_callbacks.guard.numerics import _float32_switches

PACKAGE = str(Path(grsd_callbacks.__file__).parent)
X, Y = cases.digits(8)
AT = 2  # the optimizer step before which faults happen
EVERY_STEP = [0, 1, 2, 3, 4]
FULL = OSError(28, "No space left on device")


def no_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# ---- a fault at every function of ours that a measurement calls, one after the other ----


class Fault:
    """A trace function that notes the package's functions, or raises at the n-th call of one of them."""

    def __init__(self, code=None, error=None, number=1):
        if code is not None and code.co_flags & inspect.CO_GENERATOR:
            gc.collect()  # a generator of the run before that is thrown away in this one is seen as a call, too
        self.code, self.error, self.left = code, error, number
        self.seen = {}

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        self.seen[code] = self.seen.get(code, 0) + 1
        if code is self.code:
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise self.error


@contextmanager
def traced(fault):
    before = sys.gettrace()
    sys.settrace(fault)
    try:
        yield
    finally:
        sys.settrace(before)


NOT_OURS_TO_CATCH = {  # the entry of what the user calls, the net itself, and the check of what the user gives
    "ShellMonitor.step",
    "ShellMonitor.finish",
    "Measurer._attempt",
    "given_size",
    "check_step",
    "_is_finite",
}
CHECKS_OF_ARGUMENTS = "optimizer.py"
PUTS_BACK = re.compile(r"restorers?\.<locals>\.<lambda>$")  # the guard's own last resort: one assignment each


def name_of(code):
    return getattr(code, "co_qualname", code.co_name)


def loop(options, fault=None, at=AT):
    """Four steps of a custom loop; (image, monitor, warnings). `at=4` is the end of the run."""
    cases.seed()
    model = cases.bn_dropout()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if options is not None:
            monitor = ShellMonitor(model, "cross_entropy", (X, Y), every_n_steps=1, writer=MemorySink(), **options)
        for step in range(4):
            if monitor is not None:
                with traced(fault if step in (at, at + 1) else None):  # a step, and what completes it
                    monitor.step(step, optimizer=optimizer)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
        if monitor is not None:
            with traced(fault if at == 4 else None):
                monitor.finish()
    found = {name: value.tolist() for name, value in model.state_dict().items()}
    found["rng"], found["training"] = torch.get_rng_state().tolist(), [m.training for m in model.modules()]
    found["settings"] = settings()
    ours = [str(w.message) for w in caught if "costs" not in str(w.message)]
    return found, monitor, ours


def settings():
    """What a measurement changes for the whole process, and has to put back."""
    attention = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    autograd = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()
    function_modes = [type(mode).__name__ for mode in _get_current_function_mode_stack()]
    float32 = [getattr(owner, name) for owner, name, _ in _float32_switches()]
    return float32, attention, autograd, torch.is_autocast_enabled("cpu"), torch.get_default_dtype(), function_modes


WAYS = {
    "exact": {"method": "exact"},
    "transfer": {"method": "exact", "transfer": True},
    "krylov": {"method": "krylov", "num_matvecs": 6, "num_density_matvecs": 4},
    "lanczos": {"method": "lanczos", "num_matvecs": 8},
    "randomized": {"method": "randomized", "num_matvecs": 8},
}


@pytest.mark.parametrize(
    ("way", "at", "stride"),
    [
        ("exact", AT, 17),
        ("krylov", AT, 37),
        ("lanczos", AT, 61),
        ("exact", 4, 37),
        pytest.param("exact", AT, 1, marks=pytest.mark.slow),
        pytest.param("transfer", AT, 1, marks=pytest.mark.slow),
        pytest.param("krylov", AT, 1, marks=pytest.mark.slow),
        pytest.param("lanczos", AT, 1, marks=pytest.mark.slow),
        pytest.param("randomized", AT, 1, marks=pytest.mark.slow),
        pytest.param("exact", 4, 1, marks=pytest.mark.slow),
    ],
)
def test_a_fault_anywhere_in_a_measurement(way, at, stride):
    """First and last call of each function; with a stride, of each `stride`-th one."""
    plain = loop(None)[0]
    record = Fault()
    assert loop(WAYS[way], record, at)[0] == plain
    codes = [
        code
        for code in record.seen
        if name_of(code) not in NOT_OURS_TO_CATCH
        and not code.co_filename.endswith(CHECKS_OF_ARGUMENTS)
        and not PUTS_BACK.search(name_of(code))
    ]
    assert len(codes) > 100
    wrong = []
    for code in codes[::stride]:
        last = 1 if name_of(code).endswith("<genexpr>") else record.seen[code]  # whose last call may be its closing
        for number in {1, last} if stride == 1 else {1}:
            found, monitor, messages = loop(WAYS[way], Fault(code, OSError(*FULL.args), number), at)
            good = found == plain and monitor.num_failed == 1 and len(messages) == 1 and "No space left" in messages[0]
            next_works = monitor.history[-1].step >= 3 and math.isfinite(monitor.history[-1].loss)
            told = [e.scalars.get("grsd_health/failed", 0.0) for e in monitor.outlet.sinks.sinks[0].emissions]
            if not (good and next_works and (max(told) == 1.0 or at == 4)):
                wrong.append((Path(code.co_filename).name, name_of(code), number, messages, monitor.num_failed))
    assert wrong == []


# ---- named faults, in Lightning: what the one warning says ----


class Batches(pl.Callback):
    """Calls a function with (trainer, module) before the batch of one step, and another before the next one's."""

    def __init__(self, before, after=lambda *args: None):
        self.calls = {AT: before, AT + 1: after}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls.get(trainer.global_step, lambda *args: None)(trainer, pl_module)


class Module(cases.Module):
    """Gives its parameters back, if they were spoiled, before the training step sees them."""

    saved = None

    def training_step(self, batch, batch_idx):
        if self.saved is not None:
            self.load_state_dict(self.saved)
            self.saved = None
        return super().training_step(batch, batch_idx)


def lightning_run(callbacks=(), loggers=lambda folder: [], fails=None, **options):
    """(image, trainer, our warnings) of four steps; files are read before their folder goes."""
    with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cases.seed()
        module = Module(cases.bn_dropout(), nn.CrossEntropyLoss())
        logger = [CSVLogger(folder, name="", version=0), *loggers(folder)]
        trainer = cases.fit(module, cases.classes(), folder, callbacks, logger=logger, max_epochs=1, **options)
        ours = [str(w.message) for w in caught if w.category is MeasurementWarning and "costs" not in str(w.message)]
        failed = [float(text) for tag, _, text in cases.csv_cells(trainer, ours=True) if tag == "grsd_health/failed"]
        return cases.image(trainer, module), failed, ours


@lru_cache
def plain_image():
    return lightning_run()[0]


def once(function, error):
    """The function, raising at its first call."""
    left = [error]

    def raising(*args, **kwargs):
        if left:
            raise left.pop()
        return function(*args, **kwargs)

    return raising


def patch(target, name, error):
    """A fault in one function from step AT on, until the next step."""

    def make(monkeypatch):
        original = getattr(target, name)
        return Batches(
            lambda *args: monkeypatch.setattr(target, name, once(original, error)),
            lambda *args: monkeypatch.setattr(target, name, original),
        )

    return make


def spoil(value):
    def make(monkeypatch):
        def before(trainer, module):
            module.saved = {name: t.clone() for name, t in module.state_dict().items()}
            with torch.no_grad():
                next(module.parameters())[0, 0] = value

        return Batches(before)

    return make


def hook(error):
    """A forward hook of the user's that raises in eval mode only, so in none of the training's forwards."""

    def make(monkeypatch):
        handles = []

        def raising(layer, args, output):
            if not layer.training:
                raise error

        return Batches(
            lambda trainer, module: handles.append(module.net[0].register_forward_hook(raising)),
            lambda trainer, module: handles.pop().remove(),
        )

    return make


def misplaced(monkeypatch):
    """The probe on another device than the model, of which nothing can be read."""
    kept = []

    def before(trainer, module):
        monitor = next(c.monitor for c in trainer.callbacks if isinstance(c, ShellDynamicsCallback))
        kept.append((monitor, monitor.probe))
        monitor.probe = monitor.probe.to("meta")

    def after(trainer, module):
        monitor, monitor.probe = kept[0]

    return Batches(before, after)


class Fails(pl.loggers.Logger):
    """A logger that raises at one of our measurements, and never at the user's values."""

    name, version = "fails", 0

    def __init__(self, error=FULL):
        super().__init__()
        self.error, self.steps = error, []

    def log_metrics(self, metrics, step=None):
        if "grsd_loss/probe" in metrics:
            self.steps.append(step)
            if step == AT:
                raise self.error

    def log_hyperparams(self, *args, **kwargs):
        pass


TRACE = "see the traceback"
WRITING = "values cannot be written .OSError: .*No space left.*kept in history. Look at the disk and the logger"
FAULTS = {
    "memory": (patch(torch.linalg, "eigh", no_memory()), "OutOfMemoryError: CUDA out.*Take a smaller num_probe or mem"),
    "memory on the host": (
        patch(torch.linalg, "eigh", MemoryError()),
        "MemoryError: .*Take a smaller num_probe or m",
    ),
    "no convergence": (
        patch(torch.linalg, "eigh", torch.linalg.LinAlgError("failed to converge")),
        "LinAlgError: failed to converge.*try dtype='float64' or method='krylov'",
    ),
    "a gradient": (patch(torch.autograd, "grad", RuntimeError("no gradient")), f"RuntimeError: no gradient.*{TRACE}"),
    "fits": (patch(grsd_callbacks.run, "exponents_at", IndexError("no fit")), f"IndexError: no fit.*{TRACE}"),
    "NaN in a parameter": (spoil(math.nan), "parameters hold NaN or Inf: net.0.weight.*a lower learning rate"),
    "Inf in a parameter": (spoil(math.inf), "parameters hold NaN or Inf: net.0.weight.*a lower learning rate"),
    "a hook of the user's": (hook(RuntimeError("only in eval")), f"RuntimeError: only in eval.*{TRACE}"),
    "a hook's ValueError": (hook(ValueError("only in eval")), f"ValueError: only in eval.*{TRACE}"),
    "a misplaced probe": (misplaced, "Give a probe that can be moved to the model's device"),
    "a full disk": (patch(grsd_callbacks.sinks, "append_json_line", FULL), WRITING),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_named_fault(monkeypatch, name):
    make, message = FAULTS[name]
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8, method="exact")
    fault = make(monkeypatch)
    found, failed, messages = lightning_run([fault, callback])
    assert cases.differences(found, plain_image()) == []
    assert len(messages) == 1 and re.search(message, messages[0])
    assert callback.monitor.num_failed == 1 and max(failed) == failed[-1] == 1.0 and failed[0] == 0.0
    assert [s.step for s in callback.history] == [s for s in EVERY_STEP if s != AT or name == "a full disk"]
    assert all(math.isfinite(s.loss) for s in callback.history)


@pytest.mark.parametrize("name", ["memory", "a gradient", "fits", "a hook of the user's", "a full disk"])
def test_the_faults_do_happen(monkeypatch, name):
    """Negative control: on_error='raise' lets each of them end the run."""
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8, method="exact", on_error="raise")
    with pytest.raises((RuntimeError, IndexError, OSError)):
        lightning_run([FAULTS[name][0](monkeypatch), callback])


@pytest.mark.parametrize("error", [FULL, ValueError("I/O operation on closed file")])
def test_a_logger_that_raises(error):
    fails, callback = Fails(error), ShellDynamicsCallback(every_n_steps=1, num_probe=8)
    found, failed, messages = lightning_run([callback], lambda folder: [fails])
    assert cases.differences(found, plain_image()) == []
    assert len(messages) == 1 and "values cannot be written" in messages[0] and str(error) in messages[0]
    assert fails.steps == EVERY_STEP and callback.monitor.num_failed == 1 and failed[-1] == 1.0
    assert [s.step for s in callback.history] == EVERY_STEP


@pytest.mark.parametrize("method", ["add_scalar", "add_histogram_raw", "add_text", "add_custom_scalars"])
def test_a_writer_that_raises(monkeypatch, method):
    def loggers(folder):
        logger = TensorBoardLogger(folder, name="events")
        monkeypatch.setattr(logger.experiment, method, once(getattr(logger.experiment, method), FULL))
        return [logger]

    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8, figures=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TensorBoardLogger, "log_metrics", lambda *args, **kwargs: None)  # the user's own values
        found, failed, messages = lightning_run([callback], loggers)
    assert cases.differences(found, plain_image()) == []
    assert len(messages) == 1 and re.search(WRITING, messages[0]) and callback.monitor.num_failed == 1
    assert [s.step for s in callback.history] == EVERY_STEP


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (grsd_callbacks.run, "spectrum_fits"),
        (grsd_callbacks.outlet, "summary_table"),
        (grsd_callbacks.outlet, "run_figures"),
        (grsd_callbacks.outlet.tags, "preformatted"),
    ],
)
def test_a_fault_after_the_last_step(monkeypatch, target, name):
    class AtTheEnd(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            monkeypatch.setattr(target, name, once(getattr(target, name), IndexError("at the end")))

    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8)
    found, _, messages = lightning_run([AtTheEnd(), callback])
    assert cases.differences(found, plain_image()) == []
    assert len(messages) == 1 and "IndexError: at the end" in messages[0] and callback.monitor.num_failed == 1


def test_a_figure_that_cannot_be_drawn(monkeypatch):
    monkeypatch.setattr(
        grsd_callbacks.outlet, "run_figures", lambda *args: {"grsd_figures/energy": once(None, IndexError("no figure"))}
    )
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8)
    found, _, messages = lightning_run([callback], lambda folder: [TensorBoardLogger(folder, name="events")])
    assert cases.differences(found, plain_image()) == []
    assert len(messages) == 1 and "IndexError: no figure" in messages[0] and callback.monitor.num_failed == 1


@pytest.mark.parametrize("num_failures", [1, 2])
def test_a_fault_in_the_set_up_is_tried_again(monkeypatch, num_failures):
    original = grsd_callbacks.monitor.measurer.calibrate
    errors = [no_memory() for _ in range(num_failures)]

    def calibrate(*args):
        if errors:
            raise errors.pop()
        return original(*args)

    monkeypatch.setattr(grsd_callbacks.monitor.measurer, "calibrate", calibrate)
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8)
    found, failed, messages = lightning_run([callback])
    assert cases.differences(found, plain_image()) == []
    assert len(messages) == 1 and "tried again after 1, 2, 4, ... more steps. Take a smaller num_probe" in messages[0]
    assert [s.step for s in callback.history] == {1: [1, 2, 3, 4], 2: [3, 4]}[num_failures]
    assert callback.monitor.num_failed == failed[-1] == num_failures


def test_a_fault_outside_the_measurements_switches_them_off(monkeypatch):
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8)
    fault = patch(grsd_callbacks.callbacks.dynamics, "step_size", KeyError("no such group"))(monkeypatch)
    found, _, messages = lightning_run([fault, callback])
    assert cases.differences(found, plain_image()) == [] and [s.step for s in callback.history] == [0, 1]
    assert len(messages) == 1
    assert "measuring is off for the rest of this run (KeyError: 'no such group'). Training goes on" in messages[0]
    with pytest.raises(KeyError):
        fault = patch(grsd_callbacks.callbacks.dynamics, "step_size", KeyError("no such group"))(monkeypatch)
        lightning_run([fault, ShellDynamicsCallback(every_n_steps=1, num_probe=8, on_error="raise")])


def test_a_checkpoint_is_saved_whatever_our_state_says(monkeypatch, tmp_path):
    monkeypatch.setattr(grsd_callbacks.monitor.shell_monitor, "plain_leaves", once(None, no_memory()))
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8)
    saving = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4)
    _, _, messages = lightning_run([callback, saving], enable_checkpointing=True)
    assert len(messages) == 1 and "a checkpoint is saved without the state of the measurements" in messages[0]
    (path,) = tmp_path.glob("*.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 4


def test_ctrl_c_in_a_measurement_keeps_what_was_measured(monkeypatch):
    """Lightning ends the run on it; nothing measured before is lost, and the weights are those of that step."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "own.jsonl"
        callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8, method="exact", json_lines=str(path))
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            lightning_run([patch(torch.linalg, "eigh", KeyboardInterrupt())(monkeypatch), callback])
        lines = grsd_callbacks.read_json_lines(path)
    assert [line["step"] for line in lines if "grsd_loss/probe" in line["scalars"]] == [0, 1]
    assert [s.step for s in callback.history] == [0, 1]


# ---- processes that end without a word ----

KILLED = """
import os, sys, warnings
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
import lightning.pytorch as pl
import lightning_cases as cases
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn
from grsd_callbacks import ShellDynamicsCallback

class Dies(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            os._exit(17)

cases.seed()
module = cases.Module(cases.mlp(), nn.CrossEntropyLoss())
loggers = [TensorBoardLogger({folder!r}, name="tb", version=0), CSVLogger({folder!r}, name="csv", version=0)]
callbacks = [ShellDynamicsCallback(every_n_steps=1, num_probe=8), Dies()]
cases.fit(module, cases.classes(), {folder!r}, callbacks, logger=loggers)
"""


@pytest.fixture
def script(process_of):
    """Runs one of these texts, filled in, in a process of its own."""
    here = Path(__file__).parent

    def run(text, folder):
        return process_of(text.format(tests=str(here), root=str(here.parent), folder=str(folder)))

    return run


def test_a_killed_process_leaves_all_measurements_before(script, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = script(KILLED, tmp_path)
    assert done.returncode == 17, done.stderr
    (lines,) = tmp_path.rglob("grsd.jsonl")
    measured = [e["step"] for e in grsd_callbacks.read_json_lines(lines) if "grsd_loss/probe" in e["scalars"]]
    events = EventAccumulator(str(tmp_path / "tb" / "version_0")).Reload()
    cells = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    column = cells[0].split(",").index("grsd_loss/probe")
    assert measured == [e.step for e in events.Scalars("grsd_loss/probe")] == [0, 1, 2]
    assert len([row for row in cells[1:] if row.split(",")[column]]) == 3


FULL_DISK = """
import json, resource, signal, sys, warnings
sys.path[:0] = [{tests!r}, {root!r}]
import torch
torch.set_num_threads(1)
import lightning_cases as cases
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from grsd_callbacks import MeasurementWarning, ShellDynamicsCallback

def train(callbacks, logger):
    cases.seed()
    module = cases.Module(cases.bn_dropout(), nn.CrossEntropyLoss())
    cases.fit(module, cases.classes(), {folder!r}, callbacks, logger=logger)
    return [value.tolist() for value in module.state_dict().values()]

plain = train([], False)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # no file may grow beyond 30 kB: write() then says so
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8, json_lines={folder!r} + "/own.jsonl")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    logger = TensorBoardLogger({folder!r}, name="tb", version=0)
    for name in ("log_metrics", "save", "finalize"):  # Lightning's own calls would end the run with or without us
        setattr(logger, name, lambda *args, **kwargs: None)
    same = train([callback], logger) == plain
ours = [str(w.message) for w in caught if w.category is MeasurementWarning and "costs" not in str(w.message)]
print(json.dumps([same, ours, callback.monitor.num_failed, [s.step for s in callback.history]]))
sys.stdout.flush()
import os
os._exit(0)
"""


def test_a_disk_that_is_really_full(script, tmp_path):
    """Nothing hangs on a writer whose thread has died, and the lines that fitted are whole."""
    done = script(FULL_DISK, tmp_path)
    assert done.returncode == 0, done.stderr
    same, messages, num_failed, steps = json.loads(done.stdout.splitlines()[-1])
    assert same and steps == list(range(9)) and 1 <= num_failed <= 9
    assert len(messages) == 1 and "values cannot be written" in messages[0]
    lines = grsd_callbacks.read_json_lines(tmp_path / "own.jsonl")
    assert 0 < len([line for line in lines if line.get("record")]) < 9
