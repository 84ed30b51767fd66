"""Global numerical settings under which the plain differentiable function is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import _get_current_function_mode_stack, _pop_mode
from torch.utils._device import DeviceContext

from grsd_callbacks.guard.generators import attribute_restorer, restored


@contextmanager
def no_autocast(device_type: str) -> Iterator[None]:
    """Switch autocast off, for the device and for the CPU."""
    with ExitStack() as stack:
        for kind in sorted({device_type, "cpu"}):
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def with_autograd() -> Iterator[None]:
    """Record gradients, also inside `no_grad` and `inference_mode` (validation hooks)."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def eager_compiler() -> Iterator[None]:
    """Run `torch.compile`d code eagerly: nothing is compiled, and what is compiled stays valid.

    Does nothing as long as the compiler is not imported (its import takes a second), since then nothing is compiled.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def math_attention() -> Iterator[None]:
    """Attention by plain matrix products, which can be differentiated twice and in forward mode."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def full_float32() -> Iterator[None]:
    """float32 products in float32: TF32 (the default of CUDA convolutions) has a relative error of 1e-3."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
        with _full_float32_before_29():
            yield
        return
    switches = _float32_switches()
    with restored([attribute_restorer(owner, name) for owner, name, _ in switches]):
        for owner, name, value in reversed(switches):
            setattr(owner, name, value)
        yield


def _float32_switches() -> list[tuple[Any, str, object]]:
    """Owner, attribute and full-precision value of each switch; cuDNN's old one last, to be set first."""
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    operations = [getattr(b, op) for b in (cudnn, mkldnn) for op in ("conv", "rnn", "matmul") if hasattr(b, op)]
    owners = [torch.backends.cuda.matmul, *operations]
    switches: list[tuple[Any, str, object]] = [(owner, "fp32_precision", "ieee") for owner in owners]
    try:
        cudnn.allow_tf32  # noqa: B018
    except RuntimeError:  # set by the new switches alone: the old one cannot be read, and does not count
        return switches
    return [*switches, (cudnn, "allow_tf32", False)]  # agrees with the new ones, as `cudnn.flags` demands


@contextmanager
def _full_float32_before_29() -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    convolutions = attribute_restorer(torch.backends.cudnn, "allow_tf32")
    with restored([convolutions, lambda: torch.set_float32_matmul_precision(precision)]):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield


@contextmanager
def preserve_default_dtype() -> Iterator[None]:
    """Put back torch's default dtype."""
    dtype = torch.get_default_dtype()
    with restored([lambda: torch.set_default_dtype(dtype)]):
        yield


@contextmanager
def preserve_function_modes() -> Iterator[None]:
    """Take off what is left on the stack of torch functions, as by an error in the very act of leaving a mode.

    Default devices, which torch keeps at the bottom of that stack, are spared.
    """
    before = _get_current_function_mode_stack()
    with restored([lambda: _take_off(before)]):
        yield


def _take_off(before: list[Any]) -> None:
    while left := _get_current_function_mode_stack():
        if isinstance(left[-1], DeviceContext) or any(left[-1] is mode for mode in before):
            return
        _pop_mode()


NUMERICS: dict[str, Callable[[str], AbstractContextManager[Any]]] = {
    "autocast": no_autocast,
    "autograd": lambda device_type: with_autograd(),
    "anomaly": lambda device_type: torch.autograd.set_detect_anomaly(False),  # a NaN of ours must not end their run
    "compile": lambda device_type: eager_compiler(),
    "attention": lambda device_type: math_attention(),
    "float32": lambda device_type: full_float32(),
    "dtype": lambda device_type: preserve_default_dtype(),
    "functions": lambda device_type: preserve_function_modes(),
}


@contextmanager
def plain_numerics(device_type: str, *, without: Collection[str] = ()) -> Iterator[None]:
    """All settings of `NUMERICS`, for the duration, so that what is measured is the plain differentiable function.

    Args:
        device_type: where the model runs, as in `torch.device(...).type`.
        without: names in `NUMERICS` to leave out.
    """
    require_known(without, NUMERICS)
    with ExitStack() as stack:
        for name, setting in NUMERICS.items():
            if name not in without:
                stack.enter_context(setting(device_type))
        yield


def require_known(names: Collection[str], known: Collection[str]) -> None:
    """Raise a `ValueError` that lists the names which are not known."""
    if not isinstance(names, (list, tuple, set, frozenset)):
        raise TypeError(f"without must be a list of names of guards, got {names!r}")
    if unknown := sorted({str(name) for name in names} - set(known)):
        raise ValueError(f"without: unknown guard {unknown}; known are {sorted(known)}")
