"""Net, inputs and function of parameters for the peers in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import nets


def net_and_inputs(spec: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The net in evaluation mode and n inputs, on the device of the specification."""
    device, sizes = spec.get("device", "cpu"), spec.get("sizes", {})
    net = nets.build(spec["net"], spec["scale"], **sizes).to(device)
    return net, nets.batch(spec["net"], spec["scale"], spec["n"], **sizes).inputs.to(device)


def functional(net: nn.Module) -> tuple[Callable[[dict[str, Tensor], Tensor], Tensor], dict[str, Tensor]]:
    """f(theta, inputs) and theta; tied parameters once."""
    theta = {name: p.detach() for name, p in net.named_parameters()}

    def f(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,))

    return f, theta


def differentiable_attention() -> Any:
    """The attention that every transform of derivatives supports (fused kernels refuse most)."""
    return sdpa_kernel(SDPBackend.MATH)
