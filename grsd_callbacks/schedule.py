"""When to measure: fixed, or log-spaced and thinned so that measuring stays inside its share of the run.

Times are wall-clock seconds handed in by the caller; nothing here looks at a clock.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import asdict, dataclass, field
from statistics import median, median_low
from typing import Any

#: the default schedule times training steps at these step counts before it decides
TIMED_FROM, DECIDE_AT = 2, 6
#: later measurements cost more than the first two: they also fit exponents
MARGIN = 1.2
#: latest measurements whose median cost the next one is expected to have
RECENT = 3


class FixedSchedule:
    """Measure at step 0 and at every crossing of a multiple of n (steps may advance by more than one).

    Raises:
        ValueError: n is not a positive integer.
    """

    def __init__(self, every_n_steps: int) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ValueError(f"every_n_steps must be a positive integer (or None), got {every_n_steps!r}")
        self.every_n_steps = every_n_steps
        self._last = -1

    def due(self, step: int) -> bool:
        """Whether step is the first one at or after a multiple of n not yet measured."""
        if self._last >= 0 and step // self.every_n_steps <= self._last // self.every_n_steps:
            return False
        self._last = step
        return True

    def observe(self, step: int, measuring_seconds: float, elapsed_seconds: float) -> None:
        """Nothing to decide."""

    def affords(self) -> bool:
        """What was asked for is always afforded."""
        return True

    def begins(self) -> None:
        """Nothing to keep account of."""

    @property
    def decided(self) -> bool:
        """Whether what is due no longer depends on measured times."""
        return True

    def reserved(self, step: int) -> float:
        """Nothing is kept back: measurements are made whatever they cost."""
        return 0.0

    def describe(self) -> str:
        """One line for the report."""
        return f"every {self.every_n_steps} steps"

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"kind": "fixed", "every_n_steps": self.every_n_steps, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; the state of another kind of schedule is left aside."""
        if state.get("kind") == "fixed":
            self._last = int(state["last"])


@dataclass
class Ledger:
    """What a run has taken so far, as its schedule hears of it at the start of each step.

    Attributes:
        first, step: first and latest step heard of; first is -1 before.
        elapsed, spent: seconds since the run began, and how many of them went into measuring.
        paid: seconds of set-up and measurements; hooks: of steps without a measurement.
        costs: seconds of the `RECENT` latest measurements.
        measures: whether a measurement is made at the latest step.

    Example:
        >>> ledger = Ledger()
        >>> ledger.hear(0, 0.0, 0.0)
        >>> ledger.measures = True
        >>> ledger.hear(1, 0.5, 2.5)
        >>> ledger.paid, ledger.training
        (0.5, 2.0)
    """

    first: int = -1
    step: int = -1
    elapsed: float = 0.0
    spent: float = 0.0
    paid: float = 0.0
    hooks: float = 0.0
    costs: list[float] = field(default_factory=list)
    measures: bool = False

    @property
    def training(self) -> float:
        """Seconds that were not spent on measuring."""
        return self.elapsed - self.spent

    def hear(self, step: int, spent: float, elapsed: float) -> None:
        """Times at the start of a step; what has been spent since the last call was spent at the last one's step."""
        more = spent - self.spent
        if self.first < 0:
            self.first, self.paid = step, spent
        elif self.measures:
            self.paid += more
            self.costs = [*self.costs, more][-RECENT:]
        else:
            self.hooks += more
        self.step, self.spent, self.elapsed, self.measures = step, spent, elapsed, False


