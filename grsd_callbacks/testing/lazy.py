"""A kernel at rest, and the power-law spectrum and source that make everything known in closed form.

Legend: lambda_i = i^-a eigenvalues, g_i(0)^2 = i^-delta, q = (delta - 1)/a, K modes, chi loss exponent, rho frontier
exponent, Phi features.
"""

import abc
import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from . import check
from .system import Edges, FixedBasis


def linear_model(num_inputs: int) -> nn.Module:
    """``f(x) = x theta`` with theta(0) = 0, in float64."""
    model = nn.Linear(num_inputs, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    return model


class ConstantKernel(FixedBasis):
    """A kernel at rest: every mode decays alone, ``g_i(t) = g_i(0) exp(-lambda_i t)``, and there is no flux."""

    @property
    @abc.abstractmethod
    def eigenvalues(self) -> Tensor:
        """lambda_i, (k,), at rest, unit 1/flow time."""

    @property
    @abc.abstractmethod
    def initial_coefficients(self) -> Tensor:
        """g_i(0), (k,)."""

    def spectrum(self, t: float) -> Tensor:
        """lambda_i, (k,), the same for every t."""
        return self.eigenvalues

    def spectrum_velocity(self, t: float) -> Tensor:
        """Zeros, (k,)."""
        return torch.zeros_like(self.eigenvalues)

    def coefficients(self, t: float) -> Tensor:
        """g_i(0) exp(-lambda_i t), (k,)."""
        return self.initial_coefficients * torch.exp(-self.eigenvalues * check.non_negative("t", t))

    def descent_residual(self, lr: float, num_steps: int) -> Tensor:
        """The residual after ``num_steps`` of full-batch gradient descent, ``(1 - lr lambda)^k`` per mode; exact, (m,).

        Raises:
            ValueError: if ``lr`` is not positive or ``num_steps`` is negative.
        """
        factor = 1 - check.positive("lr", lr) * self.eigenvalues
        return self.basis @ (self.initial_coefficients * factor ** check.at_least("num_steps", num_steps, 0))


@dataclass(frozen=True, eq=False)
class PowerLawKernel(ConstantKernel):
    """Power-law spectrum and source, gradient flow: everything in closed form, flux identically zero.

    ``f = Phi theta``, ``Phi = U diag(sqrt(lambda/nu)) V^T``, ``theta(0) = 0``, ``y = -U g(0)/sqrt(nu)``, so that
    ``r(0) = U g(0)``. Discrete sums are exact; the ``*_continuum`` formulas hold to 1 % on shells with 100 modes.

    Args:
        num_modes: K = m.
        spectrum_exponent: a > 0 of ``lambda_i = i^-a``.
        source_exponent: delta of ``g_i(0)^2 = i^-delta``.
        num_params: P >= K; None for K.
        nu: loss weight; None for 2/K, that of ``nn.MSELoss()``.
        seed: of the private generator that draws U and V.

    Raises:
        ValueError: if an argument is out of range.

    Source: derived (THEORY, problem 1).

    Example:
        >>> law = PowerLawKernel(num_modes=3, spectrum_exponent=1.0, source_exponent=2.0)
        >>> (18 * law.energy(0.0, [0.4, 0.9])).round(decimals=9).tolist()  # g^2/2 = 1/18, 1/8, 1/2 at 1/3, 1/2, 1
        [1.0, 2.25, 9.0]
        >>> law.energy_exponent, law.flux(1.0, [0.4, 0.9]).tolist()
        (1.0, [0.0, 0.0])
    """

    num_modes: int
    spectrum_exponent: float
    source_exponent: float
    num_params: int | None = None
    nu: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check.at_least("num_modes", self.num_modes, 1)
        check.positive("spectrum_exponent", self.spectrum_exponent)
        if self.num_params is not None:
            check.at_least("num_params", self.num_params, self.num_modes)
        object.__setattr__(self, "nu", self._nu)

    @property
    def _nu(self) -> float:
        return check.default_nu(self.nu, self.num_modes)

    @cached_property
    def _rank(self) -> Tensor:
        return torch.arange(1, self.num_modes + 1, dtype=torch.float64)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """lambda_i = i^-a, (K,), decreasing, unit 1/flow time."""
        return self._rank**-self.spectrum_exponent

    @cached_property
    def initial_coefficients(self) -> Tensor:
        """g_i(0) = i^{-delta/2}, (K,)."""
        return self._rank ** (-self.source_exponent / 2)

    @cached_property
    def basis(self) -> Tensor:
        """U, (K, K), Haar-random."""
        return check.orthonormal(self.num_modes, self.num_modes, check.generator(self.seed))

    @cached_property
    def inputs(self) -> Tensor:
        """Phi, (K, P): one row per sample."""
        right = check.orthonormal(self.num_params or self.num_modes, self.num_modes, check.generator(self.seed + 1))
        return (self.basis * (self.eigenvalues / self._nu).sqrt()) @ right.mT

    @cached_property
    def targets(self) -> Tensor:
        """y, (K, 1)."""
        return (-self.basis @ self.initial_coefficients / math.sqrt(self._nu))[:, None]

    def model(self) -> nn.Module:
        """A fresh ``nn.Linear(P, 1)`` at theta = 0."""
        return linear_model(self.inputs.shape[1])

    @property
    def energy_exponent(self) -> float:
        """q = (delta - 1)/a."""
        return (self.source_exponent - 1) / self.spectrum_exponent

    @property
    def loss_exponent(self) -> float:
        """chi = q."""
        return self.energy_exponent

    @property
    def frontier_exponent(self) -> float:
        """rho = 1."""
        return 1.0

    @property
    def loss_tail(self) -> float:
        """``K^(-aq)/(2aq)``: what the modes beyond K would add to the loss; add it before fitting chi.

        Raises:
            ValueError: if ``source_exponent`` <= 1, where it diverges.
        """
        return self.num_modes ** -(self._convergent() - 1) / (2 * (self.source_exponent - 1))

    def energy_continuum(self, t: float, edges: Edges) -> Tensor:
        """``E_a = (1/2a) (2t)^-q [gamma(q, 2 t e_{a+1}) - gamma(q, 2 t e_a)]``, (B + 1,), gamma not regularised.

        The sum over modes replaced by an integral over rank from 1/2 to K + 1/2, so outer shells end at those ranks.

        Raises:
            ValueError: if ``source_exponent`` <= 1 (q <= 0: the incomplete gamma function diverges at zero).

        Example:
            >>> law = PowerLawKernel(num_modes=10_000, spectrum_exponent=1.0, source_exponent=2.0)
            >>> energy = law.energy_continuum(50.0, [1e-3, 1e-2])  # q = 1: (e^{-2 t e_a} - e^{-2 t e_{a+1}}) / (4 t)
            >>> round(float(200 * energy[1]), 9), round(math.exp(-0.1) - math.exp(-1.0), 9)
            (0.536957977, 0.536957977)
        """
        self._convergent()
        q, a = self.energy_exponent, self.spectrum_exponent
        lower, upper = (self.num_modes + 0.5) ** -a, 0.5**-a
        inner = check.edge_tensor(edges).clamp(lower, upper)
        bounds = torch.cat([inner.new_tensor([lower]), inner, inner.new_tensor([upper])])
        if check.non_negative("t", t) == 0:
            return (bounds**q).diff() / (2 * a * q)
        below = torch.special.gammainc(torch.tensor(q, dtype=torch.float64), 2 * t * bounds) * math.gamma(q)
        return below.diff() / (2 * a) * (2 * t) ** -q

    def loss_continuum(self, t: float) -> float:
        """``L = (1/2a) Gamma(q) (2t)^-q`` of the infinite spectrum, for t well above ``1/lambda_1``.

        Raises:
            ValueError: if ``source_exponent`` <= 1 or t is not positive.
        """
        self._convergent()
        q = self.energy_exponent
        return math.gamma(q) * (2 * check.positive("t", t)) ** -q / (2 * self.spectrum_exponent)

    def _convergent(self) -> float:
        if self.source_exponent <= 1:
            raise ValueError(f"source_exponent must be above 1 for a finite energy, got {self.source_exponent!r}")
        return self.source_exponent
