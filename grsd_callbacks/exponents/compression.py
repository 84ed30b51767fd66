"""What does it cost to forget the weakest modes? Pruning as spectral truncation, and its invariant with learning.

Legend: g_i coefficients of the residual in a frozen basis, lambda_c the cut, lambda* the frontier, pi_c the exponent of
the pruned loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import checks
from .powerlaw import fit_power_law
from .records import Closure, Estimate, PowerLawFit, refused_fit
from .scaling import closure, combine

#: cuts begin at so many times the frontier: what lies nearer is learned only in part
BEYOND = 4.0
_PER_DECADE = 8


@dataclass(frozen=True, eq=False)
class Compression:
    """The cost of truncating the learned function, and what it says of learning.

    Attributes:
        cuts: lambda_c, shape (k,), ascending: between neighbouring eigenvalues.
        loss: after truncation below each cut, shape (k,), unit of the loss.
        pi_c: fit of loss on lambda_c (tail added), positive where forgetting more costs more.
        chi_over_pi_c: chi / pi_c with its interval; NaN without chi.
        invariant: `chi / pi_c - rho`, zero where compression and learning obey one law; NaN without both.
    """

    cuts: np.ndarray
    loss: np.ndarray
    pi_c: PowerLawFit
    chi_over_pi_c: Estimate
    invariant: Closure


def compression_exponents(
    eigenvalues,
    start,
    now,
    frontier: float,
    *,
    tail: float = 0.0,
    chi: PowerLawFit | Estimate | float = float("nan"),
    rho: PowerLawFit | Estimate | float = float("nan"),
    min_points: int = 5,
    min_decades: float = 1.0,
    compare: bool = True,
    seed: int = 0,
) -> Compression:
    """Truncate the learned function below a cut in the spectrum and fit what that costs: `L_prune ~ lambda_c^pi_c`.

    The learned function is what training has changed, `r(t) - r(0)`. Truncated below lambda_c it keeps only modes with
    larger eigenvalues, so modes below fall back to g_i(0): `L_prune = 1/2 sum_{lambda_i < lambda_c} g_i(0)^2 +
    1/2 sum_{lambda_i > lambda_c} g_i(t)^2`. Far behind the frontier that is `lambda_c^q`, so `pi_c = q` and
    `chi / pi_c = rho`.

    Args:
        eigenvalues: shape (m,), of the frozen basis, any order, 1/flow time.
        start: shape (m,), g_i(0), coefficients of the residual at time zero in that basis.
        now: shape (m,), g_i(t) in the same basis.
        frontier: lambda*, down to which modes have been learned (`progress_contour`).
        tail: energy of the modes that the probe does not hold (`energy_tail`), added to the loss before the fit.
        chi: exponent of the loss, for the invariant.
        rho: exponent of the frontier, for the invariant.
        min_points: bins needed (8 a decade of lambda_c).
        min_decades: decades of lambda_c needed, between `4 frontier` and the second largest eigenvalue.
        compare: see `fit_power_law`.
        seed: see `fit_power_law`.

    Returns:
        A `Compression`; refused fits hold NaN and a reason.

    Raises:
        ValueError: arrays that do not match or are not finite, tail negative, options outside their range.
        TypeError: arguments of the wrong kind.

    Cost: a sort and one `fit_power_law`.

    Accuracy: the pruned loss is exact for the basis; on `lambda_i = i^-3/2`, `g_i^2 = i^-(1 + 3q/2)` pi_c is q to 2 %.

    Source: learning and compression of arXiv:2511.07892; our operational form (THEORY, section 3).

    Example:
        >>> ranks = np.arange(1.0, 2001.0)
        >>> lam, g = ranks**-1.5, ranks ** -((1 + 1.5 * 0.6) / 2)
        >>> learned = compression_exponents(lam, g, g * np.exp(-lam * 500.0), 1e-3, tail=0.5 * 2000**-0.9 / 0.9)
        >>> round(learned.pi_c.exponent, 2), learned.pi_c.verdict
        (0.59, 'power_law')
    """
    lam = checks.vector("eigenvalues", eigenvalues)
    start = checks.vector("start", start, length=len(lam))
    now = checks.vector("now", now, length=len(lam))
    if not (np.isfinite(lam).all() and np.isfinite(start).all() and np.isfinite(now).all()):
        raise ValueError("eigenvalues, start and now must be finite")
    tail = checks.real("tail", tail, above=0.0, closed=True)
    order = np.argsort(lam)
    lam, before, after = lam[order], start[order] ** 2, now[order] ** 2
    below = lam[:-1] > 0
    cuts = np.sqrt(lam[:-1] * lam[1:], where=below, out=np.zeros(len(below)))
    loss = 0.5 * (np.cumsum(before)[:-1] + np.cumsum(after[::-1])[::-1][1:])
    fit = _fitted(cuts, loss + tail, frontier, min_points, min_decades, compare, seed)
    ratio = combine(lambda x, pi: x / pi if pi > 0 else float("nan"), chi, fit)
    return Compression(cuts, loss, fit, ratio, closure(ratio, rho))


def _fitted(cuts, loss, frontier: float, min_points: int, min_decades: float, compare: bool, seed: int) -> PowerLawFit:
    """The fit behind the frontier, without the cut below the largest mode alone."""
    if not (np.isfinite(frontier) and frontier > 0):
        nan = float("nan")
        return refused_fit(
            "no frontier: it is not known what is learned", window=(nan, nan), num_points=0, num_decades=0.0
        )
    inside = cuts >= BEYOND * frontier
    inside[-1:] = False
    x, y = checks.binned(cuts[inside], loss[inside], _PER_DECADE)
    return fit_power_law(x, y, min_points=min_points, min_decades=min_decades, compare=compare, seed=seed)
