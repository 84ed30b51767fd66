"""The conditions of renormalizable shell dynamics while a training loop of any kind runs, and what held at its end.

A `ShellMonitor` whose measurements also take the conditions; it writes these and not the shells, so that it can run
beside a `ShellMonitor` with the same writer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from grsd_callbacks import tags
from grsd_callbacks.emission import Emission
from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.figures import conditions_figure
from grsd_callbacks.flux import KernelState
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.measure import Instant, operator_for
from grsd_callbacks.monitor import ShellMonitor, on_every_rank
from grsd_callbacks.outlet import Outlet
from grsd_callbacks.renormalizability import (
    BlockOperator,
    Conditions,
    ConditionSettings,
    RunVerdict,
    conditions_at,
    find_blocks,
    gradient_propagation,
    judge,
)
from grsd_callbacks.shells import ShellGrid
from grsd_callbacks.snapshot import Snapshot

#: largest m = samples x outputs: the conditions need exact kernels
MAX_ROWS = 4096


class RenormalizabilityMonitor(ShellMonitor):
    """Measures the conditions of arXiv:2512.18209 on a run; `finish` says which of them held.

    Args:
        model, loss, probe: see `ShellMonitor`; samples x outputs at most `MAX_ROWS`.
        conditions: how the conditions are measured (blocks, shells, nulls).
        per_decade: measurements a decade of steps of the default schedule before thinning.
        **options: see `ShellMonitor` (every_n_steps, max_overhead, total_steps, writer, figures, on_error, ...). The
            figure shows the verdict, which there is only in `finish`: it is drawn there, once.

    Attributes:
        conditions: list of `Conditions`, one a measurement; the last one thorough after `finish`.
        verdict: `RunVerdict` after `finish`, None before.
        final_seconds: wall-clock time of nulls and probe-resampling in `finish`, which the overhead leaves out.

    Raises:
        ValueError, TypeError: wrong arguments, fewer than two blocks, or too many rows (at construction).

    Cost: a measurement takes three exact kernels, one eigendecomposition and about 25 double-backward passes, and
        holds m^2 numbers in float64 a block. On several ranks the shells' kernel is divided, and rank zero forms one
        more.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> x, y = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.ones(6, 1)
        >>> monitor = RenormalizabilityMonitor(net, "mse", (x, y), every_n_steps=5)
        >>> for step in range(11):
        ...     snapshot = monitor.step(step, lr=0.1)
        >>> last = monitor.finish()
        >>> [c.step for c in monitor.conditions], len(monitor.verdict.verdicts)
        ([0, 5, 10], 6)
    """

    _title = "conditions of renormalizable shell dynamics"
    _sparse = True

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        probe: Any,
        *,
        conditions: ConditionSettings | None = None,
        per_decade: int = 2,
        **options: Any,
    ) -> None:
        if options.get("gram_dtype") == torch.float32:
            raise ValueError("gram_dtype must be None or torch.float64: couplings need kernels summed up in float64")
        self.how = conditions or ConditionSettings()
        self.conditions: list[Conditions] = []
        self.verdict: RunVerdict | None = None
        self.final_seconds = math.nan
        self._found: Any = None  # operator and eigenpairs of the measurement in progress
        writer = options.pop("writer", None)
        fixed = {"method": "exact", "pair": False, "work": False, "transfer": False, "figures_every_n_steps": None}
        super().__init__(model, loss, probe, per_decade=per_decade, **{**options, **fixed})
        self._arguments["conditions"] = str(self.how)
        leads = self.team.leads
        sinks = writer if leads else on_every_rank(writer)
        self.outlet: ConditionsOutlet = ConditionsOutlet(
            sinks, options.get("prefix", "grsd_"), self.on_error, not leads
        )

    def _prepare_here(self) -> tuple[str, str]:
        """As for shells; also whether there are blocks, activations and few enough rows."""
        prepared = super()._prepare_here()
        op = operator_for(self._unsharded, self.probe, self.settings)
        if op.shape[0] > MAX_ROWS:
            raise ValueError(
                f"the probe has {op.num_samples} samples x {op.num_outputs} outputs = {op.shape[0]} rows, and the "
                f"conditions need exact kernels of at most {MAX_ROWS}; give a smaller num_probe, or outputs= a "
                "function that picks fewer outputs"
            )
        blocks = find_blocks(self._unsharded, self.how.blocks, op.parameter_names)
        if len(blocks) < 2:
            raise ValueError(f"the conditions compare blocks, and {type(self.model).__name__} has {len(blocks)}")
        gradient_propagation(op, self.probe.targets, self.loss, blocks, num_steps=1)
        return prepared

    # -- one measurement ---------------------------------------------------------------------------------

    def _operator(self) -> NTKOperator:
        """One for shells and conditions, where no other rank takes part in the shells."""
        return super()._operator() if self.team.divided else self._own_operator()

    def _own_operator(self) -> NTKOperator:
        self._refresh()
        return BlockOperator(self._unsharded, self.probe.inputs, blocks=self.how.blocks, **self._function_options())

    def _measured(self, op: NTKOperator) -> Instant:
        instant = super()._measured(op)
        self._found = op, instant.state
        return instant

    def _take(self, step: int) -> Snapshot:
        try:
            snapshot = super()._take(step)
            found = self.team.group.share(lambda: self._conditions_at(snapshot))
        finally:
            self._found = None  # the operator holds copies of the parameters
        self.conditions.append(found)
        if not self.team.leads:
            self.outlet.conditions(found, snapshot, self.num_failed, None)
        return snapshot

    def _conditions_at(self, snapshot: Snapshot) -> Conditions:
        """On rank zero alone: exact kernels of the whole probe."""
        (op, state), self._found = self._found, None
        if self.team.divided:
            op = self._own_operator()
        found = self._measured_conditions(op, state, thorough=False)
        found = replace(found, step=snapshot.step, flow_time=snapshot.flow_time)
        found.cost["overhead_percent"] = 100 * self.overhead
        report = self.report if not self.conditions else None
        written = self.outlet.conditions(found, snapshot, self.num_failed, report)
        self._note(snapshot.step, written)
        return found

    def _measured_conditions(self, op: NTKOperator, state: KernelState | None = None, *, thorough: bool) -> Conditions:
        grid = ShellGrid(self.conditions[0].edges) if self.conditions else None
        return conditions_at(op, self.probe, self.loss, self.how, grid, thorough=thorough, state=state)

    # -- the end -----------------------------------------------------------------------------------------

    def _conclude(self) -> None:
        """On rank zero: nulls, intervals and verdicts; not part of the overhead."""
        if self.conditions:
            end, began = self.conditions[-1].step, time.perf_counter()
            self._attempt(end, lambda: self._judge(end))
            self.final_seconds = time.perf_counter() - began

    def _judge(self, end: int) -> None:
        last = self.conditions[-1]
        found = self._measured_conditions(self._own_operator(), thorough=True)
        self.conditions[-1] = replace(found, step=end, flow_time=last.flow_time, cost={**found.cost, **last.cost})
        fits = self.final_exponents()
        signs = regime_signs(self.history, fits["rho"])
        self.verdict = judge(self.conditions, chi=fits["chi"].exponent, signs=signs, seed=self.how.seed)
        self._note(end, self.outlet.verdict(self.conditions, self.verdict, self.summary(), self.figures))

    def summary(self) -> str:
        """The verdict table, or that there is none yet; with what measuring cost."""
        table = self.verdict.table() if self.verdict is not None else "grsd: no verdict before the end of the run"
        return (
            f"{table}\n\ncost: {len(self.conditions)} measurements, {100 * self.overhead:.2g} % of the training time; "
            "nulls and probe-resampling at the end come on top"
        )

    # -- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As for shells, and the conditions so far."""
        return {**super().state_dict(), "conditions": [json.dumps(c.to_dict()) for c in self.conditions]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run."""
        super().load_state_dict(state)
        kept = state["conditions"] if self.history else []  # a series with other arguments starts anew
        self.conditions = [Conditions.from_dict(json.loads(text)) for text in kept]


def regime_signs(history: Sequence[Snapshot], rho: PowerLawFit | None = None) -> dict[str, float]:
    """The signs of a moving kernel that a run has shown, for `lazy_or_rich`.

    Args:
        history: snapshots in order, at least one; exact or krylov.
        rho: fit of the frontier's exponent; its lower end votes, so that noise does not.

    Returns:
        kernel_drift and cka_distance, the largest; alignment_change, the largest; transport_ratio, over the whole run
        (`sum |J_b| dt / sum D_a dt`); rho_minus_1. NaN where not measured.
    """

    def series(name: str) -> list[float]:
        return [v for s in history if math.isfinite(v := s.summary.get(name, math.nan))]

    moved = [s for s in history if bool(s.flux.isfinite().all()) and s.flux_dissipation is not None]
    flux = sum(float(s.flux.abs().sum()) * s.summary["dt"] for s in moved)
    lost = sum(abs(float(s.flux_dissipation.sum())) * s.summary["dt"] for s in moved if s.flux_dissipation is not None)
    alignments = series("target_alignment")
    changes = [abs(a / alignments[0] - 1) for a in alignments if alignments[0] != 0]
    return {
        "kernel_drift": max(series("kernel_drift"), default=math.nan),
        "cka_distance": max(series("cka_distance"), default=math.nan),
        "alignment_change": max(changes, default=math.nan),
        "transport_ratio": flux / lost if lost > 0 else math.nan,
        "rho_minus_1": max(rho.lower - 1, 0.0) if rho is not None and math.isfinite(rho.lower) else math.nan,
    }


class ConditionsOutlet(Outlet):
    """Writes conditions and verdicts; what a `ShellMonitor` writes of shells is left to that monitor."""

    def snapshot(self, snapshot: Snapshot, num_failed: int, report: str | None) -> bool:
        """Nothing: the shells are not this monitor's to write."""
        return True

    def update(self, snapshot: Snapshot) -> bool:
        """Nothing, as for `snapshot`."""
        return True

    def summary(self, history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit]) -> bool:
        """Nothing: see `verdict`."""
        return True

    def failed(self, step: int, num_failed: int) -> bool:
        """Write the number of measurements that could not be made."""
        scalars = {tags.CONDITIONS_FAILED: float(num_failed)}
        return self._attempt(lambda: self._write(Emission(step=step, scalars=scalars)))

    def conditions(self, found: Conditions, snapshot: Snapshot, num_failed: int, report: str | None) -> bool:
        """Write one measurement; with the report (given at the first one) also the meaning of tags."""

        def write() -> None:
            scalars = {**tags.condition_scalars(found, snapshot), tags.CONDITIONS_FAILED: float(num_failed)}
            texts = {} if report is None else {tags.CONDITIONS_MEANING: tags.conditions_card()}
            self._write(Emission(step=found.step, scalars=scalars, texts=texts, record=found.to_dict()))

        return self._attempt(write)

    def verdict(self, history: Sequence[Conditions], verdict: RunVerdict, text: str, figures: bool) -> bool:
        """Write the verdicts as numbers, text card and figure, and flush."""

        def write() -> None:
            end, past = history[-1].step, list(history)
            drawn = {tags.CONDITIONS_FIGURE: lambda: conditions_figure(past, verdict)} if figures else {}
            self._write(
                Emission(
                    step=end,
                    scalars=tags.verdict_scalars(verdict),
                    texts={tags.VERDICTS: tags.preformatted(text)},
                    figures=drawn,
                    record=history[-1].to_dict(),
                )
            )
            self.sinks.flush()

        return self._attempt(write)