class LogSchedule:
    """Measure at step 0, 1 and then log-spaced, thinned once to a share of the training time.

    Steps 0 (cold) and 1 (warm) are measured; steps 2 to 5 are only timed; at step 6 the number of further
    measurements is fixed to `(max_overhead * seconds_per_step - hooks) * total_steps - spent` over the cost of one,
    spread evenly in log step; `hooks` is what a step costs without a measurement. Without a known end, the density is
    `per_decade` from the first step that can afford it. What was fixed is never added to, but a measurement is left out
    (`affords`) where by then it would break the allowance: costs were higher, or training is faster, than timed.

    Args:
        per_decade: measurements a decade of steps before thinning.
        max_overhead: largest share of training time (without measuring) spent on measuring; None never thins.
        total_steps: length of the run in steps; None if it is not known.
        pair: every point is measured twice (before and after a step), and costs twice as much.
        sparse: measurements are dear and few: step 1 is only timed, and the cost of one, not two, is kept for the end.

    Raises:
        ValueError: per_decade < 1, or max_overhead not positive.
    """

    def __init__(
        self,
        per_decade: int = 10,
        max_overhead: float | None = 0.02,
        total_steps: int | None = None,
        pair: bool = False,
        sparse: bool = False,
    ) -> None:
        if isinstance(per_decade, bool) or not isinstance(per_decade, int) or per_decade < 1:
            raise ValueError(f"per_decade must be a positive integer, got {per_decade!r}")
        if max_overhead is not None and not (isinstance(max_overhead, (int, float)) and 0 < max_overhead < math.inf):
            raise ValueError(f"max_overhead must be a positive number (or None), got {max_overhead!r}")
        self.per_decade = per_decade
        self.max_overhead = max_overhead
        self.total_steps = total_steps
        self.pair, self.sparse = pair, sparse
        self.points: list[int] | None = None
        self.first = 1
        self.decision = "every log-spaced step"
        self.left_out = 0
        self._last = -1
        self._times: list[tuple[int, float, float]] = []
        self._spent_before: dict[int, float] = {}
        self._rates: tuple[float, float, float] | None = None  # seconds: a training step, its hooks, a measurement
        self._ledger = Ledger()
        self._latest = (-1, 0.0, 0.0)
        self._per_step = 0.0  # seconds, as timed before the decision
        self._credit = 0.0  # share of a measurement that points left out have saved
        self._marks: list[tuple[int, float]] = []  # step and training seconds of the decision and of the last point
        if max_overhead is None:
            self.points = log_points(1, total_steps, per_decade) if total_steps else None
            self._decided = True
        else:
            self._decided = False

    @property
    def _kept(self) -> int:
        """Measurements kept for the end: its own, and for the summary."""
        return 1 if self.sparse else 2

    def due(self, step: int) -> bool:
        """Whether a scheduled point lies in (last measured-or-passed step, step]."""
        last, self._last = self._last, max(step, self._last)
        if step <= last:
            return False
        if last < 0:
            return True
        if last < 1 <= step and (self._decided or not self.sparse):
            return True
        if not self._decided:
            return False
        if self.points is not None:
            coming = bisect_right(self.points, last)
            return coming < len(self.points) and self.points[coming] <= step
        return self._crossed(last, step)

    def affords(self) -> bool:
        """Whether what is due is measured, or left out: the points to come share evenly what is left to them."""
        if self.max_overhead is None or not self._decided or not self._ledger.costs:
            return True
        self._ledger.hear(*self._latest)
        room, step = self._room(), self._ledger.step
        waiting = 1 + sum(step < point < (self.total_steps or 0) for point in self.points or ())
        self._credit += min(1.0, max(0.0, room / waiting))
        fits = room >= 1 and self._credit > 1 - 1e-9
        self._credit -= fits
        self.left_out += not fits
        return fits

    def _room(self) -> float:
        """Further measurements that fit the allowance, beside what is kept for the end.

        Cost of one: the lower median of the latest. Training time still to come: the steps left, at the faster of the
        paces since the decision and since the last scheduled point.
        """
        book = self._ledger
        assert self.max_overhead is not None
        paces = [(book.training - then) / (book.step - at) for at, then in self._marks if book.step > at]
        pace = min(paces, default=self._per_step)
        self._marks = [*self._marks[:1], (book.step, book.training)]
        left = max(self.total_steps - book.step, 0) if self.total_steps is not None else 0
        allowed = self.max_overhead * (book.training + left * pace)
        hooks = book.hooks * (1 + left / max(book.step - book.first, 1))
        cost = max(median_low(book.costs), 1e-9) * (2 if self.pair else 1)
        return (allowed - self._for_hooks(hooks, allowed) - book.paid) / cost - self._kept

    def _for_hooks(self, hooks: float, allowed: float) -> float:
        """Hooks, but where measurements are cheap they keep half of what is allowed on nets however small."""
        return hooks if self.sparse else min(hooks, allowed / 2)

    def begins(self) -> None:
        """Tell that a measurement is made at the latest step."""
        self._ledger.measures = True

    def _crossed(self, last: int, step: int) -> bool:
        rank = [math.floor(self.per_decade * math.log10(s) + 1e-9) for s in (max(last, 1), step)]
        return step >= self.first and rank[1] > rank[0]

    def observe(self, step: int, measuring_seconds: float, elapsed_seconds: float) -> None:
        """Tell the time at the start of a step: seconds spent measuring so far, and seconds since the run began."""
        self._latest = step, measuring_seconds, elapsed_seconds
        if self._decided and not self._ledger.measures:  # else heard when a measurement is due
            return
        self._ledger.hear(*self._latest)
        if self._decided:
            return
        if step < TIMED_FROM:
            self._spent_before[step] = measuring_seconds
            return
        self._times.append((step, measuring_seconds, elapsed_seconds))
        if step >= DECIDE_AT and len(self._times) >= 2:
            self._decide(step)

    def _decide(self, step: int) -> None:
        spent = self._times[-1][1]
        laps = [
            (b[2] - a[2] - (b[1] - a[1])) / max(b[0] - a[0], 1)
            for a, b in zip(self._times[:-1], self._times[1:], strict=True)
        ]
        per_step = max(median(laps), 1e-9)
        assert self.max_overhead is not None
        allowed = self.max_overhead * per_step
        hooks = self._for_hooks(self._hooks(), allowed)
        once = self._cost(spent)
        cost = MARGIN * once * (2 if self.pair else 1)
        self._decided, self._rates = True, (per_step, hooks, cost)
        self._per_step, self._marks = per_step, [(step, self._ledger.training)]
        if self.total_steps is None:
            left = max(allowed - hooks, 1e-3 * allowed)
            self.first = max(step, math.ceil(self.per_decade * cost / (left * math.log(10))))
            self.decision = f"{self.per_decade} a decade from step {self.first}"
        else:
            budget = (allowed - hooks) * self.total_steps - spent
            room = max(0, math.floor(budget / cost) - self._kept)
            candidates = log_points(step, self.total_steps, self.per_decade)
            self.points = thinned(candidates, room)
            self.decision = f"{len(self.points)} of {len(candidates)} log-spaced steps"
        self.decision += (
            f" (one measurement {once * 1e3:.3g} ms, one training step {per_step * 1e3:.3g} ms, "
            f"at most {100 * self.max_overhead:g} %)"
        )

    def reserved(self, step: int) -> float:
        """Seconds of what `step` steps allow that the points still to come need, beyond what later steps allow.

        All (inf) before the decision; nothing without a limit, or without a known end, where no point is planned.
        """
        if self.max_overhead is None:
            return 0.0
        if self._rates is None:
            return math.inf
        if self.total_steps is None:
            return 0.0
        per_step, hooks, cost = self._rates
        num_steps = max(0, self.total_steps - step)
        num_points = sum(point > step for point in self.points or ()) + self._kept
        return max(0.0, num_points * cost + (hooks - self.max_overhead * per_step) * num_steps)

    def _hooks(self) -> float:
        """Seconds that a step costs without a measurement."""
        pairs = zip(self._times[:-1], self._times[1:], strict=True)
        return max(0.0, median((b[1] - a[1]) / max(b[0] - a[0], 1) for a, b in pairs))

    def _cost(self, spent: float) -> float:
        """Seconds of one measurement: the cheaper of the first two, since a busy machine only ever adds time."""
        before = [self._spent_before.get(step, 0.0) for step in (0, 1)]
        first, second = before[1] - before[0], spent - before[1]
        return max(first if self.sparse else min(first, second), 1e-9) if first > 0 else max(spent, 1e-9)

    @property
    def decided(self) -> bool:
        """Whether what is due no longer depends on measured times."""
        return self._decided

    def describe(self) -> str:
        """One line for the report."""
        if not self._decided:
            return "log-spaced, thinned once training steps are timed"
        left_out = f"; {self.left_out} of them left out to stay within it" if self.left_out else ""
        return f"log-spaced: {self.decision}{left_out}"

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "kind": "log",
            "last": self._last,
            "decided": self._decided,
            "points": self.points,
            "first": self.first,
            "decision": self.decision,
            "rates": None if self._rates is None else list(self._rates),
            "times": [list(time) for time in self._times],
            "spent_before": [list(pair) for pair in self._spent_before.items()],
            "ledger": asdict(self._ledger),
            "per_step": self._per_step,
            "credit": self._credit,
            "marks": [list(mark) for mark in self._marks],
            "left_out": self.left_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; the state of another kind of schedule is left aside, and one without accounts begins them here.

        Without a limit now, what was planned to keep one is left aside too.
        """
        if state.get("kind") != "log":
            return
        if self.max_overhead is None:
            self._last = int(state["last"])
            return
        self._last, self._decided = int(state["last"]), bool(state["decided"])
        self.points = None if state["points"] is None else [int(p) for p in state["points"]]
        self.first, self.decision = int(state["first"]), str(state["decision"])
        rates = state.get("rates")
        self._rates = None if rates is None else (float(rates[0]), float(rates[1]), float(rates[2]))
        self._times = [(int(step), float(spent), float(elapsed)) for step, spent, elapsed in state["times"]]
        self._spent_before = {int(step): float(spent) for step, spent in state["spent_before"]}
        self._ledger, self.left_out = Ledger(**state.get("ledger", {})), int(state.get("left_out", 0))
        self._per_step, self._credit = float(state.get("per_step", 0.0)), float(state.get("credit", 0.0))
        timed = [(step, elapsed - spent) for step, spent, elapsed in self._times[-1:]]
        self._marks = [(int(step), float(training)) for step, training in state.get("marks", timed)]


def log_points(first: int, last: int, per_decade: int) -> list[int]:
    """Integers round(10^(k / per_decade)) in [first, last], ascending and distinct."""
    if last < first:
        return []
    top = math.ceil(per_decade * math.log10(max(last, 1)))
    return sorted({p for k in range(top + 1) if first <= (p := round(10 ** (k / per_decade))) <= last})


def thinned(points: list[int], room: int) -> list[int]:
    """At most `room` of the points, evenly spaced in their order (so evenly in log step), the last one kept."""
    if room >= len(points):
        return points
    if room <= 0:
        return []
    stride = len(points) / room
    return [points[min(len(points) - 1, math.ceil((i + 1) * stride) - 1)] for i in range(room)]
