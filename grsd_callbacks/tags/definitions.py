"""The curves of a measurement: unit, meaning, and where the value stands in a snapshot."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from grsd_callbacks.snapshot import Snapshot


@dataclass(frozen=True)
class Tag:
    """One emitted curve.

    Attributes:
        unit: unit, "1" for pure numbers.
        meaning: one sentence.
        value: reads it from a snapshot; NaN is not drawn.
    """

    unit: str
    meaning: str
    value: Callable[[Snapshot], float]


def _from(group: str, name: str) -> Callable[[Snapshot], float]:
    return lambda s: getattr(s, group).get(name, math.nan)


def _exponent(name: str, part: str) -> Callable[[Snapshot], float]:
    return lambda s: getattr(s.exponents[name], part) if name in s.exponents else math.nan


#: exponents and what they are the exponent of
EXPONENTS = {
    "a": "spectrum decay, lambda_i ~ i^-a",
    "q": "energy over scales, E_a ~ lambda^q, on shells not yet decayed",
    "chi": "loss decay, L ~ t^-chi in flow time",
    "chi_tail": "loss decay with the energy of modes beyond the probe added, after the law of q (exact method)",
    "chi_local": "loss decay over the last decade of flow time",
    "rho": "frontier, energy median in the frozen first basis (with that energy below it) falls as t^-rho",
    "rho_contour": "frontier, lambda where modes of the frozen first basis have made the progress 1/2, falls as t^-rho",
    "rho_local": "rho_contour over the last decade of flow time",
    "count": "eigenvalues per shell, N_a ~ lambda^-n: 1/a for a power law",
    "densing": "modes of the first basis above the frontier (rho_contour), k* ~ t^densing: rho/a",
    "b": "spectral velocity |v| ~ lambda^b t^p of the energy through shell edges: exponent of lambda",
    "p": "spectral velocity |v| ~ lambda^b t^p of the energy through shell edges: exponent of flow time",
}
#: exponents whose course is drawn; the others are in the JSON lines, the metrics and the summary
MAIN_EXPONENTS = ("a", "q", "chi", "rho", "rho_contour")
_CLOSURES = {
    "chi_minus_rho_q": "chi - rho q, q of the first measurement (chi_tail, rho_contour where known): 0 in a power law",
    "count_slope": "n - 1/a: 0 where the spectrum is a power law",
    "densing": "exponent of k* less rho/a, a of the first measurement: 0 in a power law",
    "covariance": "p - (b - 2): 0 under time-rescaling covariance",
}


def _closure_tags() -> dict[str, Tag]:
    ends = {"": "", "_lower": "lower end of the 95 % interval of ", "_upper": "upper end of the 95 % interval of "}
    return {
        f"grsd_closure/{name}{end}": Tag("1", (text + name) if text else meaning, _from("closures", f"{name}{end}"))
        for name, meaning in _CLOSURES.items()
        for end, text in ends.items()
    }


TAGS: dict[str, Tag] = {
    "grsd_loss/probe": Tag("loss", "L on the probe", lambda s: s.loss),
    "grsd_loss/grad_norm_sq": Tag(
        "loss / flow time", "|grad L|^2 on the probe, by a backward pass of its own", lambda s: s.grad_norm_sq
    ),
    "grsd_time/flow_time": Tag(
        "learning rate x steps", "t, the sum of learning rates (heavy ball: lr / (1 - momentum))", lambda s: s.flow_time
    ),
    "grsd_time/lr": Tag("learning rate", "lr of the coming step", _from("summary", "lr")),
    "grsd_spectrum/lambda_max": Tag(
        "1 / flow time",
        "largest eigenvalue of M = nu J J^T (krylov and randomized: a lower bound)",
        _from("summary", "lambda_max"),
    ),
    "grsd_spectrum/trace": Tag("1 / flow time", "tr M (krylov: unbiased estimate)", _from("summary", "trace")),
    "grsd_spectrum/trace_error": Tag(
        "1 / flow time", "standard error of tr M, 0 where exact", _from("summary", "trace_error")
    ),
    "grsd_spectrum/effective_rank": Tag(
        "1",
        "(tr M)^2 / tr M^2 (krylov: ratio of two estimates from one random vector)",
        _from("summary", "effective_rank"),
    ),
    "grsd_spectrum/mean_eigenvalue": Tag(
        "1 / flow time",
        "dissipation-weighted mean eigenvalue r^T M^2 r / r^T M r: the scale that is learning now (not rho)",
        _from("summary", "mean_eigenvalue"),
    ),
    "grsd_position/relative": Tag(
        "1", "spectral position: mean_eigenvalue / lambda_max", _from("summary", "position_relative")
    ),
    "grsd_position/to_mean": Tag(
        "1", "spectral position: mean_eigenvalue / (tr M / m)", _from("summary", "position_to_mean")
    ),
    "grsd_position/rank": Tag(
        "count", "spectral position: number of eigenvalues above mean_eigenvalue", _from("summary", "position_rank")
    ),
    "grsd_position/reach": Tag(
        "1", "spectral reach: smallest grsd_position/relative so far", _from("summary", "reach_relative")
    ),
    "grsd_position/reach_rank": Tag(
        "count", "spectral reach: largest grsd_position/rank so far", _from("summary", "reach_rank")
    ),
    "grsd_position/resolved_modes": Tag(
        "count", "k*, modes of the first basis above the frontier rho_contour", _from("summary", "resolved_modes")
    ),
    "grsd_regime/transport_ratio": Tag(
        "1", "sum |J_b| / sum D_a over the interval: 0 is lazy", _from("summary", "transport_ratio")
    ),
    "grsd_regime/kernel_drift": Tag(
        "1", "|M - M_0|_F / |M_0|_F since the first measurement", _from("summary", "kernel_drift")
    ),
    "grsd_regime/cka_distance": Tag(
        "1",
        "1 - CKA(M, M_0), kernels centred over the probe: change of shape, not of size",
        _from("summary", "cka_distance"),
    ),
    "grsd_regime/target_alignment": Tag(
        "1", "y^T M y / (|M|_F |y|^2), y the targets (class indicators, centred)", _from("summary", "target_alignment")
    ),
    "grsd_regime/frozen_kernel_share": Tag(
        "1",
        "share of the change of r since the last measurement that the old, frozen kernel explains: "
        "1 - |r - (1 - lr M)^k r_old|^2 / |r - r_old|^2 (squared loss only)",
        _from("summary", "frozen_kernel_share"),
    ),
    **{f"grsd_exponents/{name}": Tag("1", meaning, _exponent(name, "exponent")) for name, meaning in EXPONENTS.items()},
    **{
        f"grsd_bands/{name}_{end}": Tag("1", f"{end} end of the 95 % interval of {name}", _exponent(name, end))
        for name in EXPONENTS
        for end in ("lower", "upper")
    },
    "grsd_closure/energy": Tag(
        "1", "(sum E - L) / L: rounding for a squared loss; not emitted else", _from("closures", "energy")
    ),
    "grsd_closure/dissipation": Tag(
        "1",
        "(sum D - |grad L|^2) / |grad L|^2: rounding for every loss; not emitted for a projection of the outputs",
        _from("closures", "dissipation"),
    ),
    "grsd_closure/transport": Tag(
        "1", "|sum of transport| / sum |transport|: rounding for every run", _from("closures", "transport")
    ),
    "grsd_closure/budget": Tag(
        "1",
        "-(L - L_old) / dt over the mean of sum D at both ends: 1 for gradient flow on the probe resolved in time",
        _from("closures", "budget"),
    ),
    "grsd_closure/probe": Tag(
        "1",
        "|grad L|^2 dt / work of the actual step: 1 if the probe is what is trained on, full batch, in flow time",
        _from("closures", "probe"),
    ),
    **_closure_tags(),
    "grsd_transfer/rotation_share": Tag(
        "1",
        "sum |rotation flux| / (sum |rotation flux| + sum |drift flux|), instantaneous",
        _from("summary", "rotation_share"),
    ),
    "grsd_transfer/transport_ratio": Tag(
        "1", "sum |J_b| / sum D_a, instantaneous, along the step taken", _from("summary", "instant_transport_ratio")
    ),
    "grsd_health/kink_gap": Tag(
        "1",
        "|difference quotient of the kernel over the actual update - M'| / |M'|: what flips of gates add to the "
        "instantaneous flux, which is the smooth part only (exact method)",
        _from("health", "kink_gap"),
    ),
    "grsd_health/velocity_gap": Tag(
        "1",
        "M' by double backward against central differences, once at the start (exact method)",
        _from("health", "velocity_gap"),
    ),
    "grsd_health/transfer_coverage": Tag(
        "1", "share of |r|^2 that the basis behind the instantaneous flux holds", _from("health", "transfer_coverage")
    ),
    "grsd_health/lr_lambda_max": Tag(
        "1", "lr x lambda_max: above 2 plain descent leaves gradient flow", _from("health", "lr_lambda_max")
    ),
    "grsd_health/unstable": Tag(
        "flag",
        "1 if lr x lambda_max > 2: read no gradient-flow law into this instant (squared loss; for "
        "cross-entropy the loss's curvature is below 1, and the true limit higher)",
        _from("health", "unstable"),
    ),
    "grsd_health/nominal_flow_time": Tag(
        "flag",
        "1 if flow time is only nominal: adaptive optimizer, several learning rates or several optimizers",
        _from("health", "nominal_flow_time"),
    ),
    "grsd_health/unresolved_energy": Tag(
        "1", "share of the energy in shells that are not resolved", _from("health", "unresolved_energy")
    ),
    "grsd_health/estimated_regime": Tag(
        "flag",
        "1 if kernel_drift, cka_distance and target_alignment are estimates from one random vector: the drift to "
        "about (2 / effective rank)^(1/2), the CKA distance within a factor of 3 (not exact method; of lanczos the "
        "alignment is exact too)",
        _from("health", "estimated_regime"),
    ),
    "grsd_health/estimated_position": Tag(
        "flag",
        "1 if the position's lambda_max, tr M and rank are estimates (not exact method; mean_eigenvalue is exact)",
        _from("health", "estimated_position"),
    ),
    "grsd_health/frozen_coverage": Tag(
        "1",
        "share of |r|^2 that the frozen first basis holds (1 when exact); below 0.9 there is no frontier",
        _from("health", "frozen_coverage"),
    ),
    "grsd_health/coverage": Tag(
        "1", "share of |r|^2 that the bases behind the flux hold (1 when exact)", _from("health", "coverage")
    ),
    "grsd_health/gradient_free_parameters": Tag(
        "count", "parameter tensors without gradient on the probe", _from("health", "gradient_free_parameters")
    ),
    "grsd_health/overhead_percent": Tag(
        "%",
        "measuring so far over the training time without it (no imports, but matplotlib's for figures during the run)",
        _from("cost", "overhead_percent"),
    ),
    "grsd_health/seconds": Tag("s", "wall-clock time of this measurement", _from("cost", "seconds")),
}

_OTHERS = [name for name in EXPONENTS if name not in MAIN_EXPONENTS]
#: kept in JSON lines and metrics, not drawn: a run shows about 60 curves, those that people read
KEPT = frozenset(
    {
        *(f"grsd_exponents/{name}" for name in _OTHERS),
        *(f"grsd_bands/{name}_{end}" for name in _OTHERS for end in ("lower", "upper")),
        *_closure_tags(),
        "grsd_time/lr",
        "grsd_spectrum/trace",
        "grsd_spectrum/trace_error",
        "grsd_position/to_mean",
        "grsd_position/rank",
        "grsd_position/reach_rank",
        "grsd_position/resolved_modes",
        "grsd_health/unstable",
        "grsd_health/estimated_position",
        "grsd_health/frozen_coverage",
        "grsd_health/gradient_free_parameters",
        "grsd_health/seconds",
    }
)
NOT_DRAWN = "(kept in JSON lines and callback_metrics, not drawn)"

#: known only after the optimizer step that follows a measurement
TRANSFER_TAGS = (
    "grsd_transfer/rotation_share",
    "grsd_transfer/transport_ratio",
    "grsd_health/kink_gap",
    "grsd_health/velocity_gap",
    "grsd_health/transfer_coverage",
)
#: emitted when a measurement could not be made
FAILED = "grsd_health/failed"
#: curves that follow the optimizer step after a measurement
WORK = "grsd_work"
SHELL_ENERGY = "grsd_shell_energy"
#: exponents and closures of the whole run, once at its end
FINAL = "grsd_final"
