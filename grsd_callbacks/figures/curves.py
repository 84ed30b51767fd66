"""Curves with their fitted laws: the spectrum by rank (or the nodes of a krylov measurement), and the loss in time."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.figures import drawing
from grsd_callbacks.figures.history import TIME, Run
from grsd_callbacks.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def spectrum(axes: Axes, run: Run, fit: PowerLawFit | None = None) -> None:
    """Eigenvalues by rank with the law i^-a; nodes and their energies where only those are known."""
    last = run.history[-1]
    if last.weights is not None:
        _nodes(axes, run)
    else:
        _eigenvalues(axes, run)
        _law(axes, last.exponents.get("a") if fit is None else fit, "a", r"$\lambda_i \sim i^{-a}$")
    drawing.legend(axes, loc="lower left")


def _ends(run: Run) -> list[tuple[Snapshot, dict[str, Any]]]:
    """First and last measurement, once if there is only one, and how to draw them."""
    styles = [{"color": "0.6", "marker": "o"}, {"color": drawing.BLUE, "marker": "s"}]
    pairs = list(zip([run.history[0], run.history[-1]], styles, strict=True))[-len(run.history) :]
    return [(s, {**style, "markersize": 3.5, "linestyle": "none", "label": f"step {s.step}"}) for s, style in pairs]


def _eigenvalues(axes: Axes, run: Run) -> None:
    drawing.label(axes, "Spectrum of the kernel", "rank $i$", r"eigenvalue $\lambda_i$  (1 / flow time)")
    axes.set(xscale="log", yscale="log")
    low, top = np.inf, 0.0
    for snapshot, style in _ends(run):
        values = snapshot.eigenvalues.numpy()
        axes.plot(np.arange(1, len(values) + 1), np.where(values > 0, values, np.nan), **style)
        low, top = min(low, float(values.min())), max(top, float(values.max()))
    floor = run.summary("floor")[-1]
    if not top > 0:
        drawing.note(axes, "all eigenvalues are zero")
    elif low < floor < top:  # the null space and what rounding hides
        axes.set_ylim(floor / 10, top * 3)
        axes.axhspan(floor / 10, floor, color=drawing.GREY, label="below rounding", linewidth=0)


def _nodes(axes: Axes, run: Run) -> None:
    drawing.label(axes, "Where the error sits (Gauss nodes)", drawing.LAMBDA, "energy of the node  (loss)")
    axes.set(xscale="log", yscale="log")
    for snapshot, style in _ends(run):
        if snapshot.weights is not None:
            values, energy = snapshot.eigenvalues.numpy(), snapshot.weights.numpy() / 2
            is_positive = (values > 0) & (energy > 0)
            axes.plot(np.where(is_positive, values, np.nan), np.where(is_positive, energy, np.nan), **style)


def loss(axes: Axes, run: Run, fit: PowerLawFit | None = None) -> None:
    """L on the left axis, |grad L|^2 on the right one, and the law t^-chi."""
    drawing.label(axes, "Loss on the probe", TIME["flow_time"], "loss $L$")
    axes.yaxis.label.set_color(drawing.BLUE)
    names = ("flow_time", "loss", "grad_norm_sq")
    t, L, squared = (np.array([getattr(s, name) for s in run.history]) for name in names)
    later = t > 0
    if not later.any():
        axes.set(xticks=[], yticks=[])
        drawing.note(axes, f"no flow time has passed yet: the loss is {L[-1]:.4g}")
        return
    twin = axes.twinx()
    twin.set_ylabel(r"$|\nabla L|^2$  (loss / flow time)", fontsize=drawing.MEDIUM, color=drawing.ORANGE)
    twin.tick_params(labelsize=drawing.SMALL)
    for panel, y, colour, marker in ((twin, squared, drawing.ORANGE, "s"), (axes, L, drawing.BLUE, "o")):
        panel.set_xscale("log")
        panel.set_yscale("log" if (y[later] > 0).any() else "linear")
        panel.plot(t[later], y[later], color=colour, marker=marker, markersize=3.5, linewidth=1.2)
    drawing.log_ticks(axes.xaxis, t[later])
    if t[0] == 0:
        axes.axhline(L[0], color=drawing.BLUE, linewidth=0.8, linestyle=":", label="loss at the start")
    _law(axes, run.history[-1].exponents.get("chi") if fit is None else fit, r"$\chi$", r"$L \sim t^{-\chi}$")
    _in_front(axes, twin)
    drawing.legend(axes, loc="lower left")


def _in_front(axes: Axes, twin: Axes) -> None:
    """Draw `axes`, with its legend, over its twin, and let the twin's lines shine through."""
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)
    twin.patch.set_visible(True)
    twin.set_facecolor("white")


def _law(axes: Axes, fit: PowerLawFit | None, name: str, law: str) -> None:
    """A fitted law in its window, with exponent and interval; where it was refused, the reason."""
    if fit is None:
        return
    if fit.refused:
        axes.plot([], [], linestyle="none", label=textwrap.fill(f"{law} not fitted: {fit.reason}", 40))
        return
    x = np.geomspace(*fit.window, 50)
    text = f"{law},  {name} = {fit.exponent:.2f}\n95 %: {fit.lower:.2f} to {fit.upper:.2f}"
    if fit.verdict not in ("power_law", "undecided"):
        text += f"\nbut another shape fits better: {fit.verdict}"
    axes.plot(x, fit.predict(x), color=drawing.BLACK, linewidth=2.2, label=text, zorder=4)
