"""The self-similar collapse of a run's own shells, instantaneous and frozen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from grsd_callbacks.exponents import Collapse, PowerLawFit, self_similar_collapse
from grsd_callbacks.snapshot import Snapshot

#: most measurements that enter; of longer histories some are taken, even in log time
MOST_TIMES = 60


def run_collapse(history: Sequence[Snapshot], fits: Mapping[str, PowerLawFit], *, frozen: bool) -> Collapse:
    """`E_a(t) t^chi` against `lambda t` (instantaneous shells) or `lambda_0 t^rho` (basis of the first measurement).

    Args:
        history: measurements of a run.
        fits: its final exponents: `chi_tail` (or `chi`), whose window is taken, and `rho_contour` (or `rho`).
        frozen: whether to take the shells of the frozen basis.

    Returns:
        A `Collapse`, without a score and with a reason where an exponent is missing or times are too few.
    """
    chi, rho = _known(fits, "chi_tail", "chi"), _known(fits, "rho_contour", "rho")
    missing = "chi" if chi is None else "rho" if frozen and rho is None else ""
    if missing or chi is None:
        return _without(f"{missing} is missing")
    low, high = chi.window
    inside = [s for s in history if low * (1 - 1e-9) <= s.flow_time <= high * (1 + 1e-9) and s.flow_time > 0]
    past = _spread(inside)
    if not past:
        return _without("no measurement within chi's window")
    held = [history[0]] * len(past) if frozen else past  # whose modes the shells hold
    energy = np.stack([(s.frozen_energy if frozen else s.energy).numpy()[1:-1] for s in past])
    energy = np.where(np.stack([_whole(s) for s in held]), energy, np.nan)
    counts = np.stack([s.counts.numpy()[1:-1] for s in held])
    exponent = rho.exponent if frozen and rho is not None else 1.0
    scales = past[0].grid.centers.numpy()[1:-1]
    known = None if np.isnan(counts).all() else np.nan_to_num(counts)
    times = np.array([s.flow_time for s in past])
    return self_similar_collapse(times, scales, energy, chi=chi.exponent, rho=exponent, counts=known)


def _whole(snapshot: Snapshot) -> np.ndarray:
    """Inner shells that are resolved, and that the spectrum does not end in (where eigenvalues are known)."""
    whole = snapshot.resolved.numpy()[1:-1].copy()
    values = snapshot.eigenvalues.numpy()
    above = values[values > snapshot.summary.get("floor", 0.0)]
    if snapshot.weights is None and above.size:
        whole &= snapshot.edges.numpy()[:-1] >= above.min()
    return whole


def _known(fits: Mapping[str, PowerLawFit], *names: str) -> PowerLawFit | None:
    return next((fits[name] for name in names if name in fits and not fits[name].refused), None)


def _spread(past: Sequence[Snapshot]) -> list[Snapshot]:
    """At most `MOST_TIMES` of them, one in each bin of log time; times strictly ascending."""
    kept: dict[int, Snapshot] = {}
    if past:
        span = max(math.log(past[-1].flow_time / past[0].flow_time), 1e-12)
        for s in past:
            kept.setdefault(int(math.log(s.flow_time / past[0].flow_time) / span * (MOST_TIMES - 1)), s)
    return list(kept.values())


def _without(reason: str) -> Collapse:
    found = self_similar_collapse([1.0], [1.0, 2.0], [[0.0, 0.0]], chi=0.0)
    return Collapse(found.score, found.spread, found.null, found.x, found.y, found.time, reason)
