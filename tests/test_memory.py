"""What counts as running out of memory, and how the bytes of a graph are counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from grsd_callbacks.memory import (
    BLOCK,
    GRAPH_MEMORY,
    SavedBytes,
    empty,
    graph_bytes,
    graph_memory,
    is_out_of_memory,
    row_blocks,
)


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_each_storage_is_counted_once_and_known_ones_not():
    x, w = torch.ones(10, 100), torch.ones(100, 50, requires_grad=True)
    with SavedBytes([w]) as saved:
        y = x @ w  # keeps x (w is known, and x needs no gradient)
        z = y.exp()  # keeps its result
        (z * z).sum()  # keeps z twice
    assert saved.total == 4 * (x.numel() + z.numel())


def test_the_default_bound(device):
    assert graph_memory(torch.device("cpu")) == GRAPH_MEMORY
    assert graph_memory(device) >= GRAPH_MEMORY


def test_bytes_read_off_a_graph_are_at_least_those_it_holds():
    net = torch.nn.Sequential(torch.nn.Linear(50, 100), torch.nn.Tanh(), torch.nn.Linear(100, 20))
    x = torch.ones(64, 50)
    with SavedBytes([*net.parameters(), x]) as saved:
        y = net(x)
    made = 4 * 64 * (100 + 100 + 20)  # what the three layers return
    assert (
        saved.total <= made <= graph_bytes([y, None]) <= made + 4 * 2 * (50 * 100 + 100 * 20)
    )  # and transposed weights
    assert graph_bytes([y, y * 1]) == graph_bytes([y]) + 4 * 64 * 20
    assert graph_bytes([x]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (2**10, 2**10 + 3)])
def test_empty_is_plain_memory_of_its_own(shape, dtype):
    first, second = (empty(shape, torch.zeros(1, dtype=dtype)).fill_(value) for value in (1, 2))
    assert first.shape == shape and first.dtype == dtype and first.is_contiguous()
    assert (first == 1).all() and (second == 2).all()
    assert first.data_ptr() % 64 == 0


def test_memory_that_numpy_cannot_have_is_asked_of_torch(monkeypatch):
    def refuse(*args, **options):
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    assert empty((2**11, 2**10), torch.zeros(1, dtype=torch.float64)).shape == (2**11, 2**10)


def test_memory_beyond_all_bounds_is_reported_as_torch_does():
    with pytest.raises(RuntimeError) as raised:
        empty((2**25, 2**25), torch.zeros(1, dtype=torch.float64))
    assert is_out_of_memory(raised.value)


def test_rows_come_in_blocks():
    assert list(row_blocks(3, 4)) == [slice(0, 3)] and list(row_blocks(0, 0)) == []
    assert list(row_blocks(3, BLOCK)) == [slice(0, 1), slice(1, 2), slice(2, 3)] == list(row_blocks(3, 2 * BLOCK))
    parts = list(row_blocks(1000, 1000))
    assert [row for part in parts for row in range(1000)[part]] == list(range(1000)) and len(parts) == 4


PEAK = """
import json, sys
import torch
from grsd_callbacks import ShellMonitor, method
from grsd_callbacks.gram import gram_operations

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

def run(n, how, transfer):
    x, y, net = torch.randn(n, 8), torch.randn(n, 4), torch.nn.Linear(8, 4)
    options = {"method": how, "transfer": transfer, "num_matvecs": 8, "every_n_steps": 2, "shells_per_decade": 1}
    monitor = ShellMonitor(net, "mse", (x, y), figures=False, on_error="raise", **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    base = memory("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    for step in range(6):
        monitor.step(step, optimizer=optimizer)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    assert len(monitor.history) == 3
    return memory("VmHWM") - base, gram_operations(monitor._operator().function, x).peak_bytes

how, transfer, m = sys.argv[1], sys.argv[2] == "transfer", int(sys.argv[3])
torch.manual_seed(0)
run(10, how, transfer)  # libraries
peak, kernel = run(m // 4, how, transfer)
beside = {"exact": method.EIGEN_BYTES, "lanczos": method.EIGENVALUE_BYTES}[how]
print(json.dumps([peak / (8 * m * m), (kernel + beside * m * m) / (8 * m * m)]))
"""


CASES = [("exact", ""), pytest.param("exact", "transfer", marks=pytest.mark.slow), ("lanczos", "")]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("how, transfer", CASES)
def test_a_measurement_holds_as_many_copies_of_the_kernel_as_is_estimated(how, transfer):
    """From the third one on, which holds the bases of the first and of the second."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", PEAK, how, transfer, "1400"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peak, estimate = json.loads(done.stdout)
    print(f"{how} {transfer}: {peak:.2f} copies, estimated {estimate:.2f}")
    assert -0.5 < peak - estimate < 1.3  # some 10 MB are no copies
