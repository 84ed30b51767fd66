"""Our exact kernel with float32 products, the arithmetic of the peers: only their sums are in float64."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers import torch_case, worker


def prepare(spec: dict[str, Any]) -> worker.Run:
    """As `run_ours`, with `gram_dtype`."""
    from grsd_callbacks.kernel import NTKOperator

    net, x = torch_case.net_and_inputs(spec)
    return lambda: (NTKOperator(net, x, gram_dtype=torch.float32).gram(), {})


if __name__ == "__main__":
    worker.serve(prepare)
