"""Regression on random data: double descent in closed form, and power-law random features.

Legend: n samples, p parameters, s eigenvalues of nu X^T X, sigma noise; v ambient dimension, d random features,
D = diag(j^{-2 alpha}), W random projection, a spectrum and delta source exponent, q = (delta - 1)/a.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from . import check
from .lazy import ConstantKernel, linear_model


@dataclass(frozen=True, eq=False)
class RidgelessRegression(ConstantKernel):
    """Noisy linear regression on isotropic Gaussian data under gradient flow: bias, variance, double descent.

    With s the eigenvalues of ``nu X^T X``: ``bias = (1/p) sum e^{-2ts}``,
    ``variance = sigma^2 nu sum (1 - e^{-ts})^2 / s`` (nu = 1/n for the usual ``sigma^2/n``). Both are exact means over
    the direction of beta (|beta| = 1) and the noise, given X. Their sum peaks at p/n = 1 and ``t ~ 1/s_min``.

    Args:
        num_samples: n. num_params: p. noise: sigma >= 0.
        nu: loss weight; None for 2/n, that of ``nn.MSELoss()``.
        seed: of the private generator that draws X, beta and the noise.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> data = RidgelessRegression(num_samples=6, num_params=8)
        >>> data.bias(0.0), round(data.bias(math.inf), 12)  # |beta|^2, then the share of the null space, 2/8
        (1.0, 0.25)
    """

    num_samples: int
    num_params: int
    noise: float = 0.0
    nu: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check.at_least("num_samples", self.num_samples, 1)
        check.at_least("num_params", self.num_params, 1)
        check.non_negative("noise", self.noise)
        object.__setattr__(self, "nu", self._nu)

    @property
    def _nu(self) -> float:
        return check.default_nu(self.nu, self.num_samples)

    @cached_property
    def _draw(self) -> tuple[Tensor, Tensor, Tensor]:
        rng = check.generator(self.seed)
        x = torch.randn(self.num_samples, self.num_params, generator=rng, dtype=torch.float64)
        beta = torch.randn(self.num_params, generator=rng, dtype=torch.float64)
        noise = torch.randn(self.num_samples, generator=rng, dtype=torch.float64)
        return x, beta / beta.norm(), noise

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.linalg.svd(self.inputs, full_matrices=False)

    @property
    def inputs(self) -> Tensor:
        """X, (n, p), standard Gaussian."""
        return self._draw[0]

    @property
    def weights(self) -> Tensor:
        """beta, (p,), a uniform direction."""
        return self._draw[1]

    @cached_property
    def targets(self) -> Tensor:
        """y = X beta + sigma noise, (n, 1)."""
        x, beta, noise = self._draw
        return (x @ beta + self.noise * noise)[:, None]

    def model(self) -> nn.Module:
        """A fresh ``nn.Linear(p, 1)`` at zero."""
        return linear_model(self.num_params)

    @cached_property
    def basis(self) -> Tensor:
        """Eigenvectors of X X^T, (n, n)."""
        return torch.linalg.eigh(self.inputs @ self.inputs.mT)[1].flip(1)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of nu X X^T, (n,), decreasing, zeros included."""
        singular = self._svd[1]
        return torch.cat([self._nu * singular**2, singular.new_zeros(self.num_samples - len(singular))])

    @cached_property
    def initial_coefficients(self) -> Tensor:
        """g(0) = -sqrt(nu) U^T y, (n,)."""
        return -math.sqrt(self._nu) * self.basis.mT @ self.targets[:, 0]

    def fitted_weights(self, t: float) -> Tensor:
        """theta(t) of gradient flow from zero, (p,); ``t = math.inf`` gives the least-norm interpolant."""
        u, singular, vt = self._svd
        return vt.mT @ (-torch.expm1(-t * self._nu * singular**2) / singular * (u.mT @ self.targets[:, 0]))

    def excess_risk(self, t: float) -> float:
        """``|theta(t) - beta|^2`` of this draw of beta and noise; its mean is ``bias + variance``."""
        return float((self.fitted_weights(t) - self.weights).square().sum())

    def bias(self, t: float) -> float:
        """``(1/p) sum e^{-2ts}`` over all p eigenvalues, null space included."""
        decayed = torch.exp(-2 * t * self._nu * self._svd[1] ** 2).sum()
        return float((decayed + max(0, self.num_params - self.num_samples)) / self.num_params)

    def variance(self, t: float) -> float:
        """``sigma^2 nu sum (1 - e^{-ts})^2 / s``."""
        s = self._nu * self._svd[1] ** 2
        return float(self.noise**2 * self._nu * (torch.expm1(-t * s) ** 2 / s).sum())

    def mean_limits(self) -> tuple[float, float]:
        """Bias and variance at t = infinity, averaged over X as well; exact for Gaussian X at every size.

        ``max(0, 1 - n/p)`` and ``sigma^2 min(n, p) / (|n - p| - 1)``; the variance is infinite for |n - p| <= 1.
        """
        n, p = self.num_samples, self.num_params
        gap = abs(n - p) - 1
        return max(0.0, 1 - n / p), self.noise**2 * min(n, p) / gap if gap > 0 else math.inf


