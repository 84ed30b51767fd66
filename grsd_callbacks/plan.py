"""How products are computed on one model, found once by a trial on a few samples.

Every way is checked before it is timed: `lean` graphs must give the same J^T v as PyTorch's own, and a path for J w
must obey v . J (J^T v) = |J^T v|^2.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.losses import wide_dtype
from grsd_callbacks.memory import SavedBytes, graph_bytes, is_out_of_memory
from grsd_callbacks.notice import notice
from grsd_callbacks.paths import FORWARD_PATHS, Products
from grsd_callbacks.probe import take

T = TypeVar("T")
#: largest allowed relative gap |v.Mv - |J^T v|^2| / |J^T v|^2 of a path, by dtype of the products
ADJOINT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
#: the trial takes one in so many samples, two at least
TRIAL_SHARE = 16
#: where not all graphs fit, a chunk is this share of the bound: the others are kept, one is built when needed
CHUNKS_PER_BOUND = 4
#: a path this many times the cost of J^T v is good enough to try no other
GOOD_ENOUGH = 1.3
#: and so is one faster than this (seconds): a choice by noise would make runs differ in rounding
FAST = 5e-3
#: products of several vectors are batched where overhead dominates, up to so many parameters and bytes of graphs:
#: 2 to 5 times faster there, and up to 4 times slower for larger nets on a CPU
BATCHED_PARAMETERS, BATCHED_BYTES = 2**15, 2**19
#: a GPU takes this many times more before arithmetic dominates
ON_GPU = 64


@dataclass(frozen=True)
class ProductPlan:
    """What a trial found; valid for the same model and probe.

    Attributes:
        path: for J w, one of `FORWARD_PATHS`; empty while it is not chosen.
        kept_path: for J w on chunks whose graphs are kept while others are built again; empty: `path`.
        lean: graphs carry `lean_derivatives`; None while it is not known whether they may.
        chunk_size: samples per graph; 0 while it is not known.
        sample_bytes: what the graphs of one sample hold, J w by double backward included.
        columns: vectors per batched product, by "vjp" and "jvp" (1: one after the other).
        gap: |v.Mv - |J^T v|^2| / |J^T v|^2 of the path in the trial.
        refused: paths that cannot be used, and why.
    """

    path: str = ""
    kept_path: str = ""
    lean: bool | None = None
    chunk_size: int = 0
    sample_bytes: float = 0.0
    columns: dict[str, int] = field(default_factory=dict)
    gap: float = float("nan")
    refused: dict[str, str] = field(default_factory=dict)


class Trial:
    """Trials on the first few of n samples. Call everything inside `ModelFunction.run`.

    Args:
        function: the model as a function of its parameters.
        inputs: the whole batch of n samples.

    Cost: three forwards and two backwards, one J^T z and one J w on the few samples where all is well.
    """

    def __init__(self, function: ModelFunction, inputs: Any, n: int) -> None:
        self.function = function
        self.inputs, self.num_samples = inputs, n
        few = max(2, n // TRIAL_SHARE)
        if few < n and not function.interacting and (part := self._part(few)) is not None:
            self.inputs, self.num_samples = part, few
        self._known = [*function.parameters.values(), *function.constants, *tree_leaves(inputs)]
        self._saved: SavedBytes | None = None
        self._products: Products | None = None

    def _part(self, count: int) -> Any:
        """The first samples; None for a model that does not run on some of a batch alone."""
        try:
            part = take(self.inputs, slice(0, count), self.num_samples)
            self.function.outputs(part)
        except (RuntimeError, ValueError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return None
        return part

    def lean_gap(self) -> str:
        """Why `lean_derivatives` may not be used; empty if J^T v is the same with them."""
        expected = self._pull_back(Products(self.function, self.inputs, lean=False))
        try:
            found = self._pull_back(self._built(True))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            return _first_line(error)
        if any((a is None) != (b is None) for a, b in zip(found, expected, strict=True)):
            return "a parameter lost its gradient"
        wrong = [_minus(a, b) for a, b in zip(found, expected, strict=True)]
        gap = _norm(wrong) / max(_norm(expected), 1e-300)
        return "" if gap <= ADJOINT_TOLERANCE.get(self.function.dtype, 1e-3) else f"J^T v differs by {gap:.1e}"

    def sample_bytes(self, lean: bool) -> float:
        """Bytes that the graphs of one sample hold, those of double backward included where there is one."""
        products, pulled = self._built(lean), list[Tensor | None]()
        with self._saved or nullcontext():
            try:
                pulled = products.pull()
            except (RuntimeError, NotImplementedError):  # no second derivative: the other paths hold one graph
                pass
        total = graph_bytes([products.outputs, *pulled]) if self._saved is None else self._saved.total
        return total / self.num_samples

    def chunk_size(self, n: int, sample_bytes: float, memory_limit: int) -> int:
        """Samples per graph for n samples: all that fit into the bound together, else a part of what fits."""
        if sample_bytes * n <= memory_limit:
            return n
        if self.interact():
            notice(
                f"the graphs of {n} samples hold about {sample_bytes * n:.2g} bytes, more than memory_limit = "
                f"{memory_limit}, and cannot be built in chunks: samples interact in this model. Take a smaller probe, "
                "or raise memory_limit.",
                RuntimeWarning,
            )
            return n
        return max(1, min(n, int(memory_limit / (CHUNKS_PER_BOUND * sample_bytes))))

    def choose(self, plan: ProductPlan, *, timed: bool = True, rebuilt: bool = False) -> ProductPlan:
        """The plan with a path: the fastest right one, or untimed the first right one.

        Args:
            plan: what is known.
            timed: whether speed matters.
            rebuilt: graphs are built again for every product (they do not all fit), and times include it.

        Raises:
            RuntimeError: no path works.
        """
        w, seconds = self._timed(lambda: self._pull_back(self._built(bool(plan.lean))))
        best: tuple[float, str, float] | None = None
        refused = dict(plan.refused)
        for path in FORWARD_PATHS:
            if best is not None and (path == "central" or not timed or best[0] <= max(GOOD_ENOUGH * seconds, FAST)):
                break
            try:
                spent, gap = self._attempt(path, w, rebuilt, GOOD_ENOUGH * seconds)
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                refused[path] = _first_line(error)
                continue
            if not gap <= ADJOINT_TOLERANCE.get(self.function.dtype, 1e-3):
                refused[path] = f"J w is not the transpose of J^T v (gap {gap:.1e})"
            elif best is None or spent < best[0]:
                best = (spent, path, gap)
        if best is None:
            reasons = "; ".join(f"{path}: {why}" for path, why in refused.items())
            raise RuntimeError(f"no way to compute J w for this model ({reasons}); use method='exact'")
        kept = ""
        if rebuilt and best[1] != "double_backward" and "double_backward" not in refused:
            if self._attempt("double_backward", w, False, math.inf)[0] < best[0]:
                kept = "double_backward"
        return replace(plan, path=best[1], kept_path=kept, gap=best[2], refused=refused)

    def gap(self, path: str, lean: bool) -> float:
        """Relative gap |v.Mv - |J^T v|^2| / |J^T v|^2 of one path; a path that cannot work raises here."""
        return self._attempt(path, self._pull_back(self._built(lean)), False, math.inf)[1]

    def interact(self) -> bool:
        """Whether outputs of the first half of the samples change when the others are left out."""
        if self.function.interacting:
            return True
        half = (self.num_samples + 1) // 2
        with torch.no_grad():
            whole = self.function.outputs(self.inputs)
            try:
                part = self.function.outputs(take(self.inputs, slice(0, half), self.num_samples))
            except (RuntimeError, ValueError, IndexError) as error:  # nodes of a graph, say
                if is_out_of_memory(error):
                    raise
                return True
        eps = torch.finfo(whole.dtype).eps
        return not torch.allclose(whole[:half], part, rtol=100 * eps**0.5, atol=eps**0.5, equal_nan=True)

    def _built(self, lean: bool) -> Products:
        """The products of the trial; what their graphs hold is counted."""
        if self._products is None or self._products.lean != lean:
            products = Products(self.function, self.inputs, lean=lean)
            try:
                with SavedBytes(self._known) as self._saved:
                    products.outputs  # noqa: B018  builds the graph
            except RuntimeError as error:
                if "saved tensor hooks" not in str(error):
                    raise
                self._saved = None  # torch.func's transforms inside the model refuse them
                products.outputs  # noqa: B018
            self._products = products
        return self._products

    def _pull_back(self, products: Products) -> list[Tensor | None]:
        return products.vjp(self._vector(products.outputs))

    def _attempt(self, path: str, w: list[Tensor | None], rebuilt: bool, good: float) -> tuple[float, float]:
        """(seconds, gap) of one product on a path; timed again if it was slow the first time."""
        products = self._products
        assert products is not None
        leaves = self.function.parameters.values()
        tangents = [torch.zeros_like(p) if t is None else t.detach() for t, p in zip(w, leaves, strict=True)]

        def product() -> Tensor:
            if rebuilt:
                products.release()
            return products.jvp(path, tangents)

        if path == "double_backward":
            products.pull()
        found, seconds = self._timed(product)
        if good < seconds and path != "central":  # the first forward-mode call loads decompositions
            seconds = min(seconds, self._timed(product)[1])
        v, squared = self._vector(products.outputs), _norm(w) ** 2
        wide = wide_dtype(v.device)
        gap = abs(float(v.to(wide) @ found.to(wide)) - squared) / squared if squared > 0 else 0.0
        return seconds, gap

    def _vector(self, outputs: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(outputs.numel(), generator=generator, dtype=torch.float64).to(outputs)

    def _timed(self, function: Callable[[], T]) -> tuple[T, float]:
        synchronise(self.function.device)
        start = time.perf_counter()
        result = function()
        synchronise(self.function.device)
        return result, time.perf_counter() - start


def overhead_dominates(device: torch.device, num_parameters: int, graph_bytes: float) -> bool:
    """Whether several vectors at once are faster than one after the other; from sizes, so that runs repeat."""
    times = ON_GPU if device.type == "cuda" else 1
    return num_parameters <= times * BATCHED_PARAMETERS and graph_bytes <= times * BATCHED_BYTES


def batching_is_right(one: Callable[[Tensor], Tensor], many: Callable[[Tensor], Tensor], V: Tensor) -> bool:
    """Whether the product with all columns of V (rows, k) at once works, and agrees with that of the last alone."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "There is a performance drop")  # operations looped over
            found, alone = many(V.T)[-1], one(V[:, -1])
    except (RuntimeError, NotImplementedError, ValueError, TypeError, Warning):
        return False
    return bool((found - alone).norm() <= ADJOINT_TOLERANCE.get(V.dtype, 1e-3) * alone.norm())


def _norm(tensors: list[Tensor | None]) -> float:
    given = [t for t in tensors if t is not None]
    return float(torch.stack(torch._foreach_norm(given)).norm()) if given else 0.0


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a - b


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that wall-clock times mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
