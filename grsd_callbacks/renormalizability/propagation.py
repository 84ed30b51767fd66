"""Do gradients reach every layer, and how much can one layer stretch them?

    A_l = d h_{l+1} / d h_l  per sample, h_l the input of block l (the last block: to the net's output)

Largest singular values come from Golub-Kahan steps on all samples at once, that is from the Krylov space of power
iteration, with the bound that holds for a random start whatever the spectrum is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grsd_callbacks.arguments import checked
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import Loss
from grsd_callbacks.renormalizability.blocks import Block, find_blocks, resampled_error

#: probability that some upper bound of a call is too small
FAILURE = 0.01
#: what is left of a vector after orthogonalisation, below which it is done again
MUCH = 0.1


@dataclass(frozen=True, eq=False)
class GradientPropagation:
    """Layer-to-layer Jacobians and back-propagated gradients.

    Attributes:
        names: the blocks whose inputs h_l carry gradients (not the one that reads the data), L of them.
        spectral_norms: largest over samples of |d h_{l+1} / d h_l|, a lower bound, shape (L,); the last is to f.
        upper_bounds: upper bounds of the same, all right with probability 1 - `FAILURE`; inf where too few steps.
        sample_norms: |d L_i / d h_l| of each sample's share of the loss, shape (n, L).
        spread: log10 of the largest over the smallest |dL / d h_l|, in decades over depth; NaN for L < 2.
        spread_error: standard error of the spread from half-samples of the probe; NaN without.
        slope: of ln |dL / d h_l| on l: gain per block of what is propagated back, negative of it.
        p_value: of a slope as steep if the blocks' order did not matter (shuffled); NaN without.
    """

    names: tuple[str, ...]
    spectral_norms: Tensor
    upper_bounds: Tensor
    sample_norms: Tensor
    spread: float
    spread_error: float
    slope: float
    p_value: float

    @property
    def gradient_norms(self) -> Tensor:
        """|dL / d h_l|, shape (L,): samples do not interact, so squares add."""
        return self.sample_norms.square().sum(0).sqrt()


@checked
def gradient_propagation(
    op: NTKOperator,
    targets: Any,
    loss: Loss,
    blocks: Sequence[Block] | None = None,
    *,
    num_steps: int = 16,
    num_resamples: int = 0,
    num_null: int = 0,
    seed: int = 0,
) -> GradientPropagation:
    """Spectral norms of layer-to-layer Jacobians and the spread of gradient norms over depth.

    The Jacobian from the input of one block to the input of the next includes whatever the model does between them
    (skips, norms, sums outside the blocks). Activations need a leading dimension of samples, and samples that do not
    interact.

    Args:
        op: the operator of the model on the probe.
        targets: of the probe.
        loss: see `resolve_loss`.
        blocks: see `find_blocks`, which is asked if None.
        num_steps: Golub-Kahan steps, each one product with A and one with A^T for all samples.
        num_resamples: half-samples of the probe behind the error of the spread.
        num_null: shuffles of depth behind the p-value of the slope.
        seed: of the private generators.

    Raises:
        ValueError: no block whose input depends on parameters, or activations without a leading dimension of samples.

    Cost: one forward and backward; num_steps backward and double-backward passes through the net.

    Accuracy: norms are exact where num_steps reaches the smaller dimension of A; else the upper bound exceeds them
        by `(1 - e)^(-1/2)`, `e = (ln(1.648 d^(1/2) / FAILURE') / (2 num_steps - 1))^2`, usually far too much.

    Source: random-start bound of Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13 (1992), for Lanczos.

    Example:
        >>> from grsd_callbacks.losses import resolve_loss
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     weight = net[1].weight.copy_(torch.diag(torch.tensor([3.0, 4.0])))
        >>> found = gradient_propagation(NTKOperator(net, torch.eye(2)), torch.ones(2, 1), resolve_loss("mse"))
        >>> found.names, round(float(found.spectral_norms[0]), 5)
        (('1', '2'), 4.0)
    """
    chosen = find_blocks(op.function.model, parameters=op.parameter_names) if blocks is None else list(blocks)
    sequence = [block.name for block in chosen if block.in_sequence]

    def measured() -> tuple[list[str], list[tuple[float, float]], Tensor]:
        with _inputs_of(op.function.model, sequence) as seen, torch.enable_grad():
            f = op.function.outputs(op.inputs)
            value = loss.value(f, targets)
        states = _ordered(seen, sequence, f, op.num_samples)
        gradients = torch.autograd.grad(value, list(states.values()), retain_graph=True, allow_unused=True)
        kept = [torch.zeros_like(h) if g is None else g for g, h in zip(gradients, states.values(), strict=True)]
        norms = torch.stack([g.detach().reshape(len(g), -1).double().norm(dim=1) for g in kept], 1)
        stages = [*states.values(), f]
        bounds = [
            _largest_singular_value(stages[k], stages[k + 1], num_steps, FAILURE / len(states), seed + k)
            for k in range(len(states))
        ]
        return list(states), bounds, norms.cpu()

    names, bounds, norms = op.run(measured)
    return GradientPropagation(
        names=tuple(names),
        spectral_norms=torch.tensor([low for low, _ in bounds], dtype=torch.float64),
        upper_bounds=torch.tensor([high for _, high in bounds], dtype=torch.float64),
        sample_norms=norms,
        spread=_spread(norms),
        spread_error=_spread_error(norms, num_resamples, seed),
        **_trend(norms, num_null, seed),
    )


@contextmanager
def _inputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The first floating tensor that each named module is called with, at its first call."""
    seen: dict[str, Tensor] = {}
    modules = dict(model.named_modules())

    def watcher(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor) and value.is_floating_point():
                    seen.setdefault(name, value)
                    return

        return hook

    handles = [modules[name].register_forward_pre_hook(watcher(name), with_kwargs=True) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _ordered(seen: dict[str, Tensor], names: Sequence[str], f: Tensor, n: int) -> dict[str, Tensor]:
    """h_l in the order of the blocks' calls, those that depend on parameters."""
    states = {name: h for name, h in seen.items() if h.requires_grad and name in names}
    if not states:
        raise ValueError(
            f"gradient propagation needs a block whose input depends on parameters, found none among {list(names)}; "
            "name the net's layers by blocks="
        )
    for name, h in states.items():
        if h.dim() < 2 or h.shape[0] != n:
            raise ValueError(
                f"the input of block {name!r} has shape {tuple(h.shape)}, without a leading dimension of {n} samples; "
                "name other modules by blocks="
            )
    return states


def _largest_singular_value(h: Tensor, after: Tensor, num_steps: int, failure: float, seed: int) -> tuple[float, float]:
    """(lower, upper) of the largest over samples of |d after / d h|, samples on the leading dimension."""
    n, rows, columns = len(h), after[0].numel(), h[0].numel()
    z = torch.zeros_like(after, requires_grad=True)
    (pulled,) = torch.autograd.grad(after, h, z, create_graph=True, allow_unused=True)
    if pulled is None:
        return 0.0, 0.0

    def transposed(u: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(after, h, u.to(after).view_as(after), retain_graph=True)
        return product.reshape(n, -1).double()

    def forward(v: Tensor) -> Tensor:
        if not pulled.requires_grad:
            return torch.zeros(n, rows, dtype=torch.float64, device=h.device)
        (product,) = torch.autograd.grad(pulled, z, v.to(pulled).view_as(pulled), retain_graph=True)
        return product.reshape(n, -1).double()

    steps = min(num_steps, rows, columns)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(n, columns, generator=generator, dtype=torch.float64).to(h.device)
    B = _bidiagonal(forward, transposed, start, rows, steps)
    low = float(torch.linalg.svdvals(B)[:, 0].max())
    if steps == min(rows, columns):
        return low, low
    e = (math.log(1.648 * math.sqrt(columns) * n / failure) / (2 * steps - 1)) ** 2
    return low, low / math.sqrt(1 - e) if e < 1 else math.inf


def _bidiagonal(
    forward: Callable[[Tensor], Tensor], transposed: Callable[[Tensor], Tensor], start: Tensor, rows: int, steps: int
) -> Tensor:
    """Upper bidiagonal B with U^T A = B V^T of every sample, (n, steps, steps + 1), fully reorthogonalised.

    On both sides: where the Krylov space is exhausted, a recurrence on one side would run away.
    """
    n, columns = start.shape
    B = start.new_zeros(n, steps, steps + 1)
    U, V = start.new_empty(n, steps, rows), start.new_empty(n, steps + 1, columns)
    V[:, 0] = _normalised(start)[0]
    for k in range(steps):
        U[:, k], B[:, k, k] = _normalised(_without(forward(V[:, k]), U[:, :k]))
        V[:, k + 1], B[:, k, k + 1] = _normalised(_without(transposed(U[:, k]), V[:, : k + 1]))
    return B


def _normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    size = x.norm(dim=1)
    return x / torch.where(size > 0, size, math.inf)[:, None], size


def _without(x: Tensor, basis: Tensor) -> Tensor:
    """x less its part in the rows of the basis, (n, k, d), of every sample; again where much of it went."""
    for _ in range(2 if basis.shape[1] else 0):
        before = x.norm(dim=1)
        x = torch.baddbmm(x[:, None], torch.bmm(x[:, None], basis.mT), basis, alpha=-1)[:, 0]
        if not bool((x.norm(dim=1) < MUCH * before).any()):
            break
    return x


def _spread(norms: Tensor) -> float:
    total = norms.square().sum(0).sqrt()
    return float((total.max() / total.min()).log10()) if norms.shape[1] > 1 and float(total.min()) > 0 else math.nan


def _spread_error(norms: Tensor, num: int, seed: int) -> float:
    if num < 2 or len(norms) < 4:
        return math.nan
    random = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(len(norms), generator=random)[: len(norms) // 2] for _ in range(num)]
    return resampled_error([_spread(norms[half]) for half in halves])


def _trend(norms: Tensor, num_null: int, seed: int) -> dict[str, float]:
    """Slope of the log norms on depth, and how often a shuffled order has one as steep."""
    y = norms.square().sum(0).sqrt().log().numpy()
    x = np.arange(len(y)) - (len(y) - 1) / 2
    if not np.isfinite(y).all():
        return {"slope": math.nan, "p_value": math.nan}
    if len(y) < 2:
        return {"slope": math.nan, "p_value": math.nan}
    slope = float(x @ y / (x @ x))
    if not num_null:
        return {"slope": slope, "p_value": math.nan}
    random = np.random.default_rng(seed)
    steep = sum(abs(x @ random.permutation(y)) / (x @ x) >= abs(slope) * (1 - 1e-12) for _ in range(num_null))
    return {"slope": slope, "p_value": (1 + steep) / (1 + num_null)}
