"""One instant: model, probe and loss in, everything that needs no history out."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from grsd_callbacks.arguments import checked
from grsd_callbacks.flux import KernelState
from grsd_callbacks.kernel import NTKOperator, synchronise
from grsd_callbacks.losses import Loss, check_pair
from grsd_callbacks.method import method_by_size
from grsd_callbacks.plan import ProductPlan
from grsd_callbacks.probe import Probe
from grsd_callbacks.settings import Settings
from grsd_callbacks.shells import ShellBudget, ShellGrid
from grsd_callbacks.ways import WAYS


class BadState(RuntimeError):
    """The run is in a state that cannot be measured (NaN or Inf); the next measurement may work again."""


@dataclass(frozen=True, eq=False)
class Instant:
    """What one measurement found, before it is set against the run's history.

    Attributes:
        method: "exact", "lanczos", "krylov" or "randomized".
        loss, grad_norm_sq, nu: scalars.
        state: basis, eigenvalues and residual, kept for transport.
        budget: shell contents.
        eigenvalues, weights: see `Snapshot`.
        summary, health, cost, paths: see `Snapshot`.
        closes: whether the dissipation sums to grad_norm_sq.
        images: [M z, H M H z] of the fixed random unit vector z, shape (m, 2), H centring; None where all
            eigenpairs are known.
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

    @property
    def all_eigenvalues(self) -> Tensor | None:
        """Of M, descending (exact, lanczos); None where they are not all known."""
        return self.eigenvalues if self.weights is None else None


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

    Cost: exact: one exact kernel and one m x m eigendecomposition; lanczos: one exact kernel, its eigenvalues (half to
        a quarter of the decomposition), `num_matvecs` products with a dense matrix; krylov: `num_matvecs` +
        `num_density_matvecs` + 3 kernel products. All: one gradient for the dissipation closure.

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
    found = WAYS[method](op, r, settings, grid, start)
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
        known = instant.all_eigenvalues
        estimate = math.sqrt(y.numel()) * float(instant.images[:, 0].norm())  # E |M z|^2 = |M|_F^2 / m
        norm = estimate if known is None else float(known.norm())
    size = norm * float(y @ y)
    return quadratic / size if size > 0 else math.nan
