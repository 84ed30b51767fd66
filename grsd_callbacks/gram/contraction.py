"""Sums of products that make up a Gram matrix, accumulated in float64 without a float64 copy of the factors.

On request each product is made in float32 (twice as fast on a CPU, up to 64 times on a GPU) and only then added up in
float64: entries are then right to float32's rounding of a product, not to float64's.

    rows       K += X X^T                                             X (m, w), gathered until w is worth a product
    outer      K[ic, jd] += (a_i . a_j) (b_ic . b_jd)                 one position
    positions  K[ic, jd] += sum_tu (a_it . a_ju) (b_ict . b_jdu)      several positions

Only entries on and above the diagonal are computed; `finish` mirrors them.

Letters: n samples, C outputs, m = n C rows, T positions, p and q the sizes of the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from grsd_callbacks.memory import empty

#: triangle blocks smaller than this many rows cost more in calls than they save in multiplications
_MIN_BLOCK = 40
_MAX_BLOCKS = 12
#: numbers of a sample's output gradients above which pairs of samples are multiplied one by one
_LARGE_SAMPLE = 2**15


class Accumulator:
    """A symmetric (m, m) matrix that grows by products.

    Args:
        n, width: samples and outputs per sample, m = n width.
        dtypes: of the matrix, and of the products that are added to it.
        device: of both.
        memory_limit: bytes of temporary copies held at a time.
    """

    def __init__(
        self, n: int, width: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device, memory_limit: int
    ) -> None:
        self.n, self.width = n, width
        dtype, self.dtype = dtypes
        self.memory_limit = memory_limit
        m = n * width
        self.matrix = empty((m, m), torch.empty(0, dtype=dtype, device=device)).zero_()
        self._by_sample = self.matrix.view(n, width, n, width)
        #: columns of rows gathered and multiplied at a time
        self.columns = max(1, min(memory_limit // (8 * max(m, 1)), max(1024, m)))
        self._buffer: Tensor | None = None
        self._filled = 0

    def rows(self, piece: Tensor) -> None:
        """K += X X^T for columns X of J, shape (n, C, w)."""
        piece = piece.reshape(self.n * self.width, -1)
        start = 0
        if piece.dtype == self.dtype:  # no copy of what is wide enough already
            start = piece.shape[1] - piece.shape[1] % self.columns
            for whole in piece[:, :start].split(self.columns, dim=1) if start else ():
                self._multiply(whole)
        while start < piece.shape[1]:
            target = self.reserve(min(self.columns, piece.shape[1] - start))
            target.copy_(piece[:, start : start + target.shape[1]])
            start += target.shape[1]

    def reserve(self, width: int) -> Tensor:
        """Uninitialised columns (m, <= width) of the buffer, for the caller to fill at once."""
        if self._buffer is None:
            m = self.n * self.width
            self._buffer = torch.empty(m, self.columns, dtype=self.dtype, device=self.matrix.device)
        if self._filled == self.columns:
            self.flush()
        taken = min(width, self.columns - self._filled)
        target = self._buffer[:, self._filled : self._filled + taken]
        self._filled += taken
        return target

    def flush(self) -> None:
        """Multiply what `rows` gathered."""
        if self._filled and self._buffer is not None:
            self._multiply(self._buffer[:, : self._filled])
        self._filled = 0

    def _multiply(self, x: Tensor) -> None:
        for rows in self._blocks():
            _add_product(self.matrix[rows, rows.start :], x[rows], x[rows.start :].T)

    def outer(self, left: Tensor, right: Tensor, plus_one: bool) -> None:
        """K[ic, jd] += (a_i . a_j [+ 1]) (b_ic . b_jd); left (n, p), right (n, C, q)."""
        scale = self._gram(left)
        if plus_one:
            scale += 1
        parts = list(self._columns(right.reshape(self.n * self.width, -1)))
        whole = self._wide(parts[0]) if len(parts) == 1 else None
        for rows in self._blocks():
            total: Tensor | None = None
            for part in parts:
                b = whole if whole is not None else self._wide(part)
                product = b[rows] @ b[rows.start :].T
                total = product if total is None else total.add_(product)
            i, j = rows.start // self.width, rows.stop // self.width
            assert total is not None
            product = total.view(j - i, self.width, self.n - i, self.width)
            self._by_sample[i:j, :, i:].addcmul_(product, scale[i:j, None, i:, None])

    def positions(self, left: Callable[[slice], Tensor], right: Tensor, plus_one: bool) -> None:
        """K[ic, jd] += sum_tu (a_it . a_ju [+ 1]) (b_ict . b_jdu); left(slice) (k, T, p), right (n, C, T, q)."""
        T, q = right.shape[2:]
        if self.width * T * q >= _LARGE_SAMPLE:
            self._positions_by_sample(left, right, plus_one)
        else:
            self._positions_by_block(left, right, plus_one)

    def _positions_by_sample(self, left: Callable[[slice], Tensor], right: Tensor, plus_one: bool) -> None:
        """One sample against many, without a copy of anything pairwise; buffers are reused."""
        C, T, q = right.shape[1:]
        step = max(1, min(self.n, self.memory_limit // (2 * 8 * C * T * q)))
        theirs, half = (right.new_empty(step, C, T, q, dtype=self.dtype) for _ in range(2))
        mine = right.new_empty(C, T, q, dtype=self.dtype)
        for start in range(0, self.n, step):
            stop = min(start + step, self.n)
            a = self._wide(left(slice(start, stop)))
            theirs[: stop - start].copy_(right[start:stop])
            for i in range(stop):
                first = max(i - start, 0)  # pairs i <= j only
                a_i = a[first] if i >= start else self._wide(left(slice(i, i + 1)))[0]
                b_i = theirs[first] if i >= start else mine.copy_(right[i])
                gram = torch.matmul(a_i, a[first:].mT)  # (j, t, u)
                if plus_one:
                    gram += 1
                for j, pair in enumerate(gram, first):
                    torch.bmm(pair.expand(C, T, T), theirs[j], out=half[j])
                columns = slice((start + first) * C, stop * C)
                others = half[first : stop - start].view(-1, T * q)
                _add_product(self.matrix[i * C : (i + 1) * C, columns], b_i.view(C, T * q), others.T)

    def _positions_by_block(self, left: Callable[[slice], Tensor], right: Tensor, plus_one: bool) -> None:
        """Blocks of samples against each other: few calls."""
        T, q = right.shape[2:]
        step = self._pair_block(T, q)
        for i in range(0, self.n, step):
            I = slice(i, min(i + step, self.n))  # noqa: E741
            a_i = self._wide(left(I))
            b_i = self._wide(right[I]).flatten(2)
            for j in range(i, self.n, step):
                J = slice(j, min(j + step, self.n))
                a_j = a_i if i == j else self._wide(left(J))
                gram = torch.einsum("itp,jup->jitu", a_i, a_j)
                if plus_one:
                    gram += 1
                b_j = self._wide(right[J].transpose(1, 2)).flatten(2)
                half = torch.bmm(gram.flatten(1, 2), b_j).view(len(a_j), len(a_i), T, self.width, q)
                half = half.permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)  # (I, J C, T q)
                block = torch.bmm(b_i, half.mT).view(len(a_i), self.width, len(a_j), self.width)
                self._by_sample[I, :, J] += block

    def finish(self) -> Tensor:
        """The symmetric matrix."""
        self.flush()
        self._buffer = None
        K = self.matrix
        for rows in self._blocks():
            corner = K[rows, rows]
            corner.copy_(corner.triu() + corner.triu(1).T)
            K[rows.stop :, rows] = K[rows, rows.stop :].T
        return K

    def _pair_block(self, T: int, q: int) -> int:
        """Samples whose pairwise intermediate, twice, stays in the bound; blocks enough to use the symmetry."""
        bytes_per_pair = 2 * 8 * T * (self.width * q + T)
        return max(1, min(-(-self.n // 4), int((self.memory_limit / bytes_per_pair) ** 0.5)))

    def _gram(self, left: Tensor) -> Tensor:
        total: Tensor | None = None
        for part in self._columns(left):
            a = self._wide(part)
            total = a @ a.T if total is None else total.addmm_(a, a.T)
        assert total is not None
        return total

    def _columns(self, x: Tensor) -> Iterator[Tensor]:
        """Column chunks whose float64 copy stays in the bound."""
        return iter(x.split(max(1, self.memory_limit // (8 * max(len(x), 1))), dim=1))

    def _wide(self, x: Tensor) -> Tensor:
        if x.dtype == self.dtype:
            return x.contiguous()
        return empty(x.shape, x.new_empty(0, dtype=self.dtype)).copy_(x)

    def _blocks(self) -> Iterator[slice]:
        """Row ranges of whole samples for the block triangle."""
        step = -(-self.n // _num_blocks(self.n, self.width))
        return (slice(i * self.width, min(i + step, self.n) * self.width) for i in range(0, self.n, step))


def _add_product(target: Tensor, a: Tensor, b: Tensor) -> None:
    if target.dtype == a.dtype:
        target.addmm_(a, b)
    else:
        target.add_(a @ b)


def triangle(n: int, width: int) -> float:
    """The share of m^2 that a symmetric product takes: half, the diagonal blocks, and a tenth for small products."""
    count = _num_blocks(n, width)
    return min(1.0, (count + 1) / (2 * count) + 0.1) if count < _MAX_BLOCKS else 0.6


def _num_blocks(n: int, width: int) -> int:
    return max(1, min(_MAX_BLOCKS, n * width // _MIN_BLOCK, n))
