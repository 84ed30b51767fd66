"""The curves of the conditions of renormalizable shell dynamics, and of the verdicts at the end."""

from __future__ import annotations

import math
from collections.abc import Callable

from grsd_callbacks.renormalizability import DEFINITIONS, Conditions, RunVerdict
from grsd_callbacks.snapshot import Snapshot


def _from_snapshot(name: str) -> Callable[[Conditions, Snapshot], float]:
    return lambda c, s: s.summary.get(name, math.nan)


#: curves of the conditions: unit, meaning, value of the measurement and of the shells' snapshot at the same instant
CONDITION_TAGS: dict[str, tuple[str, str, Callable[[Conditions, Snapshot], float]]] = {
    "grsd_renorm/gradient_spread": (
        "decades",
        "log10 of the largest over the smallest |dL/dh_l| over depth",
        lambda c, s: c.propagation.spread,
    ),
    "grsd_renorm/spectral_norm": (
        "1",
        "largest |d h_{l+1} / d h_l| over blocks and samples of the probe",
        lambda c, s: float(c.propagation.spectral_norms.max()),
    ),
    "grsd_renorm/spectral_norm_upper": (
        "1",
        "its upper bound, right with probability 0.99",
        lambda c, s: float(c.propagation.upper_bounds.max()),
    ),
    "grsd_renorm/cross_share": (
        "1",
        "sum_{l != m} tr(M_l M_m) / sum_l |M_l|_F^2: 0 for orthogonal blocks, blocks - 1 for equal ones",
        lambda c, s: c.incoherence.cross_share,
    ),
    "grsd_renorm/coherence": ("1", "mean of C_lm over pairs of blocks", lambda c, s: c.incoherence.mean),
    "grsd_renorm/decay_length": (
        "blocks",
        "length over which C_lm decays with |l - m|; not emitted where it does not",
        lambda c, s: c.incoherence.decay_length,
    ),
    "grsd_renorm/kernel_speed": (
        "1",
        "|M'|_F / |M|_F^2 along -grad L: relative change of the kernel in its own fastest time",
        lambda c, s: c.evolution.kernel_speed,
    ),
    "grsd_renorm/jacobian_speed": (
        "1 / flow time",
        "|J_l'|_F / |J_l|_F of the fastest block (estimate from 8 random vectors)",
        lambda c, s: float(c.evolution.speeds.nan_to_num(0.0).max()),
    ),
    "grsd_renorm/jacobian_speed_error": (
        "1 / flow time",
        "standard error of that estimate",
        lambda c, s: float(c.evolution.speed_errors[c.evolution.speeds.nan_to_num(0.0).argmax()]),
    ),
    "grsd_renorm/defect": (
        "1",
        "Toeplitz defect: sd of the residual of log R_ab = k(|a-b|) + zeta (s_a+s_b)/2; 0 is log-shift invariance",
        lambda c, s: c.couplings.defect,
    ),
    "grsd_renorm/defect_floor": (
        "1",
        "what finite numbers of modes alone would give to Gaussian couplings",
        lambda c, s: c.couplings.floor,
    ),
    "grsd_renorm/defect_refined": ("1", "the defect with every shell cut in two", lambda c, s: c.refined.defect),
    "grsd_renorm/zeta": ("1", "power of lambda that couplings grow with", lambda c, s: c.couplings.zeta),
    "grsd_renorm/zeta_error": (
        "1",
        "standard error of zeta from the scatter of the couplings",
        lambda c, s: c.couplings.zeta_error,
    ),
    "grsd_renorm/adjusted_r2": (
        "1",
        "share of the variance of log R_ab explained by distance and zeta, adjusted",
        lambda c, s: c.couplings.adjusted_r2,
    ),
    "grsd_renorm/locality": (
        "shells",
        "sum |T_ab| |a-b| / sum |T_ab|: mean distance of the transfer by rotation",
        lambda c, s: c.couplings.locality,
    ),
    "grsd_renorm/transport_ratio": (
        "1",
        "sum |J_b| / sum D_a, instantaneous, along -grad L (windows of half a shell)",
        lambda c, s: c.transport_ratio,
    ),
    "grsd_renorm/kernel_drift": (
        "1",
        "|M - M_0|_F / |M_0|_F since the first measurement, on this callback's probe",
        _from_snapshot("kernel_drift"),
    ),
    "grsd_renorm/cka_distance": (
        "1",
        "1 - CKA(M, M_0) since the first measurement, on this callback's probe",
        _from_snapshot("cka_distance"),
    ),
    "grsd_renorm/overhead_percent": (
        "%",
        "measuring of this callback so far over the training time without it (nulls and resampling at the end not in)",
        lambda c, s: c.cost.get("overhead_percent", math.nan),
    ),
    "grsd_renorm/seconds": (
        "s",
        "wall-clock time of this measurement of the conditions",
        lambda c, s: c.cost.get("seconds", math.nan),
    ),
}
CONDITIONS_FAILED = "grsd_renorm/failed"
CONDITIONS_MEANING, VERDICTS, CONDITIONS_FIGURE = (
    "grsd_renorm/meaning",
    "grsd_renorm/verdicts",
    "grsd_renorm/conditions",
)
#: once, at the end of a run
VERDICT_TAGS = {name: f"grsd_verdict/{name.replace('-', '_').replace(' ', '_').lower()}" for name in DEFINITIONS}
CONDITION_TEMPLATES = {
    CONDITIONS_FAILED: ("count", "measurements of the conditions that could not be made so far"),
    **{
        tag: ("flag", f"1 {name} holds, 0 it fails, 0.5 undecided; at the end of the run")
        for name, tag in VERDICT_TAGS.items()
    },
    CONDITIONS_FIGURE: ("figure", "verdicts with gradients over depth, block coherence, couplings and their course"),
}


def condition_scalars(found: Conditions, snapshot: Snapshot) -> dict[str, float]:
    """Every curve of one measurement of the conditions."""
    values = {tag: float(value(found, snapshot)) for tag, (_, _, value) in CONDITION_TAGS.items()}
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def verdict_scalars(verdict: RunVerdict) -> dict[str, float]:
    """What held, as numbers."""
    return {VERDICT_TAGS[v.condition]: {"holds": 1.0, "fails": 0.0}.get(v.verdict, 0.5) for v in verdict.verdicts}
