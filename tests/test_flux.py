"""Four-corner transport: identities for any bases, the sign and size on exact systems, and real optimizers."""

import math

import pytest
import torch
from nets import MAIN, cnn, mlp, orthogonal, randn, relative
from torch import nn

from grsd_callbacks import testing as known
from grsd_callbacks.flux import KernelState, flux_from_transport, four_corner_flux, no_flux
from grsd_callbacks.losses import Loss, resolve_loss
from grsd_callbacks.measure import measure
from grsd_callbacks.monitor import ShellMonitor
from grsd_callbacks.probe import Probe
from grsd_callbacks.settings import Settings
from grsd_callbacks.shells import ShellGrid

GRID = ShellGrid.logarithmic(1e-3, 10.0)


def state_of(system, t):
    """Eigenpairs of the exact kernel and the exact residual."""
    return KernelState(*torch.linalg.eigh(system.kernel(t)), system.residual(t))


def window_flux(system, t, dt, grid, width=None):
    """Four-corner flux over [t - dt/2, t + dt/2]."""
    return four_corner_flux(state_of(system, t - dt / 2), state_of(system, t + dt / 2), grid, dt, width=width)


def random_state(seed, m=12, rank=None):
    basis = orthogonal(m, seed)[:, : rank or m]
    lam = 10 ** (-4 * torch.rand(rank or m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return KernelState(lam, basis, randn(m, seed=seed + 50))


def closes(found, before, after, grid, tol=1e-12, width=None):
    """Sums to zero, flux is its running sum, and (A - B)/dt = transport - dissipation shell by shell."""
    ends = [state.energies(state.residual, grid, width)[0] for state in (before, after)]
    change = (ends[1] - ends[0]) / found.dt
    size = float(change.abs().sum() + found.transport.abs().sum() + found.dissipation.abs().sum())
    assert float(found.transport.sum().abs()) <= tol * size
    assert float((change - found.transport + found.dissipation).abs().max()) <= tol * size
    zero = torch.zeros(1).double()
    from_flux = torch.cat([zero, found.flux]) - torch.cat([found.flux, zero])  # J_a - J_{a+1}
    assert float((found.transport - from_flux).abs().max()) <= tol * size


# ---- identities ----


@pytest.mark.parametrize("width", [None, 0.2, GRID.width])
@pytest.mark.parametrize("seed", range(8))
def test_identities_hold_for_any_bases(seed, width):
    before, after = random_state(seed), random_state(seed + 100)
    found = four_corner_flux(before, after, GRID, 0.3, width=width)
    closes(found, before, after, GRID, width=width)
    assert found.coverage == pytest.approx(1.0, abs=1e-13) and found.reason == ""


@pytest.mark.parametrize("ranks", [(5, 5), (12, 5), (5, 12)])
def test_identities_hold_for_incomplete_bases(ranks):
    before, after = random_state(1, rank=ranks[0]), random_state(2, rank=ranks[1])
    found = four_corner_flux(before, after, GRID, 0.3)
    closes(found, before, after, GRID, width=GRID.width / 2)
    assert 0 < found.coverage < 1
    energies, held = before.energies(before.residual, GRID)
    outside = float(before.residual.square().sum() / 2 - 0.5 * (before.vectors.T @ before.residual).square().sum())
    assert float(energies[0]) >= outside - 1e-13  # what no vector holds is put in the underflow shell
    known_part = GRID.collect(before.eigenvalues, 0.5 * (before.vectors.T @ before.residual) ** 2)
    torch.testing.assert_close(energies[1:], known_part[1:], rtol=0, atol=1e-14)
    assert float(energies.sum()) == pytest.approx(float(before.residual.square().sum()) / 2, rel=1e-13)
    expected = float((before.vectors.T @ before.residual).square().sum() / before.residual.square().sum())
    assert held == pytest.approx(expected, rel=1e-12)


def test_without_motion_of_the_basis_there_is_no_transport():
    state = random_state(3)
    found = four_corner_flux(state, KernelState(state.eigenvalues, state.vectors, 0.9 * state.residual), GRID, 0.1)
    assert float(found.transport.abs().max()) == 0.0 and float(found.flux.abs().max()) == 0.0
    assert float(found.dissipation.sum()) == pytest.approx((1 - 0.81) / 0.1 * float(state.residual.square().sum()) / 2)


def test_zero_residual_moves_nothing():
    state = random_state(3)
    nothing = KernelState(state.eigenvalues, state.vectors, 0 * state.residual)
    still_nothing = KernelState(*torch.linalg.eigh(torch.eye(12).double()), nothing.residual)
    found = four_corner_flux(nothing, still_nothing, GRID, 1.0)
    assert float(found.flux.abs().sum()) == 0.0 and found.coverage == 1.0


def test_flux_is_what_passes_upward():
    assert flux_from_transport(torch.tensor([-3.0, 1.0, 2.0])).tolist() == [3.0, 2.0]


@pytest.mark.parametrize("dt", [0.0, -1.0, math.nan, math.inf])
def test_no_flow_time(dt):
    found = four_corner_flux(random_state(1), random_state(2), GRID, dt)
    assert "no flow time has passed" in found.reason
    assert bool(found.flux.isnan().all() & found.transport.isnan().all() & found.dissipation.isnan().all())
    assert found.flux.shape == GRID.edges.shape and found.transport.shape == (GRID.num_shells,)


def test_no_flux_says_why():
    found = no_flux(GRID, "first measurement")
    assert found.reason == "first measurement" and math.isnan(found.dt) and math.isnan(found.coverage)


def test_states_of_different_probes_are_refused():
    with pytest.raises(ValueError, match="same probe, got residuals of shape"):
        four_corner_flux(random_state(1), random_state(2, m=11), GRID, 1.0)


# ---- edges, crossings, degeneracies ----


def diagonal_state(lam, g):
    lam, g = (torch.tensor(v, dtype=torch.float64) for v in (lam, g))
    return KernelState(lam, torch.eye(len(lam)).double(), g)


def test_an_eigenvalue_that_crosses_carries_its_energy():
    grid = ShellGrid(torch.tensor([0.1, 1.0, 10.0]))
    before, after = diagonal_state([0.5, 0.9], [1.0, 2.0]), diagonal_state([0.5, 1.1], [1.0, 1.6])
    found = four_corner_flux(before, after, grid, 0.5)
    carried = (2.0**2 + 1.6**2) / 4 / 0.5  # mean energy of the mode over the interval
    assert found.flux.tolist() == pytest.approx([0.0, carried, 0.0])
    closes(found, before, after, grid)


def test_an_eigenvalue_on_an_edge_is_above_it():
    grid = ShellGrid(torch.tensor([0.1, 1.0, 10.0]))
    on, below = diagonal_state([1.0], [2.0]), diagonal_state([1.0 - 1e-15], [2.0])
    assert on.energies(on.residual, grid)[0].tolist() == [0.0, 0.0, 2.0, 0.0]
    assert four_corner_flux(on, on, grid, 1.0).flux.tolist() == [0.0, 0.0, 0.0]
    assert four_corner_flux(below, on, grid, 1.0).flux.tolist() == [0.0, 2.0, 0.0]
    assert four_corner_flux(on, below, grid, 1.0).flux.tolist() == [0.0, -2.0, 0.0]


def test_empty_shells_hold_and_gain_nothing():
    found = four_corner_flux(diagonal_state([1.5], [1.0]), diagonal_state([1.6], [0.5]), GRID, 1.0)
    inside = GRID.assign(torch.tensor([1.5]))
    others = torch.arange(GRID.num_shells) != inside
    assert float(found.transport.abs().sum()) == 0.0 and float(found.dissipation[others].abs().sum()) == 0.0


def test_any_basis_of_a_degenerate_eigenspace_gives_the_same():
    lam = torch.tensor([0.02, 0.5, 0.5, 0.5, 2.0]).double()
    before, after = random_state(4, m=5), random_state(5, m=5)
    turn = torch.block_diag(torch.eye(1).double(), orthogonal(3, 9), torch.eye(1).double())
    fluxes = []
    for basis in (after.vectors, after.vectors @ turn):
        fluxes.append(four_corner_flux(before, KernelState(lam, basis, after.residual), GRID, 0.2).flux)
    torch.testing.assert_close(*fluxes, rtol=1e-13, atol=1e-14)


# ---- exact systems ----


def test_rotating_pair_printed_numbers():
    """Problem 5: upward flux +0.0501245 and D = (0.133893, 0.022977) at t = 1, to 1e-6."""
    grid = ShellGrid(torch.tensor([0.1, 1.0, 10.0]))
    found = window_flux(known.RotatingPair(), 1.0, 1e-3, grid)
    assert found.flux.tolist() == pytest.approx([0.0, 0.0501245, 0.0], abs=1e-6)
    assert found.dissipation.tolist() == pytest.approx([0.0, 0.022977, 0.133893, 0.0], abs=1e-6)
    assert float(found.transport[2]) > 0  # the upper shell gains


SYSTEMS = {
    "rotating pair": (known.RotatingPair(), [0.1, 1.0, 10.0], 1.0),
    "chain": (known.CovariantChain(num_modes=8, coupling=0.8), None, 0.7),
    "transport": (known.TransportKernel(12, 1.0, 1.6, velocity=4 / 3), [0.05, 0.1, 0.3, 0.9], 0.8),
    "two-layer linear": (
        known.TwoLayerLinear((1.5, 0.8, 0.4), initial=(0.1, 0.2, 0.3), nu=1.0),
        [0.2, 0.5, 1.0, 2.0],
        0.6,
    ),
    "scalar lazy": (known.ScalarProduct(3.0, 0.1, 1.0), [5.0, 18.0, 30.0], 0.05),
    "scalar rich": (known.ScalarProduct(0.3, 0.2, 1.0), [0.1, 0.5, 1.0, 3.0], 0.4),
    "diagonal rich": (known.DiagonalLinear(6, 1.0, 2.0, scale=0.3), [0.05, 0.2, 1.0], 1.0),
    "feature learning": (known.TwoLayerFeatureLearning(8, rtol=1e-12), [0.05, 0.3, 1.0, 4.0], 0.5),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_smooth_flux_is_second_order_on_exact_systems(name):
    """Problems 2 to 6 and 9: against Daletskii-Krein with the exact M', the error falls by four a halving."""
    system, edges, t = SYSTEMS[name]
    grid = ShellGrid(system.edges if edges is None else torch.tensor(edges))
    exact = system.flux(t, grid.edges, 0.4)
    errors = [relative(window_flux(system, t, dt, grid, 0.4).flux, exact) for dt in (0.1 * t, 0.05 * t, 0.025 * t)]
    assert errors[-1] < 5e-3
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert 3.5 < coarse / fine < 4.5


@pytest.mark.parametrize("name", ["rotating pair", "chain"])
def test_sharp_flux_equals_the_exact_rotation(name):
    system, edges, t = SYSTEMS[name]
    grid = ShellGrid(system.edges if edges is None else torch.tensor(edges))
    found = window_flux(system, t, 1e-3, grid)
    torch.testing.assert_close(found.flux, system.flux(t, grid.edges), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", ["transport", "two-layer linear", "diagonal rich"])
def test_sharp_flux_integrates_to_the_energy_that_crossed(name):
    """Pure drift, with exactly degenerate pairs in the two-layer net: summed over short windows, to their order."""
    system, edges, t = SYSTEMS[name]
    grid = ShellGrid(torch.tensor(edges))
    times = torch.linspace(0.0, 3 * t, 241).tolist()
    states = [state_of(system, s) for s in times]
    total = torch.zeros(len(edges)).double()
    for before, after, start, end in zip(states, states[1:], times, times[1:], strict=False):
        found = four_corner_flux(before, after, grid, end - start)
        closes(found, before, after, grid)
        total += found.flux * (end - start)
    exact = system.crossed_energy(0.0, 3 * t, grid.edges)
    assert float(exact.abs().max()) > 0.01
    torch.testing.assert_close(total, exact, rtol=0.02, atol=1e-4)


def test_two_layer_linear_drift_is_upward_and_the_transport_model_downward():
    for name, sign in (("two-layer linear", 1), ("transport", -1)):
        system, edges, t = SYSTEMS[name]
        assert bool((sign * window_flux(system, t, 0.01, ShellGrid(torch.tensor(edges)), 0.4).flux > 0).all())


def test_lazy_and_rich_limits():
    """Problem 4, with half of f learned: drift over dissipation is of order one for c ~ 0 and falls as 1/c^2."""
    ratios = []
    for first in (0.1, 6.0, 12.0):
        system = known.ScalarProduct(first, 0.05, 1.0)
        t = next(s for s in torch.logspace(-4, 1, 400).tolist() if float(system.output(s)) > 0.5)
        lam = float(system.spectrum(t))
        found = window_flux(system, t, 0.01 * t, ShellGrid(torch.tensor([lam / 2, lam, 2 * lam])), 0.4)
        ratios.append(float(found.flux[1] / found.dissipation.sum()))
    assert ratios[0] > 0.1 and ratios[1] < 1e-3
    assert ratios[1] / ratios[2] == pytest.approx(16.0, rel=0.2)  # lambda'/lambda^2 ~ 1/c^2 and c ~ first^2


NETS = ("transport", "two-layer linear", "scalar lazy", "scalar rich", "diagonal rich", "feature learning")


@pytest.mark.parametrize("name", NETS)
def test_training_the_networks_shows_the_exact_flux(name):
    """The whole chain, descent and measure() at both ends, against the exact states: first order in the step."""
    system, edges, _ = SYSTEMS[name]
    grid, window = ShellGrid(torch.tensor(edges)), 0.1 / float(system.spectrum(0.0).max())
    probe = Probe(system.inputs, system.targets)
    loss = Loss(lambda f, y: system.nu / 2 * (f - y).square().sum(), "squared", system.nu)
    exact = window_flux(system, window / 2, window, grid, 0.4)
    assert float(exact.flux.abs().max()) > 1e-6
    errors = []
    for num_steps in (50, 100):
        model = system.model()
        before = measure(model, probe, loss, grid=grid)
        optimizer = torch.optim.SGD(model.parameters(), lr=window / num_steps)
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss.function(model(probe.inputs), probe.targets).backward()
            optimizer.step()
        after = measure(model, probe, loss, grid=grid)
        errors.append(relative(four_corner_flux(before.state, after.state, grid, window, width=0.4).flux, exact.flux))
    assert errors[1] < 0.005 and 1.8 < errors[0] / errors[1] < 2.2


# ---- nulls ----


def measured(model, x, y, grid=None, **options):
    return measure(model, Probe(x, y), resolve_loss("mse"), Settings(**options), grid)


def descend(model, x, y, optimizer, num_steps=1):
    for _ in range(num_steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


def test_frozen_features_give_zero_flux():
    model = known.FrozenFeatures(num_inputs=4, num_features=30, num_outputs=2)
    x, y = randn(9, 4), randn(9, 2, seed=1)
    before = measured(model, x, y)
    descend(model, x, y, torch.optim.SGD(model.parameters(), lr=0.1), 20)
    after = measured(model, x, y, before.budget.grid)
    for width in (None, 0.3):
        found = four_corner_flux(before.state, after.state, before.budget.grid, 2.0, width=width)
        assert float(found.flux.abs().max()) <= 1e-13 * float(found.dissipation.sum())
    krylov = [measured(model, x, y, before.budget.grid, method="krylov", num_matvecs=18, dtype=torch.float64)]
    descend(model, x, y, torch.optim.SGD(model.parameters(), lr=0.1), 20)
    krylov.append(measured(model, x, y, before.budget.grid, method="krylov", num_matvecs=18, dtype=torch.float64))
    found = four_corner_flux(krylov[0].state, krylov[1].state, before.budget.grid, 2.0)
    assert float(found.flux.abs().max()) <= 1e-9 * float(found.dissipation.sum())


@pytest.mark.parametrize("width", [None, 0.5])
def test_halving_the_shells_keeps_the_flux_at_common_edges(width):
    model, x, y = mlp(), randn(7, 5, seed=1), randn(7, 3, seed=2)
    before = measured(model, x, y)
    descend(model, x, y, torch.optim.SGD(model.parameters(), lr=0.5), 5)
    after = measured(model, x, y)
    coarse, fine = ShellGrid.logarithmic(1e-4, 10.0, 3), ShellGrid.logarithmic(1e-4, 10.0, 6)
    a, b = (four_corner_flux(before.state, after.state, grid, 2.5, width=width).flux for grid in (coarse, fine))
    torch.testing.assert_close(b[::2], a, rtol=0, atol=1e-14 * float(a.abs().sum()) + 1e-17)
    assert float(a.abs().sum()) > 0


@pytest.mark.parametrize("width", [None, 0.5])
def test_rotating_function_space_changes_nothing(width):
    x, y = randn(7, 5, seed=1), randn(7, 3, seed=2)
    plain, turned = mlp(), mlp()
    rotated, targets = known.rotate_outputs(turned, y, orthogonal(3, 7))
    found = []
    for model, net, target in ((plain, plain, y), (rotated, turned, targets)):
        before = measured(model, x, target, GRID)
        descend(model, x, target, torch.optim.SGD(net.parameters(), lr=0.5), 3)
        found.append(four_corner_flux(before.state, measured(model, x, target, GRID).state, GRID, 1.5, width=width))
    torch.testing.assert_close(found[0].flux, found[1].flux, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[0].dissipation, found[1].dissipation, rtol=1e-9, atol=1e-12)


# ---- real training ----


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
}


@pytest.mark.parametrize("width", [None, 0.4])
@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_identity_closes_for_any_optimizer_and_minibatch(optimizer, name, width):
    make, inputs = MAIN[name]
    model, x = make(), inputs(8)
    y = randn(*model(x).shape, seed=2)
    steps = OPTIMIZERS[optimizer](model.parameters())
    previous = measured(model, x, y, GRID)
    for k in range(4):
        batch = slice(2 * k, 2 * k + 2)  # minibatches of two
        descend(model, x[batch], y[batch], steps)
        present = measured(model, x, y, GRID)
        found = four_corner_flux(previous.state, present.state, GRID, 0.05, width=width)
        closes(found, previous.state, present.state, GRID, width=width)
        previous = present


def relu_net():
    return cnn(nn.ReLU, norm=False)


def test_four_corner_closes_on_a_relu_net():
    model, x, y = relu_net(), randn(8, 1, 6, 6, seed=1), randn(8, 2, seed=2)
    before = measured(model, x, y, GRID)
    descend(model, x, y, torch.optim.SGD(model.parameters(), lr=0.2), 3)
    after = measured(model, x, y, GRID)
    found = four_corner_flux(before.state, after.state, GRID, 0.6)
    closes(found, before.state, after.state, GRID)
    assert float(found.flux.abs().sum()) > 0


def test_full_budget_krylov_states_give_the_exact_smooth_flux():
    model, x, y = mlp(), randn(7, 5, seed=1), randn(7, 3, seed=2)
    options = dict(method="krylov", num_matvecs=21, num_density_matvecs=0)
    exact, products = [measured(model, x, y, GRID)], [measured(model, x, y, GRID, **options)]
    descend(model, x, y, torch.optim.SGD(model.parameters(), lr=0.5), 4)
    exact.append(measured(model, x, y, GRID))
    products.append(measured(model, x, y, GRID, **options))
    a = four_corner_flux(exact[0].state, exact[1].state, GRID, 2.0, width=GRID.width / 2)
    b = four_corner_flux(products[0].state, products[1].state, GRID, 2.0, width=GRID.width / 2)
    torch.testing.assert_close(a.flux, b.flux, rtol=1e-7, atol=1e-10 * float(a.dissipation.sum()))
    assert b.coverage == pytest.approx(1.0, abs=1e-9)


def test_fewer_products_approach_it_and_report_their_coverage():
    model, x, y = mlp(), randn(7, 5, seed=1), randn(7, 3, seed=2)
    states = {k: [measured(model, x, y, GRID, method="krylov", num_matvecs=k).state] for k in (4, 8, 12)}
    exact = [measured(model, x, y, GRID).state]
    descend(model, x, y, torch.optim.SGD(model.parameters(), lr=0.2), 3)
    exact.append(measured(model, x, y, GRID).state)
    truth = four_corner_flux(*exact, GRID, 0.6, width=GRID.width / 2)
    errors = []
    for k, pair in states.items():
        pair.append(measured(model, x, y, GRID, method="krylov", num_matvecs=k).state)
        found = four_corner_flux(*pair, GRID, 0.6)
        closes(found, *pair, GRID, width=GRID.width / 2)
        assert 0.5 < found.coverage <= 1.0
        errors.append(relative(found.flux, truth.flux))
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.1


# ---- work of the actual update ----


def monitored(model, x, y, optimizer, num_steps=3, batches=None):
    monitor = ShellMonitor(model, "mse", (x, y), every_n_steps=1, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    first_order = []
    for k in range(num_steps):
        monitor.step(k, optimizer=optimizer)
        gradient = torch.autograd.grad(nn.functional.mse_loss(model(x), y), parameters)
        old = [p.detach().clone() for p in parameters]
        batch = slice(None) if batches is None else slice(batches * k, batches * (k + 1))
        descend(model, x[batch], y[batch], optimizer)
        change = sum(float((g * (p.detach() - o)).sum()) for g, p, o in zip(gradient, parameters, old, strict=True))
        first_order.append(change)
    monitor.step(num_steps, optimizer=optimizer)
    return monitor.history, first_order


@pytest.mark.parametrize("name", MAIN)
def test_every_shell_has_the_nominal_learning_rate_under_full_batch_descent(name):
    make, inputs = MAIN[name]
    model, x = make(), inputs()
    y = randn(*model(x).shape, seed=2)
    history, first_order = monitored(model, x, y, torch.optim.SGD(model.parameters(), lr=0.03))
    for snapshot, change in zip(history, first_order, strict=False):
        assert float(snapshot.work.sum()) == pytest.approx(-change, rel=1e-10)
        rates = snapshot.effective_lr[~snapshot.effective_lr.isnan()]
        assert rates.numel() >= 3
        torch.testing.assert_close(rates, torch.ones_like(rates), rtol=1e-6, atol=0)
        assert snapshot.closures["probe"] == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_work_sums_to_minus_the_first_order_change_of_the_loss(optimizer):
    model, x, y = mlp(), randn(8, 5, seed=1), randn(8, 3, seed=2)
    history, first_order = monitored(model, x, y, OPTIMIZERS[optimizer](model.parameters()), 4, batches=2)
    for snapshot, change in zip(history, first_order, strict=False):
        assert float(snapshot.work.sum()) == pytest.approx(-change, rel=1e-9, abs=1e-14)
