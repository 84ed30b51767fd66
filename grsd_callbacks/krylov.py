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
#: nodes closer than this (relative) are one
COINCIDENT = 4e-12
#: relative error of singular values that are known by their squares, in roots of the dtype's eps: 1e-7 in float64
LANCZOS_ROUNDING = 6.7
#: steps between looks at the coefficients on an accelerator, which make the host wait
LOOK_EVERY = 16
#: numbers in one block of the bounds' root finding (1 MB, so that it stays in the cache)
_BLOCK = 2**17


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
        rounding: relative error to which singular values are known: eps of the products' dtype, at least 5e-15.
    """

    alphas: Tensor
    betas: Tensor
    norm: float
    left: Tensor
    exhausted: bool
    num_products: float
    rounding: float = 5e-15

    @property
    def num_steps(self) -> int:
        """k, the number of steps taken."""
        return self.alphas.numel()

    def factor(self) -> Tensor:
        """B, shape (k, k), of the Jacobi matrix T = B B^T in the basis U (a last row of zeros if A^T u_k vanished)."""
        return torch.diag(self.alphas) + torch.diag(self.betas[:-1], -1)

    def factor_dual(self) -> Tensor:
        """B^T without its last row, shape (k - 1, k), of the Jacobi matrix S = B^T B in the basis V."""
        return self.factor().T[:-1]


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
            rounding noise and the space counts as exhausted; None takes 4 eps of the products' dtype (at least 2e-14).

    Returns:
        A `Bidiagonalization`; `left` on the start's device, coefficients on the CPU.

    Cost: k products with A^T and with A, 4 m k^2 multiplications in float64, memory (k + 1) m + O(P).

    Accuracy: left vectors orthonormal to 1e-14 (two Gram-Schmidt passes); right vectors need none.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    r = start.detach().to(torch.float64)
    norm = float(r.norm())
    if norm == 0.0 or not norm < float("inf"):
        return Bidiagonalization(_row([]), _row([]), norm, r.new_zeros(r.numel(), 0), True, 0.0)
    run = _Recurrence(apply, apply_adjoint, r / norm, min(num_steps, r.numel()), breakdown)
    look_every = 1 if r.device.type == "cpu" else LOOK_EVERY
    for j in range(run.num_steps):
        run.step(j)
        if (j + 1) % look_every == 0 and run.end() is not None:
            break
    return run.result(norm)


def lanczos(matrix: Tensor, start: Tensor, num_steps: int) -> Bidiagonalization:
    """k steps of the Lanczos recurrence on a dense M, as the bidiagonal B of its Jacobi matrix T = B B^T.

    Args:
        matrix: M, shape (m, m), symmetric and positive semi-definite to rounding, float64.
        start: r, shape (m,).
        num_steps: k, products of M with a vector.

    Returns:
        A `Bidiagonalization`, as `golub_kahan` gives for a factor A of M; no products are counted.

    Cost: k m^2 + 4 m k^2 multiplications, (k + 1) m floats.

    Accuracy: eigenvalues of T to rounding of the largest, so singular values (`rounding`) to its root, 1e-7; pivots of
        B below that are raised to it. `golub_kahan`, which never squares A, resolves more from a factor.
    """
    r = start.detach().to(matrix)
    norm = float(r.norm())
    if norm == 0.0 or not norm < float("inf"):
        return Bidiagonalization(_row([]), _row([]), norm, r.new_zeros(r.numel(), 0), True, 0.0)
    steps = min(num_steps, r.numel())
    left = r.new_zeros(r.numel(), steps + 1)
    left[:, 0] = r / norm
    entries: list[Tensor] = []  # a_1, b_1, a_2, b_2, ...
    for j in range(steps):
        image = matrix @ left[:, j]
        a = left[:, j] @ image
        basis = left[:, : j + 1]
        for _ in range(2):
            image = image - basis @ (basis.T @ image)
        b = image.norm()
        left[:, j + 1] = image / b.clamp_min(torch.finfo(b.dtype).tiny)
        entries += [a, b]
    rounding = LANCZOS_ROUNDING * torch.finfo(matrix.dtype).eps ** 0.5
    return _factored(torch.stack(entries).cpu().to(torch.float64), left, norm, rounding)


def _factored(entries: Tensor, left: Tensor, norm: float, rounding: float) -> Bidiagonalization:
    """Cholesky factor of the Jacobi matrix with diagonal a_j and off-diagonal b_j, up to where b_j is rounding."""
    diagonal, beside = entries[0::2], entries[1::2]
    least = rounding**2 * float(diagonal.abs().max())
    ended = (beside <= least).nonzero()
    num_steps = int(ended[0]) + 1 if len(ended) else len(diagonal)
    exhausted = bool(len(ended)) or num_steps == left.shape[0]
    alphas, betas = torch.zeros(num_steps, dtype=torch.float64), torch.zeros(num_steps, dtype=torch.float64)
    for j in range(num_steps):
        pivot = float(diagonal[j]) - (float(betas[j - 1]) ** 2 if j else 0.0)
        alphas[j] = max(pivot, least, 1e-300) ** 0.5
        betas[j] = 0.0 if exhausted and j == num_steps - 1 else float(beside[j] / alphas[j])
    kept = left[:, : num_steps + (not exhausted)]
    return Bidiagonalization(alphas, betas, norm, kept, exhausted, 0.0, rounding)


class _Recurrence:
    """The coefficients stay on the device, so that steps do not wait for it; `end` fetches them.

    Steps after a breakdown are rounding noise and are cut off by `result`.
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        apply_adjoint: Callable[[Tensor], Tensor],
        first: Tensor,
        num_steps: int,
        breakdown: float | None,
    ) -> None:
        self.apply, self.apply_adjoint, self.num_steps, self.breakdown = apply, apply_adjoint, num_steps, breakdown
        self.left = torch.zeros(first.numel(), num_steps + 1, dtype=torch.float64, device=first.device)
        self.left[:, 0] = first
        self.coefficients: list[Tensor] = []  # alpha_1, beta_2, alpha_2, beta_3, ...
        self.values: list[float] = []  # those that have been fetched
        self.right: Tensor | None = None
        self.eps = 5e-15
        self._looked, self._largest = 0, 0.0
        self._end: int | None = None

    def step(self, j: int) -> None:
        """One product with A^T and one with A."""
        pulled = self.apply_adjoint(self.left[:, j])
        self.eps = max(torch.finfo(pulled.dtype).eps, 5e-15)
        if self.right is not None:
            pulled = pulled - self.coefficients[-1].to(pulled.dtype) * self.right
        alpha = torch.linalg.vector_norm(pulled, dtype=torch.float64)
        self.right = pulled / alpha.to(pulled.dtype).clamp_min(torch.finfo(pulled.dtype).tiny)
        pushed = self.apply(self.right).to(torch.float64) - alpha * self.left[:, j]
        basis = self.left[:, : j + 1]
        for _ in range(2):
            pushed = pushed - basis @ (basis.T @ pushed)
        beta = pushed.norm()
        self.coefficients += [alpha, beta]
        self.left[:, j + 1] = pushed / beta.clamp_min(1e-300)

    def end(self) -> int | None:
        """Index of the first coefficient that is rounding noise against those before it, if there is one."""
        if new := self.coefficients[len(self.values) :]:
            self.values += torch.stack(new).tolist()
        tiny = self.breakdown if self.breakdown is not None else 4 * self.eps
        while self._looked < len(self.values) and self._end is None:
            value = self.values[self._looked]
            if value <= tiny * self._largest or value == 0.0:
                self._end = self._looked
            self._largest = max(self._largest, value)
            self._looked += 1
        return self._end

    def result(self, norm: float) -> Bidiagonalization:
        """What the steps taken have found, up to the end."""
        end = self.end()
        values = _row(self.values)
        spent = len(values) // 2
        if end is None and len(values) == 2 * self.left.shape[0]:  # all m directions are used up
            end = len(values) - 1
        num_steps = len(values) // 2 if end is None else end // 2 + 1
        alphas, betas = values[0::2][:num_steps].clone(), values[1::2][:num_steps].clone()
        if end is not None:
            betas[-1] = 0.0
            if end % 2 == 0:  # u_j lies in the null space: a node at zero, and all is exact
                alphas[-1] = 0.0
        kept = self.left[:, : num_steps + (end is None)]
        return Bidiagonalization(alphas, betas, norm, kept, end is not None, float(spent), self.eps)


