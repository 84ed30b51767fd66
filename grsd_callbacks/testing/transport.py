"""A kernel whose whole spectrum drifts downward by a scaling law: transport with b = 2.

Legend: lambda eigenvalues, g coefficients, c drift rate, D depth, a spectrum and delta source exponent,
q = (delta - 1)/a, K modes, chi loss exponent.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from . import check
from .products import Products
from .system import Edges, MonotoneDrift


@dataclass(frozen=True, eq=False)
class TransportKernel(MonotoneDrift):
    """Every eigenvalue falls by ``lambda' = -c lambda^2`` while its mode is learned: downward transport.

    ``lambda_i(t) = lambda_i/(1 + c lambda_i t)``, ``g_i(t) = g_i (1 + c lambda_i t)^(-1/c)``, ``lambda_i = i^-a``,
    ``g_i^2 = i^-delta``; velocity law ``v = -c lambda^b t^(b-2)`` with b = 2. Exact for every c > 0; for
    ``c = 2 - 2/D`` it is the gradient flow of ``f_i = kappa_i prod_{l <= D} x_il`` (``model()``) towards target 0.

    Args:
        num_modes: K = m. spectrum_exponent: a > 0. source_exponent: delta. velocity: c > 0.
        nu: loss weight; None for 2/K, that of ``nn.MSELoss()``. It changes the model, not the dynamics.

    Raises:
        ValueError: if an argument is out of range.

    Source: derived (THEORY, problem 2), for the transport law of arXiv:2512.10427.

    Example:
        >>> chain = TransportKernel(num_modes=2, spectrum_exponent=1.0, source_exponent=2.0, velocity=1.0)
        >>> chain.spectrum(1.0).tolist(), [round(float(g), 9) for g in chain.coefficients(1.0)]  # 1/2, 1/3
        ([0.5, 0.3333333333333333], [0.5, 0.333333333])
        >>> round(float(chain.crossed_energy(0.0, 1.0, [0.8])), 9)  # mode 1 crosses downward with energy 1/2 * 0.8^2
        -0.32
    """

    num_modes: int
    spectrum_exponent: float
    source_exponent: float
    velocity: float
    nu: float | None = None

    def __post_init__(self) -> None:
        check.at_least("num_modes", self.num_modes, 1)
        check.positive("spectrum_exponent", self.spectrum_exponent)
        check.positive("velocity", self.velocity)
        object.__setattr__(self, "nu", self._nu)

    @property
    def _nu(self) -> float:
        return check.default_nu(self.nu, self.num_modes)

    @cached_property
    def _initial(self) -> tuple[Tensor, Tensor]:
        rank = torch.arange(1, self.num_modes + 1, dtype=torch.float64)
        return rank**-self.spectrum_exponent, rank ** (-self.source_exponent / 2)

    def _stretch(self, t: float) -> Tensor:
        return 1 + self.velocity * self._initial[0] * check.non_negative("t", t)

    @cached_property
    def basis(self) -> Tensor:
        """The identity, (K, K): mode i is sample i."""
        return torch.eye(self.num_modes, dtype=torch.float64)

    def spectrum(self, t: float) -> Tensor:
        """lambda_i/(1 + c lambda_i t), (K,), decreasing."""
        return self._initial[0] / self._stretch(t)

    def spectrum_velocity(self, t: float) -> Tensor:
        """-c lambda_i(t)^2, (K,)."""
        return -self.velocity * self.spectrum(t) ** 2

    def coefficients(self, t: float) -> Tensor:
        """g_i (1 + c lambda_i t)^(-1/c), (K,)."""
        return self._initial[1] * self._stretch(t) ** (-1 / self.velocity)

    def energy_at(self, eigenvalue: float) -> Tensor:
        """``1/2 g_i^2 (lambda_i / eigenvalue)^(-2/c)``, (K,)."""
        lam, g = self._initial
        return g**2 / 2 * (lam / eigenvalue) ** (-2 / self.velocity)

    @property
    def energy_exponent(self) -> float:
        """q = (delta - 1)/a."""
        return (self.source_exponent - 1) / self.spectrum_exponent

    @property
    def loss_exponent(self) -> float:
        """chi = min(q, 2/c)."""
        return min(self.energy_exponent, 2 / self.velocity)

    def flux_continuum(self, t: float, edges: Edges) -> Tensor:
        """``J_b = -(c/2a) e_b^(q+1) (1 - c e_b t)^(2/c - q - 1)``, (B,): sharp flux of a continuum of modes.

        The time integral of ``crossed_energy`` with the sum over modes replaced by an integral over rank from 1/2 to
        K + 1/2; zero at edges that no mode of that range passes at time t.
        """
        a, c, edge = self.spectrum_exponent, self.velocity, check.edge_tensor(edges)
        left = 1 - c * edge * check.non_negative("t", t)
        start = edge / left.clamp_min(1e-300)  # the eigenvalue at t = 0 of what passes the edge now
        passes = (left > 0) & (start >= (self.num_modes + 0.5) ** -a) & (start <= 0.5**-a)
        q = self.energy_exponent
        flux = -c / (2 * a) * edge ** (q + 1) * torch.where(passes, left, 1.0) ** (2 / c - q - 1)
        return torch.where(passes, flux, 0.0)

    def loss_continuum(self, t: float) -> float:
        """``L = (1/2a) (ct)^-q B(q, 2/c - q)`` of the infinite spectrum, for ``c t`` well above ``1/lambda_1``.

        Raises:
            ValueError: if not 0 < q < 2/c, or t is not positive.
        """
        q, rest = self.energy_exponent, 2 / self.velocity - self.energy_exponent
        if not (q > 0 and rest > 0):
            raise ValueError(f"source_exponent and velocity must give 0 < q < 2/c, got q={q!r}, 2/c={q + rest!r}")
        beta = math.gamma(q) * math.gamma(rest) / math.gamma(q + rest)
        return beta * (self.velocity * check.positive("t", t)) ** -q / (2 * self.spectrum_exponent)

    @property
    def inputs(self) -> Tensor:
        """One-hot samples, (K, K)."""
        return self.basis

    @property
    def targets(self) -> Tensor:
        """Zeros, (K, 1)."""
        return torch.zeros(self.num_modes, 1, dtype=torch.float64)

    def model(self) -> nn.Module:
        """``f_i = kappa_i prod_{l <= D} x_il``, ``x_il(0) = g_i sqrt(D/lambda_i)``, ``kappa_i = g_i / (sqrt(nu) x^D)``.

        Raises:
            ValueError: if ``velocity`` is not ``2 - 2/D`` for an integer depth D >= 2.
        """
        depth = round(2 / (2 - self.velocity)) if self.velocity < 2 else 0
        if depth < 2 or abs(2 - 2 / depth - self.velocity) > 1e-12:
            raise ValueError(f"velocity must be 2 - 2/D (1, 4/3, 3/2, ...) to be a model, got {self.velocity!r}")
        lam, g = self._initial
        weights = (g * (depth / lam).sqrt())[:, None].expand(-1, depth)
        return Products(weights, g / math.sqrt(self._nu) / weights.prod(1))
