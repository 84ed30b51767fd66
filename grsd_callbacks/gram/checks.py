"""What must hold before a parameter is read from recorded calls, each tested with one random vector.

    own rows:   a layer's output entry receives gradient from one sample only, and we know which
    rule:       sum_t right (x) left  is autograd's  J_p^T v

Both are linear in v, so a random v that passes proves them for every v, up to the tolerance, with probability one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.gram.capture import Record, Uses
from grsd_callbacks.layers import Call

#: allowed relative error of J_p^T v, and of v^T K v = |J^T v|^2, by dtype of the model
RULE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
TOTAL_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
#: errors below this many rounding errors of the largest terms are taken for zero
_ROUNDING = 100


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
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)


def checked(record: Record, function: ModelFunction, *, keep_graph: bool, max_patches: int) -> tuple[Reference, Uses]:
    """J^T v, and the uses that pass both checks (layouts and active positions of their calls now settled)."""
    n = record.outputs.shape[0]
    v = random_like(record.outputs, 0)
    names = [name for name in function.parameters if name not in record.unused]
    calls = list({call: None for pairs in record.uses.values() for call, _ in pairs if call.unchanged})
    pulled = torch.autograd.grad(
        record.outputs,
        [*(function.parameters[name] for name in names), *(call.edge for call in calls)],
        v,
        retain_graph=keep_graph or bool(calls),
        allow_unused=True,
    )
    gradients = {name: _dense(g, function.parameters[name]) for name, g in zip(names, pulled)}
    at_calls = {call: g for call, g in zip(calls, pulled[len(names) :]) if g is not None}
    norm_sq = sum(float(g.to(_wide(g)).square().sum()) for g in gradients.values())
    reference = Reference(v, gradients, norm_sq)
    separate = _separate(record, v, at_calls, keep_graph)
    right = {call: call.split(at_calls[call].unsqueeze(0), n) for call in separate}
    uses = {}
    for name, pairs in record.uses.items():
        if all(call in right for call, _ in pairs) and _rule_holds(name, pairs, right, gradients, n, max_patches):
            uses[name] = pairs
    for call, g in right.items():
        _find_active(call, g)
    return reference, uses


def _dense(g: Tensor | None, parameter: Tensor) -> Tensor:
    if g is None:
        return torch.zeros_like(parameter)
    return (g.to_dense() if g.layout != torch.strided else g).detach()


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64


def _separate(record: Record, v: Tensor, at_calls: dict[Call, Tensor], keep_graph: bool) -> list[Call]:
    """Calls whose rows belong to single samples: weighting the samples of v weights their rows, and no others."""
    if not at_calls:
        return []
    n = len(v)
    w = 1.5 + 0.5 * torch.tanh(random_like(v[:, 0], 1))
    weighted = torch.autograd.grad(
        record.outputs, [call.edge for call in at_calls], w[:, None] * v, retain_graph=keep_graph
    )
    found = []
    for (call, g), other in zip(at_calls.items(), weighted):
        for layout in call.layouts(n):
            call.settle(layout)
            expected = call.split(g.unsqueeze(0), n)
            expected = expected * w.view(-1, *[1] * (expected.dim() - 1))
            error = (call.split(other.unsqueeze(0), n) - expected).norm()
            if error <= RULE_TOLERANCE[v.dtype] * expected.norm():
                found.append(call)
                break
    return found


def _rule_holds(
    name: str,
    pairs: list[tuple[Call, str]],
    right: dict[Call, Tensor],
    gradients: dict[str, Tensor],
    n: int,
    max_patches: int,
) -> bool:
    """|structured - autograd| <= tolerance |autograd| + rounding of the sum's terms."""
    exact = gradients[name]
    total, size = torch.zeros_like(exact), 0.0
    for call, role in pairs:
        part, part_size = _pulled(call, role, right[call], n, exact.shape, max_patches)
        total, size = total + part, size + part_size
    eps = torch.finfo(exact.dtype).eps
    allowed = RULE_TOLERANCE[exact.dtype] * float(exact.norm()) + _ROUNDING * eps * size
    return float((total - exact).norm()) <= allowed


def _pulled(
    call: Call, role: str, g: Tensor, n: int, shape: torch.Size, max_patches: int
) -> tuple[Tensor, float]:
    """The call's share of J_p^T v by our rule, and the size |left| |right| of what it sums."""
    if not call.is_factored(role):
        rows = call.diagonal(role, g, slice(None), n)
        return rows.sum((0, 1)).reshape(shape), float(g.norm())
    total, size = 0, 0.0
    step = max(1, max_patches // max(1, call.T * call.G * call.p))
    for i in range(0, n, step):
        samples = slice(i, min(i + step, n))
        left, right = call.left(samples, n), call.right(g[samples])[:, 0]
        total = total + torch.einsum("igtq,igtp->gqp", right, left)
        size += float(left.norm()) * float(right.norm())
    return call.weight_shaped(total, shape), size


def _find_active(call: Call, g: Tensor) -> None:
    """Remember which positions have a gradient, where that saves something."""
    if call.T == 1 or not any(call.is_factored(role) for role in call.names):
        return
    positions = (call.right(g) != 0).any(0).any(-1).flatten(0, 1).any(0)
    active = torch.nonzero(positions).flatten()
    if len(active) < call.T:
        call.active = active
