"""The Lightning callbacks: hooks that delegate to `ShellMonitor`. The only importer of Lightning."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback as _Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import IterableDataset

from grsd_callbacks.between import REASON, BetweenSteps
from grsd_callbacks.distributed import Group
from grsd_callbacks.functional import ModelFunction, select_parameters
from grsd_callbacks.guard import DisturbedTraining, preserve_object_rng, undisturbed
from grsd_callbacks.losses import Loss, check_pair, resolve_loss
from grsd_callbacks.measure import Settings
from grsd_callbacks.monitor import ShellMonitor, check_num_probe, check_options, make_schedule
from grsd_callbacks.observation import check_observe, choose_observe
from grsd_callbacks.optimizer import step_size
from grsd_callbacks.outlet import first_line, remedy, warn
from grsd_callbacks.probe import Probe, concatenate, probe_from, restored, samples_wanted, unpack_batch
from grsd_callbacks.refusals import explained
from grsd_callbacks.sharded import Twin, is_sharded
from grsd_callbacks.sinks import JSONLinesSink, LoggerSink, MetricsSink, Sink
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.training_step import (
    Observed,
    StepRunner,
    batch_type,
    check_step,
    observe_step,
    step_name,
    step_pair,
    step_source,
    warning_of_gap,
)

try:  # the same Lightning under its other name; each Trainer accepts only its own Callback class
    from pytorch_lightning import Callback as _OtherCallback
except ImportError:
    _OtherCallback = _Callback  # type: ignore[misc,assignment]

_BASES = tuple(dict.fromkeys((_Callback, _OtherCallback)))

#: strategies that shard parameters
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy")
#: and that which makes them at the end of the set-up, as DTensors that can be gathered
GATHERED = ("ModelParallelStrategy",)
#: name without .jsonl of the file of JSON lines in the run's log folder
JSON_STEM = "grsd"


def _harmless(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook in which nothing but wrong use, found before the first step, ends the training.

    Measurements catch what goes wrong in them; this is for all that lies around them. Not in distributed runs, where
    a rank that went on alone would leave the others waiting.
    """

    @functools.wraps(hook)
    def guarded(self: ShellDynamicsCallback, trainer: Any, *args: Any) -> None:
        if self._off:
            return
        try:
            hook(self, trainer, *args)
        except Exception as error:
            if self._refused or self._on_error == "raise" or trainer.world_size > 1:
                raise
            self._off = True
            warn(
                f"grsd: measuring is off for the rest of this run ({first_line(error)}). Training goes on unchanged. "
                "Use on_error='raise' to see the traceback."
            )

    return guarded


