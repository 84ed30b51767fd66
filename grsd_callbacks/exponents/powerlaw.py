"""One exponent one can believe: `y ~ x^exponent` with an interval that covers and a verdict on the shape."""

from __future__ import annotations

import math

import numpy as np

from . import checks, intervals, shapes
from .checks import LogSeries
from .records import PowerLawFit, from_log, refused_fit

BOOTSTRAPS = ("auto", "residual", "block")


def fit_power_law(
    x,
    y,
    *,
    y_error=None,
    x_error=None,
    window=None,
    confidence: float = 0.95,
    bootstrap: str = "auto",
    num_bootstrap: int = 200,
    min_points: int = 5,
    min_decades: float = 1.0,
    compare: bool = True,
    seed: int = 0,
) -> PowerLawFit:
    """Fit `y = A x^exponent` (negative for decay) with an interval, and judge whether it is a power law.

    Weighted least squares of log y on log x. Exact for an exact power law; scaling x or y by a constant changes
    no exponent. The interval allows for unequal scatter and for serial correlation (see Accuracy).

    Args:
        x: shape (n,), finite and not negative; x = 0 is masked. Any order: correlation is understood along sorted x.
        y: shape (n,). Entries that are NaN, infinite or not positive are masked and counted (`num_masked`).
        y_error: shape (n,), standard errors in the unit of y, or None. They become log errors `y_error / y` and set
            the *relative* weights; the overall scale is taken from the residuals (`reduced_chi2` compares the two).
            Below 1 % of their median they are raised to it. NaN masks the point.
        x_error: shape (n,), standard errors in the unit of x, or None. Errors in both are combined as effective
            variance `s_y^2 + exponent^2 s_x^2`, minimised over the exponent too (no attenuation towards zero).
        window: None (all points), a declared pair (low, high) in the unit of x, ends included, or "search": the
            longest window in log x that is compatible with a straight line. A searched window reaches as far into a
            bend as the noise hides it, so the interval is widened by the change of the slope when half of the
            window is given up (`window_shift`); on a pure power law it is then too wide.
        confidence: of the interval, in (0, 1).
        bootstrap: "residual" (independent residuals, unequal scatter allowed), "block" (also serially correlated) or
            "auto", which is "block": with independent residuals that costs 5 to 15 % of width, while testing first
            and then choosing would undercover.
        num_bootstrap: replicates; at least `confidence / (1 - confidence)`.
        min_points: fewer points are refused.
        min_decades: a shorter range of x is refused.
        compare: compare with other shapes; without it the verdict stays "undecided".
        seed: of the bootstrap's own generator.

    Returns:
        A `PowerLawFit`. Refused fits hold NaN, verdict "undecided" and a reason. An exponent whose interval holds
        zero is reported but never called a power law: a flat series is as much an exponential, or a floor.

    Raises:
        ValueError: arrays of different lengths or not one-dimensional, x negative or not finite, negative errors, a
            window with low >= high, options outside their range.
        TypeError: arguments of the wrong kind.

    Cost: about 2 ms for 50 points on one CPU core (0.9 ms without `compare`); vectorised over replicates, breaks
        and floors. No torch.

    Accuracy: 95 % intervals covered 92.6-98.4 % of 800 to 2,000 series each of 16 to 200 points with white, growing
        and AR(1) noise (coefficient 0.6); with 8 to 12 points *and* such correlation 90-91 %. Slower correlations
        undercover: 0.8 gave about 90 % for 25 points. Verdicts on 50 points with 2 % noise were right in 97 % or more
        of 400 series of each shape; with 10 % noise and 24 points breaks and floors mostly end as "undecided".

    Source: York et al., Am. J. Phys. 72 (2004) 367, for errors in both coordinates; studentised wild bootstrap with
        HC3 errors, coloured by an AR(1). The combination is our operational definition.

    Example:
        >>> import numpy as np
        >>> x = np.logspace(-1, 1, 30)
        >>> fit = fit_power_law(x, 2.0 * x**1.5)
        >>> round(fit.exponent, 9), round(fit.amplitude, 9), round(fit.num_decades, 9), fit.verdict
        (1.5, 2.0, 2.0, 'power_law')
        >>> fit_power_law(x, 2.0 * x**1.5, window=(1.0, 4.0)).reason
        'spans 0.55 decades of x, at least 1 is needed'
    """
    checks.interval_options(confidence, num_bootstrap)
    checks.choice("bootstrap", bootstrap, BOOTSTRAPS)
    checks.switch("compare", compare)
    checks.count("seed", seed, at_least=0)
    min_points = checks.count("min_points", min_points, at_least=3)
    min_decades = checks.real("min_decades", min_decades, above=0.0, closed=True)
    window = checks.declared_window(window)
    series = checks.log_series(x, y, x_error, y_error)
    evidence = {"num_masked": float(series.num_masked)}
    if window == "search":
        found = longest_straight_window(series.x, series.y, min_points=min_points, min_decades=min_decades)
        if found is None and not _too_little(series, min_points, min_decades):
            return _refused("no window that is long enough is compatible with a straight line", series, evidence)
        series = series if found is None else series.select(slice(*found))
    elif window is not None:
        slack = 1e-12
        low, high = math.log(max(window[0], 1e-300)), math.log(window[1])
        series = series.select((series.x >= low - slack) & (series.x <= high + slack))
    if reason := _too_little(series, min_points, min_decades):
        return _refused(reason, series, evidence)
    line = intervals.fit_line(series.x, series.y, series.x_error, series.y_error)
    half, rho = intervals.half_width(
        line, confidence=confidence, num_bootstrap=num_bootstrap, correlated=bootstrap != "residual", seed=seed
    )
    if window == "search":
        evidence["window_shift"] = _window_shift(series, line.slope)
        half += evidence["window_shift"]
    return _assembled(series, line, half, rho, compare=compare, evidence=evidence)


