"""Which way to the spectrum: the exact kernel with all eigenpairs, with its eigenvalues only, or products.

Decided once, from sizes, memory and measured speed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from grsd_callbacks.gram import gram_operations
from grsd_callbacks.kernel import NTKOperator, synchronise
from grsd_callbacks.losses import wide_dtype
from grsd_callbacks.memory import is_out_of_memory
from grsd_callbacks.probe import take

#: largest m = n C for which "auto" considers the exact kernel, by device type
MAX_EXACT = {"cpu": 1024, "cuda": 4096}
#: and for which it considers one without its eigenvectors
MAX_LANCZOS = {"cpu": 4096, "cuda": 16384}
#: how many times as much as the products each may cost: one gives every shell, the other every eigenvalue
PREFERENCE, LANCZOS_PREFERENCE = 3.0, 1.5
#: multiplications of a symmetric eigenproblem with vectors, in units of m^3
EIGEN_OPERATIONS = 9.0
#: bytes beside the kernel itself at the peak of a measurement, in units of m^2: the first basis and its kernel, the
#: last basis, and eigenvectors with twice their size of work space (with `transfer=True` as many kernels near by)
EIGEN_BYTES = 48
#: of one without vectors: the kernel once more; operations; and those of a product of a dense matrix with a vector in
#: units of m^2, which waits for memory
EIGENVALUE_BYTES, EIGENVALUE_OPERATIONS, DENSE_PRODUCT = 8, 2.5, 11.0
#: one kernel product, in backward passes
PRODUCT = 2.2


@dataclass(frozen=True)
class MethodChoice:
    """The chosen method and why.

    Attributes:
        method: "exact", "lanczos" or "krylov".
        reason: one clause for the report.
        exact_seconds, lanczos_seconds, krylov_seconds: expected cost of one measurement; NaN where not estimated.
        peak_bytes: memory that the exact kernel would take.
        paths: the form each parameter would take in it.
    """

    method: str
    reason: str
    exact_seconds: float = float("nan")
    lanczos_seconds: float = float("nan")
    krylov_seconds: float = float("nan")
    peak_bytes: int = 0
    paths: dict[str, str] = field(default_factory=dict)


def method_by_size(op: NTKOperator) -> str:
    """ "exact" while m is small enough for the device, else "krylov"."""
    return "exact" if op.shape[0] <= MAX_EXACT.get(op.device.type, MAX_EXACT["cpu"]) else "krylov"


def choose_by_cost(op: NTKOperator, num_products: int, memory_limit: int | None = None) -> MethodChoice:
    """Exact if m is small enough, memory allows it, and it costs at most `PREFERENCE` times the products; else lanczos
    (all eigenvalues, energies by their bounds) for at most `LANCZOS_PREFERENCE` times; else products alone.

    Args:
        op: the operator on the probe.
        num_products: kernel products that the matrix-free way would spend.
        memory_limit: bytes of temporaries that the exact kernel would be given; as much again may be held beside
            them (matrix, eigenvectors of this and of earlier measurements, graph of the probe). None takes the
            operator's own bounds.

    Cost: a trial of the products and a recorded forward, four backward passes and one small matrix product, timed once.
    """
    m, device = op.shape[0], op.device.type
    largest = MAX_LANCZOS.get(device, MAX_LANCZOS["cpu"])
    if m > largest:
        return MethodChoice("krylov", f"m = {m} is above {largest}, the most for an exact kernel on this device")
    temporaries = memory_limit or op.gram_memory
    bound = 2 * temporaries if memory_limit else temporaries + op.memory_limit
    least = (8 + EIGENVALUE_BYTES) * m**2
    if least > bound:
        return MethodChoice("krylov", f"an exact kernel and its eigenvalues take {_megabytes(least, bound)}")
    estimate = gram_operations(op.function, op.inputs, memory_limit=temporaries, sums=op.gram_dtype)
    least, held = (estimate.peak_bytes + size * m**2 for size in (EIGENVALUE_BYTES, EIGEN_BYTES))
    if least > bound:
        return MethodChoice("krylov", f"an exact kernel takes {_megabytes(least, bound)}")
    rate = _multiplications_per_second(op)
    kernel = estimate.operations / rate
    if any(path.startswith("rows") for path in estimate.paths.values()):
        kernel += m * _single_backward_seconds(op)
    exact = kernel + EIGEN_OPERATIONS * m**3 / rate
    lanczos = kernel + (EIGENVALUE_OPERATIONS * m**3 + DENSE_PRODUCT * num_products * m**2) / rate
    krylov = PRODUCT * _backward_seconds(op) * num_products
    op.release()
    fits = m <= MAX_EXACT.get(device, MAX_EXACT["cpu"]) and held <= bound
    affordable = {"exact": fits and exact <= PREFERENCE * krylov, "lanczos": lanczos <= LANCZOS_PREFERENCE * krylov}
    method = next((name for name, is_affordable in affordable.items() if is_affordable), "krylov")
    memory = f"{held / 1e6:.0f} MB" if held <= bound else _megabytes(held, bound)
    reason = (
        f"about {exact:.2g} s and {memory} exact, {lanczos:.2g} s without eigenvectors, {krylov:.2g} s by "
        f"{num_products} products, measured on this machine"
    )
    return MethodChoice(method, reason, exact, lanczos, krylov, estimate.peak_bytes, estimate.paths)


def _megabytes(held: float, bound: float) -> str:
    return f"{held / 1e6:.0f} MB, above the bound of {bound / 1e6:.0f} MB"


def _backward_seconds(op: NTKOperator) -> float:
    v = torch.ones(op.shape[0], dtype=op.dtype, device=op.device)
    op.vjp(v)
    return _seconds(op, lambda: op.vjp(v))


def _single_backward_seconds(op: NTKOperator) -> float:
    """What a generic row costs: a share of one backward pass over half the samples, or one over all that interact."""
    if op.function.interacting:
        return _backward_seconds(op)
    half = slice(0, max(1, op.num_samples // 2))  # a part that any model accepts which takes batches
    try:
        one = NTKOperator(
            op.function.model,
            take(op.inputs, half, op.num_samples),
            params=lambda name, p: name in op.function.parameters,
            outputs=op.function.extract,
            dtype=op.dtype,
        )
        return _backward_seconds(one) / one.num_samples
    except (RuntimeError, ValueError, IndexError) as error:  # nodes of a graph, say
        if is_out_of_memory(error):
            raise
        return _backward_seconds(op)


def _multiplications_per_second(op: NTKOperator, size: int = 384) -> float:
    a = torch.ones(size, size, dtype=wide_dtype(op.device), device=op.device)
    a @ a
    return size**3 / max(_seconds(op, lambda: a @ a), 1e-9)


def _seconds(op: NTKOperator, function: Callable[[], object]) -> float:
    synchronise(op.device)
    start = time.perf_counter()
    function()
    synchronise(op.device)
    return time.perf_counter() - start
