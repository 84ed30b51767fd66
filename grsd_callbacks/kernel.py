"""The empirical neural tangent kernel as a linear operator: J V, J^T V and J J^T V without forming J.

    J = d f / d theta  on a batch,  rows sample-major:  row i C + c is output c of sample i
    NTKOperator is J J^T, shape (m, m), m = n C. The kernel of THEORY is M = nu J J^T; nu belongs to the loss.

J^T v is one backward pass over a retained graph. J w is, in this order of preference, whichever is right
(checked by v . M v = |J^T v|^2 on a few samples) and fast: double backward over the same graph, `torch.func.jvp`,
central differences. Where the graphs of all samples do not fit into the memory bound, they are built in chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grsd_callbacks.functional import ModelFunction, ParameterFilter
from grsd_callbacks.gram import SUMS_FLOOR, Gram, checked_sums, exact_gram, row_memory
from grsd_callbacks.losses import wide_dtype
from grsd_callbacks.memory import graph_memory, is_out_of_memory
from grsd_callbacks.notice import notice
from grsd_callbacks.paths import FORWARD_PATHS, Products, dense
from grsd_callbacks.plan import (
    ADJOINT_TOLERANCE,
    ProductPlan,
    Trial,
    batching_is_right,
    overhead_dominates,
    synchronise,
)
from grsd_callbacks.probe import num_samples, take

__all__ = ["ADJOINT_TOLERANCE", "FORWARD_PATHS", "NTKOperator", "synchronise"]

T = TypeVar("T")
#: most vectors in one batched product
MOST_COLUMNS = 32


class NTKOperator:
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
        self.function = ModelFunction(model, params=params, outputs=outputs, dtype=dtype, mode=mode)
        self.inputs = inputs
        self.num_samples = num_samples(inputs)
        if self.num_samples == 0:
            raise ValueError("inputs hold no samples: the leading dimension is 0")
        self.memory_limit = memory_limit or graph_memory(self.device)
        self._asked_memory, self.gram_dtype = memory_limit, checked_sums("gram_dtype", gram_dtype)
        self.num_products = 0.0
        self.plan = ProductPlan()
        self._asked = None if forward == "auto" else forward
        self._asked_chunk = None if chunk_size is None else min(chunk_size, self.num_samples)
        self._kept: dict[int, Products] = {}
        self._trial: Trial | None = None
        self._outputs: Tensor | None = None

    # -- sizes -------------------------------------------------------------------------------------------

    @property
    def outputs(self) -> Tensor:
        """f on the batch, detached, shape (n, ...)."""
        if self._outputs is None:
            self._outputs = self._surviving(self._all_outputs)
        return self._outputs

    @property
    def num_outputs(self) -> int:
        """C, output values per sample."""
        return self.outputs[0].numel()

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
    def device(self) -> torch.device:
        """Device of the products."""
        return self.function.device

    @property
    def gram_memory(self) -> int:
        """Bytes of temporaries that an exact kernel may hold."""
        return self._asked_memory or row_memory(self.shape[0], self.num_parameters, self.dtype, self.device)

    @property
    def gram_floor(self) -> float:
        """Rounding of an exact kernel, relative to its largest eigenvalue."""
        return SUMS_FLOOR[self.gram_dtype or wide_dtype(self.device)]

    @property
    def chunk_size(self) -> int:
        """Samples per graph."""
        if not self.plan.chunk_size:
            self.run(self._start)
        return self.plan.chunk_size

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

    def choose_forward(self, *, timed: bool = True) -> str:
        """Choose the path for J w if none is chosen yet: the fastest right one, or untimed the first right one."""
        if not self.plan.path:
            self.run(lambda: self._choose(timed))
        return self.plan.path

    def adopt(self, plan: ProductPlan) -> None:
        """Take what was found on the same model and probe before."""
        self.plan = plan

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

    def release(self) -> None:
        """Drop the retained graphs; the next product builds them again, at the same parameters."""
        self._kept, self._trial = {}, None

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` with the model guarded and the copies in place (one session for many products)."""
        return self.function.run(function)

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

    # -- one chunk after the other -----------------------------------------------------------------------

    def _vjp(self, v: Tensor, *, batched: bool = False) -> Tensor:
        """J^T v: (m,) -> (P,), batched (k, m) -> (k, P)."""
        pulled = self._pulled(v, batched=batched)
        if not batched:
            return self.flatten(pulled)
        return torch.cat([t.reshape(len(v), -1) for t in self._filled(pulled, len(v))], dim=1)

    def _pulled(self, v: Tensor, *, batched: bool = False) -> list[Tensor | None]:
        """J^T v in the parameters' shapes; None is zero."""
        total: list[Tensor | None] = [None] * len(self.function.parameters)
        for index, part in zip(self._chunks(), self._split(v), strict=True):
            pulled = self._products(index).vjp(part, batched=batched)
            total = [_plus(a, b) for a, b in zip(total, pulled, strict=True)]
        self.num_products += 0.5 * (len(v) if batched else 1)
        return total

    def _filled(self, tensors: list[Tensor | None], *lead: int) -> list[Tensor]:
        """One tensor per parameter, dense and without a graph, zeros for None."""
        pairs = zip(map(dense, tensors), self.function.parameters.values(), strict=True)
        return [p.new_zeros(*lead, *p.shape) if t is None else t.detach() for t, p in pairs]

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

    def _pushed(self, tangents: list[Tensor]) -> Tensor:
        """J w, w in the parameters' shapes."""
        parts = [self._products(index).jvp(self.plan.path, tangents) for index in self._chunks()]
        self.num_products += 0.5
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

    # -- how products are computed -----------------------------------------------------------------------

    def _start(self) -> None:
        """Lean graphs if they are right, and the chunk size."""
        trial = self._trial = Trial(self.function, self.inputs, self.num_samples)
        if self.plan.lean is None:
            why = trial.lean_gap()
            refused = {**self.plan.refused, "lean": why} if why else self.plan.refused
            self.plan = replace(self.plan, lean=not why, refused=refused)
        if not self.plan.chunk_size:
            each = trial.sample_bytes(bool(self.plan.lean))
            self.plan = replace(
                self.plan, sample_bytes=each, chunk_size=self._asked_chunk or self._automatic_chunk(trial, each)
            )

    def _automatic_chunk(self, trial: Trial, sample_bytes: float) -> int:
        n = self.num_samples
        return trial.chunk_size(n, sample_bytes, self.memory_limit) if self.function.mode == "eval" else n

    def _choose(self, timed: bool) -> None:
        self.chunk_size  # noqa: B018  found before the path
        trial = self._trial or Trial(self.function, self.inputs, self.num_samples)
        self._trial = None
        if self._asked is None:
            self.plan = trial.choose(self.plan, timed=timed, rebuilt=not self._all_kept)
            return
        gap = trial.gap(self._asked, bool(self.plan.lean))
        self.plan = replace(self.plan, path=self._asked, gap=gap)
        if not gap <= ADJOINT_TOLERANCE.get(self.dtype, 1e-3):  # taken, but not silently
            notice(
                f"J w by forward={self._asked!r} is not the transpose of J^T v on this model "
                f"(gap {gap:.1e}); use forward='auto'",
                RuntimeWarning,
            )

    # -- chunks and graphs -------------------------------------------------------------------------------

    def _all_outputs(self) -> Tensor:
        f = torch.cat([self._products(c).outputs.detach() for c in self._chunks()])
        if f.shape[0] != self.num_samples:
            raise ValueError(
                f"outputs must have one row per sample: inputs have {self.num_samples} samples, "
                f"the model returned shape {tuple(f.shape)}"
            )
        return f

    def _chunks(self) -> list[slice]:
        n, size = self.num_samples, self.chunk_size
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    def chunked(self, v: Tensor) -> list[tuple[Any, Tensor]]:
        """Inputs and rows of v, shape (m,), of every chunk."""
        inputs = [take(self.inputs, index, self.num_samples) for index in self._chunks()]
        return list(zip(inputs, self._split(v), strict=True))

    def _split(self, v: Tensor) -> list[Tensor]:
        width = self.num_outputs
        return list(v.split([(c.stop - c.start) * width for c in self._chunks()], dim=-1))

    @property
    def _all_kept(self) -> bool:
        return self.plan.sample_bytes * self.num_samples <= self.memory_limit or self.chunk_size >= self.num_samples

    def _products(self, index: slice) -> Products:
        """Products on a chunk; its graphs are kept if they fit beside those of one other chunk."""
        if index.start in self._kept:
            return self._kept[index.start]
        products = Products(self.function, take(self.inputs, index, self.num_samples), lean=bool(self.plan.lean))
        each = self.plan.sample_bytes * self.plan.chunk_size
        if self._all_kept or (len(self._kept) + 2) * each <= self.memory_limit:
            self._kept[index.start] = products
        return products

    def _surviving(self, function: Callable[[], Tensor]) -> Tensor:
        """Run it; where memory runs out, with chunks of half the size, as often as needed."""
        while True:
            before = self.num_products
            try:
                return self.run(function)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.plan.chunk_size <= 1 or self.function.mode != "eval":
                    raise
            self.num_products = before
            self._halve_chunks()

    def _halve_chunks(self) -> None:
        self.release()
        self.memory_limit = max(1, self.memory_limit // 2)
        self.plan = replace(self.plan, chunk_size=math.ceil(self.plan.chunk_size / 2), columns={})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _vectors(self, V: Tensor, rows: int, name: str) -> Tensor:
        if not isinstance(V, Tensor) or V.dim() not in (1, 2) or V.shape[0] != rows:
            got = tuple(V.shape) if isinstance(V, Tensor) else type(V).__name__
            raise ValueError(f"{name} must be a tensor of shape ({rows},) or ({rows}, k), got {got}")
        return V.detach().to(self.device, self.dtype)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b
