"""The tail of the density of eigenvalues by maximum likelihood, with both cut-offs.

Legend: s = log(lambda / x_min) in [0, L], density `p(s) ~ exp(-theta s)`, theta = alpha - 1 = 1/a, L infinite
without an upper cut-off.
"""

from __future__ import annotations

import math

import numpy as np

from . import checks
from .records import PowerLawFit, refused_fit


def fit_tail(
    eigenvalues,
    *,
    x_min: float | None = None,
    x_max: float | None = None,
    confidence: float = 0.95,
    num_bootstrap: int = 200,
    min_points: int = 20,
    min_decades: float = 1.0,
    compare: bool = True,
    seed: int = 0,
) -> PowerLawFit:
    """Exponent alpha > 0 of the eigenvalue density `p(lambda) ~ lambda^-alpha` on [x_min, x_max].

    For `lambda_i ~ i^-a` the density has `alpha = 1 + 1/a`. With an upper cut-off the likelihood is that of the
    truncated law (leaving x_max out of it biases alpha). x_min, where not given, minimises the Kolmogorov-Smirnov
    distance among candidates that keep `min_points` eigenvalues and `min_decades`.

    Args:
        eigenvalues: shape (m,), any order, units 1/flow time; values that are not positive and finite are masked.
        x_min: lower cut-off; None searches for it.
        x_max: upper cut-off; None for none. Spectra of a probe end by themselves: give it where the top is cut.
        confidence: of the interval.
        num_bootstrap: replicates; the search for x_min is repeated in each.
        min_points: fewer eigenvalues in the tail are refused.
        min_decades: a shorter tail is refused.
        compare: judge the shape: goodness of fit, curvature and an exponential.
        seed: of the bootstrap's own generator.

    Returns:
        A `PowerLawFit`: exponent alpha, window the tail's smallest and largest eigenvalue, amplitude their number.
        Evidence: `x_min`, `ks` (distance), `p_value` (of the distance, by simulation with the cut-offs held, so on the
        generous side), `curvature_z` (score test of a log-normal bend, standard normal under the power law),
        `vuong_exponential` (above zero for the power law). "power_law" needs p >= 0.05, |curvature_z| < 2.6 and
        Vuong above 1.645.

    Raises:
        ValueError: eigenvalues not one-dimensional, x_min >= x_max, options outside their range.
        TypeError: arguments of the wrong kind.

    Cost: `num_bootstrap` searches over at most 24 cut-offs: about 0.1 s for 1,000 eigenvalues on one core.

    Accuracy: intervals treat eigenvalues as independent draws; real spectra are more regular than that, so the
        intervals are wide and p-values high rather than the reverse.

    Source: Clauset, Shalizi, Newman, SIAM Rev. 51 (2009) 661, arXiv:0706.1062; interval and score test are our
        operational definition.

    Example:
        >>> import numpy as np
        >>> fit = fit_tail((np.arange(1, 401) / 400.5) ** -2.0, x_min=1.0)
        >>> abs(fit.exponent - 1.5) < 0.01, fit.lower < 1.5 < fit.upper, fit.num_points
        (True, True, 400)
    """
    checks.interval_options(confidence, num_bootstrap)
    checks.count("min_points", min_points, at_least=3)
    checks.switch("compare", compare)
    checks.count("seed", seed, at_least=0)
    checks.real("min_decades", min_decades, above=0.0, closed=True)
    values = checks.vector("eigenvalues", eigenvalues)
    low = None if x_min is None else checks.real("x_min", x_min, above=0.0)
    high = math.inf if x_max is None else checks.real("x_max", x_max, above=0.0)
    if low is not None and low >= high:
        raise ValueError(f"x_min must be below x_max, got {low:g} and {high:g}")
    usable = np.isfinite(values) & (values > 0)
    logs = np.sort(np.log(values[usable & (values <= high)]))
    evidence = {"num_masked": float((~usable).sum())}
    cuts = _candidates(logs, low, min_points, min_decades)
    if not len(cuts):
        kept = logs if low is None else logs[logs >= math.log(low)]
        window = (math.exp(kept[0]), math.exp(kept[-1])) if len(kept) else (math.nan, math.nan)
        decades = float(np.ptp(kept)) / math.log(10.0) if len(kept) else 0.0
        needed = f"at least {min_points} over {min_decades:g} are needed"
        reason = f"{len(kept)} eigenvalues over {decades:.2g} decades, {needed}"
        return refused_fit(reason, window=window, num_points=len(kept), num_decades=decades, evidence=evidence)
    rng = np.random.default_rng(seed)
    theta, cut, distance = _best_cut(logs, cuts, math.log(high))
    lower, upper = _interval(logs, cuts, math.log(high), theta, cut, confidence, num_bootstrap, rng)
    s, top = logs[logs >= cut] - cut, math.log(high) - cut
    evidence |= {"x_min": math.exp(cut), "ks": distance}
    verdict, reason = "undecided", "shapes were not compared"
    if compare:
        verdict, reason, more = _judged(s, theta, top, distance, num_bootstrap, rng)
        evidence |= more
    return PowerLawFit(
        1.0 + theta, 1.0 + lower, 1.0 + upper, float(len(s)), (math.exp(cut + s[0]), math.exp(cut + s[-1])), len(s),
        float((s[-1] - s[0]) / math.log(10.0)), verdict, reason, evidence, -1,
    )  # fmt: skip


