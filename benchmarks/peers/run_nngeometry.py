"""nngeometry's Gram matrix in its dense representation, one batch."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers import torch_case, worker


def prepare(spec: dict[str, Any]) -> worker.Run:
    """The collection of layers is made once; layers it does not know are refused, never left out."""
    from nngeometry.gram import GramMatrix
    from nngeometry.layercollection import LayerCollection

    net, x = torch_case.net_and_inputs(spec)
    layers = LayerCollection.from_model(net)
    y = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def run() -> worker.Result:
        gram = GramMatrix(net, (x, y), function=lambda *d: net(d[0]), layer_collection=layers).to_torch()
        m = gram.shape[0] * gram.shape[1]
        return gram.permute(1, 0, 3, 2).reshape(m, m), {}  # (C, n, C, n)

    return run


if __name__ == "__main__":
    worker.serve(prepare)
