"""Which shell does an eigenvalue belong to: sharp shells, or smooth windows that still sum to one.

Legend: lambda eigenvalues (m,); e_b inner edges (B,), s_b = log e_b; w width in log lambda; Theta_b steps (B, m).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import check

_TINY = torch.finfo(torch.float64).tiny


def shell_windows(eigenvalues: Tensor, edges: Tensor | Sequence[float], width: float | None = None) -> Tensor:
    """Weight of every eigenvalue in every shell; each column sums to one.

    ``W_a = Theta_a - Theta_{a+1}``, with Theta the sharp step at the lower edge of shell a (closed: an eigenvalue on an
    edge belongs above it), or ``sigmoid((log lambda - s_a) / width)``.

    Args:
        eigenvalues: (m,), unit 1/flow time. Values at or below zero count as null space.
        edges: (B,) inner edges, increasing.
        width: of the smooth step in log lambda; None for sharp shells.

    Returns:
        (B + 1, m): underflow shell first, overflow shell last.

    Raises:
        ValueError: if ``edges`` or ``width`` cannot be used.

    Example:
        >>> shell_windows(torch.tensor([0.5, 1.0, 9.0]), [1.0, 4.0]).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    steps_Bm = steps(eigenvalues, edges, width)
    ones_1m = torch.ones_like(steps_Bm[:1])
    return torch.cat([ones_1m, steps_Bm]) - torch.cat([steps_Bm, 0 * ones_1m])


def shell_counts(eigenvalues: Tensor, edges: Tensor | Sequence[float]) -> Tensor:
    """Number of eigenvalues in every sharp shell, (B + 1,); the sum is m."""
    return shell_windows(eigenvalues, edges).sum(1).round().long()


def steps(eigenvalues: Tensor, edges: Tensor | Sequence[float], width: float | None) -> Tensor:
    """Theta_b(lambda_i), (B, m): one above the edge and zero below it, sharp or smooth."""
    edges_B1 = check.edge_tensor(edges)[:, None]
    lam = eigenvalues.to(torch.float64)
    if width is None:
        return (lam >= edges_B1).to(torch.float64)
    return torch.sigmoid((lam.clamp_min(_TINY).log() - edges_B1.log()) / check.positive("width", width))


def step_slopes(eigenvalues: Tensor, edges: Tensor | Sequence[float], width: float) -> Tensor:
    """d Theta_b / d lambda of the smooth step, (B, m); zero on the null space."""
    theta = steps(eigenvalues, edges, width)
    return theta * (1 - theta) / (width * eigenvalues.to(torch.float64).clamp_min(_TINY))
