"""Shells partition the spectrum, their contents the loss and the squared gradient; windows sum to one."""

import math

import pytest
import torch
from nets import randn, with_spectrum

from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.shells import ShellGrid, shell_budget
from grsd_callbacks.spectrum import Eigendecomposition, spectral_measure

GRID = ShellGrid.logarithmic(1e-3, 10.0)


@pytest.mark.parametrize("per_decade", [1, 2, 3, 7])
@pytest.mark.parametrize("low, high", [(1e-3, 10.0), (2.3e-7, 0.9), (4.0, 5.0), (0.1, 1.0)])
def test_edges_are_aligned_and_enclose(low, high, per_decade):
    edges = ShellGrid.logarithmic(low, high, per_decade).edges
    steps = per_decade * edges.log10()
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    assert torch.equal(edges, 10.0 ** (steps.round() / per_decade)) or float(steps.diff().max()) < 1 + 1e-9
    assert float(edges[0]) <= low * (1 + 1e-8) and float(edges[-1]) >= high * (1 - 1e-8)
    assert float(edges[0]) > low * 10 ** (-1 / per_decade) * (1 - 1e-8)
    assert float(edges[-1]) < high * 10 ** (1 / per_decade) * (1 + 1e-8)


def test_edges_of_two_runs_coincide():
    a, b = ShellGrid.logarithmic(1e-4, 3.0), ShellGrid.logarithmic(2e-2, 500.0)
    shared = set(a.edges.tolist()) & set(b.edges.tolist())
    assert len(shared) == 9  # 10^(-6/3) .. 10^(2/3), bit for bit


def test_a_value_on_an_edge_belongs_to_the_shell_above():
    shells = GRID.assign(GRID.edges)
    assert shells.tolist() == list(range(1, GRID.num_shells))
    below = torch.nextafter(GRID.edges, torch.zeros_like(GRID.edges))
    assert GRID.assign(below).tolist() == list(range(GRID.num_shells - 1))


def test_underflow_and_overflow():
    values = torch.tensor([-1e-16, 0.0, 5e-4, 11.0, 1e9]).double()
    assert GRID.assign(values).tolist() == [0, 0, 0, GRID.num_shells - 1, GRID.num_shells - 1]
    assert GRID.windows(values).argmax(0).tolist() == GRID.assign(values).tolist()
    smooth = GRID.windows(values, 0.3)
    assert bool((smooth[0, :2] > 1 - 1e-14).all())


@pytest.mark.parametrize("width", [None, 1e-3, 0.2, GRID.width / 2, GRID.width, 5.0])
def test_windows_sum_to_one(width):
    values = torch.cat([torch.tensor([-1e-18, 0.0, 1e-300]), torch.logspace(-20, 20, 200), GRID.edges]).double()
    windows = GRID.windows(values, width)
    assert windows.shape == (GRID.num_shells, values.numel())
    torch.testing.assert_close(windows.sum(0), torch.ones(values.numel()).double(), rtol=0, atol=1e-14)
    assert float(windows.min()) >= 0.0


def test_smooth_steps_are_half_on_their_edge_and_sharpen():
    assert GRID.steps(GRID.edges, 0.7).diagonal().tolist() == pytest.approx([0.5] * GRID.edges.numel(), abs=1e-14)
    values = torch.logspace(-4, 2, 37, dtype=torch.float64) * 1.01
    torch.testing.assert_close(GRID.windows(values, 1e-4), GRID.windows(values), rtol=0, atol=1e-9)


def test_collect_sums_by_shell():
    values = torch.tensor([0.0, 0.002, 0.0021, 20.0]).double()
    found = GRID.collect(values, torch.tensor([1.0, 2.0, 4.0, 8.0]).double())
    assert float(found.sum()) == 15.0 and found[0] == 1.0 and found[1] == 6.0 and found[-1] == 8.0
    assert float(GRID.collect(torch.zeros(0).double(), torch.zeros(0).double()).sum()) == 0.0


def test_centers_and_width():
    grid = ShellGrid.logarithmic(0.01, 1.0, per_decade=1)
    assert grid.width == pytest.approx(math.log(10))
    assert grid.centers.tolist() == pytest.approx([10**-2.5, 10**-1.5, 10**-0.5, 10**0.5])


