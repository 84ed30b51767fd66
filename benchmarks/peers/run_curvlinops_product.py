"""curvlinops: one product J (J^T v), and one gradient beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import products, torch_case, worker


def prepare(spec: dict[str, Any]) -> worker.Run:
    """The operators are made once."""
    from curvlinops.jacobian import JacobianLinearOperator

    net, x = torch_case.net_and_inputs(spec)
    jacobian = JacobianLinearOperator(
        net, list(net.parameters()), [(x, torch.zeros(len(x)))], check_deterministic=False, num_data=len(x)
    )
    device = str(x.device)
    adjoint, v = jacobian.adjoint(), products.start_vector(jacobian.shape[0], device)
    unit = products.gradient(net, spec)

    def product() -> Tensor:
        with torch_case.differentiable_attention():
            return jacobian @ (adjoint @ v)

    return lambda: products.figures(unit, product, device)


if __name__ == "__main__":
    worker.serve(prepare)
