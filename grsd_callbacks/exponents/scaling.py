"""A power law above a floor, and whether exponents fit together: `A x^-alpha + floor`, closures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from . import checks, intervals, shapes
from .powerlaw import _refused, _too_little
from .records import Closure, Estimate, PowerLawFit, from_log

_EXPONENTS = np.geomspace(0.005, 20.0, 160)


def fit_scaling_law(
    x,
    y,
    *,
    y_error=None,
    confidence: float = 0.95,
    min_points: int = 5,
    min_decades: float = 1.0,
    compare: bool = True,
) -> PowerLawFit:
    """Fit `y = A x^-alpha + floor` with floor >= 0 over several runs; alpha is returned **positive**.

    Least squares in log y. The interval is the profile likelihood's: all alpha for which *some* amplitude and floor
    fit no worse than `SSR_min (1 + F / (n - 3))`, F = Student quantile squared. So it is wide, or open, where the
    data do not pin the floor down: that is the usual truth about short scaling curves.

    Args:
        x: shape (n,), resource (time, samples, parameters), not negative; 0 is masked.
        y: shape (n,), loss; entries that are not positive are masked.
        y_error: shape (n,), standard errors, or None; relative weights only, as in `fit_power_law`.
        confidence: of the intervals.
        min_points: fewer points are refused (at least 4: three parameters are fitted).
        min_decades: a shorter range of x is refused.
        compare: let `fit_power_law`'s shapes overrule the verdict where there are at least 8 points.

    Returns:
        A `PowerLawFit` with `floor`, `floor_lower`, `floor_upper` in its evidence (unit of y). Verdict "floor" when a
        zero floor is outside the interval, "power_law" when it is inside, "undecided" with a reason when alpha is
        not bounded from both sides or another shape does better. `predict` gives the power law without the floor.

    Raises:
        ValueError: arrays that do not match, x negative or not finite, options outside their range.
        TypeError: arguments of the wrong kind.

    Cost: four grids of 160 x 60 shapes of n points: about 10 ms for 10 points.

    Accuracy: intervals allow for misfits of 1e-4 in log y, the grid's own; they assume independent errors. 95 % nominal
        covered 92-97 % for alpha and for the floor (8 to 30 points).

    Source: the form of THEORY of this package (resource laws, after arXiv:2511.07892); our operational definition.

    Example:
        >>> import numpy as np
        >>> x = np.logspace(0, 3, 12)
        >>> fit = fit_scaling_law(x, 2.0 * x**-0.5 + 0.1)
        >>> round(fit.exponent, 3), round(fit.evidence["floor"], 3), fit.verdict
        (0.5, 0.1, 'floor')
    """
    checks.real("confidence", confidence, above=0.0, below=1.0)
    checks.switch("compare", compare)
    min_points = checks.count("min_points", min_points, at_least=4)
    min_decades = checks.real("min_decades", min_decades, above=0.0, closed=True)
    series = checks.log_series(x, y, None, y_error)
    evidence = {"num_masked": float(series.num_masked)}
    if reason := _too_little(series, min_points, min_decades):
        return _refused(reason, series, evidence)
    weights = np.ones(len(series.x)) if series.y_error is None else intervals.relative_weights(series.y_error)
    alpha, floor, amplitude = _profiled(series.x, series.y, weights, confidence)
    evidence |= {"floor": floor.value, "floor_lower": floor.lower, "floor_upper": floor.upper}
    verdict, reason = _judged(series, weights, alpha, floor, compare=compare)
    return PowerLawFit(
        alpha.value, alpha.lower, alpha.upper, amplitude, series.window, len(series.x), series.num_decades, verdict,
        reason, evidence, -1,
    )  # fmt: skip


def _profiled(log_x, log_y, weights, confidence) -> tuple[Estimate, Estimate, float]:
    """Best (alpha, floor, A) and the profile intervals of alpha and floor, on a coarse and then a fine grid."""
    shares = np.concatenate([[1e-12], np.geomspace(1e-3, 0.5, 30), 1.0 - np.geomspace(0.5, 1e-3, 30)[1:]])
    quantile = intervals.student_quantile(confidence, len(log_x) - 3)
    factor = 1.0 + quantile**2 / (len(log_x) - 3)
    exponents = _EXPONENTS
    for _ in range(4):  # zoom in on the region that the interval needs
        misfit, offset = _misfits(log_x, log_y, weights, exponents, shares)
        allowed = misfit <= factor * misfit.min() + 1e-8 * weights.sum()  # 1e-4 in log y: the grid
        rows, columns = np.flatnonzero(allowed.any(1)), np.flatnonzero(allowed.any(0))
        open_low, open_high = exponents[rows[0]] <= _EXPONENTS[0], exponents[rows[-1]] >= _EXPONENTS[-1]
        best = np.unravel_index(int(np.argmin(misfit)), misfit.shape)
        found = exponents[best[0]], shares[best[1]], offset[best]
        floors = np.where(allowed, np.exp(offset) * shares, np.nan)
        first, last = max(rows[0] - 1, 0), min(rows[-1] + 1, len(exponents) - 1)
        interval = exponents[first], exponents[last], np.nanmin(floors), np.nanmax(floors)
        exponents = np.geomspace(exponents[first], exponents[last], len(_EXPONENTS))
        low, high = shares[max(columns[0] - 1, 0)], shares[min(columns[-1] + 1, len(shares) - 1)]
        shares = _between(low, high)
    alpha = Estimate(
        float(found[0]), 0.0 if open_low else float(interval[0]), math.inf if open_high else float(interval[1])
    )
    tiny = 1e-9 * math.exp(found[2])
    floor_low = 0.0 if interval[2] < tiny else float(interval[2])
    floor = Estimate(float(math.exp(found[2]) * found[1]), floor_low, float(interval[3]))
    amplitude = from_log(found[2] + found[0] * log_x[-1]) * (1.0 - found[1])
    return alpha, floor, float(amplitude)


def _between(low: float, high: float, *, num: int = 60) -> np.ndarray:
    """Shares from low to high, even in the logit, and the floor-free law where it is still in play."""
    logit = np.linspace(math.log(max(low, 1e-4) / (1.0 - max(low, 1e-4))), math.log(high / (1.0 - high)), num)
    grid = 1.0 / (1.0 + np.exp(-logit))
    return np.concatenate([[1e-12], grid]) if low <= 1e-4 else grid


def _misfits(log_x, log_y, weights, exponents, shares) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sums of squares over the grid, and the log y that each model has at the largest x."""
    curves = shapes.floor_shape((log_x[-1] - log_x), exponents[:, None, None], shares[None, :, None])
    left = log_y - curves
    offset = left @ weights / weights.sum()
    return (left - offset[..., None]) ** 2 @ weights, offset


