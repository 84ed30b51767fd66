"""Checks of the arguments that only the Lightning callback has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch


def check_words(probe: Any, name: Any, json_lines: Any) -> None:
    """Raise unless the words among the arguments are known ones, and the name fits into a tag."""
    if isinstance(probe, str) and probe != "auto":
        raise ValueError(f"probe must be 'auto', (inputs, targets) or a DataLoader, got {probe!r}")
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if not isinstance(json_lines, (str, os.PathLike, type(None))):
        raise TypeError(f"json_lines must be 'auto', a path or None, got {type(json_lines).__name__}")
    if name and not name.replace("_", "").isalnum():
        raise ValueError(f"name must consist of letters, digits and underscores, got {name!r}")


def as_dtype(dtype: str | torch.dtype | None, name: str = "dtype") -> torch.dtype | None:
    """The data type that was meant; raise for an unknown word."""
    names: Mapping[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
    if isinstance(dtype, str):
        if dtype not in names:
            raise ValueError(f"{name} must be 'float32', 'float64' or None, got {dtype!r}")
        return names[dtype]
    return dtype