def _window_shift(series: LogSeries, slope: float) -> float:
    """Largest change of the slope when the window gives up its first or its last half in log x."""
    middle = 0.5 * (series.x[0] + series.x[-1])
    shifts = [0.0]
    for keep in (series.x <= middle, series.x >= middle):
        part = series.select(keep)
        if len(part.x) >= 3 and part.num_decades > 0.0:
            shifts.append(abs(intervals.fit_line(part.x, part.y, part.x_error, part.y_error).slope - slope))
    return max(shifts)


def _too_little(series: LogSeries, min_points: int, min_decades: float) -> str:
    """Why there is too little to fit; empty when there is enough."""
    n = len(series.x)
    masked = f" ({series.num_masked} masked)" if series.num_masked else ""
    if n < min_points:
        return f"{n} usable points{masked}, at least {min_points} are needed"
    if series.num_decades < min_decades - 1e-9 or series.num_decades <= 0.0:
        return f"spans {series.num_decades:.2g} decades of x, at least {min_decades:g} is needed"
    return ""


def _refused(reason: str, series: LogSeries, evidence: dict[str, float]) -> PowerLawFit:
    return refused_fit(
        reason, window=series.window, num_points=len(series.x), num_decades=series.num_decades, evidence=evidence
    )


def _assembled(series, line, half: float, rho: float, *, compare: bool, evidence: dict[str, float]) -> PowerLawFit:
    """Verdict and record for a fitted line with its interval."""
    evidence = evidence | {"autocorrelation": rho, "rms_residual": float(np.sqrt(np.mean(line.residual**2)))}
    if series.y_error is not None:
        variance = series.y_error**2
        if series.x_error is not None:
            variance = variance + (line.slope * series.x_error) ** 2
        chi2 = np.sum(line.residual**2 / np.maximum(variance, 1e-300))
        evidence["reduced_chi2"] = float(chi2 / (len(series.x) - 2))
    lower, upper = line.slope - half, line.slope + half
    span = series.x[-1] - series.x[0]
    if not compare:
        verdict = shapes.Verdict("undecided", "shapes were not compared", {})
    else:
        verdict = shapes.compare(series.x, series.y, line.weights)
        flat = lower <= 0.0 <= upper or abs(line.slope) * span < 1e-9
        if flat and (verdict.verdict == "power_law" or verdict.reason.startswith("an exponential fits")):
            reason = "an exponent of zero is not excluded: any flat shape fits as well"
            verdict = shapes.Verdict("undecided", reason, verdict.evidence)
    return PowerLawFit(
        line.slope, lower, upper, from_log(line.intercept), series.window, len(series.x), series.num_decades,
        verdict.verdict, verdict.reason, evidence | verdict.evidence,
    )  # fmt: skip


