"""What a snapshot, the step after it and the whole run emit, under their tags."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from grsd_callbacks.collapse import run_collapse
from grsd_callbacks.emission import Emission, Histogram
from grsd_callbacks.exponents import PowerLawFit
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.tags.definitions import FINAL, KEPT, SHELL_ENERGY, TAGS, TRANSFER_TAGS, WORK
from grsd_callbacks.trajectory import exponent_closures


def scalars(snapshot: Snapshot) -> dict[str, float]:
    """Every scalar of a snapshot under its tag; NaN where there is no number."""
    values = {tag: float(spec.value(snapshot)) for tag, spec in TAGS.items()}
    for name, energy, resolved in zip(
        snapshot.grid.names(), snapshot.energy.tolist(), snapshot.resolved.tolist(), strict=True
    ):
        if resolved and energy > 0:
            values[f"{SHELL_ENERGY}/{name}"] = energy
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def update_scalars(snapshot: Snapshot) -> dict[str, float]:
    """The scalars known only after the optimizer step that follows a measurement."""
    total = float(snapshot.work.nan_to_num(0.0).sum()) if not bool(snapshot.work.isnan().all()) else math.nan
    values = {
        f"{WORK}/total": total,
        f"{WORK}/effective_lr": snapshot.summary.get("effective_lr", math.nan),
        "grsd_closure/probe": snapshot.closures.get("probe", math.nan),
        **{tag: TAGS[tag].value(snapshot) for tag in TRANSFER_TAGS},
    }
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def final_scalars(history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit]) -> dict[str, float]:
    """Exponents of the whole run, the closures between them and the collapse, with both ends of each interval."""
    parts = {name: (fit.exponent, fit.lower, fit.upper) for name, fit in fits.items()}
    parts |= {f"closure_{name}": (c.value, c.lower, c.upper) for name, c in exponent_closures(fits).items()}
    for name, frozen in (("collapse", False), ("collapse_frozen", True)):
        found = run_collapse(history, fits, frozen=frozen)
        parts[name] = (found.score.value, found.score.lower, found.score.upper)
        parts[f"{name}_null"] = (found.null, math.nan, math.nan)
    return {
        f"{FINAL}/{name}{end}": value
        for name, values in parts.items()
        for end, value in zip(("", "_lower", "_upper"), values)
        if math.isfinite(value) and (math.isfinite(values[1]) or name.endswith("_null"))
    }


def histograms(snapshot: Snapshot) -> dict[str, Histogram]:
    """Counts, energy and dissipation over log10 lambda, buckets = shells (the open ones one shell wide)."""
    logs = snapshot.edges.log10()
    width = float((logs[-1] - logs[0]) / (logs.numel() - 1))
    edges = [float(logs[0]) - width, *logs.tolist(), float(logs[-1]) + width]
    arrays = {"count": snapshot.counts, "energy": snapshot.energy, "dissipation": snapshot.dissipation}
    return {
        f"grsd_histograms/{name}": Histogram.from_buckets(edges, values.clamp_min(0.0).tolist())
        for name, values in arrays.items()
        if bool(torch.isfinite(values).all()) and float(values.sum()) > 0
    }


def emission(snapshot: Snapshot) -> Emission:
    """All that a measurement emits."""
    values = scalars(snapshot)
    return Emission(
        step=snapshot.step,
        scalars={tag: value for tag, value in values.items() if tag not in KEPT},
        kept={tag: value for tag, value in values.items() if tag in KEPT},
        histograms=histograms(snapshot),
        record=snapshot.to_dict(),
    )