def _candidates(logs, low: float | None, min_points: int, min_decades: float, *, num: int = 24) -> np.ndarray:
    """Lower cut-offs in log lambda that leave enough: the declared one, or up to `num` of the eigenvalues."""
    if low is not None:
        cuts = np.array([math.log(low)])
        first = np.searchsorted(logs, cuts)
    else:
        last = len(logs) - min_points
        first = np.unique(np.linspace(0, last, num).round().astype(int)) if last >= 0 else np.zeros(0, int)
        cuts = logs[first]
    enough = len(logs) - first >= min_points
    starts = logs[np.minimum(first, len(logs) - 1)] if len(logs) else cuts
    long = (logs[-1] - starts >= min_decades * math.log(10.0) - 1e-9) if len(logs) else enough
    return cuts[enough & long]


def _rate(mean, top):
    """Maximum-likelihood theta of the (truncated) exponential law from the mean of s; vectorised."""
    mean, top = np.broadcast_arrays(np.asarray(mean, float), np.asarray(top, float))
    theta = 1.0 / np.maximum(mean, 1e-12)
    finite = np.isfinite(top)
    if not finite.any():
        return theta
    low, high = -2.0 * np.ones_like(theta) / np.maximum(np.where(finite, top, 1.0) - mean, 1e-12), theta.copy()
    for _ in range(60):
        middle = 0.5 * (low + high)
        above = _mean(middle, np.where(finite, top, 1.0)) > mean
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(finite, 0.5 * (low + high), theta)


def _mean(theta, top):
    """Mean of s under `exp(-theta s)` on [0, top]: `1/theta - top / (exp(theta top) - 1)`."""
    y = np.clip(theta * top, -600.0, 600.0)
    small = np.abs(y) < 1e-4
    safe = np.where(small, 1.0, y)
    return top * np.where(small, 0.5 - y / 12.0, 1.0 / safe - 1.0 / np.expm1(safe))


def _variance(theta: float, top: float) -> float:
    """Variance of s under `exp(-theta s)` on [0, top]: `1/theta^2 - top^2 / (4 sinh(theta top / 2)^2)`."""
    if not math.isfinite(top):
        return 1.0 / theta**2
    y = min(abs(theta * top), 600.0)
    return top**2 * (1.0 / 12.0 - y**2 / 240.0 if y < 0.05 else 1.0 / y**2 - 0.25 / math.sinh(0.5 * y) ** 2)


def _cdf(s, theta, top):
    """Distribution function of s on [0, top]."""
    if not np.isfinite(top):
        return -np.expm1(-theta * s)
    theta = np.where(np.abs(theta) < 1e-9, 1e-9, theta)
    return np.expm1(-theta * s) / np.expm1(-theta * top)


def _distance(s, theta, top):
    """Kolmogorov-Smirnov distance along the last axis; s sorted."""
    n = s.shape[-1]
    model = _cdf(s, theta, top)
    steps = np.arange(n + 1) / n
    return np.maximum(np.abs(model - steps[1:]), np.abs(model - steps[:-1])).max(-1)


def _best_cut(logs, cuts, top: float) -> tuple[float, float, float]:
    """theta, cut and distance of the candidate with the smallest Kolmogorov-Smirnov distance."""
    first = np.searchsorted(logs, cuts)
    first = np.minimum(first, len(logs) - 3)  # a resample may leave little above a cut
    sums = np.cumsum(logs[::-1])[::-1][first]
    size = len(logs) - first
    theta = _rate(sums / size - cuts, top - cuts)
    distances = [
        float(_distance(logs[f:] - cut, rate, top - cut)) for f, cut, rate in zip(first, cuts, np.atleast_1d(theta))
    ]
    best = int(np.argmin(distances))
    return float(theta[best]), float(cuts[best]), distances[best]


