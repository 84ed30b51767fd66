"""One instant, end to end: closures on real nets, closed forms of the power-law kernel, bad states, wrong use."""

import math
from dataclasses import replace

import pytest
import torch
from nets import MAIN, jacobian, mlp, orthogonal, randint, randn, relative, with_spectrum, zoo
from torch import nn

from grsd_callbacks import testing as known
from grsd_callbacks.exponents import fit_energy, fit_loss, fit_spectrum
from grsd_callbacks.losses import resolve_loss
from grsd_callbacks.measure import BadState, choose_method, measure, measure_with_operator
from grsd_callbacks.probe import Probe
from grsd_callbacks.renormalizability.blocks import BlockOperator
from grsd_callbacks.settings import Settings
from grsd_callbacks.shells import ShellGrid
from grsd_callbacks.ways import default_grid

KRYLOV = dict(method="krylov", num_density_matvecs=0)


def case(name, seed=2):
    make, inputs = MAIN[name]
    model, x = make(), inputs()
    return model, x, randn(*model(x).shape, seed=seed)


def raw_output(model, inputs):
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def squared_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    total = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    return total


# ---- closures ----


@pytest.mark.parametrize("options", [{}, KRYLOV | {"num_matvecs": 2}, KRYLOV | {"num_matvecs": 9}])
@pytest.mark.parametrize("name", MAIN)
def test_shells_partition_the_loss_and_the_squared_gradient(name, options):
    model, x, y = case(name)
    found = measure(model, Probe(x, y), resolve_loss("mse"), Settings(**options))
    loss = nn.functional.mse_loss(model(x), y)
    assert found.loss == pytest.approx(loss.item(), rel=1e-13)
    assert float(found.budget.energy.sum()) == pytest.approx(loss.item(), rel=1e-10)
    gradient = squared_gradient(model, loss)
    assert found.grad_norm_sq == pytest.approx(gradient, rel=1e-12)
    assert float(found.budget.dissipation.sum()) == pytest.approx(gradient, rel=1e-8)
    assert found.nu == pytest.approx(2 / y.numel()) and found.num_samples == 7


@pytest.mark.parametrize("options", [{}, KRYLOV | {"num_matvecs": 5}])
@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), nn.functional.huber_loss]
)
def test_dissipation_is_the_squared_gradient_for_every_loss(loss, options):
    model, x, y = case("mlp")
    targets = y if loss is nn.functional.huber_loss else randint(3, 7)
    found = measure(model, Probe(x, targets), resolve_loss(loss), Settings(**options))
    gradient = squared_gradient(model, loss(model(x), targets))
    assert float(found.budget.dissipation.sum()) == pytest.approx(gradient, rel=1e-8)


@pytest.mark.parametrize("name", sorted(zoo()))
def test_closures_of_awkward_models(name):
    model, inputs, pick = zoo()[name]
    y = randn(*pick(raw_output(model, inputs)).shape, seed=8)
    found = [measure(model, Probe(inputs, y), resolve_loss("mse"), Settings(**o)) for o in ({}, KRYLOV)]
    for instant in found:
        assert float(instant.budget.energy.sum()) == pytest.approx(instant.loss, rel=1e-10)
        assert float(instant.budget.dissipation.sum()) == pytest.approx(instant.grad_norm_sq, rel=1e-8)
    assert found[0].health["gradient_free_parameters"] == (2.0 if name == "unused" else 0.0)


@pytest.mark.parametrize("name", MAIN)
def test_full_budget_equals_the_exact_path(name):
    model, x, y = case(name)
    grid = ShellGrid.logarithmic(1e-6, 10.0)
    exact = measure(model, Probe(x, y), resolve_loss("mse"), grid=grid)
    other = measure(model, Probe(x, y), resolve_loss("mse"), Settings(**KRYLOV, num_matvecs=y.numel()), grid)
    torch.testing.assert_close(other.budget.energy, exact.budget.energy, rtol=1e-8, atol=1e-12 * exact.loss)
    torch.testing.assert_close(other.budget.dissipation, exact.budget.dissipation, rtol=1e-8, atol=1e-12)
    assert other.summary["mean_eigenvalue"] == pytest.approx(exact.summary["mean_eigenvalue"], rel=1e-10)
    assert other.summary["lambda_max"] == pytest.approx(exact.summary["lambda_max"], rel=1e-10)
    assert (exact.method, other.method) == ("exact", "krylov")
    assert exact.weights is None and other.weights.shape == other.eigenvalues.shape


