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
            if self._refused or self._on_error == "raise" or trainer.world_size > 1:
                raise
            self._off = True
            warn(
                f"grsd: measuring is off for the rest of this run ({first_line(error)}). Training goes on unchanged. "
                "Use on_error='raise' to see the traceback."
            )

    return guarded


def charged(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook of every step: all of its time counts as measuring, not only that of measurements."""

    @functools.wraps(hook)
    def counted(self: ShellDynamicsCallback, *args: Any) -> None:
        monitor, start = self.monitor, time.perf_counter()
        before = 0.0 if monitor is None else monitor.measuring_seconds
        hook(self, *args)
        if monitor is not None:
            monitor.measuring_seconds = max(monitor.measuring_seconds, before + time.perf_counter() - start)

    return counted
