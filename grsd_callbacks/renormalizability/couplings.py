"""Are the couplings between shells the same at every scale? Log-shift invariance, with a null and a floor.

    R_ab = rms_{i in a, j in b, i != j} |<u_i, M' u_j>| / (lambda_i lambda_j)^(1/2)
    log R_ab = k(|a - b|) + zeta (s_a + s_b) / 2 + residual,      defect = standard deviation of the residual

s_a are the log centres of the shells. A shift of log lambda then changes couplings by a factor only: defect 0. This
is our operational definition (THEORY, conditions); arXiv:2512.18209 names the condition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grsd_callbacks.arguments import checked
from grsd_callbacks.renormalizability.flow import sharp_transfer
from grsd_callbacks.shells import ShellGrid

#: fewest degrees of freedom that a defect is reported for
LEAST_FREEDOM = 3


@dataclass(frozen=True, eq=False)
class LogShiftInvariance:
    """How far couplings between shells are from a function of their distance times a power of lambda.

    Attributes:
        defect: standard deviation of the residual of log R (unbiased variance); 0.1 is a scatter of 10 %. 0 is
            exact invariance.
        zeta: power of lambda that couplings grow with along a diagonal |a - b| = const.
        zeta_error: standard error of zeta from that scatter.
        adjusted_r2: share of the variance of log R explained by distance and zeta, corrected for their number.
        floor: defect that finite numbers of modes alone would give to Gaussian couplings, about
            `mean(1 / (2 N_ab))^(1/2)`, N_ab pairs of modes behind R_ab.
        p_value: share of shuffled shells that are explained as well, from `num_null` draws; NaN without.
        locality: `sum |T_ab| |a - b| / sum |T_ab|` in shells, NaN without coefficients.
        locality_p: share of shuffled shells whose transfer is as local; NaN without draws or coefficients.
        couplings: R, shape (num_shells, num_shells), NaN where there is none, under- and overflow included.
        shells: indices of the shells that entered.
        num_pairs: values of log R that entered.
        width: h, of a shell in log lambda.
        reason: why there is no defect; empty otherwise.
    """

    defect: float
    zeta: float
    zeta_error: float
    adjusted_r2: float
    floor: float
    p_value: float
    locality: float
    locality_p: float
    couplings: Tensor
    shells: tuple[int, ...]
    num_pairs: int
    width: float
    reason: str = ""


@checked
def log_shift_invariance(
    eigenvalues: Tensor,
    velocity: Tensor,
    grid: ShellGrid,
    *,
    coefficients: Tensor | None = None,
    min_modes: int = 4,
    drop_top: int = 1,
    shells: Sequence[int] | None = None,
    num_null: int = 0,
    seed: int = 0,
) -> LogShiftInvariance:
    """Toeplitz defect, zeta and fit of the couplings between shells, and how shuffled shells would do.

    Args:
        eigenvalues: lambda_i of M, shape (k,), 1 / flow time.
        velocity: <u_i, M' u_j>, symmetric, shape (k, k), 1 / flow time^2.
        grid: the shells; under- and overflow never enter.
        coefficients: g_i = <u_i, r>, shape (k,), for the locality of the transfer.
        min_modes: fewest eigenvalues of a shell that enters.
        drop_top: topmost occupied shells left out (outlying eigenvalues of the mean output, say).
        shells: indices of the shells that enter, in the stead of what min_modes and drop_top choose.
        num_null: draws of shuffled shells behind the p-value.
        seed: of the private generator that shuffles.

    Returns:
        A `LogShiftInvariance`; NaN and a reason where fewer than `LEAST_FREEDOM` degrees of freedom remain.

    Raises:
        ValueError: shapes that do not fit, counts that are not integers of at least 1 (min_modes) or 0, or
            shells beyond the grid.

    Cost: 2 k^2 num_shells multiplications, and 30 microseconds a draw.

    Accuracy: invariant under rotations within degenerate eigenspaces of one shell. The p-value is exact (a permutation
        test) where shells are exchangeable: then P(p <= 0.05) = 0.05 for `num_null` = 19, 39, ...

    Source: operational definition of this package for a condition of arXiv:2512.18209.

    Example:
        The covariant chain: one mode a shell, neighbours coupled by a rate that only scales.

        >>> from grsd_callbacks.testing import CovariantChain
        >>> chain = CovariantChain(num_modes=8)
        >>> lam = chain.eigenvalues
        >>> rate = chain.coupling_ratio() * (lam[:, None] * lam[None, :]).sqrt()
        >>> grid = ShellGrid(lam[0] * torch.exp(chain.spacing * (torch.arange(9).double() - 0.5)))
        >>> found = log_shift_invariance(lam, rate, grid, min_modes=1, drop_top=0)
        >>> abs(found.defect) < 1e-9, round(found.zeta, 9)
        (True, 1.0)
    """
    k = eigenvalues.numel()
    if velocity.shape != (k, k) or (coefficients is not None and coefficients.shape != (k,)):
        raise ValueError(f"velocity must have shape ({k}, {k}) and coefficients ({k},), got {tuple(velocity.shape)}")
    for name, value, least in (("min_modes", min_modes, 1), ("drop_top", drop_top, 0), ("num_null", num_null, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    lam, moved = (x.detach().to("cpu", torch.float64) for x in (eigenvalues, velocity))
    couplings, num_pairs = shell_couplings(lam, moved, grid)
    used = _usable_shells(lam, grid, min_modes, drop_top) if shells is None else _chosen(shells, grid)
    R, N = (x.numpy()[np.ix_(used, used)] for x in (couplings, num_pairs))
    centers = grid.centers.log().numpy()[used]
    fit = _fit(R, used, centers)
    p_value = _shuffled(R, used, centers, fit, num_null, seed) if num_null and not fit.reason else math.nan
    locality, locality_p = _locality(lam, coefficients, moved, grid, num_null, seed)
    return LogShiftInvariance(
        defect=fit.defect,
        zeta=fit.zeta,
        zeta_error=fit.zeta_error,
        adjusted_r2=fit.adjusted_r2,
        floor=_sampling_floor(R, N),
        p_value=p_value,
        locality=locality,
        locality_p=locality_p,
        couplings=couplings,
        shells=tuple(int(a) for a in used),
        num_pairs=fit.num_pairs,
        width=grid.width,
        reason=fit.reason,
    )


def refined(grid: ShellGrid) -> ShellGrid:
    """Every shell cut in two at its geometric centre: h becomes h / 2."""
    logs = grid.edges.log()
    return ShellGrid(torch.cat([logs, (logs[1:] + logs[:-1]) / 2]).sort().values.exp())


def shell_couplings(lam: Tensor, velocity: Tensor, grid: ShellGrid) -> tuple[Tensor, Tensor]:
    """R_ab and the number of pairs of different modes behind each, both (num_shells, num_shells); NaN for none."""
    positive = lam > 0
    scaled = velocity**2 / torch.where(positive, lam, math.inf)[:, None] / torch.where(positive, lam, math.inf)
    scaled.fill_diagonal_(0.0)
    member = torch.nn.functional.one_hot(grid.assign(lam), grid.num_shells).to(lam) * positive[:, None]
    sizes = member.sum(0)
    pairs = sizes[:, None] * sizes[None, :] - torch.diag(sizes)
    mean = member.T @ scaled @ member / torch.where(pairs > 0, pairs, math.nan)
    return mean.sqrt(), pairs


def _usable_shells(lam: Tensor, grid: ShellGrid, min_modes: int, drop_top: int) -> np.ndarray:
    counts = torch.bincount(grid.assign(lam), minlength=grid.num_shells).numpy()
    occupied = np.flatnonzero(counts > 0)
    kept = occupied[: max(len(occupied) - drop_top, 0)]
    kept = kept[(kept > 0) & (kept < grid.num_shells - 1)]
    return kept[counts[kept] >= min_modes]


def _chosen(shells: Sequence[int], grid: ShellGrid) -> np.ndarray:
    chosen = np.unique(np.asarray(shells, dtype=int))
    if len(chosen) and not (0 < chosen[0] and chosen[-1] < grid.num_shells - 1):
        raise ValueError(f"shells must be indices from 1 to {grid.num_shells - 2}, got {list(shells)}")
    return chosen


@dataclass(frozen=True)
class _Fit:
    defect: float
    zeta: float
    zeta_error: float
    adjusted_r2: float
    num_pairs: int
    reason: str = ""


def _fit(R: np.ndarray, shells: np.ndarray, centers: np.ndarray) -> _Fit:
    """Least squares of log R_ab, a <= b, on one constant a distance and zeta: within-distance means are taken out."""
    a, b = np.triu_indices(len(shells))
    values = R[a, b]
    used = np.isfinite(values) & (values > 0)
    a, b, y = a[used], b[used], np.log(values[used])
    distance, x = shells[b] - shells[a], (centers[a] + centers[b]) / 2
    num_distances = len(np.unique(distance))
    freedom = len(y) - num_distances - 1
    if freedom < LEAST_FREEDOM:
        why = f"{len(shells)} shells with {len(y)} couplings leave {max(freedom, 0)} degrees of freedom, "
        return _Fit(math.nan, math.nan, math.nan, math.nan, len(y), why + f"{LEAST_FREEDOM} are needed")
    x_in, y_in = (_within(distance, v) for v in (x, y))
    spread = float(x_in @ x_in)
    zeta = float(x_in @ y_in) / spread
    variance = float(np.square(y_in - zeta * x_in).sum()) / freedom
    total = float(y.var(ddof=1))
    r2 = 1 - variance / total if total > 0 else math.nan
    return _Fit(math.sqrt(variance), zeta, math.sqrt(variance / spread), r2, len(y))


def _within(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    counts = np.bincount(groups)
    means = np.bincount(groups, values) / np.maximum(counts, 1)
    return values - means[groups]


def _shuffled(R: np.ndarray, shells: np.ndarray, centers: np.ndarray, fit: _Fit, num: int, seed: int) -> float:
    """Share of shuffles of the shells that are explained as well; too few degrees of freedom explain nothing."""
    random = np.random.default_rng(seed)
    as_good = 0
    for _ in range(num):
        order = random.permutation(len(shells))
        other = _fit(R[np.ix_(order, order)], shells, centers)
        as_good += other.defect <= fit.defect  # NaN is not
    return (1 + as_good) / (1 + num)


def _sampling_floor(R: np.ndarray, N: np.ndarray) -> float:
    """sd of log rms of N independent Gaussians is (2 N)^(-1/2); a shell's own pairs are counted once."""
    a, b = np.triu_indices(len(R))
    pairs = np.where(a == b, N[a, b] / 2, N[a, b])
    used = np.isfinite(R[a, b]) & (R[a, b] > 0)
    return float(np.sqrt(np.mean(1 / (2 * pairs[used])))) if used.any() else math.nan


def _locality(
    lam: Tensor, g: Tensor | None, velocity: Tensor, grid: ShellGrid, num_null: int, seed: int
) -> tuple[float, float]:
    """Mean distance of the transfer between occupied inner shells, and the share of shuffles that are as local."""
    if g is None:
        return math.nan, math.nan
    counts = torch.bincount(grid.assign(lam), minlength=grid.num_shells).numpy()[1:-1]
    index = np.flatnonzero(counts)
    T = sharp_transfer(lam, velocity, g.to(lam), grid)[1:-1, 1:-1].abs().numpy()[np.ix_(index, index)]
    total, distance = float(T.sum()), np.abs(index[:, None] - index[None, :])
    if not total > 0:
        return math.nan, math.nan
    found = float((T * distance).sum()) / total
    if not num_null:
        return found, math.nan
    random = np.random.default_rng(seed)
    orders = [random.permutation(len(index)) for _ in range(num_null)]
    as_local = sum((T[np.ix_(order, order)] * distance).sum() / total <= found * (1 + 1e-12) for order in orders)
    return found, (1 + int(as_local)) / (1 + num_null)
