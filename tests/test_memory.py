"""What counts as running out of memory, and how the bytes of a graph are counted."""

import pytest
import torch

from grsd_callbacks.memory import GRAPH_MEMORY, SavedBytes, graph_memory, is_out_of_memory


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
