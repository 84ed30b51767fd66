"""What a run remembers for its exponents: bounded series, windows, finite size, velocities; and the closures."""

import math

import numpy as np
import pytest
import torch
from known_runs import train
from nets import randn, with_spectrum

from grsd_callbacks import ShellGrid, ShellMonitor, four_corner_flux
from grsd_callbacks import testing as known
from grsd_callbacks.drift import spectral_velocity
from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.flux import KernelState
from grsd_callbacks.trajectory import MAX_POINTS, Trajectory, exponent_closures, flat


def fit(exponent, half=0.1, **evidence):
    return PowerLawFit(exponent, exponent - half, exponent + half, 1.0, (1, 10), 9, 1.0, "power_law", "", evidence)


def test_memory_is_bounded_and_a_power_law_survives_the_thinning():
    long = Trajectory()
    for k in range(20_000):
        long.append(0.1 * k, max(0.1 * k, 0.1) ** -0.6, torch.zeros(3))
        if k % 7 == 0:
            long.append_velocity(0.1 * k, 0.1 * k + 0.1, torch.tensor([1.0, 2.0]))
        assert len(long.flow_time) <= MAX_POINTS and len(long.velocity) <= MAX_POINTS // 2
    assert long.flow_time[0] == 0.0 and long.flow_time[-1] == pytest.approx(1999.9)
    assert len({len(getattr(long, name)) for name in ("flow_time", "loss", "frontier", "contour")}) == 1
    chi = long.fits(compare=False)["chi"]
    assert chi.exponent == pytest.approx(0.6, abs=1e-9) and chi.num_decades > 3


@pytest.mark.parametrize("method", ["exact", "lanczos"])
def test_no_exponent_of_the_spectrum_is_fitted_to_rounding(method):
    """A kernel of float32 products goes flat within the ranks of the window."""
    model, x, _ = with_spectrum(torch.arange(1, 301, dtype=torch.float64) ** -5.0)
    options = {"method": method, "gram_dtype": torch.float32, "every_n_steps": 1}
    monitor = ShellMonitor(model, "mse", (x, randn(300, 1)), **options)
    found = monitor.step(0, lr=0.1)
    for fit_of_a in (found.exponents["a"], found.exponents["a_start"], monitor.final_exponents()["a"]):
        assert fit_of_a.exponent == pytest.approx(5.0, abs=0.01) and fit_of_a.window[1] < 25


def test_without_eigenvectors_what_eigenvalues_tell_is_that_of_the_exact_method():
    """Of 120 modes, a = 3/2, by 24 products: most shells' energies are not resolved, all their counts are."""
    system = known.PowerLawKernel(120, 1.5, 1 + 1.5 * 0.75)
    exact, ours = (train(system, 0.2, 300, method=method, num_matvecs=24) for method in ("exact", "lanczos"))
    assert not bool(ours.history[-1].resolved[1:7].any()) and ours.history[0].weights is None
    for end in (lambda m: m.final_exponents(), lambda m: m.history[-1].exponents):
        truth, found = end(exact), end(ours)
        for name in ("a", "a_start", "count"):
            assert not found[name].refused and found[name].num_points == truth[name].num_points
            assert found[name].exponent == pytest.approx(truth[name].exponent, rel=1e-9)
            assert found[name].lower == pytest.approx(truth[name].lower, rel=1e-6)
        assert found["densing"].exponent == pytest.approx(truth["densing"].exponent, rel=0.03)
    for before, after in zip(exact.history[1:], ours.history[1:], strict=True):
        k = before.summary["resolved_modes"]
        assert k == pytest.approx(after.summary["resolved_modes"], rel=0.02, nan_ok=True)
    assert math.isfinite(k) and k > 5
    found = ours.history[-1].closures
    for name in ("count_slope", "count_slope_lower"):
        assert found[name] == pytest.approx(exact.history[-1].closures[name], rel=1e-6)
    assert math.isfinite(found["densing"]) and "chi_tail" not in ours.final_exponents()


def test_the_start_of_a_run_without_eigenvectors_outlives_a_checkpoint():
    model, x, _ = with_spectrum(torch.arange(1, 101, dtype=torch.float64) ** -2.0)
    monitor = ShellMonitor(model, "mse", (x, randn(100, 1)), method="lanczos", num_matvecs=8, every_n_steps=1)
    monitor.step(0, lr=0.1)
    start = Trajectory.from_state(monitor.run.trajectory.state_dict()).frozen
    assert np.array_equal(np.sort(start.eigenvalues), monitor.history[0].eigenvalues.numpy()[::-1])
    assert start.capacity.exponent == pytest.approx(2.0, abs=1e-6) and math.isnan(start.tail.value)
    assert start.smallest == float(monitor.history[0].eigenvalues[-1])


