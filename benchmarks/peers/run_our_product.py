"""Ours: one product on a retained graph, the path of J w given or chosen, and one gradient beside it.

With a share, only so much of the samples' graphs may be held: most are built again for every product.

Every run makes its own operator; its first product pays the set-up: copies, graphs and, on the path "auto", the trial.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.peers import products, torch_case, worker
from benchmarks.timing import clocks

if TYPE_CHECKING:
    from grsd_callbacks.kernel import NTKOperator


def prepare(spec: dict[str, Any]) -> worker.Run:
    """Products run in one session, as in a measurement."""
    from grsd_callbacks.kernel import FORWARD_PATHS, NTKOperator

    net, x = torch_case.net_and_inputs(spec)
    device, path = str(x.device), spec.get("path", "auto")
    v = products.start_vector(net(x).numel(), device)
    unit = products.gradient(net, spec)
    limit = memory_limit(NTKOperator(net, x), spec.get("share"))

    def run() -> worker.Result:
        held: list[NTKOperator] = []

        def first() -> None:
            held.append(NTKOperator(net, x, forward=path, memory_limit=limit))
            held[0].run(lambda: held[0] @ v)

        (first_seconds, first_cpu), peak = worker.peak_of(lambda: clocks(first, device), device)
        op = held[0]
        result, figures = products.figures(unit, lambda: op @ v, device, op.run)
        figures["product_bytes"] += peak  # what the operator keeps counts
        chosen = FORWARD_PATHS.index(op.forward_path)
        return result, figures | {"first_seconds": first_seconds, "first_cpu_seconds": first_cpu, "path": float(chosen)}

    return run


def memory_limit(op: NTKOperator, share: float | None) -> int | None:
    """Bytes for a share of the graphs of all samples."""
    if share is None:
        return None
    op.choose_forward(timed=False)  # finds what a sample's graphs hold
    return int(share * op.num_samples * op.plan.sample_bytes)


if __name__ == "__main__":
    worker.serve(prepare)