@pytest.mark.parametrize("k", [2, 4, 8, 16])
@pytest.mark.parametrize("name", MAIN)
def test_true_shells_lie_within_the_krylov_bounds(name, k):
    model, x, y = case(name)
    grid = ShellGrid.logarithmic(1e-6, 10.0)
    exact = measure(model, Probe(x, y), resolve_loss("mse"), grid=grid).budget
    found = measure(model, Probe(x, y), resolve_loss("mse"), Settings(method="krylov", num_matvecs=k), grid).budget
    for truth, (low, high) in (
        (exact.energy, found.energy_bounds),
        (exact.dissipation, found.dissipation_bounds),
        (exact.counts, found.count_bounds),
    ):
        slack = 1e-10 * float(truth.sum())
        assert bool((low - slack <= truth).all()) and bool((truth <= high + slack).all())
    assert float(found.counts.sum()) == pytest.approx(y.numel(), rel=1e-9)


@pytest.mark.parametrize("k", [2, 8, 1000])
@pytest.mark.parametrize("name", MAIN)
def test_without_eigenvectors_all_but_the_shells_is_exact(name, k):
    model, x, y = case(name)
    grid = ShellGrid.logarithmic(1e-6, 10.0)
    exact = measure(model, Probe(x, y), resolve_loss("mse"), grid=grid)
    found = measure(model, Probe(x, y), resolve_loss("mse"), Settings(method="lanczos", num_matvecs=k), grid)
    assert found.method == "lanczos" and found.weights is None and found.paths == exact.paths
    torch.testing.assert_close(found.eigenvalues, exact.eigenvalues, rtol=0, atol=1e-13 * float(exact.eigenvalues[0]))
    assert torch.equal(found.budget.counts, exact.budget.counts)
    assert torch.equal(found.budget.count_bounds[0], found.budget.count_bounds[1])
    for key in (
        "lambda_max", "trace", "effective_rank", "mean_eigenvalue", "residual_norm_sq", "floor", "target_alignment"
    ):  # fmt: skip
        assert found.summary[key] == pytest.approx(exact.summary[key], rel=1e-9), key
    for what in ("energy", "dissipation"):
        truth, (low, high) = getattr(exact.budget, what), getattr(found.budget, f"{what}_bounds")
        slack = 1e-9 * float(truth.sum())
        assert bool((low - slack <= truth).all()) and bool((truth <= high + slack).all())
        assert float(getattr(found.budget, what).sum()) == pytest.approx(float(truth.sum()), rel=1e-9)
    if k >= y.numel():
        torch.testing.assert_close(found.budget.energy, exact.budget.energy, rtol=1e-6, atol=1e-12 * exact.loss)


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_shells_below_the_floor_are_not_resolved(method):
    """There the bounds are narrow, and those of a kernel that is rounding."""
    lam = torch.logspace(0, -12, 60, dtype=torch.float64)
    model, x, _ = with_spectrum(lam)
    grid, settings = ShellGrid.logarithmic(1e-14, 1.0), Settings(method, gram_dtype=torch.float32)
    found = measure(model, Probe(x, randn(60, 1, seed=3)), resolve_loss("mse"), settings, grid)
    below, resolved = grid.edges < found.summary["floor"], found.budget.resolved[1:]
    assert int(below.sum()) > 10 and not bool(resolved[below].any()) and int(resolved[~below].sum()) > 10


