"""Are all times one curve? Self-similar collapse of shell energies, `E_a(t) t^chi` against `lambda t^rho`.

Legend: X log(lambda t^rho), Y log(E t^chi), master curve a broken line in X with one knot a shell, fitted to all times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from . import checks, intervals
from .records import Estimate

#: groups of neighbouring times that the jackknife leaves out in turn, and the fewest times
NUM_GROUPS, MIN_TIMES = 8, 8
#: energies below this share of their time's largest are not asked to collapse: they have decayed exponentially
LEAST_SHARE = 0.05


@dataclass(frozen=True, eq=False)
class Collapse:
    """How well one curve describes all times.

    Attributes:
        score: `1 - (spread / spread without scaling)^2` with its jackknife interval: 1 for a perfect collapse, 0 if
            scaling does no better than plain E_a(t) over lambda, negative if worse.
        spread: rms distance of Y from the master curve.
        null: 95 % quantile of the score with the times permuted between the curves: scores above it are no accident.
        x, y, time: scaled coordinates and flow times of the points, shape (k,).
        reason: why there is no score; empty otherwise.
    """

    score: Estimate
    spread: float
    null: float
    x: np.ndarray
    y: np.ndarray
    time: np.ndarray
    reason: str = ""

    @property
    def is_significant(self) -> bool:
        """Whether the lower end of the score's interval is above the null."""
        return self.score.lower > self.null


def self_similar_collapse(
    flow_time,
    scales,
    energy,
    *,
    chi: float,
    rho: float = 1.0,
    counts=None,
    min_modes: int = 3,
    confidence: float = 0.95,
    num_permutations: int = 200,
    seed: int = 0,
) -> Collapse:
    """Score the collapse of shell energies at all times on one curve.

    `E_a(t) t^chi` against `lambda t` for instantaneous shells (rho = 1), `lambda_0 t^rho` for the shells of a frozen
    basis. Time-rescaling covariance makes them one curve; for a frozen power-law kernel it is `x^q exp(-2x)`.

    Args:
        flow_time: shape (n,), positive, ascending.
        scales: shape (K,), lambda of the shells, positive, ascending, even in log.
        energy: shape (n, K), shell energies; what is not positive is left out.
        chi: loss exponent.
        rho: frontier exponent.
        counts: shape (K,) or (n, K), eigenvalues per shell, which leaves out shells with few; None: all count.
        min_modes: fewest eigenvalues of a shell.
        confidence: of the interval.
        num_permutations: of the null; at least 19.
        seed: of the permutations' own generator.

    Returns:
        A `Collapse`; NaN with a reason for fewer than 8 times or 20 points, or where no energy changes.

    Raises:
        ValueError: arrays that do not match, times or scales that are not positive and ascending, options outside
            their range.
        TypeError: arguments of the wrong kind.

    Cost: a few hundred least-squares fits of about 20 knots: some 50 ms.

    Accuracy: shells of few modes scatter by about one over their number; the interval is that of eight groups of times
        (Student, 7 degrees of freedom), and does not know errors of chi and rho.

    Source: time-rescaling covariance of arXiv:2512.18209 (in words); score, null and interval are our definitions.

    Example:
        >>> t, lam = np.geomspace(1, 100, 20), np.geomspace(1e-3, 1, 19)
        >>> energy = lam**0.5 * np.exp(-2 * lam * t[:, None])
        >>> found = self_similar_collapse(t, lam, energy, chi=0.5)
        >>> found.score.value > 0.99, found.is_significant
        (True, True)
    """
    t = checks.vector("flow_time", flow_time)
    lam = checks.vector("scales", scales)
    for name, values in (("flow_time", t), ("scales", lam)):
        if not (np.isfinite(values).all() and (values > 0).all() and (np.diff(values) > 0).all()):
            raise ValueError(f"{name} must be positive and ascending")
    chi, rho = checks.real("chi", chi), checks.real("rho", rho)
    checks.count("num_permutations", num_permutations, at_least=19)
    checks.real("confidence", confidence, above=0.0, below=1.0)
    E = np.asarray(energy, dtype=np.float64)
    if E.shape != (len(t), len(lam)):
        raise ValueError(f"energy must have shape ({len(t)}, {len(lam)}), got {E.shape}")
    usable = np.isfinite(E) & (E > 0)
    if counts is not None:
        usable &= np.broadcast_to(np.asarray(counts, dtype=np.float64), E.shape) >= min_modes
    top = np.where(usable, E, 0.0).max(1, keepdims=True, initial=0.0)
    usable &= E > LEAST_SHARE * top
    rows, columns = np.nonzero(usable)
    if len(np.unique(rows)) < MIN_TIMES or len(rows) < 20:
        return _refused(
            f"{len(np.unique(rows))} times with {len(rows)} points: {MIN_TIMES} times, 20 points are needed"
        )
    problem = _Problem(np.log(t), rows, np.log(lam)[columns], np.log(E[rows, columns]), float(np.log(lam[1] / lam[0])))
    return _scored(problem, chi, rho, confidence, num_permutations, seed)


