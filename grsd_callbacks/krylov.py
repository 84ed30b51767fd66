"""Golub-Kahan bidiagonalisation started at a vector, and rigorous bounds from it.  Numbers and products only.

For M = A A^T and a start r = beta_1 u_1:   A^T U_k = V_k B_k^T,   A V_k = U_{k+1} B_{k+1,k}   (B lower bidiagonal)

    alpha_j v_j     = A^T u_j - beta_j v_{j-1}
    beta_{j+1} u_{j+1} = A v_j - alpha_j u_j

`T = B B^T` is the Jacobi matrix of the spectral measure of r under M (Gauss quadrature, total mass exact);
`S = B^T B` that of A^T r under A^T A, whose measure is lambda times the first: the dissipation.
It works on singular values, so float32 products resolve eigenvalues down to about 1e-14 lambda_max.

Source: Golub and Kahan 1965; Golub and Meurant, "Matrices, Moments and Quadrature" (2010), ch. 6;
Chebyshev-Markov-Stieltjes inequalities as in Szego, "Orthogonal Polynomials", section 3.41.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: widening of every bound, relative to the total mass, that covers rounding
BOUND_GUARD = 1e-9


@dataclass(frozen=True, eq=False)
class Bidiagonalization:
    """Result of `golub_kahan` after k steps (fewer where the space was exhausted).

    Attributes:
        alphas: alpha_1..alpha_k, diagonal of B, shape (k,), float64 on the CPU.
        betas: beta_2..beta_{k+1}, below the diagonal, shape (k,); the last is 0 if the space is exhausted.
        norm: |r| = beta_1.
        left: U, shape (m, k + 1) or (m, k) if exhausted, orthonormal columns, float64.
        exhausted: the Krylov space is invariant: quadrature is exact, not an estimate.
        num_products: products with A^T plus products with A, halved (kernel products).
    """

    alphas: Tensor
    betas: Tensor
    norm: float
    left: Tensor
    exhausted: bool
    num_products: float

    @property
    def num_steps(self) -> int:
        """k, the number of steps taken."""
        return self.alphas.numel()

    def jacobi(self) -> Tensor:
        """T = B B^T in the basis U, shape (k, k) ((k+1, k+1) with a null row where only A^T u vanished)."""
        lower = self._lower()
        return lower @ lower.T

    def jacobi_dual(self) -> Tensor:
        """S = B^T B in the basis V, shape (k, k)."""
        lower = self._lower_long()
        return lower.T @ lower

    def _lower(self) -> Tensor:
        k = self.num_steps
        lower = torch.diag(self.alphas)
        if k > 1:
            lower = lower + torch.diag(self.betas[: k - 1], -1)
        return lower

    def _lower_long(self) -> Tensor:
        """B_{k+1,k}, shape (k + 1, k)."""
        k = self.num_steps
        lower = torch.zeros(k + 1, k, dtype=torch.float64)
        lower[:k] = self._lower()
        if k:
            lower[k, k - 1] = self.betas[-1]
        return lower


def golub_kahan(
    apply: Callable[[Tensor], Tensor],
    apply_adjoint: Callable[[Tensor], Tensor],
    start: Tensor,
    num_steps: int,
    *,
    breakdown: float | None = None,
) -> Bidiagonalization:
    """k steps of Golub-Kahan bidiagonalisation of A, full reorthogonalisation in function space.

    Args:
        apply: w -> A w, from parameter space to (m,).
        apply_adjoint: u -> A^T u.
        start: r, shape (m,), not zero for a useful result.
        num_steps: k, products with A^T and with A.
        breakdown: relative size, against the largest coefficient so far, under which a new direction is
            rounding noise and the space counts as exhausted; None takes 4 eps of the products' dtype.

    Returns:
        A `Bidiagonalization`; `left` on the start's device, coefficients on the CPU.

    Cost: k products with A^T and with A, 4 m k^2 multiplications in float64, memory (k + 1) m + O(P).

    Accuracy: left vectors orthonormal to 1e-14 (two Gram-Schmidt passes); right vectors need none.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    r = start.detach().to(torch.float64)
    norm = float(r.norm())
    m = r.numel()
    left = torch.zeros(m, min(num_steps, m) + 1, dtype=torch.float64, device=r.device)
    alphas: list[float] = []
    betas: list[float] = []
    products = 0.0
    if norm == 0.0 or not norm < float("inf"):
        return Bidiagonalization(_row(alphas), _row(betas), norm, left[:, :0], True, products)
    left[:, 0] = r / norm
    right: Tensor | None = None
    scale = 0.0
    for j in range(min(num_steps, m)):
        pulled = apply_adjoint(left[:, j])
        products += 0.5
        tiny = breakdown if breakdown is not None else 4 * torch.finfo(pulled.dtype).eps
        if right is not None:
            pulled = pulled - betas[-1] * right
        alpha = float(pulled.to(torch.float64).norm())
        if alpha <= tiny * scale or alpha == 0.0:  # u_j lies in the null space: a node at zero, and all is exact
            alphas.append(0.0)
            betas.append(0.0)
            return Bidiagonalization(_row(alphas), _row(betas), norm, left[:, : j + 1], True, products)
        right = pulled / alpha
        alphas.append(alpha)
        scale = max(scale, alpha)
        pushed = apply(right).to(torch.float64) - alpha * left[:, j]
        products += 0.5
        basis = left[:, : j + 1]
        for _ in range(2):
            pushed = pushed - basis @ (basis.T @ pushed)
        beta = float(pushed.norm())
        if beta <= tiny * scale or j + 1 == m:
            betas.append(0.0)
            return Bidiagonalization(_row(alphas), _row(betas), norm, left[:, : j + 1], True, products)
        betas.append(beta)
        scale = max(scale, beta)
        left[:, j + 1] = pushed / beta
    return Bidiagonalization(_row(alphas), _row(betas), norm, left, False, products)


