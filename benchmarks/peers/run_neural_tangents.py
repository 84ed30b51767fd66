"""neural-tangents: structured derivatives of an MLP in JAX, compiled; compile time reported apart.

The weights and inputs come from the parent as a file, so that the kernels can be compared.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np

from benchmarks.peers import worker


def network(maximum: Any, theta: list[tuple[Any, Any]], x: Any) -> Any:
    """ReLU MLP in the form whose structure the library knows: weights (in, out), no nested functions."""
    for weight, bias in theta[:-1]:
        x = maximum(x @ weight + bias, 0.0)
    weight, bias = theta[-1]
    return x @ weight + bias


def restore_names() -> None:
    """Names that neural-tangents 0.6.5 expects in `jax.interpreters.ad` and that later jax took away."""
    import jax
    from jax._src import source_info_util
    from jax.interpreters import ad

    ad.source_info_util, ad.config = source_info_util, jax.config


def prepare(spec: dict[str, Any]) -> worker.Run:
    """Compile for the sizes at hand."""
    import jax
    import jax.numpy as jnp
    import neural_tangents as nt

    restore_names()
    if spec.get("device", "cpu") != "cpu":
        raise NotImplementedError("measured on the CPU only")
    if spec["net"] != "mlp":
        raise NotImplementedError("only the MLP has been written in JAX")
    stored = np.load(spec["weights"])
    layers = (len(stored.files) - 1) // 2
    theta = [(jnp.asarray(stored[f"weight{i}"].T), jnp.asarray(stored[f"bias{i}"])) for i in range(layers)]
    x = jnp.asarray(stored["inputs"][: spec["n"]])
    kernel = nt.empirical_ntk_fn(
        functools.partial(network, jnp.maximum),
        trace_axes=(),
        vmap_axes=0,
        implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES,
    )
    start = time.perf_counter()
    compiled = jax.jit(lambda inputs, parameters: kernel(inputs, None, parameters)).lower(x, theta).compile()
    compile_seconds = time.perf_counter() - start

    def run() -> worker.Result:
        blocks = compiled(x, theta).block_until_ready()  # (n, n, C, C)
        m = blocks.shape[0] * blocks.shape[2]
        return np.asarray(blocks).transpose(0, 2, 1, 3).reshape(m, m), {"compile_seconds": compile_seconds}

    return run


if __name__ == "__main__":
    worker.serve(prepare)
