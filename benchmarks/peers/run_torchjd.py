"""TorchJD's autogram engine: the Gramian of the outputs, forward included, hooks not.

`batch_dim=0` where the engine accepts it, as its documentation recommends, else `batch_dim=None`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers import torch_case, worker


def prepare(spec: dict[str, Any]) -> worker.Run:
    """The engine hooks the net once."""
    from torchjd.autogram import Engine

    net, x = torch_case.net_and_inputs(spec)
    try:
        engine, batched = Engine(net, batch_dim=0), 1.0
    except ValueError:
        net, x = torch_case.net_and_inputs(spec)  # without half of the hooks
        engine, batched = Engine(net, batch_dim=None), 0.0

    def run() -> worker.Result:
        with torch_case.differentiable_attention():
            gramian = engine.compute_gramian(net(x))
        m = int(gramian.numel() ** 0.5)
        return gramian.reshape(m, m), {"batch_dim": batched}

    return run


if __name__ == "__main__":
    worker.serve(prepare)
