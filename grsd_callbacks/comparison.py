"""How a kernel has moved: drift, shape, and how much of the change a frozen kernel explains."""

from __future__ import annotations

import math

from torch import Tensor

from grsd_callbacks.flux import KernelState


def kernel_comparison(state: KernelState, reference: KernelState) -> dict[str, float]:
    """`kernel_drift` |M - M_0|_F / |M_0|_F and `cka_distance` 1 - CKA(M, M_0); NaN unless both bases are complete.

    With overlaps O = U^T U_0: <M, M_0>_F = sum_ij lambda_i lambda0_j O_ij^2. CKA centres both kernels over all m rows.

    Cost: m^3 multiplications.
    """
    if not (state.is_complete and reference.is_complete):
        return {"kernel_drift": math.nan, "cka_distance": math.nan}
    lam, lam0 = state.eigenvalues, reference.eigenvalues.to(state.eigenvalues)
    overlap = (state.vectors.T @ reference.vectors.to(state.vectors)) ** 2
    inner = float(lam @ overlap @ lam0)
    size, size0 = float(lam.square().sum()), float(lam0.square().sum())
    drift = math.sqrt(max(size + size0 - 2 * inner, 0.0) / size0) if size0 > 0 else math.nan
    return {"kernel_drift": drift, "cka_distance": 1 - _cka(state, reference)}


def estimated_comparison(images: Tensor, reference: Tensor) -> dict[str, float]:
    """As `kernel_comparison`, from the images of one random vector: E |(M - M_0) z|^2 = |M - M_0|_F^2 / m.

    Args:
        images, reference: [M z, H M H z] now and at the first measurement, shape (m, 2), the same z.

    Accuracy: ratios of one-vector estimates. The drift's relative error is about (2 / effective rank)^(1/2); the CKA
        distance is right within a factor of 3 or so (0.3 to 3.6 seen at effective rank 20). The vector is the same at
        every measurement, so the error is a fixed factor of a run's curve rather than scatter along it.
    """
    now, then = images, reference.to(images)
    size, product = float(then[:, 0].norm()), float(now[:, 1].norm() * then[:, 1].norm())
    return {
        "kernel_drift": float((now[:, 0] - then[:, 0]).norm()) / size if size > 0 else math.nan,
        "cka_distance": 1 - float(now[:, 1] @ then[:, 1]) / product if product > 0 else math.nan,
    }


def _cka(state: KernelState, reference: KernelState) -> float:
    """Centred kernel alignment <HMH, HM_0H>_F / (|HMH|_F |HM_0H|_F), H = 1 - 11^T / m."""
    roots = [_centred_root(s) for s in (state, reference)]
    cross = (roots[0].T @ roots[1].to(roots[0])).square().sum()
    norms = [(root.T @ root).norm() for root in roots]
    product = float(norms[0]) * float(norms[1])
    return float(cross) / product if product > 0 else math.nan


def _centred_root(state: KernelState) -> Tensor:
    """H U Lambda^(1/2), whose outer product is the centred kernel."""
    root = state.vectors * state.eigenvalues.clamp_min(0.0).sqrt()
    return root - root.mean(0, keepdim=True)


def frozen_kernel_share(before: KernelState, residual: Tensor, lr: float, num_steps: int) -> float:
    """Share of the change of the residual that plain descent with the old kernel explains.

    `1 - |r - (1 - lr M)^k r_old|^2 / |r - r_old|^2`: 1 where the kernel did not move and each of the k steps had
    size lr, 0 where the prediction is no better than no change at all, negative where it is worse. Exact for stiff
    shells (lr lambda k > 1), where a difference quotient over the interval is not.
    """
    u = before.vectors
    old, new = before.residual.to(u), residual.to(u)
    change = new - old
    coefficients = u.T @ old
    damping = (1 - lr * before.eigenvalues) ** num_steps - 1
    predicted = u @ (damping * coefficients)
    total = float(change @ change)
    gap = float((change - predicted).square().sum())
    share = 1 - gap / total if total > 0 else math.nan
    return share if math.isfinite(share) else math.nan
