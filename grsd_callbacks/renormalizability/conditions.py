"""One instant of a run, as the conditions see it: model, probe and loss in, one record out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grsd_callbacks.arguments import checked
from grsd_callbacks.flux import KernelState
from grsd_callbacks.functional import ParameterFilter
from grsd_callbacks.kernel import NTKOperator, synchronise
from grsd_callbacks.losses import Loss, check_pair, resolve_loss
from grsd_callbacks.probe import Probe, probe_from
from grsd_callbacks.renormalizability.blocks import (
    NUM_RESAMPLES,
    BlockIncoherence,
    BlockOperator,
    block_incoherence,
    block_kernels,
    find_blocks,
    half_samples,
    resampled_error,
)
from grsd_callbacks.renormalizability.couplings import LogShiftInvariance, log_shift_invariance, refined
from grsd_callbacks.renormalizability.evolution import JacobianEvolution, jacobian_evolution
from grsd_callbacks.renormalizability.flow import shell_flux
from grsd_callbacks.renormalizability.propagation import GradientPropagation, gradient_propagation
from grsd_callbacks.shells import ShellGrid, shell_budget
from grsd_callbacks.spectrum import Eigendecomposition, eigendecomposition
from grsd_callbacks.transfer import kernel_velocity, kink_gap

#: couplings below this share of lambda_max drown in the rounding of two exact kernels' difference
COUPLING_FLOOR = 1e-7
#: decades above lambda_max that the shells of a first measurement reach
HEADROOM = 2.0
#: relative size of the step that the kink gap is measured over
KINK_STEP = 1e-3


@dataclass(frozen=True)
class ConditionSettings:
    """How the conditions are measured.

    Attributes:
        blocks: names of the block modules; None: see `find_blocks`.
        shells_per_decade: of a grid that is made here.
        min_modes, drop_top: see `log_shift_invariance`.
        num_steps: see `gradient_propagation`.   num_vectors: see `jacobian_evolution`.
        num_resamples, num_null, num_directions: half-samples of the probe, shuffles, and random directions.
        seed: of all private generators.
    """

    blocks: tuple[str, ...] | None = None
    shells_per_decade: int = 3
    min_modes: int = 4
    drop_top: int = 1
    num_steps: int = 16
    num_vectors: int = 8
    num_resamples: int = NUM_RESAMPLES
    num_null: int = 199
    num_directions: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        blocks = self.blocks
        if blocks is not None:
            if not isinstance(blocks, (list, tuple)) or not all(isinstance(name, str) for name in blocks):
                raise ValueError(f"blocks must be a list of module names or None, got {blocks!r}")
            object.__setattr__(self, "blocks", tuple(blocks))
        least = {"shells_per_decade": 1, "min_modes": 1, "drop_top": 0, "num_steps": 1, "num_vectors": 2}
        for name, low in {**least, "num_resamples": 0, "num_null": 0, "num_directions": 0}.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions at one instant.

    Attributes:
        loss: L on the probe.
        edges: of the shells, shape (B + 1,).
        propagation, incoherence, evolution: see there.
        couplings: along -grad L on the probe; refined: the same with every shell cut in two.
        errors: standard errors of defect, zeta and locality from half-samples of the probe; empty unless thorough.
        energy, dissipation, flux: smooth shell contents and flux J_b (windows of h / 2), along -grad L.
        step, flow_time: where in the run (set by the monitor).
        health: kink_gap, how much flips of gates add to M' over a step of `KINK_STEP` (thorough only).
        cost: seconds.
    """

    loss: float
    edges: Tensor
    propagation: GradientPropagation
    incoherence: BlockIncoherence
    evolution: JacobianEvolution
    couplings: LogShiftInvariance
    refined: LogShiftInvariance
    errors: dict[str, float]
    energy: Tensor
    dissipation: Tensor
    flux: Tensor
    step: int = 0
    flow_time: float = 0.0
    health: dict[str, float] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def transport_ratio(self) -> float:
        """sum |J_b| / sum D_a, instantaneous."""
        total = float(self.dissipation.sum())
        return float(self.flux.abs().sum()) / total if total > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; NaN and infinities become strings."""
        data: dict[str, Any] = _plain(self)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Conditions:
        """The inverse of `to_dict`."""
        values = {f.name: _restored(str(f.type), data[f.name]) for f in fields(cls)}
        return cls(**values)


@checked
def measure_conditions(
    model: nn.Module,
    probe: Any,
    loss: Any,
    settings: ConditionSettings | None = None,
    grid: ShellGrid | None = None,
    *,
    thorough: bool = True,
    params: ParameterFilter = None,
    outputs: Callable[[Any], Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Conditions:
    """Measure every condition that one instant allows, along gradient flow on the probe.

    Args:
        model: the network, left bit-identical.
        probe: a `Probe` or `(inputs, targets)`, n samples; m = n C rows are formed into m x m kernels.
        loss: a `Loss`, or what `resolve_loss` takes.
        settings: how to measure.
        grid: shells; None: from `COUPLING_FLOOR` lambda_max (or the smallest eigenvalue) to two decades above it.
        thorough: also the nulls, the errors of the couplings, random directions and the kink gap: `num_resamples`
            eigendecompositions of half the size and `2 num_directions + 2` exact kernels more.
        params, outputs, dtype: see `NTKOperator`.

    Returns:
        `Conditions`.

    Raises:
        ValueError: fewer than two blocks, or outputs and targets that do not fit.

    Cost: three exact kernels, one m x m eigendecomposition, `num_steps` + `num_vectors` double-backward passes.

    Accuracy: couplings are right to about 1e-9 |M'| absolutely (central differences in float64), so shells begin at
        `COUPLING_FLOOR` lambda_max. For piecewise-linear activations M' is the smooth part only.

    Source: conditions named in arXiv:2512.18209, measured by this package's own definitions (`DEFINITIONS`).
    """
    loss = loss if isinstance(loss, Loss) else resolve_loss(loss)
    probe = probe if isinstance(probe, Probe) else probe_from(probe, None)
    settings = settings or ConditionSettings()
    op = BlockOperator(model, probe.inputs, blocks=settings.blocks, params=params, outputs=outputs, dtype=dtype)
    return conditions_at(op, probe, loss, settings, grid, thorough=thorough)


def conditions_at(
    op: NTKOperator,
    probe: Probe,
    loss: Loss,
    settings: ConditionSettings,
    grid: ShellGrid | None = None,
    *,
    thorough: bool = True,
    state: KernelState | None = None,
) -> Conditions:
    """As `measure_conditions`, with an operator on the probe; `state` holds the eigenpairs of its kernel, if known."""
    began = time.perf_counter()
    spectrum = None if state is None else Eigendecomposition(state.eigenvalues, state.vectors)
    found = op.run(lambda: _measured(op, probe, loss, settings, grid, thorough, spectrum))
    synchronise(op.device)
    found.cost["seconds"] = time.perf_counter() - began
    return found


def _measured(
    op: NTKOperator,
    probe: Probe,
    loss: Loss,
    settings: ConditionSettings,
    grid: ShellGrid | None,
    thorough: bool,
    spectrum: Eigendecomposition | None,
) -> Conditions:
    check_pair(loss, op.outputs, probe.targets)
    r = loss.evaluate(op.outputs, probe.targets)
    blocks = find_blocks(op.function.model, settings.blocks, op.parameter_names)
    seed, num_resamples = settings.seed, settings.num_resamples
    num_null = settings.num_null if thorough else 0
    kernels = block_kernels(op, blocks)
    kernel = torch.zeros_like(next(iter(kernels.values())))
    for part in kernels.values():
        kernel += part
    spectrum = spectrum or eigendecomposition(kernel, r.nu)
    drift = -math.sqrt(r.nu) * op.vjp(r.residual)  # dtheta/dt = -grad L
    moved = kernel_velocity(op, drift)
    shells = _Shells(moved, r.residual, r.nu, settings, spectrum)
    grid = grid or shells.grid()
    width = grid.width / 2
    lam, mdot, g = shells.modes()
    budget = shell_budget(Eigendecomposition(lam, torch.eye(len(lam)).to(lam)), g, grid, width=width)
    couplings = shells.couplings(grid, num_null)
    return Conditions(
        loss=float(r.loss),
        edges=grid.edges,
        propagation=gradient_propagation(
            op, probe.targets, loss, blocks,
            num_steps=settings.num_steps, num_resamples=num_resamples, num_null=num_null, seed=seed,
        ),
        incoherence=block_incoherence(kernels, num_outputs=op.num_outputs, num_resamples=num_resamples, seed=seed),
        evolution=jacobian_evolution(
            op, drift, r.nu, blocks, kernels=kernels, velocity=moved, num_vectors=settings.num_vectors,
            num_resamples=num_resamples, num_null=settings.num_directions if thorough else 0, seed=seed,
        ),
        couplings=couplings,
        refined=shells.couplings(refined(grid), 0, local=False),
        errors=_errors(kernel, shells, grid, op.num_outputs, couplings.shells) if thorough else {},
        energy=budget.energy,
        dissipation=budget.dissipation,
        flux=shell_flux(lam, mdot, g, grid, width),
        health={"kink_gap": _kink_gap(op, drift, moved)} if thorough else {},
    )  # fmt: skip


class _Shells:
    """Kernel and velocity of one instant, on the whole probe or on some of its rows, in the kernel's eigenbasis."""

    def __init__(
        self, moved: Tensor, residual: Tensor, nu: float, settings: ConditionSettings, spectrum: Eigendecomposition
    ) -> None:
        self.moved, self.residual, self.nu, self.settings = moved, residual, nu, settings
        self.least = settings.min_modes
        u = spectrum.eigenvectors
        self._modes = spectrum.eigenvalues, nu * (u.T @ moved.to(u) @ u), spectrum.project(residual)

    def modes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues, <u_i, M' u_j> and coefficients."""
        return self._modes

    def grid(self) -> ShellGrid:
        lam = self.modes()[0]
        largest = float(lam[-1])
        if not 0 < largest < math.inf:
            raise ValueError("the kernel on the probe is zero or not finite; the conditions have no meaning here")
        low = max(COUPLING_FLOOR * largest, float(lam[lam > 0].min()) / 10)
        return ShellGrid.logarithmic(min(low, largest / 10), largest * 10**HEADROOM, self.settings.shells_per_decade)

    def couplings(
        self, grid: ShellGrid, num_null: int, local: bool = True, shells: Sequence[int] | None = None
    ) -> LogShiftInvariance:
        lam, mdot, g = self.modes()
        return log_shift_invariance(
            lam, mdot, grid, coefficients=g if local else None, min_modes=self.least,
            drop_top=self.settings.drop_top, shells=shells, num_null=num_null, seed=self.settings.seed,
        )  # fmt: skip


