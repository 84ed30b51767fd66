"""The torch.func tutorial's second way: jvp after vjp of every unit vector, per pair of samples, under vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from benchmarks.peers import torch_case, worker


def prepare(spec: dict[str, Any]) -> worker.Run:
    """K(x, x') e_c for every output c and every pair (x, x')."""
    net, x = torch_case.net_and_inputs(spec)
    f, theta = torch_case.functional(net)

    def pair(x1: Tensor, x2: Tensor) -> Tensor:
        outputs, pull = vjp(lambda p: f(p, x1.unsqueeze(0)).squeeze(0), theta)

        def column(e: Tensor) -> Tensor:
            return jvp(lambda p: f(p, x2.unsqueeze(0)).squeeze(0), (theta,), pull(e))[1]

        return vmap(column)(torch.eye(outputs.numel(), dtype=outputs.dtype, device=outputs.device))

    def run() -> worker.Result:
        with torch_case.differentiable_attention():
            blocks = vmap(vmap(pair, (None, 0)), (0, None))(x, x)  # (n, m, a, b)
        return blocks.transpose(1, 2).flatten(0, 1).flatten(1), {}

    return run


if __name__ == "__main__":
    worker.serve(prepare)
