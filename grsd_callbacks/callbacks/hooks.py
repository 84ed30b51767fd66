"""What surrounds every hook of the callback: nothing but wrong use ends the training, and all time counts."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grsd_callbacks.outlet import first_line, warn

if TYPE_CHECKING:
    from grsd_callbacks.callbacks.dynamics import ShellDynamicsCallback


def harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook in which nothing but wrong use, found before the first step, ends the training.

    Measurements catch what goes wrong in them; this is for all that lies around them. Not in distributed runs, where
    a rank that went on alone would leave the others waiting.
    """

    @functools.wraps(hook)
    def guarded(self: ShellDynamicsCallback, trainer: Any, *args: Any) -> None:
        if self._off:
            return
        try:
            hook(self, trainer, *args)
        except Exception as error:
            _end(self, trainer, error)

    return guarded


def _end(callback: ShellDynamicsCallback, trainer: Any, error: Exception) -> None:
    """Measure no more, with one warning; or raise what has been caught."""
    if callback._refused or callback._on_error == "raise" or trainer.world_size > 1:
        raise error
    callback._off = True
    warn(
        f"grsd: measuring is off for the rest of this run ({first_line(error)}). Training goes on unchanged. "
        "Use on_error='raise' to see the traceback."
    )


def charged(hook: Callable[..., None]) -> Callable[..., None]:
    """A `harmless` hook of every step: all of its time counts as measuring, not only that of measurements.

    One call around the hook, and no properties: at every step of a small net these are what the callback costs.
    """

    @functools.wraps(hook)
    def counted(self: ShellDynamicsCallback, trainer: Any, *args: Any) -> None:
        if self._off:
            return
        monitor, start = self.monitor, time.perf_counter()
        if monitor is None:
            safely(self, trainer, *args)
            return
        watch = monitor.watch
        before = watch.measuring_seconds
        try:
            hook(self, trainer, *args)
        except Exception as error:
            _end(self, trainer, error)
        watch.measuring_seconds = max(watch.measuring_seconds, before + time.perf_counter() - start)

    safely = harmless(hook)
    return counted
