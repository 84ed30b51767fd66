"""`grsd compare`: runs side by side, with the significance of their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from grsd_callbacks.cli.runlog import EXPONENTS, RunLog, UsageError, find_run
from grsd_callbacks.cli.tables import show_table
from grsd_callbacks.exponents import Estimate, PowerLawFit, combine
from grsd_callbacks.report import ALWAYS, EXPONENT_NAMES
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.tags import TAGS

NORMAL_95 = 1.959964
#: shells are the same lattice if width and offset in log10 lambda agree to this
LATTICE_TOLERANCE = 1e-6

SCALARS = {  # what is set side by side of the last measurement
    "loss on the probe": "grsd_loss/probe",
    "flow time": "grsd_time/flow_time",
    "lambda_max": "grsd_spectrum/lambda_max",
    "effective rank": "grsd_spectrum/effective_rank",
    "kernel drift": "grsd_regime/kernel_drift",
    "transport ratio": "grsd_regime/transport_ratio",
}


@dataclass(frozen=True)
class Difference:
    """How far an exponent of one run is from the same exponent of another.

    Attributes:
        value, lower, upper: the difference and its 95 % interval.
        p: two-sided probability of a difference this large if there were none (normal errors).
    """

    value: float
    lower: float
    upper: float
    p: float


def difference(one: Estimate | PowerLawFit, other: Estimate | PowerLawFit) -> Difference:
    """`other - one`, independent errors, with the half-width on zero's side as 1.96 standard errors.

    Example:
        >>> d = difference(Estimate(1.0, 0.9, 1.1), Estimate(1.5, 1.4, 1.6))
        >>> round(d.value, 3), round(d.lower, 3), d.p < 1e-6
        (0.5, 0.359, True)
    """
    found = combine(lambda a, b: b - a, one, other)
    width = found.value - found.lower if found.value > 0 else found.upper - found.value
    if math.isnan(width):
        return Difference(found.value, found.lower, found.upper, math.nan)
    if width == 0:
        return Difference(found.value, found.lower, found.upper, 1.0 if found.value == 0 else 0.0)
    z = abs(found.value) / (width / NORMAL_95)
    return Difference(found.value, found.lower, found.upper, math.erfc(z / math.sqrt(2)))


def holm(p: Sequence[float]) -> list[float]:
    """Probabilities corrected for making this many comparisons (Holm 1979); NaN stays NaN and does not count.

    Example:
        >>> holm([0.01, 0.04])
        [0.02, 0.04]
    """
    known = sorted((value, k) for k, value in enumerate(p) if not math.isnan(value))
    corrected, running = [math.nan] * len(p), 0.0
    for rank, (value, k) in enumerate(known):
        running = max(running, min(1.0, (len(known) - rank) * value))
        corrected[k] = running
    return corrected


def compare(paths: Sequence[Path]) -> None:
    """Print runs side by side: scalars, shell energies at the end, exponents, and their differences from the first.

    Raises:
        UsageError: fewer than two runs, something that is no run, or runs on different grids.
    """
    if len(paths) < 2:
        raise UsageError("compare needs at least two runs")
    runs = [find_run(path) for path in paths]
    check_grids(runs)
    names = labels(runs)
    found = [run.estimates() for run in runs]
    show_table("last measurement", ["", *names], _scalar_rows(runs))
    if all(run.history for run in runs):
        print()
        show_table("shell energies at the end (loss)", ["shell from lambda", *names], shell_rows(runs))
    print()
    shown = [n for n in EXPONENTS if n in ALWAYS or any(estimate_text(f.get(n)) not in NONE for f in found)]
    rows = [[f"{n}  {EXPONENT_NAMES[n]}", *(estimate_text(fits.get(n)) for fits in found)] for n in shown]
    show_table("exponents, 95 % intervals", ["", *names], rows)
    print()
    show_table(f"differences from {names[0]}", ["", *names[1:]], _difference_rows(found, shown))
    print(
        "p: probability of such a difference by chance, corrected for the number of comparisons (Holm). The intervals "
        "speak for\nthe points of each run's window, not for other seeds: repeat runs before you believe a difference."
    )
    print(*_cautions(runs), sep="", end="")


def check_grids(runs: Sequence[RunLog]) -> None:
    """Shells compare only on one lattice: same width, edges at the same places, whatever the range.

    Raises:
        UsageError: two runs are on different lattices.
    """
    known = [run for run in runs if run.history]
    for run in known[1:]:
        width, offset = lattice(run.history[0])
        first_width, first_offset = lattice(known[0].history[0])
        turn = (offset - first_offset) / first_width
        if abs(width - first_width) > LATTICE_TOLERANCE or abs(turn - round(turn)) > LATTICE_TOLERANCE / first_width:
            raise UsageError(
                f"runs of different grids: {known[0].path} has {1 / first_width:.3g} shells a decade from "
                f"10^{first_offset:.3g}, {run.path} {1 / width:.3g} from 10^{offset:.3g}. Shells and what is fitted to "
                "them depend on the grid: measure both with the same shells_per_decade"
            )


def lattice(snapshot: Snapshot) -> tuple[float, float]:
    """Width of the shells and lowest edge, in log10 lambda."""
    logs = snapshot.edges.log10()
    return float((logs[-1] - logs[0]) / (logs.numel() - 1)), float(logs[0])


def labels(runs: Sequence[RunLog]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [(run.path if run.path.is_dir() else run.path.parent).resolve().parts + (run.path.stem,) for run in runs]
    parts = [p[:-1] if run.path.is_dir() else p for p, run in zip(parts, runs, strict=True)]
    while len({p[-1] for p in parts}) == 1 and min(map(len, parts)) > 1 and len(set(parts)) == len(parts):
        parts = [p[:-1] for p in parts]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-2:])} ({k})" for k, p in enumerate(parts, start=1)]


#: what stands for no value
NONE = ("not available", "refused")


def estimate_text(fit: Estimate | PowerLawFit | None) -> str:
    """Value with interval, and whether it deserves to be called an exponent."""
    if fit is None:
        return "not available"
    value = fit.exponent if isinstance(fit, PowerLawFit) else fit.value
    if math.isnan(value):
        return "refused"
    text = f"{value:.3f} [{fit.lower:.3f}, {fit.upper:.3f}]"
    if isinstance(fit, PowerLawFit) and fit.verdict != "power_law":
        text += f" {fit.verdict}"
    return text


def shell_rows(runs: Sequence[RunLog]) -> list[list[str]]:
    """One row a shell that holds energy in any run, by lower edge; "-" where a run's grid does not reach."""
    table: dict[float, list[str]] = {}
    for k, run in enumerate(runs):
        last = run.history[-1]
        lower = [-math.inf, *np.round(last.edges.log10().numpy(), 6).tolist()]
        for edge, energy, resolved in zip(lower, last.energy.tolist(), last.resolved.tolist(), strict=True):
            if energy > 0:
                row = table.setdefault(edge, ["-"] * len(runs))
                row[k] = f"{energy:.3g}" + ("" if resolved else " ?")
    return [["below" if edge == -math.inf else f"{10**edge:.3g}", *table[edge]] for edge in sorted(table)]


