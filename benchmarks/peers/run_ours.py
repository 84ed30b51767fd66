"""Our exact kernel: J J^T from captured inputs and output gradients, sums in float64."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import torch_case, worker


def prepare(spec: dict[str, Any]) -> worker.Run:
    """Everything a measurement does is inside the run: copies, forward, checks, kernel."""
    from grsd_callbacks.kernel import NTKOperator

    net, x = torch_case.net_and_inputs(spec)
    return lambda: (NTKOperator(net, x).gram(), {})


if __name__ == "__main__":
    worker.serve(prepare)
