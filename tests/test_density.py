"""Counts from products: the Beta law against scipy, intervals that cover, a trace with a calibrated error."""

import math

import pytest
import scipy.special
import torch
from nets import randn, with_spectrum

from grsd_callbacks.density import beta_cdf, count_interval, spectral_density
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.shells import ShellGrid, shell_budget
from grsd_callbacks.spectrum import eigendecomposition, spectral_measure


def operator(lam, seed=0):
    model, x, _ = with_spectrum(lam, seed)
    return NTKOperator(model, x, forward="double_backward")


def seeds(count):
    return (torch.Generator().manual_seed(seed) for seed in range(count))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0, 40000.0])
def test_beta_cdf_equals_scipy(scale):
    generator = torch.Generator().manual_seed(1)
    a, b = (0.5 + scale * torch.rand(400, generator=generator, dtype=torch.float64) for _ in range(2))
    mean = a / (a + b)
    spread = (mean * (1 - mean) / (a + b + 1)).sqrt()
    x = (mean + 5 * spread * torch.randn(400, generator=generator, dtype=torch.float64)).clamp(1e-6, 1 - 1e-6)
    expected = torch.from_numpy(scipy.special.betainc(a.numpy(), b.numpy(), x.numpy()))
    torch.testing.assert_close(beta_cdf(x, a, b), expected, rtol=1e-8, atol=1e-12)


def test_beta_cdf_at_the_ends():
    x = torch.tensor([0.0, 0.3, 1.0]).double()
    assert beta_cdf(x, torch.tensor(2.0), torch.tensor(3.0))[[0, 2]].tolist() == [0.0, 1.0]
    assert beta_cdf(x, torch.tensor(0.0), torch.tensor(3.0)).tolist() == [1.0, 1.0, 1.0]
    assert beta_cdf(x, torch.tensor(3.0), torch.tensor(0.0)).tolist() == [0.0, 0.0, 1.0]
    third = torch.tensor(0.3, dtype=torch.float64)
    assert float(beta_cdf(third, torch.tensor(1.0), torch.tensor(1.0))) == pytest.approx(0.3, rel=1e-12)
    small = beta_cdf(torch.tensor(1e-9, dtype=torch.float64), torch.tensor(0.5), torch.tensor(200.0))
    assert float(small) == pytest.approx(scipy.special.betainc(0.5, 200.0, 1e-9), rel=1e-8)


@pytest.mark.parametrize("number", [0, 1, 3, 10, 39, 40])
def test_intervals_of_exactly_known_masses_cover(number):
    """No Krylov error: the mass itself, drawn from its Beta law."""
    z = randn(400, 40, seed=number) ** 2
    mass = (z[:, :number].sum(1) / z.sum(1)).clamp(0.0, 1.0)
    low, high = count_interval(mass, mass, 40)
    assert float(((low <= number) & (number <= high)).double().mean()) >= 0.93


def test_interval_of_a_certain_mass():
    low, high = count_interval(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0]), 10)
    assert (low[0], high[1]) == (0.0, 10.0) and (low[2], high[2]) == (0.0, 10.0)