@pytest.mark.parametrize("name", MAIN)
def test_without_a_grid_it_is_that_of_the_exact_way(name):
    model, x, y = case(name)
    exact, found = (measure(model, Probe(x, y), resolve_loss("mse"), Settings(m)).budget for m in ("exact", "lanczos"))
    torch.testing.assert_close(found.grid.edges, exact.grid.edges, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MAIN)
def test_scalars_against_the_dense_kernel(name):
    model, x, y = case(name)
    found = measure(model, Probe(x, y), resolve_loss("mse"))
    J, nu = jacobian(model, x), 2 / y.numel()
    M, r = nu * J @ J.T, math.sqrt(nu) * (model(x) - y).detach().flatten()
    lam = torch.linalg.eigvalsh(M)
    expected = {
        "lambda_max": lam[-1],
        "trace": M.trace(),
        "effective_rank": M.trace() ** 2 / (M * M).sum(),
        "mean_eigenvalue": (r @ M @ M @ r) / (r @ M @ r),
        "residual_norm_sq": r @ r,
        "floor": 1e-13 * lam[-1],
        "target_alignment": (y.flatten() @ M @ y.flatten()) / (M.norm() * y.square().sum()),
        "num_parameters": torch.tensor(J.shape[1]),
    }
    for key, value in expected.items():
        assert found.summary[key] == pytest.approx(float(value), rel=1e-10), key
    torch.testing.assert_close(found.eigenvalues, lam.flip(0), rtol=0, atol=1e-12 * float(lam[-1]))
    assert float(found.budget.counts.sum()) == y.numel()
    assert found.cost["seconds"] > 0


def test_krylov_trace_is_an_estimate_with_an_error():
    model, x, y = case("cnn")
    exact = measure(model, Probe(x, y), resolve_loss("mse")).summary
    found = measure(model, Probe(x, y), resolve_loss("mse"), Settings(method="krylov", num_density_matvecs=8)).summary
    assert found["trace_error"] > 0 and abs(found["trace"] - exact["trace"]) < 5 * found["trace_error"]
    without = measure(model, Probe(x, y), resolve_loss("mse"), Settings(**KRYLOV)).summary
    assert math.isnan(without["trace"]) and math.isnan(without["effective_rank"])


def test_the_model_is_left_bit_identical():
    model, x, y = case("transformer")
    before = {name: (p.clone(), p._version) for name, p in model.named_parameters()}
    for options in ({}, {"method": "lanczos"}, KRYLOV):
        measure(model, Probe(x, y), resolve_loss("mse"), Settings(**options))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p._version == before[name][1] and p.grad is None


def test_the_same_twice():
    model, x, y = case("cnn")
    a, b = (measure(model, Probe(x, y), resolve_loss("mse"), Settings(method="krylov")) for _ in range(2))
    assert torch.equal(a.budget.energy, b.budget.energy) and torch.equal(a.budget.counts, b.budget.counts)


