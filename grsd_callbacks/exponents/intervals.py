"""How sure is a slope? Weighted lines in log-log and intervals that cover.

Legend: u regressor, w weights, z whitened observations, a the linear functional that gives the slope (slope = a . z),
h leverages, e residuals, rho lag-1 autocorrelation of the residuals in the order of x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_RHO_MAX = 0.95
_TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Line:
    """A weighted straight line `y = intercept + slope x` in logarithms, with the regressor its interval uses."""

    slope: float
    intercept: float
    regressor: np.ndarray
    weights: np.ndarray
    residual: np.ndarray


def fit_line(x, y, x_error=None, y_error=None) -> Line:
    """Least squares in logarithms: ordinary, weighted, or with errors in both coordinates.

    With `x_error` the slope minimises `sum (y - c - b x)^2 / (s_y^2 + b^2 s_x^2)` (effective variance) by York's
    fixed point; without `y_error` the part of the scatter that `x_error` does not explain is given to y.
    """
    s_y2 = None if y_error is None else _floored(y_error) ** 2
    if x_error is None:
        weights = np.ones_like(x) if y_error is None else relative_weights(y_error)
        slope, intercept = _solve(x, x, y, weights)
        return Line(slope, intercept, x, weights, y - intercept - slope * x)
    slope, regressor, weights = _york(x, y, x_error**2, s_y2)
    intercept = float(weights @ (y - slope * x) / weights.sum())
    return Line(slope, intercept, regressor, weights, y - intercept - slope * x)


def relative_weights(error: np.ndarray) -> np.ndarray:
    """Inverse squared errors of mean-one scale; only ratios matter."""
    weights = 1.0 / _floored(error) ** 2
    return weights / weights.mean()


def _floored(error: np.ndarray) -> np.ndarray:
    """Relative errors kept above 1 % of their median, so that no single point takes the fit over."""
    middle = float(np.median(error))
    return np.maximum(error, 0.01 * middle) if middle > 0 else np.ones_like(error)


def _solve(u, x, y, w) -> tuple[float, float]:
    """Slope and intercept of y on x with instrument u and weights w (u = x: weighted least squares)."""
    x0, y0 = w @ x / w.sum(), w @ y / w.sum()
    u_c = w * (u - w @ u / w.sum())
    slope = float(u_c @ (y - y0) / (u_c @ (x - x0)))
    return slope, float(y0 - slope * x0)


def _york(x, y, s_x2, s_y2, *, num_steps: int = 50):
    """York's fixed point for errors in both coordinates: slope, adjusted regressor, weights."""
    slope, intercept = _solve(x, x, y, np.ones_like(x))
    for _ in range(num_steps):
        y2 = _unexplained(y - intercept - slope * x, slope, s_x2) if s_y2 is None else s_y2
        w = 1.0 / np.maximum(y2 + slope**2 * s_x2, _TINY)
        w = w / w.mean()
        x0, y0 = w @ x / w.sum(), w @ y / w.sum()
        beta = (y2 * (x - x0) + slope * s_x2 * (y - y0)) / np.maximum(y2 + slope**2 * s_x2, _TINY)
        previous = slope
        slope, intercept = _solve(beta, x, y, w)
        if abs(slope - previous) <= 1e-12 * (1.0 + abs(slope)):
            break
    return slope, x0 + beta, w


def _unexplained(residual, slope, s_x2) -> np.ndarray:
    """Scatter that errors in x leave to y (never quite zero, so that York's weights stay finite)."""
    scatter = float(residual @ residual) / max(len(residual) - 2, 1)
    return np.full_like(residual, max(scatter - slope**2 * float(s_x2.mean()), 1e-3 * scatter + 1e-20))


