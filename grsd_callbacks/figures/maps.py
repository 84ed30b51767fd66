"""Heat maps over log lambda and time: energy, dissipation, flux, effective learning rate; and the transfer matrix.

Legend: E energy, D dissipation, J flux, W work of the actual step, T transfer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from grsd_callbacks.exponents import frontier
from grsd_callbacks.figures import drawing
from grsd_callbacks.figures.history import NEGLIGIBLE, Run
from grsd_callbacks.shells import RESOLVED_FRACTION

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def energy(axes: Axes, run: Run) -> None:
    """E_a with unresolved shells, frontier and lambda_max."""
    E, bounds_2an = run.stack("energy"), run.stack("energy_bounds")
    _positive(axes, run, E, "Shell energy: where the error sits", r"energy $E_a$ of the shell  (loss)")
    unknown = (run.stack("resolved") == 0) & ~(bounds_2an[1] <= NEGLIGIBLE * E.sum(0))
    drawing.hatch(axes, run.cells(), drawing.shell_limits(run.edges), unknown, "////", "not resolved")
    _lines(axes, run)
    drawing.legend(axes, loc="upper right", ncols=3)


def dissipation(axes: Axes, run: Run) -> None:
    """D_a with unresolved shells."""
    D = run.stack("dissipation")
    _positive(axes, run, D, "Dissipation: where the loss is removed", r"dissipation $D_a$  (loss / flow time)")
    unknown = _unknown_dissipation(run, D)
    drawing.hatch(axes, run.cells(), drawing.shell_limits(run.edges), unknown, "////", "not resolved")
    drawing.legend(axes, loc="upper right")


def _unknown_dissipation(run: Run, D: np.ndarray) -> np.ndarray:
    """By the dissipation's own bounds where it has any, and below the floor of an exact kernel: (B + 2, n) bool."""
    bounds_2an, methods = run.stack("dissipation_bounds"), np.array([s.method for s in run.history])
    wide = ~(bounds_2an[1] - bounds_2an[0] <= 2 * RESOLVED_FRACTION * D) & ~(bounds_2an[1] <= NEGLIGIBLE * D.sum(0))
    rounded = np.stack([~s.grid.above(s.summary.get("floor", 0.0)).numpy() for s in run.history], axis=-1)
    has_bounds, has_kernel = np.isin(methods, ("lanczos", "krylov")), methods == "lanczos"
    return np.where(has_bounds, wide | (rounded & has_kernel), run.stack("resolved") == 0)


def flux(axes: Axes, run: Run) -> None:
    """J_b over the intervals between measurements; a row reaches from shell centre to shell centre."""
    J = run.stack("flux")[:, 1:]
    drawing.map_axes(axes, run, r"Energy flux: upward (to larger $\lambda$) positive")
    if not np.isfinite(J).any():
        drawing.note(axes, f"no flux is known: {run.history[-1].reasons.get('flux') or 'it needs two measurements'}")
        return
    norm, ticks = drawing.around_zero(J)
    centres = run.history[0].grid.centers.numpy()
    mesh = drawing.heat_map(axes, run.x, centres, np.ma.masked_invalid(J), norm, "RdBu_r")
    if run.x[0] < run.x[-1]:
        axes.set_xlim(run.x[0], run.x[-1])
    text = r"flux $J_b$ through the edge  (loss / flow time)"
    drawing.colour_bar(axes, mesh, text, ticks=ticks, format="%g", extend="both")
    if not np.isfinite(J).all():
        drawing.missing(axes, "no number (break in the run)")
    drawing.legend(axes, loc="upper right")


