"""What cannot be measured, said before the first step: why, and what to do about it.

Also whether autograd's derivative, which is what training follows and what is measured, is the derivative of the
forward at all: `detach`, NumPy and straight-through estimators in a forward make the two differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from grsd_callbacks.gram.checks import random_like
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import wide_dtype

_REENTRANT = (
    "the model recomputes activations by reentrant checkpointing, whose gradients cannot be had without .backward(); "
    "pass use_reentrant=False to torch.utils.checkpoint (Hugging Face: "
    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False}))"
)
_NUMPY = (
    "the forward leaves torch by .numpy(), so that its derivative is not known; write that part in torch, or as a "
    "torch.autograd.Function with a backward of its own"
)
_JITTED = "the model holds a torch.jit module, which cannot be differentiated functionally; use the original module"
#: part of an error's text -> reason and remedy
REASONS = {
    "use_reentrant=True": _REENTRANT,
    "Checkpointing is not compatible with .grad()": _REENTRANT,
    "Can't call numpy() on Tensor that requires grad": _NUMPY,
    "can't be used with Jitted modules": _JITTED,
}
#: steps of the check of derivatives, relative to |theta|, smaller ones where kinks or curvature disturb the first
STEPS = (1e-3, 1e-4, 1e-5)
#: and the relative gap that is reported
LARGEST_GAP = 0.05


@contextmanager
def explained() -> Iterator[None]:
    """Turn torch's errors for models that cannot be measured into a `ValueError` with reason and remedy."""
    try:
        yield
    except RuntimeError as error:
        for part, reason in REASONS.items():
            if part in str(error):
                raise ValueError(reason) from error
        raise


def check_derivative(op: NTKOperator) -> str:
    """Compare J with central differences of f, in one random direction of f and one of the parameters.

    Returns:
        A sentence if they differ by more than `LARGEST_GAP`, or if the forward draws random numbers; else nothing.

    Raises:
        ValueError: they differ, and the forward calls `.numpy()`; or J^T v cannot be had.

    Cost: one backward pass, four forwards; twice more of one and two where the first step does not tell.
    """
    with explained():
        return op.run(lambda: _checked(op))


def _checked(op: NTKOperator) -> str:
    with torch.no_grad(), _Leaving() as leaving:
        f = op.function.outputs(op.inputs)
        again = op.function.outputs(op.inputs)
    if not bool(torch.isfinite(f).all()):  # a bad state, which the measurement speaks of
        return ""
    if not torch.equal(f, again):
        return "the forward draws random numbers in eval mode: every evaluation is another draw, and numbers are noisy"
    gap = math.inf
    for step in STEPS:  # of a wrong derivative the gap stays, of kinks it falls with the step
        gap = min(gap, derivative_gap(op, step))
        if not gap > LARGEST_GAP:
            return ""
    if leaving.calls:
        raise ValueError(f"{_NUMPY} (autograd misses {gap:.0%} of it)")
    return (
        f"autograd's derivative is not that of the forward ({gap:.0%} off: detach, a straight-through estimator, "
        "reentrant checkpointing or a backward of its own); what autograd gives, and training follows, is measured"
    )


def derivative_gap(op: NTKOperator, step: float = STEPS[0]) -> float:
    """|v . df - (J^T v) . u| / max(|(J^T v) . u|, |v . df|), df the central difference of f along u. Inside `op.run`.

    In every tensor u follows J^T v, or a random direction where that is zero, and is as long as the tensor.
    """
    wide = wide_dtype(op.device)
    named = op.function.parameters
    with torch.enable_grad():
        f = op.function.outputs(op.inputs)
        v = random_like(f, 0)
        pulled = torch.autograd.grad(f, list(named.values()), v, allow_unused=True)
    w = [torch.zeros_like(p) if g is None else _dense(g) for g, p in zip(pulled, named.values(), strict=True)]
    u = [_direction(g, p, seed) for seed, (g, p) in enumerate(zip(w, named.values(), strict=True))]
    expected = float(sum((a.to(wide) * b.to(wide)).sum() for a, b in zip(w, u, strict=True)))
    ends = []
    for h in (step, -step):
        moved = {name: p.detach() + h * t for (name, p), t in zip(named.items(), u, strict=True)}
        with torch.no_grad():
            ends.append(op.function.outputs(op.inputs, moved).to(wide))
    found = float((v.to(wide) * (ends[0] - ends[1])).sum()) / (2 * step)
    return abs(found - expected) / max(abs(expected), abs(found), 1e-300)


def _dense(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).detach()


def _direction(g: Tensor, p: Tensor, seed: int) -> Tensor:
    """As long as the tensor, or as 0.01 an entry where it is shorter."""
    along = g if bool(g.any()) else random_like(p, seed)
    length = max(float(p.detach().norm()), 0.01 * p.numel() ** 0.5)
    return along * (length / float(along.norm()))


class _Leaving(TorchFunctionMode):
    """Counts calls of `Tensor.numpy` and `Tensor.__array__`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func in (Tensor.numpy, Tensor.__array__)
        return func(*args, **(kwargs or {}))
