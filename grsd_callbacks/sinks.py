"""Where emitted values go: TensorBoard, any Lightning logger, a file of JSON lines, or memory.

A sink takes an `Emission` as a whole. What a sink cannot show it leaves out; what goes wrong it raises, after it has
written what it could, and it stays usable. Call sinks on rank zero only. Lightning is never imported here: its
loggers are known by what they can do.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from grsd_callbacks.emission import Emission
from grsd_callbacks.json_lines import append_json_line, cut_torn_line, read_json_lines
from grsd_callbacks.media import figure_writer, picture, text_writer

__all__ = [
    "JSONLinesSink",
    "LoggerSink",
    "MemorySink",
    "MetricsSink",
    "Sink",
    "SinkGroup",
    "TensorBoardSink",
    "as_sink",
    "read_json_lines",
]

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127  # curves are float32 on disk: beyond it a finite value turns into inf
WRITER_METHODS = ("add_scalar", "add_histogram_raw", "add_text", "add_image", "add_custom_scalars", "flush", "close")


@runtime_checkable
class Sink(Protocol):
    """A destination of emissions."""

    def write(self, emission: Emission) -> None:
        """Take one emission; a killed process loses nothing that an earlier call has taken."""

    def flush(self) -> None:
        """Hand everything to the operating system."""

    def close(self) -> None:
        """Release what the sink itself has opened, and only that."""


class MemorySink:
    """Keep emissions in a list, for tests and notebooks.

    Example:
        >>> sink = MemorySink()
        >>> sink.write(Emission(step=1, scalars={"grsd_loss/total": 2.0}))
        >>> sink.emissions[0].scalars["grsd_loss/total"]
        2.0
    """

    def __init__(self) -> None:
        self.emissions: list[Emission] = []

    def write(self, emission: Emission) -> None:
        """Append the emission, as it is."""
        self.emissions.append(emission)

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to release; the emissions stay."""


