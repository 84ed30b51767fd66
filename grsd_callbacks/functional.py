"""A model as a pure function of its parameters, theta -> f(theta), on private copies.

Everything a forward can touch is a copy: trainable parameters (differentiable leaves), frozen parameters
and buffers. All work runs inside one `torch.func.functional_call` of a wrapper module, so that a forward
that is run again later (activation checkpointing) still sees the copies.

Letters: n samples, C outputs per sample, m = n C, P parameters.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_map

from grsd_callbacks.guard import undisturbed

T = TypeVar("T")
ParameterFilter = Callable[[str, nn.Parameter], bool] | Iterable[str] | str | None


class _Inside(nn.Module):
    """Runs a function while functional_call has the copies in place of the model's tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class ModelFunction:
    """The map theta -> outputs of a module, evaluated on copies, leaving the module bit-identical.

    Args:
        model: any `nn.Module` in eager mode or compiled by `torch.compile`.
        params: which trainable parameters form theta: None (all that require a gradient), a predicate
            `(name, parameter) -> bool`, or name patterns such as `"head.*"`.
        outputs: function from the raw model output to a tensor of shape (n, ...); None understands a
            tensor, an object or mapping with `logits`, and a one-element tuple.
        dtype: floating dtype of the copies; None keeps float32/float64 and raises half precision to float32.
        mode: "eval" (dropout off, running statistics; the default) or "train".

    Raises:
        ValueError: no trainable parameters, uninitialised, complex, sharded or scripted modules.

    Cost: one copy of parameters and buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        params: ParameterFilter = None,
        outputs: Callable[[Any], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        mode: str = "eval",
    ) -> None:
        check_function("outputs", outputs)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating torch.dtype or None, got {dtype!r}")
        selected = select_parameters(model, params)
        self.model = model
        self.mode = mode
        self.extract = outputs
        self._target = dtype or _working_dtype(selected.values())
        self._inside = False
        self.parameters = {name: self._copy(p).requires_grad_() for name, p in selected.items()}
        rest = {name: p for name, p in model.named_parameters() if name not in selected}
        self._constants = {name: self._copy(t) for name, t in [*rest.items(), *model.named_buffers()]}
        self._wrapper = _Inside(model)
        self._wrapper.training = model.training

    @property
    def num_parameters(self) -> int:
        """P, the length of theta."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def constants(self) -> list[Tensor]:
        """Copies of frozen parameters and buffers."""
        return list(self._constants.values())

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the copies."""
        return self._target

    @property
    def device(self) -> torch.device:
        """Device of the first selected parameter."""
        return next(iter(self.parameters.values())).device

    @property
    def copies(self) -> list[Tensor]:
        """All private copies: parameters, frozen ones and buffers, in the module's order."""
        return [*self.parameters.values(), *self._constants.values()]

    @property
    def interacting(self) -> bool:
        """Whether the samples of a batch are known to interact, so that no part of it can be run alone."""
        return bool(getattr(self.extract, "interacting", False))

    def moved(self, velocity: dict[str, Tensor], h: float, dtype: torch.dtype | None = None) -> ModelFunction:
        """The same function at theta + h velocity, on copies of its own (in another dtype if given)."""
        other = copy.copy(self)
        other._target = dtype or self._target
        other._constants = {name: other._copy(t) for name, t in self._constants.items()}
        other.parameters = {
            name: (other._copy(p) + h * velocity[name].detach().to(other._target)).requires_grad_()
            for name, p in self.parameters.items()
        }
        other._inside = False
        return other

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` with the copies in place and the model guarded; nested calls are free."""
        if self._inside:
            return function()
        self._inside = True
        try:
            with undisturbed(self.model, mode=self.mode):
                if "_dtype" in vars(self.model):  # LightningModule.dtype, which users cast with; put back by the guard
                    vars(self.model)["_dtype"] = self._target
                return self._call(self.parameters, function)
        finally:
            self._inside = False

    def raw(self, inputs: Any, parameters: dict[str, Tensor] | None = None) -> Any:
        """The module's own output on `inputs` at `parameters` (default: the copies). Call inside `run`."""
        inputs = tree_map(self._as_input, inputs)
        call = getattr(self.extract, "call", call_model)  # what is observed may be more than the model's own call
        if parameters is None:
            return _with_gradients_if_needed(lambda: call(self.model, inputs))
        return self._call(parameters, lambda: _with_gradients_if_needed(lambda: call(self.model, inputs)))

    def refresh(self, inputs: Any) -> None:
        """Bring what is observed up to date with the model; most of it does not change."""
        update = getattr(self.extract, "refresh", None)
        if update is not None:
            self.run(lambda: update(self.model, tree_map(self._as_input, inputs)))

    def outputs(self, inputs: Any, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """f, shape (n, ...), differentiable in the copies. Call inside `run`."""
        return as_outputs(self.raw(inputs, parameters), self.extract)

    def _call(self, parameters: dict[str, Tensor], function: Callable[[], T]) -> T:
        tensors = {f"model.{name}": t for name, t in {**self._constants, **parameters}.items()}
        return functional_call(self._wrapper, tensors, (function,))

    def _copy(self, tensor: Tensor) -> Tensor:
        clone = tensor.detach().clone()
        return clone.to(self._target) if clone.is_floating_point() else clone

    def _as_input(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().to(self.device)
        return leaf.to(self._target) if leaf.is_floating_point() else leaf


def _with_gradients_if_needed(call: Callable[[], Any]) -> Any:
    """The result of a forward; under `no_grad` also of one that differentiates its own layers (PINNs, forces)."""
    try:
        return call()
    except RuntimeError as error:
        if torch.is_grad_enabled() or "not require grad" not in str(error):
            raise
    with torch.enable_grad():
        raw = call()
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, raw)


def select_parameters(model: nn.Module, params: ParameterFilter = None) -> dict[str, nn.Parameter]:
    """The trainable parameters named by `params`, in the module's order, tied ones once.

    Raises:
        TypeError: `model` is no module, or `params` of an unknown kind.
        ValueError: nothing is selected, or something that cannot be differentiated.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule) or any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        raise ValueError(
            "model holds a torch.jit module, which cannot be differentiated functionally; use the original"
        )
    keep = _predicate(params)
    selected = {}
    for name, p in model.named_parameters():
        if isinstance(p, UninitializedParameter):
            raise ValueError(
                f"parameter {name!r} is not initialised yet; run one forward (lazy modules) before measuring"
            )
        if not p.requires_grad or not keep(name, p):
            continue
        if p.is_complex():
            raise ValueError(
                f"parameter {name!r} is complex; complex parameters are not supported, exclude it by params="
            )
        if hasattr(p, "full_tensor"):
            raise ValueError(f"parameter {name!r} is sharded (DTensor); measure an unsharded copy of the model")
        selected[name] = p
    if not selected:
        why = "params= selects none of them" if any(p.requires_grad for p in model.parameters()) else "none has any"
        raise ValueError(f"model has no trainable parameters to measure ({why}); nothing to differentiate")
    return selected


def _predicate(params: ParameterFilter) -> Callable[[str, nn.Parameter], bool]:
    if params is None:
        return lambda name, p: True
    if callable(params):
        return params
    patterns = check_patterns(params)
    return lambda name, p: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(params: Any) -> list[str]:
    """The name patterns; none for a predicate, which is looked at when it is called.

    Raises:
        TypeError: `params` is something else.
    """
    if params is None or callable(params):
        return []
    patterns = [params] if isinstance(params, str) else list(params) if isinstance(params, Iterable) else [params]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError("params must be None, a predicate (name, parameter) -> bool, or name patterns")
    return patterns


def check_function(name: str, value: Any) -> None:
    """Raise a `TypeError` unless an optional function is one."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {type(value).__name__}")


def _working_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    """float64 if every parameter is, else float32 (half precision is raised to it)."""
    return torch.float64 if all(p.dtype == torch.float64 for p in parameters) else torch.float32


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The module's own call: mappings are keyword arguments, tuples and lists positional ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def as_outputs(raw: Any, extract: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The output tensor f, shape (n, ...), of a raw model output.

    Raises:
        ValueError: no floating tensor with a sample dimension can be found; names the `outputs=` remedy.
    """
    value = extract(raw) if extract is not None else _guess_output(raw)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"outputs: expected a tensor of shape (n, ...) from the model, got {type(value).__name__}; "
            "give outputs= a function that picks the tensor"
        )
    if value.dim() == 0:
        raise ValueError("outputs: the model returned a scalar; outputs must have shape (n, ...), one row per sample")
    if not value.is_floating_point():
        raise ValueError(
            f"outputs: the model returned {value.dtype}, which is not differentiable; pick a floating output"
        )
    return value


def _guess_output(raw: Any) -> Any:
    if isinstance(raw, Mapping) and "logits" in raw:
        return raw["logits"]
    if not isinstance(raw, Tensor) and isinstance(getattr(raw, "logits", None), Tensor):
        return raw.logits
    if isinstance(raw, (tuple, list)) and len(raw) == 1:
        return raw[0]
    return raw
