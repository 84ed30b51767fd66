"""curvlinops: J (J^T I), the identity in blocks of columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import torch_case, worker

#: columns at a time; more gain nothing on a CPU and cost P floats each
COLUMNS = 16


def operators(net: nn.Module, x: Tensor) -> tuple[Any, Any]:
    """J and J^T on one batch (the targets are not used)."""
    from curvlinops.jacobian import JacobianLinearOperator

    data = [(x, torch.zeros(len(x), device=x.device))]
    found = JacobianLinearOperator(net, list(net.parameters()), data, check_deterministic=False, num_data=len(x))
    return found, found.adjoint()


def prepare(spec: dict[str, Any]) -> worker.Run:
    """The operators are made once."""
    net, x = torch_case.net_and_inputs(spec)
    jacobian, adjoint = operators(net, x)

    def run() -> worker.Result:
        identity = torch.eye(jacobian.shape[0], device=x.device)
        with torch_case.differentiable_attention():
            parts = [jacobian @ (adjoint @ block) for block in identity.split(COLUMNS, dim=1)]
        return torch.cat(parts, 1), {}

    return run


if __name__ == "__main__":
    worker.serve(prepare)
