"""Does rescaling time only rescale lambda? The covariance residual, and the collapse of shell energies.

    v = c lambda^b t^p  for the velocity v = lambda u_b, u_b = J_b h / mean(E_b-, E_b+):   residual p - (b - 2)
    E_a(t) t^chi  against  lambda t^rho:   one curve for all times (rho = 1 for the instantaneous shells)

Both are our operational forms (THEORY, exponents and conditions) of a condition of arXiv:2512.18209.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from grsd_callbacks.exponents import Closure, Estimate, VelocityExponents, velocity_exponents

#: shells below this share of a measurement's energy are left out of the collapse: decayed ones, and rounding
LEAST_SHARE = 1e-4


@dataclass(frozen=True, eq=False)
class TimeRescaling:
    """Covariance under t -> c t, lambda -> lambda / c^rho.

    Attributes:
        b, p: exponents of the velocity on lambda and t, with 95 % intervals.
        residual: p - (b - 2), zero under covariance.
        collapse: share of the variance of log(E_a t^chi) that one curve of lambda t^rho explains; 1 is a perfect
            collapse, NaN where curves do not overlap.
        collapse_error: standard error from leaving out one time after another (jackknife).
        collapse_p: share of shuffles of the times that collapse as well; NaN without.
        reason: why the residual is NaN; empty otherwise.
        collapse_reason: why the collapse is NaN; empty otherwise.
    """

    b: Estimate
    p: Estimate
    residual: Closure
    collapse: float
    collapse_error: float
    collapse_p: float
    reason: str = ""
    collapse_reason: str = ""


def time_rescaling_covariance(
    edges: Any, times: Any, energy: Any, flux: Any, chi: float, rho: float = 1.0, *, num_null: int = 0, seed: int = 0
) -> TimeRescaling:
    """Covariance residual of the spectral velocity, and collapse score of the shell energies.

    Args:
        edges: shell edges, shape (B + 1,), 1 / flow time, evenly spaced in log.
        times: flow times, shape (T,), ascending; what is measured at t <= 0 is left out.
        energy: E_a, shape (T, B + 2), under- and overflow included.
        flux: J_b through the edges, shape (T, B + 1), upward positive; NaN where unknown.
        chi: loss exponent; NaN leaves the collapse out.
        rho: 1 for instantaneous shells, the frontier exponent for the shells of a frozen basis.
        num_null: shuffles of the times behind the p-value of the collapse.
        seed: of the private generator.

    Returns:
        A `TimeRescaling`; NaN and a reason where refused.

    Raises:
        ValueError: shapes that do not fit.

    Cost: one least-squares fit, T + num_null interpolations of T curves.

    Example:
        >>> edges, times = np.logspace(-6, 0, 19), np.logspace(0, 4, 9)
        >>> centers = np.concatenate([[0.0], np.sqrt(edges[1:] * edges[:-1]), [10.0]])
        >>> energy = centers**0.5 * np.exp(-centers * times[:, None])  # E ~ lambda^q exp(-lambda t), chi = q
        >>> found = time_rescaling_covariance(edges, times, energy, np.full((9, 19), np.nan), chi=0.5)
        >>> bool(found.collapse > 0.99), found.reason[:16]
        (True, '0 usable points,')
    """
    edges, t, E, J = (np.asarray(x, dtype=float) for x in (edges, times, energy, flux))
    B, T = len(edges) - 1, len(t)
    if E.shape != (T, B + 2) or J.shape != (T, B + 1):
        raise ValueError(
            f"energy and flux must have shapes ({T}, {B + 2}) and ({T}, {B + 1}), got {E.shape} and {J.shape}"
        )
    keep = t > 0
    t, E, J = t[keep], E[keep], J[keep]
    speed = _velocity(edges, t, E, J)
    curves = _curves(edges, E)
    score, why = _collapse(curves, t, chi, rho)
    return TimeRescaling(
        b=speed.b,
        p=speed.p,
        residual=speed.covariance_residual,
        collapse=score,
        collapse_error=_jackknife(curves, t, chi, rho) if not why else math.nan,
        collapse_p=_shuffled(curves, t, chi, rho, score, num_null, seed) if num_null and not why else math.nan,
        reason=speed.reason,
        collapse_reason=why,
    )


def _velocity(edges: np.ndarray, t: np.ndarray, E: np.ndarray, J: np.ndarray) -> VelocityExponents:
    """Fit of v = lambda u_b on inner edges, beside which neither open shell stands."""
    h = math.log(edges[-1] / edges[0]) / (len(edges) - 1)
    inner = E[:, 1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        u = J[:, 1:-1] * h / np.sqrt(inner[:, :-1] * inner[:, 1:])
    negligible = np.minimum(inner[:, :-1], inner[:, 1:]) < LEAST_SHARE * E.sum(1, keepdims=True)
    v = np.where(negligible | ~np.isfinite(u), np.nan, u) * edges[1:-1]
    lam, time = np.broadcast_arrays(edges[1:-1], t[:, None])
    return velocity_exponents(lam.ravel(), time.ravel(), v.ravel())


Curves = list[tuple[np.ndarray, np.ndarray]]


def _curves(edges: np.ndarray, E: np.ndarray) -> Curves:
    """(log lambda, log E) of the inner shells that hold energy, one a time."""
    x, inner = (np.log(edges[1:]) + np.log(edges[:-1])) / 2, E[:, 1:-1]
    kept = inner > LEAST_SHARE * E.sum(1, keepdims=True)
    return [(x[mask], np.log(row[mask])) for row, mask in zip(inner, kept, strict=True)]


def _collapse(curves: Curves, t: np.ndarray, chi: float, rho: float) -> tuple[float, str]:
    """1 - (scatter of the curves around their mean) / (their variance), on the grid where at least two overlap."""
    if not (math.isfinite(chi) and math.isfinite(rho)):
        return math.nan, "chi or rho is not known"
    moved = [(x + rho * math.log(s), y + chi * math.log(s)) for (x, y), s in zip(curves, t, strict=True) if len(x) > 1]
    if len(moved) < 3:
        return math.nan, f"{len(moved)} times with energy in two shells or more, 3 are needed"
    step = min(float(np.diff(x).min()) for x, _ in moved)
    low, high = min(x[0] for x, _ in moved), max(x[-1] for x, _ in moved)
    grid = np.arange(low, high + step / 2, step / 2)
    values = np.stack([np.interp(grid, x, y, left=np.nan, right=np.nan) for x, y in moved])
    known = np.isfinite(values)
    values = np.where(known & (known.sum(0) >= 2), values, np.nan)
    count = np.isfinite(values).sum(0)
    if (count >= 2).sum() < 3:
        return math.nan, "the rescaled curves do not overlap"
    used = values[:, count >= 2]
    within = np.nansum((used - np.nanmean(used, 0)) ** 2) / (np.isfinite(used).sum() - used.shape[1])
    total = float(np.nanvar(used))
    return (1 - float(within) / total, "") if total > 0 else (math.nan, "energies do not vary")


def _jackknife(curves: Curves, t: np.ndarray, chi: float, rho: float) -> float:
    scores = [
        _collapse([c for j, c in enumerate(curves) if j != k], np.delete(t, k), chi, rho)[0] for k in range(len(t))
    ]
    kept = np.array([s for s in scores if math.isfinite(s)])
    n = len(kept)
    return float(math.sqrt((n - 1) / n * np.square(kept - kept.mean()).sum())) if n > 2 else math.nan


def _shuffled(curves: Curves, t: np.ndarray, chi: float, rho: float, score: float, num: int, seed: int) -> float:
    random = np.random.default_rng(seed)
    draws = [_collapse(curves, random.permutation(t), chi, rho)[0] for _ in range(num)]
    return (1 + sum(not d < score for d in draws)) / (1 + num)
