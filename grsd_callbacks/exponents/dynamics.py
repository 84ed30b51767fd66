"""How do loss, frontier and energy move in flow time? chi, rho, and the exponents of the spectral velocity.

Shell arrays are [underflow, inner shells..., overflow]: len(edges) + 1 entries.
"""

from __future__ import annotations

import numpy as np

from . import checks
from .powerlaw import fit_power_law
from .records import PowerLawFit, negated


def fit_loss(
    flow_time,
    loss,
    *,
    loss_error=None,
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

    Cost: one `fit_power_law`.

    Accuracy: exact for an exact power law. Finite spectra steepen: the relative bias of chi at time t is about
        `(2 lambda_min t)^q / Gamma(1 + q)`; keep the window where it is small.

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
    if not np.isfinite(flow_time).all() or (flow_time < 0).any():
        raise ValueError("flow_time must be finite and not negative")
    window = checks.declared_window(window)
    if loss_error is None:
        if isinstance(window, tuple):  # a bin must not reach over the end of the window
            low, high = window
            keep = (flow_time >= low * (1 - 1e-12)) & (flow_time <= high * (1 + 1e-12))
            flow_time, loss, window = flow_time[keep], loss[keep], None
        flow_time, loss = checks.binned(flow_time, loss, num_per_decade)
    return negated(
        fit_power_law(
            flow_time, loss, y_error=loss_error, window=window, confidence=confidence, bootstrap=bootstrap,
            num_bootstrap=num_bootstrap, min_points=min_points, min_decades=min_decades, compare=compare, seed=seed,
        )
    )  # fmt: skip


def frontier(edges, energy, *, quantile: float = 0.5) -> np.ndarray:
    """Frontier lambda*: below it lies the share `quantile` of all energy that is left.

    Energy is summed from the **bottom** (small lambda) upwards and interpolated linearly in log lambda within the
    shell that holds the quantile. Modes with large lambda are learned first, so the frontier falls with time, as
    `t^-rho` in a frozen basis.

    Args:
        edges: shape (K + 1,), lambda at the shell edges, ascending, units 1/flow time.
        energy: shape (..., K + 2), shell energies; leading axes (times, say) are kept.
        quantile: in (0, 1); 0.5 is the median.

    Returns:
        lambda*, shape (...), unit of the edges; a scalar for one set of shells. NaN where no shell can say: the
        quantile falls into the underflow or overflow shell (which have no second edge), energies are NaN or negative,
        or there is no energy at all.

    Raises:
        ValueError: shell arrays that do not match the edges, edges that do not ascend, quantile outside (0, 1).
        TypeError: arguments of the wrong kind.

    Cost: one cumulative sum.

    Accuracy: exact for energy that is uniform in log lambda within the shell; else within that shell.

    Source: frozen-basis frontier of arXiv:2511.07892 (elasticity); the energy median is our operational definition.

    Example:
        >>> import numpy as np
        >>> edges = np.array([1e-2, 1e-1, 1.0])
        >>> [round(float(value), 9) for value in frontier(edges, [[0.0, 1.0, 1.0, 0.0], [3.0, 1.0, 1.0, 0.0]])]
        [0.1, nan]
    """
    edges = checks.shell_edges(edges)
    energy = checks.shell_values("energy", energy, edges, batch=True)
    quantile = checks.real("quantile", quantile, above=0.0, below=1.0)
    sound = np.isfinite(energy).all(-1) & (energy >= 0).all(-1)
    energy = np.where(sound[..., None], energy, 0.0)
    total = energy.sum(-1)
    below = np.cumsum(energy, axis=-1)[..., :-1]  # energy under each edge
    goal = quantile * total
    reached = below >= (goal * (1.0 - 1e-14))[..., None]
    upper = np.argmax(reached, axis=-1)
    inside = sound & (total > 0) & reached.any(-1) & ((upper > 0) | (np.abs(below[..., 0] - goal) <= 1e-14 * total))
    upper = np.maximum(upper, 1)
    low, high = (np.take_along_axis(below, index[..., None], -1)[..., 0] for index in (upper - 1, upper))
    share = np.clip((goal - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    log_edges = np.log(edges)
    position = log_edges[upper - 1] + share * (log_edges[upper] - log_edges[upper - 1])
    return np.where(inside, np.exp(position), np.nan)[()]


def progress_contour(edges, energy_0, energy_t, level: float = 0.5) -> float:
    """Where a mode has made the progress `level`: lambda with `g_hat = -1/2 log(E_a(t) / E_a(0)) = level`.

    For frozen modes `g_hat = lambda t`, so the contour lies at `level / t`. Interpolated log-log between the centres
    of the inner shells (exact for `g_hat ~ lambda^p`), scanning down from large lambda to the first crossing.

    Args:
        edges: shape (K + 1,), lambda at the shell edges, ascending, units 1/flow time.
        energy_0: shape (K + 2,), shell energies at time zero in the frozen basis.
        energy_t: shape (K + 2,), shell energies now, in the same basis.
        level: positive; 0.5 is `E(t) = E(0) / e`.

    Returns:
        lambda at the crossing; NaN where no two neighbouring shells with positive energies bracket it. Shells whose
        energy grew have made no progress (below any level).

    Raises:
        ValueError: shell arrays that do not match the edges, a level that is not positive.
        TypeError: arguments of the wrong kind.

    Cost: none to speak of.

    Accuracy: within a shell of width h the mean of `exp(-2 lambda t)` is not its value at the centre: a shift of order
        h^2 in log lambda, the same at all times, which leaves rho alone.

    Source: progress of THEORY of this package, after arXiv:2511.07892; our operational definition.

    Example:
        >>> import numpy as np
        >>> edges = np.logspace(-2, 1, 31)
        >>> centres = np.sqrt(edges[1:] * edges[:-1])
        >>> start = np.ones(32)
        >>> now = np.concatenate([[1.0], np.exp(-2 * centres * 4.0), [0.0]])
        >>> round(progress_contour(edges, start, now), 9)
        0.125
    """
    edges = checks.shell_edges(edges)
    start = checks.shell_values("energy_0", energy_0, edges)[1:-1]
    now = checks.shell_values("energy_t", energy_t, edges)[1:-1]
    level = checks.real("level", level, above=0.0)
    usable = np.isfinite(start) & np.isfinite(now) & (start > 0) & (now > 0)
    progress = np.full(len(start), np.nan)
    progress[usable] = -0.5 * np.log(now[usable] / start[usable])
    log_centres = 0.5 * (np.log(edges[1:]) + np.log(edges[:-1]))
    for k in range(len(progress) - 1, 0, -1):
        if progress[k] >= level > progress[k - 1]:
            low = np.log(max(progress[k - 1], 1e-6 * level))
            share = (np.log(level) - low) / (np.log(progress[k]) - low)
            return float(np.exp(log_centres[k - 1] + share * (log_centres[k] - log_centres[k - 1])))
    return float("nan")


def elasticity(
    flow_time,
    lambda_star,
    *,
    window=None,
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
    return negated(
        fit_power_law(
            flow_time, lambda_star, window=window, confidence=confidence, bootstrap=bootstrap,
            num_bootstrap=num_bootstrap, min_points=min_points, min_decades=min_decades, compare=compare, seed=seed,
        )
    )  # fmt: skip
