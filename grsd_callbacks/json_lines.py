"""One JSON object a line: a file that any tool reads, and that survives a killed process.

JSON has no word for NaN and infinities; the strings "nan", "inf" and "-inf" stand for them.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from grsd_callbacks.arguments import checked

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
FIRST_BYTES = b'{"step": '  # every line of ours begins so; tells a half-written line of ours from a foreign file


def append_json_line(path: str | os.PathLike[str], step: int, **parts: Any) -> None:
    """Append one line to a file, and wait until it is on the disk.

    Args:
        path: The file; made if it does not exist, its folder must.
        step: Position on the step axis.
        **parts: JSON-able data by name; tensors and arrays become lists, floats keep all their digits.

    Raises:
        TypeError: A part holds something that JSON cannot; the file is left as it was.
    """
    content = {"step": step, **{name: _strict(part, name) for name, part in parts.items()}}
    line = json.dumps(content, allow_nan=False) + "\n"
    with open(path, "ab") as file:
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


@checked
def read_json_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read lines of `append_json_line`, also while it is being written or after the writer was killed.

    A half-written last line is left out. A step has several lines: the measurement, then what the optimizer step after
    it has added (and the summary at the end); merge their scalars, later values win, and the last `record` is complete.
    The same holds for steps that a resumed run has made again. Every string "nan", "inf" or "-inf" comes back as the
    float.

    Args:
        path: The file.

    Returns:
        One dictionary a line, in the order of the file: `step`, and of `scalars`, `texts` and `record` those that are
        not empty.

    Raises:
        ValueError: The file holds a line that `append_json_line` does not write.
        OSError: The file cannot be read.
    """
    *lines, tail = Path(path).read_bytes().split(b"\n")
    if not _is_torn(tail):
        lines.append(tail)  # refused below, unless a line before it is
    return [_parse(line, f"{os.fspath(path)}: line {number}") for number, line in enumerate(lines, start=1)]


def cut_torn_line(path: str | os.PathLike[str]) -> None:
    """End an existing file at its last complete line, so that a killed writer's half line does not spoil the next.

    Args:
        path: The file; nothing happens if it does not exist.

    Raises:
        ValueError: The file was not written by this package; it is left as it was.
    """
    path = Path(path)
    if not path.exists():
        return
    with open(path, "r+b") as file:
        first = file.readline()
        if not _is_torn(first):
            raise ValueError(f"{path} exists and was not written by this package; give another path or move the file")
        content = first + file.read()
        file.truncate(content.rfind(b"\n") + 1)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        raise ValueError(f"{where} was not written by this package: expected a JSON object with an integer step")
    return _restored(content)


def _is_torn(tail: bytes) -> bool:
    return tail.startswith(FIRST_BYTES) or FIRST_BYTES.startswith(tail)


def _strict(value: Any, where: str) -> Any:
    """The same data in what strict JSON can hold."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(key): _strict(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # tensors and arrays of any rank
        return _strict(value.tolist(), where)
    raise TypeError(f"{where} must be JSON-able (numbers, strings, lists, dicts), got {type(value).__name__}")


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
