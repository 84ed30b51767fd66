"""The whole public API with wrong types and values: each call works, or says which argument is wrong."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import grsd_callbacks as grsd

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NET = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
Y = torch.linspace(0, 1, 8, dtype=torch.float64).reshape(4, 2)
OP = grsd.NTKOperator(NET, X)
MSE = grsd.resolve_loss("mse")
SPECTRUM = grsd.eigendecomposition(OP, 0.25)
GRID = grsd.ShellGrid.logarithmic(1e-3, 1e2, per_decade=3)
R = torch.linspace(1, 2, 8, dtype=torch.float64)
STATE = grsd.KernelState(SPECTRUM.eigenvalues, SPECTRUM.eigenvectors, R)
CONDITIONS = grsd.ConditionSettings(num_null=9, num_resamples=2, num_steps=2)
T = np.geomspace(1, 1e3, 30)
EDGES = np.geomspace(1e-3, 1e2, 16)
ENERGY = np.linspace(1, 2, 17)

CALLS = {  # every public function and class that takes arguments, with arguments that are right
    "ShellDynamicsCallback": {
        "loss": "mse",
        "probe": (X, Y),
        "num_probe": 4,
        "every_n_steps": 2,
        "max_overhead": 0.1,
        "method": "exact",
        "num_matvecs": 4,
        "num_density_matvecs": 2,
        "shells_per_decade": 3,
        "per_decade": 10,
        "pair": False,
        "work": True,
        "transfer": False,
        "params": None,
        "outputs": None,
        "unpack": None,
        "observe": None,
        "num_projections": 2,
        "nu": None,
        "dtype": None,
        "memory_limit": None,
        "figures": False,
        "json_lines": None,
        "on_error": "warn",
        "name": "a",
    },
    "RenormalizabilityCallback": {
        "loss": "mse",
        "probe": (X, Y),
        "num_probe": 4,
        "every_n_steps": 2,
        "max_overhead": 0.1,
        "blocks": None,
        "per_decade": 2,
        "shells_per_decade": 3,
        "min_modes": 1,
        "drop_top": 0,
        "num_null": 9,
        "num_resamples": 2,
        "params": None,
        "outputs": None,
        "observe": None,
        "num_projections": 2,
        "unpack": None,
        "nu": None,
        "dtype": None,
        "memory_limit": None,
        "figures": False,
        "json_lines": None,
        "on_error": "warn",
        "name": "",
    },
    "ShellMonitor": {
        "model": NET,
        "loss": "mse",
        "probe": (X, Y),
        "num_probe": 4,
        "every_n_steps": 2,
        "max_overhead": 0.1,
        "total_steps": 10,
        "per_decade": 10,
        "pair": False,
        "work": True,
        "transfer": False,
        "figures": False,
        "writer": None,
        "on_error": "warn",
        "nu": None,
        "unpack": None,
        "observe": None,
        "num_projections": 2,
        "prefix": "grsd_",
        "method": "exact",
        "num_matvecs": 4,
        "num_density_matvecs": 2,
        "shells_per_decade": 3,
        "params": None,
        "outputs": None,
        "dtype": None,
        "memory_limit": None,
        "seed": 0,
    },
    "Settings": {
        "method": "exact",
        "num_matvecs": 4,
        "num_density_matvecs": 2,
        "shells_per_decade": 3,
        "params": None,
        "outputs": None,
        "dtype": None,
        "memory_limit": None,
        "seed": 0,
    },
    "NTKOperator": {
        "model": NET,
        "inputs": X,
        "params": None,
        "outputs": None,
        "dtype": None,
        "chunk_size": 2,
        "memory_limit": None,
        "forward": "auto",
        "mode": "eval",
    },
    "resolve_loss": {"loss": "mse", "nu": 1.0},
    "measure": {
        "model": NET,
        "probe": grsd.Probe(X, Y),
        "loss": MSE,
        "settings": grsd.Settings(method="exact"),
        "grid": GRID,
    },
    "eigendecomposition": {"op": OP, "nu": 1.0},
    "spectral_measure": {"op": OP, "start": R, "num_matvecs": 4, "nu": 1.0},
    "spectral_density": {"op": OP, "num_matvecs": 4, "nu": 1.0, "generator": None},
    "ShellGrid.logarithmic": {"low": 1e-3, "high": 1e2, "per_decade": 3},
    "ShellGrid": {"edges": GRID.edges},
    "shell_budget": {"spectrum": SPECTRUM, "residual": R, "grid": GRID, "width": None},
    "four_corner_flux": {"before": STATE, "after": STATE, "grid": GRID, "dt": 0.1, "width": None},
    "step_size": {"optimizers": torch.optim.SGD(NET.parameters(), lr=0.1)},
    "TensorBoardSink": {"writer_or_logdir": None},
    "LoggerSink": {"logger": None},
    "JSONLinesSink": {"path": "unused.jsonl"},
    "read_json_lines": {"path": "unused.jsonl"},
    "Histogram": {
        "edges": [0.0, 1.0],
        "counts": [1.0],
        "minimum": 0.0,
        "maximum": 1.0,
        "total": 0.5,
        "sum_of_squares": 0.25,
    },
    "fit_power_law": {
        "x": T,
        "y": T**-0.5,
        "y_error": None,
        "x_error": None,
        "window": None,
        "confidence": 0.9,
        "bootstrap": "auto",
        "num_bootstrap": 20,
        "min_points": 5,
        "min_decades": 1.0,
        "compare": False,
        "seed": 0,
    },
    "fit_scaling_law": {"x": T, "y": T**-0.5, "y_error": None, "confidence": 0.9, "compare": False},
    "fit_spectrum": {
        "eigenvalues": T[::-1].copy(),
        "max_rank": None,
        "min_rank": 1,
        "num_bootstrap": 20,
        "compare": False,
    },
    "fit_tail": {"eigenvalues": T, "x_min": None, "x_max": None, "num_bootstrap": 20, "compare": False},
    "fit_loss": {"flow_time": T, "loss": T**-0.5, "loss_error": None, "num_bootstrap": 20, "compare": False},
    "fit_energy": {"edges": EDGES, "energy": ENERGY, "counts": None, "resolved": None, "compare": False},
    "elasticity": {"flow_time": T, "lambda_star": T**-0.5, "num_bootstrap": 20, "compare": False},
    "frontier": {"edges": EDGES, "energy": ENERGY, "quantile": 0.5},
    "progress_contour": {"edges": EDGES, "energy_0": ENERGY, "energy_t": ENERGY / 2, "level": 0.5},
    "log_shift_invariance": {
        "eigenvalues": SPECTRUM.eigenvalues,
        "velocity": torch.eye(8, dtype=torch.float64),
        "grid": GRID,
        "min_modes": 1,
        "drop_top": 1,
        "num_null": 3,
        "seed": 0,
    },
    "find_blocks": {"model": NET, "names": None, "parameters": ()},
    "block_kernels": {"op": OP, "blocks": grsd.find_blocks(NET)},
    "block_incoherence": {"kernels": {"a": torch.eye(4), "b": torch.ones(4, 4)}, "num_outputs": 2, "seed": 0},
    "lazy_or_rich": {"signs": {"kernel_drift": 0.1}},
    "undisturbed": {"model": NET, "mode": "eval", "without": ()},
}
RECORDS = {  # results, made by us: what they hold is checked where it is made and where it is used
    name
    for name in grsd.__all__
    if isinstance(getattr(grsd, name), type) and hasattr(getattr(grsd, name), "__dataclass_fields__")
} - {"Settings", "ShellGrid", "Histogram"}
WRONG = [
    None,
    object(),
    "nonsense",
    b"bytes",
    -1,
    0,
    2.5,
    1e300,
    math.nan,
    math.inf,
    True,
    1j,
    [],
    {},
    (),
    {"a": 1},
    ["a", 2],
    torch.zeros(0),
    torch.full((2,), math.nan),
    torch.zeros(3, 3, dtype=torch.long),
    np.ones(3),
    np.array(["a", "b"]),
    len,
    nn.Linear(1, 1),
]


TAKE_FUNCTIONS = (
    "model",
    "loss",
    "params",
    "outputs",
    "unpack",
)  # what a function raises when called is its own affair
NOT_CALLED = {  # names without arguments of their own
    "TAGS",
    "MeasurementWarning",
    "MemorySink",
    "Sink",
}
IN_TESTS_OF_THEIR_OWN = {  # arguments that take a measured run or a writer to make
    "closure",
    "combine",
    "compression_exponents",
    "energy_tail",
    "finite_size_bias",
    "fit_counts",
    "local_slope",
    "quantisation_exponents",
    "regime_signs",
    "RenormalizabilityMonitor",
    "resolved_modes",
    "resource_laws",
    "self_similar_collapse",
    "shell_labels",
    "unbiased_scale",
    "gradient_propagation",
    "jacobian_evolution",
    "judge",
    "measure_conditions",
    "time_rescaling_covariance",
    "velocity_exponents",
    "verdict_table",
}


def function(name):
    target = grsd
    for part in name.split("."):
        target = getattr(target, part)
    return target


def complaint(name, arguments, changed):
    """What is wrong with how a call ends, if anything."""
    if any(callable(arguments[argument]) and argument in TAKE_FUNCTIONS for argument in changed):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(name)(**arguments)
            if hasattr(result, "__enter__"):
                with result:
                    pass
    except (ValueError, TypeError) as error:
        named = [*changed, *arguments] if "shape" in str(error) or "entries" in str(error) else changed
        if not any(argument in str(error) for argument in named):
            return f"{type(error).__name__} names none of {list(changed)}: {str(error)[:150]}"
    except OSError as error:
        if name not in ("read_json_lines", "TensorBoardSink"):
            return f"{type(error).__name__}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return None


@pytest.mark.parametrize("name", CALLS)
def test_right_arguments_are_taken(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in ("TensorBoardSink", "LoggerSink"):  # None stands for what a test of sinks makes
        return
    if name == "read_json_lines":
        grsd.JSONLinesSink("unused.jsonl").write(grsd.Emission(step=0, scalars={"a": 1.0}))
    result = function(name)(**CALLS[name])
    assert result is not None


@pytest.mark.parametrize("name", CALLS)
def test_one_wrong_argument(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for argument in CALLS[name]:
        for value in WRONG:
            if found := complaint(name, {**CALLS[name], argument: value}, [argument]):
                wrong.append((argument, repr(value)[:40], found))
    assert wrong == []


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.complex_numbers()
    | st.sampled_from([torch.zeros(2), torch.full((3, 3), math.nan), np.ones(4), nn.ReLU(), object(), torch.float16]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
QUICK = [name for name in CALLS if not name.startswith(("fit_", "elasticity", "TensorBoardSink", "ShellMonitor"))]
SIZES = {
    "num_matvecs",
    "num_density_matvecs",
    "shells_per_decade",
    "per_decade",
    "num_null",
    "high",
    "low",
    "num_probe",
}


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_several_wrong_arguments(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    name = data.draw(st.sampled_from(QUICK))
    arguments = dict(CALLS[name])
    changed = data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=3, unique=True))
    for argument in changed:
        value = data.draw(ANY)
        large = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) > 50
        if not (argument in SIZES and large):  # right, and only slow
            arguments[argument] = value
    assert complaint(name, arguments, changed) is None


def test_every_public_name_is_walked():
    known = {name.partition(".")[0] for name in CALLS} | RECORDS | NOT_CALLED | IN_TESTS_OF_THEIR_OWN
    assert set(grsd.__all__) == known
    assert not {name.partition(".")[0] for name in CALLS} & (NOT_CALLED | IN_TESTS_OF_THEIR_OWN)


@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "message"),
    [
        ("ShellDynamicsCallback", "name", 3, TypeError, "name must be a str, got int"),
        ("ShellDynamicsCallback", "json_lines", 3, TypeError, "json_lines must be 'auto', a path or None, got int"),
        ("ShellDynamicsCallback", "pair", 1, TypeError, "pair must be True or False, got 1"),
        ("ShellDynamicsCallback", "unpack", "x", TypeError, "unpack must be a function or None, got str"),
        ("ShellDynamicsCallback", "on_error", X, ValueError, "on_error must be 'warn' or 'raise'"),
        ("ShellMonitor", "model", "net", TypeError, "model must be an nn.Module, got str"),
        ("ShellMonitor", "prefix", 3, TypeError, "prefix must be a str, got int"),
        ("ShellMonitor", "writer", 3, TypeError, "writer: target must be a sink.*got int"),
        ("ShellMonitor", "loss", len, TypeError, "loss cannot be called as loss.outputs, targets."),
        ("Settings", "seed", 1.5, TypeError, "seed must be an integer, got float"),
        ("Settings", "outputs", 3, TypeError, "outputs must be a function or None, got int"),
        ("Settings", "params", 3, TypeError, "params must be None, a predicate"),
        ("NTKOperator", "dtype", "float32", TypeError, "dtype must be a floating torch.dtype or None, got 'float32'"),
        ("NTKOperator", "dtype", torch.int64, TypeError, "dtype must be a floating torch.dtype or None"),
        ("eigendecomposition", "op", "K", TypeError, "op must be an NTKOperator or a Tensor, got str"),
        ("eigendecomposition", "nu", math.nan, ValueError, "nu must be a positive number, got nan"),
        ("spectral_measure", "nu", -1, ValueError, "nu must be a positive number, got -1"),
        ("shell_budget", "grid", GRID.edges, TypeError, "grid must be a ShellGrid, got Tensor"),
        ("ShellGrid", "edges", "a", TypeError, "edges must be a tensor of numbers, got str"),
        ("measure", "probe", (X, Y), TypeError, "probe must be a Probe, got tuple"),
        ("step_size", "optimizers", 3, TypeError, "optimizers must be a torch optimizer with param_groups"),
        ("read_json_lines", "path", 3, TypeError, "path must be a str or a PathLike of str, got int"),
        ("Histogram", "edges", 3, TypeError, "edges must be numbers, got int"),
        ("Histogram", "total", "x", TypeError, "total must be a number, got str"),
        ("undisturbed", "model", 3, TypeError, "model must be an nn.Module, got int"),
        ("undisturbed", "without", "rng", TypeError, "without must be a list of names of guards, got 'rng'"),
        ("undisturbed", "without", ["rgn"], ValueError, "without: unknown guard ..rgn..; known are"),
        ("fit_power_law", "compare", 2, TypeError, "compare must be True or False, got int"),
        ("fit_power_law", "seed", -1, ValueError, "seed must be at least 0, got -1"),
        ("fit_loss", "loss_error", [1.0], ValueError, "loss_error must have 30 entries, one per point, got 1"),
    ],
)
def test_messages(name, argument, value, error, message):
    with pytest.raises(error, match=message):
        result = function(name)(**{**CALLS[name], argument: value})
        with result:
            pass


def test_step_of_a_monitor():
    def monitor():
        return grsd.ShellMonitor(NET, "mse", (X, Y), every_n_steps=1)

    for value in (-1, 1.0, "0", None, True, torch.tensor(1)):
        with pytest.raises(ValueError, match="step must be a non-negative integer, got"):
            monitor().step(value, lr=0.1)
    for value in (math.nan, "0.1", torch.ones(2), 1j):
        with pytest.raises(ValueError, match="lr must be a finite number, got"):
            monitor().step(0, lr=value)
        with pytest.raises(ValueError, match="flow_time must be a finite number, got"):
            monitor().step(0, flow_time=value)
        with pytest.raises(ValueError, match="flow_time must be a finite number, got"):
            monitor().finish(3, flow_time=value)
    with pytest.raises(ValueError, match="step must be a non-negative integer, got -3"):
        monitor().finish(-3)
    with pytest.raises(TypeError, match="optimizers must be a torch optimizer with param_groups"):
        monitor().step(0, optimizer=3)
