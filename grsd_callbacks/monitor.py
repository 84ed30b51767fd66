"""The framework-free core: measures a model while a training loop of any kind runs.

Call `step` once before every optimizer step (or after it: the parameters are measured as they are). Everything that
can go wrong in a measurement becomes one warning and `grsd_health/failed`; wrong use raises before the first step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from grsd_callbacks.distributed import Group, failed_rank
from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.functional import ModelFunction, check_function
from grsd_callbacks.guard import DisturbedTraining
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import Loss, calibrate, check_pair, resolve_loss
from grsd_callbacks.measure import Instant, Settings, measure_with_operator, operator_for
from grsd_callbacks.method import choose_by_cost
from grsd_callbacks.observation import check_observe, observed
from grsd_callbacks.optimizer import NO_STEP_SIZE, StepSize, step_size
from grsd_callbacks.outlet import Outlet, first_line, remedy, warn
from grsd_callbacks.plan import ProductPlan
from grsd_callbacks.probe import Probe, plain_leaves, probe_from, restored
from grsd_callbacks.refusals import check_derivative, explained
from grsd_callbacks.report import start_report, summary_table
from grsd_callbacks.resume import changed_arguments, plain_arguments, same_probe
from grsd_callbacks.run import Pending, Run
from grsd_callbacks.schedule import FixedSchedule, LogSchedule
from grsd_callbacks.sharded import Twin, is_sharded
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.team import Team

#: a fixed schedule that costs more than this share of training is warned about, once
COSTLY = 0.2


class ShellMonitor:
    """Shell dynamics of a model in any training loop.

    Args:
        model: the network; left bit-identical. Parameters sharded by `fully_shard` are gathered into an unsharded twin
            (or give the `Twin`), on every rank, where it fits.
        loss: "mse", "cross_entropy", an `nn.MSELoss`/`nn.CrossEntropyLoss`, or a callable (outputs, targets) -> scalar.
        probe: `(inputs, targets)` or a DataLoader; cloned once, never changed.
        num_probe: number of samples kept; None keeps a given pair whole, and of a loader one batch.
        every_n_steps: optimizer steps between measurements; None: log-spaced, thinned to `max_overhead`.
        max_overhead: largest share of the training time spent on measuring by the default schedule; None: no limit.
        total_steps: length of the run, for the default schedule; None if unknown.
        per_decade: measurements a decade of steps of the default schedule before thinning.
        pair: measure before *and* after the step at each due point (flux over a single step).
        work: also measure the work of the optimizer step that follows each measurement (one J w).
        transfer: also measure the instantaneous flux and the shell-to-shell transfer matrix along that step (needs
            `work`; exact path: four exact kernels in float64, krylov: about 1.5 products a Ritz vector).
        figures: draw heat maps of the run once, in `finish` (needs matplotlib; not part of the overhead).
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
        reported as `grsd_health/overhead_percent`.

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

    _title = "shell dynamics of the empirical NTK"

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
        if not isinstance(model, (nn.Module, Twin)):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        check_options(on_error, {"pair": pair, "work": work, "transfer": transfer, "figures": figures}, unpack)
        if not isinstance(prefix, str):
            raise TypeError(f"prefix must be a str, got {type(prefix).__name__}")
        check_num_probe(num_probe)
        check_observe(observe, num_projections)
        self.model: nn.Module = model.source if isinstance(model, Twin) else model
        self.settings = Settings(**settings)
        self.loss: Loss = resolve_loss(loss, nu)
        self._observing = (observe, num_projections, self.loss, self.settings)
        self._is_reduced = False
        self._arguments = plain_arguments(self.settings, self.loss, num_probe, nu)
        self._arguments.update(observe=observe, num_projections=num_projections)
        self._whole = isinstance(probe, (tuple, list, Probe))
        self.schedule = make_schedule(every_n_steps, max_overhead, total_steps, per_decade, pair)
        self.team = Team(Group.current() if distributed else Group())
        self._twin = self._twin_of(model, distributed)
        self.samples: Probe = self._whole_probe(probe, num_probe, unpack)
        self.probe: Probe = self.samples
        self.outlet = Outlet(
            writer if self.team.leads else on_every_rank(writer), prefix, on_error, not self.team.leads
        )
        self.on_error = on_error
        self.pair = pair
        self.work = work or transfer
        self.transfer = transfer
        self.figures = figures
        self.run = Run()
        self.num_failed = 0
        self.measuring_seconds = 0.0
        self._last_step: int | None = None
        self._unwritten: int | None = None
        self._pending: Pending | None = None
        self._plan: ProductPlan | None = None
        self._started: float | None = None
        self._measuring_since: float | None = None
        self._first_step = 0
        self._elapsed_before = 0.0
        self._versions: tuple[int, ...] | None = None
        self._identity = self._parameter_identity()
        self._charged(self._prepare)
        self._elapsed_before = self.measuring_seconds  # set-up is part of the cost

    # -- set-up ------------------------------------------------------------------------------------------

    def _whole_probe(self, probe: Any, num_probe: int | None, unpack: Any) -> Probe:
        """Rank zero's probe, on every rank."""
        found = self.team.group.share(lambda: probe_from(probe, num_probe, *([unpack] if unpack else [])))
        if not self.team.leads:
            return found.to(next(self.model.parameters()).device)
        warn_of_few_samples(num_probe, found)
        return found

    def _twin_of(self, model: Any, distributed: bool) -> Twin | None:
        if isinstance(model, Twin) or not is_sharded(model):
            return model if isinstance(model, Twin) else None
        if not distributed:
            raise ValueError("model is sharded over ranks, so they all have to measure it; leave distributed=True")
        return self.team.group.together(lambda: Twin(model))

    @property
    def _unsharded(self) -> nn.Module:
        """The model, or the unsharded twin of a sharded one."""
        return self.model if self._twin is None else self._twin.module

    def _gather(self) -> None:
        """The twin at the model's present values."""
        if self._twin is not None:
            self.team.group.together(self._twin.make_room)
            self.team.group.together(self._twin.refresh)

    def _operator(self) -> NTKOperator:
        return self.team.operator(self._unsharded, self.probe.inputs, **self._function_options())

    def _function_options(self) -> dict[str, Any]:
        return {name: getattr(self.settings, name) for name in ("params", "outputs", "dtype", "memory_limit")}

    def _prepare(self) -> None:
        """Run the model once on the probe: wrong use fails here, before the first step, on every rank."""
        self._gather()
        with explained():
            self._prepare_together()

    def _prepare_together(self) -> None:
        self.team.group.together(self._observe)
        self.team.settle(self._unsharded, self.probe.inputs, **self._function_options())
        method, self.report = self.team.group.share(self._prepare_here)
        self.settings = replace(self.settings, method=method)

    def _observe(self) -> None:
        """Fewer numbers a sample in the stead of the outputs, where they are too many."""
        observe, num_projections, loss, settings = self._observing
        self.probe, self.loss, self.settings = self.samples, loss, replace(settings, method=self.settings.method)
        if observe is None:
            return
        options = {name: getattr(settings, name) for name in ("params", "outputs", "dtype")}
        function = ModelFunction(self._unsharded, **options)
        found = observed(function, self.probe, loss, observe, num_projections=num_projections, seed=settings.seed)
        self.probe, self.loss = found.probe, found.loss
        self.settings = replace(self.settings, outputs=found.outputs)
        self._is_reduced = found.outputs is not settings.outputs

    def _prepare_here(self) -> tuple[str, str]:
        """The method that is chosen, and the report."""
        op = operator_for(self._unsharded, self.probe, self.settings)
        outputs = op.outputs
        check_pair(self.loss, outputs, self.probe.targets)
        op.run(lambda: self.loss.evaluate(outputs, self.probe.targets))  # refuses what is no differentiable scalar
        self.loss = op.run(lambda: calibrate(self.loss, outputs, self.probe.targets))
        checks = [check] if (check := check_derivative(op)) else []
        for check in checks:
            self.outlet.warn_once("derivative", f"grsd: check of the model: {check}.")
        products = self.settings.num_matvecs + self.settings.num_density_matvecs
        choice = choose_by_cost(op, products, self.settings.memory_limit)
        if self.settings.method == "auto":
            self.settings = replace(self.settings, method=choice.method)
        else:
            choice = replace(choice, reason="as asked for")
        if self.work or self.settings.method != "exact":
            with suppress(RuntimeError):  # no way at all: said in the report, and by the measurement that needs it
                op.choose_forward(timed=False)
        schedule = self.schedule.describe()
        ranks = self.team.describe() + ("; parameters gathered into an unsharded twin" if self._twin else "")
        return self.settings.method, start_report(
            op, self.loss, self.settings, schedule, choice, ranks, checks, self._title
        )

    @property
    def history(self) -> list[Snapshot]:
        """All snapshots, in order."""
        return self.run.history

    @property
    def flow_time(self) -> float:
        """t, the flow time so far."""
        return self.run.flow_time

    def new_segment(self, reason: str) -> None:
        """Declare a break in the run: no flux is computed across it.

        Parameters that are replaced, frozen or unfrozen are noticed; values loaded in place (`load_state_dict` in
        mid-run) are not in loops of one's own, and have to be declared (the callback notices them).
        """
        if self._pending is not None:  # kept until all ranks drop it together
            self._pending.void = True
        self.run.interrupt(reason)

    # -- the loop ----------------------------------------------------------------------------------------

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
        _check_step(step)
        size = _given_size(optimizer, lr, flow_time)
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

    def observe(self, step: int) -> Snapshot | None:
        """Measure if due at `step`, flow time being kept up to date by `advance`."""
        now = time.perf_counter()
        if self._started is None:
            self._started, self._first_step = now, step
        elapsed = self._elapsed_before + now - self._started
        if self._last_step is not None and step > self._last_step:
            self.run.steps_since += step - self._last_step
            self.finish_update(step)
        self._last_step = step
        self._observe_schedule(step, elapsed)
        if not self._due(step):
            return None
        return self._charged(lambda: self._attempt(step, lambda: self._take(step)))

    def _observe_schedule(self, step: int, elapsed: float) -> None:
        """Times differ between ranks; all decide at the same step, and then rank zero's decision is taken."""
        undecided = not self.schedule.decided
        self.schedule.observe(step, self.measuring_seconds, elapsed)
        if undecided and self.schedule.decided:
            self.schedule.load_state_dict(self.team.group.share(self.schedule.state_dict))

    def finish_update(self, step: int) -> None:
        """Complete the latest measurement by the optimizer step that followed it, now that it is done."""
        pending, self._pending = self._pending, None
        if pending is None or step <= pending.step:
            self._pending = pending
            return
        if step == pending.step + 1 and self.team.group.all(not pending.void):
            self._charged(lambda: self._attempt(step, lambda: self._add_update(pending)))

    def finish(self, step: int | None = None, *, flow_time: float | None = None) -> Snapshot | None:
        """Last measurement (if it has not been made there), summary, and flush. Call at the end.

        Args:
            step: optimizer steps taken in all; None: as many as at the last call of `step`, and one more if the
                parameters have been written to since.
            flow_time: t at the end, for loops that give it themselves.
        """
        if step is not None:
            _check_step(step)
        _given_size(None, None, flow_time)
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
                snapshot = self._charged(lambda: self._attempt(last, lambda: self._take(last)))
        self._pending = None
        self.team.group.together(self._conclude if self.team.leads else _nothing)
        return snapshot

    def _conclude(self) -> None:
        if not self.history:
            return
        end = self.history[-1].step
        fits = self._charged(lambda: self._attempt(end, lambda: self._summarise(end)))
        if self.figures and fits is not None:  # not part of the overhead
            self._note(end, self.outlet.figures(self.history, fits))

    def _summarise(self, end: int) -> dict[str, PowerLawFit]:
        fits = self.final_exponents()
        self._note(end, self.outlet.summary(self.history, fits))
        return fits

    def close(self) -> None:
        """Flush everything and close what this monitor has opened."""
        self.outlet.close()

    # -- one measurement ---------------------------------------------------------------------------------

    def _due(self, step: int) -> bool:
        due = self.schedule.due(step)
        if self.history and self.history[-1].step >= step:  # resumed where a run had ended
            return False
        if self.pair and self.history and self.history[-1].step == step - 1:
            due = due or len(self.history) < 2 or self.history[-2].step != step - 2
        return due

    def _take(self, step: int) -> Snapshot:
        self._check_identity()
        self._gather()
        op, instant = self.team.session(self._operator, self._measured)
        snapshot = self.team.group.share(lambda: self._recorded(step, op, instant))
        if not self.team.leads:
            self.run.history.append(snapshot)
            self.outlet.snapshot(snapshot, self.num_failed, None)
            if self.work:
                self._pending = Pending.elsewhere(step, op)
        return snapshot

    def _measured(self, op: NTKOperator) -> Instant:
        instant, _ = measure_with_operator(
            self._unsharded,
            self.probe,
            self.loss,
            self.settings,
            self.run.grid,
            plan=self._plan,
            start=self.run.last_vectors,
            op=op,
        )
        self._plan = op.plan
        return instant

    def _recorded(self, step: int, op: NTKOperator, instant: Instant) -> Snapshot:
        instant.cost["overhead_percent"] = 100 * self.overhead
        instant.health["failed"] = float(self.num_failed)
        snapshot = self.run.add(step, instant, self.loss.energy_is_loss)
        if self.work:
            op.release()
            self._pending = Pending(step, op, instant.state, instant.nu, self.run.size)
        self._warn_if_costly()
        report = self.report if len(self.history) == 1 else None
        self._note(step, self.outlet.snapshot(snapshot, self.num_failed, report))
        return snapshot

    def _add_update(self, pending: Pending) -> None:
        """Work (and transfer) of the optimizer step that followed a measurement."""
        self._gather()
        change = self.team.group.together(lambda: self._change(pending))
        _, done = self.team.session(lambda: pending.op, lambda op: self._updated(pending, change))
        done = self.team.group.share(lambda: self._written(done))
        if done is not None and not self.team.leads:
            self.run.history[-1] = done
            self.outlet.update(done)

    def _change(self, pending: Pending) -> Tensor | None:
        """The parameters' change since the measurement, shape (P,), on rank zero."""
        if not self.team.leads:
            return None
        parameters = dict(self._unsharded.named_parameters())
        copies = pending.op.function.parameters.items()
        return pending.op.flatten([parameters[name].detach().to(copy) - copy.detach() for name, copy in copies])

    def _updated(self, pending: Pending, change: Any) -> Snapshot | None:
        pending.op.choose_forward(timed=False)
        self._plan = pending.op.plan
        return self.run.add_update(pending, change, self.run.size, transfer=self.transfer)

    def _written(self, done: Snapshot | None) -> Snapshot | None:
        if done is not None:
            self._note(done.step, self.outlet.update(done))
        return done

    def final_exponents(self) -> dict[str, PowerLawFit]:
        """Exponents over the whole run, with the verdict between power law and its competitors (`Run`)."""
        return self.run.final_exponents()

    def summary(self) -> str:
        """The run as a readable table: shells, exponents, closures, cost."""
        return summary_table(self.history, self.final_exponents())

    # -- cost and failures -------------------------------------------------------------------------------

    @property
    def overhead(self) -> float:
        """Measuring time over training time without it, so far (a fraction); NaN before the first step."""
        if self._started is None or self._last_step == self._first_step:
            return math.nan
        now = time.perf_counter()
        measuring = self.measuring_seconds + (now - self._measuring_since if self._measuring_since is not None else 0.0)
        training = self._elapsed_before + now - self._started - measuring
        return measuring / training if training > 0 else math.nan

    def _charged(self, function: Callable[[], Any]) -> Any:
        self._measuring_since = start = time.perf_counter()
        try:
            return function()
        finally:
            self.measuring_seconds += time.perf_counter() - start
            self._measuring_since = None

    def _attempt(self, step: int, function: Callable[[], Any]) -> Any:
        """Run a measurement; a failure is one warning a kind, counted and emitted."""
        try:
            return function()
        except Exception as error:
            if self.on_error == "raise":
                raise
            self._failed(step, error)
            return None

    def _failed(self, step: int, error: Exception) -> None:
        self.num_failed += 1
        unchanged = "" if isinstance(error, DisturbedTraining) else " Training goes on unchanged."
        rank = failed_rank(error)
        where = "" if rank is None else f" on rank {rank}"
        self._pending = None  # on all ranks, as the failure is
        self.new_segment("the measurement before this one failed")
        self.outlet.warn_once(
            type(error).__name__,
            f"grsd: the measurement at step {step} failed{where} ({first_line(error)}).{unchanged} The next one is "
            f"made as scheduled. {remedy(error)}",
        )
        self.outlet.failed(step, self.num_failed)

    def _note(self, step: int, written: bool) -> None:
        """Count a measurement whose values could not be written, and say so where writing still works."""
        if not written and step != self._unwritten:
            self._unwritten = step
            self.num_failed += 1
            self.outlet.failed(step, self.num_failed)

    def _warn_if_costly(self) -> None:
        if isinstance(self.schedule, FixedSchedule) and len(self.history) >= 4 and self.overhead > COSTLY:
            self.outlet.warn_once(
                "costly",
                f"grsd: measuring every {self.schedule.every_n_steps} steps costs {100 * self.overhead:.0f} % of the "
                "training time; raise every_n_steps, take a smaller probe, or leave every_n_steps=None.",
            )

    def _parameter_identity(self) -> tuple[tuple[int, bool], ...]:
        """Which parameters there are; sharded ones are other objects while they are gathered."""
        return tuple((i if self._twin else id(p), p.requires_grad) for i, p in enumerate(self.model.parameters()))

    def _parameter_versions(self) -> tuple[int, ...]:
        return tuple(p._version for p in self.model.parameters())

    def _check_identity(self) -> None:
        identity = self._parameter_identity()
        if not self.team.group.all(identity == self._identity):
            self._identity, self._plan = identity, None
            self.team.forget()
            self.new_segment("parameters were replaced, frozen or unfrozen between measurements")

    # -- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as tensors and plain types (loads with weights_only=True)."""
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return {
            "probe": {"inputs": plain_leaves(self.samples.inputs), "targets": plain_leaves(self.samples.targets)},
            "run": self.run.state_dict(),
            "schedule": self.schedule.state_dict(),
            "method": self.settings.method,
            "arguments": self._arguments,
            "last_step": self._last_step,
            "num_failed": self.num_failed,
            "measuring_seconds": self.measuring_seconds,
            "elapsed_seconds": self._elapsed_before + running,
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
        self.measuring_seconds = float(state["measuring_seconds"])
        self._elapsed_before = float(state["elapsed_seconds"])
        self._started = None
        self._pending = None


def on_every_rank(writer: Any) -> list[Any]:
    """The sinks that take values also where rank zero writes."""
    several = writer if isinstance(writer, (list, tuple)) else [writer]
    return [sink for sink in several if getattr(sink, "on_every_rank", False)]


def _nothing() -> None:
    """What other ranks do where rank zero writes."""


def warn_of_few_samples(num_probe: int | None, probe: Probe) -> None:
    """One warning if the probe has fewer samples than were asked for."""
    if num_probe is not None and probe.num_samples < num_probe:
        warn(
            f"grsd: num_probe={num_probe}, but the data have only {probe.num_samples} samples; the probe has these. "
            "Give probe=(inputs, targets) for more."
        )


def make_schedule(
    every_n_steps: int | None,
    max_overhead: float | None,
    total_steps: int | None,
    per_decade: int = 10,
    pair: bool = False,
) -> FixedSchedule | LogSchedule:
    """The schedule meant by a user's arguments; both are checked whichever is used."""
    log = LogSchedule(per_decade, max_overhead, total_steps, pair)
    return log if every_n_steps is None else FixedSchedule(every_n_steps)


def check_options(on_error: Any, switches: dict[str, Any], unpack: Any) -> None:
    """Raise unless on_error is a known word, switches are True or False, and unpack a function or None."""
    if not (isinstance(on_error, str) and on_error in ("warn", "raise")):
        raise ValueError(f"on_error must be 'warn' or 'raise', got {on_error!r}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    check_function("unpack", unpack)


def check_num_probe(num_probe: int | None) -> None:
    """Raise unless num_probe is None or a positive integer."""
    if num_probe is not None and (isinstance(num_probe, bool) or not isinstance(num_probe, int) or num_probe < 1):
        raise ValueError(f"num_probe must be a positive integer (or None), got {num_probe!r}")


def _check_step(step: Any) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be a non-negative integer, got {step!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _given_size(optimizer: Any, lr: float | None, flow_time: float | None = None) -> StepSize:
    if flow_time is not None and not _is_finite(flow_time):
        raise ValueError(f"flow_time must be a finite number, got {flow_time!r}")
    if optimizer is not None:
        return step_size(optimizer)
    if lr is not None:
        if not _is_finite(lr):
            raise ValueError(f"lr must be a finite number, got {lr!r}")
        return StepSize(float(lr), float(lr))
    return NO_STEP_SIZE if flow_time is None else replace(NO_STEP_SIZE, nominal=False)
