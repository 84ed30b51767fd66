"""What is asked of Lightning: its base classes, private attributes and strategies, in one place."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

from lightning.pytorch import Callback as _Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import IterableDataset

try:  # the same Lightning under its other name; each Trainer accepts only its own Callback class
    from pytorch_lightning import Callback as _OtherCallback
except ImportError:
    _OtherCallback = _Callback  # type: ignore[misc,assignment]

#: what a callback has to be for a Trainer of either name to accept it
BASES = tuple(dict.fromkeys((_Callback, _OtherCallback)))
#: strategies that shard parameters
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy")
#: and that which makes them at the end of the set-up, as DTensors that can be gathered
GATHERED = ("ModelParallelStrategy",)


def step_axis(trainer: Any, module: Any) -> int:
    """Optimizer steps before the coming batch: the step at which Lightning draws the user's own curves.

    Steps taken by hand may be several a batch, and are counted as Lightning does (private counter). Else that counter
    is not asked: after a resume in mid-epoch Lightning 2.4 leaves it one behind.
    """
    if module.automatic_optimization:
        return int(trainer.global_step)
    counter = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if counter is None else counter)


def total_steps(trainer: Any) -> int | None:
    """Optimizer steps of the whole run, or None where Lightning does not know."""
    total = trainer.estimated_stepping_batches
    return int(total) if 0 < total < float("inf") else None


def is_trial(trainer: Any) -> bool:
    """Whether this is `fast_dev_run`, which is to leave no files."""
    return bool(getattr(trainer, "fast_dev_run", False))


def inform(text: str) -> None:
    """Text for the console, from rank zero."""
    rank_zero_info(text)


def refuse_sharded(trainer: Any) -> None:
    """Strategies whose parameters cannot be gathered module by module; refused on every rank alike."""
    name = type(trainer.strategy).__name__
    if name in SHARDED:
        raise ValueError(
            f"strategy {name} shards the parameters, which ShellDynamicsCallback cannot measure; train with DDP, or "
            "with ModelParallelStrategy and fully_shard, or measure saved checkpoints with ShellMonitor"
        )


def is_unfinished(trainer: Any, module: nn.Module) -> bool:
    """Whether layers or parameters are made only after the set-up."""
    if type(trainer.strategy).__name__ in GATHERED:
        return True
    return any(isinstance(p, UninitializedParameter) for p in module.parameters())


# -- batches ---------------------------------------------------------------------------------------------


def prepared(trainer: Any, module: Any, batch: Any) -> Any:
    """A collated batch after the precision plugin, the user's transfer hooks and the move to the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def sample_indices(loader: Any) -> Sequence[Any]:
    """What the loader's data set may be indexed with; empty where samples cannot be had so."""
    dataset = getattr(loader, "dataset", None)
    if getattr(loader, "batch_sampler", None) is None or not isinstance(dataset, Sized):
        return ()
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return ()
    return getattr(loader.sampler, "indices", range(len(dataset)))


# -- optimizers ------------------------------------------------------------------------------------------


def raw_optimizers(trainer: Any) -> list[Any]:
    """The Trainer's optimizers, however many."""
    found = trainer.optimizers
    return list(found) if isinstance(found, (list, tuple)) else [found]


def has_gradient(optimizer: Any) -> bool:
    """False where training_step returned None: the step moves nothing."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                return True
    return False


def share_of_parameters(optimizer: Any, optimizers: list[Any]) -> float:
    """Share of all parameters that one of several optimizers moves."""
    return _num_parameters([optimizer]) / max(_num_parameters(optimizers), 1)


def _num_parameters(optimizers: list[Any]) -> int:
    return sum(p.numel() for o in optimizers for group in o.param_groups for p in group["params"])
