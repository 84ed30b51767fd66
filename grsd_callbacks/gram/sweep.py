"""Backward passes for the gradients of many outputs at the layers' outputs, within a memory bound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.gram.capture import Record, record
from grsd_callbacks.gram.expanded import rows_of
from grsd_callbacks.gram.terms import Term
from grsd_callbacks.layers import Call, SpatialCall
from grsd_callbacks.memory import is_out_of_memory
from grsd_callbacks.probe import take

#: numbers at the layers' outputs, all samples, below which one backward pass over copies of the samples beats C passes
OVERHEAD_BOUND = {"cpu": 2**16}
_OVERHEAD_BOUND_ELSEWHERE = 2**22
#: numbers in many samples' gradients above which the samples one by one are faster (they stay in the cache)
EXPANDED_BOUND = {"cpu": 2**21}
_LEAST_EXPANDED = 8
#: columns held at a time, at least, for terms that multiply them with the forward's factor
_COLUMNS_TO_MULTIPLY = 2
#: tensors as large as the widest in the graph that a pass over several columns may hold beside what it returns
_TRANSIENT = 3


class Irregular(RuntimeError):
    """The samples cannot be taken apart."""


class Sweeper:
    """Feeds terms with gradients: forward on some samples, one backward per output column.

    Args:
        function, inputs: the model and the batch, n samples.
        whole: the recorded forward on all samples.
        memory_limit: bytes of gradients held before the terms take what they keep.
    """

    def __init__(self, function: ModelFunction, inputs: Any, whole: Record, memory_limit: int) -> None:
        self.function, self.inputs = function, inputs
        self.n, self.width = whole.outputs.shape
        self.device, self.itemsize = whole.outputs.device, whole.outputs.element_size()
        self.keys, self.widest = _keyed(whole.calls), whole.widest
        self.memory_limit = memory_limit
        self.refused = False  # to pull several columns at once

    def run(self, terms: list[Term], whole: Record | None) -> None:
        """One sweep: every term takes its gradients for every sample and output; `whole` saves a forward."""
        calls, leaves = _sources(terms)
        numel = sum(call.numel for call in calls) // self.n
        if leaves and not calls and self.n > 1 and self._by_expanded_leaves(terms, leaves):
            return
        if self._is_overhead_bound(numel, leaves):
            at_calls = self._by_copies(calls)
            for term in terms:
                term.take(slice(0, self.n), slice(0, self.width), at_calls, {})
            return
        for graph, samples, columns in self._parts(self._chunks(terms), whole):
            self._feed(terms, graph, samples, columns)

    def _is_overhead_bound(self, numel: int, leaves: list[str]) -> bool:
        bound = OVERHEAD_BOUND.get(self.function.device.type, _OVERHEAD_BOUND_ELSEWHERE)
        fits = 4 * self.n * numel * self.width * self.itemsize <= self.memory_limit
        return not leaves and self.width > 2 and self.n * numel <= bound and fits

    def _by_copies(self, calls: list[Call]) -> dict[Call, Tensor]:
        """All columns in one backward pass: every sample C times, each copy for one output."""
        index = torch.arange(self.n, device=self.device).repeat_interleave(self.width)
        copies = self._record(index, len(index))
        targets = torch.eye(self.width, dtype=copies.outputs.dtype, device=self.device).repeat(self.n, 1)
        g = _pull(copies, calls, self._match(copies), [], targets.unsqueeze(0), retain=False)
        split = {call: call.split(x, len(index)) for call, x in zip(calls, g)}
        return {call: x.view(self.n, self.width, *x.shape[2:]) for call, x in split.items()}

    def _by_expanded_leaves(self, terms: list[Term], leaves: list[str]) -> bool:
        """Parameters' own gradients for many samples at a time; False if vmap refuses the model or does not pay."""
        numel = sum(self.function.parameters[name].numel() for name in leaves)
        most = EXPANDED_BOUND.get(self.function.device.type, self.memory_limit // self.itemsize)
        chunk = min(self.n, most // numel, self.memory_limit // (self.itemsize * numel))
        if chunk < min(self.n, _LEAST_EXPANDED):
            return False
        try:
            for i in range(0, self.n, chunk):
                samples = slice(i, min(i + chunk, self.n))
                for column, rows in rows_of(self.function, self.inputs, self.n, leaves, samples):
                    at_leaves = {name: g.unsqueeze(1) for name, g in rows.items()}
                    for term in terms:
                        term.take(samples, slice(column, column + 1), {}, at_leaves)
        except Exception as error:  # a foreign forward under a transform may raise anything
            if is_out_of_memory(error):
                raise
            return False
        return True

    def _parts(self, chunks: tuple[int, int], whole: Record | None) -> Iterator[tuple[Record, slice, slice]]:
        """Samples with their graph, and some of their output columns."""
        chunk, columns = chunks
        for i in range(0, self.n, chunk):
            samples = slice(i, min(i + chunk, self.n))
            graph = whole if whole is not None and chunk >= self.n else self._record(samples, samples.stop - i)
            for c in range(0, self.width, columns):
                yield graph, samples, slice(c, min(c + columns, self.width))

    def _record(self, index: Any, count: int) -> Record:
        """The forward of a part of the batch; `Irregular` for a model that does not run on parts."""
        try:
            return record(self.function, take(self.inputs, index, self.n), count)
        except (ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, (torch.OutOfMemoryError, Irregular)) or "out of memory" in str(error):
                raise
            raise Irregular(f"the model does not run on {count} samples: {error}") from error

    def keeps_whole(self, terms: list[Term]) -> bool:
        """Whether a sweep over these terms runs on the graph of the whole batch."""
        return self._chunks(terms)[0] >= self.n

    def _chunks(self, terms: list[Term]) -> tuple[int, int]:
        """Samples per forward and columns held at a time; parameters' own gradients need samples alone.

        Terms that multiply as they go want many columns at once, the others many samples.
        """
        calls, leaves = _sources(terms)
        transient = _TRANSIENT * self.widest // self.n
        if not self._at_once(calls):  # what passes by column is not held
            (calls, leaves), transient = _sources([term for term in terms if not term.streams]), 0
        numel = sum(call.numel for call in calls) // self.n + transient
        numel += sum(self.function.parameters[name].numel() for name in leaves)
        rows = max(1, self.memory_limit // max(self.itemsize * numel, 1))
        fewest = _COLUMNS_TO_MULTIPLY if any(term.multiplies for term in terms) else 1
        alone = any(term.leaves for term in terms)
        chunk = 1 if alone else max(1, min(self.n, rows // min(self.width, fewest)))
        return chunk, max(1, min(self.width, rows // chunk))

    def _at_once(self, calls: Sequence[Call]) -> bool:
        """Whether to pull several columns in one pass: it saves calls and copies, but images are slower on a CPU."""
        if self.refused:
            return False
        return self.function.device.type != "cpu" or not any(isinstance(call, SpatialCall) for call in calls)

    def _feed(self, terms: list[Term], graph: Record, samples: slice, columns: slice) -> None:
        """Every term takes some samples' gradients of some columns."""
        calls, leaves = _sources(terms)
        if columns.stop - columns.start > 1 and self._at_once(calls):
            try:
                pulled = self._pulled(graph, calls, leaves, columns)
            except Exception as error:  # a foreign backward under a transform may raise anything
                if is_out_of_memory(error):
                    raise
                self.refused = True
            else:
                for term in terms:
                    term.take(samples, columns, *pulled)
                return
        passing = [term for term in terms if term.streams]
        kept = [term for term in terms if not term.streams]
        gathered, wanted = _Gathered(columns.stop - columns.start), set().union(*_sources(kept))
        for row, column in enumerate(range(columns.start, columns.stop)):
            one = slice(column, column + 1)
            at_calls, at_leaves = self._pulled(graph, calls, leaves, one)
            for term in passing:
                term.take(samples, one, at_calls, at_leaves)
            gathered.put(row, wanted, at_calls, at_leaves)
        for term in kept:
            term.take(samples, columns, gathered.at_calls, gathered.at_leaves)

    def _pulled(
        self, graph: Record, calls: list[Call], leaves: list[str], columns: slice
    ) -> tuple[dict[Call, Tensor], dict[str, Tensor]]:
        """Gradients of some columns, by samples and columns, at calls and parameters."""
        n, k = len(graph.outputs), columns.stop - columns.start
        v = torch.zeros(k, *graph.outputs.shape, dtype=graph.outputs.dtype, device=graph.outputs.device)
        v.diagonal(columns.start, 0, 2).fill_(1)
        parameters = [self.function.parameters[name] for name in leaves]
        pulled = _pull(graph, calls, self._match(graph), parameters, v, retain=True)
        at_calls = {call: call.split(g, n) for call, g in zip(calls, pulled)}
        return at_calls, {name: g.unsqueeze(0) for name, g in zip(leaves, pulled[len(calls) :])}

    def _match(self, graph: Record) -> dict[Call, Call]:
        """The calls of another forward that correspond to those of the whole batch."""
        keys = _keyed(graph.calls)
        if keys.keys() != self.keys.keys():
            raise Irregular("the model calls other layers on part of the batch than on all of it")
        return {call: keys[key] for key, call in self.keys.items()}


class _Gathered:
    """Gradients of several columns, put together column by column; the samples come first in memory."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.at_calls: dict[Call, Tensor] = {}
        self.at_leaves: dict[str, Tensor] = {}

    def put(self, row: int, wanted: set[Any], at_calls: dict[Call, Tensor], at_leaves: dict[str, Tensor]) -> None:
        """Keep one column of the calls and parameters wanted."""
        for mine, theirs in ((self.at_calls, at_calls), (self.at_leaves, at_leaves)):
            for key in wanted.intersection(theirs):
                g = theirs[key]
                if key not in mine:
                    mine[key] = g.new_empty(len(g), self.k, *g.shape[2:])
                mine[key][:, row] = g[:, 0]


def _sources(terms: Sequence[Term]) -> tuple[list[Call], list[str]]:
    """The calls and parameters whose gradients the terms need, each once."""
    calls = {call: None for term in terms for call in term.calls}
    leaves = {name: None for term in terms for name in term.leaves}
    return list(calls), list(leaves)


def _keyed(calls: list[Call]) -> dict[tuple[int, int], Call]:
    """Calls by (module, how many calls of it came before)."""
    seen: dict[int, int] = {}
    keyed = {}
    for call in calls:
        index = seen.get(id(call.module), 0)
        seen[id(call.module)] = index + 1
        keyed[id(call.module), index] = call
    return keyed


def _pull(
    graph: Record, calls: list[Call], match: dict[Call, Call], parameters: list[Tensor], v: Tensor, *, retain: bool
) -> list[Tensor]:
    """v (k, n, C) pulled back to the layers' outputs and to parameters (flat), k first; what is not reached is zero."""
    here = [match[call] for call in calls]
    sources: list[Any] = [*(call.output_edge for call in here), *parameters]
    pulled = torch.autograd.grad(
        graph.outputs,
        sources,
        v if len(v) > 1 else v[0],
        retain_graph=retain,
        allow_unused=True,
        is_grads_batched=len(v) > 1,
    )
    at_calls = [_by_column(g, call.shape, v) for g, call in zip(pulled, here)]
    return at_calls + [_by_column(g, p.shape, v).flatten(1) for g, p in zip(pulled[len(here) :], parameters)]


def _by_column(g: Tensor | None, shape: torch.Size, v: Tensor) -> Tensor:
    """A gradient for every column of v, (k, *shape)."""
    if g is None:
        return v.new_zeros(len(v), *shape)
    g = g.to_dense() if g.layout != torch.strided else g
    return g if len(v) > 1 else g.unsqueeze(0)