def test_rotating_function_space_changes_no_shell():
    model, x, y = case("mlp")
    rotated, targets = known.rotate_outputs(mlp(), y, orthogonal(3, 7))
    a = measure(model, Probe(x, y), resolve_loss("mse"))
    b = measure(rotated, Probe(x, targets), resolve_loss("mse"), grid=a.budget.grid)
    torch.testing.assert_close(a.budget.energy, b.budget.energy, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(a.budget.dissipation, b.budget.dissipation, rtol=1e-10, atol=1e-13)


def test_single_precision_model():
    model, x, y = case("mlp")
    grid = ShellGrid.logarithmic(1e-6, 10.0)
    exact = measure(model, Probe(x, y), resolve_loss("mse"), grid=grid)
    single = measure(mlp().float(), Probe(x.float(), y.float()), resolve_loss("mse"), grid=grid)
    assert relative(single.budget.energy, exact.budget.energy) < 1e-4
    assert float(single.budget.energy.sum()) == pytest.approx(single.loss, rel=1e-10)
    assert float(single.budget.dissipation.sum()) == pytest.approx(single.grad_norm_sq, rel=1e-5)
    wide = measure(mlp().float(), Probe(x, y), resolve_loss("mse"), Settings(dtype=torch.float64), grid)
    assert float(wide.budget.dissipation.sum()) == pytest.approx(wide.grad_norm_sq, rel=1e-10)


# ---- problem 1: the power-law kernel ----


def at_time(law, t, model=None):
    """The model with its parameters on the exact gradient flow at time t."""
    model = law.model() if model is None else model
    moved = (law.residual(t) - law.residual(0.0)) / math.sqrt(law.nu)
    with torch.no_grad():
        model.weight.copy_(torch.linalg.lstsq(law.inputs, moved[:, None]).solution.T)
    return model


def offset_grid(low, high, per_decade=3):
    """Edges away from 1 = lambda_1, which lies on an aligned edge to the last bit."""
    return ShellGrid(1.3 * ShellGrid.logarithmic(low, high, per_decade).edges)


LAW = known.PowerLawKernel(60, spectrum_exponent=1.5, source_exponent=1.9)


@pytest.mark.parametrize("options", [{}, KRYLOV | {"num_matvecs": 60}])
@pytest.mark.parametrize("t", [0.0, 0.3, 5.0, 80.0])
def test_shells_of_the_exact_flow(t, options):
    grid = offset_grid(1e-3, 1.0)
    found = measure(at_time(LAW, t), Probe(LAW.inputs, LAW.targets), resolve_loss("mse"), Settings(**options), grid)
    torch.testing.assert_close(found.budget.energy, LAW.energy(t, grid.edges), rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(found.budget.dissipation, LAW.dissipation(t, grid.edges), rtol=1e-8, atol=1e-14)
    assert found.loss == pytest.approx(LAW.loss(t), rel=1e-10)
    if not options:
        assert torch.equal(found.budget.counts, LAW.counts(t, grid.edges).double())
        torch.testing.assert_close(found.eigenvalues, LAW.eigenvalues, rtol=1e-10, atol=0)


def test_shells_after_exact_descent():
    model, grid = LAW.model(), offset_grid(1e-3, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.7)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(LAW.inputs), LAW.targets).backward()
        optimizer.step()
    found = measure(model, Probe(LAW.inputs, LAW.targets), resolve_loss("mse"), grid=grid)
    g = LAW.basis.T @ LAW.descent_residual(0.7, 40)
    expected = grid.collect(LAW.eigenvalues, g**2 / 2)
    torch.testing.assert_close(found.budget.energy, expected, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("t", [0.0, 20.0])
def test_full_shells_agree_with_the_continuum(t):
    """1 % on shells of at least 100 modes that lie inside the spectrum."""
    law = known.PowerLawKernel(700, spectrum_exponent=1.0, source_exponent=1.7)
    grid = ShellGrid(torch.tensor([1 / 650.5, 1 / 420.5, 1 / 250.5, 1 / 140.5], dtype=torch.float64))
    found = measure(at_time(law, t), Probe(law.inputs, law.targets), resolve_loss("mse"), grid=grid).budget
    assert found.counts[1:4].tolist() == [230.0, 170.0, 110.0]
    torch.testing.assert_close(found.energy[1:4], law.energy_continuum(t, grid.edges)[1:4], rtol=0.01, atol=0)
    torch.testing.assert_close(found.energy, law.energy(t, grid.edges), rtol=1e-8, atol=1e-14)


def run_of(law, times, scale=1.0):
    """Instants along the exact flow, the loss multiplied by `scale` (which speeds time up by as much)."""
    loss = resolve_loss("mse" if scale == 1.0 else lambda f, y: scale * nn.functional.mse_loss(f, y))
    if scale != 1.0:
        loss = replace(loss, nu=scale * law.nu)
    probe, grid = Probe(law.inputs, law.targets), offset_grid(scale * 1e-3, scale * 1.0)  # all inner shells are full
    return [measure(at_time(law, t), probe, loss, grid=grid) for t in times]


def exponents_of(instants, times):
    first = instants[0].budget
    return {
        "a": fit_spectrum(instants[0].eigenvalues.numpy()),
        "q": fit_energy(first.grid.edges.numpy(), first.energy.numpy(), first.counts.numpy(), first.resolved.numpy()),
        "chi": fit_loss(times, [i.loss for i in instants]),
    }


# a q = 0.6: the loss has a heavy tail beyond K modes, so chi is fitted where it does not matter yet
EXPONENT_LAW = known.PowerLawKernel(300, spectrum_exponent=1.2, source_exponent=1.9)
TIMES = [0.0, *torch.logspace(0.3, 1.6, 14, dtype=torch.float64).tolist()]


def test_exponents_of_the_power_law():
    """a and q by their own intervals; chi = q after the finite-size tail is added; mean eigenvalue (q + 1)/2t."""
    law, q = EXPONENT_LAW, 0.75
    instants = run_of(law, TIMES)
    fits = exponents_of(instants, TIMES)
    assert fits["a"].lower - 1e-9 <= 1.2 <= fits["a"].upper + 1e-9 and abs(fits["a"].exponent - 1.2) < 1e-6
    assert fits["q"].lower <= q <= fits["q"].upper and fits["q"].upper - fits["q"].lower < 0.1
    chi = fit_loss(TIMES, [i.loss + law.loss_tail for i in instants])
    assert chi.exponent == pytest.approx(q, abs=0.02)
    assert chi.lower <= q <= chi.upper
    for t, instant in zip(TIMES, instants, strict=True):
        if 5 < t < 40:  # 1/lambda_1 << t << 1/lambda_K
            assert 2 * t * instant.summary["mean_eigenvalue"] == pytest.approx(q + 1, rel=0.01)


def test_scaling_the_loss_by_ten_shifts_shells_and_time_and_no_exponent():
    law = known.PowerLawKernel(120, spectrum_exponent=1.2, source_exponent=1.9)
    plain, scaled = run_of(law, TIMES), run_of(law, TIMES, scale=10.0)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b.eigenvalues, 10 * a.eigenvalues, rtol=1e-10, atol=0)
        torch.testing.assert_close(b.budget.energy, 10 * a.budget.energy, rtol=1e-9, atol=1e-14)
        torch.testing.assert_close(b.budget.dissipation, 100 * a.budget.dissipation, rtol=1e-9, atol=1e-13)
    found = exponents_of(plain, TIMES)
    shifted = exponents_of(scaled, [t / 10 for t in TIMES])
    for key, fit in found.items():
        assert shifted[key].exponent == pytest.approx(fit.exponent, rel=1e-6), key


def test_a_tenth_of_the_learning_rate_changes_nothing_but_the_number_of_steps():
    law = known.PowerLawKernel(40, spectrum_exponent=1.2, source_exponent=1.9)
    grid = offset_grid(1e-2, 1.0)
    energies = []
    for lr, steps in ((0.02, 500), (0.002, 5000)):
        moved = (law.descent_residual(lr, steps) - law.residual(0.0)) / math.sqrt(law.nu)
        model = law.model()
        with torch.no_grad():
            model.weight.copy_(torch.linalg.lstsq(law.inputs, moved[:, None]).solution.T)
        found = measure(model, Probe(law.inputs, law.targets), resolve_loss("mse"), grid=grid)
        torch.testing.assert_close(found.eigenvalues, law.eigenvalues, rtol=1e-10, atol=0)
        energies.append(found.budget.energy)
    kept = energies[0] > 1e-4 * float(energies[0].sum())
    torch.testing.assert_close(energies[0][kept], energies[1][kept], rtol=0.05, atol=0)


def test_zero_residual_gives_zeros():
    model, x, _ = case("mlp")
    for options in ({}, {"method": "lanczos"}, {"method": "krylov"}):
        found = measure(model, Probe(x, model(x).detach()), resolve_loss("mse"), Settings(**options))
        assert found.loss == 0.0 and float(found.budget.energy.abs().sum()) == 0.0
        assert float(found.budget.dissipation.abs().sum()) == 0.0 and math.isnan(found.summary["mean_eigenvalue"])


# ---- grids and methods ----


def test_the_default_grid_encloses_and_leaves_headroom():
    grid = default_grid(2.0, 3e-4, 1e-12, 3)
    assert float(grid.edges[0]) <= 3e-5 and float(grid.edges[-1]) >= 200.0
    assert float(default_grid(1.0, 1e-30, 1e-20, 3).edges[0]) == pytest.approx(1e-12)
    assert float(default_grid(1.0, 1e-30, 1e-6, 3).edges[0]) == pytest.approx(1e-6)
    assert default_grid(0.0, 0.0, 0.0, 3).num_shells > 2
    assert default_grid(math.inf, 1.0, 0.0, 3).num_shells > 2


def test_auto_takes_the_exact_path_while_it_is_small():
    model, x, y = case("mlp")
    instant, op = measure_with_operator(model, Probe(x, y), resolve_loss("mse"), Settings())
    assert instant.method == "exact" == choose_method("auto", op)
    assert choose_method("krylov", op) == "krylov"
    large, inputs, _ = with_spectrum(torch.ones(1025).double())
    few = Settings(**KRYLOV, num_matvecs=2)
    _, op = measure_with_operator(large, Probe(inputs, randn(1025, 1)), resolve_loss("mse"), few)
    assert choose_method("auto", op) == "krylov"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "arnoldi"}, "method must be one of"),
        ({"num_matvecs": 1}, "num_matvecs must be an integer of at least 2, got 1"),
        ({"num_matvecs": True}, "num_matvecs"),
        ({"num_density_matvecs": -1}, "num_density_matvecs must be an integer of at least 0"),
        ({"shells_per_decade": 0}, "shells_per_decade must be an integer of at least 1"),
        ({"shells_per_decade": 2.5}, "got 2.5"),
        ({"dtype": torch.float16}, "dtype must be torch.float32, torch.float64 or None"),
        ({"gram_dtype": "float32"}, "gram_dtype must be torch.float32, torch.float64 or None, got 'float32'"),
        ({"memory_limit": 0}, "memory_limit must be a positive number of bytes, got 0"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_targets_that_do_not_fit():
    model, x, _ = case("mlp")
    with pytest.raises(ValueError, match="outputs' shape"):
        measure(model, Probe(x, randn(7)), resolve_loss("mse"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_states(value):
    model, x, y = case("mlp")
    with torch.no_grad():
        model[2].weight[0, 0] = value
    with pytest.raises(BadState, match="parameters hold NaN or Inf: 2.weight"):
        measure(model, Probe(x, y), resolve_loss("mse"))
    x[3, 1] = value
    with pytest.raises(BadState, match="outputs or the loss|gradient of the loss on the probe"):
        measure(mlp(), Probe(x, y), resolve_loss("mse"))


def test_rank_deficient_kernels_put_the_null_space_in_the_underflow():
    model, x = nn.Linear(2, 1, bias=False).double(), randn(9, 2)
    found = measure(model, Probe(x, randn(9, 1, seed=1)), resolve_loss("mse"))
    assert float(found.budget.counts[0]) == 7.0 and float(found.budget.counts.sum()) == 9.0
    assert float(found.budget.dissipation[0]) <= 1e-12 * float(found.budget.dissipation.sum())


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_a_kernel_that_its_operator_keeps_is_left_as_it_is(method):
    """Scaled by nu in a copy: the operator may hand the same matrix to others."""
    model, x, y = case("cnn")
    op = BlockOperator(model, x)
    before = op.exact_gram().matrix.clone()
    measure_with_operator(model, Probe(x, y), resolve_loss("mse"), Settings(method), op=op)
    assert op.exact_gram().matrix is op.exact_gram().matrix and torch.equal(op.exact_gram().matrix, before)
