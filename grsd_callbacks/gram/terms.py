"""Terms of the kernel: J J^T = sum of J_p J_p^T over parameters p, each by its cheapest form.

A term says how much it keeps from the backward passes, takes it as they go by, and adds its product at the end.

Letters: n samples, C outputs per sample, m = n C, T positions, G groups, p and q the sizes of the factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grsd_callbacks.factors import products
from grsd_callbacks.gram.contraction import triangle
from grsd_callbacks.layers import Call

if TYPE_CHECKING:
    from grsd_callbacks.gram.contraction import Accumulator


@dataclass(frozen=True)
class Rates:
    """Costs in multiplications of one large float64 product, measured on one core (AVX-512), alike for MKL elsewhere.

    Attributes:
        large: a multiplication in a product over all samples.
        small: a multiplication in the products of single samples' positions.
        row: a multiplication in the float32 products of single samples that make explicit rows.
        copy: writing an entry of a row, and again where it is widened.
        touch: an elementwise pass over an entry.
    """

    large: float = 1.0
    small: float = 1.8
    row: float = 0.6
    copy: float = 30.0
    touch: float = 8.0


#: by dtype of the products
RATES = {torch.float64: Rates(), torch.float32: Rates(large=0.5, small=0.65, copy=12.0, touch=4.0)}


class Term:
    """One or more parameters' share of the kernel.

    Attributes:
        names: parameters it covers.   path: the form it takes, for people.
        calls, leaves: whose gradients it needs.
        kept: numbers kept per row of J.   operations: multiplications of the whole term.
        multiplies: whether `take` multiplies with the forward's factor.
        streams: whether it takes single columns as well as many, so that nothing need be held for it.
    """

    names: list[str]
    path: str
    calls: list[Call]
    leaves: list[str]
    kept: int
    operations: float
    multiplies = False
    streams = False

    def take(self, samples: slice, columns: slice, g: dict[Call, Tensor], leaves: dict[str, Tensor]) -> None:
        """Keep what is needed from the gradients of some samples and output columns."""
        raise NotImplementedError

    def contract(self, total: Accumulator) -> None:
        """Add the term's product to the kernel and forget what was kept."""
        raise NotImplementedError


class _Store:
    """An array (n, C, ...) filled in parts; the parts' own memory where one part is all of it."""

    def __init__(self, n: int, width: int) -> None:
        self.n, self.width = n, width
        self.value: Tensor | None = None

    def put(self, samples: slice, columns: slice, part: Tensor, *, owned: bool = True) -> None:
        if part.shape[:2] == (self.n, self.width):
            self.value = part if owned else part.clone()
            return
        if self.value is None:
            self.value = _same_order(part, (self.n, self.width))
        self.value[samples, columns] = part

    def pop(self) -> Tensor:
        value, self.value = self.value, None
        assert value is not None
        return value


def _same_order(part: Tensor, lead: tuple[int, int]) -> Tensor:
    """Uninitialised (*lead, *rest), last two dimensions in the memory order of `part`."""
    rest = part.shape[2:]
    if part.dim() > 3 and part.stride(-1) > 1:
        return part.new_empty(*lead, *rest[:-2], rest[-1], rest[-2]).mT
    return part.new_empty(*lead, *rest)


