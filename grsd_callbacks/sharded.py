"""An unsharded twin of a model whose parameters are sharded over ranks (DTensor, as `fully_shard` makes them).

Products need whole parameters, and a sharded module gathers them in hooks that `functional_call` cannot reach. The twin
is the same tree of modules, of the classes that they had before sharding, without the sharding's hooks, and with whole
parameters of its own that are gathered from all ranks when asked.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

_MIXIN = "FSDPModule"
_SHARDING, _TENSOR_PARALLEL = "torch.distributed.", "torch.distributed.tensor"
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is a DTensor, or a module one of `fully_shard`."""
    return any(_is_wrapped(type(module)) for module in model.modules()) or any(map(_is_split, model.parameters()))


class Twin:
    """A model with whole parameters that follows a sharded one.

    Args:
        source: the sharded model; not changed.

    Attributes:
        module: the twin; its parameters have the source's names, and hold its values after `refresh`.

    Raises:
        ValueError: the model is tensor parallel, so that its modules compute on parts; or parameters are wrapped in a
            way that cannot be undone.

    Cost: the memory of all parameters and buffers on every rank; `refresh` gathers them, P numbers over the ranks.
    """

    def __init__(self, source: nn.Module) -> None:
        for name, module in source.named_modules():
            if any(_origin(hook).startswith(_TENSOR_PARALLEL) for hook in _hooks(module)):
                raise ValueError(
                    f"module {name!r} is tensor parallel, so it computes on a part of its parameters and cannot be "
                    "measured; shard by fully_shard alone, or measure an unsharded copy of the model"
                )
        self.source = source
        self._memo: dict[int, Any] = {}
        self.module: nn.Module = self._renewed(source)

    def make_room(self) -> None:
        """Whether one whole parameter more fits, for `refresh`; raises where memory is short, without a collective."""
        largest = max(self.module.parameters(), key=lambda p: p.numel() * p.element_size(), default=None)
        if largest is not None:
            torch.empty_like(largest)

    def refresh(self) -> nn.Module:
        """Gather the source's present values; a collective, on every rank alike. Returns the twin."""
        whole = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
        with torch.no_grad():
            for name, tensor in [*self.source.named_parameters(), *self.source.named_buffers()]:
                whole[name].copy_(tensor.full_tensor() if _is_split(tensor) else tensor)  # type: ignore[attr-defined]
                whole[name].requires_grad_(tensor.requires_grad)
        for old, new in zip(self.source.modules(), self.module.modules(), strict=True):
            new.training = old.training
        return self.module

    def _renewed(self, module: nn.Module) -> nn.Module:
        if id(module) in self._memo:
            return self._memo[id(module)]
        kind = _original(type(module))
        new = kind.__new__(kind)
        self._memo[id(module)] = new
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                vars(new)[name] = {key: self._whole(tensor) for key, tensor in value.items()}
            elif name == "_modules":
                vars(new)[name] = {key: None if m is None else self._renewed(m) for key, m in value.items()}
            elif name in _HOOKS:
                kept = {key: hook for key, hook in value.items() if not _origin(hook).startswith(_SHARDING)}
                vars(new)[name] = type(value)(kept)
            elif not (name.startswith(("_fsdp", "_is_fsdp", "__composable_api")) or name == "_compiled_call_impl"):
                vars(new)[name] = self._rebound(value)
        vars(new).setdefault("_compiled_call_impl", None)
        return new

    def _whole(self, tensor: Tensor | None) -> Tensor | None:
        """Empty, of the whole shape; one for every tensor, however often it is used."""
        if tensor is None:
            return None
        if id(tensor) not in self._memo:
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            parameter = isinstance(tensor, nn.Parameter)
            self._memo[id(tensor)] = nn.Parameter(whole, requires_grad=tensor.requires_grad) if parameter else whole
        return self._memo[id(tensor)]

    def _rebound(self, value: Any) -> Any:
        """The value with modules of the source replaced by those of the twin, in plain containers too."""
        if isinstance(value, nn.Module):
            return self._memo.get(id(value), value)
        if isinstance(value, types.MethodType) and id(value.__self__) in self._memo:
            return types.MethodType(value.__func__, self._memo[id(value.__self__)])
        if type(value) in (list, tuple, set):
            return type(value)(self._rebound(item) for item in value)
        if type(value) is dict:
            return {key: self._rebound(item) for key, item in value.items()}
        return value


def _is_split(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_wrapped(kind: type) -> bool:
    return any(base.__name__ == _MIXIN for base in kind.__bases__)


def _original(kind: type) -> Any:
    """The class that `fully_shard` has replaced."""
    return next(base for base in kind.__bases__ if base.__name__ != _MIXIN) if _is_wrapped(kind) else kind


def _hooks(module: nn.Module) -> list[Any]:
    return [hook for name in _HOOKS for hook in vars(module).get(name, {}).values()]


def _origin(hook: Any) -> str:
    """The module in which a hook is defined."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(getattr(hook, "__func__", hook), "__module__", None) or type(hook).__module__)
