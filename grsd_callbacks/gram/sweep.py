"""Backward passes for the gradients of many outputs at the layers' outputs, within a memory bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.gram.capture import Record, record
from grsd_callbacks.gram.expanded import rows_of
from grsd_callbacks.gram.terms import Term
from grsd_callbacks.layers import Call
from grsd_callbacks.probe import take

#: numbers at the layers' outputs, all samples, below which one backward pass over copies of the samples beats C passes
OVERHEAD_BOUND = {"cpu": 2**16}
_OVERHEAD_BOUND_ELSEWHERE = 2**22
#: numbers in many samples' gradients above which the samples one by one are faster (they stay in the cache)
EXPANDED_BOUND = {"cpu": 2**21}
_LEAST_EXPANDED = 8
#: columns held at a time, at least, for terms that multiply them with the forward's factor
_COLUMNS_TO_MULTIPLY = 2


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
        self.keys = _keyed(whole.calls)
        self.memory_limit = memory_limit

    def run(self, terms: list[Term], whole: Record | None) -> None:
        """One sweep: every term takes its gradients for every sample and output; `whole` saves a forward."""
        calls = list({call: None for term in terms for call in term.calls})
        leaves = list(dict.fromkeys(name for term in terms for name in term.leaves))
        numel = sum(call.numel for call in calls) // self.n
        if leaves and not calls and self.n > 1 and self._by_expanded_leaves(terms, leaves):
            return
        if self._is_overhead_bound(numel, leaves):
            at_calls = self._by_copies(calls)
            for term in terms:
                term.take(slice(0, self.n), slice(0, self.width), at_calls, {})
            return
        for samples, columns, at_calls, at_leaves in self._by_columns(calls, leaves, self._chunks(terms), whole):
            for term in terms:
                term.take(samples, columns, at_calls, at_leaves)

    def _is_overhead_bound(self, numel: int, leaves: list[str]) -> bool:
        bound = OVERHEAD_BOUND.get(self.function.device.type, _OVERHEAD_BOUND_ELSEWHERE)
        fits = 4 * self.n * numel * self.width * self.itemsize <= self.memory_limit
        return not leaves and self.width > 2 and self.n * numel <= bound and fits

    def _by_copies(self, calls: list[Call]) -> dict[Call, Tensor]:
        """All columns in one backward pass: every sample C times, each copy for one output."""
        index = torch.arange(self.n, device=self.device).repeat_interleave(self.width)
        copies = self._record(index, len(index))
        targets = torch.eye(self.width, dtype=copies.outputs.dtype, device=self.device).repeat(self.n, 1)
        g = _pull(copies, calls, self._match(copies), [], targets, retain=False)
        split = {call: call.split(x.unsqueeze(0), len(index)) for call, x in zip(calls, g)}
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
            if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error) or "allocate" in str(error):
                raise
            return False
        return True

    def _by_columns(
        self, calls: list[Call], leaves: list[str], chunks: tuple[int, int], whole: Record | None
    ) -> Iterator[tuple[slice, slice, dict[Call, Tensor], dict[str, Tensor]]]:
        chunk, columns = chunks
        for i in range(0, self.n, chunk):
            samples = slice(i, min(i + chunk, self.n))
            if whole is not None and chunk >= self.n:
                graph = whole
            else:
                graph = self._record(samples, samples.stop - i)
            match = self._match(graph)
            for c in range(0, self.width, columns):
                span = slice(c, min(c + columns, self.width))
                yield samples, span, *self._gradients(graph, match, calls, leaves, span)

    def _record(self, index: Any, count: int) -> Record:
        """The forward of a part of the batch; `Irregular` for a model that does not run on parts."""
        try:
            return record(self.function, take(self.inputs, index, self.n), count)
        except (ValueError, RuntimeError) as error:
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
        calls = {call: None for term in terms for call in term.calls}
        leaves = dict.fromkeys(name for term in terms for name in term.leaves)
        numel = sum(call.numel for call in calls) // self.n
        numel += sum(self.function.parameters[name].numel() for name in leaves)
        rows = max(1, self.memory_limit // max(self.itemsize * numel, 1))
        fewest = _COLUMNS_TO_MULTIPLY if any(term.multiplies for term in terms) else 1
        chunk = 1 if leaves else max(1, min(self.n, rows // min(self.width, fewest)))
        return chunk, max(1, min(self.width, rows // chunk))

    def _gradients(
        self, graph: Record, match: dict[Call, Call], calls: list[Call], leaves: list[str], columns: slice
    ) -> tuple[dict[Call, Tensor], dict[str, Tensor]]:
        n, k = len(graph.outputs), columns.stop - columns.start
        parameters = [self.function.parameters[name] for name in leaves]
        at_calls = [_columns_inside(graph.outputs, k, match[call].shape) for call in calls]
        at_leaves = [p.new_empty(k, p.numel()) for p in parameters]
        v = torch.zeros_like(graph.outputs)
        for row in range(k):
            v[:, columns.start + row] = 1
            pulled = _pull(graph, calls, match, parameters, v, retain=True)
            for target, g in zip([*at_calls, *at_leaves], pulled):
                target[row] = g
            v[:, columns.start + row] = 0  # only now: the last layer's gradient is v itself
        return (
            {call: call.split(g, n) for call, g in zip(calls, at_calls)},
            {name: g.unsqueeze(0) for name, g in zip(leaves, at_leaves)},
        )

    def _match(self, graph: Record) -> dict[Call, Call]:
        """The calls of another forward that correspond to those of the whole batch."""
        keys = _keyed(graph.calls)
        if keys.keys() != self.keys.keys():
            raise Irregular("the model calls other layers on part of the batch than on all of it")
        return {call: keys[key] for key, call in self.keys.items()}


def _columns_inside(like: Tensor, k: int, shape: torch.Size) -> Tensor:
    """Uninitialised (k, *shape), in memory (shape[0], k, ...): as a rule the samples come first."""
    return like.new_empty(shape[0], k, *shape[1:]).transpose(0, 1) if shape else like.new_empty(k)


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
    """v pulled back to the layers' outputs and to parameters (flat); what is not reached is zero."""
    here = [match[call] for call in calls]
    sources: list[Any] = [*(call.output_edge for call in here), *parameters]
    pulled = torch.autograd.grad(graph.outputs, sources, v, retain_graph=retain, allow_unused=True)
    at_calls = [v.new_zeros(call.shape) if g is None else g for g, call in zip(pulled, here)]
    at_leaves = [
        (torch.zeros_like(p) if g is None else g.to_dense() if g.layout != torch.strided else g).reshape(-1)
        for g, p in zip(pulled[len(here) :], parameters)
    ]
    return at_calls + at_leaves