def _errors(
    kernel: Tensor, shells: _Shells, grid: ShellGrid, num_outputs: int, used: Sequence[int]
) -> dict[str, float]:
    """Standard errors of the couplings from half-samples of the probe (delete-half jackknife).

    A half has half of the modes: were its shells chosen anew, shells that come and go would add a scatter of their own.
    So defect and zeta are those of the shells that the whole probe has used; where a half has too few modes there, of
    its own shells of half as many modes at least, which makes the errors of the smallest probes too large.
    """
    m, found, settings = kernel.shape[0], [], shells.settings
    for rows in half_samples(m, num_outputs, settings.num_resamples, settings.seed):
        nu = shells.nu * m / len(rows)  # the mean loss over half of the samples
        spectrum = eigendecomposition(kernel[rows][:, rows], nu)
        half = _Shells(shells.moved[rows][:, rows], shells.residual[rows], nu, settings, spectrum)
        same = half.couplings(grid, 0, shells=used)
        half.least = max(1, shells.least // 2)
        found.append(half.couplings(grid, 0) if same.reason else same)
    return {name: _deviation([getattr(c, name) for c in found]) for name in ("defect", "zeta", "locality")}


def _deviation(values: list[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return resampled_error(known) if len(known) >= max(2, len(values) // 2) else math.nan


def _kink_gap(op: NTKOperator, drift: Tensor, moved: Tensor) -> float:
    """The gap over a step of relative size `KINK_STEP` along the drift."""
    size = float(drift.double().norm())
    scale = math.sqrt(sum(float(p.detach().double().square().sum()) for p in op.function.parameters.values()))
    if size == 0.0:
        return math.nan
    step = KINK_STEP * scale / size
    return kink_gap(op, step * drift, step * moved)


_RECORDS = {
    kind.__name__: kind for kind in (GradientPropagation, BlockIncoherence, JacobianEvolution, LogShiftInvariance)
}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Tensor):
        return value.tolist() if bool(value.isfinite().all()) else _words(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _words(values: Any) -> Any:
    if isinstance(values, list):
        return [_words(v) for v in values]
    return values if math.isfinite(values) else str(values)


def _restored(kind: str, value: Any) -> Any:
    if kind in _RECORDS:
        record = _RECORDS[kind]
        return record(**{f.name: _restored(str(f.type), value[f.name]) for f in fields(record)})
    if kind == "Tensor":
        return torch.tensor(_numbers(value), dtype=torch.float64)
    if kind.startswith("dict"):
        return {key: float(v) for key, v in value.items()}
    if kind.startswith("tuple"):
        return tuple(value)
    return float(value) if kind == "float" else value


def _numbers(value: Any) -> Any:
    return [_numbers(v) for v in value] if isinstance(value, list) else float(value)
