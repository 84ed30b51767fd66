"""One card that says what a run deserves: exponents with verdicts, identities, and flags."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.figures import drawing
from grsd_callbacks.figures.history import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXPONENTS = {
    "a": r"$\lambda_i \sim i^{-a}$",
    "q": r"$E \sim \lambda^{q}$",
    "chi": r"$L \sim t^{-\chi}$",
    "rho": r"$\lambda^* \sim t^{-\rho}$",
}
#: an identity that is off by more than this deserves a look (float32 rounds to about 1e-7)
ROUNDING = 1e-3
GOOD, LOOK, NONE = "ok", "look", "-"
COLOURS = {GOOD: drawing.BLUE, LOOK: drawing.ORANGE, NONE: "0.45"}


@dataclass(frozen=True)
class Row:
    """One line of the card: what, its value, what to think of it, and "ok", "look" or "-"."""

    name: str
    value: str
    comment: str
    status: str


def verdict(axes: Axes, run: Run, fits: Mapping[str, PowerLawFit] | None = None) -> None:
    """Draw the card."""
    last = run.history[-1]
    rows = exponent_rows(last.exponents if fits is None else fits) + check_rows(run)
    axes.set_axis_off()
    axes.set_title(f"Verdict after {len(run.history)} measurements", fontsize=drawing.LARGE, loc="left")
    height = 1 / (len(rows) + 1)
    for k, row in enumerate(rows):
        y = 1 - (k + 0.8) * height - (0.5 * height if k >= len(EXPONENTS) else 0)
        cells = ((0.0, row.name, "black"), (0.33, row.value, "black"), (0.72, row.comment, COLOURS[row.status]))
        for x, text, colour in cells:
            axes.text(x, y, text, transform=axes.transAxes, fontsize=drawing.SMALL, color=colour, va="center")
        axes.text(
            -0.02, y, {GOOD: "\u2713", LOOK: "!", NONE: "\u2013"}[row.status], transform=axes.transAxes, ha="right",
            fontsize=drawing.LARGE, color=COLOURS[row.status], va="center", fontweight="bold",
        )  # fmt: skip


def exponent_rows(fits: Mapping[str, PowerLawFit]) -> list[Row]:
    """Every exponent with interval and verdict; a refused one without."""
    rows = []
    for name, law in EXPONENTS.items():
        fit = fits.get(name)
        if fit is None or fit.refused:
            rows.append(Row(law, "not fitted", "too little to fit" if fit else "not known", NONE))
        else:
            value = f"{fit.exponent:.2f}  [{fit.lower:.2f}, {fit.upper:.2f}]"
            status = GOOD if fit.verdict == "power_law" else LOOK
            rows.append(Row(law, value, fit.verdict.replace("_", " "), status))
    return rows


def check_rows(run: Run) -> list[Row]:
    """Identities (largest over the run) and flags (of the last measurement, except the step size)."""
    last = run.history[-1]

    def largest(values: list[float]) -> float:
        return max((abs(x) for x in values if math.isfinite(x)), default=math.nan)

    def identity(name: str, key: str) -> Row:
        off = largest([s.closures.get(key, math.nan) for s in run.history])
        if math.isnan(off):
            return Row(name, "-", "not measured", NONE)
        return Row(name, f"{off:.0e}", "closes" if off < ROUNDING else "does not close", _status(off < ROUNDING))

    steep = largest([s.health.get("lr_lambda_max", math.nan) for s in run.history])
    hidden = last.health.get("unresolved_energy", math.nan)
    nominal = last.health.get("nominal_flow_time", math.nan)
    failed = last.health.get("failed", 0.0)
    checks = [
        identity(r"$\Sigma E = L$", "energy"),
        identity(r"$\Sigma D = |\nabla L|^2$", "dissipation"),
        identity(r"$\Sigma$ transport $= 0$", "transport"),
        _limit(r"lr $\lambda_{\max}$, largest", steep, f"{steep:.2g}", steep <= 2, "below 2", "above 2"),
        _limit("energy not resolved", hidden, f"{100 * hidden:.1f} %", hidden < 0.1, "resolved", "much"),
        _limit("flow time", nominal, "nominal" if nominal else "exact", not nominal, "sum of lr", "no true t"),
    ]
    if failed:
        checks.append(Row("failed measurements", f"{failed:.0f}", "see warnings", LOOK))
    return checks


def _limit(name: str, number: float, value: str, holds: bool, good: str, bad: str) -> Row:
    return Row(name, "-", "not known", NONE) if math.isnan(number) else Row(
        name, value, good if holds else bad, _status(holds)
    )  # fmt: skip


def _status(holds: bool) -> str:
    return GOOD if holds else LOOK
