"""J^T v and J w on a batch in chunks of samples: graphs within a memory bound, halved where memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.memory import graph_memory, is_out_of_memory
from grsd_callbacks.notice import notice
from grsd_callbacks.paths import Products, dense
from grsd_callbacks.plan import ADJOINT_TOLERANCE, ProductPlan, Trial
from grsd_callbacks.probe import num_samples, take

T = TypeVar("T")


class ChunkedProducts:
    """What `NTKOperator` stands on: how a function's products are computed, chunk by chunk.

    Args:
        function: the model as a function of its parameters.
        inputs: the batch, n samples.
        memory_limit: bytes of graphs; None: `graph_memory`.
        chunk_size: samples per graph; None: as many as fit.
        forward: the path of J w; "auto": chosen by a trial.
    """

    def __init__(
        self, function: ModelFunction, inputs: Any, *, memory_limit: int | None, chunk_size: int | None, forward: str
    ) -> None:
        self.function, self.inputs = function, inputs
        self.num_samples = num_samples(inputs)
        if self.num_samples == 0:
            raise ValueError("inputs hold no samples: the leading dimension is 0")
        self.memory_limit = memory_limit or graph_memory(self.device)
        self.num_products = 0.0
        self.plan = ProductPlan()
        self._asked = None if forward == "auto" else forward
        self._asked_chunk = None if chunk_size is None else min(chunk_size, self.num_samples)
        self._kept: dict[int, Products] = {}
        self._trial: Trial | None = None
        self._outputs: Tensor | None = None

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
    def device(self) -> torch.device:
        """Device of the products."""
        return self.function.device

    @property
    def chunk_size(self) -> int:
        """Samples per graph."""
        if not self.plan.chunk_size:
            self.run(self._start)
        return self.plan.chunk_size

    def choose_forward(self, *, timed: bool = True) -> str:
        """Choose the path for J w if none is chosen yet: the fastest right one, or untimed the first right one."""
        if not self.plan.path:
            self.run(lambda: self._choose(timed))
        return self.plan.path

    def adopt(self, plan: ProductPlan) -> None:
        """Take what was found on the same model and probe before."""
        self.plan = plan

    def release(self) -> None:
        """Drop the retained graphs; the next product builds them again, at the same parameters."""
        self._kept, self._trial = {}, None

    def run(self, function: Callable[[], T]) -> T:
        """Run `function` with the model guarded and the copies in place (one session for many products)."""
        return self.function.run(function)

    def chunked(self, v: Tensor) -> list[tuple[Any, Tensor]]:
        """Inputs and rows of v, shape (m,), of every chunk."""
        inputs = [take(self.inputs, index, self.num_samples) for index in self._chunks()]
        return list(zip(inputs, self._split(v), strict=True))

    # -- one chunk after the other -----------------------------------------------------------------------

    def _pulled(self, v: Tensor, *, batched: bool = False) -> list[Tensor | None]:
        """J^T v in the parameters' shapes; None is zero."""
        total = _Sum(len(self.function.parameters))
        for index, part in zip(self._chunks(), self._split(v), strict=True):
            products = self._products(index)
            again = index.start in self._kept and self._path_of(index) == "double_backward"
            total.add(products.vjp(part, batched=batched, differentiable=again))
        self.num_products += 0.5 * (len(v) if batched else 1)
        return total.parts

    def _filled(self, tensors: list[Tensor | None], *lead: int) -> list[Tensor]:
        """One tensor per parameter, dense and without a graph, zeros for None."""
        pairs = zip(map(dense, tensors), self.function.parameters.values(), strict=True)
        return [p.new_zeros(*lead, *p.shape) if t is None else t.detach() for t, p in pairs]

    def _pushed(self, tangents: list[Tensor]) -> Tensor:
        """J w, w in the parameters' shapes."""
        parts = [self._products(index).jvp(self._path_of(index), tangents) for index in self._chunks()]
        self.num_products += 0.5
        return torch.cat(parts, dim=-1)

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
        if not gap <= ADJOINT_TOLERANCE.get(self.function.dtype, 1e-3):  # taken, but not silently
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

    def _path_of(self, index: slice) -> str:
        """The path of J w on a chunk, once its products are made."""
        return (self.plan.kept_path if index.start in self._kept else "") or self.plan.path

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


class _Sum:
    """A sum of vectors by parts, None for zero parts; what was given is left alone."""

    def __init__(self, size: int) -> None:
        self.parts: list[Tensor | None] = [None] * size
        self._own = [False] * size

    def add(self, given: list[Tensor | None]) -> None:
        """Add a vector."""
        for i, (mine, theirs) in enumerate(zip(self.parts, given, strict=True)):
            if mine is None or theirs is None:
                self.parts[i] = theirs if mine is None else mine
            elif self._own[i]:
                mine.add_(theirs)
            else:
                self.parts[i], self._own[i] = mine + theirs, True
