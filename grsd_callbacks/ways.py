"""The ways from an operator and a residual to spectrum, shells and basis: one function a method.

Each returns what an `Instant` holds beside the scalars that all methods share.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.density import spectral_density
from grsd_callbacks.flux import KernelState
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import Residual, wide_dtype
from grsd_callbacks.randomized import randomized_eigenpairs
from grsd_callbacks.settings import Settings
from grsd_callbacks.shells import ShellGrid, shell_budget, top_budget
from grsd_callbacks.spectrum import (
    Eigendecomposition,
    SpectralMeasure,
    eigendecomposition,
    relative_floor,
    spectral_measure,
)

#: decades of headroom above lambda_max of the first measurement, and the deepest grid
HEADROOM, MAX_DECADES = 2.0, 12.0


def default_grid(largest: float, smallest: float, floor: float, per_decade: int) -> ShellGrid:
    """Shells from a decade below the smallest resolved eigenvalue to two decades above the largest.

    Aligned to 10^(k / per_decade); at most `MAX_DECADES` below `largest`, and not below the floor.
    """
    if not (0 < largest < math.inf):
        largest = 1.0
    low = max(floor, smallest / 10, largest * 10**-MAX_DECADES)
    return ShellGrid.logarithmic(min(low, largest / 10), largest * 10**HEADROOM, per_decade)


def _grid_of(values: Tensor, floor: float, settings: Settings) -> ShellGrid:
    """The default grid for all eigenvalues, ascending."""
    largest, resolved = float(values[-1]), values[values > floor]
    smallest = float(resolved[0]) if resolved.numel() else largest
    return default_grid(largest, smallest, floor, settings.shells_per_decade)


def exact(
    op: NTKOperator, r: Residual, settings: Settings, grid: ShellGrid | None, start: Tensor | None = None
) -> dict[str, Any]:
    """All eigenpairs: every shell, down to the floor."""
    matrix, about = _kernel(op, r.nu, settings)
    spectrum = _with_floor(eigendecomposition(matrix), relative_floor(op, exact=True))
    values = spectrum.eigenvalues
    largest = float(values[-1])
    grid = grid or _grid_of(values, spectrum.floor, settings)
    g2 = spectrum.project(r.residual) ** 2
    trace, squares = float(values.sum()), float((values**2).sum())
    summary = {
        **_scales(largest, trace, squares, float((values * g2).sum()), float((values**2 * g2).sum())),
        "residual_norm_sq": float(g2.sum()),
        "floor": spectrum.floor,
    }
    return {
        "state": KernelState(values, spectrum.eigenvectors, r.residual, matrix),
        "budget": shell_budget(spectrum, r.residual, grid),
        "eigenvalues": values.flip(0).to("cpu", torch.float64),
        "weights": None,
        "summary": summary,
        **about,
    }


def lanczos(
    op: NTKOperator, r: Residual, settings: Settings, grid: ShellGrid | None, start: Tensor | None = None
) -> dict[str, Any]:
    """All eigenvalues, and the residual's measure by its bounds: no eigenvectors."""
    matrix, about = _kernel(op, r.nu, settings)
    values = torch.linalg.eigvalsh(matrix)
    measure_of_r = spectral_measure(matrix, r.residual, min(settings.num_matvecs, len(values)))
    largest = float(values[-1])
    floor = relative_floor(op, exact=True) * max(largest, 0.0)
    grid = grid or _grid_of(values, floor, settings)
    budget, counts = shell_budget(measure_of_r, None, grid), grid.collect(values, torch.ones_like(values))
    resolved = budget.resolved & grid.above(floor)  # bounds are those of the kernel as it is rounded
    budget = replace(budget, counts=counts, count_bounds=torch.stack([counts, counts]), resolved=resolved)
    trace, squares = float(values.sum()), float((values**2).sum())
    first = _krylov_scales(measure_of_r, largest)["mean_eigenvalue"] * measure_of_r.dissipation
    summary = _scales(largest, trace, squares, measure_of_r.dissipation, first)
    return {
        "state": KernelState(measure_of_r.nodes.to(matrix), measure_of_r.ritz_vectors, r.residual),
        "budget": budget,
        "eigenvalues": values.flip(0).to("cpu", torch.float64),
        "weights": None,
        "summary": {**summary, "residual_norm_sq": measure_of_r.mass, "floor": floor},
        "images": _random_images(matrix, 1.0, settings.seed),
        **about,
    }


def krylov(
    op: NTKOperator, r: Residual, settings: Settings, grid: ShellGrid | None, start: Tensor | None = None
) -> dict[str, Any]:
    """By products alone: the residual's measure by its bounds, counts by their intervals."""
    m = op.shape[0]
    measure_of_r = spectral_measure(op, r.residual, min(settings.num_matvecs, m), r.nu)
    density = None
    if settings.num_density_matvecs:
        density = spectral_density(
            op, min(settings.num_density_matvecs, m), nu=r.nu, generator=torch.Generator().manual_seed(settings.seed)
        )
    largest = max(
        float(x.nodes[-1]) if x.nodes.numel() else 0.0 for x in (measure_of_r, density and density.measure) if x
    )
    floor = relative_floor(op, exact=False) * largest
    if grid is None:
        nodes = measure_of_r.nodes[measure_of_r.nodes > floor]
        grid = default_grid(largest, float(nodes[0]) if nodes.numel() else largest, floor, settings.shells_per_decade)
    budget = shell_budget(measure_of_r, None, grid)
    summary = _krylov_scales(measure_of_r, largest)
    if density is not None:
        budget = density.into(budget)
        summary.update(trace=density.trace, trace_error=density.trace_error, effective_rank=density.effective_rank)
    return {
        "state": KernelState(measure_of_r.nodes.to(r.residual.device), measure_of_r.ritz_vectors, r.residual),
        "budget": budget,
        "eigenvalues": measure_of_r.nodes.flip(0),
        "weights": measure_of_r.weights.flip(0),
        "summary": {**summary, "residual_norm_sq": measure_of_r.mass, "floor": floor},
        "images": _random_images(op, r.nu, settings.seed),
        "paths": {"products": op.forward_path, **{f"refused {k}": v for k, v in op.refused.items()}},
    }


