"""The framework-free core: measures a model while a training loop of any kind runs.

Call `step` once before every optimizer step (or after it: the parameters are measured as they are). Everything that
can go wrong in a measurement becomes one warning and `grsd_health/failed`; wrong use raises before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from grsd_callbacks.distributed import Group
from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.losses import resolve_loss
from grsd_callbacks.monitor.arguments import (
    check_model_and_prefix,
    check_num_probe,
    check_options,
    check_step,
    given_size,
    make_schedule,
    on_every_rank,
    shared_probe,
)
from grsd_callbacks.monitor.figure_schedule import Cadence, FigureSchedule
from grsd_callbacks.monitor.measurer import Measurer
from grsd_callbacks.observation import check_observe
from grsd_callbacks.optimizer import StepSize
from grsd_callbacks.outlet import Outlet
from grsd_callbacks.paths import import_lazily_loaded
from grsd_callbacks.probe import Probe, plain_leaves, restored
from grsd_callbacks.report import summary_table
from grsd_callbacks.resume import changed_arguments, plain_arguments, same_probe
from grsd_callbacks.run import Run
from grsd_callbacks.schedule import FixedSchedule
from grsd_callbacks.settings import Settings
from grsd_callbacks.sharded import Twin
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.team import Team


class ShellMonitor(Measurer):
    """Shell dynamics of a model in any training loop.

    Args:
        model: the network; left bit-identical. Parameters sharded by `fully_shard` are gathered into an unsharded twin
            (or give the `Twin`), on every rank, where it fits.
        loss: "mse", "cross_entropy", an `nn.MSELoss`/`nn.CrossEntropyLoss`, or a callable (outputs, targets) -> scalar.
        probe: `(inputs, targets)` or a DataLoader; cloned once, never changed.
        num_probe: number of samples kept; None keeps a given pair whole, and of a loader one batch.
        every_n_steps: optimizer steps between measurements; None: log-spaced, thinned to `max_overhead`.
        max_overhead: largest share of the training time spent on measuring by the default schedule, and on figures
            drawn when "auto" says so; None: no limit.
        total_steps: length of the run, for the default schedule; None if unknown.
        per_decade: measurements a decade of steps of the default schedule before thinning.
        pair: measure before *and* after the step at each due point (flux over a single step).
        work: also measure the work of the optimizer step that follows each measurement (one J w).
        transfer: also measure the instantaneous flux and the shell-to-shell transfer matrix along that step (needs
            `work`; exact path: four exact kernels in float64, else about 1.5 products a Ritz vector).
        figures: draw heat maps of the run in `finish` (not part of the overhead), and before (needs matplotlib).
        figures_every_n_steps: optimizer steps between drawings during the run, each at the next measurement and part of
            the overhead; "auto": whenever the run has doubled in steps and `max_overhead` leaves the time; None: only
            in `finish`. The same figures, but for the collapse, with the exponents of the measurement they stand at.
        writer: where values go: a SummaryWriter, logger, path, sink, or a list of them; None keeps `history` only.
        on_error: "warn" (a failed measurement is one warning) or "raise".
        nu: scale of the kernel for general losses, see `resolve_loss`.
        observe: what of the outputs is measured, see `observation`: None (all), "auto", "loss_gradient", "root_loss" or
            "projection" (to `num_projections` numbers a sample).
        num_projections: see `observe`.
        unpack: how to read a loader's batch as (inputs, targets).
        prefix: what tags begin with, to tell several monitors apart.
        distributed: where torch.distributed is initialised, divide each measurement over all ranks: every rank then
            makes the monitor and calls `step` and `finish` alike, and rank zero's probe is measured, written and warned
            of. False: this process measures by itself (on rank zero alone, say).
        **settings: see `Settings` (method, num_matvecs, shells_per_decade, params, outputs, dtype, ...).

    Attributes:
        run: what the run remembers (`Run`).
        num_failed: measurements that could not be made, or not be written in full.

    Raises:
        ValueError, TypeError: wrong arguments, or outputs and targets that do not fit (at construction).

    Cost: see `measure`; with `work`, copies of parameters and buffers are held until the next optimizer step is done;
        reported as `grsd_health/overhead_percent`. One drawing of all figures takes about 2 s of one core, matplotlib's
        import (once) not counted.

    Example:
        >>> import torch
        >>> net, x, y = torch.nn.Linear(2, 1), torch.eye(2), torch.ones(2, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> monitor = ShellMonitor(net, "mse", (x, y), every_n_steps=5)
        >>> for step in range(11):
        ...     snapshot = monitor.step(step, optimizer=optimizer)
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.mse_loss(net(x), y).backward()
        ...     optimizer.step()
        >>> [s.step for s in monitor.history]
        [0, 5, 10]
    """

    def __init__(
        self,
        model: nn.Module | Twin,
        loss: Any,
        probe: Any,
        *,
        num_probe: int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float | None = 0.02,
        total_steps: int | None = None,
        per_decade: int = 10,
        pair: bool = False,
        work: bool = True,
        transfer: bool = False,
        figures: bool = True,
        figures_every_n_steps: Cadence = "auto",
        writer: Any = None,
        on_error: str = "warn",
        nu: float | None = None,
        observe: str | None = "auto",
        num_projections: int = 16,
        unpack: Callable[[Any], tuple[Any, Any]] | None = None,
        prefix: str = "grsd_",
        distributed: bool = True,
        **settings: Any,
    ) -> None:
        check_model_and_prefix(model, prefix)
        check_options(on_error, {"pair": pair, "work": work, "transfer": transfer, "figures": figures}, unpack)
        check_num_probe(num_probe)
        check_observe(observe, num_projections)
        how, resolved = Settings(**settings), resolve_loss(loss, nu)
        self._arguments = plain_arguments(how, resolved, num_probe, nu)
        self._arguments.update(observe=observe, num_projections=num_projections)
        self._whole = isinstance(probe, (tuple, list, Probe))
        self.schedule = make_schedule(every_n_steps, max_overhead, total_steps, per_decade, pair, self._sparse)
        self.figure_schedule = FigureSchedule(figures_every_n_steps, total_steps)
        self.max_overhead = max_overhead
        team = Team(Group.current() if distributed else Group())
        super().__init__(model, resolved, how, (observe, num_projections), team, distributed)
        self.samples = self.probe = shared_probe(self.team.group, self.model, probe, num_probe, unpack)
        sinks = writer if self.team.leads else on_every_rank(writer)
        self.outlet = Outlet(sinks, prefix, on_error, not self.team.leads)
        self.on_error, self.figures = on_error, figures
        self.pair, self.work, self.transfer = pair, work or transfer, transfer
        self._versions: tuple[int, ...] | None = None
        import_lazily_loaded()
        self.watch.charged(self._prepare)
        self.watch.set_up()

    @property
    def flow_time(self) -> float:
        """t, the flow time so far."""
        return self.run.flow_time

    # -- the loop -------------------------------------------------------------------------------------------

    def step(
        self,
        step: int,
        *,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        lr: float | None = None,
        flow_time: float | None = None,
    ) -> Snapshot | None:
        """Measure if due. Call once per iteration, before the optimizer step or after it.

        Flow time advances between calls by the learning rate seen at the earlier one.

        Args:
            step: optimizer steps taken so far; where the measurement stands on the curves' axis.
            optimizer: to read the learning rate (and momentum) from; or
            lr: the learning rate of the coming step; or
            flow_time: t itself, which then is taken as it is.

        Returns:
            The `Snapshot`, or None if nothing was due or the measurement failed.
        """
        check_step(step)
        size = given_size(optimizer, lr, flow_time)
        if self.team.group.size > 1:  # a rank that went on alone would leave the others waiting
            return self._step(step, size, flow_time)
        return self._attempt(step, lambda: self._step(step, size, flow_time))

    def _step(self, step: int, size: StepSize, flow_time: float | None) -> Snapshot | None:
        self._advance_to(step, flow_time)
        self._versions = self._parameter_versions()
        self.run.size = size
        return self.observe(step)

    def _advance_to(self, step: int, flow_time: float | None) -> None:
        """Flow time and the latest measurement's update, by the step size that was in force since the last call."""
        num_steps = 0 if self._last_step is None else step - self._last_step
        if num_steps < 0:
            self.outlet.warn_once(
                "backwards", "grsd: step went backwards; give the number of optimizer steps since the run began."
            )
        if flow_time is not None:
            if num_steps == 1:
                self.run.size = replace(self.run.size, flow=float(flow_time) - self.run.flow_time, nominal=False)
            self.run.flow_time = float(flow_time)
        elif num_steps > 0:
            self.advance(self.run.size, num_steps)
        if num_steps > 0:
            self.finish_update(step)

    def advance(self, size: StepSize, num_steps: int = 1, share: float = 1.0) -> None:
        """Tell of optimizer steps taken: `share` of the parameters moved by `num_steps` steps of a size."""
        if math.isfinite(size.flow):
            self.run.flow_time += share * num_steps * size.flow
        if size.nominal:
            self.run.nominal = size.why
        self.run.size = size

    def set_step_size(self, size: StepSize) -> None:
        """Tell the step size of the coming optimizer step."""
        self.run.size = size

    def observe(self, step: int, coming: Callable[[], StepSize] | None = None) -> Snapshot | None:
        """Measure if due at `step`, flow time being kept up to date by `advance`; `coming` gives the next step size."""
        elapsed = self.watch.started(step)
        if self._last_step is not None and step > self._last_step:
            self.run.steps_since += step - self._last_step
            if self._pending is not None:
                self.finish_update(step)
        self._last_step = step
        self._observe_schedule(step, elapsed)
        if not self._due(step):
            return None
        self.schedule.begins()
        if coming is not None:
            self.run.size = coming()
        snapshot: Snapshot | None = self.watch.charged(lambda: self._attempt(step, lambda: self._take(step)))
        if snapshot is not None:
            self._draw_if_due(step)
        return snapshot

    def _observe_schedule(self, step: int, elapsed: float) -> None:
        """Times differ between ranks; all decide at the same step, and then rank zero's decision is taken.

        It knows nothing of drawing: figures never cost a run a measurement.
        """
        undecided, drawing = not self.schedule.decided, self.watch.drawing_seconds
        self.schedule.observe(step, self.watch.measuring_seconds - drawing, elapsed - drawing)
        if undecided and self.schedule.decided:
            self.schedule.load_state_dict(self.team.group.share(self.schedule.state_dict))

    def _due(self, step: int) -> bool:
        due = self.schedule.due(step) and self._affords()
        if not due and not self.pair:
            return False
        if self.history and self.history[-1].step >= step:  # resumed where a run had ended
            return False
        if self.pair and self.history and self.history[-1].step == step - 1:
            due = due or len(self.history) < 2 or self.history[-2].step != step - 2
        return due

    def _affords(self) -> bool:
        """Whether what is due is measured, as rank zero says; nobody has to be asked where all that is due is."""
        return isinstance(self.schedule, FixedSchedule) or self.team.group.share(self.schedule.affords)

    def finish_update(self, step: int) -> None:
        """Complete the latest measurement by the optimizer step that followed it, now that it is done."""
        pending, self._pending = self._pending, None
        if pending is None or step <= pending.step:
            self._pending = pending
            return
        if step == pending.step + 1 and self.team.group.all(not pending.void):
            self.watch.charged(lambda: self._attempt(step, lambda: self._add_update(pending)))

    def _parameter_versions(self) -> tuple[int, ...]:
        return tuple(p._version for p in self.model.parameters())

    # -- the end --------------------------------------------------------------------------------------------

    def finish(self, step: int | None = None, *, flow_time: float | None = None) -> Snapshot | None:
        """Last measurement (if it has not been made there), summary, and flush. Call at the end.

        Args:
            step: optimizer steps taken in all; None: as many as at the last call of `step`, and one more if the
                parameters have been written to since.
            flow_time: t at the end, for loops that give it themselves.
        """
        if step is not None:
            check_step(step)
        given_size(None, None, flow_time)
        if self.team.group.size > 1:
            return self._finish(step, flow_time)
        return self._attempt(self._last_step or 0, lambda: self._finish(step, flow_time))

    def _finish(self, step: int | None, flow_time: float | None) -> Snapshot | None:
        last = self._last_step if step is None else step
        if self._versions is not None and self._last_step is not None:  # flow time follows the calls of `step`
            moved = self._versions != self._parameter_versions()
            last = self._last_step + moved if step is None else step
            self._advance_to(max(last, self._last_step), flow_time)
            self._versions = self._parameter_versions()
        snapshot = None
        if last is not None:
            if self._last_step is not None and last > self._last_step:
                self.run.steps_since += last - self._last_step
                self.finish_update(last)
            self._last_step = last
            if not self.history or self.history[-1].step < last:
                snapshot = self.watch.charged(lambda: self._attempt(last, lambda: self._take(last)))
        self._pending = None
        self.team.group.together(self._conclude if self.team.leads else _nothing)
        return snapshot

    def _conclude(self) -> None:
        if not self.history:
            return
        end = self.history[-1].step
        fits = self.watch.charged(lambda: self._attempt(end, lambda: self._summarise(end)))
        if self.figures and fits is not None:  # not part of the overhead
            self._note(end, self.outlet.figures(self.history, fits))

    def _summarise(self, end: int) -> dict[str, PowerLawFit]:
        fits = self.final_exponents()
        self._note(end, self.outlet.summary(self.history, fits))
        return fits

    def final_exponents(self) -> dict[str, PowerLawFit]:
        """Exponents over the whole run, with the verdict between power law and its competitors (`Run`)."""
        return self.run.final_exponents()

    def summary(self) -> str:
        """The run as a readable table: shells, exponents, closures, cost."""
        return summary_table(self.history, self.final_exponents())

    def close(self) -> None:
        """Flush everything and close what this monitor has opened."""
        self.outlet.close()

    # -- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain types (loads with weights_only=True)."""
        return {
            "probe": {"inputs": plain_leaves(self.samples.inputs), "targets": plain_leaves(self.samples.targets)},
            "run": self.run.state_dict(),
            "schedule": self.schedule.state_dict(),
            "method": self.settings.method,
            "arguments": self._arguments,
            "last_step": self._last_step,
            "num_failed": self.num_failed,
            "measuring_seconds": self.measuring_seconds,
            "elapsed_seconds": self.watch.elapsed_seconds,
            "drawing_seconds": self.watch.drawing_seconds,
            "figures": self.figure_schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run: same probe, shells, frozen basis and history; the first flux after it is NaN.

        Where this monitor's arguments or its probe (given as a pair) are not those of the state, one warning names
        them, and shells, frozen basis, exponents and history start anew; flow time goes on.
        """
        device = next(self.model.parameters()).device
        saved = Run.from_state(state["run"], device)
        differing = changed_arguments(self._arguments, state.get("arguments", {}))
        if self._whole and not same_probe(self.samples, state["probe"]):
            differing.append("probe")
        if changed := ", ".join(differing):
            self.run = Run(flow_time=saved.flow_time, nominal=saved.nominal, size=saved.size)
            self.run.interrupt(f"first measurement after a resume with other {changed}")
            self.outlet.warn_once(
                "segment",
                f"grsd: {changed} differ from those of the run that was saved; shells, frozen basis, exponents and "
                "history start anew here, flow time goes on. Resume with the saved arguments to continue the series.",
            )
        else:
            self.samples = restored(self.samples, state["probe"]).to(device)
            self.settings = replace(self.settings, method=state["method"])
            self.run = saved
            if self._is_reduced:
                self.team.group.together(self._observe)
            else:
                self.probe = self.samples
        self.team.settle(self._unsharded, self.probe.inputs, **self._function_options())
        self.schedule.load_state_dict(state["schedule"])
        self._last_step = state["last_step"]
        self.num_failed = int(state["num_failed"])
        seconds = (float(state.get(f"{name}_seconds", 0.0)) for name in ("measuring", "elapsed", "drawing"))
        self.watch.restore(*seconds)
        self.figure_schedule.load_state_dict(state.get("figures", {}))
        self._pending = None


def _nothing() -> None:
    """What other ranks do where rank zero writes."""
