"""Bidiagonalisation by its own identities, and bounds that the true cumulative measure never leaves."""

import math

import pytest
import torch
from nets import orthogonal, randn
from torch import nn

from grsd_callbacks import krylov
from grsd_callbacks.krylov import cumulative_bounds, gauss_rule, golub_kahan, lanczos
from grsd_callbacks.losses import resolve_loss
from grsd_callbacks.measure import measure
from grsd_callbacks.probe import Probe
from grsd_callbacks.settings import Settings
from grsd_callbacks.spectrum import SpectralMeasure, spectral_measure

EPS = torch.finfo(torch.float64).eps


def bidiagonalise(A, r, k, **options):
    """Result, left vectors U and the right vectors V that the products were asked for."""
    right = []

    def apply(w):
        right.append(w)
        return A @ w

    result = golub_kahan(apply, lambda u: A.T.to(A) @ u.to(A.dtype), r, k, **options)
    return result, torch.stack(right, 1) if right else torch.zeros(A.shape[1], 0, dtype=A.dtype)


def random_measure(seed, m=60, decades=None):
    """Eigenvalues over some decades and the squared components of a start vector."""
    generator = torch.Generator().manual_seed(seed)
    decades = (2, 5, 8, 12)[seed % 4] if decades is None else decades
    lam = 10 ** (-decades * torch.rand(m, generator=generator, dtype=torch.float64))
    tilt = torch.rand(1, generator=generator, dtype=torch.float64)
    return lam, torch.randn(m, generator=generator, dtype=torch.float64) * lam ** (tilt / 2)


def diagonal(lam, r, k):
    s = lam.sqrt()
    return golub_kahan(lambda w: s * w, lambda u: s * u, r, k)


def below(lam, weights, points):
    """mu((-inf, x)) / mu, the truth."""
    return (weights[None] * (lam[None] < points[:, None])).sum(1) / weights.sum()


def both_bounds(b, points):
    """Energy and dissipation bounds of a bidiagonalisation that is not exhausted."""
    energy = cumulative_bounds(b.factor(), float(b.alphas[-1] * b.betas[-1]), points)
    dissipation = cumulative_bounds(b.factor_dual(), float(b.alphas[-1] * b.betas[-2]), points)
    return energy, dissipation


# ---- the algorithm's identities ----


