"""What people read: the report at the start of a run and the table at its end. Plain text, no dependencies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import Loss
from grsd_callbacks.measure import choose_method
from grsd_callbacks.method import MethodChoice
from grsd_callbacks.settings import Settings
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.spectrum import relative_floor
from grsd_callbacks.trajectory import exponent_closures
from grsd_callbacks.ways import counted

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
    "pi_c": "pruning   L ~ lambda_c^pi_c, modes below cut",
    "b": "velocity  v ~ lambda^b t^p",
    "p": "velocity  v ~ lambda^b t^p",
}
#: fewer measurements than this say little about time
FEW = 6
#: half-width of an interval that no longer tells exponents apart
WIDE = 0.5
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
    op: NTKOperator,
    loss: Loss,
    settings: Settings,
    schedule: str,
    choice: MethodChoice | None = None,
    ranks: str = "",
    checks: Sequence[str] = (),
    title: str = "shell dynamics of the empirical NTK",
) -> str:
    """What is measured on what, by which way (and why that one), at what cost, when, and by whom.

    Args:
        op: the operator on the probe, its way for J w chosen.
        loss: the loss, its scale settled.
        settings: how to measure, the method settled.
        schedule: when, in words.
        choice: expected cost of the methods; None where it is not known.
        ranks: who measures, in words, where there are several.
        checks: what the checks of the model have found.
        title: what is measured.
    """
    method = choose_method(settings.method, op)
    reason = f" ({choice.reason})" if choice is not None and choice.reason else ""
    lines = {
        "function": function_lines(op),
        "loss": [f"{loss.kind.replace('_', ' ')}{loss.source and ' ' + loss.source}: {loss.energy_meaning}"],
        "probe": [f"{op.num_samples} samples x {op.num_outputs} outputs, m = {op.shape[0]}"],
        "parameters": [_parameters(op)],
        "precision": [_precision(op, method)],
        "method": [f"{method}: {_how(method, settings)}{reason}"],
        "kernel": _kernel_lines(method, choice),
        "J w": _product_lines(op),
        "schedule": [schedule],
        "ranks": [ranks] if ranks else [],
        "model": ["measured in eval mode on copies; training is left bit-identical"],
        "checks": list(checks),
    }
    return "\n".join(
        [
            f"grsd: {title}",
            *(line for t, part in lines.items() for line in _indented(t, part)),
        ]
    )


def _how(method: str, settings: Settings) -> str:
    return {
        "exact": "exact kernel and eigendecomposition",
        "lanczos": f"exact kernel, its eigenvalues, and {settings.num_matvecs} products with it (energies)",
        "krylov": f"{settings.num_matvecs} + {settings.num_density_matvecs} kernel products (energies + counts)",
        "randomized": f"range finder with {settings.num_matvecs} kernel products, top of the spectrum only",
    }[method]


def _parameters(op: NTKOperator) -> str:
    every = sum(p.numel() for p in op.function.model.parameters())
    count = f"{op.num_parameters:,}" + (f" of {every:,}" if every != op.num_parameters else "")
    return f"{count} in {len(op.parameter_names)} tensors, {str(op.dtype)[6:]} on {op.device}"


def _precision(op: NTKOperator, method: str) -> str:
    """The measured function is that of the parameters as they are kept, without autocast."""
    named = dict(op.function.model.named_parameters())
    kept = sorted({str(named[name].dtype)[6:] for name in op.parameter_names})
    floor = relative_floor(op, exact=method in ("exact", "lanczos"))
    copies = f"{str(op.dtype)[6:]} copies of {' and '.join(kept)} parameters"
    return f"{copies}, autocast off; eigenvalues down to {floor:.0e} lambda_max are resolved"


def _kernel_lines(method: str, choice: MethodChoice | None) -> list[str]:
    """Forms of the parameters in the exact kernel, and the expected cost of a measurement."""
    if choice is None:
        return []
    seconds = getattr(choice, f"{method}_seconds", math.nan)
    has_kernel = method in ("exact", "lanczos")
    lines = [counted(choice.paths)] if has_kernel and choice.paths else []
    if math.isfinite(seconds):
        memory = f" and {choice.peak_bytes / 1e6:.3g} MB" if has_kernel else ""
        lines.append(f"arithmetic of about {seconds:.2g} s{memory} a measurement")
    return lines


def _product_lines(op: NTKOperator) -> list[str]:
    """The way to J w, and ways that were refused."""
    refused = [f"{path} refused: {why}" for path, why in op.refused.items()]
    return [op.plan.path.replace("_", " ") or "no way found", *refused] if op.plan.path or refused else []


def function_lines(op: NTKOperator) -> Sequence[str]:
    """Which function is measured, one line or more."""
    described = getattr(op.function.extract, "description", None)
    if described:
        return tuple(described)
    picked = "" if op.function.extract is None else ", what outputs= picks of it"
    return (f"forward of {type(op.function.model).__name__}{picked}",)


def _indented(title: str, lines: Sequence[str]) -> list[str]:
    return [f"  {title if i == 0 else '':<10}  {line}" for i, line in enumerate(lines)]


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
        *_cost_lines(history),
    ]
    failed = last.health.get("failed", 0.0)
    if failed:
        lines.append(f"failed measurements: {failed:.0f}")
    return "\n".join(lines)


def _cost_lines(history: Sequence[Snapshot]) -> list[str]:
    share = history[-1].cost.get("overhead_percent", math.nan)
    if not math.isfinite(share):  # no training was seen: one measurement, or checkpoints
        seconds = sum(s.cost.get("seconds", 0.0) for s in history)
        return [f"cost: {_measurements(len(history))}, {seconds:.2g} s"]
    lines = [f"cost: {_measurements(len(history))}, {share:.2g} % of the training time"]
    if len(history) < FEW:
        lines += [
            "  a short run: set-up and the first two measurements, which every run makes, weigh most in this share;",
            "  for more points (laws in time, figures) give max_overhead=None or every_n_steps=",
        ]
    return lines


def _measurements(number: int) -> str:
    return f"{number} measurement{'s' if number != 1 else ''}"


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
        return f"{max(values):.1e}" if values else "(not for this loss)" if name == "energy" else "-"

    lines = [
        "closures, largest over the run",
        f"  sum E = L {worst('energy')}    sum D = |grad L|^2 {worst('dissipation')}    "
        f"sum transport = 0 {worst('transport')}",
    ]
    for name, found in exponent_closures(fits).items():
        if math.isfinite(found.lower):
            wide = (found.upper - found.lower) / 2 > WIDE
            holds = "broken" if not found.holds else "holds" if not wide else "undecided: wide interval"
            value = f"{found.value:.3f} [{found.lower:.3f}, {found.upper:.3f}]"
            lines.append(f"  {CLOSURE_NAMES[name]:>15} = {value:26} {holds}")
        elif name == "chi_minus_rho_q":
            lines.append(f"  {CLOSURE_NAMES[name]:>15}: an exponent is missing")
    return lines
