"""curvlinops: one product J (J^T v), and one gradient beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.peers import products, torch_case, worker
from benchmarks.peers.run_curvlinops import operators


def prepare(spec: dict[str, Any]) -> worker.Run:
    """The operators are made once."""
    net, x = torch_case.net_and_inputs(spec)
    jacobian, adjoint = operators(net, x)
    device = str(x.device)
    v = products.start_vector(jacobian.shape[0], device)
    unit = products.gradient(net, spec)

    def product() -> Tensor:
        with torch_case.differentiable_attention():
            return jacobian @ (adjoint @ v)

    return lambda: products.figures(unit, product, device)


if __name__ == "__main__":
    worker.serve(prepare)
