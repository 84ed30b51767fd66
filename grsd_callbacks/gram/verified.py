"""Rules that have passed their checks for a model, so that later kernels of the same graph need not repeat them.

What is remembered holds for one sequence of backward nodes, layers and shapes; anything else is checked anew. Each
kernel is certified by v^T K v = |J^T v|^2 all the same, and one that fails it forgets what was remembered. That sees
the total only, so after some kernels each rule is checked anew.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import nn

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.gram.capture import Record, Uses

#: by parameter, its uses: (index of the call in the record, role, layout)
_Remembered = dict[str, list[tuple[int, str, tuple[int, int]]]]


@dataclass
class _Entry:
    """What passed for one graph, and how often it was relied on since."""

    uses: _Remembered
    recalls: int = 0


#: by model and graph
_MEMORIES: WeakKeyDictionary[nn.Module, dict[Hashable, _Entry]] = WeakKeyDictionary()
#: graphs remembered for one model; a model of ever new shapes does not grow without bound
_MOST = 16
#: kernels in a row that rely on what is remembered
RECALLS = 10


def remembered(function: ModelFunction, record: Record) -> Uses | None:
    """The uses that passed for this graph, with their calls' layouts settled; None if it was not seen."""
    memory = _MEMORIES.get(function.model)
    entry = memory.get(_signature(function, record)) if memory else None
    if entry is None or entry.recalls >= RECALLS:
        return None
    found = entry.uses
    if not all(record.calls[i].unchanged for uses in found.values() for i, _, _ in uses):
        return None
    entry.recalls += 1
    for uses in found.values():
        for index, _, layout in uses:
            record.calls[index].settle(layout)
    return {name: [(record.calls[index], role) for index, role, _ in uses] for name, uses in found.items()}


def remember(function: ModelFunction, record: Record, uses: Uses) -> None:
    """Keep the uses that have passed."""
    memory = _MEMORIES.setdefault(function.model, {})
    index = {call: i for i, call in enumerate(record.calls)}
    found = {name: [(index[call], role, call.layout) for call, role in pairs] for name, pairs in uses.items()}
    memory.pop(signature := _signature(function, record), None)
    while len(memory) >= _MOST:
        memory.pop(next(iter(memory)))
    memory[signature] = _Entry(found)


def forget(function: ModelFunction) -> None:
    """Drop what is remembered for a model."""
    _MEMORIES.pop(function.model, None)


def _signature(function: ModelFunction, record: Record) -> Hashable:
    calls = tuple((type(call.module), *sorted(call.names.items()), call.shape) for call in record.calls)
    return function.mode, function.dtype, tuple(function.parameters), record.outputs.shape, calls, record.structure
