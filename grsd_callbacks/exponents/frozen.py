"""Where does learning stand? Frontiers in a frozen basis, and how many modes lie above them.

Shell arrays are [underflow, inner shells..., overflow]: len(edges) + 1 entries.
"""

from __future__ import annotations

import numpy as np

from . import checks


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


def progress_contour(edges, energy_0, energy_t, level: float = 0.5, *, labels=None) -> float:
    """Where a mode has made the progress `level`: lambda with `g_hat = -1/2 log(E_a(t) / E_a(0)) = level`.

    For frozen modes `g_hat = lambda t`, so the contour lies at `level / t`. Interpolated log-log between the labels
    of the inner shells (exact for `g_hat ~ lambda^p`), scanning down from large lambda to the first crossing.

    Args:
        edges: shape (K + 1,), lambda at the shell edges, ascending, units 1/flow time.
        energy_0: shape (K + 2,), shell energies at time zero in the frozen basis.
        energy_t: shape (K + 2,), shell energies now, in the same basis.
        level: positive; 0.5 is `E(t) = E(0) / e`.
        labels: shape (K,), the lambda that stands for each inner shell (`shell_labels`), NaN for a shell to leave
            out; None: their centres.

    Returns:
        lambda at the crossing; NaN where no two neighbouring usable shells (positive energies) bracket it. Shells
        whose energy grew have made no progress (below any level).

    Raises:
        ValueError: shell arrays that do not match the edges, a level that is not positive.
        TypeError: arguments of the wrong kind.

    Cost: none to speak of.

    Accuracy: with centres, a shell of few modes is off by up to half its width, and the mean of `exp(-2 lambda t)`
        over a shell is not its value at the centre: a shift of order h^2 in log lambda. With `shell_labels` both are
        gone for a frozen kernel.

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
    log_labels = 0.5 * (np.log(edges[1:]) + np.log(edges[:-1]))
    if labels is not None:
        labels = checks.vector("labels", labels, length=len(start))
        usable &= labels > 0
        log_labels = np.log(np.where(labels > 0, labels, 1.0))
    shells = np.flatnonzero(usable)
    progress = -0.5 * np.log(now[shells] / start[shells])
    crossed = np.flatnonzero((progress[1:] >= level) & (progress[:-1] < level))
    if not len(crossed):
        return float("nan")
    k = int(crossed[-1])
    low = np.log(max(progress[k], 1e-6 * level))
    share = (np.log(level) - low) / (np.log(progress[k + 1]) - low)
    below, above = log_labels[shells[k]], log_labels[shells[k + 1]]
    return float(np.exp(below + share * (above - below)))


def shell_labels(edges, eigenvalues, weights, level: float = 0.5) -> np.ndarray:
    """The lambda that stands for each inner shell in `progress_contour`, from the modes that it holds.

    A shell's energy decays as `sum w_i exp(-2 lambda_i t)` where the kernel is frozen. With t_a the time at which its
    progress is then `level`, its label is `level / t_a`: the contour of a frozen kernel passes it exactly at t_a.

    Args:
        edges: shape (K + 1,), lambda at the shell edges, ascending.
        eigenvalues: shape (m,), of the frozen basis, any order.
        weights: shape (m,), squared coefficients of the residual at time zero, not negative.
        level: of `progress_contour`.

    Returns:
        Labels, shape (K,), within the shells; NaN for shells without energy.

    Raises:
        ValueError: arrays that do not match, edges that do not ascend, negative weights, a level that is not positive.
        TypeError: arguments of the wrong kind.

    Cost: 60 passes over the modes, once a run.

    Accuracy: exact to 1e-15 in log lambda.

    Source: our operational definition.

    Example:
        >>> [round(float(label), 9) for label in shell_labels([0.1, 1.0, 10.0], [0.3, 4.0], [1.0, 2.0])]
        [0.3, 4.0]
    """
    edges = checks.shell_edges(edges)
    level = checks.real("level", level, above=0.0)
    eigenvalues = checks.vector("eigenvalues", eigenvalues)
    weights = checks.vector("weights", weights, length=len(eigenvalues))
    if (weights < 0).any():
        raise ValueError(f"weights must not be negative, got a smallest entry of {weights.min():g}")
    num = len(edges) - 1
    shell = np.searchsorted(edges, eigenvalues, side="right") - 1
    inside = (shell >= 0) & (shell < num) & (weights > 0)
    shell, lam, w = shell[inside], eigenvalues[inside], weights[inside]
    start = np.bincount(shell, w, num)
    held = start > 0
    low, high = np.log(level / edges[1:]), np.log(level / edges[:-1])  # of t_a
    for _ in range(60):
        middle = 0.5 * (low + high)
        left = np.bincount(shell, w * np.exp(-2.0 * lam * np.exp(middle)[shell]), num)
        early = left > start * np.exp(-2.0 * level)
        low, high = np.where(early, middle, low), np.where(early, high, middle)
    return np.where(held, level * np.exp(-0.5 * (low + high)), np.nan)


def resolved_modes(eigenvalues, lambda_star) -> np.ndarray:
    """k*: how many modes of the frozen basis lie above the frontier and so have been learned.

    The rank at which the ordered spectrum passes the frontier, interpolated log-log between neighbours (exact for
    `lambda_i ~ i^-a`; the whole number is its integer part).

    Args:
        eigenvalues: shape (m,), all eigenvalues of the frozen basis, any order.
        lambda_star: frontier or frontiers, any shape.

    Returns:
        k*, the frontier's shape; NaN where the frontier is NaN or outside the spectrum's positive part.

    Raises:
        ValueError: eigenvalues not one-dimensional.
        TypeError: arguments of the wrong kind.

    Cost: one sort.

    Source: `k* ~ t^(rho/a)`, densing of arXiv:2511.07892; the interpolation is ours.

    Example:
        >>> resolved_modes([1.0, 0.25, 0.0625], [0.5, 0.0625, 2.0]).round(9).tolist()  # 2^(1/2) between 1 and 2
        [1.414213562, 3.0, nan]
    """
    ordered = np.sort(checks.vector("eigenvalues", eigenvalues))
    frontiers = np.asarray(lambda_star, dtype=np.float64)
    ordered = ordered[ordered > 0]
    if not len(ordered):
        return np.full(frontiers.shape, np.nan)[()]
    ranks = np.log(np.arange(len(ordered), 0, -1.0))
    inside = (frontiers >= ordered[0]) & (frontiers <= ordered[-1])
    found = np.interp(np.log(np.where(inside, frontiers, 1.0)), np.log(ordered), ranks)
    return np.where(inside, np.exp(found), np.nan)[()]
