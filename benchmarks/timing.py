"""Wall-clock seconds of calls."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def synchronise(device: str) -> None:
    """Wait for the device."""
    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats` in a row."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronise(device)
    return (time.perf_counter() - start) / repeats


def clocks(function: Callable[[], object], device: str, repeats: int = 1) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one call, the mean of `repeats` in a row."""
    start = time.process_time()
    wall = seconds(function, device, repeats)
    return wall, (time.process_time() - start) / repeats


def repeats_for(one: float, least: float = 0.05, most: int = 20) -> int:
    """How many calls of `one` seconds fill `least` seconds, at most `most`."""
    return max(1, min(most, round(least / max(one, 1e-9))))
