"""The exact kernel matrix J J^T, layer by layer: J is never formed as a whole, and nothing is left out.

    J J^T = sum over parameters p of J_p J_p^T

Layers that `layers` knows are contracted from their inputs and output gradients in the cheapest of three forms;
every other parameter takes explicit rows, in parts. Each call proves its own completeness: every rule against
autograd's J_p^T v, the first time a model shows its graph, and in the end v^T K v = |J^T v|^2.

Letters: n samples, C outputs per sample, m = n C rows, P parameters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.gram.capture import Record, record
from grsd_callbacks.gram.checks import Reference, checked, total_tolerance
from grsd_callbacks.gram.contraction import Accumulator
from grsd_callbacks.gram.sweep import Irregular, Sweeper
from grsd_callbacks.gram.terms import DiagonalTerm, FactoredTerm, LeafTerm, SharedTerm, Term, spans
from grsd_callbacks.gram.verified import forget, remember, remembered
from grsd_callbacks.losses import wide_dtype
from grsd_callbacks.memory import graph_memory, is_out_of_memory
from grsd_callbacks.notice import notice
from grsd_callbacks.probe import num_samples, take

#: bytes of temporaries held at a time, by default
ROW_MEMORY = 384 * 2**20
#: relative to the largest eigenvalue, the rounding of the matrix by products in a dtype
SUMS_FLOOR = {torch.float32: 3e-7, torch.float64: 1e-15}
_LEAST_MEMORY = 2**20


def row_memory(num_rows: int, num_parameters: int, dtype: torch.dtype, device: torch.device) -> int:
    """The default bound on temporaries: a quarter of J (more saves passes), from `ROW_MEMORY` to `graph_memory`."""
    return max(ROW_MEMORY, min(num_rows * num_parameters * dtype.itemsize // 4, graph_memory(device)))


def checked_sums(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype itself; ValueError unless it is one that products may be made in."""
    if not (dtype is None or (isinstance(dtype, torch.dtype) and dtype in SUMS_FLOOR)):
        raise ValueError(f"{name} must be torch.float32, torch.float64 or None, got {dtype!r}")
    return dtype


def checked_blocks(blocks: str | Mapping[str, str] | None, function: ModelFunction) -> None:
    """ValueError unless `blocks` says to which block each parameter belongs."""
    if isinstance(blocks, Mapping):
        missing = [name for name in function.parameters if name not in blocks]
        if missing:
            raise ValueError(f"blocks must name the block of every measured parameter, it lacks {missing[:3]}")
    elif blocks not in (None, "parameter", "module"):
        raise ValueError(f"blocks must be None, 'parameter', 'module' or a mapping of parameters, got {blocks!r}")


@dataclass(frozen=True, eq=False)
class Gram:
    """The exact J J^T and how it was computed.

    Attributes:
        matrix: J J^T, shape (m, m), float64 where the device has it, symmetric.
        paths: for every parameter name, the form its contribution took ("unused": it has none).
        num_unused: parameters whose gradient is identically zero on the probe (zero columns of J).
        blocks: J_p J_p^T by parameter, module or block, if asked for; they sum to `matrix`.
        check_gap: |v^T K v - |J^T v|^2| / |J^T v|^2 for a random v.
    """

    matrix: Tensor
    paths: dict[str, str]
    num_unused: int
    blocks: dict[str, Tensor] | None = None
    check_gap: float = float("nan")


@dataclass(frozen=True)
class GramEstimate:
    """What `exact_gram` would cost, passes over f not counted.

    Attributes:
        operations: multiplications, those of small or float32 products counted by their measured rates.
        peak_bytes: at the peak, beside model and inputs: matrix, graph, and what a sweep keeps, gathers and copies.
        paths: for every parameter name, the form its contribution takes.
    """

    operations: float
    peak_bytes: int
    paths: dict[str, str]


