"""First derivatives that are cheap to transpose: J w by double backward without PyTorch's wasted work.

    y = f(x, w, ...)      pull(g) = (J_x^T g, J_w^T g, ...)      push(dx, dw, ...) = J_x dx + J_w dw + ...

J w is the derivative of the pull-back J^T z in z, and the pull-back is linear in z. PyTorch's double backward of a
convolution also computes the derivatives in x and w (twice the work) and falls to slow elementwise formulas for
norms. Inside `lean_derivatives()` linear layers, convolutions and norms carry their own `pull` and `push`, and J^T z
depends on z alone. Graphs built here give first derivatives and J w, and no other second derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: what an operation keeps for its derivatives: tensors or None
Saved = tuple[Any, ...]


class _Rule:
    """One operation: `call` gives the output and what the derivatives need; others are linear maps at that point.

    `wanted` says which of the operation's tensors (input, weight, bias) ask for a gradient; `mode` is that in which
    the operation was called.
    """

    mode: lean_derivatives | None = None

    def call(self, *tensors: Any) -> tuple[Tensor, Saved]:
        raise NotImplementedError

    def pull(self, saved: Saved, g: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        raise NotImplementedError

    def push(self, saved: Saved, tangents: tuple[Any, ...]) -> Tensor | None:
        raise NotImplementedError


class _Operation(torch.autograd.Function):
    """y = f(tensors), whose backward can be transposed."""

    @staticmethod
    def forward(ctx: Any, rule: _Rule, *tensors: Tensor | None) -> Tensor:
        y, saved = rule.call(*tensors)
        ctx.rule = rule
        ctx.save_for_backward(*saved)
        ctx.wanted = tuple(t is not None and need for t, need in zip(tensors, ctx.needs_input_grad[1:], strict=True))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and ctx.rule.mode is not None and ctx.rule.mode.entered:
            raise RuntimeError("the model differentiates its own layers, which needs their second derivatives")
        saved = tuple(t if t is None else t.detach() for t in ctx.saved_tensors)
        if not (torch.is_grad_enabled() and g.requires_grad):
            return (None, *ctx.rule.pull(saved, g, ctx.wanted))
        found = iter(_PullBack.apply(ctx.rule, ctx.wanted, g, *saved))
        return (None, *(next(found) if want else None for want in ctx.wanted))


class _PullBack(torch.autograd.Function):
    """g -> J^T g, linear in g: its own backward is the push-forward."""

    @staticmethod
    def forward(ctx: Any, rule: _Rule, wanted: tuple[bool, ...], g: Tensor, *saved: Tensor | None) -> Any:
        ctx.rule, ctx.wanted = rule, wanted
        ctx.save_for_backward(*saved)
        ctx.set_materialize_grads(False)
        return tuple(t for t, want in zip(rule.pull(saved, g, wanted), wanted, strict=True) if want)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        given = iter(tangents)
        full = tuple(next(given) if want else None for want in ctx.wanted)
        pushed = None if all(t is None for t in full) else ctx.rule.push(ctx.saved_tensors, full)
        return (None, None, pushed, *(None for _ in ctx.saved_tensors))


def _sum(terms: Iterable[Tensor | None]) -> Tensor | None:
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total if term is None else total + term
    return total


class _Linear(_Rule):
    def call(self, *tensors: Any) -> tuple[Tensor, Saved]:
        x, w, b = tensors
        return F.linear(x, w, b), (x, w)

    def pull(self, saved: Saved, g: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        x, w = saved
        flat = g.reshape(-1, g.shape[-1])
        return (
            g @ w if wanted[0] else None,
            flat.T @ x.reshape(-1, x.shape[-1]) if wanted[1] else None,
            flat.sum(0) if wanted[2] else None,
        )

    def push(self, saved: Saved, tangents: tuple[Any, ...]) -> Tensor | None:
        (x, w), (dx, dw, db) = saved, tangents
        first = None if dx is None else F.linear(dx, w, db)
        if dw is None:
            return first if first is not None else db.expand(*x.shape[:-1], -1)
        if first is None:
            return F.linear(x, dw, db)
        flat = torch.addmm(first.reshape(-1, dw.shape[0]), x.reshape(-1, x.shape[-1]), dw.T)  # the sum in the product
        return flat.reshape(first.shape)


class _Convolution(_Rule):
    """Any convolution; `settings` are stride, padding, dilation, transposed, output padding, groups."""

    def __init__(self, settings: tuple[Any, ...]) -> None:
        self.settings = settings

    def call(self, *tensors: Any) -> tuple[Tensor, Saved]:
        x, w, b = tensors
        return torch.convolution(x, w, b, *self.settings), (x, w)

    def pull(self, saved: Saved, g: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        x, w = saved
        channels = [g.shape[1]] if wanted[2] else None
        return torch.ops.aten.convolution_backward(g, x, w, channels, *self.settings, wanted)

    def push(self, saved: Saved, tangents: tuple[Any, ...]) -> Tensor | None:
        (x, w), (dx, dw, db) = saved, tangents
        parts = [
            None if dx is None else torch.convolution(dx, w, None, *self.settings),
            None if dw is None else torch.convolution(x, dw, None, *self.settings),
        ]
        total = _sum(parts)
        if db is None:
            return total
        wide = db.view(1, -1, *[1] * (x.dim() - 2))
        return total + wide if total is not None else wide.expand_as(torch.convolution(x, w, None, *self.settings))


class _FixedBatchNorm(_Rule):
    """Batch norm with running statistics: an affine map of every channel."""

    def __init__(self, mean: Tensor, variance: Tensor, eps: float) -> None:
        self.mean, self.variance, self.eps = mean, variance, eps

    def call(self, *tensors: Any) -> tuple[Tensor, Saved]:
        x, w, b = tensors
        return self._norm(x, w, b, self.mean), (x, w)

    def pull(self, saved: Saved, g: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        x, w = saved
        fixed = (self.mean, self.variance, None, None, False, self.eps)
        return torch.ops.aten.native_batch_norm_backward(g, x, w, *fixed, wanted)

    def push(self, saved: Saved, tangents: tuple[Any, ...]) -> Tensor | None:
        (x, w), (dx, dw, db) = saved, tangents
        parts = [
            None if dx is None else self._norm(dx, w, None, torch.zeros_like(self.mean)),
            None if dw is None else self._norm(x, dw, db, self.mean),
        ]
        if dw is None and db is not None:
            parts.append(db.view(1, -1, *[1] * (x.dim() - 2)).expand_as(x))
        return _sum(parts)

    def _norm(self, x: Tensor, w: Tensor | None, b: Tensor | None, mean: Tensor) -> Tensor:
        return torch.batch_norm(x, w, b, mean, self.variance, False, 0.0, self.eps, False)


class _Standardised(_Rule):
    """Norms over groups of one sample's values: x^ = (x - mean) / std, y = w x^ + b."""

    def _groups(self, x: Tensor) -> tuple[int, ...]:
        """Shape with the values that share a mean last."""
        raise NotImplementedError

    def _per_value(self, w: Tensor, x: Tensor) -> Tensor:
        """A weight that broadcasts against x."""
        raise NotImplementedError

    def push(self, saved: Saved, tangents: tuple[Any, ...]) -> Tensor | None:
        x, w, mean, scale = saved
        dx, dw, db = tangents
        shape = self._groups(x)
        mean, scale = mean.reshape(*shape[:-1], 1), scale.reshape(*shape[:-1], 1)
        x_hat = (x.reshape(shape) - mean) * scale
        total: Tensor | None = None
        if dx is not None:
            grouped = dx.reshape(*dx.shape[: dx.dim() - x.dim()], *shape)
            along = (grouped * x_hat).mean(-1, keepdim=True)
            moved = torch.addcmul(grouped - grouped.mean(-1, keepdim=True), x_hat, -along) * scale
            moved = moved.reshape(dx.shape)
            total = moved if w is None else moved * self._per_value(w, x)
        x_hat = x_hat.reshape(x.shape)
        if dw is not None:
            slope = self._per_value(dw, x)
            total = x_hat * slope if total is None else torch.addcmul(total, x_hat, slope)
        if db is not None:
            shift = self._per_value(db, x)
            total = shift.expand_as(x) if total is None else total + shift
        return total


