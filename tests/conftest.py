"""Rules for all tests: one thread, no windows, and GPU tests wherever there is a GPU."""

import logging
import os

os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib, and for subprocesses

import pytest
import torch

import grsd_callbacks.sinks
from grsd_callbacks.notice import LOGGER

torch.set_num_threads(1)  # the same summation order on every machine; more only wait for each other in tests this small


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
