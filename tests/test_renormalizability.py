"""The conditions against closed forms, dense matrices and their own nulls."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from nets import jacobian, randn, relative, seeded
from torch import nn

from grsd_callbacks import (
    Conditions,
    ConditionSettings,
    NTKOperator,
    Probe,
    ShellGrid,
    block_incoherence,
    block_kernels,
    find_blocks,
    gradient_propagation,
    jacobian_evolution,
    judge,
    lazy_or_rich,
    log_shift_invariance,
    measure_conditions,
    resolve_loss,
    time_rescaling_covariance,
)
from grsd_callbacks.renormalizability import BlockOperator
from grsd_callbacks.renormalizability.couplings import refined, shell_couplings
from grsd_callbacks.renormalizability.flow import sharp_transfer, shell_flux
from grsd_callbacks.testing import CovariantChain, PowerLawKernel
from grsd_callbacks.transfer import kernel_velocity, shell_transfer

MSE = resolve_loss("mse")


def mlp(depth=4, width=6, num_in=5, num_out=2, activation=nn.Tanh):
    layers = [nn.Linear(num_in, width), activation()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, num_out))


@lru_cache
def tanh_net():
    return seeded(mlp), randn(7, 5, seed=1), randn(7, 2, seed=2)


# ---- log-shift invariance ----


def chain_grid(chain):
    steps = torch.arange(chain.num_modes + 1, dtype=torch.float64) - 0.5
    return ShellGrid(chain.eigenvalues[0] * torch.exp(chain.spacing * steps))


def chain_rate(chain, factors=None):
    """<u_a, M' u_b> = Omega_ab (lambda_b - lambda_a) of the chain, with the rate of each link times a factor."""
    lam = chain.eigenvalues
    rate = chain.rotation_rates * (lam[None, :] - lam[:, None])
    assert torch.equal(rate, rate.mT)
    if factors is None:
        return rate
    links = rate.diag(1) * factors
    return links.diag(1) + links.diag(-1)


@pytest.mark.parametrize("spacing", [0.3, math.log(10) / 3, 2.0])
def test_problem_6_has_no_defect_and_zeta_one(spacing):
    chain = CovariantChain(num_modes=12, coupling=0.7, spacing=spacing)
    found = log_shift_invariance(
        chain.eigenvalues, chain_rate(chain), chain_grid(chain), min_modes=1, drop_top=0, num_null=39,
        coefficients=chain.initial_coefficients,
    )  # fmt: skip
    assert found.defect < 1e-9 and found.zeta == pytest.approx(1.0, abs=1e-9) and found.adjusted_r2 > 1 - 1e-9
    assert found.locality == pytest.approx(1.0) and found.num_pairs == 11 and len(found.shells) == 12
    assert found.p_value == found.locality_p == 1 / 40
    assert relative(found.couplings[1:-1, 1:-1].nan_to_num(0.0), chain.coupling_ratio()) < 1e-12


def test_random_rates_give_their_scatter_as_defect():
    """Defects of 200 chains: the mean of defect^2 is sigma^2 (unbiased), and its scatter that of chi-squared."""
    chain, sigma = CovariantChain(num_modes=24), 0.4
    squares = []
    for seed in range(200):
        factors = torch.exp(sigma * randn(23, seed=seed))
        found = log_shift_invariance(
            chain.eigenvalues, chain_rate(chain, factors), chain_grid(chain), min_modes=1, drop_top=0
        )
        squares.append(found.defect**2 / sigma**2)
    freedom = 21  # 23 links, one distance, zeta
    assert np.mean(squares) == pytest.approx(1.0, abs=5 * math.sqrt(2 / freedom / 200))
    assert np.std(squares, ddof=1) == pytest.approx(math.sqrt(2 / freedom), rel=5 / math.sqrt(2 * 200))


def test_zeta_error_covers():
    chain, inside = CovariantChain(num_modes=24), 0
    for seed in range(200):
        rate = chain_rate(chain, torch.exp(0.3 * randn(23, seed=seed)))
        found = log_shift_invariance(chain.eigenvalues, rate, chain_grid(chain), min_modes=1, drop_top=0)
        inside += abs(found.zeta - 1) <= 2.08 * found.zeta_error  # Student, 21 degrees of freedom
    assert abs(inside / 200 - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 200)


