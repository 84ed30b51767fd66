"""Products of scalars: one, and a diagonal linear net of many; between lazy and rich in closed form.

Legend: a, b the two weights of a product F = a b, Y what F tends to, c = a^2 - b^2 conserved, k gain; in
DiagonalLinear a and delta are the exponents of the spectrum at t = 0 and of the source.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from . import check
from .system import FixedBasis, MonotoneDrift


@dataclass(frozen=True, eq=False)
class ScalarProduct(FixedBasis):
    """``f = a b``, one sample: ``M = nu (a^2 + b^2) = nu sqrt(c^2 + 4 f^2)`` with ``c = a^2 - b^2`` conserved.

    Lazy for large c, rich for c -> 0. f(t) in closed form: ``P = (a + b)^2`` obeys a Riccati equation.

    Args:
        first: a(0). second: b(0). target: y. nu: loss weight; None for 2, that of ``nn.MSELoss()`` on one output.

    Raises:
        ValueError: if ``nu`` is not positive.

    Example:
        >>> product = ScalarProduct(first=2.0, second=0.0, target=1.5, nu=1.0)
        >>> [round(float(product.spectrum(t)), 9) for t in (0.0, 100.0)]  # c = 4; at the end sqrt(16 + 9)
        [4.0, 5.0]
    """

    first: float
    second: float
    target: float
    nu: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "nu", self._nu)

    @property
    def _nu(self) -> float:
        return check.default_nu(self.nu, 1)

    def output(self, t: float) -> Tensor:
        """f(t), (1,)."""
        first, second, target = (torch.tensor([v], dtype=torch.float64) for v in (self.first, self.second, self.target))
        return _product(first, second, target, torch.full_like(target, self._nu * check.non_negative("t", t)))

    @property
    def conserved(self) -> float:
        """c = a^2 - b^2."""
        return self.first**2 - self.second**2

    @property
    def basis(self) -> Tensor:
        """(1, 1), one."""
        return torch.ones(1, 1, dtype=torch.float64)

    def spectrum(self, t: float) -> Tensor:
        """nu sqrt(c^2 + 4 f^2), (1,)."""
        return self._nu * torch.sqrt(self.conserved**2 + 4 * self.output(t) ** 2)

    def spectrum_velocity(self, t: float) -> Tensor:
        """``4 nu f f' / sqrt(c^2 + 4 f^2) = -4 nu^2 f (f - y)``, (1,)."""
        f = self.output(t)
        return -4 * self._nu**2 * f * (f - self.target)

    def coefficients(self, t: float) -> Tensor:
        """sqrt(nu) (f - y), (1,)."""
        return math.sqrt(self._nu) * (self.output(t) - self.target)

    @property
    def inputs(self) -> Tensor:
        """One, (1, 1)."""
        return self.basis

    @property
    def targets(self) -> Tensor:
        """y, (1, 1)."""
        return self.target * self.basis

    def model(self) -> nn.Module:
        """A module of the two scalars."""
        return Products(torch.tensor([[self.first, self.second]], dtype=torch.float64), self.basis[0])