def randomized(
    op: NTKOperator, r: Residual, settings: Settings, grid: ShellGrid | None, start: Tensor | None = None
) -> dict[str, Any]:
    """The top of the spectrum; what lies below the last converged Ritz value is not resolved."""
    rank = max(1, min(settings.num_matvecs // 2, op.shape[0]))
    generator = torch.Generator().manual_seed(settings.seed)
    pairs = randomized_eigenpairs(op, rank, nu=r.nu, start=start, generator=generator)
    pulled = op.vjp(r.residual)
    dissipation = r.nu * float((pulled.to(r.residual) ** 2).sum())
    second = r.nu**2 * float((op.jvp(pulled).to(r.residual) ** 2).sum())
    largest = float(pairs.values[-1])
    converged = pairs.values[pairs.converged()]
    floor = float(converged[0]) if converged.numel() else largest
    if grid is None:
        grid = default_grid(largest, floor, relative_floor(op, exact=False) * largest, settings.shells_per_decade)
    state = KernelState(pairs.values, pairs.vectors, r.residual)
    g2 = (state.vectors.T @ r.residual.to(state.vectors)) ** 2
    size = float(r.residual @ r.residual)
    scales = _scales(largest, math.nan, math.nan, dissipation, second)
    return {
        "state": state,
        "budget": top_budget(pairs.values, g2, size, dissipation, floor, grid),
        "eigenvalues": pairs.values.flip(0).to("cpu", torch.float64),
        "weights": g2.flip(0).to("cpu", torch.float64),
        "summary": {**scales, "residual_norm_sq": size, "floor": floor},
        "images": _random_images(op, r.nu, settings.seed),
        "paths": {"products": op.forward_path, **{f"refused {k}": v for k, v in op.refused.items()}},
    }


def _krylov_scales(measured: SpectralMeasure, largest: float) -> dict[str, float]:
    """Scales from the coefficients: `r^T M^2 r / r^T M r = alpha_1^2 + beta_2^2` exactly."""
    b = measured.bidiagonal
    nan = math.nan
    mean = float(b.alphas[0] ** 2 + b.betas[0] ** 2) if measured.dissipation > 0 else nan
    scales = _scales(largest, nan, nan, measured.dissipation, mean * measured.dissipation)
    return scales


def _scales(largest: float, trace: float, squares: float, first: float, second: float) -> dict[str, float]:
    """Scalars every measurement reports, from tr M, tr M^2, r^T M r and r^T M^2 r."""
    return {
        "lambda_max": largest,
        "trace": trace,
        "trace_error": 0.0 * trace,
        "effective_rank": trace**2 / squares if squares > 0 else math.nan,
        "mean_eigenvalue": second / first if first > 0 else math.nan,
    }


def _kernel(op: NTKOperator, nu: float, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
    """M, and what an `Instant` says of it; J J^T itself is let go before eigenvalues take memory."""
    gram = op.exact_gram(memory_limit=settings.memory_limit)
    return nu * gram.matrix, {"paths": {"kernel": counted(gram.paths)}, "num_unused": gram.num_unused}


def _with_floor(spectrum: Eigendecomposition, relative: float) -> Eigendecomposition:
    """The floor follows from the dtypes of rows and sums, not of the matrix."""
    floor = relative * max(float(spectrum.eigenvalues[-1]), 0.0)
    return Eigendecomposition(spectrum.eigenvalues, spectrum.eigenvectors, floor)


def _random_images(op: NTKOperator | Tensor, nu: float, seed: int) -> Tensor:
    """[M z, H M H z] for a random unit vector z that is the same at every measurement, shape (m, 2). Two products."""
    generator = torch.Generator().manual_seed(seed + 1)
    z = torch.randn(op.shape[0], 1, generator=generator, dtype=torch.float64).to(op.device, wide_dtype(op.device))
    z = z / z.norm()
    images = nu * (op @ torch.cat([z, z - z.mean()], dim=1)).to(z)
    return torch.cat([images[:, :1], images[:, 1:] - images[:, 1:].mean()], dim=1)


def counted(paths: dict[str, str]) -> str:
    """ "linear 4, rows 2": how many parameters took which path."""
    counts: dict[str, int] = {}
    for path in paths.values():
        counts[path] = counts.get(path, 0) + 1
    return ", ".join(f"{path} {count}" for path, count in sorted(counts.items()))


#: by method
WAYS = {"exact": exact, "lanczos": lanczos, "krylov": krylov, "randomized": randomized}
