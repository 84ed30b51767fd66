"""The torch.func tutorial's first way: rows of J by vmap(jacrev) per sample, then K_{na,mb} = sum_f J_{naf} J_{mbf}.

J is computed once and used on both sides (the tutorial, for two batches, computes it twice).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from benchmarks.peers import torch_case, worker


def prepare(spec: dict[str, Any]) -> worker.Run:
    """J of all samples at once."""
    net, x = torch_case.net_and_inputs(spec)
    f, theta = torch_case.functional(net)

    def single(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return f(parameters, sample.unsqueeze(0)).squeeze(0)

    def run() -> worker.Result:
        with torch_case.differentiable_attention():
            jacobian = vmap(jacrev(single), (None, 0))(theta, x)
        parts = [j.flatten(2) for j in jacobian.values()]
        kernel = sum(torch.einsum("naf,mbf->namb", j, j) for j in parts)
        return kernel.flatten(0, 1).flatten(1), {}

    return run


if __name__ == "__main__":
    worker.serve(prepare)
