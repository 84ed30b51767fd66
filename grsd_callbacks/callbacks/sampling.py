"""The probe where none is given: samples of the first batches of all ranks, or of the training data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grsd_callbacks.callbacks.discovery import MeasuredFunction
from grsd_callbacks.callbacks.lightning_facts import prepared, sample_indices
from grsd_callbacks.distributed import Group
from grsd_callbacks.guard import DisturbedTraining, preserve_object_rng, undisturbed
from grsd_callbacks.memory import is_out_of_memory
from grsd_callbacks.observation import choose_observe
from grsd_callbacks.outlet import warn
from grsd_callbacks.probe import Probe, concatenate, probe_from, samples_wanted


@dataclass(frozen=True, eq=False)
class Sampling:
    """How samples are chosen for a function to be measured on.

    Attributes:
        function: what is measured.
        group: the ranks, all of which call `auto_probe` alike.
        num_probe: samples wanted of all ranks together; None: by the width of the outputs.
        observe, num_projections: what of the outputs is measured.
    """

    function: MeasuredFunction
    group: Group
    num_probe: int | None
    observe: str | None
    num_projections: int

    def auto_probe(self, trainer: Any, module: nn.Module, batch: Any) -> Probe:
        """Clones of samples of every rank's first batch, in rank order, or of the data set's where one has too few."""
        group = self.group
        first, wanted = group.together(lambda: self._first_batch(module, batch))
        wanted = group.integers([wanted])[0]
        mine = group.share_of(wanted)
        if not group.all(first.num_samples >= mine.stop - mine.start):
            first = self._from_data_set(trainer, module, first, wanted)
        count = mine.stop - mine.start
        if group.size > 1:
            return concatenate(group.gather(group.together(lambda: probe_from(first, count))))
        return self._cut(module, first, count, batch)

    def _cut(self, module: nn.Module, first: Probe, count: int, batch: Any) -> Probe:
        """The first samples of a batch; all of them where the model does not run on some alone."""
        if count >= first.num_samples:
            return probe_from(first)
        try:
            kept = probe_from(first, count)
            self.function.run(module, kept.to(device_of(module)), batch)
        except Exception as error:  # a foreign forward may raise anything
            if isinstance(error, DisturbedTraining) or is_out_of_memory(error):
                raise
            asked = "" if self.num_probe is None else f", not num_probe = {self.num_probe}"
            warn(
                f"grsd: the model does not run on {count} of the {first.num_samples} samples of a batch alone "
                f"(the nodes of a graph?), so the probe is the whole batch{asked}. Give probe= for another one."
            )
            return probe_from(first)
        return kept

    def _first_batch(self, module: nn.Module, batch: Any) -> tuple[Probe, int]:
        """The batch as a probe, and how many samples all ranks together are to have."""
        function, device = self.function, device_of(module)
        first = Probe(*function.read(batch)).check()
        found = function.observed(module, first, batch) if function.step is not None else None
        outputs, loss = (found.outputs, found.loss) if found is not None else (None, function.loss)
        assert loss is not None
        width = function.outputs(module, first, outputs).numel() // first.num_samples
        wanted = self.num_probe or samples_wanted(width, device)
        how = choose_observe(self.observe, loss, wanted * width)
        if how is not None and self.num_probe is None:  # a sample is one row now, or a few
            kept = self.num_projections if how == "projection" else 1
            wanted = min(samples_wanted(kept, device), first.num_samples * self.group.size)
        return first, wanted

    def _from_data_set(self, trainer: Any, module: nn.Module, first: Probe, wanted: int) -> Probe:
        """This rank's part of samples spread evenly over the training data, each once, prepared as Lightning does.

        Or else `first`, on all ranks.
        """
        indices = sample_indices(trainer.train_dataloader)
        if not self.group.all(len(indices) > first.num_samples * self.group.size):
            return first
        num = min(wanted, len(indices))
        mine = range(num)[self.group.share_of(num)]
        try:
            return self.group.together(
                lambda: self._read(trainer, module, first, [indices[i * len(indices) // num] for i in mine])
            )
        except Exception as error:
            if self.group.leads:
                warn(
                    f"grsd: the probe is the first batch alone ({first.num_samples} samples), because the data set "
                    f"cannot be read by index ({type(error).__name__}: {error}). Give probe=(inputs, targets) for more."
                )
            return first

    def _read(self, trainer: Any, module: nn.Module, first: Probe, indices: list[Any]) -> Probe:
        loader = trainer.train_dataloader
        if not indices:
            return first.take(slice(0, 0))
        with undisturbed(module, mode="keep"), preserve_object_rng(loader.dataset):
            samples = [loader.dataset[index] for index in indices]
            return Probe(*self.function.read(prepared(trainer, module, loader.collate_fn(samples)))).check()


def device_of(module: nn.Module) -> torch.device:
    """Where the module's parameters are."""
    return next(module.parameters()).device