@dataclass(frozen=True, eq=False)
class _Problem:
    """Points of all times: log t, the time each point belongs to, log lambda, log E, and the distance of knots."""

    log_t: np.ndarray
    row: np.ndarray
    log_lam: np.ndarray
    log_e: np.ndarray
    width: float

    def spread(self, chi: float, rho: float, log_t: np.ndarray, keep=slice(None)) -> float:
        """Mean squared distance from the master curve with these times."""
        shift = log_t[self.row[keep]]
        return _misfit(self.log_lam[keep] + rho * shift, self.log_e[keep] + chi * shift, self.width)

    def score(self, chi: float, rho: float, log_t: np.ndarray, keep=slice(None)) -> float:
        plain = self.spread(0.0, 0.0, self.log_t, keep)
        return 1.0 - self.spread(chi, rho, log_t, keep) / plain if plain > 0 else math.nan


def _misfit(x: np.ndarray, y: np.ndarray, width: float) -> float:
    """Residual variance of y about a broken line in x with knots `width` apart, by least squares."""
    position = (x - x.min()) / width
    left = np.floor(position).astype(int)
    share = position - left
    basis = np.zeros((len(x), left.max() + 2))
    index = np.arange(len(x))
    basis[index, left], basis[index, left + 1] = 1.0 - share, share
    rest = y - basis @ np.linalg.lstsq(basis, y, rcond=None)[0]
    return float(rest @ rest) / max(len(x) - int((basis.sum(0) > 0).sum()), 1)


def _scored(problem: _Problem, chi, rho, confidence, num_permutations, seed) -> Collapse:
    """Score, jackknife interval over groups of neighbouring times, and permutation null."""
    log_t = problem.log_t
    shift = log_t[problem.row]
    x, y = np.exp(problem.log_lam + rho * shift), np.exp(problem.log_e + chi * shift)
    value = problem.score(chi, rho, log_t)
    if not math.isfinite(value):
        return _refused("no energy changes")
    times = np.unique(problem.row)
    groups = np.array_split(times, NUM_GROUPS)
    left_out = np.array([problem.score(chi, rho, log_t, ~np.isin(problem.row, group)) for group in groups])
    error = math.sqrt((NUM_GROUPS - 1) / NUM_GROUPS * float(((left_out - left_out.mean()) ** 2).sum()))
    half = intervals.student_quantile(confidence, NUM_GROUPS - 1) * error
    rng = np.random.default_rng(seed)
    permuted = sorted(problem.score(chi, rho, _permuted(log_t, times, rng)) for _ in range(num_permutations))
    null = permuted[math.ceil(0.95 * (num_permutations + 1)) - 1]
    spread = math.sqrt(problem.spread(chi, rho, log_t))
    return Collapse(Estimate(value, value - half, value + half), spread, null, x, y, np.exp(shift))


def _permuted(log_t: np.ndarray, times: np.ndarray, rng) -> np.ndarray:
    other = log_t.copy()
    other[times] = log_t[rng.permutation(times)]
    return other


def _refused(reason: str) -> Collapse:
    nan, none = math.nan, np.zeros(0)
    return Collapse(Estimate(nan, nan, nan), nan, nan, none, none, none, reason)
