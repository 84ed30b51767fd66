"""From a series of measurements to exponents, and to the closures between them.

Legend: t flow time, L loss, lambda* frontier in the frozen basis of the first measurement, K modes of the probe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from grsd_callbacks.exponents import (
    Closure,
    Estimate,
    PowerLawFit,
    closure,
    combine,
    elasticity,
    energy_tail,
    finite_size_bias,
    fit_counts,
    fit_energy,
    fit_loss,
    fit_power_law,
    fit_spectrum,
    frontier,
    local_slope,
    progress_contour,
    resolved_modes,
    shell_labels,
    unbiased_scale,
    velocity_exponents,
)
from grsd_callbacks.exponents.records import negated, refused_fit
from grsd_callbacks.shells import ShellBudget, ShellGrid

#: share of |r|^2 that the frozen basis must hold for its energy median to be a frontier
LEAST_COVERAGE = 0.9
#: entries of a series; above, one in each bin of log t is kept
MAX_POINTS = 240
#: the frontier's transient: until it has come down to this share of lambda_max, laws of many modes do not hold yet
TRANSIENT = 1 / 6
#: flux between two measurements is a velocity if flow time grew by less than this factor
NEARBY = 2.0
#: below this share of the loss, energy in the underflow shell is no null space
LEAST_NULL_SPACE = 1e-3
#: shells with lambda t above this have begun to decay and say nothing of the source any more
UNTOUCHED = 0.1
_SERIES = ("flow_time", "loss", "frontier", "contour")


@dataclass(frozen=True, eq=False)
class Frozen:
    """What a run remembers of its first measurement.

    Attributes:
        edges: of the shells, (B + 1,).
        energy: of the shells, in the frozen basis, (B + 2,).
        labels: lambda that stands for each inner shell in the progress contour, (B,).
        source: q at the start, on the shells that the spectrum fills.
        capacity: a at the start; refused where eigenvalues are not known.
        eigenvalues: all of M_0 (empty where they are not known).
        smallest: smallest eigenvalue above rounding; NaN where it is not known.
        tail: energy of the modes below `smallest`, if the law of q went on; NaN where there is no such law.
    """

    edges: np.ndarray
    energy: np.ndarray
    labels: np.ndarray
    source: PowerLawFit
    capacity: PowerLawFit
    eigenvalues: np.ndarray
    smallest: float
    tail: Estimate

    def state_dict(self) -> dict[str, Any]:
        """Plain types only."""
        arrays = {name: getattr(self, name).tolist() for name in ("edges", "energy", "labels", "eigenvalues")}
        fits = {name: asdict(getattr(self, name)) for name in ("source", "capacity")}
        return {**arrays, **fits, "smallest": self.smallest, "tail": asdict(self.tail)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Frozen:
        """The inverse of `state_dict`."""
        arrays = {name: np.asarray(state[name], float) for name in ("edges", "energy", "labels", "eigenvalues")}
        fits = {name: PowerLawFit(**state[name]) for name in ("source", "capacity")}
        parts: dict[str, Any] = {**arrays, **fits, "tail": Estimate(**state["tail"])}
        return cls(**parts, smallest=float(state["smallest"]))


def frozen_start(
    budget: ShellBudget,
    energy: Tensor,
    nodes: Tensor,
    weights: Tensor,
    *,
    eigenvalues: Tensor | None,
    complete: bool,
    floor: float,
) -> Frozen:
    """The first measurement as later ones need it.

    Args:
        budget: its shells.
        energy: its shell energies in the frozen basis.
        nodes, weights: eigenvalues (or Gauss nodes) and squared coefficients of the residual, any order.
        eigenvalues: all of M, any order, or None where they are not known.
        complete: whether the nodes are those of a whole eigenbasis, without which no energy is added for a tail.
        floor: eigenvalues below it are rounding.
    """
    edges = budget.grid.edges.numpy()
    values = np.zeros(0) if eigenvalues is None else eigenvalues.double().cpu().numpy()
    known = values[values > floor]
    smallest = float(known.min()) if known.size else math.nan
    source = source_fit(budget, smallest, compare=True)
    null = float(budget.energy[0]) / max(float(budget.energy.sum()), 1e-300)
    tail = Estimate(math.nan, math.nan, math.nan)
    has_law = source.verdict in ("power_law", "undecided")
    if complete and has_law and math.isfinite(smallest) and null < LEAST_NULL_SPACE:
        tail = energy_tail(source, budget.grid.width, smallest)
    labels = shell_labels(edges, nodes.double().cpu().numpy(), weights.double().cpu().numpy().clip(0.0))
    capacity = fit_spectrum(_above(values, floor))
    return Frozen(edges, energy.numpy(), labels, source, capacity, values, smallest, tail)


def source_fit(
    budget: ShellBudget, smallest: float = math.nan, t: float = 0.0, *, compare: bool = False
) -> PowerLawFit:
    """q on the resolved shells that the spectrum fills and that training has not touched yet.

    Untouched: lambda t < `UNTOUCHED` at the upper edge (all of them at t = 0); there `E_a ~ lambda^q` is the source,
    not what is left of it. Filled: the shell that holds the smallest eigenvalue is full only in part.
    """
    edges = budget.grid.edges.numpy()
    usable = budget.resolved.numpy().copy()
    if t > 0:
        usable &= np.append(edges, math.inf) * t < UNTOUCHED
    if math.isfinite(smallest):
        usable &= np.append(0.0, edges) >= smallest
    counts = None if bool(budget.counts.isnan().any()) else budget.counts.numpy()
    return fit_energy(edges, budget.energy.numpy(), counts, usable, compare=compare)


@dataclass
class Trajectory:
    """The numbers of a run that exponents need: one entry per measurement, at most `MAX_POINTS` of them.

    Attributes:
        flow_time, loss: t and L.
        frontier: median lambda* of the energy in the frozen basis, the tail's included; NaN where undefined.
        contour: lambda* where modes of the frozen basis have made the progress 1/2; NaN where undefined.
        velocity_time, velocity: middle of an interval between measurements, and v at every edge, (B + 1,).
        frozen: the first measurement.
    """

    flow_time: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    frontier: list[float] = field(default_factory=list)
    contour: list[float] = field(default_factory=list)
    velocity_time: list[float] = field(default_factory=list)
    velocity: list[np.ndarray] = field(default_factory=list)
    frozen: Frozen | None = None

    def append(self, flow_time: float, loss: float, frozen_energy: Tensor, coverage: float = 1.0) -> None:
        """Add one measurement; without frontiers if the frozen basis holds too little of the residual."""
        start = self.frozen
        median = contour = math.nan
        if start is not None and coverage >= LEAST_COVERAGE:
            energy = frozen_energy.numpy().copy()
            contour = progress_contour(start.edges, start.energy, energy, labels=start.labels)
            energy[0] += start.tail.value if start.tail.value > 0 else 0.0
            median = float(frontier(start.edges, energy))
        for name, value in zip(_SERIES, (flow_time, loss, median, contour), strict=True):
            getattr(self, name).append(float(value))
        if len(self.flow_time) > MAX_POINTS:
            keep = _spread(np.asarray(self.flow_time), MAX_POINTS // 2)
            for name in _SERIES:
                setattr(self, name, [getattr(self, name)[k] for k in keep])

    def append_velocity(self, before: float, after: float, velocity: Tensor) -> None:
        """Add the velocities at the edges between two flow times, if these are near each other."""
        if not (0 < before < after < NEARBY * before) or not bool(velocity.isfinite().any()):
            return
        self.velocity_time.append(math.sqrt(before * after))
        self.velocity.append(velocity.numpy())
        if len(self.velocity) > MAX_POINTS // 2:
            keep = _spread(np.asarray(self.velocity_time), MAX_POINTS // 4)
            self.velocity_time = [self.velocity_time[k] for k in keep]
            self.velocity = [self.velocity[k] for k in keep]

    @property
    def resolved_modes(self) -> float:
        """k* now: modes of the frozen basis above the contour; NaN where either is not known."""
        start = self.frozen
        if start is None or not start.eigenvalues.size or not self.contour:
            return math.nan
        return float(resolved_modes(start.eigenvalues, self.contour[-1]))

    def copy(self) -> Trajectory:
        """What it holds now; later additions do not reach it."""
        series: dict[str, Any] = {name: list(getattr(self, name)) for name in (*_SERIES, "velocity_time", "velocity")}
        return replace(self, **series)

    # -- exponents ---------------------------------------------------------------------------------------

    def window(self) -> tuple[float, float] | str:
        """Flow times at which the frontier is within the frozen spectrum, or "search" where that is not known.

        From the end of the transient (contour below lambda_max / 6) to where the probe's last mode biases chi by 5 %
        (`unbiased_scale`, tail added).
        """
        start = self.frozen
        if start is None or not start.tail.value > 0:
            return "search"
        t, scale = np.asarray(self.flow_time), np.asarray(self.contour)
        low = unbiased_scale(start.source.exponent, start.smallest)
        inside = t[(t > 0) & (scale > low) & (scale < TRANSIENT * start.eigenvalues.max())]
        return (float(inside.min()), float(inside.max())) if len(inside) > 1 else "search"

    def fits(self, compare: bool = True) -> dict[str, PowerLawFit]:
        """chi, chi_tail, rho, rho_contour, densing, b, p and the local slopes; refused ones are NaN with a reason."""
        t, loss = self._after_start(self.loss)
        contour, median = (self._after_start(values)[1] for values in (self.contour, self.frontier))
        window, start = self.window(), self.frozen
        options: dict[str, Any] = {"compare": compare}
        fits = {
            "chi": self._with_bias(fit_loss(t, loss, window="search", **options)),
            "rho": elasticity(t, median, window=window, **options),
            "rho_contour": elasticity(t, contour, window=window, **options),
            "chi_local": negated(local_slope(t, loss, compare=False)),
            "rho_local": negated(local_slope(t, contour, compare=False)),
        }
        if start is not None and start.tail.value > 0 and isinstance(window, tuple):
            fits["chi_tail"] = fit_loss(t, loss, tail=start.tail, window=window, **options)
        if start is not None and start.eigenvalues.size:
            fits["a_start"] = start.capacity
            fits["densing"] = fit_power_law(t, resolved_modes(start.eigenvalues, contour), window=window, **options)
        return {**fits, **self._velocity_fits()}

    def _after_start(self, values: list[float]) -> tuple[np.ndarray, np.ndarray]:
        t, y = np.asarray(self.flow_time), np.asarray(values)
        keep = t > 0
        return t[keep], y[keep]

    def _with_bias(self, chi: PowerLawFit) -> PowerLawFit:
        """How much the probe's last mode steepens the loss at the end of chi's window (no tail added)."""
        start = self.frozen
        if chi.refused or start is None or not start.tail.value > 0:
            return chi
        at_end = [x for t, x in zip(self.flow_time, self.contour, strict=True) if x > 0 and t <= chi.window[1]]
        if at_end:
            chi.evidence["finite_size_bias"] = finite_size_bias(start.source.exponent, start.smallest / at_end[-1])
        return chi

    def _velocity_fits(self) -> dict[str, PowerLawFit]:
        if not self.velocity or self.frozen is None:
            return {}
        t = np.repeat(self.velocity_time, len(self.frozen.edges))
        lam = np.tile(self.frozen.edges, len(self.velocity_time))
        v = np.concatenate(self.velocity)
        found = velocity_exponents(lam, t, v)
        known = np.isfinite(v)
        evidence = {
            "residual": found.covariance_residual.value,
            "residual_lower": found.covariance_residual.lower,
            "residual_upper": found.covariance_residual.upper,
            "same_sign": found.same_sign,
        }
        return {
            name: _from_estimate(part, x[known], found.num_points, found.amplitude, found.reason, evidence)
            for name, part, x in (("b", found.b, lam), ("p", found.p, t))
        }

    # -- checkpoints -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        velocity = {"velocity_time": list(self.velocity_time), "velocity": [v.tolist() for v in self.velocity]}
        start = None if self.frozen is None else self.frozen.state_dict()
        return {**{name: list(getattr(self, name)) for name in _SERIES}, **velocity, "frozen": start}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Trajectory:
        """The inverse of `state_dict`."""
        series = {name: [float(x) for x in state[name]] for name in (*_SERIES, "velocity_time")}
        start = None if state["frozen"] is None else Frozen.from_state(state["frozen"])
        return cls(**series, velocity=[np.asarray(v, float) for v in state["velocity"]], frozen=start)


def _spread(t: np.ndarray, most: int) -> list[int]:
    """First entry in each of at most `most` bins of log t (and t = 0)."""
    logs = np.log(np.where(t > 0, t, t[t > 0].min() if (t > 0).any() else 1.0))
    span = max(float(np.ptp(logs)), 1e-12)
    bins = np.where(t > 0, np.floor((logs - logs.min()) / span * (most - 2)), -1.0)
    return sorted(np.unique(bins, return_index=True)[1].tolist())


def _from_estimate(
    part: Estimate, x: np.ndarray, num_points: int, amplitude: float, reason: str, evidence: dict[str, float]
) -> PowerLawFit:
    """An exponent of the velocity as a fit over the range of its own variable; no shapes are compared."""
    window = (float(x.min()), float(x.max())) if x.size else (math.nan, math.nan)
    decades = math.log10(window[1] / window[0]) if x.size else 0.0
    if reason:
        return refused_fit(reason, window=window, num_points=num_points, num_decades=decades)
    return PowerLawFit(
        part.value, part.lower, part.upper, amplitude, window, num_points, decades, "undecided",
        "shapes were not compared", dict(evidence),
    )  # fmt: skip


def exponents_at(
    trajectory: Trajectory, eigenvalues: Tensor | None, budget: ShellBudget, *, floor: float, compare: bool = False
) -> dict[str, PowerLawFit]:
    """Every exponent with its 95 % interval; refused ones are NaN with a reason.

    Args:
        trajectory: the run so far, this measurement included.
        eigenvalues: all of M, or None where they are not known (krylov).
        budget: shells of this measurement.
        floor: eigenvalues below it are rounding.
        compare: also decide between power law, exponential, break and floor (dearer; done for the summary).
    """
    known = None if eigenvalues is None else eigenvalues.numpy()[eigenvalues.numpy() > floor]
    smallest = float(known.min()) if known is not None and known.size else math.nan
    fits = {"q": source_fit(budget, smallest, trajectory.flow_time[-1], compare=compare), **trajectory.fits(compare)}
    if eigenvalues is not None:
        fits.update(spectrum_fits(eigenvalues, budget.grid, budget.counts, floor=floor, compare=compare))
    return fits


def spectrum_fits(
    eigenvalues: Tensor, grid: ShellGrid, counts: Tensor, *, floor: float, compare: bool
) -> dict[str, PowerLawFit]:
    """a by rank, and n of the counts per shell over the same eigenvalues (rank below m/5, and above the floor)."""
    values = np.sort(eigenvalues.numpy())[::-1]
    last = values[max(math.ceil(len(values) / 5) - 2, 0)]
    edges, above = grid.edges.numpy(), grid.above(floor).numpy()
    whole = np.append(0.0, edges) >= last
    return {
        "a": fit_spectrum(_above(values, floor), compare=compare),
        "count": fit_counts(edges, counts.numpy(), whole & above, min_modes=2, min_points=4, compare=compare),
    }


def _above(values: np.ndarray, floor: float) -> np.ndarray:
    """Eigenvalues with zeros, which are masked, for those that are rounding: the rank of the others stays."""
    return np.where(values > floor, values, 0.0)


def _inverse(a: float) -> float:
    return 1 / a if a > 0 else math.nan


def exponent_closures(fits: Mapping[str, PowerLawFit]) -> dict[str, Closure]:
    """What should be zero between exponents, with 95 % intervals.

    `chi_minus_rho_q` (chi with the tail and rho of the progress contour where they are known), `count_slope` n - 1/a,
    `compression` chi/pi_c - rho (only at the end of a run), `densing` of k* less rho/a at the start,
    `covariance` p - (b - 2).

    Args:
        fits: exponents of a run, q of its first measurement and `a_start` the a of it.
    """

    def known(*names: str) -> PowerLawFit | float:
        found = [fits[name] for name in names if name in fits and not fits[name].refused]
        return found[0] if found else math.nan

    chi, rho = known("chi_tail", "chi"), known("rho_contour", "rho")
    residual = fits["p"].evidence if "p" in fits else {}
    ratio = combine(lambda x, pi: x / pi if pi > 0 else math.nan, chi, known("pi_c"))
    nan = math.nan
    return {
        "chi_minus_rho_q": closure(chi, rho, known("q")),
        "count_slope": closure(known("count"), combine(_inverse, known("a"))),
        "densing": closure(known("densing"), rho, combine(_inverse, known("a_start"))),
        "compression": closure(ratio, rho),
        "covariance": Closure(*(residual.get(f"residual{end}", nan) for end in ("", "_lower", "_upper"))),
    }


def flat(closures: Mapping[str, Closure]) -> dict[str, float]:
    """Closures as plain numbers: `name`, `name_lower`, `name_upper`; all NaN where there is no interval."""
    return {
        f"{name}{end}": value if math.isfinite(found.lower) else math.nan
        for name, found in closures.items()
        for end, value in (("", found.value), ("_lower", found.lower), ("_upper", found.upper))
    }
