"""The callback's set-up at the first batch: the probe, what is measured on it, and the monitor that measures."""

from __future__ import annotations

from typing import Any

from torch import nn

from grsd_callbacks.between import BetweenSteps
from grsd_callbacks.callbacks import lightning_facts as facts
from grsd_callbacks.callbacks.discovery import MeasuredFunction
from grsd_callbacks.callbacks.output import tag_prefix, use_new_files
from grsd_callbacks.callbacks.sampling import Sampling, device_of
from grsd_callbacks.distributed import Group
from grsd_callbacks.guard import DisturbedTraining
from grsd_callbacks.losses import Loss
from grsd_callbacks.monitor import ShellMonitor
from grsd_callbacks.outlet import first_line, remedy, warn
from grsd_callbacks.probe import Probe, restored
from grsd_callbacks.sharded import Twin, is_sharded
from grsd_callbacks.sinks import Sink
from grsd_callbacks.training_step import warning_of_gap


class FirstBatch:
    """A `ShellDynamicsCallback` without its hooks: how it makes its monitor. Attributes are those of the callback."""

    name: str
    _monitor_type: type[ShellMonitor] = ShellMonitor
    _between: BetweenSteps  # there is one where there is a monitor
    _group: Group
    _function: MeasuredFunction
    _settings: dict[str, Any]
    _options: dict[str, Any]
    _probe: Any
    _num_probe: int | None
    _is_pair: bool
    _json_lines: str | None
    _on_error: str
    _sinks: list[Sink]
    _resume: dict[str, Any] | None
    _refused: bool
    _failed_starts: int
    _next_start: int

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
        if isinstance(self._probe, str):
            self._group.together(lambda: self._function.check_forward(model, batch))
        self._between = BetweenSteps(pl_module)
        probe = self._probe_for(trainer, model, batch).to(device_of(model))
        loss, settings = self._loss_and_settings(model, probe, batch)
        options = dict(self._options)
        if isinstance(self._probe, str) and probe.num_samples > (options["num_probe"] or probe.num_samples):
            options["num_probe"] = probe.num_samples  # it could not be cut to what was asked for
        monitor = self._monitor_type(
            twin or model,
            loss,
            probe,
            total_steps=facts.total_steps(trainer),
            writer=self._sinks,
            prefix=tag_prefix(self.name),
            **options,
            **settings,
        )
        monitor._arguments["num_probe"] = self._num_probe  # what was asked for, to be compared when it is resumed
        if self._resume is not None:
            monitor.load_state_dict(self._resume)
            self._resume = None
        elif self._json_lines == "auto":
            use_new_files(self._sinks)
        facts.inform(monitor.report)
        return monitor

    def _probe_for(self, trainer: Any, model: nn.Module, batch: Any) -> Probe:
        """The saved probe of a resumed run, or samples of the training data, or what the user gave."""
        saved = self._resume
        if saved is not None and not self._is_other_probe(saved):
            return self._group.together(lambda: self._resumed_probe(saved, batch))
        if isinstance(self._probe, str):
            observed = self._options["observe"], self._options["num_projections"]
            return Sampling(self._function, self._group, self._num_probe, *observed).auto_probe(trainer, model, batch)
        return self._probe

    def _is_other_probe(self, saved: dict[str, Any]) -> bool:
        """Whether the arguments ask for another probe than the one that was saved."""
        return self._is_pair or saved.get("arguments", {}).get("num_probe", self._num_probe) != self._num_probe

    def _resumed_probe(self, saved: dict[str, Any], batch: Any) -> Probe:
        template = Probe(*self._function.read(batch)) if isinstance(self._probe, str) else self._probe
        return restored(template, saved["probe"])

    def _loss_and_settings(self, model: nn.Module, probe: Probe, batch: Any) -> tuple[Loss, dict[str, Any]]:
        """The known loss of forward, or loss and outputs of the training step taken apart."""
        if self._function.loss is not None:
            return self._function.loss, self._settings
        observed = self._group.together(lambda: self._function.observed(model, probe, batch))
        if self._group.leads and (warning := warning_of_gap(observed)):
            warn(warning)
        return observed.loss, {**self._settings, "outputs": observed.outputs}
