"""torch.func: one product by a fresh vjp and a fresh jvp, and one gradient beside it."""

from __future__ import annotations

from typing import Any

from benchmarks.peers import products, torch_case, worker


def prepare(spec: dict[str, Any]) -> worker.Run:
    """Nothing is kept between products."""
    net, x = torch_case.net_and_inputs(spec)
    device = str(x.device)
    product = products.fresh(net, x, products.start_vector(net(x).numel(), device))
    unit = products.gradient(net, spec)
    return lambda: products.figures(unit, product, device)


if __name__ == "__main__":
    worker.serve(prepare)
