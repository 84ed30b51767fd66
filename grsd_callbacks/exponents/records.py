"""What a fit hands back: small frozen records that carry their own status.

Wrong *use* raises; numerical *failure* is data: a refused fit is a record whose numbers are NaN and whose
`reason` says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

VERDICTS = ("power_law", "broken", "exponential", "floor", "undecided")


@dataclass(frozen=True, eq=False)
class PowerLawFit:
    """One fitted exponent with its interval, its window and what speaks for and against a power law.

    Attributes:
        exponent: the fitted exponent; NaN when the fit was refused. Its sign convention is the function's that made it.
        lower: lower end of the confidence interval (95 % by default).
        upper: upper end of the confidence interval.
        amplitude: `A` of `y = A x^slope`, inf or 0 where that is beyond floats (for `fit_tail`: the number of
            eigenvalues in the tail).
        window: smallest and largest x that entered the fit.
        num_points: points that entered the fit, after masking, window and thinning.
        num_decades: `log10(x_high / x_low)` over those points.
        verdict: `"power_law"`, `"broken"` (one break), `"exponential"`, `"floor"` (power law plus a constant) or
            `"undecided"`. With any verdict but `"power_law"` the exponent is the mean log-log slope over the window.
        reason: why the fit was refused or left undecided; empty otherwise.
        evidence: named numbers behind the verdict. `bic_<shape>` is BIC(shape) - BIC(power law): below zero speaks
            for that shape; `deviation_<shape>` is the median distance in log y between that shape and the line.

    Example:
        >>> import numpy as np
        >>> from grsd_callbacks.exponents import fit_power_law
        >>> x = np.logspace(0, 2, 20)
        >>> fit = fit_power_law(x, 3.0 * x**-0.5)
        >>> round(fit.exponent, 6), round(float(fit.predict(100.0)), 6), fit.verdict
        (-0.5, 0.3, 'power_law')
    """

    exponent: float
    lower: float
    upper: float
    amplitude: float
    window: tuple[float, float]
    num_points: int
    num_decades: float
    verdict: str
    reason: str = ""
    evidence: dict[str, float] = field(default_factory=dict)
    slope_sign: int = 1

    @property
    def refused(self) -> bool:
        """Whether no exponent was reported."""
        return math.isnan(self.exponent)

    def predict(self, x) -> np.ndarray:
        """The fitted straight line `amplitude * x^slope` at `x` (same unit as the fitted x)."""
        return self.amplitude * np.asarray(x, dtype=float) ** (self.slope_sign * self.exponent)


@dataclass(frozen=True, eq=False)
class Estimate:
    """A number with its confidence interval.

    Attributes:
        value: the estimate; NaN when an ingredient was refused.
        lower: lower end of the interval.
        upper: upper end of the interval.
    """

    value: float
    lower: float
    upper: float


@dataclass(frozen=True, eq=False)
class Closure(Estimate):
    """The residual of an identity between exponents; zero where the identity holds."""

    @property
    def holds(self) -> bool:
        """Whether zero lies in the interval (False for NaN). A wide interval holds easily: look at its width too."""
        return self.lower <= 0.0 <= self.upper


@dataclass(frozen=True, eq=False)
class VelocityExponents:
    """Exponents of the spectral velocity `|v| = c lambda^b t^p`.

    Attributes:
        b: exponent of lambda.
        p: exponent of the flow time.
        covariance_residual: `p - (b - 2)`, zero under time-rescaling covariance.
        amplitude: c.
        num_points: points used.
        same_sign: share of the points whose velocity has the majority's sign.
        reason: why the fit was refused; empty otherwise.
    """

    b: Estimate
    p: Estimate
    covariance_residual: Closure
    amplitude: float
    num_points: int
    same_sign: float
    reason: str = ""


def from_log(value: float) -> float:
    """exp(value), infinite where floats end: amplitudes of steep laws, extrapolated to x = 1, can lie beyond."""
    return math.exp(value) if value < 709.0 else math.inf


def refused_fit(reason: str, *, window, num_points: int, num_decades: float, evidence=None) -> PowerLawFit:
    """A record without an exponent: NaN, `"undecided"` and the reason."""
    nan = math.nan
    low, high = window
    return PowerLawFit(
        nan, nan, nan, nan, (float(low), float(high)), int(num_points), float(num_decades), "undecided", reason,
        evidence or {},
    )  # fmt: skip


def negated(fit: PowerLawFit) -> PowerLawFit:
    """The same fit with the exponent counted positive for decay; the interval is mirrored."""
    return replace(fit, exponent=-fit.exponent, lower=-fit.upper, upper=-fit.lower, slope_sign=-fit.slope_sign)
