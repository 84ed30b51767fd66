"""From a series of measurements to exponents: a, q, chi, rho and the closures between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from grsd_callbacks.exponents import PowerLawFit, closure, elasticity, fit_energy, fit_loss, fit_spectrum, frontier
from grsd_callbacks.shells import ShellBudget

#: share of |r|^2 that the frozen basis must hold for its energy median to be a frontier
LEAST_COVERAGE = 0.9


@dataclass
class Trajectory:
    """The numbers of a run that exponents need: one entry per measurement.

    Attributes:
        flow_time, loss: t and L.
        frontier: median lambda* of the energy in the frozen basis of the first measurement, NaN where undefined.
    """

    flow_time: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    frontier: list[float] = field(default_factory=list)

    @property
    def started(self) -> bool:
        """Whether any flow time has passed."""
        return bool(self.flow_time) and self.flow_time[-1] > 0

    def append(
        self, flow_time: float, loss: float, edges: Tensor, frozen_energy: Tensor, coverage: float = 1.0
    ) -> None:
        """Add one measurement; without a frontier if the frozen basis holds too little of the residual."""
        held = coverage >= LEAST_COVERAGE
        scale = float(frontier(edges.numpy(), frozen_energy.numpy())) if held else math.nan
        self.flow_time.append(flow_time)
        self.loss.append(loss)
        self.frontier.append(scale)

    def cut(self, num: int) -> None:
        """Keep the first `num` measurements."""
        for series in (self.flow_time, self.loss, self.frontier):
            del series[num:]

    def chi(self, compare: bool = True) -> PowerLawFit:
        """Loss exponent, on the longest straight window."""
        t, loss = self._after_start(self.loss)
        return fit_loss(t, loss, window="search", compare=compare)

    def rho(self, compare: bool = True) -> PowerLawFit:
        """Elasticity, on the longest straight window."""
        t, scale = self._after_start(self.frontier)
        return elasticity(t, scale, window="search", compare=compare)

    def _after_start(self, values: list[float]) -> tuple[np.ndarray, np.ndarray]:
        t, y = np.asarray(self.flow_time), np.asarray(values)
        keep = t > 0
        return t[keep], y[keep]

    def state_dict(self) -> dict[str, Any]:
        """The series as plain lists."""
        return {"flow_time": list(self.flow_time), "loss": list(self.loss), "frontier": list(self.frontier)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Trajectory:
        """The inverse of `state_dict`."""
        return cls(*([float(x) for x in state[name]] for name in ("flow_time", "loss", "frontier")))


#: shells with lambda t above this have begun to decay and say nothing of the source any more
UNTOUCHED = 0.1


def exponents_at(
    trajectory: Trajectory, eigenvalues: Tensor | None, budget: ShellBudget, *, compare: bool = False
) -> dict[str, PowerLawFit]:
    """a, q, chi and rho with 95 % intervals; refused ones are NaN with a reason.

    q is fitted on the resolved shells that training has not touched yet, lambda t < `UNTOUCHED` at the upper edge
    (all of them at t = 0): there `E_a ~ lambda^q` is the source, not what is left of it.

    Args:
        trajectory: the run so far, this measurement included.
        eigenvalues: all of M, or None where they are not known (krylov).
        budget: shells of this measurement.
        compare: also decide between power law, exponential, break and floor (dearer; done for the summary).
    """
    edges = budget.grid.edges.numpy()
    upper = np.append(edges, math.inf)
    usable = budget.resolved.numpy() & (upper * trajectory.flow_time[-1] < UNTOUCHED if trajectory.started else True)
    counts = None if bool(budget.counts.isnan().any()) else budget.counts.numpy()
    fits = {
        "q": fit_energy(edges, budget.energy.numpy(), counts, usable, compare=compare),
        "chi": trajectory.chi(compare),
        "rho": trajectory.rho(compare),
    }
    if eigenvalues is not None:
        fits["a"] = fit_spectrum(eigenvalues.numpy(), compare=compare)
    return fits


def exponent_closures(source: PowerLawFit, chi: PowerLawFit, rho: PowerLawFit) -> dict[str, float]:
    """`chi - rho q` with its 95 % interval, q of the first measurement; zero where the law holds."""
    found = closure(chi, rho, source)
    return {
        "chi_minus_rho_q": found.value,
        "chi_minus_rho_q_lower": found.lower,
        "chi_minus_rho_q_upper": found.upper,
    }