def test_null_has_a_false_positive_rate_of_5_percent():
    """Couplings without any order among shells, 500 draws: P(p <= 0.05) = 0.05 exactly for 19 shuffles."""
    chain = CovariantChain(num_modes=8)
    lam, grid = chain.eigenvalues, chain_grid(chain)
    root = (lam[:, None] * lam[None, :]).sqrt()
    positives = 0
    for seed in range(500):
        upper = torch.exp(randn(8, 8, seed=seed)).triu(1)
        found = log_shift_invariance(
            lam, (upper + upper.mT) * root, grid, min_modes=1, drop_top=0, num_null=19, seed=seed
        )
        positives += found.p_value <= 0.05
    assert abs(positives / 500 - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 500)


def test_shell_width_does_not_matter_where_couplings_scale():
    """Gaussian couplings sqrt(lambda_i lambda_j) (lambda_i lambda_j)^(zeta/2) f(|log ratio|), many modes a shell."""
    n = 400
    lam = torch.logspace(-5, 0, n, dtype=torch.float64)
    log = lam.log()
    scale = torch.exp((0.5 + 0.6 / 2) * (log[:, None] + log[None, :]) - 0.4 * (log[:, None] - log[None, :]).abs())
    noise = randn(n, n, seed=3)
    rate = scale * (noise + noise.mT) / math.sqrt(2)
    grid = ShellGrid.logarithmic(1e-5, 1.0, per_decade=3)
    coarse, fine = (log_shift_invariance(lam, rate, g, drop_top=0) for g in (grid, refined(grid)))
    for found in (coarse, fine):
        assert abs(found.zeta - 0.6) < 3 * found.zeta_error + 0.01
        assert 0.7 * found.floor < found.defect < 1.5 * found.floor  # nothing but the finite number of modes
    assert fine.floor > coarse.floor and len(fine.shells) == 2 * len(coarse.shells)
    assert fine.width == pytest.approx(coarse.width / 2)


def test_couplings_are_the_rms_over_pairs_of_different_modes():
    lam = torch.tensor([0.02, 0.05, 0.2, 3.0]).double()
    rate = randn(4, 4, seed=4)
    rate = rate + rate.mT
    grid = ShellGrid.logarithmic(0.01, 1.0, per_decade=1)
    R, pairs = shell_couplings(lam, rate, grid)
    q = rate / (lam[:, None] * lam[None, :]).sqrt()
    assert float(R[1, 1]) == pytest.approx(abs(float(q[0, 1])))
    assert float(R[1, 2]) == pytest.approx(float((q[:2, 2] ** 2).mean().sqrt()))
    assert math.isnan(float(R[2, 2])) and float(pairs[1, 2]) == 2 and float(pairs[1, 1]) == 2


def test_flux_and_transfer_are_those_of_the_direct_sums():
    """Against divided differences pair by pair, with degenerate pairs and null modes."""
    lam = torch.cat([torch.zeros(3), torch.full((4,), 0.3), torch.logspace(-4, 1, 30)]).double()
    g, rate = randn(37, seed=1), randn(37, 37, seed=2)
    rate = rate + rate.mT
    grid = ShellGrid.logarithmic(1e-5, 10.0, per_decade=2)
    direct = shell_transfer(lam, g, rate, grid, width=0.4)
    assert relative(shell_flux(lam, rate, g, grid, 0.4), direct.flux) < 1e-10
    assert relative(sharp_transfer(lam, rate, g, grid), shell_transfer(lam, g, rate, grid).transfer) < 1e-12


def test_degenerate_bases_do_not_matter():
    """A rotation within an eigenspace changes no coupling."""
    lam = torch.tensor([0.02] * 5 + [0.2] * 5 + [2.0] * 5).double()
    rate = randn(15, 15, seed=5)
    rate = rate + rate.mT
    rate[:5, :5] = rate[5:10, 5:10] = rate[10:, 10:] = torch.eye(5)
    Q = torch.block_diag(*(torch.linalg.qr(randn(5, 5, seed=s))[0] for s in range(3)))
    grid = ShellGrid.logarithmic(0.01, 10.0, per_decade=1)
    assert relative(*(shell_couplings(lam, x, grid)[0].nan_to_num(0) for x in (rate, Q.T @ rate @ Q))) < 1e-12


def test_too_few_shells_have_a_reason_and_top_shells_are_left_out():
    chain = CovariantChain(num_modes=8)
    args = (chain.eigenvalues, chain_rate(chain), chain_grid(chain))
    found = log_shift_invariance(*args)
    assert math.isnan(found.defect) and "0 shells with 0 couplings" in found.reason and not found.shells
    assert log_shift_invariance(*args, min_modes=1, drop_top=2).shells == tuple(range(1, 7))