class TensorBoardSink:
    """Write to TensorBoard: scalars, histograms with our own buckets, texts, figures and the layout.

    NaN, infinities, and values that float32 cannot hold are not written: the curve has a gap there. A histogram that
    holds one is skipped as a whole. Every call ends with a flush, so a killed process leaves all its events.

    Args:
        writer_or_logdir: A `SummaryWriter` (stays open at `close`), or a folder to make one in (closed by `close`).

    Raises:
        TypeError: `writer_or_logdir` is neither.

    Cost: about 0.1 ms for each scalar, 0.1 ms for the flush, 0.1 s for each figure.
    """

    def __init__(self, writer_or_logdir: Any) -> None:
        self._owned = isinstance(writer_or_logdir, (str, os.PathLike))
        if self._owned:
            from torch.utils.tensorboard import SummaryWriter

            self.writer: Any = SummaryWriter(os.fspath(writer_or_logdir))
        elif _has(writer_or_logdir, *WRITER_METHODS):
            self.writer = writer_or_logdir
        else:
            raise TypeError(
                "writer_or_logdir must be a torch.utils.tensorboard.SummaryWriter or the path of a folder, "
                f"got {type(writer_or_logdir).__name__}"
            )

    def write(self, emission: Emission) -> None:
        """Write all of an emission but its record; figures last, each drawn and closed here.

        Raises:
            Exception: What drawing a figure raised, once everything else is written; or what the writer raised.
        """
        step, writer = emission.step, self.writer
        try:
            if emission.layout is not None:
                writer.add_custom_scalars(emission.layout)
            for tag, value in _finite_scalars(emission).items():
                writer.add_scalar(tag, value, step)
            for tag, histogram in emission.histograms.items():
                if histogram.is_finite:
                    writer.add_histogram_raw(
                        tag,
                        min=histogram.minimum,
                        max=histogram.maximum,
                        num=sum(histogram.counts),
                        sum=histogram.total,
                        sum_squares=histogram.sum_of_squares,
                        bucket_limits=histogram.edges[1:],  # TensorBoard keeps upper limits; `min` is the first lower
                        bucket_counts=histogram.counts,
                        global_step=step,
                    )
            for tag, text in emission.texts.items():
                writer.add_text(tag, text, step)
            _for_each_figure(emission, partial(self._show, step=step))
        finally:
            writer.flush()

    def _show(self, tag: str, figure: Any, step: int) -> None:
        """As an image: `add_figure` would import pyplot, and with it the user's backend."""
        self.writer.add_image(tag, np.asarray(picture(figure).convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        """Flush the event file."""
        self.writer.flush()

    def close(self) -> None:
        """Flush; close the writer if this sink has made it."""
        self.writer.flush()
        if self._owned:
            self.writer.close()


class LoggerSink:
    """Write to a Lightning logger of either package, known by what it can do.

    * `logger.experiment` is a TensorBoard writer: everything, as `TensorBoardSink` does it.
    * any other logger: `log_metrics(scalars, step=step)` with the finite scalars, and then texts, tables and figures
      in the way of W&B, Comet or MLflow where it has the methods (see `media.py`); histograms are left out. At last
      `save()`, so that a killed process leaves files (CSVLogger).
    * placeholders (`fast_dev_run`, ranks other than zero): `log_metrics` only, which they ignore; no figure is drawn.

    The experiment is looked up at each write: loggers make it, and its folder, on first use. The logger stays the
    user's: `close` does not finalize it.

    Args:
        logger: The logger, for example one of `trainer.loggers`.

    Raises:
        TypeError: `logger` has no `log_metrics`.
    """

    def __init__(self, logger: Any) -> None:
        if not _has(logger, "log_metrics"):
            raise TypeError(f"logger must be a Lightning logger with a log_metrics method, got {type(logger).__name__}")
        self.logger = logger

    def write(self, emission: Emission) -> None:
        """Write what the logger can show.

        Raises:
            Exception: What the logger raised, or what drawing a figure raised once everything else is written.
        """
        experiment = getattr(self.logger, "experiment", None)
        placeholder = _claims_everything(experiment)
        if _has(experiment, *WRITER_METHODS) and not placeholder:
            TensorBoardSink(experiment).write(emission)
            return
        try:
            if scalars := _finite_scalars(emission):
                self.logger.log_metrics(scalars, step=emission.step)
            if not placeholder:
                self._write_media(emission, experiment)
        finally:
            if not placeholder:
                self._save()

    def _write_media(self, emission: Emission, experiment: Any) -> None:
        write_text, write_figure = text_writer(self.logger, experiment), figure_writer(self.logger, experiment)
        if write_text is not None:
            for tag, text in emission.texts.items():
                write_text(tag, text, emission.step)
        if write_figure is not None:
            _for_each_figure(emission, lambda tag, figure: write_figure(tag, figure, emission.step))

    def _save(self) -> None:
        if _has(self.logger, "save"):
            self.logger.save()

    def flush(self) -> None:
        """Ask the logger to save."""
        self._save()

    def close(self) -> None:
        """Ask the logger to save; its owner finalizes it."""
        self._save()


class MetricsSink:
    """Mirror the latest finite scalars, but those per shell, into a dictionary such as `trainer.callback_metrics`.

    So EarlyStopping and ModelCheckpoint can monitor them, `EarlyStopping("grsd_loss/probe")` say. Nothing is logged by
    it, and what others have put there stays. A value that is not finite leaves the last one in place.

    Args:
        metrics: function that returns the dictionary; asked at each write, for Lightning replaces it.
    """

    on_every_rank = True  # what decides when to stop runs on all of them

    def __init__(self, metrics: Callable[[], MutableMapping[str, Any]]) -> None:
        self.metrics = metrics

    def write(self, emission: Emission) -> None:
        """Store the scalars as tensors, and with them what is kept but not drawn."""
        everything = replace(emission, scalars={**emission.scalars, **emission.kept})
        scalars = {tag: value for tag, value in _finite_scalars(everything).items() if "shell_energy/" not in tag}
        self.metrics().update({tag: torch.tensor(value, dtype=torch.float64) for tag, value in scalars.items()})

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to release."""


class JSONLinesSink:
    """Append each emission to a file as one line of strict JSON: `step`, `scalars`, `texts`, the full `record`, `fits`.

    Empty parts are left out. Floats keep all their digits; "nan", "inf" and "-inf" stand for what JSON lacks, and
    `read_json_lines` turns them back. Tensors and arrays in the record become lists. Each line is on the disk when
    `write` returns. No file is held open, so the sink can be pickled and copied. A half-written last line, left by a
    process that was killed, is cut off before the first line is appended.

    Args:
        path: The file; it and its folder are made at the first write.

    Raises:
        TypeError: `path` is not a path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
        self.path = Path(path)
        self._ends_in_newline = False  # as far as this sink knows

    def write(self, emission: Emission) -> None:
        """Append one line; none for figures alone, which are not kept here.

        Raises:
            TypeError: The record holds something that JSON cannot; the file is left as it was.
            ValueError: The file exists and was not written by this class; it is left as it was.
        """
        parts: dict[str, Any] = {name: getattr(emission, name) for name in ("scalars", "texts", "record", "fits")}
        parts["scalars"] = {**emission.scalars, **emission.kept}
        kept = {name: part for name, part in parts.items() if part}
        if emission.figures and not kept:
            return
        if not self._ends_in_newline:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            cut_torn_line(self.path)
        self._ends_in_newline = False
        append_json_line(self.path, emission.step, **kept)
        self._ends_in_newline = True

    def flush(self) -> None:
        """Nothing to do: `write` does not buffer."""

    def close(self) -> None:
        """Nothing to release."""


class SinkGroup:
    """Write to several sinks; one that fails does not keep the others from their share.

    Args:
        sinks: The sinks, or anything that `as_sink` takes.

    Raises:
        TypeError: One of them is something else.
    """

    def __init__(self, sinks: Iterable[Any]) -> None:
        self.sinks: list[Sink] = [as_sink(sink) for sink in sinks]

    def write(self, emission: Emission) -> None:
        """Write to all sinks, then raise the first exception, if any."""
        _try_all(partial(sink.write, emission) for sink in self.sinks)

    def flush(self) -> None:
        """Flush all sinks, then raise the first exception, if any."""
        _try_all(sink.flush for sink in self.sinks)

    def close(self) -> None:
        """Close all sinks, then raise the first exception, if any."""
        _try_all(sink.close for sink in self.sinks)


def as_sink(target: Any) -> Sink:
    """Find the sink for what a user hands over.

    Args:
        target: A sink, a `SummaryWriter`, a Lightning logger, a path (`*.jsonl`: JSON lines; any other: a TensorBoard
            folder), or a list or tuple of these.

    Returns:
        The sink itself, or a new one.

    Raises:
        TypeError: `target` is something else.

    Example:
        >>> type(as_sink("run/grsd.jsonl")).__name__
        'JSONLinesSink'
    """
    if isinstance(target, (list, tuple)):
        return SinkGroup(target)
    if isinstance(target, (str, os.PathLike)):
        return JSONLinesSink(target) if os.fspath(target).endswith(".jsonl") else TensorBoardSink(target)
    if _has(target, "log_metrics"):
        return LoggerSink(target)
    if _has(target, *WRITER_METHODS):
        return TensorBoardSink(target)
    if isinstance(target, Sink) and not isinstance(target, io.IOBase):  # an open file has the same methods
        return target
    raise TypeError(
        f"target must be a sink, a SummaryWriter, a Lightning logger, a path or a list of these, "
        f"got {type(target).__name__}"
    )


def _finite_scalars(emission: Emission) -> dict[str, float]:
    values = {tag: float(value) for tag, value in emission.scalars.items()}
    return {tag: value for tag, value in values.items() if abs(value) <= LARGEST_FLOAT32}  # false for NaN too


def _for_each_figure(emission: Emission, show: Callable[[str, Any], None]) -> None:
    """Draw, show and close every figure; then raise the first exception, if any."""

    def one(tag: str, draw: Callable[[], Any]) -> None:
        with _drawn(draw) as figure:
            show(tag, figure)

    _try_all(partial(one, tag, draw) for tag, draw in emission.figures.items())


@contextmanager
def _drawn(draw: Callable[[], Any]) -> Iterator[Any]:
    figure = draw()
    try:
        yield figure
    finally:
        pyplot = sys.modules.get("matplotlib.pyplot")  # where nobody has imported it, it does not hold the figure
        if pyplot is not None:
            pyplot.close(figure)


def _try_all(actions: Iterable[Callable[[], None]]) -> None:
    first: Exception | None = None
    for action in actions:
        try:
            action()
        except Exception as error:
            first = first or error
    if first is not None:
        raise first


def _has(target: Any, *names: str) -> bool:
    return all(callable(getattr(target, name, None)) for name in names)


def _claims_everything(target: Any) -> bool:
    """Whether this is a placeholder that answers to every name, as Lightning's dummy experiment does."""
    return target is not None and hasattr(target, "grsd_name_that_nothing_has")
