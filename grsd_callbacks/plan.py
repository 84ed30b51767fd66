"""How products are computed on one model, found once by a trial on a few samples.

Every way is checked before it is timed: `lean` graphs must give the same J^T v as PyTorch's own, and a path for J w
must obey v . J (J^T v) = |J^T v|^2.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.losses import wide_dtype
from grsd_callbacks.memory import SavedBytes
from grsd_callbacks.paths import FORWARD_PATHS, Products
from grsd_callbacks.probe import take

T = TypeVar("T")
#: largest allowed relative gap |v.Mv - |J^T v|^2| / |J^T v|^2 of a path, by dtype of the products
ADJOINT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
#: the trial takes this share of the samples, two at least
TRIAL_SHARE = 8
#: a path this many times the cost of J^T v is good enough to try no other
GOOD_ENOUGH = 1.3
#: and so is one faster than this (seconds): a choice by noise would make runs differ in rounding
FAST_ENOUGH = 5e-3
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
        lean: graphs carry `lean_derivatives`; None while it is not known whether they may.
        chunk_size: samples per graph; 0 while it is not known.
        sample_bytes: what the graphs of one sample hold, J w by double backward included.
        columns: vectors per batched product, by "vjp" and "jvp" (1: one after the other).
        gap: |v.Mv - |J^T v|^2| / |J^T v|^2 of the path in the trial.
        refused: paths that cannot be used, and why.
    """

    path: str = ""
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
        rebuilt: graphs are built again for every product (they do not all fit into memory), and times include it.
    """

    def __init__(self, function: ModelFunction, inputs: Any, n: int, *, rebuilt: bool = False) -> None:
        self.function, self.rebuilt = function, rebuilt
        few = max(2, n // TRIAL_SHARE)
        self.inputs, self.num_samples = (inputs, n) if few >= n else (take(inputs, slice(0, few), n), few)

    def sample_bytes(self, lean: bool) -> float:
        """Bytes that the graphs of one sample hold, those of double backward included where there is one."""
        known = [*self.function.parameters.values(), *self.function.constants]
        with SavedBytes(known) as saved:
            products = Products(self.function, self.inputs, lean=lean)
            products.outputs  # noqa: B018  builds the graph
            try:
                products.pull()
            except (RuntimeError, NotImplementedError):  # no second derivative: the other paths hold one graph
                pass
        return saved.total / self.num_samples

    def lean_gap(self) -> str:
        """Why `lean_derivatives` may not be used; empty if J^T v is the same with them."""
        plain = Products(self.function, self.inputs, lean=False)
        expected = plain.vjp(self._vector(plain.outputs))
        try:
            lean = Products(self.function, self.inputs)
            found = lean.vjp(self._vector(lean.outputs))
        except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            return _first_line(error)
        total = error_ = torch.zeros((), dtype=wide_dtype(self.function.device), device=self.function.device)
        for a, b in zip(found, expected, strict=True):
            if (a is None) != (b is None):
                return "a parameter lost its gradient"
            if a is not None and b is not None:
                total = total + b.to(total).square().sum()
                error_ = error_ + (a.to(total) - b.to(total)).square().sum()
        gap = float((error_ / total.clamp_min(1e-300)).sqrt())
        return "" if gap <= ADJOINT_TOLERANCE.get(self.function.dtype, 1e-3) else f"J^T v differs by {gap:.1e}"

    def choose(self, plan: ProductPlan, *, timed: bool = True) -> ProductPlan:
        """The plan with a path: the fastest right one, or untimed the first right one.

        Raises:
            RuntimeError: no path works.
        """
        products, seconds = self._backward(bool(plan.lean))
        v = self._vector(products.outputs)
        w = products.vjp(v)
        best: tuple[float, str, float] | None = None
        refused = dict(plan.refused)
        for path in FORWARD_PATHS:
            if best is not None and (
                path == "central" or not timed or best[0] <= max(GOOD_ENOUGH * seconds, FAST_ENOUGH)
            ):
                break
            try:
                spent, gap = self._attempt(products, path, v, w)
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
        return replace(plan, path=best[1], gap=best[2], refused=refused)

    def gap(self, path: str, lean: bool) -> float:
        """Relative gap |v.Mv - |J^T v|^2| / |J^T v|^2 of one path; a path that cannot work raises here."""
        products = Products(self.function, self.inputs, lean=lean)
        v = self._vector(products.outputs)
        w = products.vjp(v)
        return _gap(v, w, products.jvp(path, self._tangents(w)))

    def interact(self) -> bool:
        """Whether outputs of the first half of the samples change when the others are left out."""
        half = (self.num_samples + 1) // 2
        with torch.no_grad():
            whole = self.function.outputs(self.inputs)
            part = self.function.outputs(take(self.inputs, slice(0, half), self.num_samples))
        eps = torch.finfo(whole.dtype).eps
        return not torch.allclose(whole[:half], part, rtol=100 * eps**0.5, atol=eps**0.5, equal_nan=True)

    def _backward(self, lean: bool) -> tuple[Products, float]:
        products = Products(self.function, self.inputs, lean=lean)
        v = self._vector(products.outputs)
        return products, timed(self.function.device, lambda: products.vjp(v))[1]

    def _attempt(self, products: Products, path: str, v: Tensor, w: list[Tensor | None]) -> tuple[float, float]:
        """(seconds, gap) of one product on a path."""
        tangents = self._tangents(w)

        def product() -> Tensor:
            if self.rebuilt:
                products.release()
            return products.jvp(path, tangents)

        if path != "central" and not self.rebuilt:
            product()  # builds the second graph; the first forward-mode call of a process loads decompositions
        found, seconds = timed(self.function.device, product)
        return seconds, _gap(v, w, found)

    def _tangents(self, w: list[Tensor | None]) -> list[Tensor]:
        leaves = self.function.parameters.values()
        return [torch.zeros_like(p) if t is None else t.detach() for t, p in zip(w, leaves, strict=True)]

    def _vector(self, outputs: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(outputs.numel(), generator=generator, dtype=torch.float64).to(outputs)


def overhead_dominates(device: torch.device, num_parameters: int, graph_bytes: float) -> bool:
    """Whether several vectors at once are faster than one after the other; from sizes, so that runs repeat."""
    times = ON_GPU if device.type == "cuda" else 1
    return num_parameters <= times * BATCHED_PARAMETERS and graph_bytes <= times * BATCHED_BYTES


def batching_is_right(one: Callable[[Tensor], Tensor], many: Callable[[Tensor], Tensor], V: Tensor) -> bool:
    """Whether the product with all columns of V (rows, k) at once works, and agrees with that of the last alone."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # operations that would be looped over, slowly
            found, alone = many(V.T)[-1], one(V[:, -1])
    except (RuntimeError, NotImplementedError, ValueError, TypeError, Warning):
        return False
    return bool((found - alone).norm() <= ADJOINT_TOLERANCE.get(V.dtype, 1e-3) * alone.norm())


def _gap(v: Tensor, w: list[Tensor | None], product: Tensor) -> float:
    wide = wide_dtype(v.device)
    parts = [t.to(wide).square().sum() for t in w if t is not None]
    squared = float(torch.stack(parts).sum()) if parts else 0.0
    return abs(float(v.to(wide) @ product.to(wide)) - squared) / squared if squared > 0 else 0.0


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def timed(device: torch.device, function: Callable[[], T]) -> tuple[T, float]:
    """The result and its wall-clock seconds."""
    synchronise(device)
    start = time.perf_counter()
    result = function()
    synchronise(device)
    return result, time.perf_counter() - start


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that wall-clock times mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
