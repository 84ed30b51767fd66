"""The empirical neural tangent kernel as a linear operator: J V, J^T V and J J^T V without forming J.

    J = d f / d theta  on a batch,  rows sample-major:  row i C + c is output c of sample i
    NTKOperator is J J^T, shape (m, m), m = n C. The kernel of THEORY is M = nu J J^T; nu belongs to the loss.

J^T v is one backward pass over a retained graph. J w is, in this order of preference, whichever is right
(checked by v . M v = |J^T v|^2 on a few samples) and fast: double backward over the same graph, forward mode,
central differences. Where the graphs of all samples do not fit into the memory bound, they are built in chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grsd_callbacks.chunks import ChunkedProducts
from grsd_callbacks.functional import ModelFunction, ParameterFilter
from grsd_callbacks.gram import SUMS_FLOOR, Gram, checked_sums, exact_gram, row_memory
from grsd_callbacks.losses import wide_dtype
from grsd_callbacks.paths import FORWARD_PATHS, dense
from grsd_callbacks.plan import (
    ADJOINT_TOLERANCE,
    batching_is_right,
    overhead_dominates,
    synchronise,
)

__all__ = ["ADJOINT_TOLERANCE", "FORWARD_PATHS", "NTKOperator", "synchronise"]

T = TypeVar("T")
#: most vectors in one batched product
MOST_COLUMNS = 32


class NTKOperator(ChunkedProducts):
    """J J^T of a model on a batch of inputs, by products only.

    Args:
        model: the network; measured as a pure function of copies of its parameters (see `ModelFunction`),
            the module itself is left bit-identical.
        inputs: a tensor (n, ...), a tuple of positional or a mapping of keyword inputs.
        params: which trainable parameters form theta (None: all that require a gradient).
        outputs: picks the output tensor (n, ...) from the model's raw output.
        dtype: dtype of the products; None is the parameters' own (half precision is raised to float32).
        chunk_size: samples per graph; None takes as many as the memory bound allows. Chunks assume that samples do
            not interact (true in eval mode; where they do, all samples stay in one chunk). Results do not depend on
            it beyond rounding.
        memory_limit: bytes that the graphs of products, or the temporaries of an exact kernel, may hold; None is
            `graph_memory` and `row_memory`. Smaller is slower. Where memory runs out all the same, chunks are halved.
        gram_dtype: dtype of the products that an exact kernel adds up in float64; None: float64 where the device has
            it. float32 is faster (about twice on a CPU, far more on a GPU made for games) and leaves 6 decades of
            eigenvalues instead of 12.
        forward: how J w is computed: "auto" (checked and timed once), or one of `FORWARD_PATHS`.
        mode: "eval" or "train": the mode of the modules during the measurement.

    Attributes:
        shape: (m, m).   num_samples: n.   num_outputs: C.   num_parameters: P.   dtype, device.
        memory_limit, gram_memory: the bounds on graphs and on an exact kernel's temporaries, bytes.
        num_products: J^T v and J w products so far, in units of kernel products (half each).
        plan: how products are computed, as far as it has been found out.

    Raises:
        ValueError, TypeError: model without trainable parameters, outputs that are not (n, ...), bad arguments.

    Cost: set-up one forward, one backward and a trial on a sixteenth of the samples (1 to 2 gradients in all); then
        J^T v and J w 0.6 gradients each, with "forward" 1.1-1.4 for J w. Twice that for samples whose graphs do not
        fit. Memory: graphs up to the bound plus O(P + m) per vector.

    Accuracy: exact derivatives of the copied model (kinks: autograd's choice); "central" is a difference
        quotient, relative error about 1e-9 in float64 and 1e-4 in float32.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> op = NTKOperator(net, torch.tensor([[3.0, 4.0]]))
        >>> (op @ torch.ones(1)).item()  # f = w.x, so J J^T = |x|^2
        25.0
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        params: ParameterFilter = None,
        outputs: Callable[[Any], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        chunk_size: int | None = None,
        memory_limit: int | None = None,
        forward: str = "auto",
        gram_dtype: torch.dtype | None = None,
        mode: str = "eval",
    ) -> None:
        if not (isinstance(forward, str) and forward in ("auto", *FORWARD_PATHS)):
            raise ValueError(f"forward must be 'auto' or one of {FORWARD_PATHS}, got {forward!r}")
        for name, value in (("chunk_size", chunk_size), ("memory_limit", memory_limit)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
        function = ModelFunction(model, params=params, outputs=outputs, dtype=dtype, mode=mode)
        super().__init__(function, inputs, memory_limit=memory_limit, chunk_size=chunk_size, forward=forward)
        self._asked_memory, self.gram_dtype = memory_limit, checked_sums("gram_dtype", gram_dtype)

    # -- sizes -------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(m, m) with m = n C."""
        m = self.outputs.numel()
        return (m, m)

    @property
    def num_parameters(self) -> int:
        """P, the number of parameters in theta."""
        return self.function.num_parameters

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the products."""
        return self.function.dtype

    @property
    def gram_memory(self) -> int:
        """Bytes of temporaries that an exact kernel may hold."""
        return self._asked_memory or row_memory(self.shape[0], self.num_parameters, self.dtype, self.device)

    @property
    def gram_floor(self) -> float:
        """Rounding of an exact kernel, relative to its largest eigenvalue."""
        return SUMS_FLOOR[self.gram_dtype or wide_dtype(self.device)]

    @property
    def forward_path(self) -> str:
        """The path J w takes; chosen at its first use."""
        return self.choose_forward()

    @property
    def adjoint_gap(self) -> float:
        """|v.Mv - |J^T v|^2| / |J^T v|^2 of the path in its trial."""
        return self.plan.gap

    @property
    def refused(self) -> dict[str, str]:
        """Paths that cannot be used for this model, and why."""
        return self.plan.refused

    # -- products ----------------------------------------------------------------------------------------

    def vjp(self, V: Tensor) -> Tensor:
        """J^T V: (m,) -> (P,) or (m, k) -> (P, k). One backward pass per column, batched where that is faster."""
        V = self._vectors(V, self.shape[0], "V")
        return self._surviving(lambda: self._columns("vjp", V))

    def jvp(self, W: Tensor) -> Tensor:
        """J W: (P,) -> (m,) or (P, k) -> (m, k)."""
        W = self._vectors(W, self.num_parameters, "W")
        self.forward_path  # noqa: B018  chosen before the loop
        return self._surviving(lambda: self._columns("jvp", W))

    def __matmul__(self, V: Tensor) -> Tensor:
        """J J^T V: (m,) -> (m,) or (m, k) -> (m, k). Never holds more than a block of vectors of P numbers."""
        V = self._vectors(V, self.shape[0], "V")
        if V.dim() == 1:
            self.forward_path  # noqa: B018  chosen before the loop
            return self._surviving(lambda: self._pushed(self._filled(self._pulled(V))))
        size = self.run(lambda: self._columns_at_once("vjp", V))
        parts = [self.jvp(self.vjp(block)) for block in V.split(size, dim=1)]
        return torch.cat(parts, dim=1) if parts else V.clone()

    def gram(self, *, memory_limit: int | None = None) -> Tensor:
        """The exact J J^T, shape (m, m), float64, symmetric (see `exact_gram` for cost and accuracy)."""
        return self.exact_gram(memory_limit=memory_limit).matrix

    def exact_gram(self, *, memory_limit: int | None = None) -> Gram:
        """As `gram`, with the paths and checks behind it."""
        limit = memory_limit or self._asked_memory
        return exact_gram(self.function, self.inputs, memory_limit=limit, sums=self.gram_dtype)

    def flatten(self, tensors: list[Tensor | None]) -> Tensor:
        """One (P,) vector from one tensor per parameter, in the order of `parameter_names`; None is zero."""
        parts = [
            torch.zeros(p.numel(), dtype=self.dtype, device=self.device) if t is None else t.detach().reshape(-1)
            for t, p in zip(map(dense, tensors), self.function.parameters.values(), strict=True)
        ]
        return torch.cat(parts)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Views of a (P,) vector in the parameters' shapes."""
        parameters = self.function.parameters.values()
        return [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)]

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters in theta, in order."""
        return list(self.function.parameters)

    # -- vectors of P numbers -------------------------------------------------------------------------------

    def _vjp(self, v: Tensor, *, batched: bool = False) -> Tensor:
        """J^T v: (m,) -> (P,), batched (k, m) -> (k, P)."""
        pulled = self._pulled(v, batched=batched)
        if not batched:
            return self.flatten(pulled)
        return torch.cat([t.reshape(len(v), -1) for t in self._filled(pulled, len(v))], dim=1)

    def _jvp(self, w: Tensor, *, batched: bool = False) -> Tensor:
        """J w: (P,) -> (m,), batched (k, P) -> (k, m)."""
        if not batched:
            return self._pushed(self.unflatten(w))
        leaves = self.function.parameters.values()
        columns = w.split([p.numel() for p in leaves], dim=1)
        stacked = [t.reshape(len(w), *p.shape) for t, p in zip(columns, leaves, strict=True)]
        parts = [self._products(index).jvp_batched(stacked) for index in self._chunks()]
        self.num_products += 0.5 * len(w)
        return torch.cat(parts, dim=-1)

    # -- several columns ---------------------------------------------------------------------------------

    def _columns(self, kind: str, V: Tensor) -> Tensor:
        product = self._vjp if kind == "vjp" else self._jvp
        if V.dim() == 1:
            return product(V)
        if V.shape[1] == 0:
            return V.new_zeros(self.num_parameters if kind == "vjp" else self.shape[0], 0)
        size = self._columns_at_once(kind, V)
        if size == 1:
            return torch.stack([product(column) for column in V.unbind(1)], dim=1)
        return torch.cat([product(block.T, batched=True) for block in V.split(size, dim=1)]).T

    def _columns_at_once(self, kind: str, V: Tensor) -> int:
        """Vectors per batched product, found out at the first block of vectors; 1 where it does not pay or work."""
        if kind not in self.plan.columns and V.shape[1] > 1:
            before = self.num_products
            size = self._tried_columns(kind, V)
            self.num_products = before
            self.plan = replace(self.plan, columns={**self.plan.columns, kind: size})
        return self.plan.columns.get(kind, 1)

    def _tried_columns(self, kind: str, V: Tensor) -> int:
        held = self.plan.sample_bytes * self.chunk_size
        possible = kind == "vjp" or self.plan.path == "double_backward"
        if not (possible and overhead_dominates(self.device, self.num_parameters, held)):
            return 1
        per_column = held + 2 * self.num_parameters * V.element_size()
        size = min(MOST_COLUMNS, int(self.memory_limit / max(per_column, 1)))
        product = self._vjp if kind == "vjp" else self._jvp
        right = size > 1 and batching_is_right(product, partial(product, batched=True), V[:, :2])
        return size if right else 1

    def _vectors(self, V: Tensor, rows: int, name: str) -> Tensor:
        if not isinstance(V, Tensor) or V.dim() not in (1, 2) or V.shape[0] != rows:
            got = tuple(V.shape) if isinstance(V, Tensor) else type(V).__name__
            raise ValueError(f"{name} must be a tensor of shape ({rows},) or ({rows}, k), got {got}")
        return V.detach().to(self.device, self.dtype)