@dataclass(frozen=True, eq=False)
class PowerLawRandomFeatures(ConstantKernel):
    """Power-law random features ("4+3 phases"): ``x_j = j^-alpha z_j``, target ``sum_j j^-beta x_j``, features ``x W``.

    ``inputs`` and ``targets`` hold the *population* as v weighted rows, ``D^{1/2} W / sqrt(nu)``, so full-batch
    training on them is the exact population flow, with loss ``1/2 E (f - y)^2``; ``sample`` draws stochastic batches.
    Given W everything is exact; the exponents are asymptotic: at d <= 800 floors are 5 to 45 % off.

    Args:
        num_modes: v >= d, the ambient dimension.
        num_features: d.
        alpha: above 1/2.
        beta: target exponent, above 1/2 - alpha.
        nu: loss weight; None for 2/v, that of ``nn.MSELoss()``.
        seed: of the private generator that draws W, (v, d), of variance 1/d.

    Raises:
        ValueError: if an argument is out of range.

    Source: arXiv:2405.15074.

    Example:
        >>> law = PowerLawRandomFeatures(num_modes=40, num_features=10, alpha=1.0, beta=0.7)
        >>> law.spectrum_exponent, law.source_exponent, round(law.energy_exponent, 12), law.floor_exponent
        (2.0, 3.4, 1.2, 2.0)
    """

    num_modes: int
    num_features: int
    alpha: float
    beta: float
    nu: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check.at_least("num_features", self.num_features, 1)
        check.at_least("num_modes", self.num_modes, self.num_features)
        if not self.alpha > 0.5:
            raise ValueError(f"alpha must be above 1/2, got {self.alpha!r}")
        if not self.alpha + self.beta > 0.5:
            raise ValueError(f"beta must be above 1/2 - alpha, got beta={self.beta!r}, alpha={self.alpha!r}")
        object.__setattr__(self, "nu", self._nu)

    @property
    def _nu(self) -> float:
        return check.default_nu(self.nu, self.num_modes)

    @cached_property
    def _rank(self) -> Tensor:
        return torch.arange(1, self.num_modes + 1, dtype=torch.float64)

    @cached_property
    def projection(self) -> Tensor:
        """W, (v, d), Gaussian of variance 1/d."""
        rng = check.generator(self.seed)
        w = torch.randn(self.num_modes, self.num_features, generator=rng, dtype=torch.float64)
        return w / math.sqrt(self.num_features)

    @cached_property
    def inputs(self) -> Tensor:
        """D^{1/2} W / sqrt(nu), (v, d)."""
        return self._rank[:, None] ** -self.alpha * self.projection / math.sqrt(self._nu)

    @cached_property
    def targets(self) -> Tensor:
        """j^{-alpha-beta} / sqrt(nu), (v, 1)."""
        return self._rank[:, None] ** -(self.alpha + self.beta) / math.sqrt(self._nu)

    def sample(self, num_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A stochastic batch: features ``x W``, (n, d), and targets, (n, 1)."""
        z = torch.randn(num_samples, self.num_modes, generator=generator, dtype=torch.float64)
        x = z * self._rank**-self.alpha
        return x @ self.projection, x @ self._rank[:, None] ** -self.beta

    def model(self) -> nn.Module:
        """A fresh ``nn.Linear(d, 1)`` at zero."""
        return linear_model(self.num_features)

    @cached_property
    def _modes(self) -> tuple[Tensor, Tensor, Tensor]:
        vectors, singular, _ = torch.linalg.svd(self.inputs * math.sqrt(self._nu), full_matrices=False)
        r = -math.sqrt(self._nu) * self.targets[:, 0]
        out_of_reach = r - vectors @ (vectors.mT @ r)
        norm = out_of_reach.norm()
        columns = torch.cat([vectors, (out_of_reach / norm.clamp_min(1e-300))[:, None]], dim=1)
        return columns, torch.cat([singular**2, norm.new_zeros(1)]), torch.cat([vectors.mT @ r, norm[None]])

    @property
    def basis(self) -> Tensor:
        """The d eigenvectors in reach and, last, the direction of the residual out of reach, (v, d + 1)."""
        return self._modes[0]

    @property
    def eigenvalues(self) -> Tensor:
        """Those of D^{1/2} W W^T D^{1/2}, decreasing, and one zero for the null space, (d + 1,)."""
        return self._modes[1]

    @property
    def initial_coefficients(self) -> Tensor:
        """g(0), (d + 1,), in the order of ``basis``."""
        return self._modes[2]

    @property
    def floor(self) -> float:
        """The loss at t = infinity for this W."""
        return float(self._modes[2][-1] ** 2 / 2)

    @property
    def spectrum_exponent(self) -> float:
        """a = 2 alpha."""
        return 2 * self.alpha

    @property
    def source_exponent(self) -> float:
        """delta = 2 alpha + 2 beta."""
        return 2 * self.alpha + 2 * self.beta

    @property
    def energy_exponent(self) -> float:
        """q = 1 + beta/alpha - 1/(2 alpha), the slope chi of the loss while d does not matter."""
        return 1 + self.beta / self.alpha - 1 / (2 * self.alpha)

    @property
    def floor_exponent(self) -> float:
        """``floor ~ d^-x`` with ``x = 2 alpha - max(0, 1 - 2 beta)``."""
        return 2 * self.alpha - max(0.0, 1 - 2 * self.beta)

    @property
    def distortion_exponent(self) -> float:
        """``1 - 1/(2 alpha)``: the loss slope that replaces q late, where beta > 1/2."""
        return 1 - 1 / (2 * self.alpha)
