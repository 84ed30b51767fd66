"""The exact kernel in parts: each of several processes sums its own terms, and the parts add up to the kernel.

    J J^T = sum over parts of (sum over the part's parameters p of J_p J_p^T)

Every process records the forward and the checks on the whole batch; backward passes stop at the earliest layer that
the process needs, and each term is contracted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.gram import _LEAST_MEMORY, Gram, _Computation
from grsd_callbacks.gram.checks import Reference
from grsd_callbacks.gram.sweep import Irregular
from grsd_callbacks.gram.terms import Term
from grsd_callbacks.losses import wide_dtype
from grsd_callbacks.memory import is_out_of_memory


@dataclass(frozen=True, eq=False)
class PartialGram:
    """One process's share of the kernel.

    Attributes:
        matrix: sum over its terms, shape (m, m), symmetric; zeros if it has none.
        plan: all terms of all processes, the same everywhere if the parts fit; None if the kernel cannot be divided.
        memory_limit: the limit that was kept.
        paths, num_unused, reference: as for the whole kernel.
    """

    matrix: Tensor
    plan: tuple[str, ...] | None
    memory_limit: int
    paths: dict[str, str]
    num_unused: int
    reference: Reference | None

    def total(self, matrix: Tensor) -> Gram:
        """The kernel, given the sum of all parts, with the check gap of the whole."""
        assert self.reference is not None
        return Gram(matrix, self.paths, self.num_unused, None, self.reference.gap(matrix))


def partial_gram(
    function: ModelFunction,
    inputs: Any,
    rank: int,
    size: int,
    *,
    memory_limit: int | None = None,
    sums: torch.dtype | None = None,
) -> PartialGram:
    """Part `rank` of `size` of `exact_gram`, terms shared out by their multiplications.

    Cost: the checks and the backward passes of `exact_gram`; about 1 / size of its contractions.
    """
    while True:
        computation = _Computation(function, inputs, memory_limit, None, sums)
        try:
            return function.run(partial(_partial, computation, rank, size))
        except RuntimeError as error:
            if not is_out_of_memory(error) or computation.memory_limit <= _LEAST_MEMORY:
                raise
        memory_limit = max(_LEAST_MEMORY, computation.memory_limit // 2)


def _partial(computation: _Computation, rank: int, size: int) -> PartialGram:
    function = computation.function
    whole, limit = computation.record(), computation.memory_limit
    m, unused = whole.outputs.numel(), len(whole.unused)
    if not function.interacting and (function.mode == "eval" or computation._independent()):
        reference, uses = computation._check(whole)
        try:
            terms = computation._terms(whole, uses)
            gram = computation._assemble(share_out(terms, size)[rank], whole, reference)
            plan = tuple(f"{term.path} {term.names} {term.kept} {term.operations:.0f}" for term in terms)
            return PartialGram(gram.matrix, plan, limit, computation._paths(terms), unused, reference)
        except Irregular:
            pass
    empty = torch.zeros(m, m, dtype=wide_dtype(function.device), device=function.device)
    return PartialGram(empty, None, limit, {}, unused, None)


def share_out(terms: list[Term], size: int) -> list[list[Term]]:
    """Terms for each of `size` processes, the dearest first to whoever has least, each part in the given order."""
    loads, owner = [0.0] * size, [0] * len(terms)
    for index in sorted(range(len(terms)), key=lambda i: -terms[i].operations):
        owner[index] = min(range(size), key=lambda r: (loads[r], r))
        loads[owner[index]] += terms[index].operations
    return [[term for term, who in zip(terms, owner) if who == rank] for rank in range(size)]
