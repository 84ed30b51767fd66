"""f and L(f) of a training step: tensors observed in one run, and the run repeated with others in their stead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from grsd_callbacks.losses import Loss, curvatures
from grsd_callbacks.probe import num_samples
from grsd_callbacks.sample_axis import SampleAxis
from grsd_callbacks.training_step.runner import StepRunner, as_floating
from grsd_callbacks.training_step.tape import Event, Place, Tape, slope


@dataclass(frozen=True, eq=False)
class StepOutputs:
    """What is observed in a step: the tensors at `places`, joined to (n, C). An `outputs=` for `ModelFunction`.

    Attributes:
        runner: runs the step.
        places: where the tensors appear.
        axes: where the samples are in each.
        scales: a factor of each, where the loss is a sum of squares.
        drop_ignored: whether outputs whose target a cross-entropy ignores are zero: they have no part in L.
        interacting: whether a sample's output depends on the rest of the batch, or on draws made for it.
        time_first: whether samples are along the second axis of the batch, so that their losses are not known.
        description: lines for the report.
    """

    runner: StepRunner
    places: tuple[Place, ...]
    axes: tuple[SampleAxis, ...]
    scales: Scales | None = None
    drop_ignored: bool = False
    interacting: bool = False
    time_first: bool = False
    description: tuple[str, ...] = ()

    def call(self, model: nn.Module, batch: Any) -> Tensor:
        """f on a batch, (n, C), in the parameters' dtype."""
        with Tape(model, self.places) as tape:
            self.runner(batch)
        events = [tape.at(place) for place in self.places]
        tensors = [_kept(events[0])] if self.drop_ignored else [event.tensor for event in events]
        n = num_samples(batch)
        parts = [axis.rows(tensor, n) for tensor, axis in zip(tensors, self.axes)]
        if self.scales is not None:
            parts = [scale * part for scale, part in zip(self.scales.values, parts, strict=True)]
        joined = torch.cat(parts, 1).to(next(model.parameters()).dtype)
        return joined if torch.is_grad_enabled() else joined.detach()

    def refresh(self, model: nn.Module, batch: Any) -> None:
        """Take the loss's weights of its parts as they are now; inside `ModelFunction.run`."""
        if self.scales is not None:
            self.scales.update(model, batch)

    def sample_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Sums of the loss function over each sample's outputs, (n,); for a loss that is one known function of f."""
        with Tape(model, self.places) as tape:
            self.runner(batch)
        event = tape.at(self.places[0])
        assert event.call is not None
        function, args, kwargs = event.call
        each = function(*args, **{**kwargs, "reduction": "none"})
        axis = self.axes[0].without_classes() if function is F.cross_entropy else self.axes[0]
        return axis.rows(each, num_samples(batch)).sum(1).to(next(model.parameters()).dtype)

    def __call__(self, raw: Tensor) -> Tensor:
        """The outputs are already f."""
        return raw


def _kept(event: Event) -> Tensor:
    """Logits with those of ignored targets set to zero."""
    assert event.call is not None
    _, args, kwargs = event.call
    target = args[1] if len(args) > 1 else kwargs["target"]
    if target.is_floating_point():
        return event.tensor
    return event.tensor * (target != kwargs.get("ignore_index", -100)).unsqueeze(1)


