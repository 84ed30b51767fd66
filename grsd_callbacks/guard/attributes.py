"""Let a forward work on copies of what the submodules keep as plain attributes."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MemberDescriptorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grsd_callbacks.guard.check import Mark, change_between, checked, describe, mark_of
from grsd_callbacks.guard.generators import RNG_TYPES

MAX_COPIED_BYTES = 1 << 30  # of attribute tensors, a measurement; beyond it they are watched instead of copied
_MANAGED = frozenset(vars(nn.Module()))  # what nn.Module itself keeps: registries, hooks, `training`
_CONTAINERS = (list, dict, set, deque)
_LEAVES = frozenset({int, float, bool, str, bytes, complex, type(None), FunctionType, torch.dtype, torch.device})
_MISSING = object()


@contextmanager
def preserve_attributes(model: nn.Module, *, max_bytes: int = MAX_COPIED_BYTES) -> Iterator[None]:
    """Let the forward work on copies of the submodules' attributes; put the originals back, remove what was added.

    Copied, through nested containers and with one memo, so that what two submodules share stays shared: tensors
    (detached clones), lists, dicts, sets, deques, tuples that hold such, numpy arrays, random generators. All else is
    shared with the run: parameters (also those in an RNN's `_flat_weights`), the trainer, plain Python objects.
    What nn.Module manages itself is left to `preserve_registrations` and `preserve_modes`.

    A tensor that no longer fits into `max_bytes` (a replay memory, a long key-value cache) is not copied but watched:
    an in-place write to it raises. An array that does not fit is shared. Views of one another become separate copies.

    Args:
        model: the module.
        max_bytes: bytes of tensors and arrays to copy at most.

    Raises:
        DisturbedTraining: the forward wrote to a tensor too large to copy.

    Cost: one clone of each attribute tensor, about 3 microseconds apiece and its bytes; one visit of each list element.
    """
    slots_of = {kind: _slot_names(kind) for kind in {type(module) for module in model.modules()}}
    modules = [
        (path, module, dict(vars(module)), {name: _slot(module, name) for name in slots_of[type(module)]})
        for path, module in model.named_modules()
    ]
    copies = _Copies({id(t) for _, module, *_ in modules for t in module._parameters.values()}, max_bytes)
    with checked(copies.report):
        try:
            with torch.inference_mode(False), torch.no_grad():
                for path, module, state, slots in modules:
                    _install_copies(copies, path, module, state, slots)
            yield
        finally:
            for _, module, state, slots in modules:
                _put_back(module, state, slots)


def _install_copies(
    copies: _Copies, path: str, module: nn.Module, state: dict[str, Any], slots: dict[str, Any]
) -> None:
    for name, value in state.items():
        if name not in _MANAGED and type(value) not in _LEAVES:
            vars(module)[name] = copies.of(value, f"{path}.{name}")
    for name, value in slots.items():
        if value is not _MISSING:
            object.__setattr__(module, name, copies.of(value, f"{path}.{name}"))


def _put_back(module: nn.Module, state: dict[str, Any], slots: dict[str, Any]) -> None:
    current = vars(module)  # written directly: a module's own __setattr__ may refuse or do more
    for added in current.keys() - state.keys():
        del current[added]
    flag = {"training": current["training"]} if "training" in current else {}  # is for preserve_modes
    current.update(state | flag)
    for name, value in slots.items():
        if value is not _MISSING:
            object.__setattr__(module, name, value)
        elif _slot(module, name) is not _MISSING:
            object.__delattr__(module, name)


def _slot_names(kind: type) -> tuple[str, ...]:
    with_slots = [vars(cls) for cls in kind.__mro__ if "__slots__" in vars(cls)]
    return tuple(name for cls in with_slots for name, v in cls.items() if isinstance(v, MemberDescriptorType))


def _slot(module: nn.Module, name: str) -> Any:
    try:
        return object.__getattribute__(module, name)
    except AttributeError:
        return _MISSING


class _Copies:
    """Working copies of attribute values: one memo for the whole model, one budget of bytes."""

    def __init__(self, kept: set[int], max_bytes: int) -> None:
        self._kept = kept  # ids of the registered parameters: clones of the caller's, under functional_call
        self._memo: dict[int, Any] = {}
        self._max_bytes = self._bytes_left = max_bytes
        self._watched: list[tuple[str, Tensor, Mark]] = []
        self._name = ""

    def of(self, value: Any, name: str) -> Any:
        self._name = name
        return self._copy(value)

    def report(self) -> str:
        changes = [(name, change) for name, t, mark in self._watched if (change := change_between(mark, mark_of(t)))]
        return describe(changes, f"the forward writes to what is too large to be copied (max_bytes={self._max_bytes})")

    def _copy(self, value: Any) -> Any:
        if type(value) in _LEAVES or isinstance(value, nn.Parameter) or id(value) in self._kept:
            return value
        if id(value) not in self._memo:
            self._memo[id(value)] = value
            self._memo[id(value)] = self._copy_new(value)
        return self._memo[id(value)]

    def _copy_new(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone() if self._fits(value, value.numel() * value.element_size()) else value
        if type(value) is np.ndarray:
            return value.copy() if self._fits(value, value.nbytes) else value
        if isinstance(value, _CONTAINERS):
            return self._copy_container(value)
        if isinstance(value, tuple):
            return self._copy_tuple(value)
        if type(value) is torch.Generator:
            clone = torch.Generator(value.device)
            return clone.set_state(value.get_state())
        return copy.deepcopy(value) if type(value) in RNG_TYPES else value

    def _fits(self, value: Tensor | np.ndarray, num_bytes: int) -> bool:
        if num_bytes <= self._bytes_left:
            self._bytes_left -= num_bytes
            return True
        if isinstance(value, Tensor):
            self._watched.append((self._name, value, mark_of(value)))
        return False

    def _copy_container(self, value: Any) -> Any:
        try:
            twin = copy.copy(value)
        except Exception:  # a subclass that cannot be copied is shared, like any other object
            return value
        self._memo[id(value)] = twin  # before the elements: it may contain itself
        if not isinstance(value, set):
            for key, element in value.items() if isinstance(value, dict) else enumerate(value):
                if (element_twin := self._copy(element)) is not element:
                    twin[key] = element_twin
        return twin

    def _copy_tuple(self, value: Any) -> Any:
        twins = [self._copy(element) for element in value]
        if all(twin is element for twin, element in zip(twins, value)):
            return value
        if type(value) is tuple:
            return tuple(twins)
        return value._make(twins) if hasattr(value, "_make") else value
