"""Wrong use raises before the first optimizer step; a bad state is one warning and a flag, and never ends a run."""

import math
from functools import partial

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from grsd_callbacks import MeasurementWarning, Settings, ShellDynamicsCallback
from grsd_callbacks.measure import BadState

pytestmark = pytest.mark.filterwarnings("ignore:grsd. measuring every . steps costs")
X, Y = cases.digits()
HOT = cases.one_hot(Y)


# ---- arguments ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be a positive integer .or None., got 0"),
        ({"every_n_steps": 2.5}, ValueError, "every_n_steps must be a positive integer"),
        ({"every_n_steps": True}, ValueError, "every_n_steps must be a positive integer"),
        ({"max_overhead": -0.02}, ValueError, "max_overhead must be a positive number .or None., got -0.02"),
        ({"max_overhead": -0.02, "every_n_steps": 5}, ValueError, "max_overhead must be a positive number"),
        (
            {"figures_every_n_steps": 0},
            ValueError,
            "figures_every_n_steps must be a positive integer, 'auto' or None, got",
        ),
        ({"figures_every_n_steps": True}, ValueError, "figures_every_n_steps must be .* got True"),
        ({"figures_every_n_steps": 2.0}, ValueError, "figures_every_n_steps must be .* got 2.0"),
        ({"figures_every_n_steps": "never"}, ValueError, "figures_every_n_steps must be .* got 'never'"),
        ({"per_decade": 0}, ValueError, "per_decade must be a positive integer"),
        ({"num_probe": 0}, ValueError, "num_probe must be a positive integer .or None., got 0"),
        ({"num_probe": -1}, ValueError, "num_probe must be a positive integer"),
        ({"num_probe": True}, ValueError, "num_probe must be a positive integer"),
        ({"probe": "first"}, ValueError, "probe must be 'auto', .inputs, targets. or a DataLoader, got 'first'"),
        ({"on_error": "ignore"}, ValueError, "on_error must be 'warn' or 'raise', got 'ignore'"),
        ({"name": "a/b"}, ValueError, "name must consist of letters, digits and underscores"),
        ({"loss": "hinge"}, ValueError, "loss must be 'auto', 'mse', 'cross_entropy' or a callable, got 'hinge'"),
        ({"loss": 3}, TypeError, "loss must be 'auto', 'mse', 'cross_entropy' or a callable, got int"),
        ({"loss": nn.MSELoss(reduction="none")}, ValueError, "has no scalar value; use 'mean' or 'sum'"),
        ({"loss": "mse", "nu": -1.0}, ValueError, "nu must be a positive number, got -1.0"),
        ({"method": "arnoldi"}, ValueError, "method must be one of .*'exact', 'lanczos', 'krylov'.* got 'arnoldi'"),
        ({"num_matvecs": 1}, ValueError, "num_matvecs must be an integer of at least 2, got 1"),
        ({"shells_per_decade": 0}, ValueError, "shells_per_decade must be an integer of at least 1, got 0"),
        ({"dtype": "float16"}, ValueError, "dtype must be 'float32', 'float64' or None, got 'float16'"),
        ({"dtype": torch.bfloat16}, ValueError, "dtype must be torch.float32, torch.float64 or None"),
        ({"gram_dtype": "half"}, ValueError, "gram_dtype must be 'float32', 'float64' or None, got 'half'"),
        ({"memory_limit": 0}, ValueError, "memory_limit must be a positive number of bytes, got 0"),
    ],
)
def test_arguments_are_checked_when_they_are_given(options, error, message):
    with pytest.raises(error, match=message):
        ShellDynamicsCallback(**options)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="num_density_matvecs must be an integer of at least 0, got -1"):
        Settings(num_density_matvecs=-1)
    with pytest.raises(ValueError, match="num_matvecs must be an integer of at least 2, got True"):
        Settings(num_matvecs=True)


# ---- wrong use, found in setup or at the first batch ----