class _Design:
    """Everything about `[1, u]` with weights w that each bootstrap replicate needs again."""

    def __init__(self, u: np.ndarray, w: np.ndarray):
        root = np.sqrt(w)
        self.ones = root / np.linalg.norm(root)
        trend = root * (u - w @ u / w.sum())
        norm = np.linalg.norm(trend)
        self.trend = trend / norm
        self.functional = self.trend / norm
        self.leverage = np.minimum(self.ones**2 + self.trend**2, 1.0 - 1e-6)
        overlap = np.correlate(self.functional, self.functional, "full")[len(u) :]
        self.overlap = 2.0 * overlap[:200] / (self.functional @ self.functional)

    def studentise(self, z: np.ndarray, *, correlated: bool):
        """Slope, standard error and lag-1 autocorrelation of each row of z.

        `V = sum a_i^2 e_i^2 / (1 - h_i)^2` (HC3) times `sum_ij a_i a_j rho^|i-j| / sum a_i^2`.
        """
        e = z - np.outer(z @ self.ones, self.ones) - np.outer(z @ self.trend, self.trend)
        variance = e**2 @ (self.functional / (1.0 - self.leverage)) ** 2
        rho = autocorrelation(e) if correlated else np.zeros(len(z))
        if correlated:
            powers = np.cumprod(np.broadcast_to(rho[:, None], (len(z), len(self.overlap))), axis=1)
            variance = variance * np.maximum(1.0 + powers @ self.overlap, 1e-3)
        return z @ self.functional, np.sqrt(variance), rho


def autocorrelation(e: np.ndarray) -> np.ndarray:
    """Lag-1 autocorrelation of each row, corrected for the two fitted parameters, kept in [0, 0.95].

    The residuals of a line have `E[r] = rho - (2 + 4 rho)/n`; negative values are cut, so that alternating
    residuals never narrow an interval.
    """
    n = e.shape[-1]
    raw = (e[..., 1:] * e[..., :-1]).sum(-1) / np.maximum((e * e).sum(-1), _TINY)
    return np.clip((raw * n + 2.0) / max(n - 4.0, 4.0), 0.0, _RHO_MAX)


def _recoloured(innovations: np.ndarray, rho: float) -> np.ndarray:
    """Stationary AR(1) rows driven by `innovations`, by one padded convolution."""
    n = innovations.shape[-1]
    start = innovations.copy()
    start[:, 0] /= math.sqrt(1.0 - rho * rho)
    if rho == 0.0:
        return start
    size = 1 << (2 * n - 1).bit_length()
    transfer = np.fft.rfft(rho ** np.arange(n), size)
    return np.fft.irfft(np.fft.rfft(start, size) * transfer, size)[:, :n]


def half_width(line: Line, *, confidence: float, num_bootstrap: int, correlated: bool, seed: int):
    """Half-width of the interval of the slope, and the autocorrelation it allowed for.

    Studentised wild bootstrap: the residuals' innovations keep their places and sizes and get random signs
    (heteroscedasticity survives); with `correlated` they are coloured again by an AR(1) whose coefficient is one
    standard error above its estimate. The interval is `slope +- q(|t*|) s`, s from `_Design.studentise`.
    """
    design = _Design(line.regressor, line.weights)
    z = np.sqrt(line.weights) * line.residual
    _, error, rho = design.studentise(z[None], correlated=correlated)
    r = float(rho[0])
    innovations = z / np.sqrt(1.0 - design.leverage)
    if correlated:
        r = min(r + math.sqrt((1.0 - r * r) / len(z)), _RHO_MAX)
        innovations = np.concatenate([z[:1] * math.sqrt(1.0 - r * r), z[1:] - r * z[:-1]])
        innovations /= np.sqrt(1.0 - design.leverage)
    signs = 2.0 * np.random.default_rng(seed).integers(0, 2, (num_bootstrap, len(z)), dtype=np.int8) - 1.0
    slopes, errors, _ = design.studentise(_recoloured(signs * innovations, r), correlated=correlated)
    t = np.sort(np.abs(slopes) / np.maximum(errors, _TINY))
    return float(t[math.ceil(confidence * (num_bootstrap + 1) - 1e-9) - 1] * error[0]), float(rho[0])


@lru_cache(maxsize=64)
def student_quantile(confidence: float, dof: int) -> float:
    """Two-sided Student quantile `P(|t| <= q) = confidence`, to about 1e-6 relative.

    With `t = sqrt(dof) tan(angle)` the distribution is the integral of `cos(angle)^(dof - 1)`.

    Example:
        >>> round(student_quantile(0.95, 3), 4), round(student_quantile(0.95, 30), 4)
        (3.1824, 2.0423)
    """
    top = math.pi / 2 if dof == 1 else math.atan(math.sqrt(math.expm1(min(80.0 / dof, 60.0))))
    angle = np.linspace(0.0, top, 40001)
    density = np.cos(angle) ** (dof - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(dof) * math.tan(float(np.interp(confidence, mass / mass[-1], angle)))
