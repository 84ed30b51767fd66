"""curvlinops: J (J^T I), the identity in blocks of columns."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers import torch_case, worker

#: columns at a time; more gain nothing on a CPU and cost P floats each
COLUMNS = 16


def prepare(spec: dict[str, Any]) -> worker.Run:
    """The operators are made once."""
    from curvlinops.jacobian import JacobianLinearOperator

    net, x = torch_case.net_and_inputs(spec)
    jacobian = JacobianLinearOperator(
        net, list(net.parameters()), [(x, torch.zeros(len(x)))], check_deterministic=False, num_data=len(x)
    )
    adjoint = jacobian.adjoint()

    def run() -> worker.Result:
        identity = torch.eye(jacobian.shape[0], device=x.device)
        with torch_case.differentiable_attention():
            parts = [jacobian @ (adjoint @ block) for block in identity.split(COLUMNS, dim=1)]
        return torch.cat(parts, 1), {}

    return run


if __name__ == "__main__":
    worker.serve(prepare)
