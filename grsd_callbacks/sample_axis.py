"""Where the samples of a batch are in a tensor: along which axis, and whether something else is counted before them.

Told by running on some of the samples: their part of the whole batch's output is in one place only.

Letters: n samples, T whatever else an axis runs over (time), C all other values of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

#: how to measure a model whose inputs have time first: for errors, which say it in full
SAMPLES_FIRST = """\
class SamplesFirst(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.transpose(0, 1)).transpose(0, 1)
"""


@dataclass(frozen=True)
class SampleAxis:
    """The place of n samples in a tensor.

    Attributes:
        axis: runs over samples (and, faster, something else).
        inner: whether samples are what runs faster: (T n, ...), the first n entries being those of time 0.
    """

    axis: int = 0
    inner: bool = False

    def rows(self, tensor: Tensor, n: int) -> Tensor:
        """The tensor as (n, C)."""
        moved = tensor.movedim(self.axis, 0)
        if self.inner:
            moved = moved.unflatten(0, (-1, n)).transpose(0, 1)
        return moved.reshape(n, -1)

    def put_back(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `rows`: (n, C) in the layout of a tensor."""
        n, shape = len(rows), like.movedim(self.axis, 0).shape
        if self.inner:
            rows = rows.reshape(n, shape[0] // n, -1).transpose(0, 1)
        return rows.reshape(shape).movedim(0, self.axis)

    def without_classes(self) -> SampleAxis:
        """The same where the second axis, that of classes, is gone."""
        return SampleAxis(self.axis - (self.axis > 1), self.inner)


def sample_axes(whole: Tensor, part: Tensor, n: int, samples: slice) -> list[SampleAxis]:
    """Where `part` is the output of some of the n samples, and `whole` that of all: none if samples interact.

    Several where values do not tell them apart (outputs that are all zero), the likeliest first.
    """
    count, found = samples.stop - samples.start, []
    for axis, size in enumerate(whole.shape):
        if size % n or part.dim() != whole.dim() or part.shape[axis] != count * (size // n):
            continue
        for place in (SampleAxis(axis), SampleAxis(axis, inner=True))[: 1 + (size > n)]:
            if _equal(place.rows(whole, n)[samples], place.rows(part, count)):
                found.append(place)
    return found


def parts_of(n: int) -> list[slice]:
    """Half of the samples, the first two and the last two.

    Rows that a mask has picked are not as many for each, and a causal model does the same on the first of them.
    """
    return [slice(0, (n + 1) // 2), *([slice(0, 2), slice(n - 2, n)] if n > 2 else [])]


def axes_of_samples(whole: Tensor, n: int, run: Callable[[slice], Tensor]) -> list[SampleAxis]:
    """Where the samples are in a model's outputs; nowhere if it does not run on parts of them, or they interact."""
    found: list[SampleAxis] | None = None
    for samples in parts_of(n):
        try:
            part = run(samples)
        except Exception:  # whatever a model says to inputs that it was not made for
            return []
        places = sample_axes(whole, part, n, samples)
        found = places if found is None else [axis for axis in found if axis in places]
    return found or []


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    eps = torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=100 * eps**0.5, atol=eps**0.5)


def second_axis(inputs: Any) -> tuple[int, int]:
    """(first, second) size of the first tensor of at least two dimensions; (0, 0) if there is none."""
    leaves = (leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor) and leaf.dim() > 1)
    return next(((leaf.shape[0], leaf.shape[1]) for leaf in leaves), (0, 0))


def take_second(tree: Any, some: slice) -> Any:
    """Some entries along the second axis of every tensor in which `second_axis` recognises it.

    Also in tensors where it is the only axis (lengths), and where both axes are flattened to one (targets).
    """
    T, n = second_axis(tree)

    def select(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return leaf
        if leaf.dim() > 1 and leaf.shape[1] == n:
            return leaf[:, some]
        if leaf.shape[0] == T * n:
            return leaf.unflatten(0, (T, n))[:, some].flatten(0, 1)
        return leaf[some] if leaf.shape == (n,) and n != T else leaf

    return tree_map(select, tree)


def has_time_first(whole: Tensor, inputs: Any, run: Callable[[Any], Tensor]) -> bool:
    """Whether samples are along the second axis: outputs on part of it are that part of all outputs.

    Args:
        whole: outputs on all inputs, which are not those of samples along the first axis.
        inputs: all tensors that belong to the samples, inputs first.
        run: outputs on some of the inputs.
    """
    _, n = second_axis(inputs)
    return n > 1 and bool(axes_of_samples(whole, n, lambda some: run(take_second(inputs, some))))


def time_first_note(inputs: Any) -> str:
    """What to know of a batch that `has_time_first`."""
    first, second = second_axis(inputs)
    return (
        f"the batch's first axis ({first}) is not that of samples: outputs along it depend on each other, and not "
        f"along the second ({second}), as with time first; the kernel is taken from rows on the whole batch, and what "
        "is said of samples is said of the first axis"
    )
