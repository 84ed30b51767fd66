"""All times on one curve: scaled shell energies, instantaneous and frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from grsd_callbacks.collapse import run_collapse
from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.figures import drawing
from grsd_callbacks.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (9.6, 4.4)


def draw(history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit]) -> Figure:
    """Two panels side by side, points coloured by flow time, with score, interval and null."""
    figure = drawing.new_figure(SIZE)
    for part, frozen in zip(np.asarray(figure.subfigures(1, 2)).flat, (False, True), strict=True):
        _panel(part.subplots(), history, fits, frozen)
    return figure


def _panel(axes: Axes, history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit], frozen: bool) -> None:
    from matplotlib.colors import LogNorm

    found = run_collapse(history, fits, frozen=frozen)
    title = "Collapse, shells of the first kernel" if frozen else "Collapse, shells of the kernel of each time"
    scaled = r"$\lambda_0 \, t^{\rho}$" if frozen else r"$\lambda \, t$"
    drawing.label(axes, title, scaled, r"$E_a(t) \, t^{\chi}$")
    if found.reason:
        axes.set(xticks=[], yticks=[])
        drawing.note(axes, f"no collapse: {found.reason}")
        return
    axes.set(xscale="log", yscale="log")
    points = axes.scatter(found.x, found.y, c=found.time, norm=LogNorm(), cmap="viridis", s=14)
    drawing.colour_bar(axes, points, "flow time $t$")
    s = found.score
    text = f"score {s.value:.3f}\n95 %: {s.lower:.3f} to {s.upper:.3f}\ntimes permuted: {found.null:.2f}"
    axes.text(0.03, 0.03, text, transform=axes.transAxes, fontsize=drawing.SMALL, va="bottom", color=drawing.BLACK)
