"""Time spent on measuring, against the time that training takes without it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any


class Stopwatch:
    """Wall-clock time of a run, and how much of it is measuring.

    Attributes:
        measuring_seconds: time spent on measuring, drawing included, in all runs so far.
        drawing_seconds: time spent on figures drawn during the run.

    Example:
        >>> watch = Stopwatch()
        >>> watch.charged(lambda: 7), watch.measuring_seconds > 0
        (7, True)
        >>> watch.overhead(last_step=None)
        nan
    """

    def __init__(self) -> None:
        self.measuring_seconds = self.drawing_seconds = 0.0
        self._started: float | None = None
        self._measuring_since: float | None = None
        self._first_step = 0
        self._elapsed_before = 0.0

    def charged(self, function: Callable[[], Any]) -> Any:
        """Call a function; its time counts as measuring."""
        self._measuring_since = start = time.perf_counter()
        try:
            return function()
        finally:
            self.measuring_seconds += time.perf_counter() - start
            self._measuring_since = None

    def drawing(self, function: Callable[[], Any]) -> Any:
        """Call a function that draws figures; its time counts as measuring, and apart."""
        before = self.measuring_seconds
        try:
            return self.charged(function)
        finally:
            self.drawing_seconds += self.measuring_seconds - before

    def set_up(self) -> None:
        """Count what has been measured so far, before the first step, as part of the run."""
        self._elapsed_before = self.measuring_seconds

    def started(self, step: int) -> float:
        """Seconds of the run so far; the clock starts at the first call, with that step."""
        now = time.perf_counter()
        if self._started is None:
            self._started, self._first_step = now, step
        return self._elapsed_before + now - self._started

    def restore(self, measuring_seconds: float, elapsed_seconds: float, drawing_seconds: float = 0.0) -> None:
        """Continue a run that has taken so long."""
        self.measuring_seconds, self._elapsed_before = measuring_seconds, elapsed_seconds
        self.drawing_seconds = drawing_seconds
        self._started = None

    @property
    def elapsed_seconds(self) -> float:
        """Seconds of the run so far, measuring included."""
        return self._elapsed_before + (time.perf_counter() - self._started if self._started is not None else 0.0)

    @property
    def training_seconds(self) -> float:
        """Seconds of the run so far, measuring left out."""
        return self.elapsed_seconds - self._spent()

    def overhead(self, last_step: int | None, drawing: bool = True) -> float:
        """Measuring time over training time without it, so far (a fraction); NaN before the first step.

        Args:
            last_step: number of optimizer steps so far; None if not known.
            drawing: whether figures count too.
        """
        if self._started is None or last_step == self._first_step:
            return math.nan
        training, measuring = self.training_seconds, self._spent() - (0.0 if drawing else self.drawing_seconds)
        return measuring / training if training > 0 else math.nan

    def _spent(self) -> float:
        """Seconds of measuring, that which is under way included."""
        since = self._measuring_since
        return self.measuring_seconds + (0.0 if since is None else time.perf_counter() - since)
