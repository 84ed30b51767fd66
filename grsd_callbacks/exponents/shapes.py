"""Is it a power law at all? Competing shapes for log y and the verdict between them.

All shapes are compared on the same whitened points (weights, then one AR(1) coefficient estimated from what a smooth
flexible curve leaves over), by `BIC = n log(SSR / n) + parameters * log n`.

Legend: X log x, Y log y, z whitened Y, f share of the floor in y at the end where y is smallest, s its exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_POINTS = 8  # below this a break and a floor have as many parameters as the data have freedom
MARGIN = 2.0  # BIC difference that counts ("positive" on the scale of Kass and Raftery)
TOLERANCE = 0.01  # distance from the line, in log y, that half of the points must exceed for another shape to count

_RHO = np.linspace(0.0, 0.95, 20)
_SHARES = np.array([1e-3, 0.02, 0.06, 0.12, 0.22, 0.35, 0.5, 0.65, 0.78, 0.88, 0.94, 0.975, 0.99, 0.999])
_PARAMETERS = {"power_law": 2, "exponential": 2, "curved": 3, "floor": 3, "broken": 4}


@dataclass(frozen=True, eq=False)
class Verdict:
    """What the comparison says; `evidence` holds BIC differences and distances from the straight line."""

    verdict: str
    reason: str
    evidence: dict[str, float]


def compare(log_x: np.ndarray, log_y: np.ndarray, weights: np.ndarray) -> Verdict:
    """Power law, exponential, one break, power law plus floor, or a curve in log-log (log-normal)?

    A shape beats the power law when its BIC is lower by more than 2 *and* it lies farther than 1 % (or 2 % of the
    range of log y, if that is less) from the straight line at half of the points: a bend that is resolved but tiny,
    or that concerns a few points at one end, is no other shape.
    The power law wins when no shape does better and the exponential is worse by more than 2; else it stays undecided.
    """
    if len(log_x) < MIN_POINTS:
        return Verdict("undecided", f"{len(log_x)} points cannot tell shapes apart: {MIN_POINTS} are needed", {})
    root = np.sqrt(weights / weights.mean())
    rho = _common_autocorrelation(log_x, log_y, root)

    def whiten(columns):
        return _prewhitened(columns * root, rho)

    curves = _fitted_shapes(log_x, log_y, whiten)
    n = len(log_x)
    bic = {
        name: n * math.log(float((whiten(log_y - curve) ** 2).sum()) / n + 1e-20) + _PARAMETERS[name] * math.log(n)
        for name, curve in curves.items()
    }
    line = curves["power_law"]
    bend = {name: float(np.median(np.abs(curve - line))) for name, curve in curves.items()}
    return _judge(bic, bend, tolerance=min(TOLERANCE, 0.02 * float(np.ptp(line))))


def _judge(bic: dict[str, float], bend: dict[str, float], *, tolerance: float) -> Verdict:
    """From BIC values and distances from the line to a verdict."""
    gain = {name: bic["power_law"] - value for name, value in bic.items() if name != "power_law"}
    evidence = {f"bic_{name}": -value for name, value in gain.items()}
    evidence.update({f"deviation_{name}": bend[name] for name in gain})
    serious = {name: value for name, value in gain.items() if bend[name] > tolerance}
    ranked = sorted(serious, key=serious.__getitem__, reverse=True)
    if ranked and serious[ranked[0]] > MARGIN:
        best, close = ranked[0], [name for name in ranked[1:] if serious[ranked[0]] - serious[name] < MARGIN]
        if best == "curved":
            return Verdict("undecided", "not a power law: log-log curvature (log-normal) describes it best", evidence)
        if close:
            return Verdict("undecided", f"not a power law: {best} and {' and '.join(close)} fit alike", evidence)
        return Verdict(best, "", evidence)
    if gain["exponential"] > -MARGIN:
        return Verdict("undecided", "an exponential fits about as well as the power law", evidence)
    if ranked and serious[ranked[0]] > 0.0:
        return Verdict("undecided", f"{ranked[0]} fits slightly better than the power law", evidence)
    return Verdict("power_law", "", evidence)


def _prewhitened(columns: np.ndarray, rho: float) -> np.ndarray:
    """AR(1) innovations along the last axis; the first entry gets its stationary scale."""
    first = math.sqrt(1.0 - rho * rho) * columns[..., :1]
    return np.concatenate([first, columns[..., 1:] - rho * columns[..., :-1]], axis=-1)


def _common_autocorrelation(log_x, log_y, root) -> float:
    """Restricted-likelihood AR(1) coefficient of what a cubic in log x leaves over, plus half a standard error.

    Estimated from a flexible curve, because the misfit of a wrong shape would itself look like autocorrelation;
    raised, because correlation that is missed makes wanderings look like shapes.
    """
    n, degree = len(log_x), 3 if len(log_x) >= 12 else 2
    centred = 2.0 * (log_x - log_x[0]) / (log_x[-1] - log_x[0]) - 1.0
    columns = np.concatenate([np.polynomial.legendre.legvander(centred, degree).T, log_y[None]]) * root
    scale = np.sqrt(1.0 - _RHO**2)[:, None, None] * columns[None, :, :1]
    z = np.concatenate([scale, columns[None, :, 1:] - _RHO[:, None, None] * columns[None, :, :-1]], axis=2)
    basis, y = z[:, :-1], z[:, -1:]
    gram = basis @ basis.transpose(0, 2, 1)
    coefficients = np.linalg.solve(gram, basis @ y.transpose(0, 2, 1))
    left = ((y - coefficients.transpose(0, 2, 1) @ basis) ** 2).sum((1, 2))
    logdet = np.linalg.slogdet(gram)[1]
    likelihood = 0.5 * np.log1p(-(_RHO**2)) - 0.5 * logdet - 0.5 * (n - degree - 1) * np.log(left + 1e-20)
    rho = float(_RHO[int(np.argmax(likelihood))])
    return min(rho + 0.5 * math.sqrt((1.0 - rho * rho) / n), float(_RHO[-1]))


def _fitted_shapes(log_x, log_y, whiten) -> dict[str, np.ndarray]:
    """Fitted values of log y for every shape."""
    ones, z = np.ones_like(log_x), whiten(log_y)
    centred = log_x - log_x.mean()

    def linear(*columns):
        basis = np.stack([ones, *columns])
        return np.linalg.lstsq(whiten(basis).T, z, rcond=None)[0] @ basis

    line = linear(centred)
    return {
        "power_law": line,
        "exponential": linear(np.exp(log_x - log_x[-1])),
        "curved": linear(centred, centred**2),
        "broken": linear(centred, _best_hinge(log_x, z, whiten)),
        "floor": floor_curve(log_x, log_y, whiten, slope=float((line[-1] - line[0]) / (log_x[-1] - log_x[0]))),
    }


def _best_hinge(log_x, z, whiten, *, num_breaks: int = 40) -> np.ndarray:
    """The column `max(X - X_break, 0)` that explains most.

    Each branch has at least three points and 15 % of the range of X: shorter ones are stray points, not exponents.
    """
    edge = 0.15 * (log_x[-1] - log_x[0])
    breaks = np.linspace(max(log_x[2], log_x[0] + edge), min(log_x[-3], log_x[-1] - edge), num_breaks)
    hinges = np.maximum(log_x - breaks[:, None], 0.0)
    q, _ = np.linalg.qr(whiten(np.stack([np.ones_like(log_x), log_x])).T)
    h = whiten(hinges)
    h = h - (h @ q) @ q.T
    explained = (h @ (z - q @ (q.T @ z))) ** 2 / np.maximum((h * h).sum(1), 1e-12)
    return hinges[int(np.argmax(explained))]


def floor_shape(distance: np.ndarray, exponent, share) -> np.ndarray:
    """`log(f + (1 - f) exp(s d))`, d the distance in log x from the end where y is smallest; zero at d = 0."""
    return np.logaddexp(np.log(share), np.log1p(-share) + exponent * distance)


def floor_curve(log_x, log_y, whiten: Callable[..., Any], *, slope: float) -> np.ndarray:
    """Best `log(F + A x^k)`, k of the sign of `slope`: a grid over (s, f), then Gauss-Newton with damping."""
    distance = log_x[-1] - log_x if slope <= 0 else log_x - log_x[0]
    z, unit = whiten(log_y), whiten(np.ones_like(log_x))
    unit = unit / np.linalg.norm(unit)

    def project(columns):
        return columns - (columns @ unit)[..., None] * unit

    size = max(abs(slope), 0.02)
    exponents = np.repeat(np.geomspace(0.5 * size, 25.0 * size, 24), len(_SHARES))
    shares = np.tile(_SHARES, 24)
    grid = floor_shape(distance, exponents[:, None], shares[:, None])
    target = project(z)
    best = int(np.argmin(((target - project(whiten(grid))) ** 2).sum(1)))
    start = np.array([math.log(exponents[best]), math.log(shares[best] / (1.0 - shares[best]))])

    def model(theta):  # rows of theta: (log s, logit f)
        theta = np.clip(theta, -12.0, 12.0)
        return floor_shape(distance, np.exp(theta[:, :1]), 1.0 / (1.0 + np.exp(-theta[:, 1:])))

    theta = _refined(start, lambda rows: project(whiten(model(rows))), target)
    curve = model(theta[None])[0]
    offset = float(unit @ (z - whiten(curve))) / float(unit @ whiten(np.ones_like(log_x)))
    return curve + offset


def _refined(theta: np.ndarray, image: Callable[..., Any], target: np.ndarray, *, num_steps: int = 8) -> np.ndarray:
    """Levenberg-Marquardt over a few parameters with forward differences."""
    damping, step = 1e-3, 1e-5
    shifts = np.concatenate([np.zeros((1, len(theta))), step * np.eye(len(theta))])
    images = image(theta + shifts)
    left = target - images[0]
    for _ in range(num_steps):
        jacobian = (images[1:] - images[0]) / step
        normal = jacobian @ jacobian.T
        normal[np.diag_indices(len(theta))] *= 1.0 + damping
        normal[np.diag_indices(len(theta))] += 1e-12
        trial = theta + np.clip(np.linalg.solve(normal, jacobian @ left), -1.0, 1.0)
        trial_images = image(trial + shifts)
        trial_left = target - trial_images[0]
        if trial_left @ trial_left < left @ left:
            gain = left @ left - trial_left @ trial_left
            theta, images, left, damping = trial, trial_images, trial_left, damping * 0.1
            if gain <= 1e-10 * (left @ left):
                break
        else:
            damping *= 10.0
    return theta
