"""Leave the training run bit-identical while the model is being measured.

A measurement runs the user's own forward, and a forward may draw random numbers, count calls, append to lists, update
metrics, log, or write to its parameters. `undisturbed` undoes, forbids or detects all of this, by small guards that
each work alone (`GUARDS`, `NUMERICS`); `without` switches single ones off, for negative controls.

Guarded: the generators of torch, numpy and python; training flags; attributes, hooks and registered names of every
submodule; `self.log`; autocast, gradient, compiler and attention settings. Checked: parameters, buffers, `.grad`.

Not guarded, because it lies outside the module or cannot be copied: globals and closures, files and other processes,
what forward hooks do elsewhere, loggers called directly, plain Python objects held as attributes (they are shared, not
copied), modules hidden in plain lists, `lru_cache`s, writes through `.data` of the model's own tensors (they move no
version counter), state that another thread changes meanwhile, the allocator's and the cuDNN benchmark's caches. The
parameters and buffers are not copied here: hand the forward clones through `torch.func.functional_call`, entered
*inside* `undisturbed`.
"""

from __future__ import annotations

import copy
import itertools
import random
import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

MODES = ("eval", "train", "keep")
MAX_COPIED_BYTES = 1 << 30  # of attribute tensors, a measurement; beyond it they are watched instead of copied

_MANAGED = frozenset(vars(nn.Module()))  # what nn.Module itself keeps: registries, hooks, `training`
_REGISTRIES = [name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))]
_RNG_TYPES = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_CONTAINERS = (list, dict, set, deque)
_LEAVES = frozenset({int, float, bool, str, bytes, complex, type(None), FunctionType, torch.dtype, torch.device})
_MAX_VISITED = 4096  # objects looked at in the search for a dataset's generators
_MAX_CHILDREN = 64  # longer containers hold samples, not transforms
_MISSING = object()


class DisturbedTraining(RuntimeError):
    """The measurement changed the training run; the message names the tensors and the likely cause."""


# ---- random numbers ----


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Put back the global generators of torch (CPU, CUDA, MPS), numpy and python.

    CUDA is included if it is initialised on entry, with all its devices.
    Cost: about 50 microseconds on the CPU; no device synchronisation is asked for.
    """
    with _restored(_global_restorers()):
        yield


@contextmanager
def preserve_object_rng(obj: object, *, depth: int = 4) -> Iterator[None]:
    """Put back the generators that a data set, transform or sampler holds.

    Breadth first through instance attributes and short containers: `dataset.dataset.transform.transforms[0].rng` is
    found. Objects are not copied: only the states of torch, numpy and python generators are set back.

    Args:
        obj: any object; its class attributes and properties are not looked at.
        depth: levels of attributes below `obj`.
    """
    with _restored([_restorer(rng) for rng in _generators_in(obj, depth)]):
        yield


@contextmanager
def _restored(restorers: Iterable[Callable[[], object]]) -> Iterator[None]:
    with ExitStack() as stack:  # all of them, the last first, even if one raises
        for restore in restorers:
            stack.callback(restore)
        yield


def _global_restorers() -> Iterator[Callable[[], object]]:
    yield _restorer(torch.default_generator)
    if torch.cuda.is_initialized():
        states = torch.cuda.get_rng_state_all()
        yield lambda: torch.cuda.set_rng_state_all(states)
    if torch.backends.mps.is_available():
        mps_state = torch.mps.get_rng_state()
        yield lambda: torch.mps.set_rng_state(mps_state)
    numpy_state, python_state = np.random.get_state(legacy=False), random.getstate()
    yield lambda: np.random.set_state(numpy_state)
    yield lambda: random.setstate(python_state)


def _restorer(rng: Any) -> Callable[[], object]:
    if isinstance(rng, random.Random):
        python_state = rng.getstate()
        return lambda: rng.setstate(python_state)
    if isinstance(rng, np.random.Generator):
        return _attribute_restorer(rng.bit_generator, "state")
    state = rng.get_state(legacy=False) if isinstance(rng, np.random.RandomState) else rng.get_state()
    return lambda: rng.set_state(state)


def _generators_in(obj: object, depth: int) -> Iterator[Any]:
    seen: set[int] = set()
    queue: deque[tuple[object, int]] = deque([(obj, 0)])
    while queue and len(seen) < _MAX_VISITED:
        value, level = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _RNG_TYPES):
            if not isinstance(value, random.SystemRandom):  # has no state
                yield value
        elif level <= depth:
            below = level + (not isinstance(value, (dict, list, tuple)))
            queue.extend((child, below) for child in _children(value))


def _children(value: object) -> Iterable[object]:
    if isinstance(value, (dict, list, tuple)):
        if len(value) > _MAX_CHILDREN:
            return ()
        return list(value.values()) if isinstance(value, dict) else value
    if isinstance(value, (type, ModuleType, FunctionType, Tensor)):
        return ()
    return list(getattr(value, "__dict__", {}).values())


# ---- the module: flags, attributes, registered names, logging ----


@contextmanager
def preserve_modes(model: nn.Module, mode: str = "eval") -> Iterator[None]:
    """Set `.training` of every submodule, and put each back as it was.

    By attribute: `.train()` and `.eval()` may be overridden, and would wake up layers that the user froze.

    Args:
        model: the module.
        mode: "eval" (all False), "train" (all True, also what the user keeps in eval mode) or "keep".

    Raises:
        ValueError: unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    flags = [(module, module.training) for module in model.modules()]
    try:
        if mode != "keep":
            _set_flags((module, mode == "train") for module, _ in flags)
        yield
    finally:
        _set_flags(flags)


