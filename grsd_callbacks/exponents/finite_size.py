"""What a finite probe hides: the energy below its smallest eigenvalue, and how far that bends the loss exponent.

Legend: A, q of `E_a = A lambda_a^q` over shells of width h in log lambda, e = dE/dlog lambda, lambda_K the smallest
eigenvalue seen, x = lambda_K / lambda* how close the frontier has come to it (times 2 level: `2 lambda_K t` if lazy).
"""

from __future__ import annotations

import math

from . import checks
from .records import Estimate, PowerLawFit


def energy_tail(fit: PowerLawFit, width: float, smallest: float) -> Estimate:
    """Energy that the modes below `smallest` would hold if the law of the shells above went on for ever.

    `e(lambda) = A lambda^q q / (2 sinh(q h / 2))` is the energy in log lambda behind shells of width h, so the tail is
    `A lambda_K^q / (2 sinh(q h / 2))`. Add it to the loss (`fit_loss(tail=...)`) before fitting chi, and to the
    underflow shell before taking the energy median: they then are those of the endless spectrum for as long as these
    modes would be untouched (`unbiased_scale`).

    Args:
        fit: of `fit_energy` at time zero.
        width: h of its shells.
        smallest: lambda_K, the smallest eigenvalue that the shells hold.

    Returns:
        The tail in the unit of the energies; its interval moves q to its ends with the energy at `smallest` kept. NaN
        where the fit was refused or does not exclude q <= 0 (the tail would be endless).

    Raises:
        ValueError: width or smallest not positive.
        TypeError: arguments of the wrong kind.

    Accuracy: exact in the continuum; `K^(-aq) / (2aq)` for `lambda_i = i^-a`, `g_i^2 = i^-(aq + 1)`.

    Source: THEORY of this package (fitting rules).

    Example:
        >>> import numpy as np
        >>> from grsd_callbacks.exponents import fit_energy
        >>> edges = np.exp(np.arange(-8.0, 1.0))
        >>> shells = np.diff(edges**0.5) / 0.5  # e = lambda^0.5
        >>> fit = fit_energy(edges, np.concatenate([[0.0], shells, [0.0]]))
        >>> round(energy_tail(fit, 1.0, float(edges[0])).value / 0.01831563888873418, 9)  # e^-4 = lambda_K^0.5 / 0.5
        2.0
    """
    width = checks.real("width", width, above=0.0)
    smallest = checks.real("smallest", smallest, above=0.0)
    if fit.refused or not fit.lower > 0:
        return Estimate(math.nan, math.nan, math.nan)
    density = fit.amplitude * smallest**fit.exponent * fit.exponent / (2 * math.sinh(fit.exponent * width / 2))
    return Estimate(density / fit.exponent, density / fit.upper, density / fit.lower)


def finite_size_bias(q: float, reach: float, *, with_tail: bool = False) -> float:
    """Relative bias of chi from the modes that the probe does not hold.

    `x^q / Gamma(1 + q)`, and with their energy added to the loss as a constant `x^(q + 1) / Gamma(1 + q)`,
    x = `2 lambda_K t` for a frozen kernel.

    Args:
        q: energy exponent, positive.
        reach: x, how far training has come towards the smallest eigenvalue; not negative.
        with_tail: whether `energy_tail` has been added.

    Raises:
        ValueError: q not positive, reach negative.
        TypeError: arguments of the wrong kind.

    Accuracy: to leading order in x; for `lambda_i = i^-a` within a fifth of the bias for x below 0.1.

    Example:
        >>> round(finite_size_bias(1.0, 0.05), 9), round(finite_size_bias(1.0, 0.05, with_tail=True), 9)
        (0.05, 0.0025)
    """
    q, reach = checks.real("q", q, above=0.0), checks.real("reach", reach, above=0.0, closed=True)
    return reach ** (q + with_tail) / math.gamma(1 + q)


def unbiased_scale(q: float, smallest: float, *, level: float = 0.5, limit: float = 0.05, with_tail: bool = True):
    """Frontier (progress contour at `level`) down to which chi is biased by less than `limit`.

    The frontier of a frozen kernel is at `level / t`, so `x = 2 level lambda_K / lambda*`; the same x is taken where
    features are learned, since it is the frontier, not time, that reaches the end of the spectrum.

    Args:
        q: energy exponent, positive.
        smallest: lambda_K.
        level: of `progress_contour`.
        limit: largest relative bias.
        with_tail: whether `energy_tail` has been added.

    Returns:
        lambda*, unit of `smallest`.

    Raises:
        ValueError: an argument that is not positive.
        TypeError: arguments of the wrong kind.

    Example:
        >>> round(unbiased_scale(1.0, 0.01, limit=0.04, with_tail=False), 9)
        0.25
    """
    q, smallest = checks.real("q", q, above=0.0), checks.real("smallest", smallest, above=0.0)
    limit, level = checks.real("limit", limit, above=0.0), checks.real("level", level, above=0.0)
    return 2 * level * smallest / (limit * math.gamma(1 + q)) ** (1 / (q + with_tail))
