"""How far a kernel has moved, against dense formulas; and what a frozen kernel explains, against exact descent."""

import math

import pytest
import torch
from nets import orthogonal, randn

from grsd_callbacks import testing as known
from grsd_callbacks.comparison import estimated_comparison, frozen_kernel_share, kernel_comparison
from grsd_callbacks.flux import KernelState


def kernel(seed, m=9):
    A = randn(m, m + 2, seed=seed)
    return A @ A.T


def state(K, r=None):
    return KernelState(*torch.linalg.eigh(K), torch.zeros(len(K)).double() if r is None else r)


def dense_cka(K, L):
    m = len(K)
    H = torch.eye(m).double() - 1 / m
    a, b = H @ K @ H, H @ L @ H
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_against_dense_formulas():
    K, L = kernel(1), kernel(2)
    found = kernel_comparison(state(K), state(L))
    assert found["kernel_drift"] == pytest.approx(float((K - L).norm() / L.norm()), rel=1e-12)
    assert found["cka_distance"] == pytest.approx(1 - dense_cka(K, L), rel=1e-11)


def test_the_same_kernel_has_not_moved():
    K = kernel(1)
    found = kernel_comparison(state(K), state(K))
    assert found["kernel_drift"] < 1e-7 and abs(found["cka_distance"]) < 1e-14


def test_cka_sees_no_scale_and_no_shift_of_the_mean():
    K = kernel(1)
    grown = kernel_comparison(state(3 * K), state(K))
    assert grown["kernel_drift"] == pytest.approx(2.0, rel=1e-12) and abs(grown["cka_distance"]) < 1e-14
    assert abs(kernel_comparison(state(K + 5), state(K))["cka_distance"]) < 1e-12


def test_rotating_function_space_changes_the_drift_in_neither():
    K, L, Q = kernel(1), kernel(2), orthogonal(9, 3)
    plain = kernel_comparison(state(K), state(L))
    turned = kernel_comparison(state(Q @ K @ Q.T), state(Q @ L @ Q.T))
    assert turned["kernel_drift"] == pytest.approx(plain["kernel_drift"], rel=1e-12)


def test_undefined_comparisons_are_nan():
    whole = state(kernel(1))
    part = KernelState(whole.eigenvalues[:3], whole.vectors[:, :3], whole.residual)
    assert all(math.isnan(v) for v in kernel_comparison(part, whole).values())
    assert all(math.isnan(v) for v in kernel_comparison(whole, part).values())
    nothing = state(torch.zeros(9, 9).double())
    assert all(math.isnan(v) for v in kernel_comparison(whole, nothing).values())


def test_a_frozen_kernel_explains_exact_descent_even_of_stiff_shells():
    law = known.PowerLawKernel(20, 1.5, 2.0)
    before = KernelState(*torch.linalg.eigh(law.kernel(0.0)), law.residual(0.0))
    for lr, steps in ((0.1, 1), (1.5, 40)):
        share = frozen_kernel_share(before, law.descent_residual(lr, steps), lr, steps)
        assert share == pytest.approx(1.0, abs=1e-10)


def test_share_of_other_motions():
    before = state(torch.eye(4).double(), torch.tensor([1.0, 1.0, 0.0, 0.0]).double())
    orthogonal_motion = before.residual + torch.tensor([0.0, 0.0, 0.3, 0.0]).double()
    small = frozen_kernel_share(before, orthogonal_motion, 1e-9, 1)
    assert small == pytest.approx(0.0, abs=1e-8)
    assert frozen_kernel_share(before, orthogonal_motion, 0.5, 1) < 0
    assert math.isnan(frozen_kernel_share(before, before.residual, 0.1, 1))
    assert math.isnan(frozen_kernel_share(before, orthogonal_motion, math.nan, 1))
    assert math.isnan(frozen_kernel_share(before, orthogonal_motion, 1e200, 5))


def test_an_incomplete_basis_predicts_what_it_holds():
    law = known.PowerLawKernel(20, 2.0, 2.0)
    lam, U = torch.linalg.eigh(law.kernel(0.0))
    part = KernelState(lam[-6:], U[:, -6:], law.residual(0.0))
    share = frozen_kernel_share(part, law.descent_residual(0.5, 3), 0.5, 3)
    assert 0.98 < share < 1.0


def test_one_random_vector_estimates_drift_and_shape():
    """Against the exact comparison on kernels of high rank: mean of many draws, and each draw to its stated error."""
    generator = torch.Generator().manual_seed(7)
    m, rank = 120, 80
    A, B = (torch.randn(m, rank, generator=generator, dtype=torch.float64) for _ in range(2))
    K, L = A @ A.T / rank, (A + 0.3 * B) @ (A + 0.3 * B).T / rank
    exact = kernel_comparison(state(L), state(K))
    found = []
    for _ in range(200):
        z = torch.randn(m, 1, generator=generator, dtype=torch.float64)
        z = z / z.norm()
        images = [centred_images(M, z) for M in (L, K)]
        found.append(estimated_comparison(*images))
    for name in ("kernel_drift", "cka_distance"):
        values = torch.tensor([x[name] for x in found])
        assert float(values.mean()) == pytest.approx(exact[name], rel=0.1)
        assert float(values.std()) < 0.4 * exact[name]
    assert estimated_comparison(images[0], images[0]) == pytest.approx({"kernel_drift": 0.0, "cka_distance": 0.0})


def centred_images(M, z):
    image = M @ (z - z.mean())
    return torch.cat([M @ z, image - image.mean()], dim=1)