def gauss_rule(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes (ascending, shape (k,)) and Ritz rotation (columns, shape (k, k)) of the Jacobi matrix L L^T.

    Weights are the squares of the rotation's first row. Taken from the singular values of L, shape (k, l): small nodes
    keep the relative accuracy that squaring would lose.
    """
    k = factor.shape[0]
    if factor.numel() == 0:
        return torch.zeros(k, dtype=torch.float64), torch.eye(k, dtype=torch.float64)
    vectors, singular, _ = torch.linalg.svd(factor)
    nodes = torch.zeros(k, dtype=torch.float64)
    nodes[: singular.numel()] = singular**2
    return nodes.flip(0), vectors.flip(1)


def cumulative_bounds(
    factor: Tensor, coupling: float, points: Tensor, *, exact: bool = False, rounding: float = 5e-15
) -> tuple[Tensor, Tensor]:
    """Rigorous bounds of the cumulative measure mu((-inf, x)) from a Jacobi matrix T = L L^T.

    At each point x the Gauss-Radau rule with a node at x has, by Chebyshev, Markov and Stieltjes,
    `sum of weights below x <= mu((-inf, x)) <= mu((-inf, x]) <= that + weight at x`; no measure with the
    same moments violates them and both ends are attained.

    Args:
        factor: L, shape (k, l), of a measure of mass 1.
        coupling: the next off-diagonal entry of the Jacobi matrix.
        points: x, ascending, shape (e,).
        exact: the measure is the Gauss rule itself: both bounds are its cumulative sum.
        rounding: relative error of the products, to which singular values (not eigenvalues) are known: a converged
            node that lies on x may be on either side of it.

    Returns:
        lower, upper: shape (e,), non-decreasing in x, widened by `BOUND_GUARD` or by ten
            times the rounding of the products.

    Cost: one singular value decomposition of size k, 250 e k^2 multiplications.
    """
    points = points.to("cpu", torch.float64)
    nodes, rotation = gauss_rule(factor)
    if exact or coupling == 0.0 or factor.numel() == 0:
        below = (rotation[:1].flatten() ** 2 * (nodes < points[:, None])).sum(1)
        return below, below.clone()
    blur = rounding * nodes[-1].sqrt()
    ends = torch.stack([(points.sqrt() - blur).clamp_min(0.0) ** 2, (points.sqrt() + blur) ** 2])
    blocks = ends.flatten().split(max(1, _BLOCK // nodes.numel() ** 2))
    rules = [_radau(nodes, rotation[0], coupling * rotation[-1], block) for block in blocks]
    below, at = (torch.cat(part).view(2, -1) for part in zip(*rules))
    guard = max(BOUND_GUARD, 10 * rounding)
    lower = torch.cummax(below[0] - guard, 0).values.clamp(0.0, 1.0)
    upper = torch.flip(torch.cummin(torch.flip(below[1] + at[1] + guard, [0]), 0).values, [0]).clamp(0.0, 1.0)
    return lower, upper


def _radau(nodes: Tensor, first: Tensor, z: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Weight below x, and at x, of the (k + 1)-node rules that have a node at each point x.

    In the Ritz basis the rule's matrix is an arrow: diagonal theta, last row z, a corner that makes x an eigenvalue.
    Its other nodes mu are the roots of `h(mu) = 1 + sum_j z_j^2 / ((theta_j - x) (theta_j - mu))`; those below x lie
    one before each theta_i < x. Each is bisected in the logarithm of its distance to the nearer theta: near a Gauss
    node the corner is huge, and an eigenvalue solver would lose every small node.
    """
    nodes, first, z, alone = _merged(nodes, first, z)
    least = 1e-40 * z.abs().max()
    z = torch.where(z.abs() < least, least, z)  # converged: its node stays at theta, but must not fall out of the sum
    tiny = 1e-16 * points.abs().clamp_min(1e-30 * float(nodes[-1]))[:, None]
    gap = nodes - points[:, None]
    gap = torch.where(gap.abs() < tiny, tiny, gap)
    pull = (z**2 / gap)[:, None, :]  # (e, 1, j)
    left, right = torch.cat([nodes[:1], nodes[:-1]]), nodes
    middle = _apart(nodes - ((left + right) / 2)[:, None])
    rises = 1 + (pull / middle).sum(2) < 0  # (e, i): h falls between two theta, so the root lies left of the middle
    rises[:, 0] = False
    index = torch.arange(nodes.numel())
    from_origin = nodes - nodes[index - rises.long()][:, :, None]  # (e, i, j)
    side = torch.where(rises, 1.0, -1.0).to(nodes.dtype)
    reach = ((right - left) / 2).clamp_min(1e-100 * nodes[-1])
    low, high = (reach * 1e-100).log(), reach.log()
    low[0], high[0] = (1e-100 * nodes[-1]).log(), (1e100 * nodes[-1]).log()
    for _ in range(44):
        trial = (low + high) / 2
        h = 1 + (from_origin - (side * trial.exp())[:, :, None]).reciprocal_().mul_(pull).sum(2)
        beyond = side * h > 0
        low, high = torch.where(beyond, trial, low), torch.where(beyond, high, trial)
    weights = _weight(first, z, _apart(from_origin - (side * high.exp())[:, :, None]))
    below = (weights * (gap < 0)).sum(1) + (alone * (gap < 0)).sum(1)
    return below, _weight(first, z, gap) + (alone * (gap.abs() <= COINCIDENT * nodes)).sum(1)


def _merged(nodes: Tensor, first: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Coincident nodes as one: only one direction in the plane of their Ritz vectors couples on.

    Rounding brings copies of a converged degenerate eigenvalue into the recurrence. Between two equal nodes the arrow
    has an eigenvector without coupling, whose weight no root would carry.

    Returns:
        nodes, first components and couplings, one per distinct node, and the weight that stands alone at each.
    """
    groups: list[list[int]] = []
    for i, node in enumerate(nodes.tolist()):
        if groups and node - float(nodes[groups[-1][0]]) <= COINCIDENT * node:
            groups[-1].append(i)
        else:
            groups.append([i])
    if len(groups) == nodes.numel():
        return nodes, first, z, torch.zeros_like(nodes)
    label = torch.tensor([g for g, group in enumerate(groups) for _ in group])

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(len(groups), dtype=nodes.dtype).index_add_(0, label, values)

    coupled, weight, inner = summed(z**2).sqrt(), summed(first**2), summed(z * first)
    along = torch.where(coupled > 0, inner / coupled.clamp_min(1e-300), weight.sqrt())
    return nodes[[group[0] for group in groups]], along, coupled, (weight - along**2).clamp_min(0.0)


def _apart(distance: Tensor) -> Tensor:
    return torch.where(distance.abs() < 1e-250, torch.full_like(distance, 1e-250), distance)


def _weight(first: Tensor, z: Tensor, distance: Tensor) -> Tensor:
    """Squared first component of the arrow's normalised eigenvectors (z_j / distance_j, -1); last axis is j."""
    y = z / distance
    scale = y.abs().amax(-1, keepdim=True).clamp_min(1.0)
    y = y / scale
    return (y @ first) ** 2 / (scale[..., 0] ** -2.0 + (y**2).sum(-1))


def _row(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
