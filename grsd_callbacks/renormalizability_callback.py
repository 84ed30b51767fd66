"""The Lightning callback of the conditions: `ShellDynamicsCallback`'s hooks around a `RenormalizabilityMonitor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grsd_callbacks.callbacks import ShellDynamicsCallback
from grsd_callbacks.renormalizability import Conditions, ConditionSettings, RunVerdict
from grsd_callbacks.renormalizability_monitor import RenormalizabilityMonitor


class RenormalizabilityCallback(ShellDynamicsCallback):
    """Does this run renormalize? The conditions of arXiv:2512.18209, measured while training, judged at its end.

    Add it to any Trainer, alone or beside `ShellDynamicsCallback`; training stays bit-identical. Measured before the
    first step, at its end, and log-spaced between, within `max_overhead`; nulls and probe-resampling intervals only at
    the end, outside that share. On several ranks rank zero measures the conditions and judges.

    The verdicts are in `verdict`, in `summary()`, in every logger as the text card
    `grsd_renorm/verdicts` with a figure, and in `grsd_renorm.jsonl`. How a condition is measured, and every threshold,
    is this package's own (`DEFINITIONS`, `LIMITS`).

    Args:
        loss, probe, num_probe, every_n_steps, max_overhead, params, outputs, observe, num_projections, unpack, nu,
            dtype, memory_limit, json_lines, on_error, name: see `ShellDynamicsCallback`.
        figures: draw the verdict and what is behind it once, at the end (there is no verdict before; needs matplotlib).
        blocks: names of the block modules in order; None: children of the longest `nn.Sequential` or `nn.ModuleList`.
        per_decade: measurements a decade of steps before thinning.
        shells_per_decade: shells a decade of eigenvalues.
        min_modes: fewest eigenvalues of a shell whose couplings enter.
        drop_top: topmost occupied shells left out of the couplings.
        num_null: shuffles behind each p-value.
        num_resamples: half-samples of the probe behind each interval.

    Attributes:
        history: list of `Snapshot`.
        conditions: list of `Conditions`, one a measurement.
        verdict: `RunVerdict` at the end of the run, None before.

    Raises:
        ValueError, TypeError: wrong use, before the first step; among it a net without blocks, and probes of more rows
            (samples x outputs) than exact kernels allow.

    Example:
        >>> import grsd_callbacks as grsd
        >>> grsd.RenormalizabilityCallback(loss="mse", blocks=["net.0", "net.2"]).conditions
        []
    """

    _monitor_type = RenormalizabilityMonitor
    _key = "RenormalizabilityCallback"
    _json_stem = "grsd_renorm"

    def __init__(
        self,
        loss: Any = "auto",
        probe: Any = "auto",
        num_probe: int | None = None,
        every_n_steps: int | None = None,
        max_overhead: float | None = 0.02,
        blocks: list[str] | None = None,
        per_decade: int = 2,
        shells_per_decade: int = 3,
        min_modes: int = 4,
        drop_top: int = 1,
        num_null: int = 199,
        num_resamples: int = 24,
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
        super().__init__(
            loss=loss,
            probe=probe,
            num_probe=num_probe,
            every_n_steps=every_n_steps,
            max_overhead=max_overhead,
            method="exact",
            shells_per_decade=shells_per_decade,
            per_decade=per_decade,
            work=False,
            params=params,
            outputs=outputs,
            observe=observe,
            num_projections=num_projections,
            unpack=unpack,
            nu=nu,
            dtype=dtype,
            memory_limit=memory_limit,
            figures=figures,
            json_lines=json_lines,
            on_error=on_error,
            name=name,
        )
        self._options["conditions"] = ConditionSettings(
            blocks=blocks,  # type: ignore[arg-type]  # a list becomes a tuple
            shells_per_decade=shells_per_decade,
            min_modes=min_modes,
            drop_top=drop_top,
            num_null=num_null,
            num_resamples=num_resamples,
        )

    @property
    def conditions(self) -> list[Conditions]:
        """All measurements of the run, in order."""
        return self.monitor.conditions if isinstance(self.monitor, RenormalizabilityMonitor) else []

    @property
    def verdict(self) -> RunVerdict | None:
        """What held, once the run has ended."""
        return self.monitor.verdict if isinstance(self.monitor, RenormalizabilityMonitor) else None
