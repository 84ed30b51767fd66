"""A run in numbers: how one measurement, set against what came before it, becomes a snapshot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.comparison import estimated_comparison, frozen_kernel_share, kernel_comparison
from grsd_callbacks.drift import spectral_velocity
from grsd_callbacks.exponents import Compression, PowerLawFit, compression_exponents
from grsd_callbacks.flux import KernelState, ShellFlux, four_corner_flux, no_flux
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.measure import Instant
from grsd_callbacks.optimizer import NO_STEP_SIZE, StepSize
from grsd_callbacks.position import spectral_position, spectral_reach
from grsd_callbacks.shells import ShellGrid
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.trajectory import Trajectory, exponent_closures, exponents_at, flat, frozen_start, spectrum_fits
from grsd_callbacks.transfer import ShellTransfer, kernel_velocity, kink_gap, shell_transfer

#: vectors on which the two ways to the kernel's velocity are compared at the start of a run
NUM_CROSS_CHECKS = 2


@dataclass(eq=False)
class Pending:
    """A measurement whose following optimizer step has not been seen yet."""

    step: int
    op: NTKOperator
    state: KernelState
    nu: float
    size: StepSize
    void: bool = False  # parameters were written to before that step was done

    @classmethod
    def elsewhere(cls, step: int, op: NTKOperator) -> Pending:
        """A measurement that another rank keeps; this one only has its part of the operator."""
        nothing = torch.zeros(0)
        return cls(step, op, KernelState(nothing, nothing.reshape(0, 0), nothing), math.nan, NO_STEP_SIZE)


@dataclass(eq=False)
class Run:
    """Everything a run remembers between measurements.

    Attributes:
        history: snapshots in order.
        trajectory: the series that exponents are fitted to.
        grid, frozen: shells and basis of the first measurement; frozen_images: its images of a random vector.
        flow_time: t so far.
        size: step size of the coming optimizer step.
        steps_since: optimizer steps since the last measurement.
        nominal: why flow time is only nominal; empty if it is exact.
        velocity_checked: whether the two ways to the kernel's velocity have been compared.
    """

    history: list[Snapshot] = field(default_factory=list)
    trajectory: Trajectory = field(default_factory=Trajectory)
    grid: ShellGrid | None = None
    frozen: KernelState | None = None
    frozen_images: Tensor | None = None
    flow_time: float = 0.0
    size: StepSize = NO_STEP_SIZE
    steps_since: int = 0
    nominal: str = ""
    velocity_checked: bool = False
    _previous: tuple[Snapshot, KernelState] | None = None
    _break: str = "first measurement"

    def interrupt(self, reason: str) -> None:
        """No flux is computed across this point."""
        self._previous = None
        self._break = reason

    @property
    def last_vectors(self) -> Tensor | None:
        """Basis of the last measurement, which warm-starts the randomized method."""
        return None if self._previous is None else self._previous[1].vectors

    # -- one measurement ---------------------------------------------------------------------------------

    def add(self, step: int, instant: Instant, energy_is_loss: bool) -> Snapshot:
        """The snapshot of a measurement, appended to the history; what fails leaves the run as it was."""
        is_first, kept = self.frozen is None, self.trajectory.copy()
        try:
            return self._add(step, instant, energy_is_loss)
        except BaseException:
            self.trajectory = kept
            if is_first:
                self.grid = self.frozen = self.frozen_images = None
            raise

    def _add(self, step: int, instant: Instant, energy_is_loss: bool) -> Snapshot:
        budget, grid = instant.budget, instant.budget.grid
        if self.grid is None or self.frozen is None:
            self.grid, self.frozen_images = grid, instant.images
            self.frozen = replace(instant.state, kernel=None)  # put together again, as after a resume
        frozen_energy, frozen_coverage = self.frozen.energies(instant.state.residual, grid)
        instant.health["frozen_coverage"] = frozen_coverage
        self._start(instant, frozen_energy)
        self.trajectory.append(self.flow_time, instant.loss, frozen_energy, frozen_coverage)
        flux = self._flux(instant)
        self._add_velocity(instant)
        fits = exponents_at(self.trajectory, instant.all_eigenvalues, budget, floor=instant.summary["floor"])
        nan = torch.full((grid.num_shells,), math.nan, dtype=torch.float64)
        snapshot = Snapshot(
            step=step,
            flow_time=self.flow_time,
            **_measured(instant),
            frozen_energy=frozen_energy,
            transport=flux.transport,
            flux=flux.flux,
            work=nan,
            effective_lr=nan.clone(),
            flux_dissipation=flux.dissipation,
            summary=self._summary(instant, flux, energy_is_loss),
            closures=self._closures(instant, flux, fits, energy_is_loss),
            health=self._health(instant, flux),
            exponents=fits,
            reasons={"flux": flux.reason} if flux.reason else {},
        )
        self.history.append(snapshot)
        self._previous = (snapshot, replace(instant.state, kernel=None))
        self.steps_since = 0
        return snapshot

    def _start(self, instant: Instant, frozen_energy: Tensor) -> None:
        """Keep of the first measurement what exponents need."""
        if self.trajectory.frozen is None:
            state, known = instant.state, instant.all_eigenvalues
            if known is None and state.is_complete:  # by as many products as there are outputs
                known = state.eigenvalues
            self.trajectory.frozen = frozen_start(
                instant.budget,
                frozen_energy,
                state.eigenvalues,
                (state.vectors.T @ state.residual.to(state.vectors)) ** 2,
                eigenvalues=known,
                complete=state.is_complete,
                floor=instant.summary["floor"],
            )

    def _add_velocity(self, instant: Instant) -> None:
        """Spectral velocities since the measurement before."""
        if self._previous is not None and self.flow_time > self._previous[0].flow_time:
            before, state = self._previous
            dt = self.flow_time - before.flow_time
            velocity = spectral_velocity(state, instant.state, instant.budget.grid, dt)
            self.trajectory.append_velocity(before.flow_time, self.flow_time, velocity)

    def _flux(self, instant: Instant) -> ShellFlux:
        if self._previous is None:
            return no_flux(instant.budget.grid, self._break)
        before, state = self._previous
        return four_corner_flux(state, instant.state, instant.budget.grid, self.flow_time - before.flow_time)

    def _summary(self, instant: Instant, flux: ShellFlux, energy_is_loss: bool) -> dict[str, float]:
        summary = {**instant.summary, "lr": self.size.lr, "dt": flux.dt, "flux_width": flux.width}
        total = float(flux.dissipation.sum().abs())
        summary["transport_ratio"] = float(flux.flux.abs().sum()) / total if total > 0 else math.nan
        if energy_is_loss and self._previous is not None and flux.dt > 0 and self.steps_since:
            summary["frozen_kernel_share"] = frozen_kernel_share(
                self._previous[1], instant.state.residual, flux.dt / self.steps_since, self.steps_since
            )
        if instant.images is not None and self.frozen_images is not None:
            summary.update(estimated_comparison(instant.images, self.frozen_images))
        elif self.frozen is not None:
            summary.update(kernel_comparison(instant.state, self.frozen))
        mean, known = summary["trace"] / instant.state.residual.numel(), instant.all_eigenvalues
        position = spectral_position(summary["mean_eigenvalue"], summary["lambda_max"], mean, instant.budget, known)
        before = self.history[-1].summary if self.history else {}
        summary["resolved_modes"] = self.trajectory.resolved_modes
        return {**summary, **position, **spectral_reach(position, before)}

    def _closures(
        self, instant: Instant, flux: ShellFlux, fits: dict[str, PowerLawFit], energy_is_loss: bool
    ) -> dict[str, float]:
        budget = instant.budget
        closures = {}
        if instant.closes:
            closures["dissipation"] = _relative(float(budget.dissipation.sum()), instant.grad_norm_sq)
        if energy_is_loss:
            closures["energy"] = _relative(float(budget.energy.sum()), instant.loss)
        if not flux.reason and self._previous is not None:
            moved = float(flux.transport.abs().sum())
            closures["transport"] = abs(float(flux.transport.sum())) / moved if moved > 0 else 0.0
            before = self._previous[0]
            mean = (float(before.dissipation.sum()) + float(budget.dissipation.sum())) / 2
            closures["budget"] = (before.loss - instant.loss) / flux.dt / mean if mean > 0 else math.nan
        source = self.trajectory.frozen.source if self.trajectory.frozen is not None else fits["q"]
        return {**closures, **flat(exponent_closures({**fits, "q": source}))}

    def _health(self, instant: Instant, flux: ShellFlux) -> dict[str, float]:
        budget = instant.budget
        product = self.size.lr * instant.summary["lambda_max"]
        total = float(budget.energy.sum())
        return {
            **instant.health,
            "lr_lambda_max": product,
            "unstable": float(product > 2) if math.isfinite(product) else math.nan,
            "nominal_flow_time": float(bool(self.nominal or self.size.nominal)),
            "unresolved_energy": float(budget.energy[~budget.resolved].sum()) / total if total > 0 else 0.0,
            "coverage": flux.coverage,
            "estimated_regime": float(instant.images is not None),
            "estimated_position": float(instant.weights is not None),
        }

    # -- the optimizer step after a measurement ----------------------------------------------------------

    def add_update(self, pending: Pending, change: Tensor, size: StepSize, *, transfer: bool) -> Snapshot | None:
        """Complete the latest snapshot by the optimizer step that followed it.

        Args:
            pending: the measurement.
            change: the parameters' actual change, shape (P,).
            size: the step's size.
            transfer: also measure the instantaneous flux along the change.
        """
        if not self.history or self.history[-1].step != pending.step:
            return None
        snapshot = self.history[-1]
        s = math.sqrt(pending.nu) * pending.op.jvp(change)
        work, dissipation = work_per_shell(pending.state, s, snapshot.grid, float(snapshot.dissipation.sum()))
        total_work, total = float(work.sum()), float(dissipation.sum())
        known = (dissipation > 1e-12 * total) & (size.lr > 0)
        overall = total_work / (size.lr * total) if size.lr * total > 0 else math.nan
        done = replace(
            snapshot,
            work=work,
            effective_lr=torch.where(known, work / (abs(size.lr) * dissipation), math.nan),
            summary={**snapshot.summary, "effective_lr": overall},
            closures={**snapshot.closures, "probe": total * size.flow / total_work if total_work != 0 else math.nan},
        )
        if transfer and math.isfinite(size.flow) and size.flow > 0:
            done = self._with_transfer(done, pending, change, size.flow)
        self.history[-1] = done
        if self._previous is not None:
            self._previous = (done, self._previous[1])
        return done

    def _with_transfer(self, snapshot: Snapshot, pending: Pending, change: Tensor, dt: float) -> Snapshot:
        state, op = pending.state, pending.op
        velocity = change / dt
        health: dict[str, float] = {}
        reasons: dict[str, str] = {}
        if state.is_complete:
            dense = kernel_velocity(op, velocity)
            health["kink_gap"] = kink_gap(op, change, dt * dense)
            if not self.velocity_checked:
                self.velocity_checked = True
                health["velocity_gap"] = _velocity_gap(op, velocity, dense)
            moved = state.vectors.T @ dense.to(state.vectors) @ state.vectors
            del dense  # m^2 numbers
        else:
            reasons["kink_gap"] = "only measured with all eigenvectors of the kernel"
            moved = kernel_velocity(op, velocity, state.vectors)
        g = state.vectors.T @ state.residual.to(state.vectors)
        held = float(g @ g) / max(float(state.residual @ state.residual), 1e-300)
        found = shell_transfer(
            state.eigenvalues, g, moved.mul_(pending.nu), snapshot.grid, width=snapshot.grid.width / 2, coverage=held
        )
        return replace(
            snapshot,
            transfer=found.transfer,
            transfer_energy=found.energy,
            transfer_dissipation=found.dissipation,
            rotation_flux=found.rotation_flux,
            drift_flux=found.drift_flux,
            summary={**snapshot.summary, **_transfer_summary(found), "transfer_width": found.width},
            health={**snapshot.health, **health, "transfer_coverage": held},
            reasons={**snapshot.reasons, **reasons},
        )

    def final_exponents(self) -> dict[str, PowerLawFit]:
        """Exponents over the whole run with verdicts: q of the first measurement, a, n and pi_c of the last."""
        if not self.history or self.trajectory.frozen is None:
            return {}
        last = self.history[-1]
        fits = {"q": self.trajectory.frozen.source, **self.trajectory.fits()}
        if last.weights is None:
            floor = last.summary.get("floor", 0.0)
            fits.update(spectrum_fits(last.eigenvalues, last.grid, last.counts, floor=floor, compare=True))
        learned = self.compression(fits)
        return fits if learned is None else {**fits, "pi_c": learned.pi_c}

    def compression(self, fits: Mapping[str, PowerLawFit] | None = None) -> Compression | None:
        """What truncating the learned function costs now, in the basis of the first measurement.

        Args:
            fits: `chi_tail` (or `chi`) and `rho_contour` for the invariant; None fits them.

        Returns:
            See `compression_exponents`; None where the first measurement was not exact or no later one is at hand.
        """
        frozen, start = self.frozen, self.trajectory.frozen
        if frozen is None or start is None or self._previous is None or not frozen.is_complete:
            return None
        fits = self.trajectory.fits() if fits is None else fits
        chi, rho = (fits.get(name, math.nan) for name in ("chi_tail", "rho_contour"))
        g = [frozen.vectors.T @ r.to(frozen.vectors) for r in (frozen.residual, self._previous[1].residual)]
        tail = start.tail.value if start.tail.value > 0 else 0.0
        contours = [x for x in self.trajectory.contour if math.isfinite(x)]
        frontier = contours[-1] if contours else math.nan  # once all is learned, the last one seen
        lam, before, now = (x.to("cpu", torch.float64).numpy() for x in (frozen.eigenvalues, *g))
        return compression_exponents(lam, before, now, frontier, tail=tail, chi=chi, rho=rho)

    # -- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain types only."""
        frozen = self.frozen
        return {
            "edges": None if self.grid is None else self.grid.edges,
            "frozen": None
            if frozen is None
            else {"eigenvalues": frozen.eigenvalues, "vectors": frozen.vectors, "residual": frozen.residual},
            "frozen_images": self.frozen_images,
            "history": [snapshot.to_json() for snapshot in self.history],
            "trajectory": self.trajectory.state_dict(),
            "flow_time": self.flow_time,
            "nominal": self.nominal,
            "size": asdict(self.size),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Run:
        """The run as it was; the next flux is NaN, since what happened in between is not known."""
        frozen = state["frozen"]
        run = cls(
            history=[Snapshot.from_json(text) for text in state["history"]],
            trajectory=Trajectory.from_state(state["trajectory"]),
            grid=None if state["edges"] is None else ShellGrid(state["edges"]),
            frozen=None if frozen is None else KernelState(**{k: v.to(device) for k, v in frozen.items()}),
            frozen_images=None if state["frozen_images"] is None else state["frozen_images"].to(device),
            flow_time=float(state["flow_time"]),
            nominal=str(state["nominal"]),
            size=StepSize(**state["size"]),
        )
        run.interrupt("first measurement after a resume")
        return run


def _measured(instant: Instant) -> dict[str, Any]:
    """What a snapshot takes over from a measurement as it is."""
    budget = {f.name: getattr(instant.budget, f.name) for f in fields(instant.budget) if f.name != "grid"}
    whole = ("loss", "grad_norm_sq", "nu", "num_samples", "num_outputs", "method", "eigenvalues", "weights", "paths")
    same = {name: getattr(instant, name) for name in whole}
    return {"edges": instant.budget.grid.edges, "cost": dict(instant.cost), **budget, **same}


def work_per_shell(state: KernelState, s: Tensor, grid: ShellGrid, total: float) -> tuple[Tensor, Tensor]:
    """W_a = -sum g_i <u_i, s> and D_a = sum lambda_i g_i^2 per sharp shell, s = sqrt(nu) J dtheta.

    Sums are exact: W sums to -<r, s>, minus the first-order change of the loss, and D to `total`, r^T M r. What an
    incomplete basis leaves over of both is put in the underflow shell (of D it can be negative: cross terms).
    """
    vectors = state.vectors
    g, moved = vectors.T @ state.residual.to(vectors), vectors.T @ s.to(vectors)
    work = grid.collect(state.eigenvalues, -g * moved)
    if not state.is_complete:
        work[0] += -float(state.residual.to(vectors) @ s.to(vectors)) - float(work.sum())
    dissipation = grid.collect(state.eigenvalues, state.eigenvalues * g**2)
    if not state.is_complete:
        dissipation[0] += total - float(dissipation.sum())
    return work, dissipation


def _transfer_summary(found: ShellTransfer) -> dict[str, float]:
    rotation, drift = float(found.rotation_flux.abs().sum()), float(found.drift_flux.abs().sum())
    total, dissipated = rotation + drift, float(found.dissipation.sum())
    return {
        "rotation_share": rotation / total if total > 0 else math.nan,
        "instant_transport_ratio": float(found.flux.abs().sum()) / dissipated if dissipated > 0 else math.nan,
    }


def _velocity_gap(op: NTKOperator, velocity: Tensor, dense: Tensor) -> float:
    """Largest relative gap between v^T M' v by double backward and by central differences."""
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(op.shape[0], NUM_CROSS_CHECKS, generator=generator, dtype=torch.float64).to(dense)
    other = kernel_velocity(op, velocity, V, method="double_backward")
    mine = V.T @ dense @ V
    size = float(mine.abs().max())
    return float((other.to(mine) - mine).abs().max()) / size if size > 0 else 0.0


def _relative(value: float, reference: float) -> float:
    return (value - reference) / reference if reference != 0 else value
