"""What a run has left on disk: JSON lines with every snapshot, or else TensorBoard's event files with its curves."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grsd_callbacks.exponents import Estimate, PowerLawFit
from grsd_callbacks.json_lines import FIRST_BYTES, read_json_lines
from grsd_callbacks.report import EXPONENT_NAMES
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.tags import SUMMARY, VERDICTS

EVENTS = "tfevents"
EXPONENTS = tuple(EXPONENT_NAMES)
_LOSS = re.compile(r"(grsd_(?:\w+_)?)loss/probe")

Curves = dict[str, list[tuple[int, float]]]


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what to do. Exit code 2."""


@dataclass(frozen=True, eq=False)
class RunLog:
    """One run as it is on disk.

    Attributes:
        name: what to call it.
        path: the file or folder it was read from.
        history: every measurement; empty where only event files are left.
        final: exponents over the whole run, written at its end; empty where it was stopped before.
        curves: (step, value) pairs by tag, with the prefix `grsd_` whatever the run's own; event files only.
        texts, images: cards and PNG files by tag; event files only.
        notes: what was left out, and why.
    """

    name: str
    path: Path
    history: list[Snapshot] = field(default_factory=list)
    final: dict[str, PowerLawFit] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    images: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fits(self) -> dict[str, PowerLawFit]:
        """Exponents over the whole run, as the callback's own summary has them; of a stopped run, its latest."""
        first, last = self.history[0].exponents, self.history[-1].exponents
        return self.final or {**last, **{name: first[name] for name in ("q",) if name in first}}

    def estimates(self) -> dict[str, Estimate | PowerLawFit]:
        """Exponents with intervals: those of `fits`, or of curves the last drawn values (of q the first)."""
        if self.history:
            return dict(self.fits())
        found: dict[str, Estimate | PowerLawFit] = {}
        for name in EXPONENTS:
            tags = (f"grsd_exponents/{name}", f"grsd_bands/{name}_lower", f"grsd_bands/{name}_upper")
            if all(tag in self.curves for tag in tags):
                found[name] = Estimate(*(self.curves[tag][0 if name == "q" else -1][1] for tag in tags))
        return found


def find_runs(path: Path) -> list[RunLog]:
    """Every run of ours at a path: a file of JSON lines, an event file, or a folder with such files below it.

    A folder with JSON lines is read from these, and its event files, which hold the same numbers, are left alone.

    Raises:
        UsageError: the path does not exist, or holds nothing of ours.
    """
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    if path.is_file():
        if EVENTS in path.name:
            return _from_events(path) or _nothing(path)
        text = verdict_of(path)
        return [read_json(path) if text is None else _of_conditions(path, text)]
    files = sorted(p for p in path.rglob("*.jsonl") if _is_ours(p))
    conditions = {p: text for p in files if (text := verdict_of(p)) is not None}
    runs = [read_json(p) for p in files if p not in conditions]
    runs = [replace(run, texts=_verdicts_beside(run.path, conditions)) for run in runs]
    measured = {run.path.parent for run in runs}
    runs += [_of_conditions(p, text) for p, text in conditions.items() if p.parent not in measured]
    folders = sorted({p.parent for p in path.rglob(f"*{EVENTS}*") if p.is_file()} - {p.parent for p in files})
    for folder in folders:
        runs += _from_events(folder)
    return _named(runs, path) if runs else _nothing(path)


def find_run(path: Path) -> RunLog:
    """The one run at a path.

    Raises:
        UsageError: as `find_runs`, or there are several.
    """
    runs = find_runs(path)
    if len(runs) > 1:
        listed = "\n".join(f"  {run.path}" for run in runs)
        raise UsageError(f"{path} holds {len(runs)} runs; name one of them:\n{listed}")
    if not runs[0].history and not runs[0].curves:
        raise UsageError(f"{path} holds the conditions of a run only (`grsd report` shows them): no shells")
    return runs[0]


def verdict_of(path: Path) -> str | None:
    """The verdicts in a file of `RenormalizabilityCallback`, or that there are none yet; None for any other file."""
    try:
        lines = read_json_lines(path)
    except (ValueError, OSError):
        return None  # `read_json` says what is wrong
    if not any("propagation" in line.get("record", {}) for line in lines):
        return None
    cards = [text for line in lines for tag, text in line.get("texts", {}).items() if tag.endswith("_renorm/verdicts")]
    return _plain(cards[-1]) if cards else "grsd: conditions were measured, and no verdict before the end of the run"


def _of_conditions(path: Path, text: str) -> RunLog:
    return RunLog(path.parent.name or path.stem, path, texts={VERDICTS: text})