class Turned(nn.Module):
    """A net whose output is turned into something else."""

    def __init__(self, turn):
        super().__init__()
        self.body, self.turn = cases.mlp(), turn

    def forward(self, x):
        return self.turn(self.body(x))


def module(turn=None, criterion=None):
    cases.seed()
    return cases.Module(cases.mlp() if turn is None else Turned(turn), criterion or nn.CrossEntropyLoss())


def frozen():
    net = module()
    for p in net.parameters():
        p.requires_grad = False
    return net


def not_differentiable(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


EMPTY = DataLoader(TensorDataset(X[:0], Y[:0]), batch_size=4)
THREE = DataLoader(TensorDataset(X, Y, Y), batch_size=16)
CE = {"loss": "cross_entropy"}  # asked for; with "auto" the training step is measured where forward does not fit
WRONG = {
    "no loss": (
        cases.Adversarial,
        {},
        None,
        "found no nn.MSELoss.* Nor can its own .*optimizes manually",
    ),
    "bad nu": (module, {"nu": 0.0}, None, "nu must be a positive number, got 0.0"),
    "rows differ": (module, {"probe": (X[:5], Y[:4])}, None, "one row per sample: inputs have 5 samples, targets have"),
    "not a pair": (module, {"probe": (X, Y, Y)}, None, r"expected a pair \(inputs, targets\), got 3 items"),
    "no inputs": (module, {"probe": ([], Y)}, None, "probe inputs hold no tensor with a sample dimension"),
    "empty probe": (module, {"probe": (X[:0], Y[:0])}, None, "probe has no samples"),
    "empty loader": (module, {"probe": EMPTY}, None, "the loader is empty; give a loader with at least one batch"),
    "batch of three": (module, CE, THREE, "cannot tell inputs from targets in a list of 3 items"),
    "loader of three": (module, {"probe": THREE}, None, "cannot tell inputs from targets in a list of 3 items"),
    "nothing trainable": (frozen, {}, None, "no trainable parameters to measure .none has any."),
    "nothing selected": (module, {"params": "head.*"}, None, "no trainable parameters .*params= selects none of them"),
    "integer outputs": (partial(module, lambda f: f.argmax(1)), CE, None, "torch.int64, which is not differentiable"),
    "scalar outputs": (partial(module, lambda f: f.mean()), CE, None, "the model returned a scalar"),
    "several outputs": (partial(module, lambda f: (f, f)), CE, None, "give outputs= a function that picks the tensor"),
    "detached": (partial(module, lambda f: f.detach()), {}, None, "do not depend on the selected parameters"),
    "too few rows": (partial(module, lambda f: f[:7]), CE, None, "have 8 samples, the model returned shape .7, 10"),
    "classes of a vector": (partial(module, lambda f: f[:, 0]), CE, None, r"shape \(n, classes, ...\) for cross-ent"),
    "mse would broadcast": (
        partial(module, lambda f: f[:, :1], nn.MSELoss()),
        {"loss": "mse"},
        DataLoader(TensorDataset(X, HOT[:, 0]), batch_size=16),
        r"targets must have the outputs' shape \(8, 1\) for a squared loss, got \(8,\)",
    ),
    "mse of classes": (
        partial(module, criterion=nn.MSELoss()),
        {"probe": (X, Y)},
        DataLoader(TensorDataset(X, HOT), batch_size=16),
        r"targets must have the outputs' shape \(8, 10\) for a squared loss, got \(8,\)",
    ),
    "class out of range": (module, {"probe": (X, Y + 5)}, None, r"class indices in \[0, 10\), got values from 5 to 12"),
    "negative class": (module, {"probe": (X, Y - 1)}, None, r"class indices in \[0, 10\), got values from -1 to 6"),
    "targets too deep": (module, {"probe": (X, HOT.long())}, None, r"class indices.* must have shape \(8,\)"),
    "probabilities too wide": (module, {"probe": (X, HOT[:, :9])}, None, "class probabilities.* outputs' shape"),
    "loss is a vector": (
        module,
        {"loss": partial(F.cross_entropy, reduction="none")},
        None,
        r"loss must return a scalar tensor, got shape \(8,\)",
    ),
    "loss is a vector, nu given": (
        module,
        {"loss": partial(F.cross_entropy, reduction="none"), "nu": 1.0},
        None,
        "loss must return a scalar tensor",
    ),
    "loss is not differentiable": (module, {"loss": not_differentiable}, None, "does not depend differentiably"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_raises_before_the_first_step(tmp_path, name):
    make, options, data, message = WRONG[name]
    net = make()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    callback = ShellDynamicsCallback(**{"num_probe": 8, **options})
    trainer = cases.quiet_trainer(tmp_path, [callback])
    with pytest.raises(ValueError, match=message):
        trainer.fit(net, cases.classes() if data is None else data)
    assert trainer.global_step == 0
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_explicit_probe_is_refused_already_in_setup(tmp_path):
    """No data is loaded for it, so a user waits for nothing."""

    class Unloadable(TensorDataset):
        def __getitem__(self, index):
            raise AssertionError("data was loaded")

    with pytest.raises(ValueError, match="targets must have the outputs' shape"):
        cases.fit(
            module(criterion=nn.MSELoss()),
            DataLoader(Unloadable(X, HOT), batch_size=16),
            tmp_path,
            [ShellDynamicsCallback(probe=(X, HOT[:, :9]))],
        )


def test_a_probe_that_is_no_probe_is_a_type_error(tmp_path):
    with pytest.raises(TypeError, match="expected 'auto', .inputs, targets. or a DataLoader, got Tensor"):
        cases.fit(module(), cases.classes(), tmp_path, [ShellDynamicsCallback(probe=X)])


def test_no_training_batches_is_no_error(tmp_path):
    callback = ShellDynamicsCallback()
    cases.fit(module(), cases.classes(), tmp_path, [callback], limit_train_batches=0)
    assert callback.history == [] and callback.summary() == "grsd: nothing has been measured"


# ---- bad states ----


class Spoils(pl.Callback):
    """Puts a value into a weight before some steps, and the old weights back after them."""

    def __init__(self, steps, value=math.nan):
        self.steps, self.value = steps, value

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.saved = None
        if trainer.global_step in self.steps:
            self.saved = {name: value.clone() for name, value in pl_module.state_dict().items()}
            with torch.no_grad():
                next(pl_module.parameters())[0, 0] = self.value

    def on_train_batch_end(self, trainer, pl_module, *args):
        if self.saved is not None:
            pl_module.load_state_dict(self.saved)


def spoiled(folder, steps, ours=(), data=None, value=math.nan, **options):
    cases.seed()
    net = cases.Module(cases.bn_dropout(), nn.CrossEntropyLoss())
    logger = CSVLogger(folder, name="", version=0)
    trainer = cases.fit(net, data or cases.classes(), folder, [Spoils(steps, value), *ours], logger=logger, **options)
    return trainer, cases.image(trainer, net)


def failed_curve(trainer):
    cells = cases.csv_cells(trainer, ours=True)
    return {step: float(text) for tag, step, text in cells if tag == "grsd_health/failed"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weights_are_one_warning_and_a_flag(tmp_path, value):
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8)
    with pytest.warns(MeasurementWarning) as caught:
        trainer, found = spoiled(tmp_path / "a", (3, 4), [callback], value=value)
    assert cases.differences(found, spoiled(tmp_path / "b", (3, 4), value=value)[1]) == []
    messages = [str(w.message) for w in caught if "failed" in str(w.message)]
    assert len(messages) == 1 and "at step 3 failed (BadState: parameters hold NaN or Inf: net.0.weight" in messages[0]
    assert [s.step for s in callback.history] == [0, 1, 2, 5, 6, 7, 8]
    assert callback.monitor.num_failed == 2
    assert failed_curve(trainer) == {0: 0, 1: 0, 2: 0, 3: 1, 4: 2, 5: 2, 6: 2, 7: 2, 8: 2}


def test_flux_after_a_failure_says_why_it_is_missing(tmp_path):
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8)
    with pytest.warns(MeasurementWarning):
        spoiled(tmp_path, (3,), [callback])
    by_step = {s.step: s for s in callback.history}
    assert bool(by_step[4].flux.isnan().all())
    assert by_step[4].reasons == {"flux": "the measurement before this one failed"}
    for step in (1, 2, 5, 6):
        assert bool(by_step[step].flux.isfinite().all()) and by_step[step].reasons == {}
    assert bool(by_step[2].work.isfinite().all())  # the step from good weights into bad ones was still a good step
    assert all(math.isfinite(s.loss) and bool(s.energy.isfinite().all()) for s in callback.history)


def test_bad_weights_at_the_start_leave_the_first_good_measurement_first(tmp_path):
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8)
    with pytest.warns(MeasurementWarning, match="at step 0 failed"):
        spoiled(tmp_path, (0,), [callback])
    assert callback.history[0].step == 1 and callback.history[0].summary["kernel_drift"] == pytest.approx(0, abs=1e-6)


def test_infinite_data_end_the_numbers_but_not_the_run(tmp_path):
    """One batch holds Inf: from then on the weights are NaN, and every measurement fails, with one warning."""
    x = X.clone()
    x[40, 3] = math.inf
    data = cases.loader(x, Y, shuffle=False)
    callback = ShellDynamicsCallback(every_n_steps=1, probe=(X[:8], Y[:8]))
    with pytest.warns(MeasurementWarning) as caught:
        _, found = spoiled(tmp_path / "a", (), [callback], data)
    assert cases.differences(found, spoiled(tmp_path / "b", (), (), cases.loader(x, Y, shuffle=False))[1]) == []
    assert len([w for w in caught if "failed" in str(w.message)]) == 1
    assert [s.step for s in callback.history] == [0, 1, 2] and callback.monitor.num_failed == 6
    assert callback.history[-1].effective_lr.isnan().all()


def test_infinite_probe_is_no_reason_to_stop(tmp_path):
    x = X[:8].clone()
    x[0, 0] = math.nan
    callback = ShellDynamicsCallback(every_n_steps=2, probe=(x, Y[:8]))
    with pytest.warns(MeasurementWarning, match="the outputs or the loss on the probe are NaN or Inf"):
        trainer, _ = spoiled(tmp_path, (), [callback])
    assert callback.history == [] and failed_curve(trainer) == {0: 1, 2: 2, 4: 3, 6: 4, 8: 5}
    assert callback.summary() == "grsd: nothing has been measured"


def test_anomaly_detection_of_the_users_run_does_not_see_ours(tmp_path):
    x = X[:8].clone()
    x[0, 0] = math.nan
    callback = ShellDynamicsCallback(every_n_steps=4, probe=(x, Y[:8]))
    with pytest.warns(MeasurementWarning, match="the outputs or the loss on the probe are NaN or Inf"):
        trainer, _ = spoiled(tmp_path, (), [callback], detect_anomaly=True)
    assert trainer.global_step == 8


def test_failures_are_raised_where_that_is_asked_for(tmp_path):
    callback = ShellDynamicsCallback(every_n_steps=1, num_probe=8, on_error="raise")
    with pytest.raises(BadState, match="parameters hold NaN or Inf"):
        spoiled(tmp_path, (2,), [callback])
    assert [s.step for s in callback.history] == [0, 1]


def test_warnings_as_errors_end_no_training(tmp_path, caplog):
    """Every test here runs with warnings as errors; without pytest.warns the message goes to the log."""
    callback = ShellDynamicsCallback(every_n_steps=4, num_probe=8)
    trainer, _ = spoiled(tmp_path, (4,), [callback])
    assert trainer.global_step == 8 and callback.monitor.num_failed == 1
    assert "the measurement at step 4 failed" in caplog.text
