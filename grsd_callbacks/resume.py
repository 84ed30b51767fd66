"""Whether a resumed run measures what the saved run measured: which arguments differ, and whether the probe does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.losses import Loss
from grsd_callbacks.probe import Probe, plain_leaves
from grsd_callbacks.settings import Settings

#: settings that the meaning of the numbers depends on
SETTINGS = ("method", "shells_per_decade", "params", "outputs", "dtype", "gram_dtype", "seed")
LOSS_OPTIONS = ("reduction", "label_smoothing", "ignore_index")


def plain_arguments(settings: Settings, loss: Loss, num_probe: int | None, nu: float | None) -> dict[str, Any]:
    """What a resumed run must share with the saved one for its numbers to continue the series, as plain data."""
    found = {name: _described(getattr(settings, name)) for name in SETTINGS}
    options = {name: _described(getattr(loss.function, name, None)) for name in LOSS_OPTIONS}
    return {**found, "loss": [_described(loss.function), options], "num_probe": num_probe, "nu": nu}


def changed_arguments(mine: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    """Names of the arguments whose values are not the saved ones."""
    return [name for name, value in mine.items() if name in saved and saved[name] != value]


def same_probe(probe: Probe, saved: dict[str, list[Any]]) -> bool:
    """Whether a probe holds the saved samples (what a checkpoint cannot hold is not compared)."""
    for name in ("inputs", "targets"):
        mine = plain_leaves(getattr(probe, name))
        if len(mine) != len(saved[name]) or not all(map(_same, mine, saved[name])):
            return False
    return True


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a.cpu().nan_to_num(), b.cpu().nan_to_num())
    return bool(type(a) is type(b) and a == b)


def _described(value: Any) -> Any:
    """A plain image of an argument: itself, or what kind of thing it is."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_described(part) for part in value]
    if isinstance(value, torch.dtype):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)
