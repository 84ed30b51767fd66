"""What happens between parameters and loss in one run: what submodules return, losses are given, and is squared.

A `Tape` records these tensors with their places, and can put others in their stead. `frontier` walks the autograd
graph back from the loss and finds the places through which all dependence on the parameters passes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

#: functions that end a network: what they are given is its output
LOSS_FUNCTIONS = frozenset(
    getattr(F, name)
    for name in (
        "binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy ctc_loss "
        "gaussian_nll_loss hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss "
        "multi_margin_loss multilabel_margin_loss multilabel_soft_margin_loss nll_loss poisson_nll_loss "
        "smooth_l1_loss soft_margin_loss triplet_margin_loss"
    ).split()
)

_TORCH = os.path.dirname(torch.__file__) + os.sep
_POWERS = frozenset((torch.pow, Tensor.pow, Tensor.__pow__))
_SQUARES = frozenset((torch.square, Tensor.square))
_PRODUCTS = frozenset((torch.mul, Tensor.mul, Tensor.__mul__))

Edge = tuple[Node, int]


@dataclass(frozen=True)
class Place:
    """Where a tensor appears in a run: part `part` of call number `call` of a submodule, loss function or square."""

    kind: str
    name: str
    call: int
    part: int | str

    def __str__(self) -> str:
        if self.kind == "loss":
            return f"what F.{self.name} is given"
        if self.kind == "square":
            return f"what is squared in {self.name.split(' < ')[0]}" + (f" (call {self.call + 1})" if self.call else "")
        return f"the output of {self.name or 'forward'}" + (f" (call {self.call + 1})" if self.call else "")


@dataclass(frozen=True, eq=False)
class Event:
    """A tensor seen at a place; for loss functions also the call itself and its value."""

    place: Place
    tensor: Tensor
    edge: Edge | None
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None = None
    value: Any = None


class Tape(TorchFunctionMode):
    """Watch one run of `model`.

    Args:
        model: all its submodules are watched, or those that `places` name.
        places: record only these, whether they need a gradient or not; None: all that need one.
        replace: tensors to put in the stead of others; each is called with the tensor that is replaced.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Collection[Place] | None = None,
        replace: Mapping[Place, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.replace = dict(replace or {})
        self.places = None if places is None else {*places, *self.replace}
        self._sees_squares = self.places is None or any(place.kind == "square" for place in self.places)
        self.events: list[Event] = []
        self._calls: dict[tuple[str, str], int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> Tape:
        wanted = None if self.places is None else {p.name for p in self.places if p.kind == "module"}
        for name, module in self.model.named_modules():
            if wanted is None or name in wanted:
                self._handles.append(module.register_forward_hook(partial(self._returned, name)))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for handle in self._handles:
            handle.remove()

    def at(self, place: Place) -> Event:
        """The event at a place.

        Raises:
            RuntimeError: the run did not pass there.
        """
        for event in self.events:
            if event.place == place:
                return event
        raise RuntimeError(f"training_step took another way than at the start: {place} was not seen")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in LOSS_FUNCTIONS:
            return self._other(func, args, kwargs or {})
        number = self._count("loss", func.__name__)
        given = {**dict(enumerate(args)), **(kwargs or {})}
        seen = {}
        for part, value in given.items():
            place = Place("loss", func.__name__, number, part)
            if self._wants(place, value):
                seen[place] = value
                if place in self.replace:
                    given[part] = self.replace[place](value)
        if any(place in self.replace for place in seen):
            given = {part: _like(value, seen, given) for part, value in given.items()}
        args = tuple(given[part] for part in range(len(args)))
        kwargs = {part: value for part, value in given.items() if isinstance(part, str)}
        value = func(*args, **kwargs)
        self.events += [Event(p, t, _edge(t), (func, args, kwargs), value) for p, t in seen.items()]
        return value

    def _other(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call of another function: whether it squares a tensor."""
        if self._sees_squares and _is_square(func, args, kwargs):
            base = args[0]
            site = _call_site()
            place = Place("square", site, self._count("square", site), 0)
            if self._wants(place, base):
                self.events.append(Event(place, base, _edge(base)))
                if place in self.replace:
                    other = self.replace[place](base)
                    args = tuple(other if x is base else x for x in args)
        return func(*args, **kwargs)

    def _returned(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        number = self._count("module", name)
        leaves, spec = tree_flatten(output)
        changed = False
        for part, leaf in enumerate(leaves):
            place = Place("module", name, number, part)
            if self._wants(place, leaf):
                self.events.append(Event(place, leaf, _edge(leaf)))
                if place in self.replace:
                    leaves[part], changed = self.replace[place](leaf), True
        return tree_unflatten(leaves, spec) if changed else None

    def _count(self, kind: str, name: str) -> int:
        number = self._calls.get((kind, name), 0)
        self._calls[kind, name] = number + 1
        return number

    def _wants(self, place: Place, value: Any) -> bool:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return False
        return value.requires_grad if self.places is None else place in self.places


def _call_site() -> str:
    """The lines of a program that have led to a call, up to its training step: file:line < file:line < ...

    Squares are told apart by them, so that one which is not made in every run (for a log, say) shifts no other.
    """
    frame = sys._getframe(2)
    lines: list[str] = []
    while frame.f_back is not None:
        code = frame.f_code
        if code.co_filename != __file__ and not code.co_filename.startswith(_TORCH):
            lines.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno}")
            if code.co_name == "training_step":
                break
        frame = frame.f_back
    return " < ".join(lines)


def _is_square(func: Any, args: Any, kwargs: Any) -> bool:
    """x**2, x.square() or x * x."""
    if kwargs or not args or not isinstance(args[0], Tensor):
        return False
    if func in _SQUARES:
        return len(args) == 1
    if len(args) != 2:
        return False
    return (
        args[1] is args[0] if func in _PRODUCTS else func in _POWERS and type(args[1]) in (int, float) and args[1] == 2
    )


def _edge(tensor: Tensor) -> Edge | None:
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def _like(value: Any, seen: Mapping[Place, Tensor], given: Mapping[Any, Any]) -> Any:
    """Other floating arguments in the dtype of those that were replaced."""
    dtype = given[next(iter(seen)).part].dtype
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def frontier(
    loss: Tensor, events: Collection[Event], parameters: Mapping[int, str]
) -> tuple[list[list[Event]], list[str]]:
    """Walk back from the loss: the tensors met first, and the parameters met without passing any of them.

    Args:
        loss: a scalar with its graph.
        events: where to stop.
        parameters: names by `id` of the leaf tensors.

    Returns:
        For each tensor all its events, in order of appearance; and names.
    """
    stops: dict[Edge, list[Event]] = {}
    for event in events:
        if event.edge is not None:
            stops.setdefault(event.edge, []).append(event)
    met: dict[Edge, list[Event]] = {}
    direct: dict[str, None] = {}
    start = _edge(loss)
    stack = [] if start is None else [start]
    seen = set(stack)
    while stack:
        edge = stack.pop()
        if edge in stops:
            met[edge] = stops[edge]
            continue
        name = parameters.get(id(getattr(edge[0], "variable", None)))
        if name is not None:
            direct[name] = None
        for below in edge[0].next_functions:
            if below[0] is not None and below not in seen:
                seen.add(below)  # type: ignore[arg-type]
                stack.append(below)  # type: ignore[arg-type]
    return [found for edge, found in stops.items() if edge in met], list(direct)


def slope(loss: Tensor, value: Any) -> float | None:
    """c = d loss / d value for a scalar value of the same graph; None where there is none, or where c depends on the
    value, as for the root of a squared error.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        return None
    (found,) = torch.autograd.grad(loss, value, torch.ones_like(loss), create_graph=True, allow_unused=True)
    if found is None or not float(found.detach()) > 0 or _bends(found, value):
        return None
    return float(found.detach())


def _bends(found: Tensor, value: Tensor) -> bool:
    """Whether the derivative by a value depends on it."""
    if not found.requires_grad:
        return False
    try:
        (bend,) = torch.autograd.grad(found, value, torch.ones_like(found), retain_graph=True, allow_unused=True)
    except RuntimeError:  # no second derivative: it cannot be excluded
        return True
    return bend is not None and float((bend * value).detach().abs()) > 1e-6 * float(found.detach())
