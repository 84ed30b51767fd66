"""A layer's gradients from its two factors: what came in, and what came back."""

from __future__ import annotations

import torch
from torch import Tensor


def products(right: Tensor, left: Tensor) -> Tensor:
    """sum_t right[i, c, g, t, q] left[i, g, t, p]: rows of a weight, (n, k, G, q, p)."""
    n, k, G, T, q = right.shape
    if right.stride(-1) == 1 and T > 1:  # positions outermost: merging outputs would transpose everything
        if G > 1:
            return torch.stack([torch.matmul(right[:, c].mT, left) for c in range(k)], dim=1)
        rows = right.new_empty(n, k, 1, q, left.shape[-1])
        for mine, theirs, target in zip(right[:, :, 0], left[:, 0], rows[:, :, 0]):
            torch.bmm(mine.mT, theirs.expand(k, *theirs.shape), out=target)
        return rows
    merged = right.permute(0, 2, 1, 4, 3).reshape(n, G, k * q, T)
    return torch.matmul(merged, left).view(n, G, k, q, -1).transpose(1, 2)