def _interval(logs, cuts, top, theta, cut, confidence, num_bootstrap, rng) -> tuple[float, float]:
    """Studentised bootstrap: `theta +- q(|t*|) s`, `1/s^2 = n Var(s)`; the search for the cut-off is repeated."""
    logs = logs[logs >= cuts[0]] if len(cuts) == 1 else logs

    def error(rate, cut, sample):
        n = len(sample) - int(np.searchsorted(sample, cut))
        return 1.0 / math.sqrt(max(n, 3) * _variance(rate, top - cut))

    t = np.empty(num_bootstrap)
    for k in range(num_bootstrap):
        sample = np.sort(logs[rng.integers(0, len(logs), len(logs))])
        rate, chosen, _ = _best_cut(sample, cuts, top)
        t[k] = abs(rate - theta) / error(rate, chosen, sample)
    half = float(np.sort(t)[math.ceil(confidence * (num_bootstrap + 1) - 1e-9) - 1]) * error(theta, cut, logs)
    return theta - half, theta + half


def _judged(s, theta, top, distance, num_bootstrap, rng) -> tuple[str, str, dict[str, float]]:
    """Verdict on the tail's shape with its reason and evidence."""
    p_value = _p_value(len(s), theta, top, distance, num_bootstrap, rng)
    z = _curvature(s, theta, top)
    vuong = _vuong_exponential(s, theta, top)
    evidence = {"p_value": p_value, "curvature_z": z, "vuong_exponential": vuong}
    if p_value < 0.05 or abs(z) >= 2.6:
        if vuong < -1.645:
            return "exponential", "", evidence
        return "undecided", f"the tail is no power law: p = {p_value:.2g}, curvature z = {z:.2g}", evidence
    if vuong <= 1.645:
        return "undecided", "an exponential tail is not excluded", evidence
    return "power_law", "", evidence


def _p_value(n, theta, top, distance, num_bootstrap, rng) -> float:
    """Share of simulated samples, refitted, that lie farther from their fit than the data."""
    uniform = rng.random((num_bootstrap, n))
    full = 1.0 if not np.isfinite(top) else -math.expm1(-theta * top)
    s = np.sort(-np.log1p(-full * uniform) / theta, axis=1) if abs(theta) > 1e-9 else np.sort(uniform * top, axis=1)
    rates = _rate(s.mean(1), np.full(num_bootstrap, top))[:, None]
    return float((_distance(s, rates, top) >= distance).mean())


def _curvature(s, theta, top) -> float:
    """Score test of kappa = 0 in `p(s) ~ exp(-theta s - kappa s^2)`, theta refitted."""
    grid = np.linspace(0.0, top if np.isfinite(top) else 60.0 / theta, 4001)
    weight = np.exp(-theta * (grid - (grid[-1] if theta < 0 else 0.0)))
    weight[[0, -1]] *= 0.5
    weight /= weight.sum()
    moment = [float(weight @ grid**k) for k in range(5)]
    c11, c12, c22 = moment[2] - moment[1] ** 2, moment[3] - moment[1] * moment[2], moment[4] - moment[2] ** 2
    variance = c22 - c12**2 / c11
    score = float(np.mean(s**2)) - moment[2] - c12 / c11 * (float(np.mean(s)) - moment[1])
    return -score * math.sqrt(len(s) / variance)


def _vuong_exponential(s, theta, top) -> float:
    """Vuong's statistic, power law against `p(lambda) ~ exp(-k lambda)` on the same range; above zero: power law."""
    ratio = np.exp(s)  # lambda / x_min
    rate = float(_rate(ratio.mean() - 1.0, math.exp(top) - 1.0 if top < 700 else math.inf))
    norm = _log_norm(theta, top)
    norm_exponential = _log_norm(rate, math.exp(top) - 1.0 if top < 700 else math.inf)
    difference = (-theta * s - norm) - (s - rate * (ratio - 1.0) - norm_exponential)
    spread = float(difference.std())
    return float(difference.sum() / (spread * math.sqrt(len(s)))) if spread > 0 else 0.0


def _log_norm(rate: float, top: float) -> float:
    """`log of the integral of exp(-rate s)` over [0, top]."""
    if not math.isfinite(top):
        return -math.log(rate)
    y = rate * top
    if abs(y) < 1e-9:
        return math.log(top)
    if y < 0:
        return math.log(-math.expm1(y)) - y - math.log(-rate)
    return math.log(-math.expm1(-y)) - math.log(rate)