def test_names_are_zero_padded():
    assert ShellGrid.logarithmic(0.01, 1.0, per_decade=1).names() == ["under", "s00", "s01", "over"]
    names = ShellGrid.logarithmic(1e-12, 1.0, per_decade=10).names()
    assert names[1] == "s000" and names[-2] == "s119" and names == ["under", *sorted(names[1:-1]), "over"]
    assert len(names) == 122


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ShellGrid(torch.tensor([1.0])), "at least 2 values, got shape \\(1,\\)"),
        (lambda: ShellGrid(torch.ones(2, 2)), "vector of at least 2"),
        (lambda: ShellGrid(torch.tensor([1.0, 1.0])), "strictly ascending"),
        (lambda: ShellGrid(torch.tensor([0.0, 1.0])), "positive"),
        (lambda: ShellGrid(torch.tensor([1.0, math.inf])), "finite"),
        (lambda: ShellGrid(torch.tensor([math.nan, 1.0])), "finite"),
        (lambda: ShellGrid.logarithmic(1.0, 1.0), "0 < low < high, got low=1.0, high=1.0"),
        (lambda: ShellGrid.logarithmic(0.0, 1.0), "0 < low < high"),
        (lambda: ShellGrid.logarithmic(1.0, math.inf), "0 < low < high"),
        (lambda: ShellGrid.logarithmic(0.1, 1.0, 0), "per_decade must be a positive integer, got 0"),
        (lambda: ShellGrid.logarithmic(0.1, 1.0, -2), "per_decade must be a positive integer"),
        (lambda: GRID.steps(torch.ones(2).double(), 0.0), "width must be positive \\(or None"),
        (lambda: GRID.windows(torch.ones(2).double(), -1.0), "width must be positive"),
        (
            lambda: shell_budget(Eigendecomposition(torch.ones(2), torch.eye(2)), torch.ones(3), GRID),
            "residual must have shape \\(2,\\), got \\(3,\\)",
        ),
        (lambda: shell_budget(Eigendecomposition(torch.ones(2), torch.eye(2)), None, GRID), "got None"),
    ],
)
def test_wrong_use(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- contents ----


def dense_case(m=30, seed=0):
    lam = torch.logspace(-5, 2, m, dtype=torch.float64)
    model, x, basis = with_spectrum(lam, seed)
    return lam, basis, basis @ randn(m, seed=seed + 1), NTKOperator(model, x, forward="double_backward")


@pytest.mark.parametrize("width", [None, 0.4])
def test_exact_contents_against_loops(width):
    lam, basis, r, _ = dense_case()
    budget = shell_budget(Eigendecomposition(lam, basis), r, GRID, width=width)
    g = basis.T @ r
    windows = GRID.windows(lam, width)
    for a in range(GRID.num_shells):
        energy = sum(float(0.5 * w * x**2) for w, x in zip(windows[a], g, strict=True))
        assert float(budget.energy[a]) == pytest.approx(energy, abs=1e-12)
        expected = sum(float(w * v * x**2) for w, v, x in zip(windows[a], lam, g, strict=True))
        assert float(budget.dissipation[a]) == pytest.approx(expected, abs=1e-12)
    assert float(budget.counts.sum()) == pytest.approx(30.0, rel=1e-13)
    assert float(budget.energy.sum()) == pytest.approx(float(r @ r) / 2, rel=1e-13)
    assert float(budget.dissipation.sum()) == pytest.approx(float(lam @ g**2), rel=1e-13)
    assert torch.equal(budget.energy_bounds[0], budget.energy) and torch.equal(budget.count_bounds[1], budget.counts)


def test_shells_below_the_floor_are_not_resolved():
    lam, basis, r, _ = dense_case()
    budget = shell_budget(Eigendecomposition(lam, basis, floor=0.05), r, GRID)
    lower_edges = [0.0, *GRID.edges.tolist()]
    assert budget.resolved.tolist()[1:] == [edge >= 0.05 for edge in lower_edges[1:]]
    assert not bool(budget.resolved[0])


def test_resolved_shells_are_right_to_the_stated_factor():
    lam, basis, r, op = dense_case()
    exact = shell_budget(Eigendecomposition(lam, basis), r, GRID)
    for k in (5, 10, 20):
        budget = shell_budget(spectral_measure(op, r, k), None, GRID)
        known = budget.resolved
        assert bool(((budget.energy - exact.energy).abs() <= 0.5 * budget.energy + 1e-9)[known].all())
        assert bool(budget.counts.isnan().all()) and not bool(known[0])
    assert int(known.sum()) > 4


def test_smooth_contents_of_a_measure():
    lam, basis, r, op = dense_case()
    exact = shell_budget(Eigendecomposition(lam, basis), r, GRID, width=0.5)
    full = shell_budget(spectral_measure(op, r, 30), None, GRID, width=0.5)
    torch.testing.assert_close(full.energy, exact.energy, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(full.dissipation, exact.dissipation, rtol=1e-9, atol=1e-11)
    assert not bool(full.resolved.any())
    part = shell_budget(spectral_measure(op, r, 8), None, GRID, width=0.5)
    assert float(part.energy.sum()) == pytest.approx(float(r @ r) / 2, rel=1e-12)
    assert float(part.dissipation.sum()) == pytest.approx(float(exact.dissipation.sum()), rel=1e-11)