def _judged(series, weights, alpha: Estimate, floor: Estimate, *, compare: bool) -> tuple[str, str]:
    """Verdict and reason."""
    if alpha.lower == 0.0 or math.isinf(alpha.upper):
        return "undecided", "the data do not bound the exponent from both sides"
    if compare and len(series.x) >= shapes.MIN_POINTS:
        other = shapes.compare(series.x, series.y, weights)
        if other.verdict in ("broken", "exponential"):
            return other.verdict, ""
    elif compare:
        return "undecided", f"{len(series.x)} points cannot tell shapes apart: {shapes.MIN_POINTS} are needed"
    return ("floor" if floor.lower > 0.0 else "power_law"), ""


def combine(function: Callable[..., float], *parts) -> Estimate:
    """`function(*values)` with an interval from those of its independent parts.

    Each part is moved to either end of its interval in turn; the changes that lower (raise) the result are added in
    quadrature. To first order this is error propagation; it keeps asymmetric intervals asymmetric.

    Args:
        function: of as many numbers as there are parts; monotonic over the intervals.
        parts: `PowerLawFit`, `Estimate` or plain numbers (exact).

    Returns:
        An `Estimate`; NaN where a part is.

    Raises:
        TypeError: a part that is none of these.

    Cost: two calls of `function` for each part.

    Accuracy: first order; independence is assumed, though exponents fitted to one run are correlated.

    Source: our operational definition (variance estimates recovery for functions of independent estimates).

    Example:
        >>> result = combine(lambda a, b: a * b, Estimate(2.0, 1.7, 2.3), Estimate(1.0, 0.8, 1.2))
        >>> round(result.value, 6), round(result.lower, 6), round(result.upper, 6)
        (2.0, 1.5, 2.5)
    """
    estimates = [_estimate(part) for part in parts]
    values = [estimate.value for estimate in estimates]
    centre = float(function(*values))
    down = up = 0.0
    for k, estimate in enumerate(estimates):
        changes = [
            float(function(*values[:k], end, *values[k + 1 :])) - centre for end in (estimate.lower, estimate.upper)
        ]
        if any(math.isnan(change) for change in changes):
            return Estimate(centre, math.nan, math.nan)
        down += min(0.0, *changes) ** 2
        up += max(0.0, *changes) ** 2
    return Estimate(centre, centre - math.sqrt(down), centre + math.sqrt(up))


def closure(value_a, value_b, *factors) -> Closure:
    """Residual `value_a - value_b * factors...` of an identity between exponents, with its interval.

    `closure(chi, rho, q)` is `chi - rho q`; `closure(slope, -1 / a.exponent)` compares with an exact number.

    Args:
        value_a: `PowerLawFit`, `Estimate` or number.
        value_b: the same.
        factors: further factors of value_b.

    Returns:
        A `Closure`: zero inside its interval where the identity holds within errors.

    Raises:
        TypeError: an argument that is none of these.

    Cost: none to speak of.

    Accuracy: see `combine`.

    Source: closure identities of THEORY of this package; our operational definition.

    Example:
        >>> result = closure(Estimate(0.5, 0.47, 0.53), Estimate(1.0, 0.92, 1.08), 0.5)
        >>> round(result.value, 6), round(result.lower, 6), round(result.upper, 6), result.holds
        (0.0, -0.05, 0.05, True)
    """
    result = combine(lambda a, *product: a - math.prod(product), value_a, value_b, *factors)
    return Closure(result.value, result.lower, result.upper)


def _estimate(part) -> Estimate:
    """A fit, an estimate or a number as an estimate."""
    if isinstance(part, PowerLawFit):
        return Estimate(part.exponent, part.lower, part.upper)
    if isinstance(part, Estimate):
        return part
    try:
        number = float(part)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected a PowerLawFit, an Estimate or a number, got {type(part).__name__}") from error
    return Estimate(number, number, number)
