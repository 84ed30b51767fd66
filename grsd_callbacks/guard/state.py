"""What a module itself keeps: training flags, registered names and hooks, `log`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

MODES = ("eval", "train", "keep")
_REGISTRIES = [name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))]


@contextmanager
def preserve_modes(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Set `.training` of every submodule, and put each back as it was.

    By attribute: `.train()` and `.eval()` may be overridden, and would wake up layers that the user froze.

    Args:
        model: the module.
        mode: "eval" (all False), "train" (all True, also what the user keeps in eval mode) or "keep".

    Raises:
        ValueError: unknown mode.
    """
    if not (isinstance(mode, str) and mode in MODES):
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    flags = [(module, module.training) for module in model.modules()]
    try:
        if mode != "keep":
            for module, _ in flags:
                module.training = mode == "train"
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def preserve_registrations(model: nn.Module) -> Iterator[None]:
    """Put back which parameters, buffers, submodules and hooks every submodule has, in place.

    The dictionaries keep their identity (hook handles refer to them); the tensors' *values* are not copied.
    """
    states = [vars(module) for module in model.modules()]
    registries = [state[name] for state in states for name in _REGISTRIES if name in state]
    saved = [(r, r.copy() if r else ()) for r in registries if isinstance(r, (dict, set))]
    try:
        yield
    finally:
        for registry, entries in saved:
            if (registry or entries) and not _same_entries(registry, entries):
                registry.clear()
                registry.update(entries)


def _same_entries(a: Any, b: Any) -> bool:
    """Whether both hold the same objects in the same order: tensors must not be compared by `==`."""
    return list(a) == list(b) and (isinstance(a, set) or all(a[key] is b[key] for key in a))


@contextmanager
def silence_logging(model: nn.Module) -> Iterator[None]:
    """Make `log` and `log_dict` of every submodule that has both (a LightningModule) do nothing.

    Only these: `self.logger.experiment` or `print` in a forward still write.
    """
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in model.modules():
            if _is_logger(module, "log") and _is_logger(module, "log_dict"):
                state = vars(module)
                saved.append((state, {name: state[name] for name in ("log", "log_dict") if name in state}))
                state.update(log=_do_nothing, log_dict=_do_nothing)
        yield
    finally:
        for state, original in saved:
            state.pop("log", None)
            state.pop("log_dict", None)
            state.update(original)


def _is_logger(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, None)
    return callable(value) and not isinstance(value, nn.Module)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `log` and `log_dict`."""
