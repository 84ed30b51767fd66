"""What people read: the report at the start of a run and the table at its end. Plain text, no dependencies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import Loss
from grsd_callbacks.measure import Settings, choose_method
from grsd_callbacks.snapshot import Snapshot

EXPONENT_NAMES = {
    "a": "spectrum  lambda_i ~ i^-a",
    "q": "energy    E ~ lambda^q at the start",
    "chi": "loss      L ~ t^-chi",
    "rho": "frontier  lambda* ~ t^-rho, frozen basis",
}


def start_report(op: NTKOperator, loss: Loss, settings: Settings, schedule: str, reason: str = "") -> str:
    """What is measured on what, by which way (and why that one), and when."""
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
            f"  probe       {n} samples x {c} outputs, m = {n * c}",
            f"  parameters  {op.num_parameters:,} in {len(op.parameter_names)} tensors, "
            f"{str(op.dtype)[6:]} on {op.device}",
            f"  loss        {loss.kind.replace('_', ' ')}: {loss.energy_meaning}",
            f"  method      {method}: {how}" + (f" ({reason})" if reason else ""),
            f"  schedule    {schedule}",
            "  model       measured in eval mode on copies; training is left bit-identical",
        ]
    )


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
        *_closure_lines(history),
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
        if fit is None:
            lines.append(f"  {name:>4}  {meaning:42} not available (eigenvalues are not known by this method)")
        elif fit.refused:
            lines.append(f"  {name:>4}  {meaning:42} refused: {fit.reason}")
        else:
            value = f"{fit.exponent:.3f} [{fit.lower:.3f}, {fit.upper:.3f}]"
            lines.append(
                f"  {name:>4}  {meaning:42} {value:26} {fit.num_decades:.1f} decades, "
                f"{fit.num_points} points, {fit.verdict.replace('_', ' ')}"
            )
    return lines


def _closure_lines(history: Sequence[Snapshot]) -> list[str]:
    def worst(name: str) -> str:
        values = [abs(s.closures[name]) for s in history if math.isfinite(s.closures.get(name, math.nan))]
        return f"{max(values):.1e}" if values else "-"

    last = history[-1].closures
    chi = last.get("chi_minus_rho_q", math.nan)
    return [
        "closures, largest over the run",
        f"  sum E = L {worst('energy')}    sum D = |grad L|^2 {worst('dissipation')}    "
        f"sum transport = 0 {worst('transport')}",
        f"  chi - rho q = {chi:.3f} [{last.get('chi_minus_rho_q_lower', math.nan):.3f}, "
        f"{last.get('chi_minus_rho_q_upper', math.nan):.3f}]"
        if math.isfinite(chi)
        else "  chi - rho q: an exponent is missing",
    ]
