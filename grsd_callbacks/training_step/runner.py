"""One run of a module's `training_step` on a batch, without a trace; and what cannot be run so."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from grsd_callbacks.probe import Probe

#: `outputs="training_step"`, or with the name of a submodule after a colon
TRAINING_STEP = "training_step"
#: seed of the draws inside a step
_SEED = 20
#: what a logger may still be asked while a step is measured
_LOGGER_FACTS = ("name", "version", "log_dir", "save_dir", "root_dir")
REMEDY = (
    "name the submodule whose output is the function (outputs='training_step:NAME'), or give loss= a callable "
    "(outputs, targets) -> scalar and let forward be measured"
)


@dataclass(frozen=True, eq=False)
class StepRunner:
    """Runs `training_step` on a batch without a trace. Call it inside `ModelFunction.run`.

    Attributes:
        model: the LightningModule, or any module with a `training_step(batch[, batch_idx[, dataloader_idx]])`.
        rebuild: makes the batch's own type from a plain dict, for batches that are no dict themselves.
        seed: of the draws in the step.
    """

    model: nn.Module
    rebuild: Callable[[Any], Any] | None = None
    seed: int = _SEED

    def __call__(self, batch: Any) -> Tensor:
        """The loss, a scalar; with its graph where gradients are enabled.

        The step itself always runs with gradients, as in training: it may differentiate its own outputs.

        Raises:
            ValueError: training_step returned no differentiable scalar loss.
        """
        dtype = next(self.model.parameters()).dtype
        batch = tree_map(lambda leaf: as_floating(leaf, dtype), batch)
        if self.rebuild is not None:
            batch = self.rebuild(batch)
        with muted(self.model), torch.enable_grad():
            fix_draws(self.model, self.seed)
            loss = _loss_of(self.model.training_step(batch, *self._more_arguments()))  # type: ignore[operator]
        return loss if torch.is_grad_enabled() else loss.detach()

    def _more_arguments(self) -> tuple[int, ...]:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(self.model.training_step).parameters.values()  # type: ignore[arg-type]
        if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
            return (0,)
        return (0,) * (sum(p.kind in kinds for p in parameters) - 1)


def _loss_of(returned: Any) -> Tensor:
    loss = returned.get("loss") if isinstance(returned, Mapping) else returned
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"training_step must return a scalar loss, or a dict with 'loss', got {what}; {REMEDY}")
    return loss.reshape(())


def check_step(model: nn.Module, at: str = "") -> None:
    """Refuse what cannot be run as a training step, before any data is seen.

    Args:
        model: the LightningModule.
        at: name of a submodule, or nothing.

    Raises:
        ValueError: with the reason and the remedy.
    """
    step = getattr(model, "training_step", None)
    kind = type(model).__name__
    if not callable(step):
        raise ValueError(
            f"outputs='training_step': {kind} has no training_step; give loss= and let forward be measured"
        )
    if getattr(model, "automatic_optimization", True) is False:
        raise ValueError(
            f"outputs='training_step': {kind} optimizes manually, so its training_step would move the parameters; "
            "give loss= and let forward be measured, as in ShellDynamicsCallback(loss='cross_entropy') or "
            "ShellDynamicsCallback(loss=lambda outputs, targets: (outputs - targets).square().mean())"
        )
    if "dataloader_iter" in inspect.signature(step).parameters:
        raise ValueError(
            f"outputs='training_step': the training_step of {kind} takes a dataloader_iter, not a batch; give loss= a "
            "callable (outputs, targets) -> scalar, and forward is measured"
        )
    names = [name for name, _ in model.named_modules() if name]
    if at and at not in names:
        listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise ValueError(f"outputs='training_step:{at}': {kind} has no submodule {at!r}; it has {listed}")


class _Muted:
    """Stands in for a logger: knows where it writes, and writes nothing."""

    def __init__(self, logger: Any = None) -> None:
        self._logger = logger

    def __getattr__(self, name: str) -> Any:
        if self._logger is not None and name in _LOGGER_FACTS:
            return getattr(self._logger, name)
        return _Muted()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Muted()


@contextmanager
def muted(model: nn.Module) -> Iterator[None]:
    """No logger is written to, nothing is printed by `self.print`, and collectives of the step are refused."""
    trainer = getattr(model, "_trainer", None)
    state = vars(model)
    saved: dict[str, Any] = {name: state[name] for name in ("print", "all_gather") if name in state}
    if hasattr(model, "print"):
        state["print"] = lambda *args, **kwargs: None
    if getattr(trainer, "world_size", 1) > 1:
        state["all_gather"] = _refuse_collective
    loggers = getattr(trainer, "loggers", None)
    try:
        if loggers:
            trainer.loggers = [_Muted(logger) for logger in loggers]  # type: ignore[union-attr]
        yield
    finally:
        if loggers:
            trainer.loggers = loggers  # type: ignore[union-attr]
        for name in ("print", "all_gather"):
            state.pop(name, None)
        state.update(saved)


def _refuse_collective(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError(f"training_step calls self.all_gather, which is not measured in a distributed run; {REMEDY}")


def fix_draws(model: nn.Module, seed: int) -> None:
    """Seed the global generators; whoever measures has them put back by the guard."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if next(model.parameters()).device.type == "mps":
        torch.mps.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def as_floating(leaf: Any, dtype: torch.dtype) -> Any:
    """Floating tensors in another dtype, all else unchanged."""
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def step_name(outputs: Any) -> str | None:
    """The submodule that `outputs=` names ("" if none), or None where it does not ask for the training step.

    Raises:
        ValueError: another string.
    """
    if not isinstance(outputs, str):
        return None
    asked, _, name = outputs.partition(":")
    if asked != TRAINING_STEP:
        raise ValueError(f"outputs must be a function, 'training_step' or 'training_step:NAME', got {outputs!r}")
    return name


def batch_type(batch: Any) -> Callable[[Any], Any] | None:
    """How to make a batch of this type from a plain dict; None where it is one, or no mapping at all."""
    return type(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else None


def step_pair(batch: Any) -> tuple[Any, Any]:
    """A batch as (inputs, targets) of a probe: a training step takes the whole of it."""
    plain = batch if batch_type(batch) is None else dict(batch)
    return plain, plain


def step_source(probe: Any) -> Any:
    """A user's probe: a batch of its own, or a loader of batches."""
    return Probe(*step_pair(probe)) if isinstance(probe, (tuple, list, Mapping)) else probe