@pytest.mark.parametrize("k", [1, 2, 7, 15])
def test_identities(k):
    A, r = randn(20, 33, seed=1), randn(20, seed=2)
    b, V = bidiagonalise(A, r, k)
    U, B = b.left, torch.zeros(k + 1, k, dtype=torch.float64)
    B[:k], B[k, k - 1] = b.factor(), b.betas[-1]
    assert b.num_steps == k and U.shape == (20, k + 1) and b.num_products == k and not b.exhausted
    torch.testing.assert_close(A @ V, U @ B, rtol=0, atol=1e-12)  # A V_k = U_{k+1} B_{k+1,k}
    torch.testing.assert_close(A.T @ U[:, :k], V @ b.factor().T, rtol=0, atol=1e-12)  # A^T U_k = V_k B_k^T
    torch.testing.assert_close(U.T @ U, torch.eye(k + 1).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(U[:, 0] * b.norm, r, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_left_vectors_stay_orthonormal_over_twelve_decades(seed):
    lam, r = random_measure(seed, decades=12)
    Q = orthogonal(60, seed)
    b, _ = bidiagonalise(Q * lam.sqrt(), Q @ r, 50)
    gap = b.left.T @ b.left - torch.eye(b.left.shape[1])
    assert float(gap.abs().max()) < 1e-12


def test_the_gauss_rule_integrates_polynomials_of_degree_2k_minus_1():
    lam, r = random_measure(0, decades=1)
    nodes, rotation = gauss_rule(diagonal(lam, r, 5).factor())
    weights = rotation[0] ** 2
    for degree in range(10):
        exact = float((r**2 * lam**degree).sum() / (r**2).sum())
        assert float((weights * nodes**degree).sum()) == pytest.approx(exact, rel=1e-12)
    exact = float((r**2 * lam**10).sum() / (r**2).sum())
    assert float((weights * nodes**10).sum()) != pytest.approx(exact, rel=1e-12)


def test_first_moments_are_the_coefficients():
    lam, r = random_measure(1, decades=3)
    b = diagonal(lam, r, 3)
    w = r**2 / (r @ r)
    assert float(b.alphas[0] ** 2) == pytest.approx(float(w @ lam), rel=1e-13)
    ratio = float(w @ lam**2) / float(w @ lam)  # r^T M^2 r / r^T M r
    assert float(b.alphas[0] ** 2 + b.betas[0] ** 2) == pytest.approx(ratio, rel=1e-12)


# ---- full budget and early ends ----


@pytest.mark.parametrize("seed", range(4))
def test_full_budget_is_the_exact_measure(seed):
    lam, r = random_measure(seed, m=20)
    b = diagonal(lam, r, 20)
    nodes, rotation = gauss_rule(b.factor())
    order = lam.argsort()
    assert b.exhausted
    torch.testing.assert_close(nodes, lam[order], rtol=1e-7, atol=1e-15)
    torch.testing.assert_close(b.norm**2 * rotation[0] ** 2, (r**2)[order], rtol=1e-6, atol=1e-13)


def test_small_nodes_keep_their_relative_accuracy():
    """From singular values: 1e-12 is right to 1e-6, where squaring first would leave 1e-4."""
    lam = torch.logspace(-12, 0, 13, dtype=torch.float64)
    nodes, _ = gauss_rule(diagonal(lam, torch.ones(13).double(), 13).factor())
    torch.testing.assert_close(nodes, lam, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_distinct", [1, 3])
def test_degenerate_eigenvalues_end_early(num_distinct):
    values = torch.logspace(-2, 0, num_distinct, dtype=torch.float64)
    lam, r = values.repeat(4), randn(4 * num_distinct, seed=3)
    b = diagonal(lam, r, 4 * num_distinct)
    nodes, rotation = gauss_rule(b.factor())
    assert b.exhausted and b.num_steps == num_distinct and b.num_products <= num_distinct + 1
    torch.testing.assert_close(nodes, values, rtol=1e-12, atol=0)
    torch.testing.assert_close(b.norm**2 * rotation[0] ** 2, (r**2).view(4, -1).sum(0), rtol=1e-11, atol=0)


@pytest.mark.parametrize("num_distinct", [6, 10])
def test_copies_of_degenerate_eigenvalues_share_their_mass(num_distinct):
    """The coefficient that ends the recurrence is rounding, amplified: it may go on, and the masses stay right."""
    values = torch.logspace(-2, 0, num_distinct, dtype=torch.float64)
    lam, r = values.repeat(4), randn(4 * num_distinct, seed=3)
    b = diagonal(lam, r, 4 * num_distinct)
    nodes, rotation = gauss_rule(b.factor())
    nearest = (nodes[:, None] / values - 1).abs()
    assert b.exhausted and float(nearest.min(1).values.max()) < 1e-9
    masses = torch.zeros(num_distinct).double().index_add_(0, nearest.argmin(1), b.norm**2 * rotation[0] ** 2)
    torch.testing.assert_close(masses, (r**2).view(4, -1).sum(0), rtol=1e-9, atol=0)


def test_zero_vector():
    b = diagonal(torch.ones(4).double(), torch.zeros(4).double(), 3)
    assert b.exhausted and b.num_steps == 0 and b.norm == 0.0 and b.left.shape == (4, 0)
    lower, upper = cumulative_bounds(b.factor(), 0.0, torch.tensor([1.0]), exact=True)
    assert lower.tolist() == upper.tolist() == [0.0]


def test_vector_that_is_not_finite():
    assert diagonal(torch.ones(4).double(), torch.full((4,), math.inf).double(), 3).num_steps == 0


def test_null_vector():
    lam = torch.tensor([0.0, 0.0, 1.0]).double()
    b = diagonal(lam, torch.tensor([3.0, 4.0, 0.0]).double(), 3)
    assert b.exhausted and b.alphas.tolist() == [0.0] and b.norm == 5.0
    assert gauss_rule(b.factor())[0].tolist() == [0.0]


def test_null_space_is_a_node_at_zero():
    lam = torch.tensor([0.0, 0.0, 0.5, 2.0]).double()
    r = torch.tensor([3.0, 4.0, 1.0, 2.0]).double()
    b = diagonal(lam, r, 4)
    nodes, rotation = gauss_rule(b.factor())
    assert b.exhausted
    torch.testing.assert_close(nodes, torch.tensor([0.0, 0.5, 2.0]).double(), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(30 * rotation[0] ** 2, torch.tensor([25.0, 1.0, 4.0]).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_eigenvector_and_single_sample(k):
    lam = torch.tensor([0.2, 0.7, 3.0], dtype=torch.float64)
    b = diagonal(lam, torch.tensor([0.0, -2.0, 0.0]).double(), k)
    assert b.exhausted and b.num_steps == 1
    assert float(gauss_rule(b.factor())[0]) == pytest.approx(0.7, rel=1e-14)
    one = diagonal(torch.tensor([5.0]).double(), torch.tensor([3.0]).double(), k)
    assert one.exhausted and one.num_steps == 1 and float(one.alphas[0] ** 2) == pytest.approx(5.0, rel=1e-14)


def test_float32_products_resolve_twelve_decades():
    lam = torch.logspace(-12, 0, 25, dtype=torch.float64)
    Q, P = orthogonal(25, 1), orthogonal(25, 2)
    A = ((Q * lam.sqrt()) @ P.T).float()
    b, _ = bidiagonalise(A, Q @ lam**0.25, 25)
    nodes, _ = gauss_rule(b.factor())
    truth = torch.linalg.svdvals(A.double()).flip(0) ** 2  # of the matrix as it was rounded
    assert b.rounding == torch.finfo(torch.float32).eps
    assert float((nodes / truth).log().abs().max()) < math.log(10) / 6  # within half a shell of three a decade


# ---- bounds ----


def seeds(few, all):
    """The first few always, the others with the slow tests."""
    return [*range(few), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(few, all))]


def points_for(lam, b):
    """Generic edges, edges beyond both ends, and edges on and beside the Gauss nodes."""
    nodes = gauss_rule(b.factor())[0]
    nodes = nodes[nodes > 0]
    beside = [nodes * (1 + shift) for shift in (0.0, 1e-3, -1e-5, 1e-9, -1e-13)]
    ends = torch.tensor([1e-30, float(lam.min()) / 100, 10 * float(lam.max()), 1e6], dtype=torch.float64)
    return torch.cat([torch.logspace(-14, 1, 46, dtype=torch.float64), ends, *beside]).sort().values


@pytest.mark.parametrize("seed", seeds(12, 32))
def test_the_truth_lies_within_the_bounds(seed):
    lam, r = random_measure(seed)
    for k in (2, 3, 5, 8, 13, 21, 34, 50):
        b = diagonal(lam, r, k)
        assert not b.exhausted
        points = points_for(lam, b)
        for weights, (lower, upper) in zip((r**2, lam * r**2), both_bounds(b, points), strict=True):
            truth = below(lam, weights, points)
            assert float((lower - truth).max()) < 1e-12 and float((truth - upper).max()) < 1e-12
            assert bool((lower.diff() >= 0).all()) and bool((upper.diff() >= 0).all())


@pytest.mark.parametrize("seed", range(6))
def test_clustered_and_degenerate_measures_lie_within_the_bounds(seed):
    lam, r = random_measure(seed, m=20)
    lam = torch.cat([lam, lam * (1 + 1e-6), lam])
    r = torch.cat([r, randn(20, seed=seed) * lam[:20].sqrt(), r])
    for k in (3, 8, 15):
        b = diagonal(lam, r, k)
        points = points_for(lam, b)
        for weights, (lower, upper) in zip((r**2, lam * r**2), both_bounds(b, points), strict=True):
            truth = below(lam, weights, points)
            assert float((lower - truth).max()) < 1e-12 and float((truth - upper).max()) < 1e-12


def test_bounds_are_attained_by_the_rule_with_a_node_at_the_point():
    """k = 1: the two-node rule with a node at x in closed form."""
    lam, r = torch.tensor([1.0, 3.0, 4.0]).double(), torch.tensor([1.0, 1.0, 1.0]).double()
    b = diagonal(lam, r, 1)
    mean, variance = 8 / 3, (1 + 9 + 16) / 3 - (8 / 3) ** 2
    x = torch.tensor([2.0]).double()
    at_x = variance / (variance + (2 - mean) ** 2)  # weight of the node at x; the other lies above
    lower, upper = cumulative_bounds(b.factor(), float(b.alphas[-1] * b.betas[-1]), x)
    assert float(lower) == pytest.approx(0.0, abs=2e-9) and float(upper) == pytest.approx(at_x, abs=2e-9)


def test_bounds_shrink_and_close_at_full_budget():
    lam, r = random_measure(1, m=30)
    points = torch.logspace(-6, 0.5, 20, dtype=torch.float64)
    widths = []
    for k in (3, 6, 12, 24):
        (lower, upper), _ = both_bounds(diagonal(lam, r, k), points)
        widths.append(float((upper - lower).mean()))
    assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0] / 10
    b = diagonal(lam, r, 30)
    lower, upper = cumulative_bounds(b.factor(), 0.0, points, exact=True)
    assert torch.equal(lower, upper)
    torch.testing.assert_close(lower, below(lam, r**2, points), rtol=0, atol=1e-9)


def test_refusals():
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        diagonal(torch.ones(2).double(), torch.ones(2).double(), 0)


@pytest.mark.parametrize(("num_outputs", "num_samples"), [(10, 30), (3, 80), (2, 100)])
def test_copies_of_degenerate_eigenvalues_leave_the_bounds_rigorous(num_outputs, num_samples):
    """A linear net's kernel is K (x) 1: long recurrences meet converged eigenvalues again, as coincident nodes."""
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num_samples, 50, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, 50).double()
        y = torch.randn(num_samples, num_outputs, generator=generator, dtype=torch.float64)
        torch.manual_seed(seed)
        net, loss = nn.Linear(50, num_outputs).double(), resolve_loss("mse")
        exact = measure(net, Probe(x, y), loss, Settings(method="exact")).budget
        found = measure(net, Probe(x, y), loss, Settings(method="krylov", num_density_matvecs=0), exact.grid).budget
        for name in ("energy", "dissipation"):
            truth, bounds = getattr(exact, name), getattr(found, f"{name}_bounds")
            slack = 1e-12 * truth.sum()
            assert bool(((bounds[0] - slack <= truth) & (truth <= bounds[1] + slack)).all()), (seed, name)
        assert float(found.energy[-1]) < 1e-8 * float(exact.energy.sum())  # nothing strays into the overflow shell


@pytest.mark.parametrize("rank", [3, 5, 8])
def test_looking_rarely_changes_nothing(monkeypatch, rank):
    """On an accelerator the coefficients are looked at now and then; what follows a breakdown is cut off."""
    generator = torch.Generator().manual_seed(rank)
    A = torch.randn(8, rank, generator=generator, dtype=torch.float64)
    A = A @ torch.randn(rank, 12, generator=generator, dtype=torch.float64)
    r = torch.randn(8, generator=generator, dtype=torch.float64)
    often = golub_kahan(lambda w: A @ w, lambda u: A.T @ u, r, 8)
    end, asked = krylov._Recurrence.end, []

    def rarely(self):
        asked.append(len(self.coefficients))
        return end(self) if len(self.coefficients) == 16 else None

    monkeypatch.setattr(krylov._Recurrence, "end", rarely)
    found = golub_kahan(lambda w: A @ w, lambda u: A.T @ u, r, 8)
    assert found.exhausted and often.exhausted and asked[-1] == 16 and found.num_products >= often.num_products
    for name in ("alphas", "betas", "left"):
        assert torch.equal(getattr(found, name), getattr(often, name))


# ---- on a dense kernel ----


def dense(lam, r, seed=0):
    """A kernel with these eigenvalues, and the vector with these components."""
    Q = orthogonal(len(lam), seed=seed)
    return (Q * lam) @ Q.T, Q @ r


def test_lanczos_finds_the_coefficients_of_a_factor():
    lam, r = random_measure(3, m=30, decades=3)
    K, v = dense(lam, r)
    expected, found = diagonal(lam, r, 12), lanczos(K, v, 12)
    torch.testing.assert_close(found.alphas, expected.alphas, rtol=1e-8, atol=0)
    torch.testing.assert_close(found.betas, expected.betas, rtol=1e-8, atol=0)
    U = found.left
    assert U.shape == (30, 13) and not found.exhausted and found.norm == pytest.approx(float(r.norm()))
    torch.testing.assert_close(U.T @ U, torch.eye(13).double(), rtol=0, atol=1e-13)
    T = found.factor() @ found.factor().T
    torch.testing.assert_close(U[:, :12].T @ K @ U[:, :12], T, rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", seeds(8, 16))
def test_the_truth_lies_within_the_bounds_of_lanczos(seed):
    lam, r = random_measure(seed)
    K, v = dense(lam, r, seed)
    for k in (2, 3, 8, 21, 50):
        found = SpectralMeasure(lanczos(K, v, k))
        points = points_for(lam, found.bidiagonal)
        points = points[(points > 1e-13 * lam.max()) | (points < 1e-20)]  # between lies the rounding of K itself
        for weights, (lower, upper) in (
            (r**2, found.bounds(points)),
            (lam * r**2, found.dissipation_bounds(points)),
        ):
            truth = below(lam, weights, points)
            assert float((lower - truth).max()) < 1e-12 and float((truth - upper).max()) < 1e-12


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_lanczos_ends_where_the_space_does(rank):
    lam, r = torch.zeros(20).double(), torch.ones(20).double()
    lam[:rank] = 10.0 ** -torch.arange(rank, dtype=torch.float64)
    found = SpectralMeasure(lanczos(*dense(lam, r), 20))
    assert found.bidiagonal.exhausted and found.bidiagonal.num_steps == rank + 1
    torch.testing.assert_close(found.nodes[1:], lam[:rank].flip(0), rtol=1e-6, atol=0)
    assert float(found.nodes[0]) < 1e-13 and float(found.weights[0]) == pytest.approx(20 - rank, rel=1e-6)
    assert found.dissipation == pytest.approx(float(lam.sum()))
    everything = SpectralMeasure(lanczos(*dense(*random_measure(0, m=9, decades=2)), 50))
    assert everything.bidiagonal.exhausted and everything.bidiagonal.num_steps == 9


def test_lanczos_from_nothing_and_from_the_null_space():
    K, _ = dense(torch.tensor([1.0, 0.5, 0.0]).double(), torch.ones(3).double())
    for start in (torch.zeros(3).double(), torch.full((3,), math.inf).double()):
        empty = SpectralMeasure(lanczos(K, start, 3))
        assert empty.bidiagonal.exhausted and empty.nodes.numel() == 0 and empty.dissipation == 0.0
    null = SpectralMeasure(lanczos(torch.zeros(3, 3).double(), torch.ones(3).double(), 3))
    assert null.bidiagonal.exhausted and float(null.mass) == pytest.approx(3.0) and null.dissipation < 1e-200


def test_a_measure_of_a_dense_kernel_carries_nu():
    lam, r = random_measure(2, m=12, decades=2)
    K, v = dense(lam, r)
    once, scaled = spectral_measure(K, v, 5), spectral_measure(K, v, 5, nu=0.25)
    torch.testing.assert_close(scaled.nodes, 0.25 * once.nodes)
    torch.testing.assert_close(scaled.weights, once.weights)
    with pytest.raises(ValueError, match=r"start must have shape \(12,\), got \(3,\)"):
        spectral_measure(K, torch.ones(3), 5)
