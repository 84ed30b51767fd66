"""Spectra of the kernel: exact eigenpairs, and spectral measures from products with error bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from grsd_callbacks.arguments import checked, positive
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.krylov import Bidiagonalization, cumulative_bounds, gauss_rule, golub_kahan, lanczos
from grsd_callbacks.losses import wide_dtype

#: relative floor of resolvable eigenvalues, by dtype of the products (sums are in float64)
RELATIVE_FLOOR = {torch.float32: 1e-12, torch.float64: 1e-13}


def relative_floor(op: NTKOperator, *, exact: bool) -> float:
    """Relative floor of resolvable eigenvalues: of the rows' dtype, and of an exact kernel's sums."""
    return max(RELATIVE_FLOOR.get(op.dtype, 1e-12), op.gram_floor if exact else 0.0)


@dataclass(frozen=True, eq=False)
class Eigendecomposition:
    """Eigenpairs M u_i = lambda_i u_i, ascending.

    Attributes:
        eigenvalues: shape (m,), float64.
        eigenvectors: columns u_i, shape (m, m), float64, orthonormal.
        floor: eigenvalues below it are rounding noise, same unit.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    floor: float = 0.0

    def project(self, vector: Tensor) -> Tensor:
        """Coefficients g_i = <u_i, vector>, shape (m,)."""
        return self.eigenvectors.T @ vector.to(self.eigenvectors)


@checked
def eigendecomposition(op: NTKOperator | Tensor, nu: float = 1.0) -> Eigendecomposition:
    """All eigenpairs of M = nu J J^T from the exact kernel.

    Args:
        op: the operator J J^T, or its dense matrix, shape (m, m).
        nu: scale of the loss.

    Cost: the exact kernel, then 9 m^3 multiplications and 2 m^2 floats.

    Accuracy: absolute error of eigenvalues about 1e-15 lambda_max (float64 sums), relative to the rows' own.

    Example:
        >>> eigendecomposition(torch.diag(torch.tensor([4.0, 1.0]))).eigenvalues.tolist()
        [1.0, 4.0]
    """
    dense = op if isinstance(op, Tensor) else op.gram()
    if dense.dim() != 2 or dense.shape[0] != dense.shape[1]:
        raise ValueError(f"op must be an NTKOperator or a square matrix, got shape {tuple(dense.shape)}")
    matrix, scale = dense.to(wide_dtype(dense.device)), positive("nu", nu)
    matrix = matrix if scale == 1.0 else scale * matrix  # no copy of a kernel that is scaled already
    values, vectors = torch.linalg.eigh(matrix)
    floor = RELATIVE_FLOOR.get(op.dtype, 1e-12) if isinstance(op, Tensor) else relative_floor(op, exact=True)
    floor *= float(values[-1].clamp_min(0.0))
    return Eigendecomposition(values, vectors, floor)


@dataclass(frozen=True, eq=False)
class SpectralMeasure:
    """The measure sum_i g_i^2 delta(lambda - lambda_i) of a start vector r under M, from k kernel products.

    Attributes:
        bidiagonal: coefficients and left vectors for A = sqrt(nu) J.
        mass: |r|^2, exact.
        dissipation: r^T M r, exact.

    The total mass and dissipation are exact for every k; the cumulative measure is bounded rigorously.
    """

    bidiagonal: Bidiagonalization

    @property
    def mass(self) -> float:
        """|r|^2."""
        return self.bidiagonal.norm**2

    @property
    def dissipation(self) -> float:
        """r^T M r = alpha_1^2 |r|^2."""
        alphas = self.bidiagonal.alphas
        return float(alphas[0] ** 2) * self.mass if alphas.numel() else 0.0

    @cached_property
    def nodes(self) -> Tensor:
        """Gauss nodes (Ritz values), ascending, shape (k,)."""
        return self._rule[0]

    @cached_property
    def weights(self) -> Tensor:
        """Gauss weights, shape (k,), summing to |r|^2."""
        return self.mass * self._rule[1][:1].flatten() ** 2

    @cached_property
    def ritz_vectors(self) -> Tensor:
        """Ritz vectors in function space, shape (m, k), orthonormal, ascending with `nodes`."""
        rotation = self._rule[1].to(self.bidiagonal.left)
        return self.bidiagonal.left[:, : rotation.shape[0]] @ rotation

    @cached_property
    def _rule(self) -> tuple[Tensor, Tensor]:
        return gauss_rule(self.bidiagonal.factor())

    def bounds(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of the fraction of |r|^2 at eigenvalues below each point."""
        b = self.bidiagonal
        coupling = float(b.alphas[-1] * b.betas[-1]) if b.num_steps else 0.0
        return cumulative_bounds(b.factor(), coupling, points, exact=b.exhausted, rounding=b.rounding)

    def dissipation_bounds(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bound of the fraction of r^T M r at eigenvalues below each point."""
        b = self.bidiagonal
        if b.exhausted or b.num_steps < 2:
            nodes, weights = self.nodes, self.nodes * self.weights
            share = weights / weights.sum().clamp_min(1e-300)
            below = (share[None] * (nodes[None] < points.to(nodes)[:, None])).sum(1)
            return (below, below.clone()) if b.exhausted else (torch.zeros_like(below), torch.ones_like(below))
        coupling = float(b.alphas[-1] * b.betas[-2])
        return cumulative_bounds(b.factor_dual(), coupling, points, rounding=b.rounding)


@checked
def spectral_measure(op: NTKOperator | Tensor, start: Tensor, num_matvecs: int, nu: float = 1.0) -> SpectralMeasure:
    """Spectral measure of `start` under M = nu J J^T: Golub-Kahan on products, Lanczos on a dense kernel.

    Args:
        op: the operator J J^T, or its dense matrix, shape (m, m), float64.
        start: r, shape (m,).
        num_matvecs: kernel products to spend (one J^T u and one J v each).
        nu: scale of the loss.

    Returns:
        A `SpectralMeasure`: totals exact, cumulative measure bounded; exact once num_matvecs reaches m.

    Cost: `num_matvecs` kernel products (dense: as many products of a matrix with a vector), (k + 1) m floats.

    Accuracy: bounds are rigorous for the products as computed; resolves about 2 log10(k) decades below
        lambda_max before they grow wide. Dense: eigenvalues are rounding below 1e-14 lambda_max.
    """
    if not isinstance(num_matvecs, int) or num_matvecs < 1:
        raise ValueError(f"num_matvecs must be a positive integer, got {num_matvecs!r}")
    if start.dim() != 1 or start.numel() != op.shape[0]:
        raise ValueError(f"start must have shape ({op.shape[0]},), got {tuple(start.shape)}")
    root = math.sqrt(positive("nu", nu))
    if isinstance(op, Tensor):
        matrix = op.to(wide_dtype(op.device))
        return SpectralMeasure(lanczos(matrix if nu == 1.0 else nu * matrix, start, num_matvecs))
    return SpectralMeasure(
        op.run(lambda: golub_kahan(lambda w: root * op.jvp(w), lambda u: root * op.vjp(u), start, num_matvecs))
    )