def _verdicts_beside(path: Path, conditions: dict[Path, str]) -> dict[str, str]:
    texts = [text for p, text in conditions.items() if p.parent == path.parent]
    return {VERDICTS: "\n\n".join(texts)} if texts else {}


def read_json(path: Path) -> RunLog:
    """A run from its JSON lines; a half-written last line is left out, with a note.

    Raises:
        UsageError: the file is empty, foreign, or holds no measurement.
    """
    try:
        lines = read_json_lines(path)
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from None
    notes = [] if path.read_bytes().endswith(b"\n") else ["the last line is half-written and was left out"]
    history: list[Snapshot] = []
    final: dict[str, PowerLawFit] = {}
    dropped = 0
    for line in lines:
        if "fits" in line:
            final = {name: PowerLawFit(**fit) for name, fit in line["fits"].items()}
        if "record" not in line:
            continue
        if not history or line["record"]["step"] > history[-1].step:
            final = {}  # the run went on
        snapshot = _snapshot(line["record"], path)
        kept = [s for s in history if s.step < snapshot.step]
        dropped += sum(s.step > snapshot.step for s in history)
        history = [*kept, snapshot]
    if dropped:
        notes.append(f"{dropped} measurements were made again by a resumed or a second run; the later ones count")
    if not history:
        raise UsageError(f"{path} holds no measurement: it is empty, or the run was stopped before its first one")
    return RunLog(path.parent.name or path.stem, path, history, final, notes=notes)


def _snapshot(record: Any, path: Path) -> Snapshot:
    try:
        return Snapshot.from_dict(record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} holds a record that cannot be read: {error}") from None


def _is_ours(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(FIRST_BYTES)) == FIRST_BYTES


def _from_events(path: Path) -> list[RunLog]:
    """One run a prefix of tags; none where no tag is ours."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # says of every file that it has been read
    everything = {"scalars": 0, "images": 0, "tensors": 0, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    events = EventAccumulator(str(path), size_guidance=everything)
    try:
        events.Reload()
    except Exception as error:
        raise UsageError(f"{path} cannot be read as TensorBoard's event files: {error}") from None
    prefixes = [match.group(1) for tag in events.Tags()["scalars"] if (match := _LOSS.fullmatch(tag))]
    folder = path if path.is_dir() else path.parent
    return [_of_prefix(events, prefix, folder, len(prefixes) > 1) for prefix in prefixes]


def _of_prefix(events: Any, prefix: str, path: Path, several: bool) -> RunLog:
    def ours(kind: str) -> Iterator[tuple[str, str]]:
        for tag in events.Tags()[kind]:
            if tag.startswith(prefix):
                yield tag, "grsd_" + tag.removeprefix(prefix)

    texts = {}
    for tag, name in ours("tensors"):
        strings = events.Tensors(tag)[-1].tensor_proto.string_val
        if strings and name.endswith("/text_summary"):
            texts[name.removesuffix("/text_summary")] = strings[0].decode()
    return RunLog(
        name=f"{path.name} {prefix.rstrip('_')}" if several else path.name,
        path=path,
        curves={name: [(e.step, e.value) for e in events.Scalars(tag)] for tag, name in ours("scalars")},
        texts=texts,
        images={name: events.Images(tag)[-1].encoded_image_string for tag, name in ours("images")},
        notes=["read from TensorBoard's event files: curves in float32, no spectra"],
    )


def _named(runs: list[RunLog], root: Path) -> list[RunLog]:
    """Runs called by their folder below the root, and the file too where a folder has several."""
    named = []
    for run in runs:
        folder = run.path.parent if run.path.is_file() else run.path
        name = str(folder.relative_to(root)) if folder != root else root.resolve().name
        if sum((r.path.parent if r.path.is_file() else r.path) == folder for r in runs) > 1:
            name = f"{name}/{run.path.stem}" if run.path.is_file() else f"{name} {run.name}"
        named.append(replace(run, name=name))
    return named


def _nothing(path: Path) -> list[RunLog]:
    raise UsageError(
        f"{path} holds no run of grsd: expected a grsd.jsonl, or TensorBoard event files with curves grsd_.../..., "
        "as ShellDynamicsCallback and ShellMonitor(writer=...) write them"
    )


def summary_card(run: RunLog) -> str | None:
    """The callback's own summary, from the text card of a finished run."""
    card = run.texts.get(SUMMARY)
    return None if card is None else _plain(card)


def verdict_card(run: RunLog) -> str:
    """The verdicts of the `RenormalizabilityCallback` beside a run; empty where there was none."""
    return _plain(run.texts.get(VERDICTS, ""))


def _plain(card: str) -> str:
    return card.removeprefix("```\n").removesuffix("\n```")