def _set_flags(flags: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        module.training = flag


@contextmanager
def preserve_attributes(model: nn.Module, *, max_bytes: int = MAX_COPIED_BYTES) -> Iterator[None]:
    """Let the forward work on copies of the submodules' attributes; put the originals back, remove what was added.

    Copied, through nested containers and with one memo, so that what two submodules share stays shared: tensors
    (detached clones), lists, dicts, sets, deques, tuples that hold such, numpy arrays, random generators. All else is
    shared with the run: parameters (also those in an RNN's `_flat_weights`), the trainer, plain Python objects.
    What nn.Module manages itself is left to `preserve_registrations` and `preserve_modes`.

    A tensor that no longer fits into `max_bytes` (a replay memory, a long key-value cache) is not copied but watched:
    an in-place write to it raises. An array that does not fit is shared. Views of one another become separate copies.

    Args:
        model: the module.
        max_bytes: bytes of tensors and arrays to copy at most.

    Raises:
        DisturbedTraining: the forward wrote to a tensor too large to copy.

    Cost: one clone of each attribute tensor, about 3 microseconds apiece and its bytes; one visit of each list element.
    """
    slots_of = {kind: _slot_names(kind) for kind in {type(module) for module in model.modules()}}
    modules = [
        (path, module, dict(vars(module)), {name: _slot(module, name) for name in slots_of[type(module)]})
        for path, module in model.named_modules()
    ]
    copies = _Copies({id(t) for _, module, *_ in modules for t in module._parameters.values()}, max_bytes)
    with _checked(copies.report):
        try:
            with torch.inference_mode(False), torch.no_grad():
                for path, module, state, slots in modules:
                    _install_copies(copies, path, module, state, slots)
            yield
        finally:
            for _, module, state, slots in modules:
                _put_back(module, state, slots)


def _install_copies(
    copies: _Copies, path: str, module: nn.Module, state: dict[str, Any], slots: dict[str, Any]
) -> None:
    for name, value in state.items():
        if name not in _MANAGED and type(value) not in _LEAVES:
            vars(module)[name] = copies.of(value, f"{path}.{name}")
    for name, value in slots.items():
        if value is not _MISSING:
            object.__setattr__(module, name, copies.of(value, f"{path}.{name}"))


def _put_back(module: nn.Module, state: dict[str, Any], slots: dict[str, Any]) -> None:
    current = vars(module)  # written directly: a module's own __setattr__ may refuse or do more
    for added in current.keys() - state.keys():
        del current[added]
    flag = {"training": current["training"]} if "training" in current else {}  # is for preserve_modes
    current.update(state | flag)
    for name, value in slots.items():
        if value is not _MISSING:
            object.__setattr__(module, name, value)
        elif _slot(module, name) is not _MISSING:
            object.__delattr__(module, name)


def _slot_names(kind: type) -> tuple[str, ...]:
    with_slots = [vars(cls) for cls in kind.__mro__ if "__slots__" in vars(cls)]
    return tuple(name for cls in with_slots for name, v in cls.items() if isinstance(v, MemberDescriptorType))


def _slot(module: nn.Module, name: str) -> Any:
    try:
        return object.__getattribute__(module, name)
    except AttributeError:
        return _MISSING


class _Copies:
    """Working copies of attribute values: one memo for the whole model, one budget of bytes."""

    def __init__(self, kept: set[int], max_bytes: int) -> None:
        self._kept = kept  # ids of the registered parameters: clones of the caller's, under functional_call
        self._memo: dict[int, Any] = {}
        self._max_bytes = self._bytes_left = max_bytes
        self._watched: list[tuple[str, Tensor, _Mark]] = []
        self._name = ""

    def of(self, value: Any, name: str) -> Any:
        self._name = name
        return self._copy(value)

    def report(self) -> str:
        changes = [(name, change) for name, t, mark in self._watched if (change := _change(mark, _mark(t)))]
        return _describe(changes, f"the forward writes to what is too large to be copied (max_bytes={self._max_bytes})")

    def _copy(self, value: Any) -> Any:
        if type(value) in _LEAVES or isinstance(value, nn.Parameter) or id(value) in self._kept:
            return value
        if id(value) not in self._memo:
            self._memo[id(value)] = value
            self._memo[id(value)] = self._copy_new(value)
        return self._memo[id(value)]

    def _copy_new(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone() if self._fits(value, value.numel() * value.element_size()) else value
        if type(value) is np.ndarray:
            return value.copy() if self._fits(value, value.nbytes) else value
        if isinstance(value, _CONTAINERS):
            return self._copy_container(value)
        if isinstance(value, tuple):
            return self._copy_tuple(value)
        if type(value) is torch.Generator:
            clone = torch.Generator(value.device)
            return clone.set_state(value.get_state())
        return copy.deepcopy(value) if type(value) in _RNG_TYPES else value

    def _fits(self, value: Tensor | np.ndarray, num_bytes: int) -> bool:
        if num_bytes <= self._bytes_left:
            self._bytes_left -= num_bytes
            return True
        if isinstance(value, Tensor):
            self._watched.append((self._name, value, _mark(value)))
        return False

    def _copy_container(self, value: Any) -> Any:
        try:
            twin = copy.copy(value)
        except Exception:  # a subclass that cannot be copied is shared, like any other object
            return value
        self._memo[id(value)] = twin  # before the elements: it may contain itself
        if not isinstance(value, set):
            for key, element in value.items() if isinstance(value, dict) else enumerate(value):
                if (element_twin := self._copy(element)) is not element:
                    twin[key] = element_twin
        return twin

    def _copy_tuple(self, value: Any) -> Any:
        twins = [self._copy(element) for element in value]
        if all(twin is element for twin, element in zip(twins, value)):
            return value
        if type(value) is tuple:
            return tuple(twins)
        return value._make(twins) if hasattr(value, "_make") else value


@contextmanager
def preserve_registrations(model: nn.Module) -> Iterator[None]:
    """Put back which parameters, buffers, submodules and hooks every submodule has, in place.

    The dictionaries keep their identity (hook handles refer to them); the tensors' *values* are not copied.
    """
    states = [vars(module) for module in model.modules()]
    registries = [state[name] for state in states for name in _REGISTRIES if name in state]
    saved = [(r, r.copy() if r else ()) for r in registries if isinstance(r, (dict, set))]
    try:
        yield
    finally:
        for registry, entries in saved:
            if (registry or entries) and not _same_entries(registry, entries):
                registry.clear()
                registry.update(entries)


def _same_entries(a: Any, b: Any) -> bool:
    """Whether both hold the same objects in the same order: tensors must not be compared by `==`."""
    return list(a) == list(b) and (isinstance(a, set) or all(a[key] is b[key] for key in a))


@contextmanager
def silence_logging(model: nn.Module) -> Iterator[None]:
    """Make `log` and `log_dict` of every submodule that has both (a LightningModule) do nothing.

    Only these: `self.logger.experiment` or `print` in a forward still write.
    """
    saved: list[tuple[dict[str, Any], dict[str, Any]]] = []
    try:
        for module in model.modules():
            if _is_logger(module, "log") and _is_logger(module, "log_dict"):
                state = vars(module)
                saved.append((state, {name: state[name] for name in ("log", "log_dict") if name in state}))
                state.update(log=_do_nothing, log_dict=_do_nothing)
        yield
    finally:
        for state, original in saved:
            state.pop("log", None)
            state.pop("log_dict", None)
            state.update(original)


def _is_logger(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, None)
    return callable(value) and not isinstance(value, nn.Module)


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for `log` and `log_dict`."""


# ---- global numerical settings ----


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
    with _restored([_attribute_restorer(owner, name) for owner, name, _ in switches]):
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
    convolutions = _attribute_restorer(torch.backends.cudnn, "allow_tf32")
    with _restored([convolutions, lambda: torch.set_float32_matmul_precision(precision)]):
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        yield


def _attribute_restorer(obj: Any, name: str) -> Callable[[], object]:
    value = getattr(obj, name)
    return lambda: setattr(obj, name, value)


@contextmanager
def preserve_default_dtype() -> Iterator[None]:
    """Put back torch's default dtype."""
    dtype = torch.get_default_dtype()
    with _restored([lambda: torch.set_default_dtype(dtype)]):
        yield


NUMERICS: dict[str, Callable[[str], AbstractContextManager[Any]]] = {
    "autocast": no_autocast,
    "autograd": lambda device_type: with_autograd(),
    "anomaly": lambda device_type: torch.autograd.set_detect_anomaly(False),  # a NaN of ours must not end their run
    "compile": lambda device_type: eager_compiler(),
    "attention": lambda device_type: math_attention(),
    "float32": lambda device_type: full_float32(),
    "dtype": lambda device_type: preserve_default_dtype(),
}


@contextmanager
def plain_numerics(device_type: str, *, without: Collection[str] = ()) -> Iterator[None]:
    """All settings of `NUMERICS`, for the duration, so that what is measured is the plain differentiable function.

    Args:
        device_type: where the model runs, as in `torch.device(...).type`.
        without: names in `NUMERICS` to leave out.
    """
    _require_known(without, NUMERICS)
    with ExitStack() as stack:
        for name, setting in NUMERICS.items():
            if name not in without:
                stack.enter_context(setting(device_type))
        yield


# ---- the check ----


class _Mark(NamedTuple):
    """What changes when a tensor is written to: identity, version counter, storage, flag, gradient."""

    tensor: Tensor  # kept alive, so that its id stays its own
    version: int | None
    address: int | None
    requires_grad: bool | None
    grad: _Mark | None


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
    with _checked(lambda: _report(before, _marks(model))):
        yield


@contextmanager
def _checked(report: Callable[[], str]) -> Iterator[None]:
    """Raise what `report()` says, if anything, after the body, whether the body ended or raised."""
    try:
        yield
    except Exception as error:
        if message := report():
            raise DisturbedTraining(message) from error
        raise
    if message := report():
        raise DisturbedTraining(message)


def _marks(model: nn.Module) -> dict[str, _Mark]:
    return {
        f"{path}.{name}" if path else name: _mark(tensor)
        for path, module in model.named_modules()
        for registry in (module._parameters, module._buffers)
        for name, tensor in registry.items()
        if tensor is not None
    }


def _mark(tensor: Tensor) -> _Mark:
    if type(tensor) in (UninitializedParameter, UninitializedBuffer):  # refuses every question
        return _Mark(tensor, None, None, None, None)
    grad = tensor.grad if tensor.is_leaf or tensor.retains_grad else None
    version = None if tensor.is_inference() else tensor._version
    return _Mark(tensor, version, _address(tensor), tensor.requires_grad, None if grad is None else _mark(grad))


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse tensors, wrapper subclasses
        return None


def _change(before: _Mark | None, after: _Mark | None) -> str:
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
    grad = _change(before.grad, after.grad)
    return f"had its .grad changed (it {grad})" if grad else ""


def _report(before: dict[str, _Mark], after: dict[str, _Mark]) -> str:
    names = dict.fromkeys([*before, *after])
    changes = [(name, change) for name in names if (change := _change(before.get(name), after.get(name)))]
    if any(".grad" in change for _, change in changes):
        return _describe(changes, "a .backward() reached the model's own parameters; use torch.autograd.grad on clones")
    return _describe(
        changes,
        "the forward was given the model's own tensors, and Embedding(max_norm), BatchNorm in train mode or "
        "spectral_norm write to theirs; give it clones by torch.func.functional_call",
    )


def _describe(changes: list[tuple[str, str]], cause: str) -> str:
    if not changes:
        return ""
    listed = ", ".join(f"{name!r} {change}" for name, change in changes[:5])
    more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
    return f"the measurement changed the training run: {listed}{more}. Likely cause: {cause}."


# ---- all of them ----

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
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
        >>> state = torch.get_rng_state()
        >>> with undisturbed(net, mode="train"):
        ...     clones = {name: t.detach().clone() for name, t in net.state_dict().items()}
        ...     outputs = torch.func.functional_call(net, clones, (torch.ones(3, 2),))
        >>> int(net[1].num_batches_tracked), bool((torch.get_rng_state() == state).all())
        (0, True)
    """
    _require_known(without, {"numerics": None, **GUARDS, **NUMERICS})
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


def _require_known(names: Collection[str], known: Collection[str]) -> None:
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"unknown guard {unknown}; known are {sorted(known)}")
