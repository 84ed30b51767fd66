"""How much memory a computation may hold, what a graph holds, and when memory has run out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: bytes of retained graphs that products may hold by default, beside O(P + m) numbers per vector
GRAPH_MEMORY = 2**30
#: numbers of a matrix that are worked on at a time where copies of the whole are to be avoided
BLOCK = 2**18
#: bytes from which numpy asks the system for huge pages, and those an array is aligned to
_HUGE = 2**22
_ALIGNMENT = 64


def graph_memory(device: torch.device) -> int:
    """The default bound: `GRAPH_MEMORY`, or a quarter of what is free on the GPU if that is more."""
    if device.type != "cuda":
        return GRAPH_MEMORY
    return max(GRAPH_MEMORY, torch.cuda.mem_get_info(device)[0] // 4)


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised numbers of the dtype and on the device of `like`, in huge pages where a CPU offers them.

    The first touch of fresh memory costs as much as many passes over it, and several times less by huge pages. Torch
    asks for them only under THP_MEM_ALLOC_ENABLE=1, numpy always.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < _HUGE:
        return like.new_empty(shape)
    try:
        raw = torch.from_numpy(np.empty(size + _ALIGNMENT, dtype=np.uint8))
    except MemoryError:  # torch says the same in its own words
        return like.new_empty(shape)
    start = -raw.data_ptr() % _ALIGNMENT
    return raw[start : start + size].view(like.dtype).view(shape)


def row_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Rows of a matrix in turn, about `BLOCK` numbers at a time."""
    height = max(1, BLOCK // max(num_columns, 1))
    return (slice(start, min(start + height, num_rows)) for start in range(0, num_rows, height))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on any device."""
    message = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in message or "can't allocate" in message


def graph_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of all that was computed on the way to some tensors, each once: more, as a rule, than their graphs hold.

    For where `SavedBytes` is refused. Nodes that do not say what they made (nested tensors) count nothing.
    """
    stack: list[Any] = [t.grad_fn for t in tensors if t is not None and t.grad_fn is not None]
    seen, total = set(stack), 0
    while stack:
        node = stack.pop()
        for made in () if hasattr(node, "variable") else getattr(node, "_input_metadata", ()):
            shape = tuple(made.shape)
            total += math.prod(shape) * made.dtype.itemsize if all(type(size) is int for size in shape) else 0
        further = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= further
        stack += further
    return total


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that graphs built inside it hold, each storage once.

    Args:
        known: tensors that exist anyway (parameters, buffers, inputs) and are not counted.

    Attributes:
        total: bytes so far.

    Example:
        >>> x = torch.ones(1000, requires_grad=True)
        >>> with SavedBytes([x]) as saved:
        ...     y = (x.exp() * 2).sum()  # exp keeps its result
        >>> saved.total
        4000
    """

    def __init__(self, known: Iterable[Any] = ()) -> None:
        self.total = 0
        self._held = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in known if isinstance(t, Tensor)}
        super().__init__(self._pack, lambda tensor: tensor)

    def __enter__(self) -> SavedBytes:  # type: ignore[override]
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._held:
                self._held[storage.data_ptr()] = storage  # kept, so that no later tensor gets the same address
                self.total += storage.nbytes()
        return tensor
