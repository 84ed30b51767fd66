"""How fast does the spectrum fall? `lambda_i ~ i^-a`, eigenvalues and energy per shell."""

from __future__ import annotations

import math

import numpy as np

from . import checks
from .powerlaw import fit_power_law
from .records import PowerLawFit, negated, refused_fit


def fit_spectrum(
    eigenvalues,
    *,
    max_rank: int | None = None,
    min_rank: int = 1,
    size: int | None = None,
    num_per_decade: int = 12,
    confidence: float = 0.95,
    bootstrap: str = "auto",
    num_bootstrap: int = 200,
    min_points: int = 5,
    min_decades: float = 1.0,
    compare: bool = True,
    seed: int = 0,
) -> PowerLawFit:
    """Capacity exponent a of `lambda_i ~ i^-a`, returned **positive** (minus the log-log slope).

    Eigenvalues are sorted, ranked from 1, cut to the window and thinned to geometric means in bins of equal width in
    log rank, so that the tail's many ranks do not outvote the head. Neighbouring eigenvalues err together: the
    interval is the correlated one.

    Args:
        eigenvalues: shape (m,) or the leading part of a spectrum, any order, units 1/flow time. Values that are not
            above round-off (`m * 2.2e-16 * largest`) are masked and counted.
        max_rank: last rank used. Default: the largest i < size/5; the eigenvalues of an m-point probe approximate the
            operator's only for i << m.
        min_rank: first rank used; raise it where a few outliers head the spectrum.
        size: m, the dimension of function space, where only leading eigenvalues are given.
        num_per_decade: bins in a decade of rank.
        confidence: see `fit_power_law`, as for the remaining arguments.
        bootstrap: see `fit_power_law`.
        num_bootstrap: see `fit_power_law`.
        min_points: bins needed.
        min_decades: decades of rank needed.
        compare: see `fit_power_law`.
        seed: see `fit_power_law`.

    Returns:
        A `PowerLawFit` over ranks; its window is in ranks (means of the outermost bins).

    Raises:
        ValueError: eigenvalues not one-dimensional, a rank window or size that makes no sense.
        TypeError: arguments of the wrong kind.

    Cost: a sort and one `fit_power_law`.

    Accuracy: exact for an exact power law. The probe's finite size bends the spectrum within the window, and that
        bias is not in the interval: for Gaussian features with a = 1.5 the mean was 1.46 (m = 200) and 1.47 (m = 400),
        and 95 % intervals held 1.5 in 65 and 50 % of 40 draws. Lower `max_rank` where it matters.

    Source: conventions of arXiv:2511.07892; window and thinning are our operational definition.

    Example:
        >>> import numpy as np
        >>> fit = fit_spectrum(np.arange(1, 501) ** -1.5)
        >>> round(fit.exponent, 9), fit.verdict, [round(rank) for rank in fit.window]
        (1.5, 'power_law', [1, 91])
    """
    values = checks.vector("eigenvalues", eigenvalues)
    size = len(values) if size is None else checks.count("size", size, at_least=max(len(values), 1))
    min_rank = checks.count("min_rank", min_rank, at_least=1)
    checks.count("num_per_decade", num_per_decade, at_least=1)
    last = max(math.ceil(size / 5) - 1, 0) if max_rank is None else checks.count("max_rank", max_rank, at_least=1)
    if max_rank is not None and last < min_rank:
        raise ValueError(f"max_rank must not be below min_rank = {min_rank}, got {max_rank}")
    if not np.isfinite(values).all():
        return refused_fit(
            f"{int((~np.isfinite(values)).sum())} eigenvalues are not finite", window=(math.nan, math.nan),
            num_points=0, num_decades=0.0,
        )  # fmt: skip
    ordered = np.sort(values)[::-1]
    cut = size * np.finfo(float).eps * max(ordered[0], 0.0) if len(ordered) else 0.0
    ordered = np.where(ordered > cut, ordered, np.nan)[min_rank - 1 : last]
    ranks = np.arange(min_rank, min_rank + len(ordered), dtype=float)
    ranks, ordered = checks.binned(ranks, ordered, num_per_decade)
    return negated(
        fit_power_law(
            ranks, ordered, confidence=confidence, bootstrap=bootstrap, num_bootstrap=num_bootstrap,
            min_points=min_points, min_decades=min_decades, compare=compare, seed=seed,
        )
    )  # fmt: skip


