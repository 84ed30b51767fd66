"""The exact kernel matrix J J^T: rows of J formed in chunks, contracted and dropped.

Letters: n samples, C outputs per sample, m = n C rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.losses import wide_dtype
from grsd_callbacks.probe import num_samples, take

#: bytes of explicit rows held at a time, by default
ROW_MEMORY = 256 * 2**20


@dataclass(frozen=True, eq=False)
class Gram:
    """The exact J J^T and how it was computed.

    Attributes:
        matrix: J J^T, shape (m, m), float64 where the device has it, symmetric.
        paths: for every parameter name, the path its contribution took.
        num_unused: parameters whose gradient is identically zero on the probe (zero columns of J).
    """

    matrix: Tensor
    paths: dict[str, str]
    num_unused: int


def exact_gram(function: ModelFunction, inputs: Any, *, memory_limit: int = ROW_MEMORY) -> Gram:
    """J J^T of a model on a batch, accumulated in float64.

    Args:
        function: the model as a function of its parameters.
        inputs: the batch, n samples.
        memory_limit: bytes of explicit rows held at a time.

    Cost: C backward passes over each sample's own graph, m^2 P multiplications; rows of J in chunks of
        at most `memory_limit` bytes (rows are formed again where not all fit).

    Accuracy: rows in the model's dtype, sums in float64.
    """
    return function.run(lambda: _generic_gram(function, inputs, memory_limit))


def _generic_gram(function: ModelFunction, inputs: Any, memory_limit: int) -> Gram:
    rows = _Rows(function, inputs)
    wide = wide_dtype(function.device)
    matrix = torch.zeros(rows.total, rows.total, dtype=wide, device=function.device)
    groups = list(rows.groups(memory_limit))
    for a, group in enumerate(groups):
        left = rows.of(group).to(wide)
        matrix[rows.span(group), rows.span(group)] = left @ left.T
        for other in groups[a + 1 :]:
            block = left @ rows.of(other).to(wide).T
            matrix[rows.span(group), rows.span(other)] = block
            matrix[rows.span(other), rows.span(group)] = block.T
    matrix = (matrix + matrix.T) / 2
    return Gram(matrix, dict.fromkeys(function.parameters, "rows"), rows.num_unused)


class _Rows:
    """Explicit rows of J, by groups of samples (or of outputs, where samples interact)."""

    def __init__(self, function: ModelFunction, inputs: Any) -> None:
        self.function = function
        self.inputs = inputs
        self.n = num_samples(inputs)
        with torch.no_grad():
            whole = function.outputs(inputs)
            self.width = whole[0].numel()
            alone = function.outputs(take(inputs, slice(0, 1), self.n))
        self.total = self.n * self.width
        eps = torch.finfo(whole.dtype).eps
        self.independent = torch.allclose(whole[:1], alone, rtol=100 * eps**0.5, atol=eps**0.5)
        self.num_unused = 0

    def groups(self, memory_limit: int) -> Iterator[range]:
        """Consecutive samples whose float64 rows (and those of one partner group) stay in the bound."""
        per_sample = self.width * self.function.num_parameters * 8 * 2
        size = max(1, int(memory_limit // max(per_sample, 1)))
        return (range(i, min(i + size, self.n)) for i in range(0, self.n, size))

    def span(self, group: range) -> slice:
        return slice(group.start * self.width, group.stop * self.width)

    def of(self, group: range) -> Tensor:
        """The rows of the samples in `group`, shape (len(group) C, P)."""
        if self.independent:
            return torch.cat([self._rows(take(self.inputs, slice(i, i + 1), self.n), slice(None)) for i in group])
        return self._rows(self.inputs, self.span(group))

    def _rows(self, inputs: Any, span: slice) -> Tensor:
        leaves = list(self.function.parameters.values())
        flat = self.function.outputs(inputs).reshape(-1)[span]
        rows = [torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True) for value in flat.unbind()]
        self.num_unused = sum(g is None for g in rows[0])
        return torch.stack([_flat(row, leaves) for row in rows])


def _flat(gradients: tuple[Tensor | None, ...], leaves: list[Tensor]) -> Tensor:
    return torch.cat(
        [
            torch.zeros_like(p).reshape(-1) if g is None else (g.to_dense() if g.is_sparse else g).reshape(-1)
            for g, p in zip(gradients, leaves, strict=True)
        ]
    )
