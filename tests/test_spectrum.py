"""Exact eigenpairs, and spectral measures from products: totals exact, shells within bounds, exact at full budget."""

import pytest
import torch
from nets import MAIN, jacobian, randn, relative, with_spectrum

from grsd_callbacks import testing as known
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.shells import ShellGrid, shell_budget
from grsd_callbacks.spectrum import Eigendecomposition, eigendecomposition, spectral_measure


@pytest.fixture(params=MAIN)
def case(request):
    """Operator, its dense kernel by jacrev, and a residual."""
    make, inputs = MAIN[request.param]
    model, x = make(), inputs()
    J = jacobian(model, x)
    return NTKOperator(model, x, forward="double_backward"), J @ J.T, randn(J.shape[0], seed=5)


def test_eigendecomposition_equals_that_of_the_dense_kernel(case):
    op, K, r = case
    spectrum = eigendecomposition(op, nu=0.3)
    truth = torch.linalg.eigvalsh(0.3 * K)
    torch.testing.assert_close(spectrum.eigenvalues, truth, rtol=0, atol=1e-12 * float(truth[-1]))
    U, lam = spectrum.eigenvectors, spectrum.eigenvalues
    assert relative((U * lam) @ U.T, 0.3 * K) < 1e-12
    assert spectrum.floor == pytest.approx(1e-13 * float(truth[-1]))
    assert float(spectrum.project(r).square().sum()) == pytest.approx(float(r @ r), rel=1e-13)


def test_single_precision_has_a_higher_floor():
    model, x, _ = with_spectrum(torch.tensor([1.0, 4.0]), dtype=torch.float32)
    assert eigendecomposition(NTKOperator(model, x)).floor == pytest.approx(4e-12, rel=1e-5)
    assert eigendecomposition(torch.diag(torch.tensor([1.0, 4.0]))).floor == pytest.approx(4e-12, rel=1e-5)
    assert eigendecomposition(torch.zeros(2, 2)).floor == 0.0


@pytest.mark.parametrize("k", [1, 2, 3, 6, 30])
def test_totals_are_exact_for_every_budget(case, k):
    op, K, r = case
    measure = spectral_measure(op, r, k, nu=0.3)
    dissipation = 0.3 * float(r @ K @ r)
    assert measure.mass == pytest.approx(float(r @ r), rel=1e-13)
    assert measure.dissipation == pytest.approx(dissipation, rel=1e-11)
    budget = shell_budget(measure, None, ShellGrid.logarithmic(1e-4, 100.0))
    assert float(budget.energy.sum()) == pytest.approx(float(r @ r) / 2, rel=1e-12)
    assert float(budget.dissipation.sum()) == pytest.approx(dissipation, rel=1e-11)
    assert float(measure.weights.sum()) == pytest.approx(float(r @ r), rel=1e-12)
    V = measure.ritz_vectors
    assert relative(V.T @ V, torch.eye(V.shape[1])) < 1e-12
    torch.testing.assert_close((V.T @ r) ** 2, measure.weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 5, 8, 12])
def test_true_shells_lie_within_the_bounds(case, k):
    op, K, r = case
    grid = ShellGrid.logarithmic(1e-4, 100.0)
    exact = shell_budget(eigendecomposition(0.3 * K), r, grid)
    budget = shell_budget(spectral_measure(op, r, k, nu=0.3), None, grid)
    for truth, bounds in (
        (exact.energy, budget.energy_bounds),
        (exact.dissipation, budget.dissipation_bounds),
    ):
        slack = 1e-11 * float(truth.sum())
        assert bool((bounds[0] <= truth + slack).all()) and bool((truth <= bounds[1] + slack).all())
    for total, lower, upper in (
        (exact.energy, *spectral_measure(op, r, k, nu=0.3).bounds(grid.edges)),
        (exact.dissipation, *spectral_measure(op, r, k, nu=0.3).dissipation_bounds(grid.edges)),
    ):
        cumulative = (total.cumsum(0) / total.sum())[:-1]
        assert bool((lower <= cumulative + 1e-11).all()) and bool((cumulative <= upper + 1e-11).all())


def test_full_budget_equals_the_exact_shells(case):
    op, K, r = case
    grid = ShellGrid.logarithmic(1e-5, 100.0)
    exact = shell_budget(eigendecomposition(0.3 * K), r, grid)
    budget = shell_budget(spectral_measure(op, r, op.shape[0], nu=0.3), None, grid)
    total = float(exact.energy.sum())
    torch.testing.assert_close(budget.energy, exact.energy, rtol=1e-8, atol=1e-12 * total)
    torch.testing.assert_close(budget.dissipation, exact.dissipation, rtol=1e-8, atol=1e-12 * total)
    assert bool(budget.resolved[1:].all())


