"""What must hold before a parameter is read from recorded calls, each tested with one random vector.

    own rows:   a layer's output entry receives gradient from one sample only, and we know which
    rule:       sum_t right (x) left  is autograd's  J_p^T v

Both are linear in v, so a random v that passes proves them for every v, up to the tolerance, with probability one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.factors import products
from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.gram.capture import Record, Uses
from grsd_callbacks.layers import Call
from grsd_callbacks.losses import wide_dtype

#: allowed relative error of J_p^T v, and of v^T K v = |J^T v|^2, by dtype of the model
RULE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
TOTAL_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
#: errors below this many rounding errors of the largest terms are taken for zero
_ROUNDING = 100


def total_tolerance(dtype: torch.dtype, sums: torch.dtype | None) -> float:
    """Allowed gap of v^T K v: that of the dtype of the model, or of the products added up where theirs is coarser."""
    return max(TOTAL_TOLERANCE.get(d, 1e-4) for d in (dtype, sums or dtype))


@dataclass(frozen=True, eq=False)
class Reference:
    """Autograd's own J^T v on the whole batch.

    Attributes:
        v: shape (n, C).
        gradients: J_p^T v by parameter; parameters that do not reach f are left out.
        norm_sq: |J^T v|^2 in float64.
    """

    v: Tensor
    gradients: dict[str, Tensor]
    norm_sq: float

    def gap(self, matrix: Tensor) -> float:
        """|v^T K v - |J^T v|^2| / |J^T v|^2, zero if both are zero."""
        v = self.v.reshape(-1).to(matrix.dtype)
        difference = abs(float(v @ (matrix @ v)) - self.norm_sq)
        return difference / self.norm_sq if self.norm_sq > 0 else difference


def random_like(x: Tensor, seed: int) -> Tensor:
    """Standard normal numbers from a private generator, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype).to(x.device)