class FactoredTerm(Term):
    """A weight with one call: outer products, pairs of positions, or explicit rows, whichever is cheapest."""

    def __init__(
        self, call: Call, names: list[str], n: int, width: int, sums: torch.dtype, span: slice = slice(None)
    ) -> None:
        self.call, self.names, self.calls, self.leaves = call, names, [call], []
        self.n, self.span = n, span
        self.method, self.operations = cheapest(call, n, width, RATES[sums])
        self.rows_at_once = self.method == "rows" and call.p < call.positions
        self.multiplies = self.rows_at_once
        self.kept = call.G * len(range(*span.indices(call.q))) * (call.p if self.rows_at_once else call.positions)
        self.path = call.path if self.method == "outer" else f"{call.path}:{self.method}"
        self._store = _Store(n, width)

    def take(self, samples: slice, columns: slice, g: dict[Call, Tensor], leaves: dict[str, Tensor]) -> None:
        """Rows of the layer, or the output gradients themselves where those are fewer numbers."""
        right = self.call.right(g[self.call])[..., self.span]
        kept = products(right, self.call.left(samples, self.n)) if self.rows_at_once else right
        self._store.put(samples, columns, kept, owned=self.span == slice(None))

    def contract(self, total: Accumulator) -> None:
        """By the method chosen."""
        kept = self._store.pop()
        everyone, plus_one = slice(None), len(self.names) > 1
        if self.rows_at_once:
            total.rows(kept)
        elif self.method == "outer":
            total.outer(self.call.left(everyone, self.n)[:, 0, 0], kept[:, :, 0, 0], plus_one)
        elif self.method == "positions":
            total.positions(lambda samples: self.call.left(samples, self.n)[:, 0], kept[:, :, 0], plus_one)
        else:
            self._rows(total, kept)

    def _rows(self, total: Accumulator, right: Tensor) -> None:
        """Explicit rows, some outputs q at a time, dropped after use."""
        call, (n, width, *_, q) = self.call, right.shape
        size = call.G * call.p * right.element_size()
        samples = max(1, min(n, total.memory_limit // (2 * call.positions * size)))
        left = call.left(slice(None), n) if samples == n else None
        step = max(1, min(q, total.memory_limit // (n * width * size)))
        for start in range(0, q, step):
            part = right[..., start : start + step]
            if left is not None:
                total.rows(products(part, left))
                continue
            chunks = [slice(i, i + samples) for i in range(0, n, samples)]
            total.rows(torch.cat([products(part[s], call.left(s, n)) for s in chunks]))


class DiagonalTerm(Term):
    """Biases and norms' weights: one number per channel, summed over all uses."""

    streams = True

    def __init__(self, uses: list[tuple[Call, str]], name: str, n: int, width: int, numel: int) -> None:
        self.uses, self.names, self.calls, self.leaves = uses, [name], [call for call, _ in uses], []
        self.n, self.kept = n, numel
        self.path = "bias" if uses[0][1] == "bias" else uses[0][0].path
        self.operations = triangle(n, width) * (n * width) ** 2 * numel
        self._store = _Store(n, width)
        self._scales: tuple[slice, list[Tensor | None]] | None = None

    def take(self, samples: slice, columns: slice, g: dict[Call, Tensor], leaves: dict[str, Tensor]) -> None:
        """The rows themselves."""
        scales = self._scales_of(samples)
        rows = [call.diagonal(role, g[call], samples, self.n, x) for (call, role), x in zip(self.uses, scales)]
        self._store.put(samples, columns, rows[0] if len(rows) == 1 else torch.stack(rows).sum(0))

    def _scales_of(self, samples: slice) -> list[Tensor | None]:
        """What the weights multiply, kept from column to column."""
        if self._scales is None or self._scales[0] != samples:
            found = [None if role == "bias" else call.normalised(samples, self.n) for call, role in self.uses]
            self._scales = samples, found
        return self._scales[1]

    def contract(self, total: Accumulator) -> None:
        """Rows times rows."""
        self._scales = None
        total.rows(self._store.pop())


class SharedTerm(Term):
    """A weight with several uses (a tied head, a layer called twice): explicit rows, summed over the uses."""

    path = "shared:rows"
    multiplies = True

    def __init__(
        self, uses: list[tuple[Call, str]], name: str, n: int, width: int, shape: torch.Size, span: slice
    ) -> None:
        self.uses, self.names, self.calls, self.leaves = uses, [name], [call for call, _ in uses], []
        self.n, self.shape, self.span = n, shape, span
        self.kept = len(range(*span.indices(shape[0]))) * shape[1:].numel()
        self.operations = triangle(n, width) * (n * width) ** 2 * self.kept
        self._store = _Store(n, width)

    def take(self, samples: slice, columns: slice, g: dict[Call, Tensor], leaves: dict[str, Tensor]) -> None:
        """The rows themselves."""
        total: Tensor | None = None
        for call, role in self.uses:
            rows = call.rows(role, g[call], samples, self.n, self.shape, self.span)
            total = rows if total is None else total.add_(rows)
        assert total is not None
        self._store.put(samples, columns, total)

    def contract(self, total: Accumulator) -> None:
        """Rows times rows."""
        total.rows(self._store.pop())


class LeafTerm(Term):
    """Any parameter: rows from its own gradient, one sample's graph at a time."""

    path = "rows"

    def __init__(self, name: str, n: int, width: int, span: slice, numel: int) -> None:
        self.names, self.calls, self.leaves = [name], [], [name]
        self.span, self.kept = span, len(range(*span.indices(numel)))
        self.operations = triangle(n, width) * (n * width) ** 2 * self.kept
        self._store = _Store(n, width)

    def take(self, samples: slice, columns: slice, g: dict[Call, Tensor], leaves: dict[str, Tensor]) -> None:
        """The span of the gradient."""
        self._store.put(samples, columns, leaves[self.names[0]][..., self.span], owned=False)

    def contract(self, total: Accumulator) -> None:
        """Rows times rows."""
        total.rows(self._store.pop())


def cheapest(call: Call, n: int, width: int, rates: Rates) -> tuple[str, float]:
    """The form that takes least, by measured rates, and its cost in multiplications of a large product.

    rows: m^2 G p q and m T G p q; outer (T = 1): m^2 (q + 8) + n^2 p; positions: n^2 T^2 p + n m T^2 q + m^2 T q; the
    squares are halved by symmetry.
    """
    m, T, p, q = n * width, call.positions, call.p, call.q
    half = triangle(n, width)
    rows = m * call.G * p * q * (rates.large * half * m + rates.row * T + rates.copy)
    if call.G > 1:
        return "rows", rows
    outer = half * (m * m * (rates.large * q + rates.touch) + rates.large * n * n * p)
    pairs = n * n * T * T * p + n * m * T * (T + rates.touch) * q + m * m * T * q
    pairs *= rates.small * (n + 1) / (2 * n)
    other = ("outer", outer) if T <= 1 else ("positions", pairs)
    return min(("rows", rows), other, key=lambda choice: choice[1])


def spans(size: int, numbers_per_entry: int, most: int) -> Iterable[slice]:
    """Cut an axis so that each part keeps at most `most` numbers per row; one part is `slice(None)`."""
    step = max(1, most // max(numbers_per_entry, 1))
    if step >= size:
        return [slice(None)]
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]
