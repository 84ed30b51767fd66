"""How fast do the Jacobians of the blocks move, against the rate at which the kernel itself works?

    speed_l = |J_l'|_F / |J_l|_F   (1 / flow time),        kernel speed = |M'|_F / |M|_F^2   (pure number)

The kernel speed is the relative change of the kernel within its own fastest time 1 / |M|_F.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from grsd_callbacks.arguments import checked
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.renormalizability.blocks import (
    Block,
    block_kernels,
    find_blocks,
    half_products,
    half_weights,
    resampled_error,
)
from grsd_callbacks.transfer import kernel_velocity


@dataclass(frozen=True, eq=False)
class JacobianEvolution:
    """Speeds of the blocks' Jacobians along a parameter velocity.

    Attributes:
        names: the blocks, L of them.
        sizes: |J_l|_F (without nu), shape (L,), exact.
        speeds: |J_l'|_F / |J_l|_F, 1 / flow time, shape (L,), estimated from random vectors.
        speed_errors: standard errors of the speeds, shape (L,).
        kernel_speed: |M'|_F / |M|_F^2.
        kernel_speed_error: standard error from half-samples of the probe; NaN without.
        null_kernel_speed: the same along random directions of the same length (mean); NaN without.
        null_error: standard deviation over those directions; NaN for fewer than two.
    """

    names: tuple[str, ...]
    sizes: Tensor
    speeds: Tensor
    speed_errors: Tensor
    kernel_speed: float
    kernel_speed_error: float
    null_kernel_speed: float
    null_error: float


@checked
def jacobian_evolution(
    op: NTKOperator,
    parameter_velocity: Tensor,
    nu: float,
    blocks: Sequence[Block] | None = None,
    *,
    kernels: Mapping[str, Tensor] | None = None,
    velocity: Tensor | None = None,
    num_vectors: int = 8,
    num_resamples: int = 0,
    num_null: int = 0,
    seed: int = 0,
) -> JacobianEvolution:
    """Speeds of the blocks and of the kernel along a parameter velocity.

    Args:
        op: the operator J J^T.
        parameter_velocity: dtheta/dt, shape (P,); -grad L for gradient flow.
        nu: scale of the loss, M = nu J J^T.
        blocks: see `find_blocks`, which is asked if None.
        kernels: `block_kernels(op, blocks)`, if known.
        velocity: `kernel_velocity(op, parameter_velocity)`, d/dt J J^T, shape (m, m), if known.
        num_vectors: random signs behind the estimate of |J_l'|_F, at least 2.
        num_resamples: half-samples of the probe behind the error of the kernel speed.
        num_null: random directions to compare with (two exact kernels each).
        seed: of the private generators.

    Raises:
        ValueError: num_vectors below 2.

    Cost: what is not given; `num_vectors` double-backward passes.

    Accuracy: `E |J'^T v|^2 = |J'|_F^2` for random signs v: unbiased squares, errors from their scatter. For
        piecewise-linear activations flips of gates are left out.

    Example:
        f = w x with x = 1 at w = 2 (one layer, J does not depend on w), then f = w^2 x in two steps (J = 2 w).

        >>> class Square(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
        ...     def forward(self, x):
        ...         return self.b(self.a(x))
        >>> net = Square().double()
        >>> with torch.no_grad():
        ...     filled = [net.a.weight.fill_(2.0), net.b.weight.fill_(2.0)]
        >>> op = NTKOperator(net, torch.ones(1, 1, dtype=torch.float64))
        >>> found = jacobian_evolution(op, torch.tensor([1.0, 0.0]), nu=1.0)  # J_a = b, J_b = a, M = a^2 + b^2
        >>> found.speeds.tolist(), round(found.kernel_speed, 6)  # J_b' / J_b = 1/2, M' / M^2 = 4 / 64
        ([0.0, 0.5], 0.0625)
    """
    if num_vectors < 2:
        raise ValueError(f"num_vectors must be at least 2, got {num_vectors!r}")
    chosen = find_blocks(op.function.model, parameters=op.parameter_names) if blocks is None else list(blocks)
    known = block_kernels(op, chosen) if kernels is None else kernels
    moved = kernel_velocity(op, parameter_velocity) if velocity is None else velocity
    kernel = torch.stack(list(known.values())).sum(0)
    sizes = torch.stack([known[block.name].trace().clamp_min(0.0).sqrt() for block in chosen]).cpu()
    squares = op.run(lambda: _squares(op, parameter_velocity, chosen, num_vectors, seed))
    mean, error = squares.mean(0), squares.std(0) / math.sqrt(num_vectors)
    rates = mean.sqrt()
    null = [_kernel_speed(kernel, kernel_velocity(op, d), nu) for d in _directions(parameter_velocity, num_null, seed)]
    return JacobianEvolution(
        names=tuple(block.name for block in chosen),
        sizes=sizes,
        speeds=rates / sizes,
        speed_errors=torch.where(rates > 0, error / (2 * rates), 0.0) / sizes,
        kernel_speed=_kernel_speed(kernel, moved, nu),
        kernel_speed_error=_half_sample_error(kernel, moved, nu, op.num_outputs, num_resamples, seed),
        null_kernel_speed=float(np.mean(null)) if null else math.nan,
        null_error=float(np.std(null, ddof=1)) if len(null) > 1 else math.nan,
    )


def _squares(op: NTKOperator, velocity: Tensor, blocks: Sequence[Block], num: int, seed: int) -> Tensor:
    """|J_l'^T v|^2 for random signs v, shape (num, L), by double backward on one graph."""
    leaves = list(op.function.parameters.values())
    tangents = op.unflatten(velocity.to(op.device, op.dtype))
    position = {name: k for k, block in enumerate(blocks) for name in block.parameters}
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        f = op.function.outputs(op.inputs)
    out = torch.zeros(num, len(blocks), dtype=torch.float64)
    for row in range(num):
        v = torch.randint(0, 2, f.shape, generator=generator).to(f) * 2 - 1
        pulled = torch.autograd.grad(f, leaves, v, create_graph=True, allow_unused=True)
        along = [(g * t).sum() for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
        if not along:
            continue
        moved = torch.autograd.grad(torch.stack(along).sum(), leaves, retain_graph=True, allow_unused=True)
        for name, g in zip(op.parameter_names, moved, strict=True):
            if g is not None:
                out[row, position[name]] += float(g.double().square().sum())
    return out


def _kernel_speed(kernel: Tensor, moved: Tensor, nu: float) -> float:
    size = float(kernel.norm())
    return float(moved.norm()) / (nu * size**2) if size > 0 else math.nan


def _directions(velocity: Tensor, num: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    draws = [torch.randn(velocity.shape, generator=generator, dtype=torch.float64).to(velocity) for _ in range(num)]
    return [d * (velocity.norm() / d.norm()) for d in draws]


def _half_sample_error(kernel: Tensor, moved: Tensor, nu: float, num_outputs: int, num: int, seed: int) -> float:
    """A mean loss over half of the samples has twice the nu."""
    if num < 2:
        return math.nan
    m = kernel.shape[0]
    weights = half_weights(m, num_outputs, num, seed)
    size, change = (half_products(x, x, weights).cpu().numpy() for x in (kernel, moved))
    if not (size > 0).all():
        return math.nan
    scale = nu * weights.shape[1] / weights[0].sum().item()
    return resampled_error(np.sqrt(change) / (scale * size))