def effective_lr(axes: Axes, run: Run) -> None:
    """W_a / (lr D_a) of the step after each measurement."""
    rate = run.stack("effective_lr")
    drawing.map_axes(axes, run, "Effective learning rate of each scale")
    if not np.isfinite(rate).any():
        drawing.note(axes, "not known: it needs the optimizer step that follows a measurement")
        return
    norm, ticks = drawing.around_one(rate)
    cells, heights = run.cells(), drawing.shell_limits(run.edges)
    mesh = drawing.heat_map(axes, cells, heights, np.ma.masked_where(~(rate > 0), rate), norm, "PuOr_r")
    text = r"$W_a\,/\,(\mathrm{lr}\ D_a)$   (1: full-batch descent)"
    drawing.colour_bar(axes, mesh, text, ticks=ticks, format="%g", extend="both")
    drawing.hatch(axes, cells, heights, rate <= 0, "xxx", "negative: loss raised")
    if np.isnan(rate).any():
        drawing.missing(axes, "no number")
    drawing.legend(axes, loc="upper right", ncols=2)


def transfer(axes: Axes, T: np.ndarray, edges: np.ndarray) -> None:
    """T_ab, rows and columns by their shells' lambda."""
    from matplotlib.ticker import NullLocator

    limits, (norm, ticks) = drawing.shell_limits(edges), drawing.around_zero(T)
    drawing.label(
        axes,
        "Transfer between shells: red where the receiver gains",
        r"$\lambda$ of the giver, shell $b$  (1 / flow time)",
        r"$\lambda$ of the receiver, shell $a$  (1 / flow time)",
    )
    mesh = drawing.heat_map(axes, limits, limits, np.ma.masked_invalid(T), norm, "RdBu_r")
    size = np.nan_to_num(np.abs(T)).max(1)
    rows = np.flatnonzero(size > NEGLIGIBLE * size.max()) if size.max() > 0 else np.arange(len(size))
    axes.set(xscale="log", yscale="log")
    axes.set(xlim=(limits[rows[0]], limits[rows[-1] + 1]), ylim=(limits[rows[0]], limits[rows[-1] + 1]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set_aspect("equal")
    axes.plot(limits, limits, color=drawing.BLACK, linewidth=0.8, linestyle=":")
    drawing.colour_bar(axes, mesh, r"transfer $T_{ab}$  (loss / flow time)", ticks=ticks, format="%g", extend="both")


def _positive(axes: Axes, run: Run, values: np.ndarray, title: str, unit: str) -> None:
    """Heat map of a quantity that is not negative: log colours, next to nothing is left white."""
    from matplotlib.colors import LogNorm

    drawing.map_axes(axes, run, title)
    drawn = np.ma.masked_where(~(values > NEGLIGIBLE * values.sum(0)), values)
    if drawn.mask.all():
        drawing.note(axes, "nothing to show: every shell is empty")
        return
    top, low = float(drawn.max()), float(np.quantile(drawn.compressed(), 0.03))
    low = min(low, top / 10)
    mesh = drawing.heat_map(axes, run.cells(), drawing.shell_limits(run.edges), drawn, LogNorm(low, top), "viridis")
    drawing.colour_bar(axes, mesh, unit, extend="min" if float(drawn.min()) < low else "neither")


def _lines(axes: Axes, run: Run) -> None:
    """lambda_max, and the frontier in the frozen basis of the first measurement."""
    from matplotlib.patheffects import withStroke

    largest, median = run.summary("lambda_max"), frontier(run.edges, run.stack("frozen_energy").T)
    if np.isfinite(largest).any():
        style: dict[str, Any] = {"color": drawing.BLACK, "linewidth": 1.3, "linestyle": "--", "markersize": 14}
        style["marker"] = "_" if len(run.x) == 1 else ""
        outline = [withStroke(linewidth=3.5, foreground="white")]
        axes.plot(run.x, largest, **style, path_effects=outline, label=r"$\lambda_{\max}$")
    if np.isfinite(median).any():
        style = {"color": "white", "linewidth": 2, "marker": "o", "markersize": 2.5 if len(run.x) <= 60 else 0}
        outline = [withStroke(linewidth=4, foreground=drawing.BLACK)]
        axes.plot(run.x, median, **style, path_effects=outline, label="frontier")
