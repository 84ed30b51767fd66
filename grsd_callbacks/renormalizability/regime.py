"""Lazy or rich? Five signs with thresholds, and the reason for each threshold.

A relative change x of the kernel changes rates by at most x: below 10 % it is inside the intervals that exponents of
a single run have, so the frozen-kernel laws cannot be told from the true ones (lazy); above 50 % they are wrong by
more than those intervals (rich). The other thresholds follow from these two: a pure rotation by x changes 1 - CKA by
x^2 / 2, an alignment by x of itself, and energy moved between shells counts like energy dissipated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from grsd_callbacks.arguments import checked

SMALL, LARGE = 0.1, 0.5
#: name of a sign: (lazy below, rich above)
THRESHOLDS = {
    "transport_ratio": (SMALL, LARGE),
    "kernel_drift": (SMALL, LARGE),
    "cka_distance": (SMALL**2 / 2, LARGE**2 / 2),
    "alignment_change": (SMALL, LARGE),
    "rho_minus_1": (SMALL, LARGE),
}


@dataclass(frozen=True, eq=False)
class Regime:
    """What the signs say.

    Attributes:
        label: "lazy" (every known sign of kernel_drift, cka_distance and transport_ratio is), "rich" (kernel_drift or
            cka_distance is, and the alignment, transport or rho), or "undecided".
        signs: value by sign, NaN where it was not measured.
        votes: "lazy", "rich", "between" or "unknown" by sign.
    """

    label: str
    signs: dict[str, float]
    votes: dict[str, str]


@checked
def lazy_or_rich(signs: Mapping[str, float]) -> Regime:
    """Vote on the regime of a run from its largest signs.

    Args:
        signs: some of `THRESHOLDS`: transport_ratio `sum |J_b| / sum D_a`, kernel_drift `|M - M_0|_F / |M_0|_F`,
            cka_distance `1 - CKA(M, M_0)`, alignment_change `|A / A_0 - 1|` of the kernel-target alignment, and
            rho_minus_1, the frontier's exponent less its lazy value (for rho, hand in the end of its interval nearer
            to 1, so that noise does not vote).

    Raises:
        ValueError: an unknown sign.

    Source: thresholds are this package's own.

    Example:
        >>> lazy_or_rich({"kernel_drift": 0.02, "cka_distance": 1e-4, "transport_ratio": 0.01}).label
        'lazy'
        >>> lazy_or_rich({"kernel_drift": 0.9, "cka_distance": 0.3, "transport_ratio": 0.6}).label
        'rich'
    """
    if unknown := sorted(set(signs) - set(THRESHOLDS)):
        raise ValueError(f"unknown signs {unknown}; known are {sorted(THRESHOLDS)}")
    values = {name: float(signs.get(name, math.nan)) for name in THRESHOLDS}
    votes = {name: _vote(value, *THRESHOLDS[name]) for name, value in values.items()}
    kernel = [votes["kernel_drift"], votes["cka_distance"]]
    effect = [votes[name] for name in ("transport_ratio", "alignment_change", "rho_minus_1")]
    known = [vote for vote in (*kernel, votes["transport_ratio"]) if vote != "unknown"]
    if known and "unknown" not in kernel and set(known) == {"lazy"}:
        label = "lazy"
    else:
        label = "rich" if "rich" in kernel and "rich" in effect else "undecided"
    return Regime(label, values, votes)


def _vote(value: float, lazy: float, rich: float) -> str:
    if not math.isfinite(value):
        return "unknown"
    return "lazy" if value < lazy else "rich" if value > rich else "between"