def fit_energy(
    edges,
    energy,
    counts=None,
    resolved=None,
    *,
    min_modes: int = 3,
    confidence: float = 0.95,
    bootstrap: str = "auto",
    num_bootstrap: int = 200,
    min_points: int = 5,
    min_decades: float = 1.0,
    compare: bool = True,
    seed: int = 0,
) -> PowerLawFit:
    """Energy exponent q of `E_a ~ lambda^q`: slope of log shell energy on log shell centre (geometric mean).

    Only inner shells enter (underflow and overflow have no centre), and of those the resolved ones with at least
    `min_modes` eigenvalues and positive energy. Shells must have equal width in log lambda for q to be the exponent.

    Args:
        edges: shape (K + 1,), lambda at the shell edges, ascending, units 1/flow time.
        energy: shape (K + 2,), [underflow, inner shells, overflow], units of the loss.
        counts: shape (K + 2,), eigenvalues per shell. They also set the weights: `1 / (2/N_a + 0.01)`, the variance
            of log E_a for a Gaussian residual plus 10 % that no count removes. None: all equal.
        resolved: shape (K + 2,), booleans; None: all resolved.
        min_modes: fewer eigenvalues leave a shell out (where counts are given).
        confidence: see `fit_power_law`, as for the remaining arguments.
        bootstrap: see `fit_power_law`.
        num_bootstrap: see `fit_power_law`.
        min_points: shells needed.
        min_decades: decades of lambda needed, between the outermost centres.
        compare: see `fit_power_law`.
        seed: see `fit_power_law`.

    Returns:
        A `PowerLawFit` of energy on lambda; `num_masked` in its evidence counts the inner shells left out.

    Raises:
        ValueError: shell arrays that do not match the edges, edges that do not ascend or are not uniform in log.
        TypeError: arguments of the wrong kind.

    Cost: one `fit_power_law`.

    Accuracy: exact for `E_a = A lambda_a^q`. For `g_i^2 ~ i^-delta` the slope is q up to the discreteness of shells
        with few modes.

    Source: THEORY of this package, after arXiv:2511.07892; masks and weights are our operational definition.

    Example:
        >>> import numpy as np
        >>> edges = np.logspace(-3, 0, 13)
        >>> centres = np.sqrt(edges[1:] * edges[:-1])
        >>> fit = fit_energy(edges, np.concatenate([[0.1], centres**0.5, [0.2]]))
        >>> round(fit.exponent, 9), fit.num_points
        (0.5, 12)
    """
    checks.switch("compare", compare)
    edges = checks.uniform_edges(edges)
    inner = checks.shell_values("energy", energy, edges)[1:-1].copy()
    error = None
    if counts is not None:
        modes = checks.shell_values("counts", counts, edges)[1:-1]
        few = ~(modes >= checks.count("min_modes", min_modes, at_least=1))
        inner[few] = np.nan
        error = np.where(few, np.nan, inner * np.sqrt(2.0 / np.maximum(modes, 1.0) + 0.01))
        error[~(inner > 0)] = np.nan
    if resolved is not None:
        inner[checks.shell_values("resolved", resolved, edges)[1:-1] == 0] = np.nan
    return fit_power_law(
        np.sqrt(edges[1:] * edges[:-1]), inner, y_error=error, confidence=confidence, bootstrap=bootstrap,
        num_bootstrap=num_bootstrap, min_points=min_points, min_decades=min_decades, compare=compare, seed=seed,
    )  # fmt: skip


def fit_counts(
    edges,
    counts,
    usable=None,
    *,
    min_modes: int = 3,
    confidence: float = 0.95,
    min_points: int = 5,
    min_decades: float = 1.0,
    compare: bool = True,
    seed: int = 0,
) -> PowerLawFit:
    """Count exponent n of `N_a ~ lambda^-n`, returned **positive**; `n = 1/a` where the spectrum is a power law.

    Slope of log N_a on log shell centre over the usable inner shells with at least `min_modes` eigenvalues; weights
    `1 / (1/N_a + 0.01)`.

    Args:
        edges: shape (K + 1,), lambda at the shell edges, ascending, uniform in log.
        counts: shape (K + 2,), eigenvalues per shell, underflow and overflow included.
        usable: shape (K + 2,), booleans; leave out shells that are not resolved, that the spectrum fills only in
            part, or whose ranks are beyond what the probe can say (m/5); None: all.
        min_modes: fewer eigenvalues leave a shell out.
        confidence: see `fit_power_law`, as for the remaining arguments.
        min_points: shells needed.
        min_decades: decades of lambda needed, between the outermost centres.
        compare: see `fit_power_law`.
        seed: see `fit_power_law`.

    Returns:
        A `PowerLawFit` of counts on lambda.

    Raises:
        ValueError: shell arrays that do not match the edges, edges that do not ascend or are not uniform in log.
        TypeError: arguments of the wrong kind.

    Cost: one `fit_power_law`.

    Accuracy: exact for `N_a = A lambda_a^-n`; whole numbers scatter by about one mode a shell.

    Source: conventions of arXiv:2511.07892; mask and weights are our operational definition.

    Example:
        >>> edges = np.logspace(-3, 0, 13)
        >>> fit = fit_counts(edges, np.concatenate([[9], 4 * np.sqrt(edges[1:] * edges[:-1]) ** -0.5, [0]]))
        >>> round(fit.exponent, 9)
        0.5
    """
    edges = checks.uniform_edges(edges)
    modes = checks.shell_values("counts", counts, edges)[1:-1].copy()
    modes[~(modes >= checks.count("min_modes", min_modes, at_least=1))] = np.nan
    if usable is not None:
        modes[checks.shell_values("usable", usable, edges)[1:-1] == 0] = np.nan
    return negated(
        fit_power_law(
            np.sqrt(edges[1:] * edges[:-1]), modes, y_error=modes * np.sqrt(1.0 / modes + 0.01), confidence=confidence,
            min_points=min_points, min_decades=min_decades, compare=compare, seed=seed,
        )
    )  # fmt: skip
