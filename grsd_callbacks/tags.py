"""Every tag that is emitted: its unit and its meaning, once.

Shell curves are `grsd_shell_energy/<shell>` with the labels of `ShellGrid.names`. Conventions: THEORY, section 1.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from grsd_callbacks.collapse import run_collapse
from grsd_callbacks.emission import Emission, Histogram
from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.figures import FIGURES
from grsd_callbacks.renormalizability import DEFINITIONS, Conditions, RunVerdict
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.trajectory import exponent_closures


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


def _from_snapshot(name: str) -> Callable[[Conditions, Snapshot], float]:
    return lambda c, s: s.summary.get(name, math.nan)


_EXPONENTS = {
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
    **{
        f"grsd_exponents/{name}": Tag("1", meaning, _exponent(name, "exponent")) for name, meaning in _EXPONENTS.items()
    },
    **{
        f"grsd_bands/{name}_{end}": Tag("1", f"{end} end of the 95 % interval of {name}", _exponent(name, end))
        for name in _EXPONENTS
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
        "about (2 / effective rank)^(1/2), the CKA distance within a factor of 3 (not exact method)",
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
        "%", "measuring so far over the training time without it", _from("cost", "overhead_percent")
    ),
    "grsd_health/seconds": Tag("s", "wall-clock time of this measurement", _from("cost", "seconds")),
}

_OTHERS = [name for name in _EXPONENTS if name not in MAIN_EXPONENTS]
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

HISTOGRAMS = {
    "grsd_histograms/count": ("log10 lambda", "eigenvalues of M per shell"),
    "grsd_histograms/energy": ("log10 lambda", "shell energies E_a"),
    "grsd_histograms/dissipation": ("log10 lambda", "shell dissipation D_a"),
}
TEMPLATES = {
    f"{SHELL_ENERGY}/<shell>": ("loss", "E_a = 1/2 sum g_i^2 of the shell; resolved shells that hold energy"),
    f"{WORK}/total": (
        "loss",
        "-<r, sqrt(nu) J dtheta>: first-order loss decrease on the probe by the actual step after the measurement",
    ),
    f"{WORK}/effective_lr": ("1", "sum W_a / (lr sum D_a): 1 for full-batch gradient descent on the probe"),
    FAILED: ("count", "measurements that could not be made, or not be written in full, so far"),
    f"{FINAL}/<exponent>": (
        "1",
        "at the end, over the whole run: each exponent above; a_start, a of the first measurement; pi_c, loss after "
        "forgetting modes below lambda_c ~ lambda_c^pi_c; closure_<closure> (compression: chi / pi_c - rho); "
        "collapse and collapse_frozen, score of E t^chi over lambda t and lambda_0 t^rho (1: one curve; not above its "
        "_null: accident); "
        f"with `_lower` and `_upper`, the ends of the 95 % interval {NOT_DRAWN}",
    ),
}


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
VERDICT_TAGS = {
    name: f"grsd_verdict/{name.replace('-', '_').replace(' ', '_').lower()}" for name in DEFINITIONS
}
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


def conditions_card() -> str:
    """Markdown table of the conditions' tags (the text card `grsd_renorm/meaning`)."""
    return _card(_condition_rows())


def _condition_rows() -> list[tuple[str, str, str]]:
    rows = [(tag, unit, meaning) for tag, (unit, meaning, _) in CONDITION_TAGS.items()]
    return rows + [(tag, unit, meaning) for tag, (unit, meaning) in CONDITION_TEMPLATES.items()]


def scalars(snapshot: Snapshot) -> dict[str, float]:
    """Every scalar of a snapshot under its tag; NaN where there is no number."""
    values = {tag: float(spec.value(snapshot)) for tag, spec in TAGS.items()}
    for name, energy, resolved in zip(
        snapshot.grid.names(), snapshot.energy.tolist(), snapshot.resolved.tolist(), strict=True
    ):
        if resolved and energy > 0:
            values[f"{SHELL_ENERGY}/{name}"] = energy
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def update_scalars(snapshot: Snapshot) -> dict[str, float]:
    """The scalars known only after the optimizer step that follows a measurement."""
    total = float(snapshot.work.nan_to_num(0.0).sum()) if not bool(snapshot.work.isnan().all()) else math.nan
    values = {
        f"{WORK}/total": total,
        f"{WORK}/effective_lr": snapshot.summary.get("effective_lr", math.nan),
        "grsd_closure/probe": snapshot.closures.get("probe", math.nan),
        **{tag: TAGS[tag].value(snapshot) for tag in TRANSFER_TAGS},
    }
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def final_scalars(history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit]) -> dict[str, float]:
    """Exponents of the whole run, the closures between them and the collapse, with both ends of each interval."""
    parts = {name: (fit.exponent, fit.lower, fit.upper) for name, fit in fits.items()}
    parts |= {f"closure_{name}": (c.value, c.lower, c.upper) for name, c in exponent_closures(fits).items()}
    for name, frozen in (("collapse", False), ("collapse_frozen", True)):
        found = run_collapse(history, fits, frozen=frozen)
        parts[name] = (found.score.value, found.score.lower, found.score.upper)
        parts[f"{name}_null"] = (found.null, math.nan, math.nan)
    return {
        f"{FINAL}/{name}{end}": value
        for name, values in parts.items()
        for end, value in zip(("", "_lower", "_upper"), values)
        if math.isfinite(value) and (math.isfinite(values[1]) or name.endswith("_null"))
    }


