"""One kernel product and its unit, one gradient of the same probe batch, for every way to compute products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import nets
from benchmarks.peers import torch_case, worker
from benchmarks.timing import clocks, repeats_for, seconds


def gradient(net: nn.Module, spec: dict[str, Any]) -> Callable[[], object]:
    """Forward and backward of the loss on the probe batch."""
    device, sizes = spec.get("device", "cpu"), spec.get("sizes", {})
    data = nets.batch(spec["net"], spec["scale"], spec["n"], **sizes)
    x, y = data.inputs.to(device), data.targets.to(device)
    criterion, parameters = nets.loss_function(spec["net"]), list(net.parameters())
    return lambda: torch.autograd.grad(criterion(net(x), y), parameters)


def start_vector(size: int, device: str) -> Tensor:
    """The same random vector in every process."""
    return torch.randn(size, generator=torch.Generator().manual_seed(7)).to(device)


def fresh(net: nn.Module, x: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """J (J^T v) by torch.func.vjp and jvp, nothing kept in between."""
    f, theta = torch_case.functional(net)

    def product() -> Tensor:
        with torch_case.differentiable_attention():
            outputs, pull = torch.func.vjp(lambda p: f(p, x), theta)
            (w,) = pull(v.view_as(outputs))
            return torch.func.jvp(lambda p: f(p, x), (theta,), (w,))[1].flatten()

    return product


def figures(
    unit: Callable[[], object],
    product: Callable[[], Tensor],
    device: str,
    session: Callable[[Callable[[], Any]], Any] = lambda function: function(),
) -> worker.Result:
    """Seconds of a gradient and of a product in turn, and the product's memory; it runs inside `session`."""
    result, product_bytes = worker.peak_of(lambda: session(product), device)
    repeats = repeats_for(seconds(unit, device))
    gradient = clocks(unit, device, repeats)
    one = session(lambda: clocks(product, device, repeats))
    return result, {
        "gradient_seconds": gradient[0],
        "gradient_cpu_seconds": gradient[1],
        "product_seconds": one[0],
        "product_cpu_seconds": one[1],
        "product_bytes": product_bytes,
    }
