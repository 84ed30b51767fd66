"""From measured conditions to a table that says what holds, against which null, and by which definition.

The conditions are named in arXiv:2512.18209; how each is measured, and every threshold, is this package's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from grsd_callbacks.arguments import checked

OWN = "operational definitions and thresholds are this package's own, not those of arXiv:2512.18209"
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
#: quantile of the normal law for 95 % intervals from standard errors
Z = 1.96
#: level of the nulls
LEVEL = 0.05

#: largest values for "holds", with the reason
LIMITS: dict[str, tuple[float, str]] = {
    "bounded gradient propagation": (1.0, "one decade over all depth: squared norms, that kernels add, within 100"),
    "functional incoherence": (1.0, "|M|_F^2 within a factor of 2 of incoherent blocks'"),
    "controlled Jacobian evolution": (1.0, "the kernel changes by less than itself in its own fastest time 1 / |M|_F"),
    "log-shift invariance": (0.25, "a third of a shell (h = 0.77) for couplings proportional to lambda"),
    "time-rescaling covariance": (0.5, "half-width of an interval that still tells exponents apart"),
    "locality of transfer": (math.log(10), "mean distance of transfer within a decade of lambda"),
}
DEFINITIONS: dict[str, str] = {
    "bounded gradient propagation": "decades between the largest and the smallest |dL/dh_l| over depth, largest over "
    "the run; null: shuffled depth (slope of the log norms, at the end)",
    "functional incoherence": "sum_{l != m} tr(M_l M_m) / sum_l |M_l|_F^2 of block kernels at the first measurement; "
    "null: blocks of the same spectra in random bases",
    "controlled Jacobian evolution": "|M'|_F / |M|_F^2 along -grad L, largest over the run; null: random directions "
    "of the same length, at the end",
    "log-shift invariance": "sd of the residual of log R_ab = k(|a-b|) + zeta (s_a+s_b)/2, last measurement; "
    "null: shuffled shells",
    "time-rescaling covariance": "p - (b - 2) of v = c lambda^b t^p; null: shuffled times (collapse of E t^chi)",
    "locality of transfer": "mean log distance h sum |T_ab| |a-b| / sum |T_ab|, last measurement; "
    "null: shuffled shells",
}


@dataclass(frozen=True, eq=False)
class Verdict:
    """One row of the table.

    Attributes:
        condition: its name, a key of `DEFINITIONS`.
        value, lower, upper: the measured number and its 95 % interval.
        null: what the number would be under the null, in words, or how likely.
        p_value: of the null; NaN where it gives none.
        verdict: "holds", "fails" or "undecided".
        note: other numbers, or why it is undecided.
    """

    condition: str
    value: float
    lower: float
    upper: float
    null: str
    p_value: float
    verdict: str
    note: str = ""

    @property
    def limit(self) -> float:
        """Largest value that counts as holding."""
        return LIMITS[self.condition][0]

    @property
    def definition(self) -> str:
        """How the value is defined here."""
        return DEFINITIONS[self.condition]


def below_limit(lower: float, upper: float, limit: float) -> str:
    """Holds if the whole interval is at most the limit, fails if all of it lies above, else (or NaN) undecided."""
    return HOLDS if upper <= limit else FAILS if lower > limit else UNDECIDED


def bounded(condition: str, value: float, error: float, null: str, p_value: float, note: str = "") -> Verdict:
    """The verdict on a non-negative number that has to stay below its limit."""
    lower, upper = max(value - Z * error, 0.0), value + Z * error
    lower = lower if math.isfinite(error) else math.nan
    return Verdict(condition, value, lower, upper, null, p_value, below_limit(lower, upper, LIMITS[condition][0]), note)


def significant(verdict: Verdict, note: str) -> Verdict:
    """The same verdict, but "holds" only if the null is refused at `LEVEL`."""
    if verdict.verdict != HOLDS or verdict.p_value <= LEVEL:
        return verdict
    joined = "; ".join(part for part in (verdict.note, note) if part)
    v = verdict
    return Verdict(v.condition, v.value, v.lower, v.upper, v.null, v.p_value, UNDECIDED, joined)


def covariant(value: float, lower: float, upper: float, null: str, p_value: float, note: str = "") -> Verdict:
    """The verdict on a residual that should be zero: its interval has to contain zero and be narrow."""
    name = "time-rescaling covariance"
    wide = not (upper - lower) / 2 <= LIMITS[name][0]
    excluded = lower > 0 or upper < 0
    verdict = FAILS if excluded else UNDECIDED if wide or not math.isfinite(value) else HOLDS
    return Verdict(name, value, lower, upper, null, p_value, verdict, note)


#: heads of the columns of `table_rows`
COLUMNS = ("condition", "value", "95 % interval", "limit", "null", "p", "verdict")


def table_rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """The cells of the table, one row a verdict."""
    rows: list[tuple[str, ...]] = []
    for v in verdicts:
        interval = f"[{v.lower:.3g}, {v.upper:.3g}]" if math.isfinite(v.upper) else "-"
        limit = f"{v.limit:.3g}" if v.condition != "time-rescaling covariance" else f"0 +- {v.limit:.2g}"
        p = f"{v.p_value:.2g}" if math.isfinite(v.p_value) else "-"
        value = f"{v.value:.3g}" if math.isfinite(v.value) else "-"
        rows.append((v.condition, value, interval, limit, v.null, p, v.verdict))
    return rows


@checked
def verdict_table(verdicts: Sequence[Verdict], regime: str = "") -> str:
    """The verdicts as plain text, with definitions and limits beside them."""
    rows = [COLUMNS, *table_rows(verdicts)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = ["conditions of renormalizable shell dynamics on this run", ""]
    lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", *([regime, ""] if regime else [])]
    for v in verdicts:
        lines += [f"{v.condition}: {v.definition}.", f"    limit {v.limit:.3g}: {LIMITS[v.condition][1]}."]
        lines += [f"    {v.note}"] if v.note else []
    return "\n".join([*lines, "", OWN + "."])
