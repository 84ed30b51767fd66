"""The side of the subprocess: one JSON line in, one JSON line out, times and peak memory in between.

    stdin:   the specification, then one line per run wanted
    stdout:  {"status": "ready", ...} then {"status": "done", "seconds", "cpu_seconds", "peak_bytes", ...} per run

Standard library and numpy alone at the top: it also serves interpreters without torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

#: what a run returns: the array to compare, and figures of its own
Result = tuple[Any, dict[str, float]]
Run = Callable[[], Result]


def serve(prepare: Callable[[dict[str, Any]], Run]) -> None:
    """Answer specifications with `prepare(specification) -> run`.

    A run with few samples comes first, so that libraries load and refusals show before anything is measured.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes elsewhere

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    spec = json.loads(sys.stdin.readline())
    try:
        _set_threads(spec)
        prepare(spec | {"n": min(2, spec["n"])})()
        start = time.perf_counter()
        run = prepare(spec)
    except ImportError as error:
        return answer(status="not installed", why=_first_line(error))
    except Exception as error:
        return answer(status="refused", why=_first_line(error))
    answer(status="ready", preparation_seconds=time.perf_counter() - start)
    _limit_memory(spec.get("max_bytes"), spec.get("device", "cpu"))
    first = True
    for _ in sys.stdin:
        try:
            fields, result = _measured(run, spec.get("device", "cpu"))
        except Exception as error:
            return answer(status="out of memory" if _is_memory(error) else "failed", why=_first_line(error))
        if first and spec.get("result"):
            np.save(spec["result"], np.asarray(result, dtype=np.float64))
        first = False
        del result
        answer(status="done", **fields)


def _measured(run: Run, device: str) -> tuple[dict[str, float], Any]:
    """Figures of one run, and its result on the host."""
    start, cpu = time.perf_counter(), time.process_time()
    (result, more), peak = peak_of(run, device)
    _wait(device)
    figures = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "peak_bytes": peak}
    host = result.cpu().numpy() if hasattr(result, "cpu") else np.asarray(result)
    return figures | more, host


def peak_of(function: Callable[[], Any], device: str) -> tuple[Any, int]:
    """What the function returns, and the most bytes held while it ran beyond those held before."""
    before = _reset_peak(device)
    result = function()
    _wait(device)
    return result, max(_peak(device) - before, 0)


def _set_threads(spec: dict[str, Any]) -> None:
    """Threads of torch, where there is torch; the parent sets the environment for the rest."""
    if spec.get("torch", True) and "threads" in spec:
        import torch

        torch.set_num_threads(spec["threads"])


def _reset_peak(device: str) -> int:
    """Start a new peak; bytes held now."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: the peak becomes the present size; elsewhere it stays that of the whole life
    return _peak(device)


def _peak(device: str) -> int:
    """Bytes of the peak: of the device's allocator, else of the resident set."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
        if found:
            return 1024 * int(found.group(1))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _limit_memory(most: int | None, device: str) -> None:
    """At most so many bytes of address space beyond what is there now (Linux, CPU)."""
    if not most or device.startswith("cuda") or not sys.platform.startswith("linux"):
        return
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + most, resource.RLIM_INFINITY))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def _is_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "t allocate" in text or "bad_alloc" in text


def _first_line(error: Exception) -> str:
    """Type and first line of a message, without places on this machine."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