@pytest.mark.parametrize(
    "changes, message",
    [({"min_modes": 0}, "min_modes must be"), ({"drop_top": -1}, "drop_top must be"), ({"num_null": -1}, "num_null")],
)
def test_wrong_numbers_raise(changes, message):
    chain = CovariantChain(num_modes=8)
    with pytest.raises(ValueError, match=message):
        log_shift_invariance(chain.eigenvalues, chain_rate(chain), chain_grid(chain), **changes)
    with pytest.raises(ValueError, match="shells must be indices from 1 to 8"):
        log_shift_invariance(chain.eigenvalues, chain_rate(chain), chain_grid(chain), shells=[0, 3])
    with pytest.raises(ValueError, match=r"velocity must have shape \(8, 8\)"):
        log_shift_invariance(chain.eigenvalues, torch.eye(3), chain_grid(chain))


def test_shells_may_be_given():
    """The same shells as those that are chosen give the same fit; a part of them is a fit of its own."""
    chain = CovariantChain(num_modes=8)
    args = (chain.eigenvalues, chain_rate(chain, torch.exp(0.3 * randn(7))), chain_grid(chain))
    found = log_shift_invariance(*args, min_modes=1, drop_top=0)
    same = log_shift_invariance(*args, shells=found.shells)  # min_modes would refuse all of them
    assert (same.defect, same.zeta, same.shells) == (found.defect, found.zeta, found.shells)
    assert log_shift_invariance(*args, shells=[3, 2, 4, 5, 6, 7]).shells == (2, 3, 4, 5, 6, 7)


# ---- blocks and their kernels ----


def test_half_products_are_those_of_the_submatrices():
    """Six samples of two outputs, against principal submatrices row by row."""
    from grsd_callbacks.renormalizability.blocks import half_products, half_samples, half_weights

    a, b = randn(12, 12, seed=1), randn(12, 12, seed=2)
    weights = half_weights(12, 2, 5, seed=3)
    direct = [float((a[rows][:, rows] * b[rows][:, rows]).sum()) for rows in half_samples(12, 2, 5, seed=3)]
    assert weights.sum(1).tolist() == [3.0] * 5
    assert half_products(a, b, weights).tolist() == pytest.approx(direct, rel=1e-12)


