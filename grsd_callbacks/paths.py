"""J^T v and J w of a model on some samples, from a graph that is kept: the ways there are.

double_backward   J w = d/dz (w . J^T z), the exact transpose of the backward pass in use
forward           dual numbers (`torch.autograd.forward_ad`), a forward pass with tangents
central           (f(theta + h w) - f(theta - h w)) / 2h, where neither works
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.lean import lean_derivatives
from grsd_callbacks.losses import wide_dtype

FORWARD_PATHS = ("double_backward", "forward", "central")


class Products:
    """J^T v and J w on a set of samples. Call everything inside `ModelFunction.run`.

    Args:
        function: the model as a function of its parameters.
        inputs: the samples.
        lean: build graphs with `lean_derivatives`.

    The graph is built at the first use and kept until `release`. Memory: the graph, twice that once J w has been
    computed by double backward.
    """

    def __init__(self, function: ModelFunction, inputs: Any, *, lean: bool = True) -> None:
        self.function, self.inputs, self.lean = function, inputs, lean
        self._outputs: Tensor | None = None
        self._cotangent: Tensor | None = None
        self._pulled: list[Tensor | None] = []

    @property
    def outputs(self) -> Tensor:
        """f, differentiable in the copies of the parameters, shape (n, ...).

        Raises:
            ValueError: f does not depend on the parameters.
        """
        if self._outputs is None:
            with lean_derivatives() if self.lean else nullcontext():
                f = self.function.outputs(self.inputs)
            if not f.requires_grad:
                raise ValueError("outputs do not depend on the selected parameters (detached, or under no_grad?)")
            self._outputs = f
        return self._outputs

    def release(self) -> None:
        """Drop the graphs; the next product builds them again."""
        self._outputs = self._cotangent = None
        self._pulled = []

    @property
    def _leaves(self) -> list[Tensor]:
        return list(self.function.parameters.values())

    # -- J^T v -------------------------------------------------------------------------------------------

    def vjp(self, v: Tensor, *, batched: bool = False, differentiable: bool = False) -> list[Tensor | None]:
        """J^T v by parameter (None: no gradient), from v of shape (rows,); batched: from (k, rows), k first.

        If `differentiable`, the first one also builds the graph that double backward needs: a pass fewer.
        """
        f = self.outputs
        if differentiable and not batched and self._cotangent is None:
            return [None if g is None else dense(g.detach()) for g in self.pull(v)]
        v = v.reshape(*v.shape[:1], *f.shape) if batched else v.view_as(f)
        grads = torch.autograd.grad(f, self._leaves, v, retain_graph=True, allow_unused=True, is_grads_batched=batched)
        return [dense(g) for g in grads]

    # -- J w ---------------------------------------------------------------------------------------------

    def jvp(self, path: str, tangents: Sequence[Tensor]) -> Tensor:
        """J w, shape (rows,), from one tangent per parameter."""
        way = {"double_backward": self._double, "forward": self._forward, "central": self._central}[path]
        return way(tangents).detach().reshape(-1)

    def jvp_batched(self, tangents: Sequence[Tensor]) -> Tensor:
        """J w of k tangents by double backward, k first, shape (k, rows)."""
        return self._double(tangents, batched=True).detach().flatten(1)

    def pull(self, at: Tensor | None = None) -> list[Tensor | None]:
        """J^T z as a differentiable function of z, which is linear: it may be built at any z (default 0)."""
        if self._cotangent is None:
            f = self.outputs
            z = (torch.zeros_like(f) if at is None else at.detach().clone().view_as(f)).requires_grad_()
            pulled = torch.autograd.grad(self.outputs, self._leaves, z, create_graph=True, allow_unused=True)
            self._cotangent, self._pulled = z, list(pulled)
        return self._pulled

    def _double(self, tangents: Sequence[Tensor], *, batched: bool = False) -> Tensor:
        pairs = [(g, w) for g, w in zip(self.pull(), tangents, strict=True) if g is not None and g.requires_grad]
        assert self._cotangent is not None
        if not pairs:
            lead = tangents[0].shape[:1] if batched else ()
            return torch.zeros((*lead, *self.outputs.shape), dtype=self.outputs.dtype, device=self.outputs.device)
        (product,) = torch.autograd.grad(
            [g for g, _ in pairs],
            self._cotangent,
            [w for _, w in pairs],
            retain_graph=True,
            is_grads_batched=batched,
        )
        return product

    def _forward(self, tangents: Sequence[Tensor]) -> Tensor:
        named = self.function.parameters.items()
        with warnings.catch_warnings(), forward_ad.dual_level():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's first call warns of its own use of torch.jit
            pairs = zip(named, tangents, strict=True)
            duals = {name: forward_ad.make_dual(p.detach(), w) for (name, p), w in pairs}
            outputs = self.function.outputs(self.inputs, duals)
            tangent = forward_ad.unpack_dual(outputs).tangent
        return torch.zeros_like(outputs) if tangent is None else tangent

    def _central(self, tangents: Sequence[Tensor]) -> Tensor:
        """On float64 copies where the model runs in float64."""
        size = float(torch.stack([t.norm() for t in tangents]).norm())
        scale = float(torch.stack([p.detach().norm() for p in self._leaves]).norm())
        if size == 0.0:
            return torch.zeros_like(self.outputs)
        relative = max(scale, 1e-3) / size
        own = self.function.dtype
        try:
            return self._difference(tangents, 1e-5 * relative, wide_dtype(self.function.device))
        except (RuntimeError, ValueError):  # casts of its own inside the model
            return self._difference(tangents, torch.finfo(own).eps ** (1 / 3) * relative, own)

    def _difference(self, tangents: Sequence[Tensor], h: float, dtype: torch.dtype) -> Tensor:
        velocity = dict(zip(self.function.parameters, tangents, strict=True))
        ends = []
        with torch.no_grad():
            for shift in (h, -h):
                function = self.function.moved(velocity, shift, dtype=dtype)
                ends.append(function.run(partial(function.outputs, self.inputs)).detach())
        return ((ends[0] - ends[1]) / (2 * h)).to(self.function.dtype)


def import_lazily_loaded() -> None:
    """Make torch import what it loads at the first gradient with a cotangent (0.3 s), before anything is timed."""
    with torch.enable_grad():
        x = torch.zeros(1, requires_grad=True)
        torch.autograd.grad(x * 1, x, torch.ones(1))


def dense(gradient: Tensor | None) -> Tensor | None:
    """A gradient without sparse layout."""
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
