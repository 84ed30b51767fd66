"""Position and reach against a dense kernel; the estimated rank within the shell that holds the scale."""

import math

import pytest
import torch
from nets import randn

from grsd_callbacks import ShellGrid, ShellMonitor, shell_budget
from grsd_callbacks.position import spectral_position, spectral_reach
from grsd_callbacks.spectrum import Eigendecomposition


def budget(values, per_decade=3):
    spectrum = Eigendecomposition(values, torch.eye(len(values)).double())
    return shell_budget(spectrum, torch.ones(len(values)).double(), ShellGrid.logarithmic(1e-4, 10.0, per_decade))


def test_position_in_three_units():
    values = torch.tensor([1.0, 0.5, 0.1, 0.01]).double()
    found = spectral_position(0.25, 1.0, 0.4025, budget(values), values)
    assert found == {"position_relative": 0.25, "position_to_mean": pytest.approx(0.25 / 0.4025), "position_rank": 2.0}


def test_rank_from_counts_is_right_within_the_shell_that_holds_the_scale():
    values = torch.logspace(-3, 0, 200, dtype=torch.float64)
    shells = budget(values)
    for scale in (2e-3, 0.03, 0.7):
        exact = spectral_position(scale, 1.0, math.nan, shells, values)["position_rank"]
        estimate = spectral_position(scale, 1.0, math.nan, shells, None)["position_rank"]
        assert abs(estimate - exact) < 3  # 22 eigenvalues a shell, evenly spread


def test_what_is_not_known_is_nan():
    values = torch.tensor([1.0, 0.5]).double()
    nothing = spectral_position(math.nan, 0.0, math.nan, budget(values), values)
    assert all(math.isnan(value) for value in nothing.values())
    assert math.isnan(spectral_position(1e-9, 1.0, 1.0, budget(values), None)["position_rank"])


def test_reach_is_the_deepest_so_far_and_skips_what_is_not_known():
    first = spectral_reach({"position_relative": 0.5, "position_rank": 3.0}, {})
    assert first == {"reach_relative": 0.5, "reach_rank": 3.0}
    back = spectral_reach({"position_relative": 0.6, "position_rank": 2.0}, first)
    assert back == first
    assert spectral_reach({"position_relative": math.nan, "position_rank": math.nan}, first) == first
    assert all(math.isnan(value) for value in spectral_reach({}, {}).values())


def trained(**options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 30), torch.nn.Tanh(), torch.nn.Linear(30, 2)).double()
    x, y = randn(24, 6), randn(24, 2, seed=1)
    monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=10, figures=False, on_error="raise", **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for step in range(60):
        monitor.step(step, optimizer=optimizer)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    monitor.finish()
    return monitor


def test_a_run_emits_position_and_reach_and_says_what_is_estimated():
    exact, krylov = trained(), trained(method="krylov", num_matvecs=24, num_density_matvecs=40)
    for ours, other in zip(exact.history, krylov.history, strict=True):
        values = ours.eigenvalues
        scale = ours.summary["mean_eigenvalue"]
        assert ours.summary["position_relative"] == pytest.approx(scale / float(values[0]), rel=1e-12)
        assert ours.summary["position_to_mean"] == pytest.approx(scale / float(values.mean()), rel=1e-12)
        assert ours.summary["position_rank"] == float((values > scale).sum())
        assert other.summary["mean_eigenvalue"] == pytest.approx(scale, rel=1e-9)  # exact with every method
        assert other.summary["position_relative"] == pytest.approx(ours.summary["position_relative"], rel=1e-6)
        assert abs(other.summary["position_rank"] - ours.summary["position_rank"]) <= 6
        assert ours.health["estimated_position"] == 0.0 and other.health["estimated_position"] == 1.0
    positions = [s.summary["position_relative"] for s in exact.history]
    assert exact.history[-1].summary["reach_relative"] == min(positions)
    assert positions[-1] < positions[0]
    assert exact.history[-1].summary["reach_rank"] == max(s.summary["position_rank"] for s in exact.history)
