"""What all figures share: canvas, sizes, colours, hatching, and the axes of a map over time and log lambda."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from grsd_callbacks.figures.history import TIME, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (4.8, 3.6)  # inches; TensorBoard's cards are about 350 pixels wide: the letters have to bear halving
PIXELS = (640, 480)
DPI = 100  # of pages with several panels
SMALL, MEDIUM, LARGE = 9, 10, 11  # points
BLUE, ORANGE, BLACK, GREY = "#0072b2", "#d55e00", "#000000", "0.82"  # safe for colour-blind readers
LAMBDA = r"kernel eigenvalue $\lambda$  (1 / flow time)"
HEADROOM = 0.18  # of a map's height, for the legend


def new_figure(size: tuple[float, float] = SIZE, dpi: float = PIXELS[0] / SIZE[0]) -> Figure:
    """An empty figure of `size` inches with an Agg canvas, unknown to pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'grsd-callbacks[plot]'") from error
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title, labels with units, readable ticks, and a white ground also in dark styles (our lines are dark)."""
    axes.set_title(title, fontsize=LARGE, loc="left")
    axes.set_xlabel(xlabel, fontsize=MEDIUM)
    axes.set_ylabel(ylabel, fontsize=MEDIUM)
    axes.tick_params(labelsize=SMALL, which="both")
    axes.set_facecolor("white")


def note(axes: Axes, text: str) -> None:
    """Say in the middle of empty axes why they are empty."""
    box = {"facecolor": "white", "edgecolor": GREY, "boxstyle": "round"}
    place: dict[str, Any] = {"ha": "center", "va": "center", "transform": axes.transAxes}
    axes.text(0.5, 0.5, textwrap.fill(text, 44), fontsize=MEDIUM, color=BLACK, bbox=box, **place)


def legend(axes: Axes, **options: Any) -> None:
    """A legend, if anything has a label."""
    if axes.get_legend_handles_labels()[0]:
        sizes: dict[str, Any] = {"fontsize": SMALL, "handlelength": 1.6, "columnspacing": 1.0}
        axes.legend(facecolor="white", labelcolor=BLACK, framealpha=0.9, **sizes, **options)


def map_axes(axes: Axes, run: Run, title: str) -> None:
    """Time to the right, log lambda upwards; only shells that hold something, and room for the legend above them."""
    from matplotlib.ticker import NullLocator

    label(axes, title, TIME[run.time], LAMBDA)
    _time_ticks(axes, run)
    cells, heights = run.cells(), shell_limits(run.edges)
    axes.set_xlim(cells[0], cells[-1])
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    rows = np.flatnonzero(run.shown) if run.shown.any() else np.arange(len(run.shown))
    low, high = heights[rows[0]], heights[rows[-1] + 1]
    axes.set_ylim(low, high * (high / low) ** HEADROOM)
    if rows[0] == 0:
        _mark_underflow(axes, heights)


def _time_ticks(axes: Axes, run: Run) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    if len(run.x) <= 3:
        axes.xaxis.set_major_locator(FixedLocator(run.x.tolist()))
    elif not run.is_log:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=run.time == "step"))
    if len(run.x) <= 3 or not run.is_log:
        return
    axes.set_xscale("symlog", linthresh=run.first)
    powers = 10.0 ** np.arange(np.ceil(np.log10(run.first) - 1e-9), np.floor(np.log10(run.x[-1]) + 1e-9) + 1)
    axes.xaxis.set_major_locator(FixedLocator(([0.0] if run.x[0] <= 0 else []) + powers.tolist()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def log_ticks(axis: Any, values: np.ndarray) -> None:
    """Labels at powers of ten; at 1, 2 and 5 of each where the values span less than two decades."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    low, high = float(values.min()), float(values.max())
    axis.set_minor_formatter(NullFormatter())
    if high < 100 * low:
        powers = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
        axis.set_major_locator(FixedLocator(sorted(n * p for p in powers for n in (1, 2, 5))))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _mark_underflow(axes: Axes, heights: np.ndarray) -> None:
    from matplotlib.patheffects import withStroke

    axes.axhline(heights[1], color=BLACK, linewidth=0.8, linestyle=":")
    axes.text(
        0.01, float(np.sqrt(heights[0] * heights[1])), r"all smaller $\lambda$", transform=axes.get_yaxis_transform(),
        fontsize=SMALL, va="center", color=BLACK, path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip


def shell_limits(edges: np.ndarray) -> np.ndarray:
    """Limits of all shells, (B + 3,); the open ones are drawn one mean width high."""
    width = (edges[-1] / edges[0]) ** (1 / (len(edges) - 1))
    return np.concatenate([[edges[0] / width], edges, [edges[-1] * width]])


def colour_bar(axes: Axes, mesh: Any, text: str, **options: Any) -> None:
    """A colour bar with its unit."""
    bar = axes.figure.colorbar(mesh, ax=axes, **options)
    bar.set_label(text, fontsize=MEDIUM)
    bar.ax.tick_params(labelsize=SMALL)
    if "ticks" in options:
        bar.minorticks_off()


def heat_map(axes: Axes, x: np.ndarray, y: np.ndarray, values: np.ma.MaskedArray, norm: Any, cmap: str) -> Any:
    """Cells with limits x and y, masked ones left as they are (viridis) or grey (diverging maps)."""
    from matplotlib import colormaps

    colours = colormaps[cmap] if cmap == "viridis" else colormaps[cmap].with_extremes(bad=GREY)
    return axes.pcolormesh(x, y, values, norm=norm, cmap=colours, shading="flat")


def around_zero(values: np.ndarray) -> tuple[Any, list[float]]:
    """Symmetric log colours with three decades on each side of 0, and their ticks; a few outliers are clipped."""
    from matplotlib.colors import Normalize, SymLogNorm

    sizes = np.abs(values[np.isfinite(values)])
    sizes = sizes[sizes > 0]
    if not sizes.size:
        return Normalize(-1.0, 1.0), [0.0]
    top = 10 ** np.ceil(np.log10(np.quantile(sizes, 0.99)))
    ticks = [top * 10.0**-k for k in range(4)]
    return SymLogNorm(linthresh=top * 1e-3, vmin=-top, vmax=top), [*(-t for t in ticks), 0.0, *reversed(ticks)]


def around_one(values: np.ndarray) -> tuple[Any, list[float]]:
    """Log colours symmetric around 1, from a factor of 2 to 1000 on each side, and their ticks."""
    from matplotlib.colors import LogNorm

    positive = values[np.isfinite(values) & (values > 0)]
    spread = np.quantile(np.abs(np.log10(positive)), 0.9) if positive.size else 0.0
    factor = float(10 ** np.clip(spread, np.log10(2), 3))
    steps = (1, 2, 5) if factor < 30 else (1,)
    ticks = [n * 10.0**k for k in range(-3, 4) for n in steps]
    return LogNorm(1 / factor, factor), [t for t in ticks if 1 / factor <= t * (1 + 1e-9) and t <= factor * (1 + 1e-9)]


def hatch(axes: Axes, cells: np.ndarray, heights: np.ndarray, mask: np.ndarray, pattern: str, text: str) -> None:
    """Hatch the cells of a mask, a row's neighbours in one rectangle."""
    from matplotlib.collections import PolyCollection

    corners = []
    for row, low, high in zip(mask, heights[:-1], heights[1:], strict=True):
        starts, ends = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]]))).reshape(-1, 2).T
        corners += [[(a, low), (b, low), (b, high), (a, high)] for a, b in zip(cells[starts], cells[ends], strict=True)]
    if corners:
        style: dict[str, Any] = {"facecolor": (0.82, 0.82, 0.82, 0.55), "edgecolor": "0.25", "linewidth": 0.0}
        axes.add_collection(PolyCollection(corners, hatch=pattern, label=text, **style), autolim=False)


def missing(axes: Axes, text: str) -> None:
    """A legend entry for the grey of `heat_map`."""
    axes.plot([], [], marker="s", markersize=8, linestyle="none", color=GREY, label=text)
