"""Where a monitor's values, texts, figures and warnings go. Nothing that goes wrong here ends a training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from grsd_callbacks import tags
from grsd_callbacks.emission import Emission
from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.figures import run_figures
from grsd_callbacks.notice import notice
from grsd_callbacks.report import summary_table
from grsd_callbacks.sinks import SinkGroup
from grsd_callbacks.snapshot import Snapshot


class MeasurementWarning(UserWarning):
    """A measurement failed or costs much; training is not affected."""


def warn(message: str) -> None:
    """A `MeasurementWarning` that ends no training, even where warnings are errors."""
    notice(message, MeasurementWarning)


def first_line(error: BaseException) -> str:
    """Kind and first line of an error's message, for a warning."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def remedy(error: BaseException) -> str:
    """What the user can do about a failed measurement, as a sentence."""
    text = str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "out of memory" in text or "can't allocate" in text:
        return "Take a smaller num_probe or memory_limit, or method='krylov'."
    if type(error).__name__.endswith("LinAlgError"):  # of torch or of numpy
        return "If it persists, try dtype='float64' or method='krylov'."
    if "NaN or Inf" in text:
        return "Look at the training run: a lower learning rate or gradient clipping may keep it finite."
    if "same device" in text or "meta tensor" in text:
        return "Give a probe that can be moved to the model's device."
    return "Use on_error='raise' to see the traceback."


class Outlet:
    """The sinks of one monitor, under one prefix.

    Args:
        writer: anything `as_sink` takes, a list of such, or None.
        prefix: what tags begin with.
        on_error: "warn" (what cannot be written is one warning; it stays in the history) or "raise".
        quiet: no warnings, on ranks whose warnings another rank gives.

    Each method that writes returns whether all could be written.
    """

    def __init__(self, writer: Any, prefix: str, on_error: str, quiet: bool = False) -> None:
        several = [] if writer is None else writer if isinstance(writer, (list, tuple)) else [writer]
        try:
            self.sinks = SinkGroup(several)
        except TypeError as error:
            raise TypeError(f"writer: {error}") from None
        self.prefix, self.on_error = prefix, on_error
        self._warned: set[str] = set()
        self.quiet = quiet

    def snapshot(self, snapshot: Snapshot, num_failed: int, report: str | None) -> bool:
        """Write a measurement; with the report (given at the first one) also the meaning of tags and the layout."""

        def write() -> None:
            emission = tags.emission(snapshot)
            scalars = {**emission.scalars, tags.FAILED: float(num_failed)}
            if report is not None:
                texts = {tags.MEANING: tags.meaning_card(), tags.REPORT: tags.preformatted(report)}
                emission = replace(emission, texts=texts, layout=tags.layout(self.prefix))
            self._write(replace(emission, scalars=scalars))

        return self._attempt(write)

    def update(self, snapshot: Snapshot) -> bool:
        """Write what the optimizer step after a measurement has added to it."""
        return self._attempt(
            lambda: self._write(
                Emission(step=snapshot.step, scalars=tags.update_scalars(snapshot), record=snapshot.to_dict())
            )
        )

    def failed(self, step: int, num_failed: int) -> bool:
        """Write the number of measurements that could not be made."""
        return self._attempt(lambda: self._write(Emission(step=step, scalars={tags.FAILED: float(num_failed)})))

    def summary(self, history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit]) -> bool:
        """Write the table of the run and its final exponents, and flush."""

        def write() -> None:
            table = tags.preformatted(summary_table(history, fits))
            final, records = tags.final_scalars(history, fits), {name: asdict(fit) for name, fit in fits.items()}
            self._write(Emission(history[-1].step, kept=final, texts={tags.SUMMARY: table}, fits=records))
            self.sinks.flush()

        return self._attempt(write)

    def figures(self, history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit]) -> bool:
        """Draw and write the figures of the run so far, if there is anywhere to write to.

        Args:
            history: measurements so far.
            fits: final exponents; empty: those of the last measurement are drawn.
        """
        if not self.sinks.sinks:
            return True

        def write() -> None:
            self._write(Emission(step=history[-1].step, figures=run_figures(history, fits)))

        return self._attempt(write, figures=True)

    def close(self) -> None:
        """Flush everything and close what was opened here."""
        self._attempt(self.sinks.close)

    def warn_once(self, key: str, message: str) -> None:
        """One warning a key."""
        if key not in self._warned and not self.quiet:
            self._warned.add(key)
            warn(message)

    def _write(self, emission: Emission) -> None:
        self.sinks.write(emission if self.prefix == "grsd_" else tags.renamed(emission, self.prefix))

    def _attempt(self, function: Callable[[], None], *, figures: bool = False) -> bool:
        try:
            function()
        except Exception as error:
            if self.on_error == "raise":
                raise
            if figures and "write" not in self._warned:  # else what stops values stops figures too
                self.warn_once(
                    "draw",
                    f"grsd: figures cannot be drawn or written ({first_line(error)}); what they show is kept in "
                    "history. Look at the disk and the logger: it is tried again when figures are next due, and "
                    "`grsd report` draws them from the run's files.",
                )
            elif not figures:
                self.warn_once(
                    "write",
                    f"grsd: values cannot be written ({first_line(error)}); they are kept in history. Look at the disk "
                    "and the logger: writing is tried again at the next measurement.",
                )
            return False
        return True
