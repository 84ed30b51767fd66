"""Pictures of a run: where the error sits, where it is spent and where it moves, over scales and time.

Every function takes `callback.history` and returns a new `matplotlib.figure.Figure` with a canvas of its own: pyplot,
rcParams and the backend are left alone, and matplotlib is imported only when something is drawn.

How to read the maps: up is stiff (large lambda, learned first), right is later. White is zero (effective learning
rate: one), grey is "no number", hatched is "not resolved", crossed is "negative".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.figures import collapse, conditions, curves, maps, verdict
from grsd_callbacks.figures.drawing import DPI, new_figure
from grsd_callbacks.figures.history import Run, run_of
from grsd_callbacks.notice import notice
from grsd_callbacks.renormalizability import Conditions, RunVerdict
from grsd_callbacks.shells import ShellGrid
from grsd_callbacks.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "FIGURES",
    "FigureWarning",
    "collapse_figure",
    "conditions_figure",
    "dissipation_map",
    "effective_lr_map",
    "energy_map",
    "flux_map",
    "loss_figure",
    "overview",
    "run_figures",
    "spectrum_figure",
    "transfer_figure",
    "verdict_figure",
]

#: every figure tag: unit of what is drawn, and its meaning
FIGURES: dict[str, tuple[str, str]] = {
    "grsd_figures/energy": ("loss", "shell energies E_a over lambda and step, with frontier and lambda_max"),
    "grsd_figures/dissipation": ("loss / flow time", "shell dissipation D_a over lambda and step"),
    "grsd_figures/flux": ("loss / flow time", "flux J_b through shell edges between measurements, upward positive"),
    "grsd_figures/spectrum": (
        "1 / flow time",
        "eigenvalues of M by rank at the start and now, with a (krylov: energy of Gauss nodes over lambda)",
    ),
    "grsd_figures/effective_lr": ("1", "W_a / (lr D_a) of each shell: 1 is full-batch gradient descent on the probe"),
    "grsd_figures/loss": ("loss", "L and |grad L|^2 on the probe against flow time, with chi"),
    "grsd_figures/verdict": ("1", "exponents with verdicts, identities and flags, each marked ok or worth a look"),
    "grsd_figures/collapse": (
        "1",
        "E_a t^chi over lambda t (shells of each time) and over lambda_0 t^rho (of the first kernel): is it one curve?",
    ),
    "grsd_figures/transfer": ("loss / flow time", "transfer T_ab between shells, latest: row a gains from column b"),
}


class FigureWarning(UserWarning):
    """Figures cannot be drawn; nothing else is affected."""


def energy_map(history: Sequence[Snapshot], *, time: str = "step") -> Figure:
    """Shell energies E_a over lambda and time, log colours; a column sums to the loss (squared loss).

    The white line is the frontier (half of the energy lies below it, in the basis of the first measurement), the
    dashed one lambda_max. Shells that are not resolved are hatched and show their estimate; what holds less than a
    millionth of the measurement's total is white.

    Args:
        history: measurements of one run, in order, at least one.
        time: "step" or "flow_time", the horizontal axis; log-spaced where the measurements are.

    Returns:
        A figure of 640 x 480 pixels.

    Raises:
        ValueError: history empty or out of order, measurements on different shells, another time axis.
        ImportError: matplotlib is not installed.

    Cost: about 0.3 s with the rendering, as for every figure here but `overview` (1.5 s).
    """
    return _single(maps.energy, run_of(history, time))


def dissipation_map(history: Sequence[Snapshot], *, time: str = "step") -> Figure:
    """Shell dissipation D_a = sum lambda g^2: where loss is being removed; a column sums to |grad L|^2.

    Arguments, errors and cost as for `energy_map`.
    """
    return _single(maps.dissipation, run_of(history, time))


def flux_map(history: Sequence[Snapshot], *, time: str = "step") -> Figure:
    """Flux J_b through shell edges, upward (to larger lambda) positive; symmetric log colours around 0.

    A cell reaches from one measurement to the next, the interval that its flux belongs to. Intervals without a number
    (a break in the run) are grey. Arguments, errors and cost as for `energy_map`.
    """
    return _single(maps.flux, run_of(history, time))


def effective_lr_map(history: Sequence[Snapshot], *, time: str = "step") -> Figure:
    """Effective learning rate W_a / (lr D_a) of each shell, log colours around 1; crosses where it is negative.

    1: as full-batch gradient descent on the probe would; above: the optimizer favours this scale; negative: the step
    raised this shell's part of the loss. Arguments, errors and cost as for `energy_map`.
    """
    return _single(maps.effective_lr, run_of(history, time))


def spectrum_figure(history: Sequence[Snapshot], fit: PowerLawFit | None = None) -> Figure:
    """Eigenvalues against rank at the first and the last measurement, and the law i^-a in its window.

    For krylov measurements, whose eigenvalues are not known: the nodes of the residual's measure and the energy (half
    the Gauss weight) that each of them carries. Errors and cost as for `energy_map`.

    Args:
        history: measurements of one run, in order, at least one.
        fit: of the spectrum; None takes the last measurement's own `exponents["a"]`.
    """
    return _single(partial(curves.spectrum, fit=fit), run_of(history))


def loss_figure(history: Sequence[Snapshot], chi: PowerLawFit | None = None) -> Figure:
    """L (left axis) and |grad L|^2 (right axis) on the probe against flow time, log-log, and the law t^-chi.

    Errors and cost as for `energy_map`.

    Args:
        history: measurements of one run, in order, at least one.
        chi: fit of the loss; None takes the last measurement's own `exponents["chi"]`.
    """
    return _single(partial(curves.loss, fit=chi), run_of(history))


def verdict_figure(history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit] | None = None) -> Figure:
    """A card: exponents with verdicts, identities, and flags, each marked as fine or worth a look.

    Errors and cost as for `energy_map`.

    Args:
        history: measurements of one run, in order, at least one.
        fits: exponents by name; None takes the last measurement's own.
    """
    return _single(partial(verdict.verdict, fits=fits), run_of(history))


def collapse_figure(history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit]) -> Figure:
    """Self-similar collapse: `E_a(t) t^chi` against `lambda t` and, in the frozen basis, `lambda_0 t^rho`.

    With the score of `self_similar_collapse`, its interval and its null; where a score cannot be had, the reason.
    Errors and cost as for `energy_map`.

    Args:
        history: measurements of one run, in order, at least one.
        fits: its final exponents (`ShellMonitor.final_exponents`).
    """
    return collapse.draw(run_of(history).history, fits)


def transfer_figure(matrix: Tensor | np.ndarray, grid: ShellGrid) -> Figure:
    """Shell-to-shell transfer T_ab: energy that shell a (row) gains from shell b (column) per flow time.

    Args:
        matrix: T, (num_shells, num_shells), antisymmetric, under- and overflow included; NaN is drawn grey.
        grid: the shells.

    Raises:
        ValueError: a matrix of another shape, or not antisymmetric (that is, not a transfer matrix).
        ImportError: matplotlib is not installed.
    """
    T = np.asarray(matrix, dtype=float)
    if T.shape != (grid.num_shells, grid.num_shells):
        raise ValueError(f"matrix must have shape ({grid.num_shells}, {grid.num_shells}), got {T.shape}")
    known = np.nan_to_num(T)
    if np.abs(known + known.T).max() > 1e-6 * np.abs(known).max():
        raise ValueError("matrix must be antisymmetric: T_ab is what shell a gains from shell b, so T_ba = -T_ab")
    return _single(partial(maps.transfer, edges=grid.edges.numpy()), T)


def overview(history: Sequence[Snapshot], *, time: str = "step") -> Figure:
    """Loss, spectrum and the four maps on one page of 1620 x 920 pixels; arguments and errors as for `energy_map`."""
    run = run_of(history, time)
    figure = new_figure((16.2, 9.2), DPI)
    panels = [curves.loss, curves.spectrum, maps.effective_lr, maps.energy, maps.dissipation, maps.flux]
    parts = np.asarray(figure.subfigures(2, 3))  # each with a layout of its own
    for part, draw in zip(parts.flat, panels, strict=True):
        draw(part.subplots(), run)
    return figure


def conditions_figure(history: Sequence[Conditions], verdict: RunVerdict) -> Figure:
    """The verdicts on a run with the numbers behind them: gradients, coherence, couplings, and the course of the run.

    Args:
        history: measurements of the run, in order, at least one.
        verdict: what `judge` found.

    Raises:
        ValueError: history is empty.
        ImportError: matplotlib is not installed.

    Cost: about 0.6 s with the rendering; 1500 x 760 pixels.
    """
    if not history:
        raise ValueError("history must hold at least one measurement")
    figure = new_figure((15.0, 7.6))
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=[1, 1.35]))
    conditions.table(top.subplots(), verdict)
    panels = bottom.subplots(1, 4)
    conditions.gradients(panels[0], history)
    conditions.coherence(panels[1], history[0])
    conditions.couplings(panels[2], history[-1])
    conditions.speeds(panels[3], history)
    return figure


def run_figures(
    history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit] | None = None
) -> dict[str, Callable[[], Figure]]:
    """What to draw for a run so far, by tag: functions that draw when called (`Emission.figures`).

    Args:
        history: measurements so far; copied, so that later ones do not change these figures.
        fits: of the whole run, to draw instead of the last measurement's own; they also bring the collapse.

    Returns:
        One function a tag of `FIGURES` (transfer only where it was measured, the collapse only with chi); nothing for
        an empty history, and nothing, with one `FigureWarning` in a process, where matplotlib is missing.
    """
    if not history or not _can_draw():
        return {}
    past, fits = list(history), fits or {}
    figures: dict[str, Callable[[], Figure]] = {
        "grsd_figures/energy": partial(energy_map, past),
        "grsd_figures/dissipation": partial(dissipation_map, past),
        "grsd_figures/flux": partial(flux_map, past),
        "grsd_figures/spectrum": partial(spectrum_figure, past, fits.get("a")),
        "grsd_figures/effective_lr": partial(effective_lr_map, past),
        "grsd_figures/loss": partial(loss_figure, past, fits.get("chi")),
        "grsd_figures/verdict": partial(verdict_figure, past, fits or None),
    }
    chi = fits.get("chi_tail", fits.get("chi"))
    if chi is not None and not chi.refused:
        figures["grsd_figures/collapse"] = partial(collapse_figure, past, fits)
    for snapshot in past:
        if snapshot.transfer is not None:  # the last one stays
            figures["grsd_figures/transfer"] = partial(transfer_figure, snapshot.transfer, snapshot.grid)
    return figures


_warned = False


def _can_draw() -> bool:
    global _warned
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        if not _warned:
            _warned = True
            notice(
                "grsd: matplotlib is not installed, so no figures are drawn; everything else is measured and "
                "written. For figures: pip install 'grsd-callbacks[plot]'",
                FigureWarning,
                stacklevel=3,
            )
        return False
    return True


def _single(draw: Callable[[Any, Any], None], data: Run | np.ndarray) -> Figure:
    figure = new_figure()
    draw(figure.subplots(), data)
    return figure