@dataclass(frozen=True, eq=False)
class StepLoss:
    """L as a function of f: the step run again with f in the stead of what it observed.

    Where dependence on f is that of c times one `F.mse_loss` or `F.cross_entropy`, only its targets are taken from the
    run, and the function itself is evaluated in the precision of f.

    Attributes:
        outputs: the observed places.
        aliases: for each of them, all places where to put f.
        exact: whether it is such a loss.
        complete: whether nothing bypasses f, so that the step's own loss can be the reference for |grad L|^2.
        plain: a cross-entropy without weights and smoothing.
        start: c at the start, where nu is to follow it; else 0.
        unit: what one number of the loss function with reduction="none" counts in L, at the start.
    """

    outputs: StepOutputs
    aliases: tuple[tuple[Place, ...], ...]
    exact: bool = False
    complete: bool = True
    plain: bool = False
    start: float = 0.0
    unit: float = 0.0
    takes_targets_as_they_are = True

    def __call__(self, f: Tensor, batch: Any) -> Tensor:
        """The loss, a differentiable scalar."""
        return self._known(f, batch) if self.exact else self._replayed(f, batch)

    @property
    def is_replayed(self) -> bool:
        """Whether L is the step itself, run again, with whatever weights it has by now."""
        return not self.exact

    @property
    def is_plain_cross_entropy(self) -> bool:
        """Whether the energies have the meaning they have for a plain cross-entropy."""
        return self.plain

    @property
    def direct(self) -> Callable[[Any], Tensor] | None:
        """The loss of the step itself, whatever way the parameters enter it; None where that is more than L(f)."""
        return self.outputs.runner if self.complete else None

    def growth(self, batch: Any) -> float:
        """c now over c at the start: a factor of the loss may follow a schedule, and the scale nu goes with it."""
        return self._call(batch)[1] / self.start if self.exact and self.start > 0 else 1.0

    def _call(self, batch: Any) -> tuple[Event, float]:
        """The call of the loss function, and c."""
        with torch.enable_grad(), Tape(self.outputs.runner.model, self.outputs.places) as tape:
            loss = self.outputs.runner(batch)
        event = tape.at(self.outputs.places[0])
        c = slope(loss, event.value)
        if c is None or event.call is None:
            raise RuntimeError("training_step's loss no longer depends on the loss function found at the start")
        return event, c

    def _known(self, f: Tensor, batch: Any) -> Tensor:
        event, c = self._call(batch)
        assert event.call is not None
        function, args, kwargs = event.call
        like = event.tensor
        given = _shaped(f, like, self.outputs.axes[0])
        args, kwargs = tree_map(lambda x: given if x is like else as_floating(x, f.dtype), (args, kwargs))
        return c * function(*args, **kwargs)

    def _replayed(self, f: Tensor, batch: Any) -> Tensor:
        parts = f.split(self.widths(f, batch), 1)
        if self.outputs.scales is not None:
            parts = tuple(part / scale for scale, part in zip(self.outputs.scales.values, parts, strict=True))
        put = {
            place: partial(_shaped, part, axis=axis, wide=place.kind != "module")
            for part, axis, places in zip(parts, self.outputs.axes, self.aliases)
            for place in places
        }
        with Tape(self.outputs.runner.model, (), put):
            return self.outputs.runner(batch)

    def widths(self, f: Tensor, batch: Any) -> list[int]:
        """Columns of f by place."""
        if len(self.outputs.places) == 1:
            return [f.shape[1]]
        with torch.no_grad(), Tape(self.outputs.runner.model, self.outputs.places) as tape:
            self.outputs.runner(batch)
        return [tape.at(place).tensor.numel() // f.shape[0] for place in self.outputs.places]


class Scales:
    """Factors by which the parts of f are multiplied, so that the loss is equally curved in all of them.

    The weights of a loss's terms may change during training; `update` follows them.

    Args:
        loss: of the parts as they are.

    Attributes:
        values: one for each part, the first 1.
    """

    def __init__(self, loss: StepLoss) -> None:
        self._loss = loss
        self.values = (1.0,) * len(loss.outputs.places)

    def update(self, model: nn.Module, batch: Any) -> bool:
        """Whether the loss is a sum of squares; if it is, scale by its curvatures at the present parameters."""
        with torch.no_grad():
            f = self._loss.outputs.call(model, batch)
        found = curvatures(Loss(self._loss, "general"), f, batch, self._loss.widths(f, batch))
        if found is None:
            return False
        values = tuple((curvature / found[0]) ** 0.5 for curvature in found)
        if not all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(values, self.values, strict=True)):
            self.values = values
        return True


def _shaped(part: Tensor, like: Tensor, axis: SampleAxis, wide: bool = True) -> Tensor:
    """Rows (n, C_k) in the layout of the tensor they stand for; its dtype where others are computed with it."""
    # not a view of f: what replaces a layer's output may be written to in place
    return axis.put_back(part, like).to(part.dtype if wide else like.dtype).clone()
