"""Notice what was written to all the same: parameters, buffers and gradients are compared, not copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


class DisturbedTraining(RuntimeError):
    """The measurement changed the training run; the message names the tensors and the likely cause."""


class Mark(NamedTuple):
    """What changes when a tensor is written to: identity, version counter, storage, flag, gradient."""

    tensor: Tensor  # kept alive, so that its id stays its own
    version: int | None
    address: int | None
    requires_grad: bool | None
    grad: Mark | None


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Check that no parameter, buffer or `.grad` was written to, replaced, added or removed.

    Compares identity, `_version`, storage address and `requires_grad`; so it needs no copy, and does not see writes
    through `.data` or from custom kernels that move no version counter. Enter it outside `functional_call`: inside, it
    would check the caller's clones.

    Raises:
        DisturbedTraining: something changed; also when the body raised an Exception, which is then its cause.
    """
    before = _marks(model)
    with checked(lambda: _report(before, _marks(model))):
        yield


@contextmanager
def checked(report: Callable[[], str]) -> Iterator[None]:
    """Raise what `report()` says, if anything, after the body, whether the body ended or raised."""
    try:
        yield
    except Exception as error:
        if message := report():
            raise DisturbedTraining(message) from error
        raise
    if message := report():
        raise DisturbedTraining(message)


def _marks(model: nn.Module) -> dict[str, Mark]:
    return {
        f"{path}.{name}" if path else name: mark_of(tensor)
        for path, module in model.named_modules()
        for registry in (module._parameters, module._buffers)
        for name, tensor in registry.items()
        if tensor is not None
    }


def mark_of(tensor: Tensor) -> Mark:
    """What to compare of a tensor, and of its gradient, later."""
    if type(tensor) in (UninitializedParameter, UninitializedBuffer):  # refuses every question
        return Mark(tensor, None, None, None, None)
    grad = tensor.grad if tensor.is_leaf or tensor.retains_grad else None
    version = None if tensor.is_inference() else tensor._version
    return Mark(tensor, version, _address(tensor), tensor.requires_grad, None if grad is None else mark_of(grad))


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse tensors, wrapper subclasses
        return None


def change_between(before: Mark | None, after: Mark | None) -> str:
    """What happened to a tensor, in words; empty if nothing did."""
    if before is None or after is None:
        return "" if before is after else "was added" if before is None else "was removed"
    if before.tensor is not after.tensor:
        return "was replaced"
    if before.version != after.version:
        return "was written to in place"
    if before.address != after.address:
        return "was given another storage"
    if before.requires_grad != after.requires_grad:
        return "had its requires_grad changed"
    grad = change_between(before.grad, after.grad)
    return f"had its .grad changed (it {grad})" if grad else ""


def _report(before: dict[str, Mark], after: dict[str, Mark]) -> str:
    names = dict.fromkeys([*before, *after])
    changes = [(name, change) for name in names if (change := change_between(before.get(name), after.get(name)))]
    if any(".grad" in change for _, change in changes):
        return describe(changes, "a .backward() reached the model's own parameters; use torch.autograd.grad on clones")
    return describe(
        changes,
        "the forward was given the model's own tensors, and Embedding(max_norm), BatchNorm in train mode or "
        "spectral_norm write to theirs; give it clones by torch.func.functional_call",
    )


def describe(changes: list[tuple[str, str]], cause: str) -> str:
    """The complaint about changed tensors, by name; empty if there are none."""
    if not changes:
        return ""
    listed = ", ".join(f"{name!r} {change}" for name, change in changes[:5])
    more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
    return f"the measurement changed the training run: {listed}{more}. Likely cause: {cause}."
