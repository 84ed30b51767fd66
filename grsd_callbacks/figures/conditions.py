"""What held: the verdict table with the numbers behind it, over depth, shells and flow time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from grsd_callbacks.figures import drawing
from grsd_callbacks.renormalizability import COLUMNS, Conditions, RunVerdict, table_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"holds": "#cfe8dc", "fails": "#f6d5c3", "undecided": "0.92"}


def table(axes: Axes, verdict: RunVerdict) -> None:
    """Condition, value, interval, limit, null, p and verdict, the last coloured and in words."""
    axes.axis("off")
    rows = table_rows(verdict.verdicts)
    shown = axes.table([list(row) for row in rows], colLabels=list(COLUMNS), loc="center", cellLoc="left")
    shown.auto_set_font_size(False)
    shown.set_fontsize(drawing.SMALL)
    shown.auto_set_column_width(list(range(len(COLUMNS))))
    shown.scale(1.0, 1.35)
    for k, row in enumerate(rows, 1):
        shown[k, len(COLUMNS) - 1].set_facecolor(COLOURS[row[-1]])
    title = f"Conditions of renormalizable shell dynamics; regime: {verdict.regime.label} (our operational definitions)"
    axes.set_title(title, fontsize=drawing.LARGE, loc="left")


def gradients(axes: Axes, history: Sequence[Conditions]) -> None:
    """|dL/dh_l| over depth, first and last measurement."""
    drawing.label(axes, "Gradients over depth", "block (input)", r"$|\partial L / \partial h_l|$")
    for found, style in _ends(history):
        norms = found.propagation.gradient_norms.numpy()
        axes.semilogy(np.arange(len(norms)), np.where(norms > 0, norms, np.nan), **style)
    _whole_ticks(axes)
    drawing.legend(axes)


def coherence(axes: Axes, first: Conditions) -> None:
    """Mean of C_lm at each distance, first measurement, with its fitted decay length in the title."""
    found = first.incoherence
    title = f"Block coherence, step {first.step}"
    drawing.label(axes, title, "distance in depth $|l - m|$", r"mean $C_{lm}$")
    profile = found.band_profile.numpy()
    axes.plot(np.arange(len(profile)), profile, color=drawing.BLUE, marker="o", markersize=3.5)
    axes.set_ylim(0, 1.05)
    _whole_ticks(axes)


def couplings(axes: Axes, last: Conditions) -> None:
    """log R_ab against the mean log lambda of the two shells, one line a distance: parallel lines are invariance."""
    found = last.couplings
    drawing.label(axes, f"Couplings of shells, step {last.step}", r"$\sqrt{\lambda_a \lambda_b}$", r"$R_{ab}$")
    logs = np.log(last.edges.numpy())
    width = found.width
    centers = np.concatenate([[logs[0] - width / 2], (logs[1:] + logs[:-1]) / 2, [logs[-1] + width / 2]])
    R, kept = found.couplings.numpy(), list(found.shells)
    from matplotlib import colormaps

    for d in range(max((max(kept) - min(kept) + 1) if kept else 0, 0)):
        pairs = [(a, a + d) for a in kept if a + d in kept and np.isfinite(R[a, a + d]) and R[a, a + d] > 0]
        if pairs:
            x = [np.exp((centers[a] + centers[b]) / 2) for a, b in pairs]
            colour = colormaps["viridis"](d / max(len(kept), 1))
            text = f"$|a-b| = {d}$" if d < 3 else None
            axes.loglog(x, [R[a, b] for a, b in pairs], color=colour, marker="o", markersize=3, label=text)
    if not kept:
        drawing.note(axes, found.reason or "no shell holds enough modes")
    drawing.legend(axes)


def speeds(axes: Axes, history: Sequence[Conditions]) -> None:
    """Kernel speed and defect over the steps of the run."""
    drawing.label(axes, "Over the run", "optimizer step", "pure numbers")
    steps = [c.step for c in history]
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("log")
    for values, colour, marker, text in (
        ([c.evolution.kernel_speed for c in history], drawing.ORANGE, "s", r"$|M'|_F / |M|_F^2$"),
        ([c.couplings.defect for c in history], drawing.BLUE, "o", "defect"),
    ):
        y = np.array(values, dtype=float)
        axes.plot(steps, np.where(y > 0, y, np.nan), color=colour, marker=marker, markersize=3.5, label=text)
    drawing.legend(axes)


def _ends(history: Sequence[Conditions]) -> list[tuple[Conditions, dict[str, Any]]]:
    styles = [{"color": "0.6", "marker": "o"}, {"color": drawing.BLUE, "marker": "s"}]
    pairs = list(zip([history[0], history[-1]], styles, strict=True))[-len(history) :]
    return [(c, {**style, "markersize": 3.5, "label": f"step {c.step}"}) for c, style in pairs]


def _whole_ticks(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