@dataclass(frozen=True, eq=False)
class DiagonalLinear(MonotoneDrift):
    """Diagonal linear net: K scalar products ``f_i = k_i a_i b_i`` with ``a_i(0) = scale``, ``b_i(0) = 0``.

    ``k_i^2 = i^-a/nu``, targets of size ``i^{-delta/2}/sqrt(nu)``. The spectrum goes from ``scale^2 i^-a`` to
    ``i^-a sqrt(scale^4 + 4 i^(a - delta))``: exponent a if lazy (large scale), (a + delta)/2 if rich (scale -> 0).

    Args:
        num_modes: K = m. spectrum_exponent: a > 0. source_exponent: delta. scale: initial size of a_i, positive.
        nu: loss weight; None for 2/K, that of ``nn.MSELoss()``. It changes the model, not the dynamics.

    Raises:
        ValueError: if an argument is out of range.

    Source: derived (THEORY, problem 4).

    Example:
        >>> net = DiagonalLinear(num_modes=2, spectrum_exponent=1.0, source_exponent=3.0, scale=1e-3)
        >>> [round(float(x), 6) for x in net.final_eigenvalues]  # rich: 2 i^-2
        [2.0, 0.5]
    """

    num_modes: int
    spectrum_exponent: float
    source_exponent: float
    scale: float
    nu: float | None = None

    def __post_init__(self) -> None:
        check.at_least("num_modes", self.num_modes, 1)
        check.positive("spectrum_exponent", self.spectrum_exponent)
        check.positive("scale", self.scale)
        object.__setattr__(self, "nu", self._nu)

    @property
    def _nu(self) -> float:
        return check.default_nu(self.nu, self.num_modes)

    @cached_property
    def _gains(self) -> tuple[Tensor, Tensor]:
        rank = torch.arange(1, self.num_modes + 1, dtype=torch.float64)
        gain = rank**-self.spectrum_exponent  # nu k^2
        return gain, rank ** (-self.source_exponent / 2) / gain.sqrt()  # and the product F = a b that fits the target

    def _products(self, t: float) -> Tensor:
        gain, target = self._gains
        first = torch.full_like(gain, self.scale)
        return _product(first, torch.zeros_like(gain), target, gain * check.non_negative("t", t))

    @cached_property
    def basis(self) -> Tensor:
        """The identity, (K, K): mode i is sample i."""
        return torch.eye(self.num_modes, dtype=torch.float64)

    def spectrum(self, t: float) -> Tensor:
        """``i^-a sqrt(scale^4 + 4 F_i^2)``, F = a b, (K,)."""
        return self._gains[0] * torch.sqrt(self.scale**4 + 4 * self._products(t) ** 2)

    def spectrum_velocity(self, t: float) -> Tensor:
        """``4 i^-2a F (F_final - F)``, (K,)."""
        gain, target = self._gains
        product = self._products(t)
        return 4 * gain**2 * product * (target - product)

    def coefficients(self, t: float) -> Tensor:
        """``i^{-a/2} (F - F_final)``, (K,)."""
        gain, target = self._gains
        return gain.sqrt() * (self._products(t) - target)

    def energy_at(self, eigenvalue: float) -> Tensor:
        """``i^-a/2 (F - F_final)^2`` with ``4 F^2 = (eigenvalue i^a)^2 - scale^4``, (K,)."""
        gain, target = self._gains
        product = ((eigenvalue / gain) ** 2 - self.scale**4).clamp_min(0).sqrt() / 2
        return gain / 2 * (product - target) ** 2

    @property
    def final_eigenvalues(self) -> Tensor:
        """The spectrum at t = infinity, (K,)."""
        gain, target = self._gains
        return gain * torch.sqrt(self.scale**4 + 4 * target**2)

    @property
    def lazy_exponent(self) -> float:
        """a."""
        return self.spectrum_exponent

    @property
    def rich_exponent(self) -> float:
        """(a + delta)/2."""
        return (self.spectrum_exponent + self.source_exponent) / 2

    @property
    def inputs(self) -> Tensor:
        """One-hot samples, (K, K)."""
        return self.basis

    @property
    def targets(self) -> Tensor:
        """``i^{-delta/2}/sqrt(nu)``, (K, 1)."""
        gain, target = self._gains
        return (gain / self._nu).sqrt()[:, None] * target[:, None]

    def model(self) -> nn.Module:
        """A module of the K pairs of scalars."""
        gain = self._gains[0]
        weights = torch.stack([torch.full_like(gain, self.scale), torch.zeros_like(gain)], dim=1)
        return Products(weights, (gain / self._nu).sqrt())


class Products(nn.Module):
    """``f(x) = x (kappa * prod_l weights_l)``: weights (K, D) are trained, gains kappa (K,) are not."""

    gains: Tensor

    def __init__(self, weights: Tensor, gains: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights.clone())
        self.register_buffer("gains", gains.clone())

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, K) to (n, 1)."""
        return (inputs @ (self.gains * self.weights.prod(1)))[:, None]


def _product(first: Tensor, second: Tensor, target: Tensor, t: Tensor) -> Tensor:
    """F(t) = a b under ``a' = -(F - Y) b``, ``b' = -(F - Y) a``, elementwise, in closed form.

    ``P = (a + b)^2`` obeys ``P' = 2 Y P - P^2/2 + c^2/2``, a Moebius flow with rate ``S = sqrt(4 Y^2 + c^2)``; where
    ``(a - b)^2`` is the larger one, the same holds for ``-F`` and ``-Y``.
    """
    sign = torch.where(first * second < 0, -1.0, 1.0).to(first.dtype)
    y, conserved = sign * target, first**2 - second**2
    start = (first + sign * second) ** 2
    rate = torch.sqrt(4 * y**2 + conserved**2)
    half = torch.where(rate > 0, torch.tanh(rate * t / 2) / torch.where(rate > 0, rate / 2, 1.0), t)
    power = (start * (1 + y * half) + conserved**2 / 2 * half) / (start * half / 2 + 1 - y * half)
    return sign * (power - conserved**2 / power.clamp_min(1e-300)) / 4
