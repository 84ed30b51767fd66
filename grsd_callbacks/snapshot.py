"""The frozen record of one measurement: what was measured, with bounds, closures and cost."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.shells import ShellGrid

#: bump when a field is renamed or changes its meaning
FORMAT = 1


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One instant of a run. Tensors are float64 on the CPU; arrays run over all shells, under- and overflow included.

    Attributes:
        step: optimizer steps taken before the measurement, on the axis of the user's own curves.
        flow_time: sum of learning rates up to here (heavy ball: lr / (1 - momentum)).
        loss: L on the probe.   grad_norm_sq: |grad L|^2 on the probe, from an independent backward pass.
        nu: scale in M = nu J J^T.   num_samples, num_outputs: n and C of the probe, m = n C.
        method: "exact", "lanczos", "krylov" or "randomized".
        edges: shell edges, shape (B + 1,), 1/flow time.
        energy, dissipation, counts: per shell, shape (B + 2,). Energies sum to the loss (squared loss), dissipation
            to |grad L|^2.
        energy_bounds, dissipation_bounds, count_bounds: lower and upper, shape (2, B + 2).
        resolved: whether a shell's energy is known (bool).
        eigenvalues: of M, descending: all (exact, lanczos), or the Gauss nodes of the residual's measure (krylov), or
            Ritz values of the top (randomized).
        weights: Gauss weights of the nodes (krylov), squared coefficients (randomized); None where all eigenvalues are
            known.
        frozen_energy: energy of the present residual in the shells of the *first* measurement's basis.
        transport, flux: per shell and per edge, over the interval since the previous measurement; NaN where there is
            none.
        work, effective_lr: per shell, of the optimizer step that follows the measurement; NaN until it is known.
        flux_dissipation: energy lost by each shell at fixed basis over the same interval and with the same windows
            (width in log lambda `summary["flux_width"]`, NaN for sharp edges): with it dE/dt = transport - dissipation.
        transfer, rotation_flux, drift_flux: instantaneous, along the optimizer step that follows (see `ShellTransfer`),
            with smooth windows (`summary["transfer_width"]`), whose own shell contents are transfer_energy and
            transfer_dissipation; None unless asked for.
        summary: scalars (see `tags`).   closures: identities, zero where they hold.   health: flags and checks.
        exponents: fitted exponents with 95 % intervals.   cost: seconds, kernel products, peak bytes.
        reasons: why a number is NaN, by name.   paths: how products and kernel were computed.
    """

    step: int
    flow_time: float
    loss: float
    grad_norm_sq: float
    nu: float
    num_samples: int
    num_outputs: int
    method: str
    edges: Tensor
    energy: Tensor
    dissipation: Tensor
    counts: Tensor
    energy_bounds: Tensor
    dissipation_bounds: Tensor
    count_bounds: Tensor
    resolved: Tensor
    eigenvalues: Tensor
    weights: Tensor | None
    frozen_energy: Tensor
    transport: Tensor
    flux: Tensor
    work: Tensor
    effective_lr: Tensor
    summary: dict[str, float] = field(default_factory=dict)
    closures: dict[str, float] = field(default_factory=dict)
    health: dict[str, float] = field(default_factory=dict)
    exponents: dict[str, PowerLawFit] = field(default_factory=dict)
    cost: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    flux_dissipation: Tensor | None = None
    transfer: Tensor | None = None
    transfer_energy: Tensor | None = None
    transfer_dissipation: Tensor | None = None
    rotation_flux: Tensor | None = None
    drift_flux: Tensor | None = None

    @property
    def grid(self) -> ShellGrid:
        """The shells."""
        return ShellGrid(self.edges)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; floats keep every digit, NaN and infinities become strings."""
        data = {"format": FORMAT}
        for f in fields(self):
            data[f.name] = _plain(getattr(self, f.name))
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Snapshot:
        """The inverse of `to_dict`.

        Raises:
            ValueError: data of another format, or fields missing.
        """
        if data.get("format") != FORMAT:
            raise ValueError(f"not a snapshot of format {FORMAT}: format is {data.get('format')!r}")
        missing = [f.name for f in fields(cls) if f.name not in data]
        if missing:
            raise ValueError(f"snapshot data lacks {missing}")
        return cls(**{f.name: _restored(f.name, data[f.name]) for f in fields(cls)})

    def to_json(self) -> str:
        """One line of strict JSON that `from_json` reads back exactly."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Snapshot:
        """Read `to_json`'s line."""
        return cls.from_dict(json.loads(text))


_TENSORS = {f.name for f in fields(Snapshot) if str(f.type).startswith("Tensor")}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, PowerLawFit):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _restored(name: str, value: Any) -> Any:
    if name in _TENSORS:
        if value is None:
            return None
        return torch.tensor(_numbers(value), dtype=torch.bool if name == "resolved" else torch.float64)
    if name == "exponents":
        return {key: _fit(v) for key, v in value.items()}
    if name in ("summary", "closures", "health", "cost"):
        return {key: float(v) for key, v in value.items()}
    if name in ("flow_time", "loss", "grad_norm_sq", "nu"):
        return float(value)
    return value


def _fit(data: dict[str, Any]) -> PowerLawFit:
    numbers = {name: float(data[name]) for name in ("exponent", "lower", "upper", "amplitude", "num_decades")}
    return PowerLawFit(
        **numbers,
        window=(float(data["window"][0]), float(data["window"][1])),
        num_points=int(data["num_points"]),
        verdict=data["verdict"],
        reason=data["reason"],
        evidence={name: float(x) for name, x in data["evidence"].items()},
        slope_sign=int(data["slope_sign"]),
    )


def _numbers(value: Any) -> Any:
    return (
        [_numbers(v) for v in value] if isinstance(value, list) else float(value) if isinstance(value, str) else value
    )