def histograms(snapshot: Snapshot) -> dict[str, Histogram]:
    """Counts, energy and dissipation over log10 lambda, buckets = shells (the open ones one shell wide)."""
    logs = snapshot.edges.log10()
    width = float((logs[-1] - logs[0]) / (logs.numel() - 1))
    edges = [float(logs[0]) - width, *logs.tolist(), float(logs[-1]) + width]
    arrays = {"count": snapshot.counts, "energy": snapshot.energy, "dissipation": snapshot.dissipation}
    return {
        f"grsd_histograms/{name}": Histogram.from_buckets(edges, values.clamp_min(0.0).tolist())
        for name, values in arrays.items()
        if bool(torch.isfinite(values).all()) and float(values.sum()) > 0
    }


def emission(snapshot: Snapshot) -> Emission:
    """All that a measurement emits."""
    values = scalars(snapshot)
    return Emission(
        step=snapshot.step,
        scalars={tag: value for tag, value in values.items() if tag not in KEPT},
        kept={tag: value for tag, value in values.items() if tag in KEPT},
        histograms=histograms(snapshot),
        record=snapshot.to_dict(),
    )


def meanings() -> list[tuple[str, str, str]]:
    """Every tag with unit and meaning."""
    rows = [(tag, spec.unit, spec.meaning + (f" {NOT_DRAWN}" if tag in KEPT else "")) for tag, spec in TAGS.items()]
    rows += [(tag, unit, meaning) for tag, (unit, meaning) in {**TEMPLATES, **HISTOGRAMS, **FIGURES}.items()]
    return rows + _condition_rows()


def meaning_card() -> str:
    """Markdown table of every tag with unit and meaning (the text card `grsd_run/tags`)."""
    return _card(meanings())


def _card(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| tag | unit | meaning |", "|---|---|---|"]
    lines += [f"| `{tag}` | {unit} | {meaning.replace('|', chr(92) + '|')} |" for tag, unit, meaning in rows]
    return "\n".join(lines)


def preformatted(text: str) -> str:
    """Plain text as Markdown that keeps its lines."""
    return f"```\n{text}\n```"


def layout(prefix: str = "grsd_") -> dict[str, Any]:
    """TensorBoard custom-scalars layout: what is learning, the exponents with their bands, the regime, the checks."""

    def lines(*tags: str) -> list[Any]:
        return ["Multiline", [re.escape(_with(prefix, tag)) + "$" for tag in tags]]

    def bands(names: Iterable[str]) -> dict[str, list[Any]]:
        tags = {n: (f"grsd_exponents/{n}", f"grsd_bands/{n}_lower", f"grsd_bands/{n}_upper") for n in names}
        drawn = {f"{n}: {_EXPONENTS[n]}": ["Margin", [_with(prefix, tag) for tag in tags[n]]] for n in tags}
        return dict(reversed(drawn.items()))  # TensorBoard shows margin charts in reverse

    first = prefix.rstrip("_")
    return {
        f"{first} 1: what is learning": {
            "loss on the probe (loss)": lines("grsd_loss/probe"),
            "energy of each shell (loss)": ["Multiline", [_with(prefix, f"{SHELL_ENERGY}/s.*")]],
            "largest and mean eigenvalue (1 / flow time)": lines(
                "grsd_spectrum/lambda_max", "grsd_spectrum/mean_eigenvalue"
            ),
        },
        f"{first} 2: exponents, bands are 95 % intervals": bands(MAIN_EXPONENTS),
        f"{first} 3: lazy or rich": {
            "transport over dissipation (0: lazy)": lines("grsd_regime/transport_ratio"),
            "change of the kernel since the start": lines("grsd_regime/kernel_drift", "grsd_regime/cka_distance"),
            "effective learning rate (1: full-batch descent)": lines(f"{WORK}/effective_lr"),
        },
        f"{first} 4: can I trust it": {
            "identities (rounding is about 1e-7)": lines("grsd_closure/energy", "grsd_closure/dissipation"),
            "lr x lambda_max (above 2: no gradient flow)": lines("grsd_health/lr_lambda_max"),
            "time spent on measuring (%)": lines("grsd_health/overhead_percent"),
        },
    }


def _with(prefix: str, tag: str) -> str:
    return prefix + tag.removeprefix("grsd_")


MEANING, REPORT, SUMMARY = "grsd_run/tags", "grsd_run/report", "grsd_run/summary"


def renamed(emission: Emission, prefix: str) -> Emission:
    """The same emission with tags that begin with another prefix than `grsd_`."""

    def names(values: dict[str, Any]) -> dict[str, Any]:
        return {_with(prefix, tag): value for tag, value in values.items()}

    return replace(
        emission,
        scalars=names(emission.scalars),
        kept=names(emission.kept),
        histograms=names(emission.histograms),
        texts=names(emission.texts),
        figures=names(emission.figures),
    )


if __name__ == "__main__":
    print(meaning_card())
