"""Instantaneous flux against exact systems and the four-corner flux; the kernel's velocity against differences."""

import math

import pytest
import torch
from nets import MAIN, Embedded, cnn, jacobian, mlp, orthogonal, randint, randn, relative, seeded, zoo
from torch import nn

from grsd_callbacks import testing as known
from grsd_callbacks import transfer
from grsd_callbacks.flux import KernelState, four_corner_flux
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import resolve_loss
from grsd_callbacks.shells import ShellGrid
from grsd_callbacks.transfer import kernel_velocity, kink_gap, shell_transfer, shifted_gram

GRID = ShellGrid.logarithmic(1e-3, 10.0)


def of_system(system, t, edges, width=None):
    lam, U = torch.linalg.eigh(system.kernel(t))
    velocity = U.T @ system.kernel_velocity(t) @ U
    grid = ShellGrid(torch.as_tensor(edges, dtype=torch.float64))
    return shell_transfer(lam, U.T @ system.residual(t), velocity, grid, width=width)


def random_case(seed=0, m=14):
    lam = 10 ** (-4 * torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    velocity = randn(m, m, seed=seed)
    return lam, randn(m, seed=seed + 1), velocity + velocity.T


# ---- algebra ----


@pytest.mark.parametrize("width", [None, 0.3, GRID.width])
@pytest.mark.parametrize("seed", range(5))
def test_antisymmetric_and_conservative(seed, width):
    lam, g, velocity = random_case(seed)
    found = shell_transfer(lam, g, velocity, GRID, width=width)
    size = float(found.transfer.abs().max())
    assert float((found.transfer + found.transfer.T).abs().max()) <= 1e-10 * size
    zero = torch.zeros(1).double()
    J = found.rotation_flux
    rotation_transport = torch.cat([zero, J]) - torch.cat([J, zero])
    torch.testing.assert_close(found.transfer.sum(1), rotation_transport, rtol=0, atol=1e-11 * size)
    assert math.isnan(found.width) == (width is None)
    if width is not None:
        assert float(found.transport.sum().abs()) <= 1e-12 * float(found.transport.abs().sum())
        assert torch.equal(found.flux, found.rotation_flux + found.drift_flux)
    else:
        assert bool(found.drift_flux.isnan().all())
    assert float(found.energy.sum()) == pytest.approx(float(g @ g) / 2, rel=1e-12)
    assert float(found.dissipation.sum()) == pytest.approx(float(lam @ g**2), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_against_the_loops_of_the_oracle(seed):
    lam, g, velocity = random_case(seed)
    M = torch.diag(lam)
    sharp = shell_transfer(lam, g, velocity, GRID)
    torch.testing.assert_close(sharp.transfer, known.exact_transfer(M, velocity, g, GRID.edges), rtol=1e-9, atol=1e-9)
    smooth = shell_transfer(lam, g, velocity, GRID, width=0.4)
    torch.testing.assert_close(smooth.flux, known.smooth_flux(M, velocity, g, GRID.edges, 0.4), rtol=1e-8, atol=1e-9)


def test_smooth_windows_tend_to_the_sharp_rotation():
    lam, g, velocity = random_case(3)
    sharp, narrow = (shell_transfer(lam, g, velocity, GRID, width=w) for w in (None, 1e-4))
    torch.testing.assert_close(narrow.rotation_flux, sharp.rotation_flux, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(narrow.transfer, sharp.transfer, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gap", [0.0, 1e-14, 1e-9, 3e-8, 3e-7, 1e-5])
def test_nearly_degenerate_pairs_are_continuous(gap):
    """The limit of the divided difference: whatever the gap, the flux is that of a clean pair to the gap itself."""
    _, g, velocity = random_case(1, m=4)
    clean, found = (
        shell_transfer(torch.tensor([0.02, 0.5, 0.5 * (1 + d), 3.0], dtype=torch.float64), g, velocity, GRID, width=0.5)
        for d in (1e-5, gap)
    )
    torch.testing.assert_close(found.flux, clean.flux, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.transfer, -found.transfer.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_close_pairs_astride_an_edge_rotate(gap):
    edge = float(GRID.edges[5])
    lam = torch.tensor([edge * (1 - gap / 2), edge * (1 + gap / 2), 3.0], dtype=torch.float64)
    _, g, velocity = random_case(1, m=3)
    found = shell_transfer(lam, g, velocity, GRID)
    exact = known.exact_transfer(torch.diag(lam), velocity, g, GRID.edges)
    torch.testing.assert_close(found.transfer, exact, rtol=1e-9, atol=1e-9)
    assert abs(float(found.transfer[6, 5])) > 0.1 / gap * abs(float(velocity[0, 1] * g[0] * g[1]) / edge)


def test_any_basis_of_a_degenerate_eigenspace_gives_the_same():
    lam = torch.tensor([0.02, 0.5, 0.5, 0.5, 2.0], dtype=torch.float64)
    _, g, velocity = random_case(2, m=5)
    turn = torch.block_diag(torch.eye(1).double(), orthogonal(3, 9), torch.eye(1).double())
    for width in (None, 0.4):
        a = shell_transfer(lam, g, velocity, GRID, width=width)
        b = shell_transfer(lam, turn.T @ g, turn.T @ velocity @ turn, GRID, width=width)
        torch.testing.assert_close(a.transfer, b.transfer, rtol=0, atol=1e-12)
        torch.testing.assert_close(a.rotation_flux, b.rotation_flux, rtol=0, atol=1e-12)
        torch.testing.assert_close(a.drift_flux, b.drift_flux, rtol=0, atol=1e-12, equal_nan=True)


def test_null_space_and_rounding_below_zero():
    lam = torch.tensor([-3e-17, -1e-17, 0.0, 2e-17, 0.4, 2.0], dtype=torch.float64)
    velocity = torch.zeros(6, 6).double()
    velocity[4:, 4:] = torch.tensor([[0.3, 0.7], [0.7, -0.2]])
    g = randn(6, seed=3)
    for width in (None, 0.3):
        found = shell_transfer(lam, g, velocity, GRID, width=width)
        clean = shell_transfer(lam[4:], g[4:], velocity[4:, 4:], GRID, width=width)
        torch.testing.assert_close(found.transfer, clean.transfer, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.rotation_flux, clean.rotation_flux, rtol=1e-9, atol=1e-12)
        assert not bool(found.transfer.isnan().any())


def test_eigenvalue_exactly_on_an_edge():
    edge = float(GRID.edges[4])
    lam, g = torch.tensor([edge, 3.0], dtype=torch.float64), torch.tensor([1.0, 2.0]).double()
    velocity = torch.tensor([[0.5, 0.2], [0.2, 0.1]]).double()
    sharp = shell_transfer(lam, g, velocity, GRID)
    assert float(sharp.energy[5]) == 0.5 and float(sharp.rotation_flux[4]) == 0.0
    smooth = shell_transfer(lam, g, velocity, GRID, width=0.5)
    assert float(smooth.drift_flux[4]) == pytest.approx(0.5 * 0.5 / (4 * 0.5 * edge), rel=1e-2)


def test_halving_the_shells_keeps_the_flux_at_common_edges():
    lam, g, velocity = random_case(4)
    coarse, fine = ShellGrid.logarithmic(1e-4, 10.0, 3), ShellGrid.logarithmic(1e-4, 10.0, 6)
    for width in (None, 0.4):
        a, b = (shell_transfer(lam, g, velocity, grid, width=width) for grid in (coarse, fine))
        torch.testing.assert_close(b.rotation_flux[::2], a.rotation_flux, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(b.flux[::2], a.flux, rtol=1e-12, atol=1e-13)


# ---- exact systems ----

SYSTEMS = {
    "rotating pair": (known.RotatingPair(), [0.1, 1.0, 10.0], 1.0),
    "chain": (known.CovariantChain(num_modes=8, coupling=0.8), known.CovariantChain(num_modes=8).edges, 0.7),
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
DRIFT_ONLY = ("transport", "two-layer linear", "scalar lazy", "scalar rich", "diagonal rich")


@pytest.mark.parametrize("name", SYSTEMS)
def test_smooth_flux_of_the_exact_systems(name):
    system, edges, t = SYSTEMS[name]
    found = of_system(system, t, edges, 0.4)
    torch.testing.assert_close(found.flux, system.flux(t, edges, 0.4), rtol=1e-8, atol=1e-11)
    rotates = float(found.rotation_flux.abs().max())
    if name in DRIFT_ONLY:
        assert rotates < 1e-12 and float(found.transfer.abs().max()) < 1e-12
    else:
        assert rotates > 1e-4


@pytest.mark.parametrize("name", ["rotating pair", "chain"])
def test_sharp_transfer_of_the_rotating_systems(name):
    system, edges, t = SYSTEMS[name]
    found = of_system(system, t, edges)
    torch.testing.assert_close(found.transfer, system.transfer(t, edges), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.rotation_flux, system.flux(t, edges), rtol=1e-9, atol=1e-12)


def test_rotating_pair_printed_numbers():
    found = of_system(known.RotatingPair(), 1.0, [0.1, 1.0, 10.0])
    assert float(found.transfer[2, 1]) == pytest.approx(0.0501245, abs=1e-6)  # the upper shell gains from the lower
    assert found.rotation_flux.tolist() == pytest.approx([0.0, 0.0501245, 0.0], abs=1e-6)
    assert found.dissipation.tolist() == pytest.approx([0.0, 0.022977, 0.133893, 0.0], abs=1e-6)


@pytest.mark.parametrize("name", SYSTEMS)
def test_smooth_energy_changes_by_transport_minus_dissipation(name):
    system, edges, t = SYSTEMS[name]
    found, h = of_system(system, t, edges, 0.4), 1e-3 * t
    step = [system.energy(t + k * h, edges, 0.4) for k in (-2, -1, 1, 2)]
    rate = (8 * (step[2] - step[1]) - (step[3] - step[0])) / (12 * h)
    slack = 1e-6 * float(found.dissipation.sum())
    torch.testing.assert_close(rate, found.transport - found.dissipation, rtol=0, atol=slack)


# ---- the kernel's velocity ----

SMOOTH = {name: MAIN[name] for name in MAIN} | {
    "embedding": (lambda: seeded(Embedded), lambda: randint(6, 5, 4, seed=3)),
    "sparse": (lambda: seeded(lambda: Embedded(sparse=True)), lambda: randint(6, 5, 4, seed=3)),
}


def velocity_of(model, seed=3):
    return randn(sum(p.numel() for p in model.parameters() if p.requires_grad), seed=seed)


@pytest.mark.parametrize("name", SMOOTH)
def test_double_backward_equals_central_differences(name):
    make, inputs = SMOOTH[name]
    model, x = make(), inputs()
    op, v = NTKOperator(model, x), velocity_of(model)
    V = orthogonal(op.shape[0], 2)[:, :4]
    double = kernel_velocity(op, v, V, method="double_backward")
    central = kernel_velocity(op, v, V, method="central")
    assert relative(double, central) < 1e-6
    assert relative(double, double.T) < 1e-14
    whole = kernel_velocity(op, v)
    assert relative(V.T @ whole @ V, double) < 1e-6
    assert relative(kernel_velocity(op, v, method="double_backward"), whole) < 1e-6


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_velocity_against_dense_jacobians(name):
    """Fourth-order difference of jacrev's J J^T at moved parameters: shares nothing with the package."""
    make, inputs = MAIN[name]
    model, x = make(), inputs()
    v = velocity_of(model)
    op = NTKOperator(model, x)

    def gram(h):
        moved = make()
        with torch.no_grad():
            for p, part in zip(moved.parameters(), op.unflatten(v), strict=True):
                p.add_(part, alpha=h)
        J = jacobian(moved, x)
        return J @ J.T

    h = 1e-3
    expected = (8 * (gram(h) - gram(-h)) - (gram(2 * h) - gram(-2 * h))) / (12 * h)
    assert relative(kernel_velocity(op, v, method="double_backward"), expected) < 1e-7
    assert relative(kernel_velocity(op, v, method="central"), expected) < 1e-7
    assert relative(shifted_gram(op, v, h), gram(h)) < 1e-12


def test_velocity_in_single_precision():
    model, x = mlp().float(), randn(7, 5).float()
    exact = kernel_velocity(NTKOperator(mlp(), randn(7, 5)), velocity_of(model))
    op = NTKOperator(model, x)
    assert relative(kernel_velocity(op, velocity_of(model), method="double_backward"), exact) < 1e-5
    assert relative(kernel_velocity(op, velocity_of(model), method="central"), exact) < 1e-5


def test_velocity_of_awkward_models():
    for name, (model, inputs, _) in zoo().items():
        if name in ("bag", "cdist"):
            continue
        op, v = NTKOperator(model, inputs), velocity_of(model)
        double, central = (kernel_velocity(op, v, method=m) for m in ("double_backward", "central"))
        assert float((double - central).norm()) <= 1e-6 * max(float(central.norm()), 1e-3), name


def test_a_linear_model_has_a_kernel_at_rest():
    model, x = nn.Linear(3, 2).double(), randn(4, 3)
    op, v = NTKOperator(model, x), randn(8)
    assert float(kernel_velocity(op, v, method="double_backward").abs().max()) == 0.0
    assert float(kernel_velocity(op, v).abs().max()) < 1e-9
    assert float(kernel_velocity(NTKOperator(mlp(), randn(7, 5)), torch.zeros(147)).abs().max()) == 0.0


# ---- with the four-corner flux ----


def moved(model, change, op):
    with torch.no_grad():
        for p, part in zip(model.parameters(), op.unflatten(change), strict=True):
            p.add_(part)
    return model


def full_state(model, x, y):
    """Eigenpairs of M = nu J J^T by jacrev and the residual, at the model's parameters."""
    J = jacobian(model, x)
    at = resolve_loss("mse").evaluate(model(x).detach(), y)
    return KernelState(*torch.linalg.eigh(at.nu * J @ J.T), at.residual), at.nu


def gradient_step(model, x, y, lr):
    loss = nn.functional.mse_loss(model(x), y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return -lr * torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("width", [GRID.width / 2, GRID.width])
@pytest.mark.parametrize("name", MAIN)
def test_both_fluxes_agree_to_second_order(name, width):
    """M' along the actual dtheta/dt at the midpoint, the same windows on both sides: halving dt divides by four."""
    make, inputs = MAIN[name]
    x = inputs()
    y = randn(*make()(x).shape, seed=2)
    gaps = []
    for lr in (0.1, 0.05, 0.025, 0.0125):
        change = gradient_step(make(), x, y, lr)
        op = NTKOperator(make(), x)
        start, _ = full_state(make(), x, y)
        end, _ = full_state(moved(make(), change, op), x, y)
        middle = moved(make(), change / 2, op)
        centre, nu = full_state(middle, x, y)
        velocity = nu * kernel_velocity(NTKOperator(middle, x), change / lr, centre.vectors)
        g = centre.vectors.T @ centre.residual
        instant = shell_transfer(centre.eigenvalues, g, velocity, GRID, width=width)
        corner = four_corner_flux(start, end, GRID, lr, width=width)
        gaps.append(float((corner.flux - instant.flux).norm() / instant.flux.norm()))
    assert gaps[-1] < 0.01
    for coarse, fine in zip(gaps[1:], gaps[2:], strict=False):
        assert 3.5 < coarse / fine < 4.5


@pytest.mark.parametrize("name", MAIN)
def test_smooth_budget_closes_along_the_flow_of_a_network(name):
    """dE/dt of the smooth energies, by fourth-order differences along theta' = -grad L, is transport - dissipation."""
    make, inputs = MAIN[name]
    x = inputs()
    y = randn(*make()(x).shape, seed=2)
    velocity = gradient_step(make(), x, y, 1.0)
    op = NTKOperator(make(), x)
    state, nu = full_state(make(), x, y)
    couplings = nu * kernel_velocity(op, velocity, state.vectors)
    found = shell_transfer(state.eigenvalues, state.vectors.T @ state.residual, couplings, GRID, width=0.5)

    def energy(h):
        there, _ = full_state(moved(make(), h * velocity, op), x, y)
        return there.energies(there.residual, GRID, 0.5)[0]

    h = 1e-3
    rate = (8 * (energy(h) - energy(-h)) - (energy(2 * h) - energy(-2 * h))) / (12 * h)
    assert relative(rate, found.transport - found.dissipation) < 1e-6
    assert float((found.transfer + found.transfer.T).abs().max()) <= 1e-10 * float(found.transfer.abs().max())
    assert float(found.transport.abs().sum()) > 1e-4 * float(found.dissipation.sum())


def test_frozen_features_do_not_move():
    model = known.FrozenFeatures(num_inputs=4, num_features=20)
    op = NTKOperator(model, randn(6, 4))
    v = randn(op.num_parameters)
    for method in ("double_backward", "central"):
        assert float(kernel_velocity(op, v, method=method).abs().max()) == 0.0


def test_ritz_basis_of_the_upper_shells():
    """V^T M' V needs only V: the block of the full matrix."""
    model, x = mlp(), randn(7, 5)
    op, v = NTKOperator(model, x), velocity_of(model)
    U = torch.linalg.eigh(op.gram())[1][:, -5:]
    block = kernel_velocity(op, v, U)
    assert relative(block, U.T @ kernel_velocity(op, v, method="double_backward") @ U) < 1e-12
    found = shell_transfer(torch.rand(5).double(), torch.ones(5), block, GRID, width=0.5, coverage=0.7)
    assert found.coverage == 0.7


# ---- kinks ----


def larger_net(activation):
    """Enough gates that a step of a thousandth flips a few."""

    def make():
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            activation(),
            nn.Conv2d(8, 8, 3, padding=1),
            activation(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 2),
        )

    return seeded(make)


def gap_at(model, x, share):
    """Kink gap over a random update of relative size `share`."""
    op = NTKOperator(model, x)
    v = velocity_of(model, seed=8)
    theta = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
    change = share * theta / float(v.norm()) * v
    return kink_gap(op, change, kernel_velocity(op, change, method="double_backward"))


def test_kink_gap_of_a_smooth_net_is_second_order():
    gaps = [gap_at(cnn(), randn(10, 1, 6, 6, seed=1), share) for share in (4e-3, 2e-3, 1e-3)]
    assert gaps[-1] < 1e-3
    for coarse, fine in zip(gaps, gaps[1:], strict=False):
        assert 3.5 < coarse / fine < 4.5


def test_kink_gap_of_a_relu_net_is_large_and_does_not_shrink_away():
    """Flips of gates: a jump process. The gap stays, however small the step, as long as it flips any."""
    x = randn(24, 1, 8, 8, seed=1)
    gaps = [gap_at(larger_net(nn.ReLU), x, share) for share in (1e-2, 3e-3, 1e-3)]
    assert min(gaps) > 0.3
    assert gaps[-1] > 0.5 * gaps[0]
    assert gap_at(larger_net(nn.SiLU), x, 1e-3) < 1e-3


def test_kink_gap_of_no_change():
    op = NTKOperator(nn.Linear(3, 1).double(), randn(4, 3))
    assert math.isnan(kink_gap(op, torch.zeros(4), torch.zeros(4, 4)))


# ---- wrong use ----


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: shell_transfer(torch.ones(3), torch.ones(2), torch.ones(3, 3), GRID),
            "shapes \\(3,\\) and \\(3, 3\\), got \\(2,\\)",
        ),
        (lambda: shell_transfer(torch.ones(3), torch.ones(3), torch.ones(3, 2), GRID), "and \\(3, 2\\)"),
        (lambda: kernel_velocity(NTKOperator(mlp(), randn(7, 5)), torch.zeros(147), method="jvp"), "method must be"),
        (lambda: kernel_velocity(NTKOperator(mlp(), randn(7, 5)), torch.zeros(3)), "shape \\(147,\\), got \\(3,\\)"),
        (
            lambda: kernel_velocity(NTKOperator(mlp(), randn(7, 5)), torch.zeros(147), torch.zeros(7, 2)),
            "vectors must have shape \\(21, k\\), got \\(7, 2\\)",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_the_memory_bound_reaches_the_transfer(monkeypatch, share):
    """Chunks change nothing, and the exact kernels are given the bound."""
    model, x = mlp(), randn(23, 5)
    whole, v = NTKOperator(model, x), velocity_of(model)
    V = randn(69, 3)
    expected = kernel_velocity(whole, v, V)
    limit = int(share * whole.plan.sample_bytes * 23)
    op = NTKOperator(model, x, memory_limit=limit)
    assert relative(kernel_velocity(op, v, V), expected) < 1e-12 and op.chunk_size < 23
    given = []
    original = transfer.exact_gram
    monkeypatch.setattr(transfer, "exact_gram", lambda *a, **k: given.append(k["memory_limit"]) or original(*a, **k))
    assert relative(kernel_velocity(op, v, V, method="central"), expected) < 1e-6
    assert given == [limit, limit]
