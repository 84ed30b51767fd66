"""Logarithmic shells of the kernel's spectrum, and what each of them holds.

A grid has edges e_0 < ... < e_B and B + 2 shells that partition [0, inf): underflow [0, e_0) (null space
included), inner shells [e_a, e_{a+1}), overflow [e_B, inf). A value on an edge belongs to the shell above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grsd_callbacks.arguments import checked
from grsd_callbacks.spectrum import Eigendecomposition, SpectralMeasure

#: a shell is resolved if half its bounds' width is at most this fraction of the estimate
RESOLVED_FRACTION = 0.5


@dataclass(frozen=True, eq=False)
class ShellGrid:
    """Edges of logarithmic shells, frozen for a run.

    Attributes:
        edges: ascending, positive, shape (B + 1,), float64 on the CPU, unit 1/flow time.

    Example:
        >>> grid = ShellGrid.logarithmic(0.01, 1.0, per_decade=1)
        >>> grid.edges.tolist()
        [0.01, 0.1, 1.0]
        >>> grid.assign(torch.tensor([0.0, 0.1, 0.5, 7.0])).tolist()
        [0, 2, 2, 3]
    """

    edges: Tensor

    def __post_init__(self) -> None:
        try:
            edges = torch.as_tensor(self.edges, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"edges must be a tensor of numbers, got {type(self.edges).__name__} ({error})") from None
        if edges.dim() != 1 or edges.numel() < 2:
            raise ValueError(f"edges must be a vector of at least 2 values, got shape {tuple(edges.shape)}")
        if not bool(torch.isfinite(edges).all()) or float(edges[0]) <= 0 or bool((edges.diff() <= 0).any()):
            raise ValueError("edges must be finite, positive and strictly ascending")
        object.__setattr__(self, "edges", edges)

    @classmethod
    @checked
    def logarithmic(cls, low: float, high: float, per_decade: int = 3) -> ShellGrid:
        """Edges at 10^(k / per_decade) that enclose [low, high], so that runs compare.

        Args:
            low, high: positive, low < high, unit of eigenvalues.
            per_decade: shells a decade, a positive integer.
        """
        if not (isinstance(per_decade, int) and per_decade >= 1):
            raise ValueError(f"per_decade must be a positive integer, got {per_decade!r}")
        if not (0 < low < high < math.inf):
            raise ValueError(f"low and high must satisfy 0 < low < high, got low={low!r}, high={high!r}")
        first = math.floor(per_decade * math.log10(low) + 1e-9)
        last = max(math.ceil(per_decade * math.log10(high) - 1e-9), first + 1)
        return cls(torch.tensor([10.0 ** (k / per_decade) for k in range(first, last + 1)], dtype=torch.float64))

    @property
    def num_shells(self) -> int:
        """Number of shells, underflow and overflow included: len(edges) + 1."""
        return self.edges.numel() + 1

    @property
    def width(self) -> float:
        """h, the mean width of an inner shell in log lambda."""
        return float((self.edges[-1] / self.edges[0]).log()) / (self.edges.numel() - 1)

    @property
    def centers(self) -> Tensor:
        """Geometric centres of all shells; half a width beyond the ends for underflow and overflow."""
        logs = self.edges.log()
        ends = torch.stack([logs[0] - self.width / 2, logs[-1] + self.width / 2])
        return torch.cat([ends[:1], (logs[1:] + logs[:-1]) / 2, ends[1:]]).exp()

    def names(self) -> list[str]:
        """Labels "under", "s00", "s01", ..., "over" (zero-padded)."""
        inner = self.edges.numel() - 1
        digits = max(2, len(str(inner - 1)))
        return ["under", *(f"s{a:0{digits}d}" for a in range(inner)), "over"]

    def assign(self, eigenvalues: Tensor) -> Tensor:
        """Shell index of each eigenvalue (0 = underflow); negative rounding values are underflow."""
        return torch.bucketize(eigenvalues, self.edges.to(eigenvalues), right=True)

    def collect(self, eigenvalues: Tensor, values: Tensor) -> Tensor:
        """Sum `values` (one per eigenvalue) over sharp shells, shape (num_shells,), float64 on the CPU."""
        total = torch.zeros(self.num_shells, dtype=values.dtype, device=values.device)
        return total.index_add_(0, self.assign(eigenvalues).to(values.device), values).to("cpu", torch.float64)

    def above(self, floor: float) -> Tensor:
        """Shells that lie above a floor, (num_shells,) bool; the underflow shell if it holds all that lies below."""
        return torch.cat([self.edges[:1], self.edges]) >= floor * (1 - 1e-9)

    def steps(self, eigenvalues: Tensor, width: float | None = None) -> Tensor:
        """Theta_b(lambda) for every edge b, shape (B + 1, len): 1 above the edge, 0 below.

        Args:
            width: w of the smooth step sigmoid((log lambda - s_b) / w) in log lambda; None is the sharp step.
        """
        edges = self.edges.to(eigenvalues)[:, None]
        if width is None:
            return (eigenvalues[None, :] >= edges).to(eigenvalues.dtype)
        if not width > 0:
            raise ValueError(f"width must be positive (or None for sharp edges), got {width!r}")
        logs = eigenvalues.clamp_min(torch.finfo(eigenvalues.dtype).tiny).log()
        return torch.sigmoid((logs[None, :] - edges.log()) / width)

    def windows(self, eigenvalues: Tensor, width: float | None = None) -> Tensor:
        """Shell windows Theta_a - Theta_{a+1}, shape (num_shells, len); columns sum to one."""
        steps = self.steps(eigenvalues, width)
        one, zero = torch.ones_like(steps[:1]), torch.zeros_like(steps[:1])
        return torch.cat([one, steps]) - torch.cat([steps, zero])


@dataclass(frozen=True, eq=False)
class ShellBudget:
    """What each shell holds at one instant. Arrays over all shells, float64 on the CPU.

    Attributes:
        grid: the shells.
        energy: E_a = 1/2 sum g_i^2, unit of the loss; sums to 1/2 |r|^2 exactly.
        dissipation: D_a = sum lambda_i g_i^2 >= 0, loss per flow time; sums to r^T M r exactly.
        counts: number of eigenvalues, sums to m (NaN where not measured).
        energy_bounds, dissipation_bounds, count_bounds: (2, num_shells) lower and upper; rigorous for
            energy and dissipation (lanczos above the floor, krylov), 95 % for counts; equal to the value where it is
            exact, NaN where none is known (randomized).
        resolved: whether the energy of the shell is known to within a factor (`RESOLVED_FRACTION`).
    """

    grid: ShellGrid
    energy: Tensor
    dissipation: Tensor
    counts: Tensor
    energy_bounds: Tensor
    dissipation_bounds: Tensor
    count_bounds: Tensor
    resolved: Tensor


@checked
def shell_budget(
    spectrum: Eigendecomposition | SpectralMeasure,
    residual: Tensor | None,
    grid: ShellGrid,
    *,
    width: float | None = None,
) -> ShellBudget:
    """Energy, dissipation and counts per shell.

    Args:
        spectrum: eigenpairs of M (exact), or the spectral measure of the residual under M (bounds).
        residual: r, shape (m,); not needed for a measure, which was started at it.
        grid: the shells.
        width: smooth windows of this width in log lambda instead of sharp edges.

    Returns:
        A `ShellBudget`. From a measure, energies are midpoints of rigorous bounds and counts are NaN.

    Raises:
        ValueError: a residual of the wrong length, or none with an eigendecomposition.

    Example:
        >>> spectrum = Eigendecomposition(torch.tensor([0.5, 2.0]).double(), torch.eye(2).double())
        >>> budget = shell_budget(spectrum, torch.tensor([2.0, 1.0]), ShellGrid.logarithmic(0.1, 10, per_decade=1))
        >>> budget.energy.tolist(), budget.dissipation.tolist()
        ([0.0, 2.0, 0.5, 0.0], [0.0, 2.0, 2.0, 0.0])
    """
    if isinstance(spectrum, SpectralMeasure):
        return _bounded_budget(spectrum, grid) if width is None else _smooth_measure_budget(spectrum, grid, width)
    if residual is None or residual.numel() != spectrum.eigenvalues.numel():
        got = None if residual is None else tuple(residual.shape)
        raise ValueError(f"residual must have shape ({spectrum.eigenvalues.numel()},), got {got}")
    return _exact_budget(spectrum, residual, grid, width)


def _exact_budget(spectrum: Eigendecomposition, residual: Tensor, grid: ShellGrid, width: float | None) -> ShellBudget:
    values = spectrum.eigenvalues
    g = spectrum.project(residual)
    ones = torch.ones_like(values)
    if width is None:
        energy, dissipation, counts = (grid.collect(values, x) for x in (0.5 * g**2, values * g**2, ones))
    else:
        windows = grid.windows(values, width)
        energy, dissipation, counts = ((windows @ x).cpu() for x in (0.5 * g**2, values * g**2, ones))
    resolved = grid.above(spectrum.floor)
    bounds = [torch.stack([x, x]) for x in (energy, dissipation, counts)]
    return ShellBudget(grid, energy, dissipation, counts, bounds[0], bounds[1], bounds[2], resolved)


def _bounded_budget(measure: SpectralMeasure, grid: ShellGrid) -> ShellBudget:
    energy, energy_bounds = _shells_from(0.5 * measure.mass, measure.bounds(grid.edges))
    dissipation, dissipation_bounds = _shells_from(measure.dissipation, measure.dissipation_bounds(grid.edges))
    counts = torch.full_like(energy, float("nan"))
    half_width = (energy_bounds[1] - energy_bounds[0]) / 2
    resolved = half_width <= RESOLVED_FRACTION * energy
    resolved[0] = False
    return ShellBudget(
        grid, energy, dissipation, counts, energy_bounds, dissipation_bounds, torch.stack([counts, counts]), resolved
    )


def top_budget(
    values: Tensor, g2: Tensor, size: float, dissipation: float, floor: float, grid: ShellGrid
) -> ShellBudget:
    """Shells from the top of the spectrum only; the rest of both totals is put in the underflow shell.

    The rest of the dissipation can be negative, since Ritz pairs that have not converged leave cross terms.

    Args:
        values: Ritz values, shape (k,).   g2: squared coefficients of the residual in the Ritz vectors.
        size: |r|^2.   dissipation: r^T M r.
        floor: smallest converged Ritz value; shells that begin at or above it are resolved.
        grid: the shells.

    Resolved shells hold converged Ritz pairs; how much a Ritz vector's error moves between shells is not bounded, so
    their bounds are NaN, and so are counts elsewhere.
    """
    energy, dissipated = grid.collect(values, 0.5 * g2), grid.collect(values, values * g2)
    counts = grid.collect(values, torch.ones_like(values))
    rest, rest_dissipation = max(0.5 * size - float(energy.sum()), 0.0), dissipation - float(dissipated.sum())
    resolved = torch.cat([torch.zeros(1, dtype=torch.float64), grid.edges]) >= floor
    energy[0] += rest
    dissipated[0] += rest_dissipation
    counts = torch.where(resolved, counts, math.nan)
    unknown = torch.full((2, grid.num_shells), math.nan, dtype=torch.float64)
    return ShellBudget(grid, energy, dissipated, counts, unknown, unknown.clone(), unknown.clone(), resolved)


def _shells_from(total: float, bounds: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Shell contents (differences of cumulative midpoints) and their bounds from cumulative bounds at edges."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    lower, upper = (torch.cat([zero, b, one]) for b in bounds)
    middle = (lower + upper) / 2
    low = (lower[1:] - upper[:-1]).clamp_min(0.0)
    return total * middle.diff(), total * torch.stack([low, upper[1:] - lower[:-1]])


def _smooth_measure_budget(measure: SpectralMeasure, grid: ShellGrid, width: float) -> ShellBudget:
    """Gauss quadrature of smooth windows; no rigorous bounds, so bounds are NaN and nothing is resolved."""
    nodes, weights = measure.nodes, measure.weights
    windows = grid.windows(nodes, width)
    energy, dissipation = windows @ (0.5 * weights), windows @ (nodes * weights)
    nan = torch.full_like(energy, float("nan"))
    unknown = torch.stack([nan, nan])
    return ShellBudget(grid, energy, dissipation, nan, unknown, unknown, unknown, torch.zeros_like(nan) > 0)