def test_an_operator_with_blocks_forms_one_kernel(monkeypatch):
    from grsd_callbacks.renormalizability import blocks

    calls, original = [], blocks.exact_gram
    monkeypatch.setattr(blocks, "exact_gram", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    net, x, _ = tanh_net()
    op = BlockOperator(net, x)
    kernels = block_kernels(op, find_blocks(net))
    assert relative(op.gram(), sum(kernels.values())) < 1e-12 and len(calls) == 1
    assert relative(op.gram(), NTKOperator(net, x).gram()) < 1e-12


def test_an_operator_keeps_one_kernel_a_block_and_others_can_be_asked_for():
    net, x = Framed().double(), randn(6, 5)
    op, own = BlockOperator(net, x), find_blocks(net)
    assert sorted(op.exact_gram().blocks) == sorted(block.name for block in own)  # not one a layer
    kernels, two = block_kernels(op, own), find_blocks(net, ["layers.0", "head"])
    named = BlockOperator(net, x, blocks=["layers.0", "head"])
    for found in (block_kernels(op, two), block_kernels(named, two)):
        assert list(found) == [block.name for block in two]
        assert all(relative(found[name], kernels[name]) < 1e-12 for name in ("layers.0", "head", "stem"))
        assert relative(sum(found.values()), op.gram()) < 1e-12
    some = block_kernels(op, [block for block in own if block.name == "head"])
    assert list(some) == ["head"] and relative(some["head"], kernels["head"]) < 1e-12


def test_block_kernels_sum_to_the_kernel_and_match_dense_ones():
    net, x, _ = tanh_net()
    op = NTKOperator(net, x)
    blocks = find_blocks(net)
    kernels = block_kernels(op, blocks)
    assert list(kernels) == ["0", "2", "4", "6"]
    assert relative(sum(kernels.values()), op.gram()) < 1e-12
    for block in blocks:
        J = jacobian(net, x, list(block.parameters))
        assert relative(kernels[block.name], J @ J.T) < 1e-10


class Framed(nn.Module):
    """Stem, blocks with a skip around each, head; and a scale of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.stem = nn.Linear(5, 6)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        h = self.stem(x)
        for layer in self.layers:
            h = h + 0.5 * layer(h)
        return self.scale * self.head(h)


def test_blocks_are_found_and_named():
    found = [(b.name, b.in_sequence, len(b.parameters)) for b in find_blocks(Framed())]
    assert found == [
        ("", False, 1), ("stem", False, 2), ("layers.0", True, 2), ("layers.1", True, 2), ("layers.2", True, 2),
        ("head", False, 2),
    ]  # fmt: skip
    named = find_blocks(Framed(), ["stem", "layers", "head"])
    assert [(b.name, b.in_sequence) for b in named] == [("", False), ("stem", True), ("layers", True), ("head", True)]
    assert [b.name for b in find_blocks(nn.Bilinear(2, 3, 4))] == [""]
    for names, message in ([["nothing"], "no module of Framed"], [["layers.0.1"], "holds no measured parameter"]):
        with pytest.raises(ValueError, match=message):
            find_blocks(Framed(), names)
    with pytest.raises(ValueError, match="lies inside another block"):
        find_blocks(Framed(), ["layers", "layers.0"])


def test_framed_net_has_blocks_that_sum_to_the_kernel():
    net, x = seeded(Framed), randn(4, 5, seed=7)
    op = NTKOperator(net, x)
    assert relative(sum(block_kernels(op, find_blocks(net)).values()), op.gram()) < 1e-12


def test_orthogonal_blocks_have_no_coherence_and_equal_ones_all():
    Q = torch.linalg.qr(randn(12, 12, seed=8))[0]
    parts = {str(k): Q[:, 4 * k : 4 * k + 4] @ torch.diag(torch.rand(4).double() + 1) @ Q[:, 4 * k : 4 * k + 4].T
             for k in range(3)}  # fmt: skip
    found = block_incoherence(parts)
    assert float((found.coherence - torch.eye(3)).abs().max()) < 1e-7 and abs(found.cross_share) < 1e-14
    same = block_incoherence({str(k): parts["0"] for k in range(3)}, num_outputs=2, num_resamples=4)
    assert same.mean == pytest.approx(1.0) and same.cross_share == pytest.approx(2.0)
    assert same.cross_share_error < 1e-12 and same.p_value < 1e-6


def test_coherence_is_that_of_dense_jacobians():
    net, x, _ = tanh_net()
    blocks = find_blocks(net)
    found = block_incoherence(block_kernels(NTKOperator(net, x), blocks))
    J = [jacobian(net, x, list(b.parameters)) for b in blocks]
    for a in range(4):
        for b in range(4):
            dense = (J[a].T @ J[b]).norm() / ((J[a].T @ J[a]).norm() * (J[b].T @ J[b]).norm()).sqrt()
            assert float(found.coherence[a, b]) == pytest.approx(float(dense), rel=1e-10)
    assert float(found.band_profile[3]) == pytest.approx(float(found.coherence[0, 3]))


def test_decay_length_of_an_exponential_profile():
    """Diagonal kernels made so that C_lm^2 = exp(-2 |l - m| / length)."""
    L, length = 6, 2.0
    target = torch.exp(-2 * (torch.arange(L)[:, None] - torch.arange(L)[None, :]).abs() / length).double()  # C^2
    vectors = torch.linalg.cholesky(target)  # rows with these inner products, used as diagonal kernels
    assert float(vectors.min()) >= 0
    found = block_incoherence({str(k): torch.diag(vectors[k]) for k in range(L)})
    assert found.decay_length == pytest.approx(length, rel=1e-6)


def test_random_bases_have_the_stated_moments_and_false_positive_rate():
    m, draws = 12, 600
    spectra = [torch.linspace(0.1, 1, m).double() ** k for k in (1, 2, 3)]
    shares, positives, found = [], 0, None
    for seed in range(draws):
        bases = [torch.linalg.qr(randn(m, m, seed=3 * seed + k))[0] for k in range(3)]
        found = block_incoherence({str(k): Q @ torch.diag(s) @ Q.T for k, (Q, s) in enumerate(zip(bases, spectra))})
        shares.append(found.cross_share)
        positives += found.p_value <= 0.05
    assert np.mean(shares) == pytest.approx(found.null_mean, abs=5 * found.null_error / math.sqrt(draws))
    assert np.std(shares, ddof=1) == pytest.approx(found.null_error, rel=5 / math.sqrt(2 * draws))
    assert abs(positives / draws - 0.05) < 3 * math.sqrt(0.05 * 0.95 / draws)


def test_behind_a_head_at_zero_nothing_is_said_of_incoherence():
    """Only the head has a kernel then: no overlap is no sign of incoherence."""
    net, x, y = tanh_net()
    with torch.no_grad():
        list(net.modules())[-1].weight.zero_()
    settings = ConditionSettings(num_resamples=4, num_null=9, num_directions=2)
    at_zero = measure_conditions(net, (x, y), "mse", settings)
    assert math.isnan(at_zero.incoherence.cross_share) and math.isnan(at_zero.incoherence.p_value)
    row = next(v for v in judge([at_zero]).verdicts if v.condition == "functional incoherence")
    assert row.verdict == "undecided" and "all blocks' kernels but one are zero" in row.note
    torch.nn.init.normal_(list(net.modules())[-1].weight, generator=torch.Generator().manual_seed(0))
    later = measure_conditions(net, (x, y), "mse", settings, ShellGrid(at_zero.edges))
    row = next(v for v in judge([at_zero, later]).verdicts if v.condition == "functional incoherence")
    assert row.value == later.incoherence.cross_share


def test_incoherence_wants_two_kernels_of_one_size():
    with pytest.raises(ValueError, match="at least two blocks"):
        block_incoherence({"a": torch.eye(2)})
    with pytest.raises(ValueError, match="must all have shape"):
        block_incoherence({"a": torch.eye(2), "b": torch.eye(3)})
    with pytest.raises(ValueError, match="num_outputs must divide"):
        block_incoherence({"a": torch.eye(3), "b": torch.eye(3)}, num_outputs=2, num_resamples=2)


# ---- gradient propagation ----


def dense_norms(net, x, cuts):
    """Largest singular value over samples of the map between consecutive cuts of a Sequential."""
    norms = []
    for start, end in zip(cuts[:-1], cuts[1:]):
        part, h = net[start:end], net[:start](x).detach()
        norms.append(largest_norm(lambda v, part=part: part(v[None])[0], h))
    return norms


def largest_norm(function, samples):
    with torch.no_grad():
        return max(float(torch.linalg.svdvals(torch.func.jacrev(function)(s))[0]) for s in samples)


def test_spectral_norms_match_dense_ones():
    net, x, y = tanh_net()
    found = gradient_propagation(NTKOperator(net, x), y, MSE)
    assert found.names == ("2", "4", "6")
    assert found.spectral_norms.tolist() == pytest.approx(dense_norms(net, x, [2, 4, 6, 7]), rel=1e-9)
    assert torch.equal(found.spectral_norms, found.upper_bounds)  # six steps exhaust six dimensions


def test_few_steps_bracket_the_norm():
    net = seeded(lambda: mlp(depth=3, width=80, num_out=40))
    x, y = randn(6, 5, seed=3), randn(6, 40, seed=4)
    exact = torch.tensor(dense_norms(net, x, [2, 4, 5]))
    found = gradient_propagation(NTKOperator(net, x), y, MSE, num_steps=14)
    assert bool((found.spectral_norms <= exact * (1 + 1e-12)).all() & (exact <= found.upper_bounds).all())
    assert bool((found.spectral_norms > 0.98 * exact).all() & torch.isfinite(found.upper_bounds).all())
    assert bool(torch.isinf(gradient_propagation(NTKOperator(net, x), y, MSE, num_steps=2).upper_bounds).all())


def test_upper_bounds_hold_for_hard_spectra():
    """Clustered top singular values: 200 random starts, none of the bounds fails."""
    from grsd_callbacks.renormalizability.propagation import _largest_singular_value

    values = torch.linspace(0.9, 1.0, 40).double()
    for seed in range(200):
        h = torch.zeros(1, 40, dtype=torch.float64, requires_grad=True)
        low, high = _largest_singular_value(h, h * values, 12, 0.01, seed)
        assert low <= 1.0 + 1e-12 <= high + 1e-9


@pytest.mark.parametrize("rows, columns", [(30, 9), (9, 30), (20, 20)])
@pytest.mark.parametrize("rank", [4, None])
def test_norms_are_right_where_the_krylov_space_is_exhausted(rows, columns, rank):
    """Dense matrices with singular values over nine decades, and of rank four: nothing but rounding is left then."""
    from grsd_callbacks.renormalizability.propagation import _largest_singular_value

    for seed in range(20):
        least = min(rows, columns)
        values = torch.logspace(0, -9, least, dtype=torch.float64)
        values[1] = 0.999
        values[rank:] = 0.0 if rank else values[rank:]
        U, V = (torch.linalg.qr(randn(size, least, seed=2 * seed + k))[0] for k, size in enumerate((rows, columns)))
        A = U * values @ V.T
        h = torch.zeros(2, columns, dtype=torch.float64, requires_grad=True)
        low, high = _largest_singular_value(h, h @ torch.stack([A, 0.5 * A])[0].T, least, 0.01, seed)
        assert low == pytest.approx(1.0, abs=1e-12) and high == low


def test_skips_between_blocks_are_part_of_the_jacobian():
    net, x, y = seeded(Framed), randn(4, 5, seed=7), randn(4, 2, seed=8)
    found = gradient_propagation(NTKOperator(net, x), y, MSE)
    assert found.names == ("layers.0", "layers.1", "layers.2")
    h = net.stem(x).detach()
    layer = net.layers[0]
    dense = largest_norm(lambda v: v + 0.5 * layer(v[None])[0], h)
    assert float(found.spectral_norms[0]) == pytest.approx(dense)


def test_gradient_norms_over_depth():
    """Linear layers that halve the gradient: the slope is ln 2 forward, the spread (L - 1) log10 2."""
    net = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(6))).double()
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(0.5 * torch.eye(3))
    x, y = randn(8, 3, seed=1), randn(8, 3, seed=2)
    found = gradient_propagation(NTKOperator(net, x), y, MSE, num_null=199, num_resamples=8)
    assert found.slope == pytest.approx(math.log(2)) and found.spread == pytest.approx(4 * math.log10(2))
    assert found.spread_error < 1e-9 and found.p_value < 0.05
    f = net(x)
    last = torch.autograd.grad(((f - y) ** 2).mean(), f)[0] * 0.5
    assert float(found.gradient_norms[-1]) == pytest.approx(float(last.norm()))


def test_propagation_refuses_what_it_cannot_read():
    x, y = randn(4, 5), randn(4, 2)
    with pytest.raises(ValueError, match="a block whose input depends on parameters"):
        gradient_propagation(NTKOperator(seeded(lambda: nn.Linear(5, 2)), x), y, MSE)
    shallow = gradient_propagation(NTKOperator(seeded(lambda: mlp(depth=2)), x), y, MSE, num_null=19)
    assert shallow.names == ("2",) and math.isnan(shallow.spread) and math.isnan(shallow.p_value)

    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)])

        def forward(self, x):
            return self.layers[2](self.layers[1](self.layers[0](x)[None])[0])

    with pytest.raises(ValueError, match="without a leading dimension of 4 samples"):
        gradient_propagation(NTKOperator(seeded(TimeFirst), x), y, MSE)


# ---- Jacobian evolution ----


def test_speeds_match_dense_jacobians():
    net, x, _ = tanh_net()
    op, h = NTKOperator(net, x), 1e-5
    v = randn(op.num_parameters, seed=9)
    found = jacobian_evolution(op, v, nu=0.3, num_vectors=512, seed=1)
    moved = [jacobian_at(net, x, s * h * v) for s in (1, -1)]
    rate, J = (moved[0] - moved[1]) / (2 * h), jacobian(net, x)
    sizes = [p.numel() for p in net.parameters()]
    for k in range(4):
        columns = slice(sum(sizes[: 2 * k]), sum(sizes[: 2 * k + 2]))
        dense = float(rate[:, columns].norm() / J[:, columns].norm())
        assert abs(float(found.speeds[k]) - dense) < 4 * float(found.speed_errors[k])
        assert float(found.speed_errors[k]) < 0.1 * dense and float(found.sizes[k]) == pytest.approx(
            float(J[:, columns].norm())
        )
    dense_speed = float((rate @ J.T + J @ rate.T).norm()) / (0.3 * float((J @ J.T).norm()) ** 2)
    assert found.kernel_speed == pytest.approx(dense_speed, rel=1e-5)


def jacobian_at(net, x, change):
    vector = nn.utils.parameters_to_vector(net.parameters()).detach()
    nn.utils.vector_to_parameters(vector + change, net.parameters())
    try:
        return jacobian(net, x)
    finally:
        nn.utils.vector_to_parameters(vector, net.parameters())


def test_speed_errors_are_calibrated():
    """Estimates from 8 vectors scatter as their standard errors say, over 100 draws."""
    net, x, _ = tanh_net()
    op = NTKOperator(net, x)
    v = randn(op.num_parameters, seed=9)
    kernels, moved = block_kernels(op, find_blocks(net)), kernel_velocity(op, v)
    found = [jacobian_evolution(op, v, 1.0, kernels=kernels, velocity=moved, seed=s) for s in range(100)]
    speeds, errors = torch.stack([f.speeds for f in found]), torch.stack([f.speed_errors for f in found])
    ratio = speeds.std(0) / errors.square().mean(0).sqrt()
    assert bool(((ratio > 0.7) & (ratio < 1.4)).all())


def test_frozen_features_do_not_move():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net[0].requires_grad_(False)
    op = NTKOperator(net, randn(5, 3))
    found = jacobian_evolution(op, randn(op.num_parameters), 1.0, num_null=2)
    assert found.speeds.tolist() == [0.0] and found.kernel_speed < 1e-9 and found.null_kernel_speed < 1e-9
    with pytest.raises(ValueError, match="num_vectors"):
        jacobian_evolution(op, randn(op.num_parameters), 1.0, num_vectors=1)


# ---- time rescaling, regime ----


def test_exact_lazy_law_collapses():
    """Problem 1: E_a(t) t^q is one function of lambda t, and there is no velocity to fit."""
    law = PowerLawKernel(num_modes=4000, spectrum_exponent=1.5, source_exponent=1.9)
    edges, times = np.logspace(-5, 0, 16), np.logspace(0.5, 3.5, 10)
    energy = np.stack([law.energy(t, edges.tolist()).numpy() for t in times])
    flux = np.zeros((10, 16))
    found = time_rescaling_covariance(edges, times, energy, flux, chi=law.loss_exponent, num_null=99)
    assert found.collapse > 0.97 and found.collapse_p == 0.01 and found.collapse_error < 0.05
    assert math.isnan(found.residual.value) and "0 usable points" in found.reason
    assert time_rescaling_covariance(edges, times, energy, flux, chi=3.0).collapse < 0.5
    assert "chi or rho" in time_rescaling_covariance(edges, times, energy, flux, chi=math.nan).collapse_reason


def test_covariant_velocity_has_no_residual():
    edges, times, b, c = np.logspace(-4, 0, 13), np.logspace(0, 3, 9), 1.6, 0.2
    h = math.log(10) / 3
    energy = np.ones((9, 14))
    speed = -c * edges ** (b - 1) * times[:, None] ** (b - 2)  # u = v / lambda
    found = time_rescaling_covariance(edges, times, energy, speed / h, chi=0.5)
    assert found.b.value == pytest.approx(b) and abs(found.residual.value) < 1e-9
    off = time_rescaling_covariance(edges, times, energy, speed / h * times[:, None] ** 0.3, chi=0.5)
    assert off.residual.value == pytest.approx(0.3)


def test_collapse_null_has_a_false_positive_rate_of_5_percent():
    """Energies without relation to time, 400 draws."""
    edges, times, positives = np.logspace(-3, 0, 10), np.logspace(0, 2, 6), 0
    for seed in range(400):
        energy = np.exp(np.random.default_rng(seed).normal(size=(6, 11)))
        found = time_rescaling_covariance(edges, times, energy, np.zeros((6, 10)), 0.5, num_null=19, seed=seed)
        positives += found.collapse_p <= 0.05
    assert abs(positives / 400 - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 400)


def test_time_rescaling_checks_shapes():
    with pytest.raises(ValueError, match="energy and flux must have shapes"):
        time_rescaling_covariance(np.logspace(-1, 0, 3), [1.0], np.ones((1, 3)), np.ones((1, 3)), 0.5)


@pytest.mark.parametrize(
    "signs, label",
    [
        ({"kernel_drift": 0.05, "cka_distance": 1e-3}, "lazy"),
        ({"kernel_drift": 0.05, "cka_distance": 1e-3, "transport_ratio": 0.3}, "undecided"),
        ({"kernel_drift": 2.0, "cka_distance": 0.01, "alignment_change": 0.7}, "rich"),
        ({"kernel_drift": 2.0}, "undecided"),
        ({"kernel_drift": 0.05}, "undecided"),
        ({}, "undecided"),
    ],
)
def test_regime(signs, label):
    assert lazy_or_rich(signs).label == label


def test_regime_refuses_unknown_signs():
    with pytest.raises(ValueError, match="unknown signs"):
        lazy_or_rich({"drift": 1.0})


# ---- all of one instant ----


@lru_cache
def instant(seed=0, probe_seed=1, shells_per_decade=3, n=48):
    net = seeded(lambda: mlp(depth=5, width=24, num_in=8, num_out=1), seed=seed)
    x = randn(n, 8, seed=probe_seed)
    y = torch.sin(x.sum(1, keepdim=True))
    settings = ConditionSettings(shells_per_decade=shells_per_decade, num_resamples=12, num_null=39)
    return measure_conditions(net, Probe(x, y), "mse", settings)


def test_an_instant_holds_everything_and_survives_json():
    found = instant()
    again = Conditions.from_dict(found.to_dict())
    assert again.to_dict() == found.to_dict()
    assert found.propagation.names == ("2", "4", "6", "8") and found.incoherence.names[0] == "0"
    assert found.cost["seconds"] > 0 and found.health["kink_gap"] < 1e-2
    assert set(found.errors) == {"defect", "zeta", "locality"} and found.transport_ratio > 0
    assert float(found.energy.sum()) == pytest.approx(found.loss, rel=1e-9)


def test_couplings_agree_with_a_dense_velocity():
    net, x, y = tanh_net()
    found = measure_conditions(net, (x, y), "mse", ConditionSettings(min_modes=1), thorough=False)
    nu = 2 / 14
    J = jacobian(net, x)
    theta = -nu * J.T @ (net(x) - y).detach().reshape(-1)
    h = 1e-5
    rate = [(Jh @ Jh.T) for Jh in (jacobian_at(net, x, s * h * theta) for s in (1, -1))]
    lam, U = torch.linalg.eigh(nu * J @ J.T)
    R, _ = shell_couplings(lam, U.T @ (nu * (rate[0] - rate[1]) / (2 * h)) @ U, ShellGrid(found.edges))
    kept = torch.isfinite(R)[1:, 1:]
    assert relative(found.couplings.couplings[1:, 1:][kept], R[1:, 1:][kept]) < 1e-4
    assert found.errors == {} and math.isnan(found.couplings.p_value)


def test_probe_resampling_covers_other_probes():
    """Defect and zeta on 8 other probes lie within the stated 95 % intervals of the difference, but for one."""
    first, outside = instant(), 0
    for name in ("defect", "zeta"):
        for probe_seed in range(10, 18):
            other = instant(probe_seed=probe_seed)
            error = math.hypot(first.errors[name], other.errors[name])
            outside += abs(getattr(other.couplings, name) - getattr(first.couplings, name)) > 1.96 * error
    assert outside <= 2  # P(more than 2 of 16) < 5 %


def test_seed_and_shell_width_stay_within_the_intervals():
    first = instant()
    for other in (instant(seed=1), instant(seed=2), instant(shells_per_decade=2), instant(shells_per_decade=4)):
        for name in ("defect", "zeta"):
            error = math.hypot(first.errors[name], other.errors[name])
            assert abs(getattr(other.couplings, name) - getattr(first.couplings, name)) < 3 * error


def test_flips_of_gates_leave_couplings_undecided():
    net = seeded(lambda: mlp(depth=4, width=8, num_in=8, num_out=1, activation=nn.ReLU))
    found = measure_conditions(net, (randn(24, 8), randn(24, 1)), "mse", ConditionSettings(num_null=19))
    assert found.health["kink_gap"] > 0.5
    row = next(v for v in judge([found]).verdicts if v.condition == "log-shift invariance")
    assert row.verdict != "holds"


def test_settings_are_checked():
    for changes, message in (
        ({"blocks": "net"}, "blocks must be a list"),
        ({"num_steps": 0}, "num_steps must be"),
        ({"num_null": True}, "num_null must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ConditionSettings(**changes)


# ---- verdicts ----


def test_verdicts_and_table():
    verdict = judge([instant()], chi=0.4, signs={"kernel_drift": 0.0, "cka_distance": 0.0})
    rows = {v.condition: v for v in verdict.verdicts}
    assert len(rows) == 6
    for v in rows.values():
        assert v.verdict in ("holds", "fails", "undecided") and v.definition and v.limit > 0
    grown = rows["controlled Jacobian evolution"]
    assert grown.lower <= grown.value <= grown.upper and grown.verdict == "holds"
    table = verdict.table()
    for promised in ("95 % interval", "null", "holds", "operational definitions", "regime: ", "sd of the residual"):
        assert promised in table
    with pytest.raises(ValueError, match="at least one measurement"):
        judge([])
    with pytest.raises(ValueError, match="same shells"):
        judge([instant(), instant(shells_per_decade=4)])


def test_intervals_decide():
    from grsd_callbacks.renormalizability.verdicts import bounded, covariant, significant

    name = "log-shift invariance"
    assert [bounded(name, v, 0.02, "", 0.01).verdict for v in (0.1, 0.24, 0.4)] == ["holds", "undecided", "fails"]
    assert bounded(name, 0.1, math.nan, "", 0.01).verdict == "undecided"
    assert significant(bounded(name, 0.1, 0.02, "", 0.4), "as shuffled").verdict == "undecided"
    assert significant(bounded(name, 0.4, 0.02, "", 0.4), "as shuffled").verdict == "fails"
    found = [covariant(0.1, a, b, "", 0.5).verdict for a, b in ((-0.1, 0.3), (-2.0, 2.2), (0.05, 0.15))]
    assert found == ["holds", "undecided", "fails"]