def gauss_rule(jacobi: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes (ascending) and weights (summing to 1) of the Gauss rule of a Jacobi matrix (k, k)."""
    if jacobi.numel() == 0:
        empty = torch.zeros(0, dtype=torch.float64)
        return empty, empty
    nodes, vectors = torch.linalg.eigh(jacobi)
    return nodes.clamp_min(0.0), vectors[0] ** 2


def cumulative_bounds(
    jacobi: Tensor, coupling: float, points: Tensor, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """Rigorous bounds of the cumulative measure mu((-inf, x)) from a Jacobi matrix.

    At each point x the Gauss-Radau rule with a node at x has, by Chebyshev, Markov and Stieltjes,
    `sum of weights below x <= mu((-inf, x)) <= mu((-inf, x]) <= that + weight at x`; no measure with the
    same moments violates them and both ends are attained.

    Args:
        jacobi: (k, k), of a measure of mass 1.
        coupling: the next off-diagonal entry of the Jacobi matrix.
        points: x, shape (e,).
        exact: the measure is the Gauss rule itself: both bounds are its cumulative sum.

    Returns:
        lower, upper: shape (e,), non-decreasing in x, widened by `BOUND_GUARD`.

    Cost: e symmetric eigenproblems of size k + 1.
    """
    points = points.to(torch.float64)
    if exact or coupling == 0.0 or jacobi.numel() == 0:
        nodes, weights = gauss_rule(jacobi)
        below = (weights[None, :] * (nodes[None, :] < points[:, None])).sum(1)
        return below, below.clone()
    extended = _radau(jacobi, coupling, points)
    nodes, vectors = torch.linalg.eigh(extended)
    weights = vectors[:, 0, :] ** 2
    # The rule has a node at x up to rounding: the node nearest to x is that one.
    at = (nodes - points[:, None]).abs().argmin(1, keepdim=True)
    order = torch.arange(nodes.shape[1])[None, :]
    below = (weights * (order < at)).sum(1)
    upper = below + weights.gather(1, at)[:, 0]
    lower = torch.cummax(below - BOUND_GUARD, 0).values.clamp(0.0, 1.0)
    upper = torch.flip(torch.cummin(torch.flip(upper + BOUND_GUARD, [0]), 0).values, [0]).clamp(0.0, 1.0)
    return lower, upper


def _radau(jacobi: Tensor, coupling: float, points: Tensor) -> Tensor:
    """Jacobi matrices (e, k+1, k+1) whose rules have a node at each point."""
    k = jacobi.shape[0]
    eye = torch.eye(k, dtype=torch.float64)
    shifted = jacobi[None] - points[:, None, None] * eye
    scale = jacobi.diagonal().abs().max()
    # A point that is itself a Gauss node makes the system singular: move the matrix by rounding.
    rhs = torch.zeros(points.numel(), k, 1, dtype=torch.float64)
    rhs[:, -1] = coupling**2
    solution, info = torch.linalg.solve_ex(shifted, rhs)
    singular = (info != 0) | ~torch.isfinite(solution).all(dim=(1, 2))
    if bool(singular.any()):
        nudged = shifted[singular] + 1e-15 * scale * eye
        solution[singular] = torch.linalg.solve_ex(nudged, rhs[singular])[0]
    extended = torch.zeros(points.numel(), k + 1, k + 1, dtype=torch.float64)
    extended[:, :k, :k] = jacobi
    extended[:, k - 1, k] = extended[:, k, k - 1] = coupling
    extended[:, k, k] = (points + solution[:, -1, 0]).nan_to_num(nan=0.0, posinf=1e300, neginf=-1e300)
    return extended


def _row(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
