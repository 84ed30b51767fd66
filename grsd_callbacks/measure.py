"""One instant: model, probe and loss in, everything that needs no history out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from grsd_callbacks.arguments import checked
from grsd_callbacks.density import spectral_density
from grsd_callbacks.flux import KernelState
from grsd_callbacks.functional import ParameterFilter, check_function, check_patterns
from grsd_callbacks.gram import checked_sums
from grsd_callbacks.kernel import NTKOperator, synchronise
from grsd_callbacks.losses import Loss, Residual, check_pair, wide_dtype
from grsd_callbacks.method import method_by_size
from grsd_callbacks.plan import ProductPlan
from grsd_callbacks.probe import Probe
from grsd_callbacks.randomized import randomized_eigenpairs
from grsd_callbacks.shells import ShellBudget, ShellGrid, shell_budget, top_budget
from grsd_callbacks.spectrum import (
    Eigendecomposition,
    SpectralMeasure,
    eigendecomposition,
    relative_floor,
    spectral_measure,
)

METHODS = ("auto", "exact", "krylov", "randomized")
#: decades of headroom above lambda_max of the first measurement, and the deepest grid
HEADROOM, MAX_DECADES = 2.0, 12.0


#: dtypes of a measurement
WORKING_DTYPES = (torch.float32, torch.float64)


class BadState(RuntimeError):
    """The run is in a state that cannot be measured (NaN or Inf); the next measurement may work again."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        method: "auto", "exact", "krylov", or "randomized" (top of the spectrum only).
        num_matvecs: kernel products for the residual's spectral measure (krylov) or the range finder (randomized,
            half as many vectors).
        num_density_matvecs: kernel products for eigenvalue counts (krylov), 0 for none.
        shells_per_decade: shells a decade of eigenvalues.
        params, outputs, dtype, gram_dtype: see `NTKOperator`.
        memory_limit: bytes of temporaries of the exact kernel, and of the graphs of products; None for the defaults.
        seed: of the private generator behind random probe vectors, the same at every measurement.
    """

    method: str = "auto"
    num_matvecs: int = 64
    num_density_matvecs: int = 32
    shells_per_decade: int = 3
    params: ParameterFilter = None
    outputs: Callable[[Any], Tensor] | None = None
    dtype: torch.dtype | None = None
    memory_limit: int | None = None
    gram_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.method, str) and self.method in METHODS):
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")
        for name, least in (("num_matvecs", 2), ("num_density_matvecs", 0), ("shells_per_decade", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not (self.dtype is None or (isinstance(self.dtype, torch.dtype) and self.dtype in WORKING_DTYPES)):
            raise ValueError(f"dtype must be torch.float32, torch.float64 or None, got {self.dtype!r}")
        if self.memory_limit is not None and not (isinstance(self.memory_limit, int) and self.memory_limit > 0):
            raise ValueError(f"memory_limit must be a positive number of bytes, got {self.memory_limit!r}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed must be an integer, got {type(self.seed).__name__}")
        checked_sums("gram_dtype", self.gram_dtype)
        check_function("outputs", self.outputs)
        check_patterns(self.params)


@dataclass(frozen=True, eq=False)
class Instant:
    """What one measurement found, before it is set against the run's history.

    Attributes:
        method: "exact", "krylov" or "randomized".
        loss, grad_norm_sq, nu: scalars.
        state: basis, eigenvalues and residual, kept for transport.
        budget: shell contents.
        eigenvalues, weights: see `Snapshot`.
        summary, health, cost, paths: see `Snapshot`.
        closes: whether the dissipation sums to grad_norm_sq.
        images: [M z, H M H z] of the fixed random unit vector z, shape (m, 2), H centring; None on the exact path.
    """

    method: str
    loss: float
    grad_norm_sq: float
    nu: float
    num_samples: int
    num_outputs: int
    state: KernelState
    budget: ShellBudget
    eigenvalues: Tensor
    weights: Tensor | None
    summary: dict[str, float]
    images: Tensor | None = None
    closes: bool = True
    health: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)


@checked
def measure(
    model: nn.Module, probe: Probe, loss: Loss, settings: Settings | None = None, grid: ShellGrid | None = None
) -> Instant:
    """Measure the kernel's spectrum and the residual's shells at the model's present parameters.

    Args:
        model: the network, left bit-identical.
        probe: n samples.
        loss: see `resolve_loss`.
        settings: how to measure.
        grid: shells; None makes a grid from this measurement (`default_grid`).

    Returns:
        An `Instant`.

    Raises:
        BadState: parameters, outputs or loss are not finite.
        ValueError: outputs and targets do not fit the loss.

    Cost: exact: one exact kernel and one m x m eigendecomposition; krylov: `num_matvecs` +
        `num_density_matvecs` + 3 kernel products. Both: one gradient for the dissipation closure.

    Accuracy: totals of energy and dissipation exact to rounding; exact path: shells down to `floor`.
    """
    return measure_with_operator(model, probe, loss, settings or Settings(), grid)[0]


def measure_with_operator(
    model: nn.Module,
    probe: Probe,
    loss: Loss,
    settings: Settings,
    grid: ShellGrid | None = None,
    *,
    plan: ProductPlan | None = None,
    start: Tensor | None = None,
    op: NTKOperator | None = None,
) -> tuple[Instant, NTKOperator]:
    """As `measure`, and the operator at the measured parameters.

    `plan` is an earlier operator's on the same model and probe; `start` are vectors (m, j) that warm-start the
    randomized method; `op` is the operator on the probe, where it has been made already.
    """
    began = time.perf_counter()
    if op is None:
        op = operator_for(model, probe, settings)
    if plan is not None:
        op.adopt(plan)
    instant = op.run(lambda: _measured(op, probe, loss, settings, grid, start))
    synchronise(op.device)
    instant.cost.update(seconds=time.perf_counter() - began, products=op.num_products)
    return instant, op


def operator_for(model: nn.Module, probe: Probe, settings: Settings) -> NTKOperator:
    """The operator on the probe that the settings ask for."""
    return NTKOperator(
        model,
        probe.inputs,
        params=settings.params,
        outputs=settings.outputs,
        dtype=settings.dtype,
        memory_limit=settings.memory_limit,
        gram_dtype=settings.gram_dtype,
    )


def _measured(
    op: NTKOperator, probe: Probe, loss: Loss, settings: Settings, grid: ShellGrid | None, start: Tensor | None
) -> Instant:
    _require_finite(op)
    outputs = op.outputs
    check_pair(loss, outputs, probe.targets)
    r = loss.evaluate(outputs, probe.targets)
    if not bool(torch.isfinite(r.residual).all() & torch.isfinite(r.loss)):
        raise BadState("the outputs or the loss on the probe are NaN or Inf")
    grad_norm_sq = _squared_gradient(op, probe, loss)
    if not math.isfinite(grad_norm_sq):
        raise BadState("the gradient of the loss on the probe is NaN or Inf")
    method = choose_method(settings.method, op)
    if method == "randomized":
        found = _randomized(op, r, settings, grid, start)
    else:
        found = (_exact if method == "exact" else _krylov)(op, r, settings, grid)
    health = {"gradient_free_parameters": float(found.pop("num_unused", 0))}
    instant = Instant(
        method=method,
        loss=float(r.loss),
        grad_norm_sq=grad_norm_sq,
        nu=r.nu,
        num_samples=op.num_samples,
        num_outputs=op.num_outputs,
        closes=loss.closes,
        health=health,
        **found,
    )
    instant.summary["num_parameters"] = float(op.num_parameters)
    instant.summary["target_alignment"] = _target_alignment(op, instant, loss.target_vector(outputs, probe.targets))
    return instant


def choose_method(method: str, op: NTKOperator) -> str:
    """The method itself, or for "auto" the one that m and the device suggest."""
    return method_by_size(op) if method == "auto" else method


def default_grid(largest: float, smallest: float, floor: float, per_decade: int) -> ShellGrid:
    """Shells from a decade below the smallest resolved eigenvalue to two decades above the largest.

    Aligned to 10^(k / per_decade); at most `MAX_DECADES` below `largest`, and not below the floor.
    """
    if not (0 < largest < math.inf):
        largest = 1.0
    low = max(floor, smallest / 10, largest * 10**-MAX_DECADES)
    return ShellGrid.logarithmic(min(low, largest / 10), largest * 10**HEADROOM, per_decade)


def _exact(op: NTKOperator, r: Residual, settings: Settings, grid: ShellGrid | None) -> dict[str, Any]:
    gram = op.exact_gram(memory_limit=settings.memory_limit)
    spectrum = _with_floor(eigendecomposition(gram.matrix, r.nu), relative_floor(op, exact=True))
    values = spectrum.eigenvalues
    largest = float(values[-1])
    if grid is None:
        resolved = values[values > spectrum.floor]
        smallest = float(resolved[0]) if resolved.numel() else largest
        grid = default_grid(largest, smallest, spectrum.floor, settings.shells_per_decade)
    g2 = spectrum.project(r.residual) ** 2
    trace, squares = float(values.sum()), float((values**2).sum())
    summary = {
        **_scales(largest, trace, squares, float((values * g2).sum()), float((values**2 * g2).sum())),
        "residual_norm_sq": float(g2.sum()),
        "floor": spectrum.floor,
    }
    return {
        "state": KernelState(values, spectrum.eigenvectors, r.residual),
        "budget": shell_budget(spectrum, r.residual, grid),
        "eigenvalues": values.flip(0).to("cpu", torch.float64),
        "weights": None,
        "summary": summary,
        "paths": {"kernel": counted(gram.paths)},
        "num_unused": gram.num_unused,
    }


def _krylov(op: NTKOperator, r: Residual, settings: Settings, grid: ShellGrid | None) -> dict[str, Any]:
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


def _randomized(
    op: NTKOperator, r: Residual, settings: Settings, grid: ShellGrid | None, start: Tensor | None
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


def _with_floor(spectrum: Eigendecomposition, relative: float) -> Eigendecomposition:
    """The floor follows from the dtypes of rows and sums, not of the matrix."""
    floor = relative * max(float(spectrum.eigenvalues[-1]), 0.0)
    return Eigendecomposition(spectrum.eigenvalues, spectrum.eigenvectors, floor)


def _squared_gradient(op: NTKOperator, probe: Probe, loss: Loss) -> float:
    """|grad L|^2 by a backward pass of the loss itself, independent of residual, nu and kernel."""
    parameters = list(op.function.parameters.values())
    direct = getattr(loss.function, "direct", None)  # a training step's own loss, without the detour over f
    with torch.enable_grad():
        if direct is not None:
            grads = torch.autograd.grad(direct(probe.targets), parameters, allow_unused=True)
        else:
            f = op.function.outputs(probe.inputs)
            at = f.detach().requires_grad_()
            (slope,) = torch.autograd.grad(loss.value(at, probe.targets), at)
            grads = torch.autograd.grad(f, parameters, slope, allow_unused=True)
    norms = [(g.to_dense() if g.is_sparse else g).double().square().sum() for g in grads if g is not None]
    return float(torch.stack(norms).sum()) if norms else 0.0


def _require_finite(op: NTKOperator) -> None:
    if not bool(torch.stack([torch.isfinite(p).all() for p in op.function.parameters.values()]).all()):
        bad = [name for name, p in op.function.parameters.items() if not bool(torch.isfinite(p).all())]
        raise BadState(f"parameters hold NaN or Inf: {', '.join(bad[:3])}{' ...' if len(bad) > 3 else ''}")


def _target_alignment(op: NTKOperator, instant: Instant, y: Tensor | None) -> float:
    """y^T M y / (|M|_F |y|^2) for the target vector y; NaN where it is not defined."""
    if y is None:
        return math.nan
    y = y.to(instant.state.residual)
    if instant.images is None:
        quadratic = float((instant.state.eigenvalues * (instant.state.vectors.T @ y) ** 2).sum())
        norm = float(instant.state.eigenvalues.norm())
    else:
        quadratic = instant.nu * float(op.vjp(y).to(y).square().sum())
        norm = math.sqrt(y.numel()) * float(instant.images[:, 0].norm())  # E |M z|^2 = |M|_F^2 / m
    size = norm * float(y @ y)
    return quadratic / size if size > 0 else math.nan


def _random_images(op: NTKOperator, nu: float, seed: int) -> Tensor:
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