def steep(dtype):
    """m = 25 modes over 12.6 decades, nu = 2/m; eigenvalues known in closed form."""
    law = known.PowerLawKernel(25, spectrum_exponent=9.0, source_exponent=2.0)
    op = NTKOperator(law.model().to(dtype), law.inputs.to(dtype), forward="double_backward")
    return law, op


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twelve_decades_are_resolved_at_full_budget(dtype):
    """float32: eigenvalues of the rounded matrix differ, so shells of a decade, with edges far from all eigenvalues."""
    law, op = steep(dtype)
    measure = spectral_measure(op, law.residual(0.0), 25, law.nu)
    kept = law.eigenvalues >= 1e-12
    nodes, lam = measure.nodes.flip(0)[: int(kept.sum())], law.eigenvalues[kept]
    assert float(lam[-1]) < 4e-12  # that is, 11.4 decades below the top
    error = (nodes / lam).log().abs()
    assert float(error.max()) < (0.3 if dtype == torch.float32 else 1e-4)
    if dtype == torch.float64:
        edges = (lam[:-1] * lam[1:]).sqrt().flip(0)
        budget = shell_budget(measure, None, ShellGrid(edges))
        torch.testing.assert_close(budget.energy, law.energy(0.0, edges), rtol=1e-3, atol=1e-12)


def test_single_precision_shells_equal_the_exact_ones_over_twelve_decades():
    lam = torch.logspace(-12, 0, 13, dtype=torch.float64)
    model, x, basis = with_spectrum(lam, dtype=torch.float32)
    r = basis.sum(1)  # g_i = 1
    measure = spectral_measure(NTKOperator(model, x, forward="double_backward"), r, 13)
    budget = shell_budget(measure, None, ShellGrid(torch.logspace(-12.5, 0.5, 14, dtype=torch.float64)))
    assert bool(budget.resolved[1:-1].all())
    torch.testing.assert_close(budget.energy[1:-1], torch.full((13,), 0.5).double(), rtol=0.3, atol=0)
    torch.testing.assert_close(budget.energy[3:-1], torch.full((11,), 0.5).double(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_single_precision_bounds_hold_too(seed):
    lam = torch.logspace(-8, 0, 50, dtype=torch.float64)
    model, x, basis = with_spectrum(lam, seed, torch.float32)
    r = basis @ randn(50, seed=seed)
    grid = ShellGrid(torch.logspace(-8.5, 0.5, 19, dtype=torch.float64))
    rounded = x.double()
    exact = shell_budget(eigendecomposition(rounded @ rounded.T), r, grid)
    for k in (4, 12, 30):
        measure = spectral_measure(NTKOperator(model, x, forward="double_backward"), r, k)
        for truth, (lower, upper) in (
            (exact.energy, measure.bounds(grid.edges)),
            (exact.dissipation, measure.dissipation_bounds(grid.edges)),
        ):
            cumulative = (truth.cumsum(0) / truth.sum())[:-1]
            assert float((lower - cumulative).max()) < 1e-6 and float((cumulative - upper).max()) < 1e-6


def test_degenerate_starts(case):
    op, K, r = case
    grid = ShellGrid.logarithmic(1e-4, 100.0)
    nothing = shell_budget(spectral_measure(op, 0 * r, 4), None, grid)
    assert float(nothing.energy.abs().sum()) == float(nothing.dissipation.abs().sum()) == 0.0
    lam, U = torch.linalg.eigh(K)
    single = spectral_measure(op, 2 * U[:, -1], 4)
    assert single.nodes.numel() <= 2 and float(single.nodes[-1]) == pytest.approx(float(lam[-1]), rel=1e-12)
    budget = shell_budget(single, None, grid)
    assert float(budget.energy[grid.assign(lam[-1:])]) == pytest.approx(2.0, rel=1e-9)


def test_one_sample():
    model, x, _ = with_spectrum(torch.tensor([4.0]).double())
    measure = spectral_measure(NTKOperator(model, x), torch.tensor([3.0]).double(), 5, nu=0.5)
    assert measure.nodes.tolist() == pytest.approx([2.0]) and measure.dissipation == pytest.approx(18.0)
    lower, upper = measure.dissipation_bounds(torch.tensor([1.0, 3.0]))
    assert lower.tolist() == upper.tolist() == [0.0, 1.0]


def test_one_product_bounds_the_dissipation_by_nothing():
    model, x, basis = with_spectrum(torch.tensor([1.0, 2.0, 4.0]).double())
    lower, upper = spectral_measure(NTKOperator(model, x), basis.sum(1), 1).dissipation_bounds(torch.tensor([1.5]))
    assert (lower.tolist(), upper.tolist()) == ([0.0], [1.0])


def test_refusals(case):
    op, _, r = case
    with pytest.raises(ValueError, match="num_matvecs must be a positive integer, got 0"):
        spectral_measure(op, r, 0)
    with pytest.raises(TypeError, match="num_matvecs must be an int, got float"):
        spectral_measure(op, r, 2.0)
    with pytest.raises(ValueError, match=f"start must have shape \\({op.shape[0]},\\), got \\(3,\\)"):
        spectral_measure(op, r[:3], 2)
    with pytest.raises(ValueError, match="square matrix, got shape \\(2, 3\\)"):
        eigendecomposition(torch.zeros(2, 3))


def test_default_floor():
    assert Eigendecomposition(torch.ones(1), torch.eye(1)).floor == 0.0