SPECTRA = {  # none of them on an edge, where rounding would decide what is counted
    "power law": 1.3 * torch.arange(1, 61, dtype=torch.float64) ** -1.5,
    "log-uniform": 1.3 * torch.logspace(-5, 1, 60, dtype=torch.float64),
    "outliers": torch.cat([torch.full((50,), 0.013), 1.3 * torch.logspace(-1, 2, 10)]).double(),
    "null space": torch.cat([torch.zeros(30), 1.3 * torch.logspace(-3, 1, 30)]).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_count_intervals_cover_at_least_93_percent(name):
    lam = SPECTRA[name]
    grid = ShellGrid.logarithmic(1e-5, 300.0, per_decade=1)
    truth = grid.collect(lam, torch.ones(60).double())
    op = operator(lam)
    covered = []
    for generator in seeds(60):
        counts, (low, high) = spectral_density(op, 16, generator=generator).counts(grid)
        assert float(counts.sum()) == pytest.approx(60.0, rel=1e-12)
        covered.append((low <= truth) & (truth <= high))
    share = torch.stack(covered).double()
    assert float(share.mean()) >= 0.93 and float(share.mean(0).min()) >= 0.85  # 60 draws: 0.95 less 3.5 errors


def test_counts_fill_the_budget():
    op = operator(SPECTRA["power law"])
    grid = ShellGrid.logarithmic(1e-3, 1.0)
    budget = shell_budget(spectral_measure(op, randn(60), 8), None, grid)
    assert bool(budget.counts.isnan().all())
    density = spectral_density(op, 20)
    filled = density.into(budget)
    assert float(filled.counts.sum()) == pytest.approx(60.0) and filled.count_bounds.shape == (2, grid.num_shells)
    assert torch.equal(filled.energy, budget.energy)
    assert bool((filled.count_bounds[0] <= filled.count_bounds[1]).all())


@pytest.mark.parametrize("name", ["power law", "log-uniform", "null space"])
def test_trace_is_unbiased_and_its_standard_error_calibrated(name):
    """Mean over 400 vectors within 5 standard errors of the mean; mean square of the reported error = variance."""
    lam = SPECTRA[name]
    op = operator(lam)
    found = [spectral_density(op, 1, generator=g) for g in seeds(400)]
    traces = torch.tensor([d.trace for d in found]).double()
    errors = torch.tensor([d.trace_error for d in found]).double()
    exact = math.sqrt(2 * (float(lam @ lam) - float(lam.sum()) ** 2 / 60) / (1 + 2 / 60))
    assert abs(float(traces.mean() - lam.sum())) < 5 * exact / math.sqrt(400)
    assert float(traces.std()) == pytest.approx(exact, rel=0.15)
    assert float(errors.square().mean().sqrt()) == pytest.approx(exact, rel=0.15)


def test_each_trace_lies_within_five_of_its_standard_errors():
    """Where no single eigenvalue rules: the error is estimated from the same vector."""
    lam = torch.arange(1, 61, dtype=torch.float64) ** -0.5
    op = operator(lam)
    for generator in seeds(200):
        density = spectral_density(op, 1, generator=generator)
        assert abs(density.trace - float(lam.sum())) < 5 * density.trace_error


def test_trace_of_the_square_and_effective_rank():
    lam = SPECTRA["log-uniform"]
    op = operator(lam)
    found = [spectral_density(op, 1, generator=g) for g in seeds(200)]
    squares = torch.tensor([d.trace_squared for d in found]).double()
    assert abs(float(squares.mean() - lam @ lam)) < 5 * float(squares.std()) / math.sqrt(200)
    flat = spectral_density(operator(torch.full((12,), 3.0).double()), 2)
    assert flat.trace == pytest.approx(36.0) and flat.trace_error == pytest.approx(0.0, abs=1e-4)
    assert flat.effective_rank == pytest.approx(12.0)


def test_the_default_vector_is_private_and_always_the_same():
    op = operator(SPECTRA["power law"])
    state = torch.get_rng_state()
    assert spectral_density(op, 3).trace == spectral_density(op, 3).trace
    assert torch.equal(state, torch.get_rng_state())


def test_full_budget_bounds_are_tight():
    lam = SPECTRA["log-uniform"][::4].clone()
    density = spectral_density(operator(lam), 15)
    grid = ShellGrid.logarithmic(1e-6, 100.0, per_decade=1)
    counts, bounds = density.counts(grid)
    exact = eigendecomposition(operator(lam))
    truth = grid.collect(exact.eigenvalues, torch.ones(15).double())
    assert float(counts.sum()) == pytest.approx(15.0)
    assert float(((bounds[0] <= truth) & (truth <= bounds[1])).double().mean()) >= 0.8
    zero = spectral_density(operator(torch.zeros(4).double()), 2)
    assert zero.trace == 0.0 and math.isnan(zero.effective_rank)
