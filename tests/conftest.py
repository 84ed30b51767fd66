"""Rules for all tests: one thread, no windows, and GPU tests wherever there is a GPU."""

import gc
import json
import logging
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib, and for subprocesses

import pytest
import torch

import grsd_callbacks.sinks
from grsd_callbacks.notice import LOGGER

torch.set_num_threads(1)  # the same summation order on every machine; more only wait for each other in tests this small


def pytest_collection_finish():
    """What is there by now stays: else every search for garbage goes through all of it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every device that the code should work on."""
    return torch.device(request.param)


class _Kept(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        if issubclass(getattr(record, "category", UserWarning), RuntimeWarning):
            self.messages.append(record.getMessage())


@pytest.fixture(autouse=True)
def numerical_notices():
    """Warnings on numerics that nothing expected: as errors they would only be logged, so they fail the test here."""
    logger, kept = logging.getLogger(LOGGER), _Kept()
    logger.addHandler(kept)
    yield kept.messages
    logger.removeHandler(kept)
    assert kept.messages == []


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are made, but an empty picture is written: rendering takes ten times as long."""
    try:
        from PIL import Image  # comes with matplotlib
    except ImportError:
        return
    monkeypatch.setattr(grsd_callbacks.sinks, "picture", lambda figure: Image.new("RGB", (4, 3)))


#: imports what is slow to import, then runs each script that it is sent in a copy of itself
COPIES = """
import json, os, runpy, sys
import torch
torch.set_num_threads(1)
import lightning_cases, grsd_callbacks.sinks
import lightning.pytorch.loggers, torch.utils.tensorboard
for line in sys.stdin:
    script, arguments, out, err = json.loads(line)
    copy = os.fork()
    if copy == 0:
        for path, stream in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def copies():
    """The process that copies itself; None where a system cannot."""
    if not hasattr(os, "fork"):
        yield None
        return
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-W", "ignore", "-c", COPIES], subprocess.PIPE
    options = {"stdin": pipe, "stdout": pipe, "text": True, "env": environment, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        yield process
        os.killpg(process.pid, signal.SIGKILL)  # and a copy that hangs


@pytest.fixture
def process_of(copies, tmp_path_factory):
    """Runs code in a process of its own that has Lightning imported: code, arguments -> CompletedProcess."""

    def run(code, *arguments):
        folder = tmp_path_factory.mktemp("process")
        script, out, err = (folder / name for name in ("script.py", "out", "err"))
        script.write_text(code)
        words = [str(word) for word in arguments]
        if copies is None:
            command = [sys.executable, str(script), *words]
            return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        copies.stdin.write(json.dumps([str(script), words, str(out), str(err)]) + "\n")
        copies.stdin.flush()
        if not select.select([copies.stdout], [], [], 300)[0]:
            os.killpg(copies.pid, signal.SIGKILL)  # or its answer would be taken for the next one's
            pytest.fail("the process hangs")
        code = int(copies.stdout.readline())
        return subprocess.CompletedProcess([str(script), *words], code, out.read_text(), err.read_text())

    return run