class _GroupNorm(_Standardised):
    def __init__(self, groups: int, eps: float) -> None:
        self.groups, self.eps = groups, eps

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        return x.shape[0], x.shape[1], x[0, 0].numel(), self.groups

    def _groups(self, x: Tensor) -> tuple[int, ...]:
        return (x.shape[0], self.groups, -1)

    def _per_value(self, w: Tensor, x: Tensor) -> Tensor:
        return w.view(-1, *[1] * (x.dim() - 2))

    def call(self, *tensors: Any) -> tuple[Tensor, Saved]:
        x, w, b = tensors
        y, mean, scale = torch.native_group_norm(x.contiguous(), w, b, *self._sizes(x), self.eps)
        return y, (x, w, mean, scale)

    def pull(self, saved: Saved, g: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        x, w, mean, scale = saved
        return torch.ops.aten.native_group_norm_backward(
            g.contiguous(), x.contiguous(), mean, scale, w, *self._sizes(x), wanted
        )


class _LayerNorm(_Standardised):
    def __init__(self, shape: list[int], eps: float) -> None:
        self.shape, self.eps = shape, eps

    def _groups(self, x: Tensor) -> tuple[int, ...]:
        return (*x.shape[: x.dim() - len(self.shape)], -1)

    def _per_value(self, w: Tensor, x: Tensor) -> Tensor:
        return w

    def call(self, *tensors: Any) -> tuple[Tensor, Saved]:
        x, w, b = tensors
        y, mean, scale = torch.native_layer_norm(x, self.shape, w, b, self.eps)
        return y, (x, w, mean, scale)

    def pull(self, saved: Saved, g: Tensor, wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        x, w, mean, scale = saved
        b = w  # only says that there is one
        return torch.ops.aten.native_layer_norm_backward(g, x, self.shape, mean, scale, w, b, wanted)


# -- which calls are replaced ----------------------------------------------------------------------------

Found = tuple[_Rule, tuple[Tensor | None, ...]]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Found | None:
    return (_Linear(), (input, weight, bias)) if weight.dim() == 2 else None


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Found | None:
    if isinstance(padding, str):
        return None
    return _any_convolution(input, weight, bias, stride, padding, dilation, False, 0, groups)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Found | None:
    return _any_convolution(input, weight, bias, stride, padding, dilation, True, output_padding, groups)


def _any_convolution(x: Tensor, w: Tensor, b: Tensor | None, *settings: Any) -> Found | None:
    if x.dim() != w.dim():  # one sample without a batch dimension
        return None
    dims = x.dim() - 2
    stride, padding, dilation, transposed, extra, groups = settings
    wide = [
        list(v) * (dims // len(v)) if isinstance(v, (tuple, list)) else [v] * dims
        for v in (stride, padding, dilation, extra)
    ]
    return _Convolution((*wide[:3], transposed, wide[3], groups)), (x, w, b)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Found | None:
    if training or running_mean is None or running_var is None or (weight is None and bias is not None):
        return None
    return _FixedBatchNorm(running_mean, running_var, eps), (input, weight, bias)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Found | None:
    if not input.is_contiguous() or (weight is None and bias is not None):
        return None
    return _GroupNorm(num_groups, eps), (input, weight, bias)


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Found | None:
    if weight is None and bias is not None:
        return None
    return _LayerNorm(list(normalized_shape), eps), (input, weight, bias)


_REPLACED: dict[Any, Callable[..., Found | None]] = {
    F.linear: _linear,
    F.batch_norm: _batch_norm,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed_convolution),
}


class lean_derivatives(TorchFunctionMode):
    """Within it, linear layers, convolutions and norms get derivatives that are cheap to transpose.

    Outputs are the same numbers. Calls that no rule covers (samples without a batch dimension, padding by name,
    batch norm in train mode, norms with a bias alone, subclasses of tensors) are left alone. A model that
    differentiates within its forward, to second order, is refused with a `RuntimeError`.
    """

    entered = False

    def __enter__(self) -> lean_derivatives:
        self.entered = True
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.entered = False
        super().__exit__(*exception)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        read = _REPLACED.get(func)
        found = None if read is None else read(*args, **(kwargs or {}))
        if found is None or not _applies(found[1]):
            return func(*args, **(kwargs or {}))
        found[0].mode = self
        return _Operation.apply(found[0], *found[1])


def _applies(tensors: tuple[Tensor | None, ...]) -> bool:
    given = [t for t in tensors if t is not None]
    plain = all(type(t) in (Tensor, torch.nn.Parameter) and t.dtype == given[0].dtype for t in given)
    return plain and torch.is_grad_enabled() and any(t.requires_grad for t in given)
