"""What a monitor measures: the model on the probe, before the first step and then at one instant after the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from grsd_callbacks.distributed import failed_rank
from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.guard import DisturbedTraining
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.losses import Loss, calibrate, check_pair
from grsd_callbacks.measure import Instant, measure_with_operator, operator_for
from grsd_callbacks.method import choose_by_cost
from grsd_callbacks.monitor.figure_schedule import FigureSchedule, spare_seconds
from grsd_callbacks.monitor.stopwatch import Stopwatch
from grsd_callbacks.observation import observed
from grsd_callbacks.outlet import Outlet, first_line, remedy
from grsd_callbacks.plan import ProductPlan
from grsd_callbacks.probe import Probe
from grsd_callbacks.refusals import check_derivative, explained
from grsd_callbacks.report import start_report
from grsd_callbacks.run import Pending, Run
from grsd_callbacks.schedule import FixedSchedule, LogSchedule
from grsd_callbacks.settings import Settings
from grsd_callbacks.sharded import Twin, is_sharded
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.team import Team

#: a fixed schedule that costs more than this share of training is warned about, once
COSTLY = 0.2


class Measurer:
    """A `ShellMonitor` without its loop: set-up, one measurement, its cost and its failures.

    Args:
        model, distributed: see `ShellMonitor`.
        loss: the loss, resolved.
        settings: how it is measured.
        observing: the arguments `observe` and `num_projections`.
        team: the ranks that measure together.

    Attributes:
        probe, loss, settings: what is measured, once `observe` has been considered; `samples` is the probe as given.
        report: the report at the start.
        watch: time spent on measuring.
    """

    samples: Probe
    probe: Probe
    outlet: Outlet
    schedule: FixedSchedule | LogSchedule
    max_overhead: float | None
    figures: bool
    figure_schedule: FigureSchedule
    on_error: str
    work: bool
    transfer: bool
    report: str

    _title = "shell dynamics of the empirical NTK"
    _sparse = False  # whether measurements are so dear that the schedule makes do with few

    def __init__(
        self,
        model: nn.Module | Twin,
        loss: Loss,
        settings: Settings,
        observing: tuple[str | None, int],
        team: Team,
        distributed: bool,
    ) -> None:
        self.model: nn.Module = model.source if isinstance(model, Twin) else model
        self.loss, self.settings, self.team = loss, settings, team
        self._observing = (*observing, loss, settings)
        self._is_reduced = False
        self._twin = self._twin_of(model, distributed)
        self.run = Run()
        self.num_failed = 0
        self.watch = Stopwatch()
        self._last_step: int | None = None
        self._unwritten: int | None = None
        self._pending: Pending | None = None
        self._plan: ProductPlan | None = None
        self._identity = self._parameter_identity()

    @property
    def history(self) -> list[Snapshot]:
        """All snapshots, in order."""
        return self.run.history

    # -- set-up ---------------------------------------------------------------------------------------------

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
        self._refresh()
        return self.team.operator(self._unsharded, self.probe.inputs, **self._function_options())

    def _refresh(self) -> None:
        """Follow the weights that a training step's loss gives its terms."""
        if getattr(self.settings.outputs, "scales", None) is not None:
            options = {name: getattr(self.settings, name) for name in ("params", "outputs", "dtype")}
            ModelFunction(self._unsharded, **options).refresh(self.probe.inputs)

    def _function_options(self) -> dict[str, Any]:
        names = ("params", "outputs", "dtype", "memory_limit", "gram_dtype")
        return {name: getattr(self.settings, name) for name in names}

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

    # -- one measurement ------------------------------------------------------------------------------------

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
            state = replace(instant.state, kernel=None)  # m^2 numbers, held until the next step is done
            self._pending = Pending(step, op, state, instant.nu, self.run.size)
        self._warn_if_costly()
        report = self.report if len(self.history) == 1 else None
        self._note(step, self.outlet.snapshot(snapshot, self.num_failed, report))
        return snapshot

    def _check_identity(self) -> None:
        identity = self._parameter_identity()
        if not self.team.group.all(identity == self._identity):
            self._identity, self._plan = identity, None
            self.team.forget()
            self.new_segment("parameters were replaced, frozen or unfrozen between measurements")

    def _parameter_identity(self) -> tuple[tuple[int, bool], ...]:
        """Which parameters there are; sharded ones are other objects while they are gathered."""
        return tuple((i if self._twin else id(p), p.requires_grad) for i, p in enumerate(self.model.parameters()))

    # -- the optimizer step that follows it -----------------------------------------------------------------

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

    # -- figures during the run -----------------------------------------------------------------------------

    def _draw_if_due(self, step: int) -> None:
        """Figures of the run so far, by rank zero; the others wait, for what is to raise there raises on all."""
        if self.figures and self.figure_schedule.every_n_steps is not None:
            here = self._draw_here if self.team.leads else _nothing
            self._attempt(step, lambda: self.team.group.together(lambda: here(step)))

    def _draw_here(self, step: int) -> None:
        count, spare = len(self.history), spare_seconds(step, self.schedule, self.watch, self.max_overhead)
        if not self.figure_schedule.due(step, count, spare):
            return
        before = self.watch.drawing_seconds
        written = self.watch.drawing(lambda: self.outlet.figures(self.history, {}))
        self.figure_schedule.drawn(step, self.watch.drawing_seconds - before)
        self._note(step, written)
        self._warn_if_drawing_is_costly()

    def _warn_if_drawing_is_costly(self) -> None:
        every, training = self.figure_schedule.every_n_steps, self.watch.training_seconds
        enough = isinstance(every, int) and self.figure_schedule.num_drawings >= 3
        if enough and self.watch.drawing_seconds > COSTLY * training > 0:
            self.outlet.warn_once(
                "costly figures",
                f"grsd: drawing figures every {every} steps costs "
                f"{100 * self.watch.drawing_seconds / training:.0f} % of the training time; raise "
                "figures_every_n_steps, or leave it at 'auto'.",
            )

    # -- cost and failures ----------------------------------------------------------------------------------

    @property
    def measuring_seconds(self) -> float:
        """Time spent on measuring so far."""
        return self.watch.measuring_seconds

    @measuring_seconds.setter
    def measuring_seconds(self, seconds: float) -> None:
        self.watch.measuring_seconds = seconds

    @property
    def overhead(self) -> float:
        """Measuring time over training time without it, so far (a fraction); NaN before the first step."""
        return self.watch.overhead(self._last_step)

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

    def new_segment(self, reason: str) -> None:
        """Declare a break in the run: no flux is computed across it.

        Parameters that are replaced, frozen or unfrozen are noticed; values loaded in place (`load_state_dict` in
        mid-run) are not in loops of one's own, and have to be declared (the callback notices them).
        """
        if self._pending is not None:  # kept until all ranks drop it together
            self._pending.void = True
        self.run.interrupt(reason)

    def _note(self, step: int, written: bool) -> None:
        """Count a measurement whose values could not be written, and say so where writing still works."""
        if not written and step != self._unwritten:
            self._unwritten = step
            self.num_failed += 1
            self.outlet.failed(step, self.num_failed)

    def _warn_if_costly(self) -> None:
        if not isinstance(self.schedule, FixedSchedule) or len(self.history) < 4:
            return
        overhead = self.watch.overhead(self._last_step, drawing=False)
        if overhead > COSTLY:
            self.outlet.warn_once(
                "costly",
                f"grsd: measuring every {self.schedule.every_n_steps} steps costs {100 * overhead:.0f} % of the "
                "training time; raise every_n_steps, take a smaller probe, or leave every_n_steps=None.",
            )


def _nothing(step: int) -> None:
    """What other ranks do where rank zero draws."""
