"""Where the callback's values go, and what several callbacks must not share."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grsd_callbacks.callbacks.lightning_facts import is_trial
from grsd_callbacks.outlet import warn
from grsd_callbacks.sinks import JSONLinesSink, LoggerSink, Sink

if TYPE_CHECKING:
    from grsd_callbacks.callbacks.dynamics import ShellDynamicsCallback

#: name without .jsonl of the file of JSON lines in the run's log folder
JSON_STEM = "grsd"


def sinks_of(trainer: Any, lines: list[Sink]) -> list[Sink]:
    """The Trainer's loggers and the given files; one warning if there is neither."""
    found: list[Sink] = [*(LoggerSink(logger) for logger in trainer.loggers), *lines]
    if not found and not is_trial(trainer):
        warn("grsd: the Trainer has no logger; measurements are kept in callback.history only.")
    return found


def json_lines_sink(
    where: str | None, folder: str | None, trainer: Any, name: str = "", stem: str = JSON_STEM
) -> list[Sink]:
    """The sink of JSON lines in the run's log folder, if there is a local one."""
    if where is None:
        return []
    if where != "auto":
        return [JSONLinesSink(where)]
    if not trainer.loggers or is_trial(trainer) or folder is None or "://" in str(folder):
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [JSONLinesSink(Path(folder) / (f"{stem}_{name}.jsonl" if name else f"{stem}.jsonl"))]


def use_new_files(sinks: list[Sink]) -> None:
    """For a new run in a folder that another run has used: files that do not exist yet."""
    for sink in sinks:
        if isinstance(sink, JSONLinesSink):
            sink.path = unused_path(sink.path)


def unused_path(path: Path) -> Path:
    """The path itself, or the first of `name_1.jsonl`, `name_2.jsonl`, ... that does not exist."""
    candidates = (path.with_name(f"{path.stem}_{k}{path.suffix}") for k in itertools.count(1))
    return path if not path.exists() else next(p for p in candidates if not p.exists())


def tag_prefix(name: str) -> str:
    """What the tags of the instance with that name begin with."""
    return f"grsd_{name}_" if name else "grsd_"


def refuse_collisions(callback: ShellDynamicsCallback, others: Iterable[ShellDynamicsCallback]) -> None:
    """Several instances must not write to the same tags, checkpoint key or file.

    Raises:
        ValueError: names the argument to change.
    """
    for other in others:
        if callback.state_key == other.state_key:
            raise ValueError(f"name={callback.name!r} is that of two {callback._key}s; give each its own name=")
        if callback._json_lines not in (None, "auto") and callback._json_lines == other._json_lines:
            raise ValueError(
                f"json_lines={callback._json_lines!r} is the file of two ShellDynamicsCallbacks; give each its own"
            )