def exact_gram(
    function: ModelFunction,
    inputs: Any,
    *,
    memory_limit: int | None = None,
    blocks: str | Mapping[str, str] | None = None,
    sums: torch.dtype | None = None,
) -> Gram:
    """J J^T of a model on a batch, accumulated in float64.

    Args:
        function: the model as a function of its parameters.
        inputs: the batch, n samples.
        memory_limit: bytes of temporaries held at a time (gradients, rows, float64 copies), beside the matrix
            and the graph of one forward on the batch; None: `row_memory`. Smaller is slower, never different. Where
            memory runs out all the same it is halved, as often as needed.
        blocks: also return the kernels of "parameter"s, of "module"s, or of the blocks named for every parameter in
            a mapping, m^2 numbers each.
        sums: dtype of the products that are added up in float64; None is float64 where the device has it.

    Returns:
        The kernel, and by which form each parameter entered it.

    Raises:
        ValueError: `blocks` is unknown or lacks a parameter; outputs that are not (n, ...) or do not depend on the
            parameters.

    Warns:
        RuntimeWarning: the structured kernel failed its check (samples that interact, say) and was recomputed
            from explicit rows.

    Cost: three passes over the batch (two for a graph seen before), C backward passes; then per layer, by measured
        rates, the least of m^2 p q + m T p q (rows), m^2 q + n^2 p (one position) and n^2 T^2 p + n m T^2 q + m^2 T q
        (T positions), squares halved by symmetry. Parameters without a rule add C backward passes under
        `torch.func.vmap` (where it refuses, or they are large, m on single samples), and m^2 times their number.

    Accuracy: gradients in the model's dtype, all sums over parameters in float64: eigenvalues right to the
        dtype's rounding of J, so small ones to about eps (lambda_max / lambda)^(1/2) of themselves. With `sums` in
        float32 the matrix itself is rounded: eigenvalues are noise below `SUMS_FLOOR` of the largest.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> found = exact_gram(ModelFunction(net), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> found.matrix.tolist()  # f = w . x + b, so J J^T = x . y + 1
        [[26.0, 4.0], [4.0, 2.0]]
        >>> found.check_gap < 1e-6, found.num_unused
        (True, 0)
    """
    checked_blocks(blocks, function)
    checked_sums("sums", sums)
    while True:
        computation = _Computation(function, inputs, memory_limit, blocks, sums)
        try:
            return function.run(computation.gram)
        except RuntimeError as error:
            if not is_out_of_memory(error) or computation.memory_limit <= _LEAST_MEMORY:
                raise
        memory_limit = max(_LEAST_MEMORY, computation.memory_limit // 2)


def gram_operations(
    function: ModelFunction, inputs: Any, *, memory_limit: int | None = None, sums: torch.dtype | None = None
) -> GramEstimate:
    """Multiplications and peak memory of `exact_gram`, from one recorded forward.

    Cost: one forward and the two backward passes of the checks.
    """
    return function.run(_Computation(function, inputs, memory_limit, None, sums).estimate)


class _Computation:
    """One kernel: record, check, plan, sweep, contract, certify."""

    def __init__(
        self,
        function: ModelFunction,
        inputs: Any,
        memory_limit: int | None,
        blocks: str | Mapping[str, str] | None,
        sums: torch.dtype | None = None,
    ) -> None:
        self.function, self.inputs = function, inputs
        self.memory_limit, self.blocks = memory_limit or 0, blocks  # 0: not known before the number of rows is
        self.wide = wide_dtype(function.device)
        self.sums = sums or self.wide
        self.n = num_samples(inputs)
        self.recalled = False  # whether the rules were checked at an earlier call
        self.tolerance = total_tolerance(function.dtype, self.sums)

    def record(self) -> Record:
        """One forward on the batch; with it, what memory may be held."""
        whole = record(self.function, self.inputs, self.n)
        if not self.memory_limit:
            m, P = whole.outputs.numel(), self.function.num_parameters
            self.memory_limit = row_memory(m, P, self.function.dtype, self.function.device)
        return whole

    def estimate(self) -> GramEstimate:
        whole = self.record()
        terms = self._terms(whole, self._check(whole)[1])
        return GramEstimate(sum(term.operations for term in terms), self._peak(terms, whole), self._paths(terms))

    def _peak(self, terms: list[Term], whole: Record) -> int:
        """Bytes of the matrix, the graph, what a sweep keeps and gathers, and the float64 copies."""
        m, size = whole.outputs.numel(), whole.outputs.element_size()
        graph = 2 * size * sum(call.numel for call in whole.calls)
        groups = _packed(terms, self._most(whole))
        kept = max((sum(term.kept for term in group) for group in groups), default=0) * m * size
        gathered = min(self.memory_limit // 4, graph * m // max(self.n, 1))
        copies = min(self.memory_limit // 4, 12 * m * max((term.kept for term in terms), default=0))
        return 8 * m * m + graph + kept + gathered + copies

    def gram(self) -> Gram:
        if self.function.interacting or (self.function.mode != "eval" and not self._independent()):
            whole = self.record()
            return self._interacting(whole, self._check(whole)[0])
        for _ in range(2):
            reference, gram, why = self._structured()
            if gram is not None and self._complete(gram):
                return gram
            forget(self.function)  # and check again: the model may have changed since it was checked
            if not self.recalled:
                break
        if gram is not None:
            why = f"v^T K v misses |J^T v|^2 by {gram.check_gap:.1e} (relative)"
        gram = self._by_rows(reference)
        notice(
            f"the structured kernel is not complete for this model ({why}); it was recomputed from explicit rows "
            f"({next(iter(gram.paths.values()))}), check gap {gram.check_gap:.1e}",
            RuntimeWarning,
        )
        return gram

    def _structured(self) -> tuple[Reference, Gram | None, str]:
        whole = self.record()
        reference, uses = self._check(whole)
        try:
            return reference, self._assemble(self._terms(whole, uses), whole, reference), ""
        except Irregular as error:
            return reference, None, str(error)

    def _by_rows(self, reference: Reference) -> Gram:
        """Every parameter by explicit rows: of single samples if they are independent, else of the whole batch."""
        whole = self.record()
        if self._independent():
            try:
                gram = self._assemble(self._leaf_terms(list(self.function.parameters), whole), whole, reference)
            except Irregular:
                gram = None
            if gram is not None and self._complete(gram):
                return gram
        return self._interacting(self.record(), reference)

    def _complete(self, gram: Gram | None) -> bool:
        return gram is not None and gram.check_gap <= self.tolerance

    def _interacting(self, whole: Record, reference: Reference) -> Gram:
        """Explicit rows on the graph of the whole batch: one "sample" of m outputs."""
        one = replace(whole, outputs=whole.outputs.reshape(1, -1), calls=[], uses={})
        reference = replace(reference, v=reference.v.reshape(1, -1))
        names = [name for name in self.function.parameters if name not in whole.unused]
        gram = self._assemble(self._leaf_terms(names, one), one, reference)
        return replace(gram, paths={k: "rows:interacting" if p == "rows" else p for k, p in gram.paths.items()})

    def _independent(self) -> bool:
        """Whether the first half of the samples gives the same outputs without the rest."""
        half = slice(0, (self.n + 1) // 2)
        try:
            with torch.no_grad():
                whole = self.function.outputs(self.inputs)
                part = self.function.outputs(take(self.inputs, half, self.n))
        except (ValueError, RuntimeError, IndexError):  # nodes of a graph, say
            return False
        eps = torch.finfo(whole.dtype).eps
        return torch.allclose(whole[half], part, rtol=100 * eps**0.5, atol=eps**0.5, equal_nan=True)

    def _check(self, whole: Record) -> tuple[Reference, dict[str, Any]]:
        known = remembered(self.function, whole)
        reference, uses, has_told = checked(whole, self.function, self.memory_limit // 2, known)
        self.recalled = known is not None
        if has_told and not self.recalled:
            remember(self.function, whole, uses)
        return reference, uses

    # -- plan --------------------------------------------------------------------------------------------

    def _terms(self, whole: Record, uses: dict[str, Any]) -> list[Term]:
        """The cheapest form of every parameter that reaches the outputs."""
        most = self._most(whole)
        n, width = whole.outputs.shape
        terms: list[Term] = []
        joined: set[str] = set()
        for name, pairs in uses.items():
            call, role = pairs[0]
            if len(pairs) == 1 and call.is_factored(role):
                if call.positions:
                    new = self._factored(call, name, uses, width, most)
                    joined.update(new[0].names[1:])
                    terms += new
        for name, pairs in uses.items():
            call, role = pairs[0]
            parameter = self.function.parameters[name]
            if name in joined or (len(pairs) == 1 and call.is_factored(role)):
                continue
            if not any(c.is_factored(r) for c, r in pairs):
                terms.append(DiagonalTerm(pairs, name, n, width, parameter.numel()))
                continue
            for span in spans(parameter.shape[0], parameter[0].numel(), most):
                terms.append(SharedTerm(pairs, name, n, width, parameter.shape, span))
        rest = [name for name in self.function.parameters if name not in uses and name not in whole.unused]
        depth = {call: index for index, call in enumerate(whole.calls)}
        terms.sort(key=lambda term: min(depth[call] for call in term.calls))
        return self._leaf_terms(rest, whole) + terms

    def _factored(self, call: Any, name: str, uses: dict[str, Any], width: int, most: int) -> list[FactoredTerm]:
        n = self.n
        term = FactoredTerm(call, [name], n, width, self.sums)
        bias = call.names.get("bias")
        joint = (
            bias is not None
            and self._key(bias) == self._key(name)
            and term.method != "rows"
            and call.path in ("linear", "conv")
        )
        names = [name, bias] if joint and bias in uses and len(uses[bias]) == 1 else [name]
        parts = spans(call.q, term.kept // call.q, most)
        return [FactoredTerm(call, names, n, width, self.sums, span) for span in parts]

    def _leaf_terms(self, names: list[str], whole: Record) -> list[Term]:
        n, width = whole.outputs.shape
        sizes = {name: self.function.parameters[name].numel() for name in names}
        most = self._most(whole)
        return [LeafTerm(name, n, width, span, size) for name, size in sizes.items() for span in spans(size, 1, most)]

    def _most(self, whole: Record) -> int:
        """Numbers per row of J that terms may keep in one sweep."""
        return max(1, 3 * self.memory_limit // (4 * whole.outputs.numel() * whole.outputs.element_size()))

    # -- work --------------------------------------------------------------------------------------------

    def _assemble(self, terms: list[Term], whole: Record, reference: Reference) -> Gram:
        n, width = whole.outputs.shape
        sweeper = Sweeper(self.function, self.inputs, whole, self.memory_limit // 4)
        groups = _packed(terms, self._most(whole))
        held = any(sweeper.keeps_whole(group) for group in groups)
        if not held:
            whole.release()
        totals: dict[str, Accumulator] = {}
        remaining = Counter(self._key(term.names[0]) for term in terms)
        matrices: dict[str, Tensor] = {}
        for group in groups:
            sweeper.run(group, whole if held and sweeper.keeps_whole(group) else None)
            for term in group:
                key = self._key(term.names[0])
                if key not in totals:
                    totals[key] = self._accumulator(n, width)
                term.contract(totals[key])
                remaining[key] -= 1
                if not remaining[key]:
                    matrices[key] = totals.pop(key).finish()
        if not matrices:
            matrices[""] = self._accumulator(n, width).finish()
        first, *others = matrices.values()
        matrix = first.clone() if others else first
        for other in others:
            matrix += other
        blocks = matrices if self.blocks is not None else None
        return Gram(matrix, self._paths(terms), len(whole.unused), blocks, reference.gap(matrix))

    def _accumulator(self, n: int, width: int) -> Accumulator:
        return Accumulator(n, width, (self.wide, self.sums), self.function.device, self.memory_limit // 8)

    def _key(self, name: str) -> str:
        """The block of a parameter."""
        if isinstance(self.blocks, Mapping):
            return self.blocks[name]
        return {"parameter": name, "module": name.rpartition(".")[0]}.get(self.blocks or "", "")

    def _paths(self, terms: list[Term]) -> dict[str, str]:
        paths = {name: term.path for term in terms for name in term.names}
        return {name: paths.get(name, "unused") for name in self.function.parameters}


def _packed(terms: list[Term], most: int) -> list[list[Term]]:
    """Groups of consecutive terms, latest layers first, that keep at most `most` numbers per row together.

    Terms on parameters' own gradients form groups of their own.
    """
    groups: list[list[Term]] = []
    total = 0
    for term in reversed(terms):
        if not groups or total + term.kept > most or bool(term.leaves) != bool(groups[-1][0].leaves):
            groups.append([])
            total = 0
        groups[-1].append(term)
        total += term.kept
    return groups