def _charged(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook of every step: all of its time counts as measuring, not only that of measurements."""

    @functools.wraps(hook)
    def counted(self: ShellDynamicsCallback, *args: Any) -> None:
        monitor, start = self.monitor, time.perf_counter()
        before = 0.0 if monitor is None else monitor.measuring_seconds
        hook(self, *args)
        if monitor is not None:
            monitor.measuring_seconds = max(monitor.measuring_seconds, before + time.perf_counter() - start)

    return counted


class ShellDynamicsCallback(*_BASES):  # type: ignore[misc]
    """Spectrum of the empirical NTK in logarithmic shells, their energy, dissipation and flux, while training.

    Add it to any Trainer; training stays bit-identical. Measured before the first step, then on a log-spaced
    schedule that is thinned once so that measuring takes at most `max_overhead` of the training time, and at the end.
    Values go to every logger of the Trainer, at the step of the user's own curves, and to `grsd.jsonl`; the latest
    ones are in `trainer.callback_metrics`, for EarlyStopping and ModelCheckpoint (`monitor="grsd_loss/probe"`).

    Args:
        loss: "auto" (an `nn.MSELoss`/`nn.CrossEntropyLoss` that is an attribute of the module), "mse",
            "cross_entropy", such a module, or a callable (outputs, targets) -> scalar; the model's outputs are
            what the LightningModule's `forward` returns. Where "auto" finds no such attribute, or forward does not fit
            the batches, the module's own `training_step` is measured; the report says which way was taken.
        probe: "auto" (samples of the first training batch, or of the data set where the batch has not enough),
            `(inputs, targets)`, or a DataLoader.
        num_probe: samples on the probe; None: so many that samples x outputs is about 320 (CPU) or 2,048 (GPU).
        every_n_steps: optimizer steps between measurements; None is the default schedule.
        max_overhead: largest share of the training time for the default schedule; None: no limit.
        method: "auto" (exact while samples x outputs is small), "exact", "krylov" or "randomized".
        num_matvecs: kernel products for energies where not exact.
        num_density_matvecs: kernel products for eigenvalue counts where not exact; 0 for none.
        shells_per_decade: shells a decade of eigenvalues.
        per_decade: measurements a decade of steps before thinning.
        pair: measure before and after the step at each due point.
        work: measure the work of the optimizer step after each measurement.
        transfer: also the instantaneous flux and the shell-to-shell transfer matrix along that step (dearer).
        params: name patterns of the parameters to measure; None: all trainable ones.
        outputs: function from the model's raw output to the tensor (n, ...) that the loss takes; or "training_step":
            run the module's own, and take as function what its loss is a function of ("training_step:NAME": what the
            submodule NAME returns). Then a probe is a batch, as training_step takes it.
        observe: what of the outputs is measured: None (all of them); "loss_gradient" or "root_loss" (one number a
            sample, from its loss); "projection" (a fixed random one, to `num_projections` numbers a sample); "auto":
            all of them, but the loss gradients where there are more than 4,096 and the loss is a mean squared error or
            a cross-entropy. See `grsd_callbacks.observation` for what the numbers then mean.
        num_projections: see `observe`.
        unpack: function from a batch to (inputs, targets), where they cannot be told apart.
        nu: scale of the kernel for general losses (`resolve_loss`).
        dtype: "float32" or "float64" for the measurement; None: the parameters' own, at least float32.
        memory_limit: bytes of explicit rows of J held at a time.
        figures: draw heat maps of the run once, after its last step (needs matplotlib).
        json_lines: "auto" (`grsd.jsonl` in the log folder), a path, or None.
        on_error: "warn" (a failed measurement is one warning) or "raise".
        name: tells several instances apart; tags then begin with `grsd_<name>_`.

    Attributes:
        history: list of `Snapshot`, one per measurement.

    Raises:
        ValueError, TypeError: wrong use, before the first step.

    Example:
        >>> import grsd_callbacks as grsd
        >>> grsd.ShellDynamicsCallback(loss="mse", every_n_steps=100).history
        []
    """

    _monitor_type: type[ShellMonitor] = ShellMonitor
    _key = "ShellDynamicsCallback"
    _json_stem = JSON_STEM

    def __init__(
        self,
        loss: Any = "auto",
        probe: Any = "auto",
        num_probe: int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float | None = 0.02,
        method: str = "auto",
        num_matvecs: int = 64,
        num_density_matvecs: int = 32,
        shells_per_decade: int = 3,
        per_decade: int = 10,
        pair: bool = False,
        work: bool = True,
        transfer: bool = False,
        params: str | list[str] | None = None,
        outputs: str | Callable[[Any], Tensor] | None = None,
        observe: str | None = "auto",
        num_projections: int = 16,
        unpack: Callable[[Any], tuple[Any, Any]] | None = None,
        nu: float | None = None,
        dtype: str | torch.dtype | None = None,
        memory_limit: int | None = None,
        figures: bool = True,
        json_lines: str | None = "auto",
        on_error: str = "warn",
        name: str = "",
    ) -> None:
        super().__init__()
        if isinstance(probe, str) and probe != "auto":
            raise ValueError(f"probe must be 'auto', (inputs, targets) or a DataLoader, got {probe!r}")
        check_options(on_error, {"pair": pair, "work": work, "transfer": transfer, "figures": figures}, unpack)
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, got {type(name).__name__}")
        if not isinstance(json_lines, (str, os.PathLike, type(None))):
            raise TypeError(f"json_lines must be 'auto', a path or None, got {type(json_lines).__name__}")
        if name and not name.replace("_", "").isalnum():
            raise ValueError(f"name must consist of letters, digits and underscores, got {name!r}")
        check_num_probe(num_probe)
        check_observe(observe, num_projections)
        self._observe, self._num_projections = observe, num_projections
        self._step_asked = step_name(outputs)
        if self._step_asked is not None and (not _is_auto(loss) or unpack is not None):
            given = "loss=" if not _is_auto(loss) else "unpack="
            raise ValueError(f"outputs={outputs!r} takes loss and batch as training_step has them; leave {given} out")
        make_schedule(every_n_steps, max_overhead, None, per_decade, pair)
        self._settings: dict[str, Any] = {
            "method": method,
            "num_matvecs": num_matvecs,
            "num_density_matvecs": num_density_matvecs,
            "shells_per_decade": shells_per_decade,
            "params": params,
            "outputs": None if self._step_asked is not None else outputs,
            "dtype": _as_dtype(dtype),
            "memory_limit": memory_limit,
        }
        Settings(**self._settings)
        if not _is_auto(loss):
            resolve_loss(loss, nu)
        self._is_pair = isinstance(probe, (tuple, list, Probe))
        self._loss, self._nu = loss, nu
        self._probe, self._num_probe, self._unpack = probe, num_probe, unpack or unpack_batch
        self._more: dict[str, Any] = {}  # what a subclass hands to its own monitor
        self._schedule: dict[str, Any] = {
            "every_n_steps": every_n_steps,
            "max_overhead": max_overhead,
            "per_decade": per_decade,
        }
        self._pair, self._work, self._transfer = pair, work, transfer
        self._figures = figures
        self._json_lines, self._on_error, self.name = json_lines, on_error, name
        self._resolved: Loss | None = None
        self._step: str | None = None
        self._why = ""
        self._sinks: list[Sink] = []
        self._resume: dict[str, Any] | None = None
        self._global_step = 0
        self._off = self._refused = False
        self._failed_starts, self._next_start = 0, 0
        self._group = Group()
        self.monitor: ShellMonitor | None = None

    @property
    def history(self) -> list[Snapshot]:
        """All snapshots of the run, in order."""
        return self.monitor.history if self.monitor is not None else []

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints; two instances need different names."""
        return f"{self._key}[{self.name}]" if self.name else self._key

    def summary(self) -> str:
        """The run as a readable table."""
        return self.monitor.summary() if self.monitor is not None else "grsd: nothing has been measured"

    # -- hooks, one after the other ----------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Check what can be checked before any data is seen."""
        if stage != "fit":
            return
        self.monitor, self._resume = None, None  # a resumed fit loads its state after setup
        self._off = self._refused = False
        self._failed_starts, self._next_start = 0, 0
        refuse_sharded(trainer)
        folder = trainer.log_dir  # a collective in distributed runs: reached by all ranks
        self._group = Group.current()
        if self._waits(trainer):
            return
        refuse_collisions(trainer, self)
        self._group.together(lambda: self._check(trainer, pl_module, folder))
        self._sinks.append(MetricsSink(lambda: trainer.callback_metrics))

    def _check(self, trainer: Any, pl_module: nn.Module, folder: str | None) -> None:
        self._find_function(pl_module)
        self._sinks = []
        if self._group.leads:
            self._sinks = [LoggerSink(logger) for logger in trainer.loggers]
            self._sinks += json_lines_sink(self._json_lines, folder, trainer, self.name, self._json_stem)
            if not self._sinks and not getattr(trainer, "fast_dev_run", False):
                warn("grsd: the Trainer has no logger; measurements are kept in callback.history only.")
        if type(trainer.strategy).__name__ in GATHERED:  # layers may not even exist yet
            return
        if any(isinstance(p, UninitializedParameter) for p in pl_module.parameters()):
            return
        select_parameters(pl_module, self._settings["params"])
        if not isinstance(self._probe, str):
            source = step_source(self._probe) if self._step is not None else self._probe
            self._probe = probe_from(source, self._num_probe, self._reading)
            if self._resolved is not None:
                check_pair(self._resolved, self._outputs(pl_module, self._probe), self._probe.targets)

    @_harmless
    @_charged
    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Measure, if due, before the step."""
        if self._waits(trainer):
            return
        if self.monitor is None and trainer.global_step >= self._next_start:
            self.monitor = self._start(trainer, pl_module, batch)
        if self.monitor is None:
            return
        self._global_step = trainer.global_step
        self._notice_writes()
        self.monitor.set_step_size(step_size(_raw(trainer.optimizers)))
        self.monitor.observe(step_axis(trainer))

    @_harmless
    @_charged
    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """Advance flow time by the learning rate in force."""
        if self.monitor is None or not _has_gradient(optimizer):
            return
        several = _raw(trainer.optimizers)
        if len(several) <= 1:
            self.monitor.advance(step_size(optimizer))
            return
        share = _num_parameters([optimizer]) / max(_num_parameters(several), 1)
        self.monitor.advance(step_size(optimizer), share=share)
        self.monitor.set_step_size(step_size(several))

    @_harmless
    @_charged
    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Complete the latest measurement by the step that followed it."""
        if self.monitor is not None and trainer.global_step > self._global_step:
            self.monitor.finish_update(step_axis(trainer) + 1)
            self._between.step_ended()

    @_harmless
    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Last measurement, summary, flush."""
        if self.monitor is not None:
            self._notice_writes()
            self.monitor.finish(step_axis(trainer))

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Everything measured so far is on disk already; close the files."""
        self._close()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Close the files this callback has opened."""
        if stage == "fit":
            self._close()

    def state_dict(self) -> dict[str, Any]:
        """Probe, shells, frozen basis, history and schedule, as tensors and plain types."""
        if self.monitor is None:
            return self._resume or {}
        try:
            return self.monitor.state_dict()
        except Exception as error:
            if self._on_error == "raise":
                raise
            warn(f"grsd: a checkpoint is saved without the state of the measurements ({first_line(error)}).")
            return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run from its checkpoint."""
        self._resume = state_dict or None

    def _notice_writes(self) -> None:
        """Weights loaded or averaged in place are a break in the run."""
        if self._between.written() and self.monitor is not None:
            self.monitor.new_segment(REASON)

    # -- which function, which loss ----------------------------------------------------------------------

    def _find_function(self, pl_module: nn.Module) -> None:
        """Forward with a loss that is known, or the module's own training_step."""
        self._step, self._why, self._resolved = self._step_asked, "", None
        if self._step is None:
            try:
                self._resolved = self._known_loss(pl_module)
            except ValueError as error:
                self._take_step(pl_module, error)
        else:
            check_step(pl_module, self._step)

    def _known_loss(self, pl_module: nn.Module) -> Loss:
        if not _is_auto(self._loss):
            return resolve_loss(self._loss, self._nu)
        found = auto_loss(pl_module)
        names = [name for name, value in _losses_of(pl_module).items() if value is found]
        return replace(resolve_loss(found, self._nu), source=f"(attribute {names[0]!r} of the module)")

    def _take_step(self, pl_module: nn.Module, reason: Exception) -> None:
        """Measure training_step where forward cannot be measured and nothing else was asked for; else raise."""
        if not _is_auto(self._loss) or self._settings["outputs"] is not None or self._unpack is not unpack_batch:
            raise reason
        try:
            check_step(pl_module)
        except ValueError as error:
            raise ValueError(f"{reason}. Nor can its own training step be measured: {error}") from reason
        self._step, self._resolved, self._why = "", None, str(reason)

    @property
    def _reading(self) -> Callable[[Any], tuple[Any, Any]]:
        """How batches are read."""
        return self._unpack if self._step is None else step_pair

    def _check_forward(self, pl_module: nn.Module, batch: Any) -> None:
        """Where loss="auto" has found a loss: whether it fits forward on the training batches."""
        if self._resolved is None or not _is_auto(self._loss) or not isinstance(self._probe, str):
            return
        try:
            first = Probe(*self._unpack(batch)).check()
            check_pair(self._resolved, self._outputs(pl_module, first), first.targets)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, DisturbedTraining):
                raise
            self._take_step(pl_module, error)

    def _observed(self, pl_module: nn.Module, probe: Probe, batch: Any) -> Observed:
        """The training step on a probe, taken apart."""
        function = ModelFunction(pl_module, params=self._settings["params"], dtype=self._settings["dtype"])
        runner = StepRunner(pl_module, batch_type(batch))
        try:
            with explained():
                return observe_step(function, probe, self._step or "", runner, nu=self._nu, why=self._why.split(";")[0])
        except ValueError as error:
            if not self._why:
                raise
            raise ValueError(f"{self._why}. Nor can its own training step be measured: {error}") from error

    # -- set-up at the first batch -----------------------------------------------------------------------

    def _start(self, trainer: Any, pl_module: nn.Module, batch: Any) -> ShellMonitor | None:
        """The monitor; wrong use raises, anything else is one warning and tried again after 1, 2, 4, ... more steps."""
        try:
            monitor = self._make_monitor(trainer, pl_module, batch)
        except Exception as error:
            wrong_use = isinstance(error, (ValueError, TypeError, DisturbedTraining)) and not self._failed_starts
            if wrong_use or self._on_error == "raise":
                self._refused = True
                raise
            self._next_start = trainer.global_step + 2**self._failed_starts
            self._failed_starts += 1
            if self._failed_starts == 1 and self._group.leads:
                warn(
                    f"grsd: the model cannot be measured on the probe ({first_line(error)}). Training goes on "
                    f"unchanged; it is tried again after 1, 2, 4, ... more steps. {remedy(error)}"
                )
            return None
        monitor.num_failed += self._failed_starts
        return monitor

    def _make_monitor(self, trainer: Any, pl_module: nn.Module, batch: Any) -> ShellMonitor:
        twin, model = None, pl_module
        if is_sharded(pl_module):
            twin = self._group.together(lambda: Twin(pl_module))
            model = self._group.together(twin.refresh)
        self._group.together(lambda: self._check_forward(model, batch))
        self._between = BetweenSteps(pl_module)
        if self._resume is not None and not self._other_probe:
            probe = self._group.together(lambda: self._resumed_probe(batch))
        elif isinstance(self._probe, str):
            probe = self._auto_probe(trainer, model, batch)
        else:
            probe = self._probe
        probe = probe.to(_device(model))
        loss, settings = self._resolved, self._settings
        if loss is None:
            observed = self._group.together(lambda: self._observed(model, probe, batch))
            loss, settings = observed.loss, {**settings, "outputs": observed.outputs}
            if self._group.leads and (warning := warning_of_gap(observed)):
                warn(warning)
        monitor = self._monitor_type(
            twin or model,
            loss,
            probe,
            num_probe=self._num_probe,
            total_steps=_total_steps(trainer),
            pair=self._pair,
            work=self._work,
            transfer=self._transfer,
            figures=self._figures,
            writer=self._sinks,
            on_error=self._on_error,
            observe=self._observe,
            num_projections=self._num_projections,
            nu=self._nu,
            prefix=_prefix(self.name),
            **self._schedule,
            **self._more,
            **settings,
        )
        if self._resume is not None:
            monitor.load_state_dict(self._resume)
            self._resume = None
        elif self._json_lines == "auto":
            for sink in self._sinks:  # a new run in a folder that another run has used
                if isinstance(sink, JSONLinesSink):
                    sink.path = unused_path(sink.path)
        rank_zero_info(monitor.report)
        return monitor

    @property
    def _other_probe(self) -> bool:
        """Whether the arguments ask for another probe than the one that was saved."""
        assert self._resume is not None
        saved = self._resume.get("arguments", {})
        return self._is_pair or saved.get("num_probe", self._num_probe) != self._num_probe

    def _resumed_probe(self, batch: Any) -> Probe:
        assert self._resume is not None
        template = Probe(*self._reading(batch)) if isinstance(self._probe, str) else self._probe
        return restored(template, self._resume["probe"])

    def _auto_probe(self, trainer: Any, pl_module: nn.Module, batch: Any) -> Probe:
        """Clones of samples of every rank's first batch, in rank order, or of the data set's where one has too few."""
        group = self._group
        first, wanted = group.together(lambda: self._first_batch(pl_module, batch))
        wanted = group.integers([wanted])[0]
        mine = group.share_of(wanted)
        if not group.all(first.num_samples >= mine.stop - mine.start):
            first = self._from_data_set(trainer, pl_module, first, wanted)
        kept = group.together(lambda: probe_from(first, mine.stop - mine.start))
        return concatenate(group.gather(kept)) if group.size > 1 else kept

    def _first_batch(self, pl_module: nn.Module, batch: Any) -> tuple[Probe, int]:
        """The batch as a probe, and how many samples all ranks together are to have."""
        first = Probe(*self._reading(batch)).check()
        found = self._observed(pl_module, first, batch) if self._step is not None else None
        outputs, loss = (found.outputs, found.loss) if found is not None else (None, self._resolved)
        assert loss is not None
        width = self._outputs(pl_module, first, outputs).numel() // first.num_samples
        wanted = self._num_probe or samples_wanted(width, _device(pl_module))
        how = choose_observe(self._observe, loss, wanted * width)
        if how is not None and self._num_probe is None:  # a sample is one row now, or a few
            kept = self._num_projections if how == "projection" else 1
            wanted = min(samples_wanted(kept, _device(pl_module)), first.num_samples * self._group.size)
        return first, wanted

    def _from_data_set(self, trainer: Any, pl_module: nn.Module, first: Probe, wanted: int) -> Probe:
        """This rank's part of samples spread evenly over the training data, each once, prepared as Lightning does.

        Or else `first`, on all ranks.
        """
        indices = _sample_indices(trainer.train_dataloader)
        if not self._group.all(len(indices) > first.num_samples * self._group.size):
            return first
        num = min(wanted, len(indices))
        mine = range(num)[self._group.share_of(num)]
        try:
            return self._group.together(
                lambda: self._read(trainer, pl_module, first, [indices[i * len(indices) // num] for i in mine])
            )
        except Exception as error:
            if self._group.leads:
                warn(
                    f"grsd: the probe is the first batch alone ({first.num_samples} samples), because the data set "
                    f"cannot be read by index ({type(error).__name__}: {error}). Give probe=(inputs, targets) for more."
                )
            return first

    def _read(self, trainer: Any, pl_module: nn.Module, first: Probe, indices: list[Any]) -> Probe:
        loader = trainer.train_dataloader
        if not indices:
            return first.take(slice(0, 0))
        with undisturbed(pl_module, mode="keep"), preserve_object_rng(loader.dataset):
            samples = [loader.dataset[index] for index in indices]
            return Probe(*self._reading(_prepared(trainer, pl_module, loader.collate_fn(samples)))).check()

    def _outputs(self, pl_module: nn.Module, probe: Probe, outputs: Any = None) -> Tensor:
        function = ModelFunction(
            pl_module,
            params=self._settings["params"],
            outputs=outputs or self._settings["outputs"],
            dtype=self._settings["dtype"],
        )
        with torch.no_grad():
            return function.run(lambda: function.outputs(probe.inputs))

    def _waits(self, trainer: Any) -> bool:
        """Whether this process only waits: one of several that torch.distributed does not connect."""
        return self._group.size == 1 and not trainer.is_global_zero

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()


# -- what is asked of Lightning, in one place ------------------------------------------------------------


def step_axis(trainer: Any) -> int:
    """The step at which Lightning draws the user's own curves of the coming batch (private counter)."""
    counter = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return int(trainer.global_step if counter is None else counter)


def _prepared(trainer: Any, pl_module: Any, batch: Any) -> Any:
    """A collated batch after the precision plugin, the user's transfer hooks and the move to the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = pl_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _sample_indices(loader: Any) -> Sequence[Any]:
    """What the loader's data set may be indexed with; empty where samples cannot be had so."""
    dataset = getattr(loader, "dataset", None)
    if getattr(loader, "batch_sampler", None) is None or not isinstance(dataset, Sized):
        return ()
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return ()
    return getattr(loader.sampler, "indices", range(len(dataset)))


def refuse_collisions(trainer: Any, callback: ShellDynamicsCallback) -> None:
    """Several instances must not write to the same tags, checkpoint key or file.

    Raises:
        ValueError: names the argument to change.
    """
    for other in trainer.callbacks:
        if not isinstance(other, ShellDynamicsCallback) or other is callback:
            continue
        if callback.state_key == other.state_key:
            raise ValueError(f"name={callback.name!r} is that of two {callback._key}s; give each its own name=")
        if callback._json_lines not in (None, "auto") and callback._json_lines == other._json_lines:
            raise ValueError(
                f"json_lines={callback._json_lines!r} is the file of two ShellDynamicsCallbacks; give each its own"
            )


def _is_auto(value: Any) -> bool:
    return isinstance(value, str) and value == "auto"


def _prefix(name: str) -> str:
    return f"grsd_{name}_" if name else "grsd_"


def refuse_sharded(trainer: Any) -> None:
    """Strategies whose parameters cannot be gathered module by module; refused on every rank alike."""
    name = type(trainer.strategy).__name__
    if name in SHARDED:
        raise ValueError(
            f"strategy {name} shards the parameters, which ShellDynamicsCallback cannot measure; train with DDP, or "
            "with ModelParallelStrategy and fully_shard, or measure saved checkpoints with ShellMonitor"
        )


def auto_loss(module: nn.Module) -> Any:
    """The loss that a LightningModule holds as an attribute.

    Raises:
        ValueError: none or several are found; names the argument to give.
    """
    found = _losses_of(module)
    if len({_options(resolve_loss(value).function) for value in found.values()}) == 1:
        return next(iter(found.values()))
    what = "no nn.MSELoss or nn.CrossEntropyLoss attribute" if not found else f"several losses ({', '.join(found)})"
    raise ValueError(
        f"loss='auto' found {what} on {type(module).__name__}; give loss='mse', loss='cross_entropy' or "
        "loss= a callable (outputs, targets) -> scalar"
    )


def _losses_of(module: nn.Module) -> dict[str, Any]:
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


def json_lines_sink(
    where: str | None, folder: str | None, trainer: Any, name: str = "", stem: str = JSON_STEM
) -> list[Sink]:
    """The sink of JSON lines in the run's log folder, if there is a local one."""
    if where is None:
        return []
    if where != "auto":
        return [JSONLinesSink(where)]
    if not trainer.loggers or getattr(trainer, "fast_dev_run", False) or folder is None or "://" in str(folder):
        return []
    Path(folder).mkdir(parents=True, exist_ok=True)
    return [JSONLinesSink(Path(folder) / (f"{stem}_{name}.jsonl" if name else f"{stem}.jsonl"))]


def unused_path(path: Path) -> Path:
    """The path itself, or the first of `name_1.jsonl`, `name_2.jsonl`, ... that does not exist."""
    candidates = (path.with_name(f"{path.stem}_{k}{path.suffix}") for k in itertools.count(1))
    return path if not path.exists() else next(p for p in candidates if not p.exists())


def _total_steps(trainer: Any) -> int | None:
    """Optimizer steps of the whole run, or None where Lightning does not know."""
    total = trainer.estimated_stepping_batches
    return int(total) if 0 < total < float("inf") else None


def _raw(optimizers: Any) -> list[Any]:
    return list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]


def _has_gradient(optimizer: Any) -> bool:
    """False where training_step returned None: the step moves nothing."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def _num_parameters(optimizers: list[Any]) -> int:
    return sum(p.numel() for o in optimizers for group in o.param_groups for p in group["params"])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    names: Mapping[str, torch.dtype] = {"float32": torch.float32, "float64": torch.float64}
    if isinstance(dtype, str):
        if dtype not in names:
            raise ValueError(f"dtype must be 'float32', 'float64' or None, got {dtype!r}")
        return names[dtype]
    return dtype
