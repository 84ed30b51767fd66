"""Which eigenvalues drive the loss down now, and how deep into the spectrum training has reached.

After the spectral position and reach of Nikolaou et al., arXiv:2605.31244; our operational definition: the
dissipation-weighted mean eigenvalue `r^T M^2 r / r^T M r`, relative to lambda_max, to the mean eigenvalue `tr M / m`,
and as a rank. It is exact with every method; what it is compared with is estimated where the kernel is not exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from grsd_callbacks.shells import ShellBudget


def spectral_position(
    scale: float, largest: float, mean: float, budget: ShellBudget, eigenvalues: Tensor | None
) -> dict[str, float]:
    """The position in three units.

    Args:
        scale: dissipation-weighted mean eigenvalue, 1/flow time.
        largest: lambda_max.
        mean: tr M / m, NaN where it is not known.
        budget: shells with counts, for the rank where eigenvalues are not known.
        eigenvalues: all of M, or None.

    Returns:
        `position_relative` scale / lambda_max, `position_to_mean` scale / (tr M / m), `position_rank` the number of
        eigenvalues above the scale: exact from eigenvalues, else from shell counts, spread evenly in log lambda over
        the shell that holds the scale; NaN where a count above it is not known.
    """
    return {
        "position_relative": scale / largest if largest > 0 else math.nan,
        "position_to_mean": scale / mean if mean > 0 else math.nan,
        "position_rank": _rank(scale, budget, eigenvalues),
    }


def _rank(scale: float, budget: ShellBudget, eigenvalues: Tensor | None) -> float:
    if not scale > 0:
        return math.nan
    if eigenvalues is not None:
        return float((eigenvalues > scale).sum())
    logs = np.log(budget.grid.edges.numpy())
    if not logs[0] <= math.log(scale) <= logs[-1]:
        return math.nan
    above = np.cumsum(budget.counts.numpy()[::-1])[::-1][1:]  # number above each edge
    return float(np.interp(math.log(scale), logs, above))


def spectral_reach(position: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """The smallest relative position and the largest rank so far.

    Args:
        position: of this measurement (`spectral_position`).
        before: position and reach of the measurement before; empty at the first one.

    Returns:
        `reach_relative`, `reach_rank`; NaN until there is a position.
    """

    def so_far(best: Callable[[list[float]], float], name: str, reached: str) -> float:
        known = [x for x in (position.get(name), before.get(reached)) if x is not None and math.isfinite(x)]
        return best(known) if known else math.nan

    return {
        "reach_relative": so_far(min, "position_relative", "reach_relative"),
        "reach_rank": so_far(max, "position_rank", "reach_rank"),
    }
