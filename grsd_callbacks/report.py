"""What people read: the report at the start of a run and the table at its end. Plain text, no dependencies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import Loss
from grsd_callbacks.measure import Settings, choose_method
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.trajectory import exponent_closures

EXPONENT_NAMES = {
    "a_start": "spectrum  lambda_i ~ i^-a at the start",
    "a": "spectrum  lambda_i ~ i^-a at the end",
    "count": "spectrum  N ~ lambda^-n at the end",
    "q": "energy    E ~ lambda^q at the start",
    "chi": "loss      L ~ t^-chi",
    "chi_tail": "loss      L + tail beyond the probe ~ t^-chi",
    "chi_local": "loss      over the last decade",
    "rho": "frontier  energy median ~ t^-rho, frozen",
    "rho_contour": "frontier  progress 1/2 ~ t^-rho, frozen",
    "rho_local": "frontier  progress 1/2, last decade",
    "densing": "modes     k* above the frontier ~ t^densing",
    "pi_c": "pruning   L ~ lambda_c^pi_c, cut below lambda_c",
    "b": "velocity  v ~ lambda^b t^p",
    "p": "velocity  v ~ lambda^b t^p",
}
#: shown even where they were refused
ALWAYS = ("a", "q", "chi", "rho", "rho_contour")
CLOSURE_NAMES = {
    "chi_minus_rho_q": "chi - rho q",
    "count_slope": "n - 1/a",
    "densing": "densing - rho/a",
    "compression": "chi/pi_c - rho",
    "covariance": "p - (b - 2)",
}


def start_report(
    op: NTKOperator, loss: Loss, settings: Settings, schedule: str, reason: str = "", ranks: str = ""
) -> str:
    """What is measured on what, by which way (and why that one), when, and by whom where there are several ranks."""
    method = choose_method(settings.method, op)
    how = {
        "exact": "exact kernel and eigendecomposition",
        "krylov": f"{settings.num_matvecs} + {settings.num_density_matvecs} kernel products (energies + counts)",
        "randomized": f"range finder with {settings.num_matvecs} kernel products, top of the spectrum only",
    }[method]
    n, c = op.num_samples, op.num_outputs
    return "\n".join(
        [
            "grsd: shell dynamics of the empirical NTK",
            *_indented("function", function_lines(op)),
            f"  probe       {n} samples x {c} outputs, m = {n * c}",
            f"  parameters  {op.num_parameters:,} in {len(op.parameter_names)} tensors, "
            f"{str(op.dtype)[6:]} on {op.device}",
            f"  loss        {loss.kind.replace('_', ' ')}: {loss.energy_meaning}",
            f"  method      {method}: {how}" + (f" ({reason})" if reason else ""),
            f"  schedule    {schedule}",
            *([f"  ranks       {ranks}"] if ranks else []),
            "  model       measured in eval mode on copies; training is left bit-identical",
        ]
    )


def function_lines(op: NTKOperator) -> Sequence[str]:
    """Which function is measured, one line or more."""
    described = getattr(op.function.extract, "description", None)
    if described:
        return tuple(described)
    picked = "" if op.function.extract is None else ", what outputs= picks of it"
    return (f"forward of {type(op.function.model).__name__}{picked}",)


def _indented(title: str, lines: Sequence[str]) -> list[str]:
    return [f"  {title if i == 0 else '':10}  {line}" for i, line in enumerate(lines)]


def summary_table(history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit]) -> str:
    """Shells at the start and at the end, exponents with intervals, closures and cost."""
    if not history:
        return "grsd: nothing has been measured"
    first, last = history[0], history[-1]
    lines = [
        f"shells of M = nu J J^T, {last.num_samples} samples x {last.num_outputs} outputs, {last.method}; "
        f"step {first.step} -> {last.step}, flow time 0 -> {last.flow_time:.4g}",
        *_shell_lines(first, last),
        "",
        *_exponent_lines(fits),
        "",
        *_closure_lines(history, fits),
        "",
        _cost_line(history),
    ]
    failed = last.health.get("failed", 0.0)
    if failed:
        lines.append(f"failed measurements: {failed:.0f}")
    return "\n".join(lines)


def _cost_line(history: Sequence[Snapshot]) -> str:
    share = history[-1].cost.get("overhead_percent", math.nan)
    if math.isfinite(share):
        return f"cost: {len(history)} measurements, {share:.2g} % of the training time"
    seconds = sum(s.cost.get("seconds", 0.0) for s in history)  # no training was seen: one measurement, or checkpoints
    return f"cost: {len(history)} measurements, {seconds:.2g} s"


def _shell_lines(first: Snapshot, last: Snapshot) -> list[str]:
    lines = [
        f"{'shell':>6} {'lambda':>21} {'count':>11} {'energy E':>21} {'dissipation D':>21}",
        f"{'':>6} {'from':>10} {'to':>10} {'start':>5} {'end':>5} {'start':>10} {'end':>10} {'start':>10} {'end':>10}",
    ]
    edges = [0.0, *first.edges.tolist(), math.inf]
    for a, name in enumerate(first.grid.names()):
        row = [s.counts[a].item() for s in (first, last)]
        energy = [s.energy[a].item() for s in (first, last)]
        dissipation = [s.dissipation[a].item() for s in (first, last)]
        if not any(x > 0 for x in (*row, *energy)):
            continue
        marks = ["" if s.resolved[a] else "?" for s in (first, last)]
        cells = [f"{x:9.3g}{mark or ' '}" for x, mark in zip(energy, marks, strict=True)]
        lines.append(
            f"{name:>6} {edges[a]:>10.3g} {edges[a + 1]:>10.3g} {row[0]:>5.0f} {row[1]:>5.0f} "
            f"{cells[0]:>10} {cells[1]:>10} {dissipation[0]:>10.3g} {dissipation[1]:>10.3g}"
        )
    lines.append(
        f"{'sum':>6} {'':>21} {first.counts.sum():>5.0f} {last.counts.sum():>5.0f} "
        f"{first.energy.sum():>9.3g}  {last.energy.sum():>9.3g}  "
        f"{first.dissipation.sum():>10.3g} {last.dissipation.sum():>10.3g}"
    )
    if not bool(first.resolved.all() and last.resolved.all()):
        lines.append("  ? not resolved: below the floor of the precision, or bounds too wide")
    return lines


def _exponent_lines(fits: Mapping[str, PowerLawFit]) -> list[str]:
    lines = ["exponents, 95 % intervals"]
    for name, meaning in EXPONENT_NAMES.items():
        fit = fits.get(name)
        start = f"  {name:>11}  {meaning:45}"
        if fit is None or fit.refused:
            if name in ALWAYS:
                why = "not available (eigenvalues are not known by this method)" if fit is None else fit.reason
                lines.append(f"{start} {'' if fit is None else 'refused: '}{why}")
            continue
        value = f"{fit.exponent:.3f} [{fit.lower:.3f}, {fit.upper:.3f}]"
        verdict = "" if fit.reason == "shapes were not compared" else f", {fit.verdict.replace('_', ' ')}"
        lines.append(f"{start} {value:26} {fit.num_decades:.1f} decades, {fit.num_points} points{verdict}")
    return lines


def _closure_lines(history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit]) -> list[str]:
    def worst(name: str) -> str:
        values = [abs(s.closures[name]) for s in history if math.isfinite(s.closures.get(name, math.nan))]
        return f"{max(values):.1e}" if values else "-"

    lines = [
        "closures, largest over the run",
        f"  sum E = L {worst('energy')}    sum D = |grad L|^2 {worst('dissipation')}    "
        f"sum transport = 0 {worst('transport')}",
    ]
    for name, found in exponent_closures(fits).items():
        if math.isfinite(found.lower):
            holds = "holds" if found.holds else "broken"
            value = f"{found.value:.3f} [{found.lower:.3f}, {found.upper:.3f}]"
            lines.append(f"  {CLOSURE_NAMES[name]:>15} = {value:26} {holds}")
        elif name == "chi_minus_rho_q":
            lines.append(f"  {CLOSURE_NAMES[name]:>15}: an exponent is missing")
    return lines
