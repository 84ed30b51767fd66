"""The top of the spectrum by a randomized range finder with Rayleigh-Ritz, with a-posteriori error bounds.

For the upper shells of kernels too large for the exact path: block products of random vectors (or of the previous
measurement's Ritz vectors) find a subspace Q; `Q^T M Q = (A^T Q)^T (A^T Q)` gives Ritz pairs (theta_i, x_i), and the
residual norms |M x_i - theta_i x_i| bound how far each Ritz value is from an eigenvalue. What Q does not hold of the
residual is not resolved, and is put in the underflow shell.

Source: Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.3; Parlett, "The Symmetric Eigenvalue Problem", 4.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import wide_dtype


@dataclass(frozen=True, eq=False)
class RitzPairs:
    """Approximate eigenpairs of the top of M, ascending.

    Attributes:
        values: Ritz values theta_i <= the i-th largest eigenvalue (to rounding), shape (k,), float64.
        vectors: Ritz vectors, shape (m, k), orthonormal, float64.
        errors: |M x_i - theta_i x_i|, shape (k,): some eigenvalue lies within it of theta_i.
        num_products: kernel products spent.
    """

    values: Tensor
    vectors: Tensor
    errors: Tensor
    num_products: float

    def converged(self, tolerance: float = 0.1) -> Tensor:
        """Whether each Ritz value is within a relative tolerance of an eigenvalue, shape (k,), bool."""
        return self.errors <= tolerance * self.values.clamp_min(1e-300)


def randomized_eigenpairs(
    op: NTKOperator,
    rank: int,
    *,
    num_iterations: int = 1,
    nu: float = 1.0,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RitzPairs:
    """Top eigenpairs of M = nu J J^T by a randomized range finder.

    Args:
        op: the operator J J^T.
        rank: k, size of the subspace, at most m.
        num_iterations: products of the whole block before Rayleigh-Ritz.
        nu: scale of the loss.
        start: warm start, for example the previous measurement's Ritz vectors, shape (m, j); filled up with or cut
            down to `rank` columns.
        generator: private generator of the random columns, on the CPU; None is a fresh one with seed 0.

    Returns:
        `RitzPairs` with residual norms.

    Raises:
        ValueError: rank outside [1, m], num_iterations < 1, a start of the wrong shape.

    Cost: (num_iterations + 1) k kernel products, m k floats, O(m k^2) multiplications.

    Accuracy: Ritz values from below; errors rigorous for the products as computed. Exact for rank = m.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> op = NTKOperator(net, torch.diag(torch.tensor([3.0, 1.0])))
        >>> [round(x, 5) for x in randomized_eigenpairs(op, 2).values.tolist()]
        [1.0, 9.0]
    """
    m = op.shape[0]
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= m:
        raise ValueError(f"rank must be an integer in [1, {m}], got {rank!r}")
    if num_iterations < 1:
        raise ValueError(f"num_iterations must be at least 1, got {num_iterations!r}")
    if start is not None and (start.dim() != 2 or start.shape[0] != m):
        raise ValueError(f"start must have shape ({m}, j), got {tuple(start.shape)}")
    return op.run(lambda: _ritz(op, _block(op, rank, start, generator), num_iterations, nu))


def _block(op: NTKOperator, rank: int, start: Tensor | None, generator: torch.Generator | None) -> Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    wide = wide_dtype(op.device)
    random = torch.randn(op.shape[0], rank, generator=generator, dtype=torch.float64).to(op.device, wide)
    if start is None:
        return random
    warm = start[:, -rank:].to(random)  # ascending: the top ones
    return torch.cat([warm, random[:, : rank - warm.shape[1]]], dim=1)


def _ritz(op: NTKOperator, block: Tensor, num_iterations: int, nu: float) -> RitzPairs:
    before = op.num_products
    for _ in range(num_iterations):
        block = (nu * (op @ torch.linalg.qr(block)[0])).to(block)
    Q = torch.linalg.qr(block)[0]
    image = (nu * (op @ Q)).to(Q)
    projected = Q.T @ image
    values, rotation = torch.linalg.eigh((projected + projected.T) / 2)
    errors = (image @ rotation - Q @ rotation * values).norm(dim=0)
    return RitzPairs(values.clamp_min(0.0), Q @ rotation, errors, op.num_products - before)
