"""Gradients of every sample with respect to any parameter, all samples in one backward pass.

    f_i(theta_i), theta_i = theta for every sample:   rows of output c = gradient of sum_i f_ic by (theta_1 ... theta_n)

The forward runs under `torch.func.vmap` over samples and over n copies of the parameter (views; nothing is copied).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.probe import take


def rows_of(
    function: ModelFunction, inputs: Any, n: int, names: list[str], samples: slice
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Per output column, the rows of some samples by parameter, each (samples, parameter size).

    Whatever vmap refuses (control flow by values, operations without a batching rule) comes out as its error.

    Cost: one forward and C backward passes on the samples.
    """
    outputs, copies = _forward(function, inputs, n, names, samples)
    v = torch.zeros_like(outputs)
    for column in range(outputs.shape[1]):
        v[:, column] = 1
        pulled = torch.autograd.grad(outputs, copies, v, retain_graph=True, allow_unused=True)
        rows = [torch.zeros_like(p) if g is None else g for g, p in zip(pulled, copies)]
        yield column, {name: g.reshape(len(outputs), -1) for name, g in zip(names, rows)}
        v[:, column] = 0  # only now: a parameter added last has v itself for its gradient


def _forward(
    function: ModelFunction, inputs: Any, n: int, names: list[str], samples: slice
) -> tuple[Tensor, list[Tensor]]:
    """f, shape (samples, C), and the parameters' copies, one per sample."""
    leaves, structure = tree_flatten(inputs)
    batched = [isinstance(x, Tensor) and x.dim() > 0 and x.shape[0] == n for x in leaves]
    fixed = {name: p.detach() for name, p in function.parameters.items()}
    count = len(range(*samples.indices(n)))
    copies = [fixed[name].expand(count, *fixed[name].shape).requires_grad_() for name in names]

    def single(own: list[Tensor], given: list[Tensor]) -> Tensor:
        parts = iter(given)
        one = [next(parts).unsqueeze(0) if has else x for has, x in zip(batched, leaves)]
        outputs = function.outputs(tree_unflatten(one, structure), {**fixed, **dict(zip(names, own))})
        return outputs.reshape(-1)

    given = take([x for has, x in zip(batched, leaves) if has], samples, n)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # slow batching rules
        return vmap(single)(copies, given), copies
