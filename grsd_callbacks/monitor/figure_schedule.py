"""When to draw figures during a run: at a cadence of their own, with the time that measuring leaves over.

Times are wall-clock seconds handed in by the caller; nothing here looks at a clock.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from grsd_callbacks.monitor.stopwatch import Stopwatch
from grsd_callbacks.schedule import FixedSchedule, LogSchedule

#: what `figures_every_n_steps` may be
Cadence = int | Literal["auto"] | None
#: fewest measurements that "auto" draws, and that are drawn at all: one has neither a flux nor a course
FIRST_AUTO, FIRST = 4, 2
#: "auto" draws when the steps have grown by this: ten measurements a decade are 1.995 times apart, every third
GROWTH = 1.9
#: and not in the last part of a run of known length, whose end draws anyway
LATEST = 0.8
#: seconds that the first drawing is expected to take: seven figures into an event file (1.8 s of one core, as
#: `benchmarks/bench_overhead.py` measures them), and the import of matplotlib
FIRST_ESTIMATE = 3.0


class FigureSchedule:
    """Decides after each measurement whether the figures of the run so far are drawn.

    * "auto": when the run has about twice the steps of the last drawing (measurements are log-spaced, and so are the
      axes of the maps), four measurements at the least, and a drawing fits into the spare time: some ten in a long run,
      which is what TensorBoard shows of a tag. Not in the last fifth of a run of known length.
    * a number: at the first measurement at or after each multiple of so many optimizer steps, whatever it costs.
    * None: never; the end of the run is not this class's.

    Args:
        every_n_steps: one of these.
        total_steps: length of the run, where the figures of the end are drawn; None if it is not known.

    Attributes:
        num_drawings: drawings so far.

    Raises:
        ValueError: every_n_steps is none of these.

    Example:
        >>> schedule = FigureSchedule(100)
        >>> found = []
        >>> for count, step in enumerate([0, 60, 130, 160, 190, 210], 1):
        ...     if schedule.due(step, count, spare=0.0):
        ...         schedule.drawn(step, seconds=2.0)
        ...         found.append(step)
        >>> found
        [130, 210]
    """

    def __init__(self, every_n_steps: Cadence = "auto", total_steps: int | None = None) -> None:
        is_number = isinstance(every_n_steps, int) and not isinstance(every_n_steps, bool) and every_n_steps >= 1
        is_auto = isinstance(every_n_steps, str) and every_n_steps == "auto"
        if not (every_n_steps is None or is_auto or is_number):
            raise ValueError(f"figures_every_n_steps must be a positive integer, 'auto' or None, got {every_n_steps!r}")
        self.every_n_steps, self.total_steps = every_n_steps, total_steps
        self.num_drawings = 0
        self._step = 0  # of the last drawing
        self._seconds = FIRST_ESTIMATE

    def due(self, step: int, num_measurements: int, spare: float) -> bool:
        """Whether to draw now.

        Args:
            step: that of the measurement just made.
            num_measurements: of the run so far, this one included.
            spare: seconds that drawing may take.
        """
        if num_measurements < FIRST or (self.total_steps is not None and step >= self.total_steps):
            return False
        if isinstance(self.every_n_steps, int):
            return step // self.every_n_steps > self._step // self.every_n_steps
        if self.every_n_steps is None:
            return False
        if self.total_steps is not None and step > LATEST * self.total_steps:
            return False
        return num_measurements >= FIRST_AUTO and step >= GROWTH * self._step and self._seconds <= spare

    def drawn(self, step: int, seconds: float) -> None:
        """Tell of a drawing, or of one that has failed, and how long it took: what the next one is expected to take."""
        self.num_drawings += 1
        self._step, self._seconds = step, seconds

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"num_drawings": self.num_drawings, "step": self._step, "seconds": self._seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; an empty state (of a run without figures) changes nothing."""
        if state:
            self.num_drawings = int(state["num_drawings"])
            self._step, self._seconds = int(state["step"]), float(state["seconds"])


def spare_seconds(
    step: int, schedule: FixedSchedule | LogSchedule, watch: Stopwatch, max_overhead: float | None
) -> float:
    """Seconds that drawing may take at `step` without costing the run a measurement, or more than its share.

    The default schedule shares `max_overhead` of the training time so far with the figures: they get what has been
    neither spent nor is `reserved` for measurements to come. A fixed cadence of measurements is the user's own and
    outside that share; the figures have it to themselves. Without a share, all drawing may take as long as measuring.
    """
    measuring = watch.measuring_seconds - watch.drawing_seconds
    if max_overhead is None:
        return measuring - watch.drawing_seconds
    spent = watch.drawing_seconds + (0.0 if isinstance(schedule, FixedSchedule) else measuring)
    reserved = schedule.reserved(step)
    return max_overhead * watch.training_seconds - spent - reserved if math.isfinite(reserved) else 0.0
