"""How do loss and frontier move in flow time? chi, rho, and their local values."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from . import checks
from .powerlaw import fit_power_law
from .records import Estimate, PowerLawFit, negated


def fit_loss(
    flow_time,
    loss,
    *,
    loss_error=None,
    tail: float | Estimate = 0.0,
    window=None,
    num_per_decade: int = 20,
    confidence: float = 0.95,
    bootstrap: str = "auto",
    num_bootstrap: int = 200,
    min_points: int = 5,
    min_decades: float = 1.0,
    compare: bool = True,
    seed: int = 0,
) -> PowerLawFit:
    """Loss exponent chi of `L ~ t^-chi`, returned **positive** for decay.

    Logs are usually dense at late times; they are first thinned to geometric means in bins of equal width in log t
    (unless errors are given), so that every decade has the same say.

    Args:
        flow_time: shape (n,), sum of learning rates, not negative; t = 0 is masked.
        loss: shape (n,), on the probe or the training set, any unit.
        loss_error: shape (n,), standard errors, or None.
        tail: added to the loss, its unit: energy of modes that the probe does not hold (`energy_tail`). As an
            `Estimate` it widens the interval by what its own ends do to chi.
        window: None, a pair (low, high) in flow time, or "search"; see `fit_power_law`.
        num_per_decade: bins in a decade of flow time.
        confidence: see `fit_power_law`, as for the remaining arguments.
        bootstrap: see `fit_power_law`.
        num_bootstrap: see `fit_power_law`.
        min_points: bins needed.
        min_decades: decades of flow time needed.
        compare: see `fit_power_law`; "floor" says the loss saturates: see `fit_scaling_law`.
        seed: see `fit_power_law`.

    Returns:
        A `PowerLawFit` of loss on flow time.

    Raises:
        ValueError: arrays that do not match, negative flow time, options outside their range.
        TypeError: arguments of the wrong kind.

    Cost: one `fit_power_law`; with an uncertain tail three, one of them with shapes.

    Accuracy: exact for an exact power law. Finite spectra steepen: the relative bias of chi at time t is about
        `(2 lambda_min t)^q / Gamma(1 + q)` (`finite_size_bias`); keep the window where it is small, or add the tail.

    Source: lazy value chi = q: THEORY of this package, after arXiv:2511.07892.

    Example:
        >>> import numpy as np
        >>> t = np.logspace(0, 3, 40)
        >>> fit = fit_loss(t, 0.5 * (2 * t) ** -0.75)
        >>> round(fit.exponent, 9), fit.verdict
        (0.75, 'power_law')
    """
    checks.count("num_per_decade", num_per_decade, at_least=1)
    flow_time = checks.vector("flow_time", flow_time)
    loss = checks.vector("loss", loss, length=len(flow_time))
    if loss_error is not None:
        loss_error = checks.vector("loss_error", loss_error, length=len(flow_time))
    if not np.isfinite(flow_time).all() or (flow_time < 0).any():
        raise ValueError("flow_time must be finite and not negative")
    window = checks.declared_window(window)
    tail = tail if isinstance(tail, Estimate) else Estimate(tail, tail, tail)
    for part in (tail.value, tail.lower, tail.upper):
        checks.real("tail", part, above=0.0, closed=True)
    if loss_error is None:
        if isinstance(window, tuple):  # a bin must not reach over the end of the window
            low, high = window
            keep = (flow_time >= low * (1 - 1e-12)) & (flow_time <= high * (1 + 1e-12))
            flow_time, loss, window = flow_time[keep], loss[keep], None
        flow_time, loss = checks.binned(flow_time, loss, num_per_decade)

    def fitted(tail: float, **more) -> PowerLawFit:
        options = {"window": window, "compare": compare, "num_bootstrap": num_bootstrap, **more}
        return negated(
            fit_power_law(
                flow_time, np.where(loss > 0, loss + tail, loss), y_error=loss_error, confidence=confidence,
                bootstrap=bootstrap, min_points=min_points, min_decades=min_decades, seed=seed, **options,
            )
        )  # fmt: skip

    fit = fitted(tail.value)
    if fit.refused or not tail.upper > 0:
        return fit
    ends = [fitted(end, window=fit.window, compare=False) for end in (tail.lower, tail.upper)]
    return _widened(fit, ends, {"tail": tail.value})


def _widened(fit: PowerLawFit, ends: list[PowerLawFit], evidence: dict[str, float]) -> PowerLawFit:
    """The fit with an interval that also reaches, in quadrature, for what the tail's ends make of the exponent.

    A tail that is off bends the series, which widens the fit's own interval once more: of the three the narrowest is
    what scatter alone makes it.
    """
    half = min(0.5 * (one.upper - one.lower) for one in (fit, *ends))
    down, up = (max(0.0, *(sign * (one.exponent - fit.exponent) for one in ends)) for sign in (-1.0, 1.0))
    return replace(
        fit,
        lower=fit.exponent - math.hypot(half, down),
        upper=fit.exponent + math.hypot(half, up),
        evidence=fit.evidence | evidence,
    )


def elasticity(
    flow_time,
    lambda_star,
    *,
    window=None,
    num_per_decade: int = 20,
    confidence: float = 0.95,
    bootstrap: str = "auto",
    num_bootstrap: int = 200,
    min_points: int = 5,
    min_decades: float = 1.0,
    compare: bool = True,
    seed: int = 0,
) -> PowerLawFit:
    """Elasticity rho of `lambda* ~ t^-rho`, returned **positive** for a frontier that falls.

    Args:
        flow_time: shape (n,), not negative; t = 0 is masked.
        lambda_star: shape (n,), frontiers in a frozen basis (`frontier`, `progress_contour`); NaN is masked.
        window: see `fit_power_law`, as for the remaining arguments; in flow time.
        num_per_decade: see `fit_loss`.
        confidence: see `fit_power_law`.
        bootstrap: see `fit_power_law`.
        num_bootstrap: see `fit_power_law`.
        min_points: times needed.
        min_decades: decades of flow time needed.
        compare: see `fit_power_law`.
        seed: see `fit_power_law`.

    Returns:
        A `PowerLawFit` of the frontier on flow time. 1 in the lazy regime.

    Raises:
        ValueError: arrays that do not match, negative flow time, options outside their range.
        TypeError: arguments of the wrong kind.

    Cost: one `fit_power_law`.

    Accuracy: exact for an exact power law.

    Source: elasticity of arXiv:2511.07892; the frontier's definition is ours.

    Example:
        >>> import numpy as np
        >>> t = np.logspace(0, 2, 12)
        >>> round(elasticity(t, 0.4 / t).exponent, 9)
        1.0
    """
    flow_time = checks.vector("flow_time", flow_time)
    lambda_star = checks.vector("lambda_star", lambda_star, length=len(flow_time))
    checks.count("num_per_decade", num_per_decade, at_least=1)
    if not np.isfinite(flow_time).all() or (flow_time < 0).any():
        raise ValueError("flow_time must be finite and not negative")
    flow_time, lambda_star = checks.binned(flow_time, lambda_star, num_per_decade)
    return negated(
        fit_power_law(
            flow_time, lambda_star, window=window, confidence=confidence, bootstrap=bootstrap,
            num_bootstrap=num_bootstrap, min_points=min_points, min_decades=min_decades, compare=compare, seed=seed,
        )
    )  # fmt: skip


def local_slope(x, y, *, decades: float = 1.0, **options) -> PowerLawFit:
    """Log-log slope of y over the last `decades` of x: what the exponent is now, however it was before.

    Args:
        x: shape (n,), flow time, not negative.
        y: shape (n,), loss or frontier.
        decades: length of the window, which ends at the largest x with a positive y.
        **options: see `fit_power_law` (`confidence`, `min_points`, `compare`, ...), but for the window.

    Returns:
        A `PowerLawFit` (negative for decay); refused where less than 0.8 of `decades` is covered.

    Raises:
        ValueError: arrays that do not match, x negative, options outside their range.
        TypeError: arguments of the wrong kind.

    Cost: one `fit_power_law`.

    Accuracy: as `fit_power_law` with so few points: five points in a decade give wide intervals.

    Example:
        >>> x = np.logspace(0, 3, 31)
        >>> fit = local_slope(x, np.where(x < 30, x**-0.2, 30**0.6 * x**-0.8))
        >>> round(fit.exponent, 9), [round(end) for end in fit.window]
        (-0.8, [100, 1000])
    """
    decades = checks.real("decades", decades, above=0.0)
    x = checks.vector("x", x)
    y = checks.vector("y", y, length=len(x))
    known = x[np.isfinite(y) & (y > 0)]
    last = float(known.max()) if known.size else 1.0
    window = (last * 10**-decades * (1 - 1e-9), last) if last > 0 else None
    return fit_power_law(x, y, window=window, min_decades=0.8 * decades, **options)
