"""How a kernel has moved: drift, shape, and how much of the change a frozen kernel explains."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grsd_callbacks.flux import KernelState
from grsd_callbacks.memory import row_blocks


def kernel_comparison(state: KernelState, reference: KernelState) -> dict[str, float]:
    """`kernel_drift` |M - M_0|_F / |M_0|_F and `cka_distance` 1 - CKA(M, M_0); NaN unless both bases are complete.

    CKA is <HMH, HM_0H>_F / (|HMH|_F |HM_0H|_F), centred over all m rows, H = 1 - 11^T / m.

    Cost: some passes over m^2 numbers where the states hold their kernels; m^3 multiplications for one that does not.
        No copies of them.
    """
    if not (state.is_complete and reference.is_complete):
        return {"kernel_drift": math.nan, "cka_distance": math.nan}
    M, M0 = state.matrix, reference.matrix.to(state.matrix)
    means, means_0 = M.mean(0), M0.mean(0)
    sums = M.new_zeros(5)
    for rows in row_blocks(*M.shape):
        a, b = _centred(M, means, rows), _centred(M0, means_0, rows)
        pairs = (M0[rows], M0[rows]), (M[rows] - M0[rows],) * 2, (a, a), (b, b), (a, b)
        sums += torch.stack([x.reshape(-1) @ y.reshape(-1) for x, y in pairs])
    size, moved, now, then, inner = sums.tolist()
    product = math.sqrt(now) * math.sqrt(then)
    return {
        "kernel_drift": math.sqrt(moved) / math.sqrt(size) if size > 0 else math.nan,
        "cka_distance": 1 - inner / product if product > 0 else math.nan,
    }


def _centred(M: Tensor, means: Tensor, rows: slice) -> Tensor:
    """Rows of H M H of a symmetric M with these means."""
    return M[rows] - means - means[rows, None] + means.mean()


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
