"""From a run's series of conditions to verdicts on every condition, and to lazy or rich."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from grsd_callbacks.arguments import checked
from grsd_callbacks.renormalizability.conditions import Conditions
from grsd_callbacks.renormalizability.regime import Regime, lazy_or_rich
from grsd_callbacks.renormalizability.rescaling import TimeRescaling, time_rescaling_covariance
from grsd_callbacks.renormalizability.verdicts import (
    HOLDS,
    UNDECIDED,
    Verdict,
    Z,
    bounded,
    covariant,
    significant,
    verdict_table,
)

#: what flips of gates may add to M' before couplings are no longer judged by its smooth part
LARGEST_KINK_GAP = 0.5


@dataclass(frozen=True, eq=False)
class RunVerdict:
    """What holds on a run.

    Attributes:
        verdicts: one a condition.
        regime: lazy or rich.
        rescaling: numbers behind the time-rescaling verdict.
    """

    verdicts: list[Verdict]
    regime: Regime
    rescaling: TimeRescaling

    def table(self) -> str:
        """Condition, value, interval, null and verdict, definitions and limits beside them; plain text."""
        votes = self.regime.votes
        shown = ", ".join(f"{name} {value:.3g} ({votes[name]})" for name, value in self.regime.signs.items())
        return verdict_table(self.verdicts, f"regime: {self.regime.label}  [{shown}]")


@checked
def judge(
    history: Sequence[Conditions],
    *,
    chi: float = math.nan,
    signs: Mapping[str, float] | None = None,
    num_null: int = 199,
    seed: int = 0,
) -> RunVerdict:
    """Verdicts on a run from its measurements, the last one thorough.

    Args:
        history: measurements in order of flow time, on the same shells.
        chi: loss exponent of the run, for the collapse; NaN if it has none.
        signs: of the regime (`lazy_or_rich`, `regime_signs`); the transport ratio is taken from the history if missing.
        num_null: shuffles of the times behind the p-value of the collapse.
        seed: of the private generator.

    Raises:
        ValueError: an empty history, or measurements on different shells.
    """
    if not history:
        raise ValueError("history must hold at least one measurement")
    if any(not torch.equal(c.edges, history[0].edges) for c in history):
        raise ValueError("history must be on the same shells; give measure_conditions the grid of the first one")
    last = history[-1]
    rescaling = time_rescaling_covariance(
        last.edges.numpy(),
        [c.flow_time for c in history],
        torch.stack([c.energy for c in history]).numpy(),
        torch.stack([c.flux for c in history]).numpy(),
        chi,
        num_null=num_null,
        seed=seed,
    )
    lost = sum(float(c.dissipation.sum()) for c in history)
    flux = sum(float(c.flux.abs().sum()) for c in history)
    known = {"transport_ratio": flux / lost if lost > 0 else math.nan, **(signs or {})}
    verdicts = [
        _propagation(history),
        _incoherence(history),
        _evolution(history),
        _log_shift(last),
        _rescaling(rescaling, chi),
        _locality(last),
    ]
    return RunVerdict(verdicts, lazy_or_rich(known), rescaling)


def _largest(history: Sequence[Conditions], value: str, group: str) -> Conditions | None:
    known = [c for c in history if math.isfinite(getattr(getattr(c, group), value))]
    return max(known, key=lambda c: getattr(getattr(c, group), value), default=None)


def _propagation(history: Sequence[Conditions]) -> Verdict:
    worst, name = _largest(history, "spread", "propagation"), "bounded gradient propagation"
    last = history[-1].propagation
    if worst is None:
        why = "gradients vanish at some layer" if len(last.names) > 1 else "one layer's input only: no depth to compare"
        return bounded(name, math.nan, math.nan, "-", math.nan, why)
    p = worst.propagation
    low, high = float(p.spectral_norms.max()), float(p.upper_bounds.max())
    norms = f"largest |dh_l+1/dh_l| {low:.3g}, at most {high:.3g} (99 %)"
    null = f"slope {last.slope:+.2g} a block"
    return bounded(name, p.spread, p.spread_error, null, last.p_value, f"step {worst.step}; {norms}")


def _incoherence(history: Sequence[Conditions]) -> Verdict:
    """At the first measurement at which two blocks have kernels: behind a head that starts at zero only one has."""
    name = "functional incoherence"
    first = next((c for c in history if math.isfinite(c.incoherence.cross_share)), None)
    if first is None:
        return bounded(name, math.nan, math.nan, "-", math.nan, "all blocks' kernels but one are zero")
    found = first.incoherence
    null = f"{found.null_mean:.3g} +- {found.null_error:.1g} in random bases"
    note = f"step {first.step}; mean C_lm {found.mean:.3g}, decay length {found.decay_length:.3g} blocks"
    return bounded(name, found.cross_share, found.cross_share_error, null, found.p_value, note)


def _evolution(history: Sequence[Conditions]) -> Verdict:
    worst, name = _largest(history, "kernel_speed", "evolution"), "controlled Jacobian evolution"
    if worst is None:
        return bounded(name, math.nan, math.nan, "-", math.nan, "the kernel is zero")
    found, last = worst.evolution, history[-1].evolution
    null = f"{last.null_kernel_speed:.2g} along random directions"
    fastest = int(found.speeds.nan_to_num(0.0).argmax())
    note = f"step {worst.step}; fastest block {found.names[fastest]!r}, {float(found.speeds[fastest]):.3g} / flow time"
    return bounded(name, found.kernel_speed, found.kernel_speed_error, null, math.nan, note)


def _log_shift(last: Conditions) -> Verdict:
    found, fine = last.couplings, last.refined
    zeta_error = last.errors.get("zeta", math.nan)
    note = found.reason or (
        f"zeta {found.zeta:.3g} +- {Z * zeta_error:.2g}, adjusted R^2 {found.adjusted_r2:.3g}, "
        f"floor {found.floor:.2g}; h / 2: defect {fine.defect:.3g}, zeta {fine.zeta:.3g}"
    )
    verdict = bounded(
        "log-shift invariance", found.defect, last.errors.get("defect", math.nan), "refused if p <= 0.05",
        found.p_value, note,
    )  # fmt: skip
    verdict = significant(verdict, "shuffled shells do as well")
    if verdict.verdict == HOLDS and not _same(found.zeta, fine.zeta, found.zeta_error, fine.zeta_error, zeta_error):
        verdict = _undecided(verdict, "zeta changes as shells are halved")
    gap = last.health.get("kink_gap", math.nan)
    if gap > LARGEST_KINK_GAP:
        verdict = _undecided(verdict, f"flips of gates add {gap:.2g} of |M'|, which is not in these couplings")
    return verdict


def _same(a: float, b: float, *errors: float) -> bool:
    """Whether two slopes agree within their errors; unknown ones (too few shells at h / 2) do not speak against it."""
    allowed = Z * math.sqrt(sum(e**2 for e in errors if math.isfinite(e)))
    return not math.isfinite(b) or abs(a - b) <= allowed


def _undecided(v: Verdict, why: str) -> Verdict:
    return Verdict(v.condition, v.value, v.lower, v.upper, v.null, v.p_value, UNDECIDED, f"{v.note}; {why}")


def _rescaling(found: TimeRescaling, chi: float) -> Verdict:
    r = found.residual
    if found.collapse_reason:
        collapse = f"no collapse score: {found.collapse_reason}"
    else:
        collapse = f"collapse {found.collapse:.3g} +- {Z * found.collapse_error:.2g} with chi {chi:.3g}"
    speed = found.reason or f"b {found.b.value:.3g} [{found.b.lower:.3g}, {found.b.upper:.3g}], p {found.p.value:.3g}"
    return covariant(r.value, r.lower, r.upper, "0", found.collapse_p, f"{speed}; {collapse}")


def _locality(last: Conditions) -> Verdict:
    found = last.couplings
    h = found.width
    error = h * last.errors.get("locality", math.nan)
    note = f"{found.locality:.3g} shells of h = {h:.2g}"
    verdict = bounded("locality of transfer", h * found.locality, error, "refused if p <= 0.05", found.locality_p, note)
    return significant(verdict, "shuffled shells are as local")
