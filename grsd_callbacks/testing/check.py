"""Refuse wrong arguments by name, and draw what the systems draw from private generators."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def positive(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise ValueError unless it is finite and above zero."""
    return _number(name, value, "positive", value > 0)


def non_negative(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise ValueError unless it is finite and not below zero."""
    return _number(name, value, "non-negative", value >= 0)


def _number(name: str, value: float, kind: str, fits: bool) -> float:
    if not (math.isfinite(value) and fits):
        raise ValueError(f"{name} must be a finite {kind} number, got {value!r}")
    return float(value)


def at_least(name: str, value: int, least: int) -> int:
    """Return ``value``, or raise ValueError unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value


def default_nu(nu: float | None, num_rows: int) -> float:
    """The loss weight nu of ``L = (nu/2) |f - y|^2``: given, or the ``2/m`` of ``nn.MSELoss()``."""
    return 2.0 / num_rows if nu is None else positive("nu", nu)


def edge_tensor(edges: Tensor | Sequence[float]) -> Tensor:
    """Inner shell edges as a float64 vector, or raise ValueError unless positive, finite and increasing."""
    edges_B = torch.as_tensor(edges, dtype=torch.float64)
    good = edges_B.ndim == 1 and len(edges_B) > 0 and bool((edges_B.isfinite() & (edges_B > 0)).all())
    if not good or bool((edges_B.diff() <= 0).any()):
        raise ValueError(f"edges must be a non-empty increasing vector of positive eigenvalues, got {edges!r}")
    return edges_B


def generator(seed: int) -> torch.Generator:
    """A private CPU generator, so that nothing draws from the global one."""
    return torch.Generator().manual_seed(seed)


def orthonormal(num_rows: int, num_columns: int, rng: torch.Generator) -> Tensor:
    """A Haar-distributed matrix with orthonormal columns, shape (num_rows, num_columns)."""
    q, r = torch.linalg.qr(torch.randn(num_rows, num_columns, generator=rng, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)  # unique factor: Haar, and the same everywhere
