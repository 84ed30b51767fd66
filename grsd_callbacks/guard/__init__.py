"""Leave the training run bit-identical while the model is being measured.

A measurement runs the user's own forward, and a forward may draw random numbers, count calls, append to lists, update
metrics, log, or write to its parameters. `undisturbed` undoes, forbids or detects all of this, by small guards that
each work alone (`GUARDS`, `NUMERICS`); `without` switches single ones off, for negative controls.

Guarded: the generators of torch, numpy and python; training flags; attributes, hooks and registered names of every
submodule; `self.log`; autocast, gradient, compiler and attention settings, default dtype and function modes of torch.
Checked: parameters, buffers, `.grad`.

Not guarded, because it lies outside the module or cannot be copied: globals and closures, files and other processes,
what forward hooks do elsewhere, loggers called directly, plain Python objects held as attributes (they are shared, not
copied), modules hidden in plain lists, `lru_cache`s, writes through `.data` of the model's own tensors (they move no
version counter), state that another thread changes meanwhile, the allocator's and the cuDNN benchmark's caches. The
parameters and buffers are not copied here: hand the forward clones through `torch.func.functional_call`, entered
*inside* `undisturbed`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from torch import nn

from grsd_callbacks.guard.attributes import MAX_COPIED_BYTES, preserve_attributes
from grsd_callbacks.guard.check import DisturbedTraining, untouched
from grsd_callbacks.guard.generators import preserve_object_rng, preserve_rng
from grsd_callbacks.guard.numerics import (
    NUMERICS,
    eager_compiler,
    full_float32,
    math_attention,
    no_autocast,
    plain_numerics,
    preserve_default_dtype,
    preserve_function_modes,
    require_known,
    with_autograd,
)
from grsd_callbacks.guard.state import MODES, preserve_modes, preserve_registrations, silence_logging

__all__ = [
    "GUARDS",
    "MAX_COPIED_BYTES",
    "MODES",
    "NUMERICS",
    "DisturbedTraining",
    "eager_compiler",
    "full_float32",
    "math_attention",
    "no_autocast",
    "plain_numerics",
    "preserve_attributes",
    "preserve_default_dtype",
    "preserve_function_modes",
    "preserve_modes",
    "preserve_object_rng",
    "preserve_registrations",
    "preserve_rng",
    "silence_logging",
    "undisturbed",
    "untouched",
    "with_autograd",
]

GUARDS: dict[str, Callable[[nn.Module, str], AbstractContextManager[Any]]] = {
    "untouched": lambda model, mode: untouched(model),
    "rng": lambda model, mode: preserve_rng(),
    "registrations": lambda model, mode: preserve_registrations(model),
    "attributes": lambda model, mode: preserve_attributes(model),
    "modes": preserve_modes,
    "logging": lambda model, mode: silence_logging(model),
}


@contextmanager
def undisturbed(model: nn.Module, *, mode: str = "eval", without: Collection[str] = ()) -> Iterator[None]:
    """All guards around a measurement of `model`; see the head of this file for what they cover and what they cannot.

    Args:
        model: the module in training; also one inside a `functional_call`, then with `without=("untouched",)`.
        mode: training flags during the measurement, see `preserve_modes`.
        without: names in `GUARDS` and `NUMERICS`, and "numerics" for all of the latter, to leave out.

    Raises:
        DisturbedTraining: a parameter, buffer or `.grad` changed all the same.
        ValueError: unknown mode, or unknown name in `without`.

    Cost: about 4 ms for 200 modules with two parameters each, plus a clone of each attribute tensor.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
        >>> state = torch.get_rng_state()
        >>> with undisturbed(net, mode="train"):
        ...     clones = {name: t.detach().clone() for name, t in net.state_dict().items()}
        ...     outputs = torch.func.functional_call(net, clones, (torch.ones(3, 2),))
        >>> int(net[1].num_batches_tracked), bool((torch.get_rng_state() == state).all())
        (0, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    require_known(without, {"numerics": None, **GUARDS, **NUMERICS})
    with ExitStack() as stack:
        if "numerics" not in without:
            numerics = plain_numerics(_device_type(model), without=[name for name in without if name in NUMERICS])
            stack.enter_context(numerics)
        for name, guard in GUARDS.items():
            if name not in without:
                stack.enter_context(guard(model, mode))
        yield


def _device_type(model: nn.Module) -> str:
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return "cpu" if tensor is None else tensor.device.type