def test_velocity_of_an_interval_that_is_too_long_is_left_out():
    series = Trajectory()
    v = torch.tensor([1.0, 2.0])
    for before, after in ((0.0, 1.0), (1.0, 3.0), (2.0, 2.0)):
        series.append_velocity(before, after, v)
    series.append_velocity(1.0, 1.5, v * math.nan)
    assert series.velocity == []
    series.append_velocity(1.0, 1.5, v)
    assert series.velocity_time == [math.sqrt(1.5)]


def drifting(rate, dt=0.01, m=300):
    """Fixed eigenvectors whose log eigenvalues drift by rate * lambda, in random orthogonal bases."""
    lam = torch.logspace(-3, 0, m, dtype=torch.float64)
    r = lam**0.5
    eye = torch.eye(m, dtype=torch.float64)
    moved = lam * torch.exp(rate * lam * dt)
    return KernelState(lam, eye, r), KernelState(moved, eye, r * (1 - dt * lam))


def test_velocity_of_a_pure_drift_is_its_rate_times_lambda_squared():
    grid, dt = ShellGrid.logarithmic(1e-4, 10.0, 3), 0.01
    v = spectral_velocity(*drifting(-0.7, dt), grid, dt)
    inner = (grid.edges > 3e-3) & (grid.edges < 0.5)
    assert torch.allclose(v[inner], -0.7 * grid.edges[inner] ** 2, rtol=0.12)
    assert bool(v[grid.edges > 2.0].isnan().all()) and bool(v[grid.edges < 2e-4].isnan().all())
    still = KernelState(*(getattr(drifting(0.0)[0], name) for name in ("eigenvalues", "vectors", "residual")))
    assert bool(spectral_velocity(still, still, grid, dt).isnan().all())


def test_velocity_is_the_sharp_flux_over_the_energy_beside_the_edge():
    """Against four corners of sharp shells, `J h / sqrt(E_below E_above)`, where many modes cross in the interval."""
    grid, dt = ShellGrid.logarithmic(1e-4, 10.0, 3), 2.0
    before, after = drifting(0.5, dt, m=1200)
    flux = four_corner_flux(before, after, grid, dt).flux
    energy = 0.5 * (before.energies(before.residual, grid)[0] + after.energies(after.residual, grid)[0])
    u = flux * grid.width / (energy[:-1] * energy[1:]).sqrt()
    v = spectral_velocity(before, after, grid, dt)
    inner = (grid.edges > 0.04) & (grid.edges < 0.3)
    assert torch.allclose(v[inner], (grid.edges * u)[inner], rtol=0.2) and bool((v[inner] > 0).all())


def test_closures_are_those_of_the_exponents_and_nan_where_one_is_missing():
    fits = {name: fit(x) for name, x in (("q", 0.5), ("chi", 0.7), ("rho", 1.2), ("a", 2.0), ("count", 0.5))}
    found = exponent_closures(fits)
    assert found["chi_minus_rho_q"].value == pytest.approx(0.7 - 0.6) and found["count_slope"].value == pytest.approx(0)
    assert not found["densing"].holds and math.isnan(found["covariance"].value)
    more = {**fits, "chi_tail": fit(0.6), "rho_contour": fit(1.1), "a_start": fit(2.2), "densing": fit(0.55)}
    more |= {"p": fit(0.0, residual=0.1, residual_lower=-0.1, residual_upper=0.3), "pi_c": fit(0.5)}
    found = exponent_closures(more)
    assert found["chi_minus_rho_q"].value == pytest.approx(0.6 - 0.55)  # the tail's chi and the contour's rho
    assert found["densing"].value == pytest.approx(0.55 - 1.1 / 2.2)
    assert found["covariance"].holds and found["compression"].value == pytest.approx(0.6 / 0.5 - 1.1)
    unbounded = flat(exponent_closures({"a": fit(0.05), "count": fit(1.0)}))
    assert all(math.isnan(value) for value in unbounded.values())  # 1/a has no interval: no number either


def test_state_comes_back_whole():
    monitor = train(known.TransportKernel(40, 1.5, 2.0, 1.0), 0.5, 60, per_decade=6)
    ours = monitor.run.trajectory
    again = Trajectory.from_state(ours.state_dict())
    assert repr(again.state_dict()) == repr(ours.state_dict())
    assert {n: f.exponent for n, f in again.fits().items() if not f.refused} == {
        n: f.exponent for n, f in ours.fits().items() if not f.refused
    }


def test_a_null_space_with_energy_or_a_matrix_free_method_has_no_tail():
    features = train(known.PowerLawRandomFeatures(40, 20, 1.0, 0.3), 0.2, 30, per_decade=4)
    assert math.isnan(features.run.trajectory.frozen.tail.value)
    krylov = train(known.PowerLawKernel(60, 1.5, 2.0), 0.2, 30, per_decade=4, method="krylov", num_matvecs=20)
    assert math.isnan(krylov.run.trajectory.frozen.tail.value) and krylov.run.trajectory.window() == "search"
    assert "chi_tail" not in krylov.final_exponents() and "pi_c" not in krylov.final_exponents()
    assert np.isfinite(krylov.run.trajectory.contour[1:]).any()  # contour from the Gauss nodes' own shells
