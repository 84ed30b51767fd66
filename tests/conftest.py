"""Rules for all tests: one thread, no windows, and GPU tests wherever there is a GPU."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib, and for subprocesses

import pytest
import torch

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