def longest_straight_window(
    log_x: np.ndarray, log_y: np.ndarray, *, min_points: int, min_decades: float, num_ends: int = 24
) -> tuple[int, int] | None:
    """Index range [start, stop) of the longest window in log x whose points are compatible with a straight line.

    Compatible: what a quartic in log x explains beyond the line is either below 1 % rms or not significant (an F
    test at 1 %, its residual variance inflated by `(1 + rho)/(1 - rho)` for lag-1 autocorrelation). Ends are
    tried on at most `num_ends` points, about 250 windows, all at once.
    """
    n = len(log_x)
    if n < 2 or log_x[-1] - log_x[0] <= 0.0:
        return None
    ends = np.unique(np.linspace(0, n - 1, min(n, num_ends)).round().astype(int))
    start, last = (index.ravel() for index in np.meshgrid(ends, ends, indexing="ij"))
    length = log_x[last] - log_x[start]
    keep = (last - start + 1 >= max(min_points, 7)) & (length >= max(min_decades * math.log(10.0) - 1e-9, 1e-9))
    start, last, length = start[keep], last[keep], length[keep]
    if not len(start):
        return None
    straight = _straight(log_x, log_y, start, last)
    if not straight.any():
        return None
    best = int(np.argmax(np.where(straight, length, -1.0)))
    return int(start[best]), int(last[best]) + 1


def _straight(log_x, log_y, start, last) -> np.ndarray:
    """For each window [start, last]: is the bend that a quartic finds negligible or insignificant?"""
    index = np.arange(len(log_x))
    inside = ((index >= start[:, None]) & (index <= last[:, None])).astype(float)
    low, high = log_x[start][:, None], log_x[last][:, None]
    centred = np.clip((2.0 * log_x - low - high) / (high - low), -1.0, 1.0)
    basis = np.moveaxis(np.polynomial.legendre.legvander(centred, 4), -1, 1) * inside[:, None]
    y = inside * (log_y - log_y.mean())

    def fitted(num):
        part = basis[:, :num]
        gram = part @ part.transpose(0, 2, 1) + 1e-12 * np.eye(num)
        return (np.linalg.solve(gram, part @ y[..., None]).transpose(0, 2, 1) @ part)[:, 0]

    curve, line = fitted(5), fitted(2)
    n = inside.sum(1)
    left = (y - curve) * inside
    variance = (left**2).sum(1)
    rho = np.clip((left[:, 1:] * left[:, :-1]).sum(1) / np.maximum(variance, 1e-300) + 5.0 / n, 0.0, 0.9)
    bend = ((curve - line) ** 2 * inside).sum(1)
    statistic = (bend / 3.0) / np.maximum(variance / np.maximum(n - 5.0, 1.0) * (1.0 + rho) / (1.0 - rho), 1e-300)
    range_y = np.abs(np.take_along_axis(line, last[:, None], 1) - np.take_along_axis(line, start[:, None], 1))[:, 0]
    negligible = np.sqrt(bend / n) <= np.minimum(shapes.TOLERANCE, 0.02 * range_y)
    return negligible | (statistic < _f_three_99(n - 5.0))


def _f_three_99(dof: np.ndarray) -> np.ndarray:
    """Upper 1 % point of F(3, dof), interpolated in 1/dof from the standard table (dof from 2 on)."""
    table = np.array([[2, 99.17], [3, 29.46], [4, 16.69], [5, 12.06], [6, 9.78], [8, 7.59], [10, 6.55], [15, 5.42],
                      [20, 4.94], [30, 4.51], [60, 4.13], [1e9, 3.78]])[::-1]  # fmt: skip
    return np.interp(1.0 / np.maximum(dof, 2.0), 1.0 / table[:, 0], table[:, 1])