def checked(
    record: Record, function: ModelFunction, memory_limit: int, known: Uses | None = None
) -> tuple[Reference, Uses, bool]:
    """J^T v, and the uses that pass both checks (layouts and active positions of their calls now settled).

    Last, whether every call had a gradient to be checked by: where it is zero (a branch that starts at zero) anything
    passes, which is right for this kernel and tells nothing of a later one.

    Cost: two backward passes for every `memory_limit` bytes of gradients at the layers' outputs; one if the uses are
        `known` (layouts settled).
    """
    v = random_like(record.outputs, 0)
    names = [name for name in function.parameters if name not in record.unused]
    leaves = [function.parameters[name] for name in names]
    pairs_of = record.uses if known is None else known
    calls = list({call: None for pairs in pairs_of.values() for call, _ in pairs if call.unchanged})
    itemsize = v.element_size()
    gradients: dict[str, Tensor] = {}
    shares: dict[tuple[Call, str], tuple[Tensor, float]] = {}
    for group in _groups(calls, memory_limit // (2 * itemsize)) or [[]]:
        wanted = [] if gradients else leaves  # with the first group, in one pass
        edges: list[Any] = [call.output_edge for call in group]
        pulled = torch.autograd.grad(record.outputs, [*edges, *wanted], v, retain_graph=True, allow_unused=True)
        gradients.update({name: _dense(g, p) for name, g, p in zip(names, pulled[len(edges) :], wanted)})
        split = list(_separate(record, v, group, pulled) if known is None else _split(group, pulled, len(v)))
        for call, g in split if known is None else ():
            for role, name in call.names.items():
                shape = function.parameters[name].shape
                shares[call, role] = _pulled(call, role, g, len(v), shape, memory_limit // (4 * itemsize))
        _find_active(split)
        del pulled, split
    squares = [g.to(wide_dtype(g.device)).square().sum() for g in gradients.values()]
    norm_sq = float(torch.stack(squares).sum()) if squares else 0.0
    if known is None:
        known = {name: pairs for name, pairs in record.uses.items() if _rule_holds(pairs, shares, gradients[name])}
    return Reference(v, gradients, norm_sq), known, all(size > 0 for _, size in shares.values())


def _groups(calls: list[Call], most: int) -> list[list[Call]]:
    """Consecutive calls, latest first, with at most `most` output values together."""
    groups: list[list[Call]] = []
    total = 0
    for call in reversed(calls):
        if not groups or total + call.numel > most:
            groups.append([])
            total = 0
        groups[-1].append(call)
        total += call.numel
    return groups


def _dense(g: Tensor | None, parameter: Tensor) -> Tensor:
    if g is None:
        return torch.zeros_like(parameter)
    return (g.to_dense() if g.layout != torch.strided else g).detach()


def _separate(
    record: Record, v: Tensor, calls: list[Call], plain: Sequence[Tensor | None]
) -> Iterator[tuple[Call, Tensor]]:
    """Calls whose rows belong to single samples, with their gradients `plain` of v, split by sample.

    Weighting the samples of v must weight their rows, and no others; this also finds the layout.
    """
    if not calls:
        return
    n = len(v)
    w = 1.5 + 0.5 * torch.tanh(random_like(v[:, 0], 1))
    edges = [call.output_edge for call in calls]
    weighted = torch.autograd.grad(record.outputs, edges, w[:, None] * v, retain_graph=True, allow_unused=True)
    for call, g, other in zip(calls, plain, weighted):
        if g is None or other is None:
            continue
        for layout in call.layouts(n):
            call.settle(layout)
            found = call.split(g.unsqueeze(0), n)
            expected = found * w.view(-1, *[1] * (found.dim() - 1))
            error = call.split(other.unsqueeze(0), n).sub(expected).norm()
            if error <= RULE_TOLERANCE[v.dtype] * expected.norm():
                yield call, found
                break


def _split(calls: list[Call], plain: Sequence[Tensor | None], n: int) -> Iterator[tuple[Call, Tensor]]:
    """Calls of known layout with their gradients, split by sample."""
    for call, g in zip(calls, plain):
        if g is not None:
            yield call, call.split(g.unsqueeze(0), n)


def _rule_holds(
    pairs: list[tuple[Call, str]], shares: dict[tuple[Call, str], tuple[Tensor, float]], exact: Tensor
) -> bool:
    """|structured - autograd| <= tolerance |autograd| + rounding of the sum's terms."""
    if not all(pair in shares for pair in pairs):
        return False
    total = sum((shares[pair][0] for pair in pairs), start=torch.zeros_like(exact))
    size = sum(shares[pair][1] for pair in pairs)
    allowed = RULE_TOLERANCE[exact.dtype] * float(exact.norm()) + _ROUNDING * torch.finfo(exact.dtype).eps * size
    return float((total - exact).norm()) <= allowed


def _pulled(call: Call, role: str, g: Tensor, n: int, shape: torch.Size, max_patches: int) -> tuple[Tensor, float]:
    """The call's share of J_p^T v by our rule, and the size |left| |right| of what it sums."""
    if not call.is_factored(role):
        rows = call.diagonal(role, g, slice(None), n)
        return rows.sum((0, 1)).reshape(shape), float(g.norm())
    total, size = g.new_zeros(call.G, call.q, call.p), 0.0
    step = max(1, max_patches // max(1, call.G * call.p * (max(call.T, call.q) if call.T > 1 else 1)))
    for i in range(0, n, step):
        samples = slice(i, min(i + step, n))
        left, right = call.left(samples, n), call.right(g[samples])
        if call.T > 1:
            total += products(right, left).sum((0, 1))
        else:
            total[0] += right[:, 0, 0, 0].T @ left[:, 0, 0]
        size += float(left.norm()) * float(right.norm())
    return call.weight_shaped(total, shape), size


def _find_active(found: list[tuple[Call, Tensor]]) -> None:
    """Remember which positions have a gradient, where that saves something."""
    calls = [(call, g) for call, g in found if call.T > 1 and any(call.is_factored(role) for role in call.names)]
    if not calls:
        return
    first = torch.stack([_idle(call, g[:1]).any() for call, g in calls]).tolist()  # few have any, as a rule
    for call, g in [pair for pair, some in zip(calls, first) if some]:
        active = torch.nonzero(~_idle(call, g)).flatten()
        if len(active) < call.T:
            call.active = active


def _idle(call: Call, g: Tensor) -> Tensor:
    """Which positions have no gradient in any sample, (T,)."""
    return (call.right(g) == 0).all(-1).flatten(0, 2).all(0)
