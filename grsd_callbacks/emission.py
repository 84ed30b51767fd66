"""What one measurement hands to the sinks: plain numbers, texts and figures under their final tags.

`tags` builds an `Emission` from a `Snapshot`; `sinks` writes it. Nothing here knows TensorBoard or Lightning.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Histogram:
    """Weights in buckets with our own limits (shell edges), in TensorBoard's raw form.

    Bucket `i` is the interval `[edges[i], edges[i + 1])`, so `len(edges) == len(counts) + 1`, as in `numpy.histogram`.
    The counts need not be integers: shell energies are fine, negative weights are not (TensorBoard cannot draw them).
    An unbounded shell needs a finite stand-in for its outer limit. TensorBoard's dashboard works in float32 and draws
    from `minimum` to `maximum`, with `minimum` the left end of the first non-empty bucket and `maximum` the right end
    of the last one.

    Args:
        edges: Finite, increasing bucket limits, in the unit of the axis (for example log10 of the eigenvalue).
        counts: Weight of each bucket, at least zero; NaN or infinite counts are allowed and make sinks skip it.
        minimum: Smallest value that was counted.
        maximum: Largest value that was counted.
        total: Sum of all counted values, each times its weight.
        sum_of_squares: Sum of the squares of all counted values, each times its weight.

    Raises:
        ValueError: Edges not finite or not increasing, numbers of edges and counts that do not fit, a negative count.

    Example:
        >>> histogram = Histogram.from_buckets([0.0, 1.0, 2.0, 3.0], [0, 2, 0])  # weight 2 at the centre 1.5
        >>> histogram.minimum, histogram.maximum, histogram.total, histogram.sum_of_squares
        (1.0, 2.0, 3.0, 4.5)
    """

    edges: Sequence[float]
    counts: Sequence[float]
    minimum: float
    maximum: float
    total: float
    sum_of_squares: float

    def __post_init__(self) -> None:
        for name in ("edges", "counts", "minimum", "maximum", "total", "sum_of_squares"):
            value, several = getattr(self, name), name in ("edges", "counts")
            try:
                object.__setattr__(self, name, tuple(map(float, value)) if several else float(value))
            except (TypeError, ValueError, RuntimeError):
                kind = "numbers" if several else "a number"
                raise TypeError(f"{name} must be {kind}, got {type(value).__name__}") from None
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(
                f"edges must hold one limit more than there are counts, got {len(self.edges)} edges and "
                f"{len(self.counts)} counts; an underflow or overflow shell needs a finite outer limit of its own"
            )
        if not all(map(math.isfinite, self.edges)):
            raise ValueError(f"edges must be finite, got {self.edges}; give unbounded shells a finite outer limit")
        if any(right <= left for left, right in pairwise(self.edges)):
            raise ValueError(f"edges must increase, got {self.edges}")
        if any(count < 0 for count in self.counts):
            raise ValueError(f"counts must not be negative, got {self.counts}; draw signed quantities as a figure")

    @classmethod
    def from_buckets(cls, edges: Sequence[float], counts: Sequence[float]) -> Histogram:
        """Histogram of weights whose values inside the buckets are not known.

        `minimum` and `maximum` are the outer limits of the non-empty buckets; the sums put each bucket's weight at
        its centre, so they are right to half a bucket's width.

        Args:
            edges: Finite, increasing bucket limits.
            counts: Weight of each bucket, one fewer than there are edges.

        Returns:
            The histogram; all buckets empty gives zeros for everything but edges and counts.

        Raises:
            ValueError: As for `Histogram`.
        """
        edges, counts = [float(edge) for edge in edges], [float(count) for count in counts]
        filled = [i for i, count in enumerate(counts[: len(edges) - 1]) if count != 0]
        centres = [(left + right) / 2 for left, right in pairwise(edges)]
        return cls(
            edges=edges,
            counts=counts,
            minimum=edges[filled[0]] if filled else 0.0,
            maximum=edges[filled[-1] + 1] if filled else 0.0,
            total=sum(count * centre for count, centre in zip(counts, centres)),
            sum_of_squares=sum(count * centre**2 for count, centre in zip(counts, centres)),
        )

    @property
    def is_finite(self) -> bool:
        """Whether every number is finite; TensorBoard shows "histogram is empty" otherwise, so sinks skip it."""
        return all(map(math.isfinite, (*self.counts, self.minimum, self.maximum, self.total, self.sum_of_squares)))


@dataclass(frozen=True, eq=False)
class Emission:
    """Everything that one measurement emits, at one point of the step axis.

    Args:
        step: Position on the axis of the user's own curves.
        scalars: Value by tag. NaN and infinities are allowed: curves then have a gap, JSON lines keep them.
        kept: Values that JSON lines and metrics keep beside the scalars, and that nothing draws as a curve.
        histograms: Histogram by tag.
        texts: Markdown by tag.
        figures: By tag, a function without arguments that draws and returns a new matplotlib figure; called only by
            sinks that show figures, and closed by them.
        record: The full snapshot as JSON-able data, for the JSON lines.
        fits: The run's final exponents as JSON-able data by name, for the JSON lines.
        layout: TensorBoard custom-scalars layout (`SummaryWriter.add_custom_scalars`); give it once in a run.

    Raises:
        TypeError: `step` is not an integer.

    Example:
        >>> Emission(step=3, scalars={"grsd_health/seconds": 0.25}).scalars
        {'grsd_health/seconds': 0.25}
    """

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Callable[[], Figure]] = field(default_factory=dict)
    record: dict[str, Any] | None = None
    fits: dict[str, Any] | None = None
    layout: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "step", operator.index(self.step))
        except TypeError:
            raise TypeError(f"step must be an integer, got {type(self.step).__name__}") from None