def _scalar_rows(runs: Sequence[RunLog]) -> list[list[str]]:
    rows = [["step", *(str(r.history[-1].step if r.history else r.curves["grsd_loss/probe"][-1][0]) for r in runs)]]
    for name, tag in SCALARS.items():
        values = [_last(run, tag) for run in runs]
        rows.append([name, *("-" if math.isnan(value) else f"{value:.4g}" for value in values)])
    return rows


def _last(run: RunLog, tag: str) -> float:
    return TAGS[tag].value(run.history[-1]) if run.history else run.curves.get(tag, [(0, math.nan)])[-1][1]


def _difference_rows(
    found: Sequence[dict[str, Estimate | PowerLawFit]], names: Sequence[str] = EXPONENTS
) -> list[list[str]]:
    """One row an exponent, one column a run but the first."""
    cells: list[tuple[int, int, Difference]] = []
    rows = [[name, *["-"] * (len(found) - 1)] for name in names]
    for i, name in enumerate(names):
        for k, fits in enumerate(found[1:], start=1):
            if name in fits and name in found[0]:
                cells.append((i, k, difference(found[0][name], fits[name])))
    for (i, k, d), p in zip(cells, holm([d.p for _, _, d in cells]), strict=True):
        if not math.isnan(p):
            mark = " significant" if p < 0.05 else ""
            rows[i][k] = f"{d.value:+.3f} [{d.lower:+.3f}, {d.upper:+.3f}] p = {p:.2g}{mark}"
    return rows


def _cautions(runs: Sequence[RunLog]) -> list[str]:
    cautions = [f"note: {run.path}: {note}\n" for run in runs for note in run.notes]
    probes = {(s.num_samples, s.num_outputs) for s in (run.history[-1] for run in runs if run.history)}
    if len(probes) > 1:
        sizes = ", ".join(f"{n} x {c}" for n, c in sorted(probes))
        cautions.append(
            f"note: probes of different size (samples x outputs: {sizes}), so spectra of different things\n"
        )
    for run in runs:
        if _last(run, "grsd_health/nominal_flow_time") > 0:
            cautions.append(
                f"note: {run.path}: flow time is only nominal (see grsd tags): chi and rho do not compare\n"
            )
    return cautions
