"""Which function of a LightningModule is measured, and with which loss: forward, or its own `training_step`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.guard import DisturbedTraining
from grsd_callbacks.losses import Loss, check_pair, resolve_loss
from grsd_callbacks.probe import Probe, unpack_batch
from grsd_callbacks.refusals import explained
from grsd_callbacks.training_step import (
    Observed,
    StepRunner,
    batch_type,
    check_step,
    observe_step,
    step_name,
    step_pair,
    step_source,
)


class MeasuredFunction:
    """What is measured: `forward` with a known loss, or the training step with what it returns.

    Args:
        loss, nu, outputs, unpack, params, dtype: as the user gave them to the callback.

    Attributes:
        loss: the known loss; None before `find`, and where the training step is measured.
        step: None for forward, else the submodule whose outputs are the function ("": found by a run).
        options: keyword arguments `params`, `outputs`, `dtype` of the `ModelFunction` of forward.

    Raises:
        ValueError, TypeError: arguments that do not go together.
    """

    def __init__(self, loss: Any, nu: float | None, outputs: Any, unpack: Any, params: Any, dtype: Any) -> None:
        self._step_asked = step_name(outputs)
        self._auto = isinstance(loss, str) and loss == "auto"
        if self._step_asked is not None and (not self._auto or unpack is not None):
            given = "loss=" if not self._auto else "unpack="
            raise ValueError(f"outputs={outputs!r} takes loss and batch as training_step has them; leave {given} out")
        if not self._auto:
            resolve_loss(loss, nu)
        self._asked, self._nu, self._unpack = loss, nu, unpack or unpack_batch
        self.options = {"params": params, "outputs": None if self._step_asked is not None else outputs, "dtype": dtype}
        self.loss: Loss | None = None
        self.step: str | None = None
        self._why = ""

    # -- before any data is seen -------------------------------------------------------------------------

    def find(self, module: nn.Module) -> None:
        """Forward with a loss that is known, or the module's own training_step."""
        self.step, self._why, self.loss = self._step_asked, "", None
        if self.step is None:
            try:
                self.loss = self._known_loss(module)
            except ValueError as error:
                self._take_step(module, error)
        else:
            check_step(module, self.step)

    def _known_loss(self, module: nn.Module) -> Loss:
        if not self._auto:
            return resolve_loss(self._asked, self._nu)
        found = auto_loss(module)
        names = [name for name, value in losses_of(module).items() if value is found]
        return replace(resolve_loss(found, self._nu), source=f"(attribute {names[0]!r} of the module)")

    def _take_step(self, module: nn.Module, reason: Exception) -> None:
        """Measure training_step where forward cannot be measured and nothing else was asked for; else raise."""
        if not self._auto or self.options["outputs"] is not None or self._unpack is not unpack_batch:
            raise reason
        try:
            check_step(module)
        except ValueError as error:
            why = str(error).removeprefix("outputs='training_step': ")  # which nobody asked for
            raise ValueError(f"{reason}. Nor can its own training step be measured: {why}") from reason
        self.step, self.loss, self._why = "", None, str(reason)

    # -- on data -----------------------------------------------------------------------------------------

    def read(self, batch: Any) -> tuple[Any, Any]:
        """(inputs, targets) of a batch."""
        reading: Callable[[Any], tuple[Any, Any]] = self._unpack if self.step is None else step_pair
        return reading(batch)

    def source(self, probe: Any) -> Any:
        """The probe that the user gave, as `probe_from` takes it."""
        return step_source(probe) if self.step is not None else probe

    def check_pair(self, module: nn.Module, probe: Probe) -> None:
        """Raise where a known loss does not fit what forward makes of a probe."""
        if self.loss is not None:
            check_pair(self.loss, self.outputs(module, probe), probe.targets)

    def check_forward(self, module: nn.Module, batch: Any) -> None:
        """Where loss="auto" has found a loss: whether it fits forward on the training batches."""
        if self.loss is None or not self._auto:
            return
        try:
            self.check_pair(module, Probe(*self._unpack(batch)).check())
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, DisturbedTraining):
                raise
            self._take_step(module, error)

    def outputs(self, module: nn.Module, probe: Probe, outputs: Any = None) -> Tensor:
        """The function's values on a probe (`outputs`: those of an observed training step)."""
        function = ModelFunction(module, **{**self.options, "outputs": outputs or self.options["outputs"]})
        with torch.no_grad():
            return function.run(lambda: function.outputs(probe.inputs))

    def run(self, module: nn.Module, probe: Probe, batch: Any) -> None:
        """What is measured, once on a probe, for whatever it raises."""
        if self.step is None:
            self.outputs(module, probe)
            return
        runner = StepRunner(module, batch_type(batch))
        function = ModelFunction(module, params=self.options["params"], dtype=self.options["dtype"])
        with torch.no_grad():
            function.run(lambda: runner(probe.inputs))

    def observed(self, module: nn.Module, probe: Probe, batch: Any) -> Observed:
        """The training step on a probe, taken apart."""
        function = ModelFunction(module, params=self.options["params"], dtype=self.options["dtype"])
        runner = StepRunner(module, batch_type(batch))
        try:
            with explained():
                return observe_step(function, probe, self.step or "", runner, nu=self._nu, why=self._why.split(";")[0])
        except ValueError as error:
            if not self._why:
                raise
            raise ValueError(f"{self._why}. Nor can its own training step be measured: {error}") from error


def auto_loss(module: nn.Module) -> Any:
    """The loss that a LightningModule holds as an attribute.

    Raises:
        ValueError: none or several are found; names the argument to give.
    """
    found = losses_of(module)
    if len({_options(resolve_loss(value).function) for value in found.values()}) == 1:
        return next(iter(found.values()))
    what = "no nn.MSELoss or nn.CrossEntropyLoss attribute" if not found else f"several losses ({', '.join(found)})"
    raise ValueError(
        f"loss='auto' found {what} on {type(module).__name__}; give loss='mse', loss='cross_entropy' or "
        "loss= a callable (outputs, targets) -> scalar"
    )


def losses_of(module: nn.Module) -> dict[str, Any]:
    """Mean squared errors and cross-entropies among the attributes of a module."""
    found: dict[str, Any] = {}
    for name, value in [*vars(module).items(), *module.named_children()]:
        if isinstance(value, (nn.MSELoss, nn.CrossEntropyLoss)):
            found[name] = value
        elif value in (F.mse_loss, F.cross_entropy) if callable(value) and not isinstance(value, nn.Module) else False:
            found[name] = value
    return found


def _options(loss: Any) -> tuple[Any, ...]:
    """What tells one mean squared error or cross-entropy from another."""
    weight = getattr(loss, "weight", None)
    options = [getattr(loss, name, None) for name in ("reduction", "ignore_index", "label_smoothing")]
    return (type(loss), *options, None if weight is None else tuple(weight.tolist()))
