"""What a single run says of larger ones: loss against parameters, steps and compute, from a, q and rho."""

from __future__ import annotations

from dataclasses import dataclass

from .records import Estimate, PowerLawFit
from .scaling import combine

Part = PowerLawFit | Estimate | float


@dataclass(frozen=True, eq=False)
class ResourceLaws:
    """Exponents of `L(t, N) ~ A t^-time + B N^-size` and of its lower envelope at compute `C = N t`; all positive.

    Attributes:
        size: a q, loss against parameters N (steps without limit).
        time: rho q, loss against flow time (parameters without limit).
        compute: a q rho / (a + rho), loss against compute at the best split.
        optimal_size: rho / (a + rho), `N ~ C^optimal_size`.
        optimal_time: a / (a + rho), `t ~ C^optimal_time`.
    """

    size: Estimate
    time: Estimate
    compute: Estimate
    optimal_size: Estimate
    optimal_time: Estimate


def resource_laws(a: Part, q: Part, rho: Part = 1.0) -> ResourceLaws:
    """Predict scaling laws from one run's spectrum, source and frontier.

    With modes `lambda_i ~ i^-a` holding `i^-(aq + 1)`, N parameters resolve N modes and time t those above
    `t^-rho`; what is not resolved is the loss. Equating both shares gives the best split of compute.

    Args:
        a: capacity exponent, a `PowerLawFit` (`fit_spectrum`), an `Estimate` or a number.
        q: energy exponent (`fit_energy`).
        rho: frontier exponent (`elasticity`); 1 for a frozen kernel.

    Returns:
        `ResourceLaws`, intervals by `combine`; NaN where an ingredient is, or is not positive.

    Raises:
        TypeError: arguments of the wrong kind.

    Accuracy: exact for exact power laws; parts are taken as independent.

    Source: resource laws of THEORY of this package, after arXiv:2511.07892.

    Example:
        >>> laws = resource_laws(Estimate(2.0, 1.9, 2.1), Estimate(0.5, 0.5, 0.5))
        >>> [round(part.value, 3) for part in (laws.size, laws.time, laws.compute, laws.optimal_size)]
        [1.0, 0.5, 0.333, 0.333]
    """

    def law(function) -> Estimate:
        def positive(*values: float) -> float:
            return function(*values) if min(values) > 0 else float("nan")

        return combine(positive, a, q, rho)

    return ResourceLaws(
        size=law(lambda a, q, rho: a * q),
        time=law(lambda a, q, rho: rho * q),
        compute=law(lambda a, q, rho: a * q * rho / (a + rho)),
        optimal_size=law(lambda a, q, rho: rho / (a + rho)),
        optimal_time=law(lambda a, q, rho: a / (a + rho)),
    )
