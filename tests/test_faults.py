"""Whatever goes wrong in a measurement: training goes on bit-identically, one warning says what to do, the next works."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import warnings
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import lightning_cases as cases
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import nn

import grsd_callbacks
from grsd_callbacks import MeasurementWarning, MemorySink, ShellDynamicsCallback, ShellMonitor

PACKAGE = str(Path(grsd_callbacks.__file__).parent)
X, Y = cases.digits(8)
AT = 2  # the optimizer step before which faults happen
EVERY_STEP = [0, 1, 2, 3, 4]
FULL = OSError(28, "No space left on device")


def no_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


# ---- a fault at every function of ours that a measurement calls, one after the other ----


class Fault:
    """A trace function that notes the package's functions, or raises at the n-th call of one of them."""

    def __init__(self, code=None, error=None, number=1):
        self.code, self.error, self.left = code, error, number
        self.seen = {}

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE):
            return
        self.seen[code] = self.seen.get(code, 0) + 1
        if code is self.code:
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise self.error


@contextmanager
def traced(fault):
    before = sys.gettrace()
    sys.settrace(fault)
    try:
        yield
    finally:
        sys.settrace(before)


NOT_OURS_TO_CATCH = {  # the entry of what the user calls, the net itself, and the check of what the user gives
    "ShellMonitor.step",
    "ShellMonitor.finish",
    "ShellMonitor._attempt",
    "_given_size",
    "check_step",
    "check_flow_time",
}
CHECKS_OF_ARGUMENTS = "optimizer.py"


def name_of(code):
    return getattr(code, "co_qualname", code.co_name)


def loop(options, fault=None, at=AT):
    """Four steps of a custom loop; (image, monitor, warnings). `at=4` is the end of the run."""
    cases.seed()
    model = cases.bn_dropout()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if options is not None:
            monitor = ShellMonitor(model, "cross_entropy", (X, Y), every_n_steps=1, writer=MemorySink(), **options)
        for step in range(4):
            if monitor is not None:
                with traced(fault if step in (at, at + 1) else None):  # a step, and what completes it
                    monitor.step(step, optimizer=optimizer)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
        if monitor is not None:
            with traced(fault if at == 4 else None):
                monitor.finish()
    found = {name: value.tolist() for name, value in model.state_dict().items()}
    found["rng"], found["training"] = torch.get_rng_state().tolist(), [m.training for m in model.modules()]
    ours = [str(w.message) for w in caught if "costs" not in str(w.message)]
    return found, monitor, ours


WAYS = {
    "exact": {"method": "exact"},
    "transfer": {"method": "exact", "transfer": True},
    "krylov": {"method": "krylov", "num_matvecs": 6, "num_density_matvecs": 4},
    "randomized": {"method": "randomized", "num_matvecs": 8},
}


@pytest.mark.parametrize(
    ("way", "at", "stride"),
    [
        ("exact", AT, 7),
        ("krylov", AT, 13),
        ("exact", 4, 11),
        pytest.param("exact", AT, 1, marks=pytest.mark.slow),
        pytest.param("transfer", AT, 1, marks=pytest.mark.slow),
        pytest.param("krylov", AT, 1, marks=pytest.mark.slow),
        pytest.param("randomized", AT, 1, marks=pytest.mark.slow),
        pytest.param("exact", 4, 1, marks=pytest.mark.slow),
    ],
)
def test_a_fault_anywhere_in_a_measurement(way, at, stride):
    """First and last call of each function; with a stride, of each `stride`-th one."""
    plain = loop(None)[0]
    record = Fault()
    assert loop(WAYS[way], record, at)[0] == plain
    codes = [
        code
        for code in record.seen
        if name_of(code) not in NOT_OURS_TO_CATCH and not code.co_filename.endswith(CHECKS_OF_ARGUMENTS)
    ]
    assert len(codes) > 100
    wrong = []
    for code in codes[::stride]:
        for number in {1, record.seen[code]} if stride == 1 else {1}:
            found, monitor, messages = loop(WAYS[way], Fault(code, FULL, number), at)
            good = found == plain and monitor.num_failed == 1 and len(messages) == 1 and "No space left" in messages[0]
            next_works = monitor.history[-1].step >= 3 and math.isfinite(monitor.history[-1].loss)
            told = [e.scalars.get("grsd_health/failed", 0.0) for e in monitor.outlet.sinks.sinks[0].emissions]
            if not (good and next_works and (max(told) == 1.0 or at == 4)):
                wrong.append((Path(code.co_filename).name, name_of(code), number, messages, monitor.num_failed))
    assert wrong == []
