"""The side of the parent: subprocesses in their interpreters, asked for one run at a time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
#: environment variables that name interpreters with peers installed; without one our own interpreter is tried
INTERPRETERS = {"torch": "GRSD_PEERS_PYTHON", "jax": "GRSD_JAX_PYTHON"}
#: seconds for imports and the first small run
START_SECONDS = 300.0


@dataclass
class Worker:
    """One method in a process of its own.

    Attributes:
        module: name of the script in this folder.
        status: "starting", "ready", or why there is no (further) run: "not installed", "refused", "out of memory",
            "over the cap", "failed".
        why: its message.
        figures: one dictionary per finished run.
        result: file of the array of the first run.
    """

    module: str
    spec: dict[str, Any]
    kind: str = "torch"
    max_seconds: float = 300.0
    status: str = "starting"
    why: str = ""
    figures: list[dict[str, float]] = field(default_factory=list)
    preparation_seconds: float = 0.0

    def __post_init__(self) -> None:
        python = os.environ.get(INTERPRETERS.get(self.kind, ""), "") or sys.executable
        try:
            self._process = subprocess.Popen(
                [python, "-m", f"benchmarks.peers.{self.module}"],
                cwd=ROOT,
                env=_environment(self.spec.get("threads", 1)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        except OSError as error:
            self.status, self.why = "not installed", f"{type(error).__name__}: no such interpreter"
            return
        self._take(self._ask(json.dumps(self.spec), START_SECONDS))

    @property
    def result(self) -> np.ndarray | None:
        """The array of the first run."""
        path = self.spec.get("result")
        return np.load(path) if path and Path(path).exists() else None

    def run(self) -> dict[str, float] | None:
        """One run's figures, None if there is none any more."""
        if self.status not in ("ready", "done"):
            return None
        found = self._ask("run", self.max_seconds)
        self._take(found)
        if self.status != "done":
            return None
        self.figures.append({k: v for k, v in found.items() if k != "status"})
        return self.figures[-1]

    def close(self) -> None:
        """End the process."""
        if hasattr(self, "_process") and self._process.poll() is None:
            self._process.kill()
        if hasattr(self, "_process"):
            self._process.communicate()

    def _take(self, found: dict[str, Any]) -> None:
        self.status, self.why = found["status"], found.get("why", "")
        self.preparation_seconds = found.get("preparation_seconds", self.preparation_seconds)

    def _ask(self, line: str, patience: float) -> dict[str, Any]:
        """One line there, one line back; silence or an end is an answer too."""
        process = self._process
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        start = time.perf_counter()
        if not select.select([process.stdout], [], [], patience)[0]:
            process.kill()
            return {"status": "over the cap", "why": f"no answer in {time.perf_counter() - start:.0f} s"}
        answer = process.stdout.readline()
        return json.loads(answer) if answer else self._ended()

    def _ended(self) -> dict[str, Any]:
        code = self._process.wait()
        killed = code in (-9, 137)
        return {"status": "out of memory" if killed else "failed", "why": f"the process ended with code {code}"}


def _environment(threads: int) -> dict[str, str]:
    """Ours, with this folder importable and the number of threads set (XLA knows one, or every core)."""
    more = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"} if threads == 1 else {}
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
        "PYTHONWARNINGS": "ignore",
        **more,
    }
