"""A history as arrays over (shell, measurement), and where its measurements stand on a time axis.

Legend: x position of a measurement on the axis (step or flow time), u its position as drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from grsd_callbacks.snapshot import Snapshot

TIME = {"step": "optimizer step", "flow_time": r"flow time $t$  (learning rate $\times$ steps)"}
#: share of a measurement's total below which a shell is drawn as empty
NEGLIGIBLE = 1e-6


@dataclass(frozen=True, eq=False)
class Run:
    """A run as the figures need it.

    Attributes:
        history: the measurements, n of them.
        time: "step" or "flow_time".
        edges: of the shells, shape (B + 1,).
        x: positions of the measurements, shape (n,).
        first: smallest positive x, or 1.
        is_log: whether x belongs on a log axis (linear from 0 to `first`).
        shown: the shells worth showing, which hold energy or dissipation at some time, shape (B + 2,).
    """

    history: list[Snapshot]
    time: str
    edges: np.ndarray
    x: np.ndarray
    first: float
    is_log: bool
    shown: np.ndarray

    def stack(self, name: str) -> np.ndarray:
        """A tensor field of all measurements, time last."""
        return _stack(self.history, name)

    def summary(self, name: str) -> np.ndarray:
        """A scalar of all measurements, NaN where it was not measured."""
        return np.array([s.summary.get(name, np.nan) for s in self.history])

    def cells(self) -> np.ndarray:
        """Limits of cells around the measurements, (n + 1,): halfway between neighbours as drawn on the axis."""
        u = self.x
        if self.is_log:
            u = np.where(u > self.first, 1 + np.log10(np.maximum(u, self.first) / self.first), u / self.first)
        inner = (u[1:] + u[:-1]) / 2
        limits = np.concatenate([[2 * u[0] - inner[0]], inner, [2 * u[-1] - inner[-1]]]) if len(u) > 1 else u[[0, 0]]
        if limits[0] == limits[-1]:  # one measurement, or no time between them
            limits = np.linspace(u[0] - 0.5, u[0] + 0.5, len(u) + 1)
        if self.is_log:
            limits = np.where(limits > 1, self.first * 10 ** (np.maximum(limits, 1) - 1), self.first * limits)
        return limits


def run_of(history: Sequence[Snapshot], time: str = "step") -> Run:
    """Check a history and turn it into arrays.

    Raises:
        ValueError: history empty or out of order, measurements on different shells, another time axis.
    """
    past = list(history)
    if not past:
        raise ValueError("history must hold at least one measurement, got none")
    if time not in TIME:
        raise ValueError(f"time must be one of {tuple(TIME)}, got {time!r}")
    edges = past[0].edges.numpy()
    if not all(np.array_equal(s.edges.numpy(), edges) for s in past):
        raise ValueError("all measurements must be on the same shells, but their edges differ: two runs in a history?")
    x = np.array([float(getattr(s, time)) for s in past])
    if (np.diff(x) < 0).any():
        raise ValueError(f"measurements must be in order, but {time} falls within the history")
    positive = x[x > 0]
    contents = [_stack(past, name) for name in ("energy", "dissipation")]
    shown = np.logical_or(*(values > NEGLIGIBLE * values.sum(0) for values in contents)).any(1)
    first = float(positive[0]) if positive.size else 1.0
    return Run(past, time, edges, x, first, is_log_spaced(positive), shown)


def is_log_spaced(positive: np.ndarray) -> bool:
    """Whether gaps grow along the run, over more than a decade (pairs on an even grid do not count)."""
    if len(positive) < 4 or positive[-1] < 10 * positive[0]:
        return False
    half = len(positive) // 2
    return bool(np.diff(positive[half:]).mean() > 3 * np.diff(positive[: half + 1]).mean())


def _stack(history: Sequence[Snapshot], name: str) -> np.ndarray:
    return np.stack([getattr(s, name).numpy().astype(float) for s in history], axis=-1)
