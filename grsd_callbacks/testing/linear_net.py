"""The two-layer linear net of Saxe et al.: fixed eigenvectors, logistic eigenvalues, upward drift.

Legend: s singular values of the learned map, sigma those of the target, u and v their vectors, s_0 = s(0), lambda
eigenvalues of the kernel, g coefficients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from . import check
from .system import MonotoneDrift


@dataclass(frozen=True, eq=False)
class TwoLayerLinear(MonotoneDrift):
    """Whitened, balanced two-layer linear net: every singular value grows by its own logistic law.

    ``f = W2 W1 x`` on X = I, targets with singular values sigma and vectors u, v:
    ``s_i(t) = sigma e^{2 nu sigma t} / (e^{2 nu sigma t} - 1 + sigma/s_0)``, kernel spectrum ``nu (s_i + s_j)`` with
    eigenvectors ``u_i (x) v_j`` at rest. The energy sits in the modes (i, i), with
    ``lambda' = lambda (2 nu sigma - lambda)``; the modes (i, j), (j, i) are exactly degenerate and empty.

    Args:
        singular_values: sigma_i > 0, (d,).
        initial: s_i(0) > 0, one number for all or d numbers.
        num_hidden: width >= d; None for d.
        nu: loss weight; None for 2/d^2, that of ``nn.MSELoss()``. Time scales as nu t, the spectrum as nu.
        seed: of the private generator that draws the singular vectors.

    Raises:
        ValueError: if an argument is out of range.

    Source: Saxe et al., arXiv:1312.6120 (the logistic law); the flux is derived (THEORY, problem 3).

    Example:
        >>> net = TwoLayerLinear(singular_values=(1.0,), initial=0.5, nu=1.0)
        >>> round(float(net.singular_values_at(math.log(3.0) / 2)), 9)  # 1 * 3/(3 - 1 + 2)
        0.75
        >>> net.spectrum(0.0).tolist(), net.spectrum_velocity(0.0).tolist()  # 2 s, and 1 (2 - 1)
        ([1.0], [1.0])
    """

    singular_values: Sequence[float]
    initial: float | Sequence[float] = 0.01
    num_hidden: int | None = None
    nu: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        sigma, start = self._strengths
        if sigma.ndim != 1 or len(sigma) == 0 or not bool((sigma > 0).all()):
            raise ValueError(f"singular_values must be a list of positive numbers, got {self.singular_values!r}")
        if start.numel() not in (1, len(sigma)) or not bool((start > 0).all()):
            raise ValueError(f"initial must be one positive number or {len(sigma)} of them, got {self.initial!r}")
        if self.num_hidden is not None:
            check.at_least("num_hidden", self.num_hidden, len(sigma))
        object.__setattr__(self, "nu", self._nu)

    @cached_property
    def _strengths(self) -> tuple[Tensor, Tensor]:
        sigma = torch.as_tensor(self.singular_values, dtype=torch.float64)
        return sigma, torch.as_tensor(self.initial, dtype=torch.float64)

    @property
    def _nu(self) -> float:
        return check.default_nu(self.nu, len(self.singular_values) ** 2)

    @cached_property
    def _frames(self) -> tuple[Tensor, Tensor, Tensor]:
        rng, d = check.generator(self.seed), len(self.singular_values)
        u, v, r = (check.orthonormal(rows, d, rng) for rows in (d, d, self.num_hidden or d))
        return u, v, r

    def singular_values_at(self, t: float) -> Tensor:
        """s_i(t), (d,)."""
        sigma, start = self._strengths
        decay = torch.exp(-2 * self._nu * sigma * check.non_negative("t", t))
        return sigma / (1 - decay + decay * sigma / start)

    @cached_property
    def basis(self) -> Tensor:
        """Mode (i, j), in column i d + j, is ``u_i v_j^T`` as a sample-major vector, (d^2, d^2)."""
        u, v, _ = self._frames
        return torch.einsum("oi,nj->noij", u, v).reshape(len(u) ** 2, -1)

    def spectrum(self, t: float) -> Tensor:
        """nu (s_i + s_j) in column order of ``basis``, (d^2,)."""
        s = self.singular_values_at(t)
        return self._nu * (s[:, None] + s).flatten()

    def spectrum_velocity(self, t: float) -> Tensor:
        """nu (s_i' + s_j') with ``s' = 2 nu s (sigma - s)``, (d^2,)."""
        s = self.singular_values_at(t)
        rate = 2 * self._nu * s * (self._strengths[0] - s)
        return self._nu * (rate[:, None] + rate).flatten()

    def coefficients(self, t: float) -> Tensor:
        """sqrt(nu) (s_i - sigma_i) on the modes (i, i), else 0, (d^2,)."""
        return math.sqrt(self._nu) * (self.singular_values_at(t) - self._strengths[0]).diag().flatten()

    def energy_at(self, eigenvalue: float) -> Tensor:
        """``nu/2 (eigenvalue/(2 nu) - sigma_i)^2`` on the modes (i, i), else 0, (d^2,)."""
        return self._nu / 2 * ((eigenvalue / (2 * self._nu) - self._strengths[0]) ** 2).diag().flatten()

    @property
    def inputs(self) -> Tensor:
        """The identity, (d, d): whitened."""
        return torch.eye(len(self.singular_values), dtype=torch.float64)

    @property
    def targets(self) -> Tensor:
        """Row n is ``U diag(sigma) V^T e_n``, (d, d)."""
        u, v, _ = self._frames
        return (v * self._strengths[0]) @ u.mT

    def model(self) -> nn.Module:
        """Two bias-free linear layers, balanced: ``W1 = R sqrt(s_0) V^T``, ``W2 = U sqrt(s_0) R^T``."""
        u, v, r = self._frames
        root = self._strengths[1].sqrt()
        return nn.Sequential(_linear(r * root @ v.mT), _linear(u * root @ r.mT))


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone())
    return layer
