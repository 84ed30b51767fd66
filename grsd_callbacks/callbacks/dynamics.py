"""The callback itself: its arguments, and its hooks one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grsd_callbacks.between import REASON
from grsd_callbacks.callbacks import lightning_facts as facts
from grsd_callbacks.callbacks.arguments import as_dtype, check_words
from grsd_callbacks.callbacks.discovery import MeasuredFunction
from grsd_callbacks.callbacks.first_batch import FirstBatch
from grsd_callbacks.callbacks.hooks import charged, harmless
from grsd_callbacks.callbacks.output import JSON_STEM, json_lines_sink, refuse_collisions, sinks_of
from grsd_callbacks.distributed import Group
from grsd_callbacks.functional import select_parameters
from grsd_callbacks.monitor import FigureSchedule, ShellMonitor, check_num_probe, check_options, make_schedule
from grsd_callbacks.observation import check_observe
from grsd_callbacks.optimizer import StepSizes, step_size
from grsd_callbacks.outlet import first_line, warn
from grsd_callbacks.paths import import_lazily_loaded
from grsd_callbacks.probe import Probe, probe_from
from grsd_callbacks.settings import Settings
from grsd_callbacks.sinks import MetricsSink, Sink
from grsd_callbacks.snapshot import Snapshot


class ShellDynamicsCallback(FirstBatch, *facts.BASES):  # type: ignore[misc]
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
        max_overhead: largest share of the training time for the default schedule (and for figures drawn when "auto"
            says so); None: no limit.
        method: "auto" (exact while samples x outputs is small), "exact", "lanczos", "krylov" or "randomized".
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
        gram_dtype: "float32" adds up exact kernels from products in float32: faster, 6 decades of eigenvalues instead
            of 12. None: float64 where the device has it.
        memory_limit: bytes of explicit rows of J held at a time.
        figures: draw heat maps of the run, after its last step and before (needs matplotlib).
        figures_every_n_steps: optimizer steps between drawings during the run, each at the next measurement; "auto":
            whenever the run has doubled in steps and `max_overhead` leaves the time (about 2 s a drawing); None: only
            after the last step. A run that is killed keeps what has been drawn.
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
        gram_dtype: str | torch.dtype | None = None,
        memory_limit: int | None = None,
        figures: bool = True,
        figures_every_n_steps: int | Literal["auto"] | None = "auto",
        json_lines: str | None = "auto",
        on_error: str = "warn",
        name: str = "",
    ) -> None:
        super().__init__()
        check_words(probe, name, json_lines)
        check_options(on_error, {"pair": pair, "work": work, "transfer": transfer, "figures": figures}, unpack)
        check_num_probe(num_probe)
        check_observe(observe, num_projections)
        make_schedule(every_n_steps, max_overhead, None, per_decade, pair)
        FigureSchedule(figures_every_n_steps)
        self._group = Group()
        self._function = MeasuredFunction(loss, nu, outputs, unpack, params, as_dtype(dtype))
        self._settings: dict[str, Any] = {
            "method": method,
            "num_matvecs": num_matvecs,
            "num_density_matvecs": num_density_matvecs,
            "shells_per_decade": shells_per_decade,
            "memory_limit": memory_limit,
            "gram_dtype": as_dtype(gram_dtype, "gram_dtype"),
            **self._function.options,
        }
        Settings(**self._settings)
        self._options: dict[str, Any] = {
            "num_probe": num_probe,
            "every_n_steps": every_n_steps,
            "max_overhead": max_overhead,
            "per_decade": per_decade,
            "pair": pair,
            "work": work,
            "transfer": transfer,
            "figures": figures,
            "figures_every_n_steps": figures_every_n_steps,
            "on_error": on_error,
            "observe": observe,
            "num_projections": num_projections,
            "nu": nu,
        }  # and what a subclass hands to its own monitor
        self._is_pair = isinstance(probe, (tuple, list, Probe))
        self._probe, self._num_probe = probe, num_probe
        self._json_lines, self._on_error, self.name = json_lines, on_error, name
        self._sinks: list[Sink] = []
        self._begin_anew()

    def _begin_anew(self) -> None:
        """The state before a fit; a resumed one loads its own after `setup`."""
        self.monitor: ShellMonitor | None = None
        self._resume: dict[str, Any] | None = None
        self._step_axis, self._stepped = 0, False
        self._measured_at: tuple[int, int] | None = None  # Lightning's count of steps, and that of writes
        self._off = self._refused = False
        self._failed_starts, self._next_start = 0, 0
        self._sizes = StepSizes()

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
        self._begin_anew()
        facts.refuse_sharded(trainer)
        import_lazily_loaded()
        folder = trainer.log_dir  # a collective in distributed runs: reached by all ranks
        self._group = Group.current()
        if self._waits(trainer):
            return
        others = [c for c in trainer.callbacks if isinstance(c, ShellDynamicsCallback) and c is not self]
        refuse_collisions(self, others)
        self._group.together(lambda: self._check(trainer, pl_module, folder))
        self._sinks.append(MetricsSink(lambda: trainer.callback_metrics))

    @charged
    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Measure, if due, before the step."""
        if self.monitor is None:
            if self._waits(trainer):
                return
            if trainer.global_step >= self._next_start:
                self.monitor = self._start(trainer, pl_module, batch)
            if self.monitor is None:
                return
        self._stepped = False
        self._notice_writes()
        if self._stands_still(trainer, pl_module):
            return
        self._step_axis = facts.step_axis(trainer, pl_module)
        if self.monitor.observe(self._step_axis, lambda: step_size(facts.raw_optimizers(trainer))) is not None:
            self._measured_at = trainer.global_step, self._between.writes

    @charged
    def on_before_optimizer_step(self, trainer: Any, pl_module: nn.Module, optimizer: Any) -> None:
        """Advance flow time by the learning rate in force."""
        self._stepped = True
        if self.monitor is None or not facts.has_gradient(optimizer):
            return
        several = facts.raw_optimizers(trainer)
        if len(several) <= 1:
            self.monitor.advance(self._sizes.of(optimizer))
            return
        self.monitor.advance(step_size(optimizer), share=facts.share_of_parameters(optimizer, several))
        self.monitor.set_step_size(step_size(several))

    @charged
    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Complete the latest measurement by the step that followed it."""
        if self.monitor is not None and self._stepped:
            self.monitor.finish_update(self._step_axis + 1)
            self._between.step_ended()

    @harmless
    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Last measurement, summary, flush."""
        if self.monitor is not None:
            self._notice_writes()
            still = self._stands_still(trainer, pl_module)
            self.monitor.finish(self._step_axis if still else facts.step_axis(trainer, pl_module))

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

    def _check(self, trainer: Any, pl_module: nn.Module, folder: str | None) -> None:
        """What `setup` checks, on each rank."""
        self._function.find(pl_module)
        self._sinks = []
        if self._group.leads:
            self._sinks = sinks_of(
                trainer, json_lines_sink(self._json_lines, folder, trainer, self.name, self._json_stem)
            )
        if facts.is_unfinished(trainer, pl_module):
            return
        select_parameters(pl_module, self._settings["params"])
        if not isinstance(self._probe, str):
            source = self._function.source(self._probe)
            self._probe = probe_from(source, self._num_probe, self._function.read)
            self._function.check_pair(pl_module, self._probe)

    def _waits(self, trainer: Any) -> bool:
        """Whether this process only waits: one of several that torch.distributed does not connect."""
        return self._group.size == 1 and not trainer.is_global_zero

    def _stands_still(self, trainer: Any, module: Any) -> bool:
        """Whether batches have been counted since the latest measurement, but nothing has moved (gradients by hand).

        Parameters are looked at too: Lightning does not see the steps of optimizers that it has not wrapped.
        """
        if module.automatic_optimization or self._measured_at is None or trainer.global_step != self._measured_at[0]:
            return False
        counted = facts.step_axis(trainer, module) > self._step_axis
        return counted and self._group.all(self._between.writes == self._measured_at[1])

    def _notice_writes(self) -> None:
        """Weights loaded or averaged in place are a break in the run."""
        if self._between.written() and self.monitor is not None:
            self.monitor.new_segment(REASON)

    def _close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
