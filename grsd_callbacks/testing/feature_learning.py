"""Two-layer linear feature learning: drift and rotation together, and an anomalous frontier exponent.

Legend: lambda_k = k^-a data variances, w* target weights, u learned weights, d = w* - u what is left to learn, H and s
second moments of the two layers, v = Lambda d, M kernel, q hardness (delta = a q + 1), K modes, gamma target strength.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import check
from .system import System

# Dormand-Prince 5(4): stage weights, final weights, difference to the embedded fourth-order weights.
_STAGES = [
    np.array(row)
    for row in (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    )
]
_FINAL = np.append(_STAGES[-1], 0.0)
_ERROR = np.array([71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40])
_PER_DECADE = 4  # stored states: every request starts from the same grid, so results do not depend on their order
_FIRST = 1e-2


class FeatureState(NamedTuple):
    """The state at flow time t: ``d = w* - u`` (K,), ``h`` (K, K) symmetric, ``s`` a number."""

    t: float
    d: Tensor
    h: Tensor
    s: float


@dataclass(frozen=True, eq=False)
class TwoLayerFeatureLearning(System):
    """``f = a^T W x``, power-law data and target: the net learns features, and the frontier runs ahead of time.

    With ``d = w* - u``: ``u' = (H + s I) Lambda d``, ``H' = Lambda d u^T + u d^T Lambda``, ``s' = 2 u^T Lambda d``,
    ``H(0) = I``, ``u(0) = s(0) = 0``. Kernel ``Lambda^{1/2} (H + s I) Lambda^{1/2}``, residual ``-Lambda^{1/2} d``,
    ``lambda_k = k^-a``, ``w*_k = gamma k^{-(aq+1)/2} lambda_k^{-1/2}``. For hard targets, q < 1: ``rho = 2/(1+q)``,
    ``chi = q rho``.

    ``model()`` is this system at width K: ``W(0) = I``, ``a(0) = 0``; ``u = W^T a``, ``H = W^T W``, ``s = |a|^2``.

    Args:
        num_modes: K = m.
        spectrum_exponent: a > 0.
        energy_exponent: q > 0.
        strength: gamma > 0; from 3 on the frontier is anomalous at reachable times.
        nu: loss weight; None for 2/K, that of ``nn.MSELoss()``. It changes the model, not the dynamics.
        rtol: local error per step, of the residual relative to itself and of the kernel relative to lambda_1 = 1.

    Raises:
        ValueError: if an argument is out of range.

    Cost:
        Explicit Dormand-Prince, limited by stability to steps of about ``3/lambda_max(M)``, and lambda_max grows to
        20 to 40: some 10 t steps of 7 products with H and one rank-14 update (K = 200, t = 50: half a second; K = 600,
        t = 240: 8 s). One state (K^2 numbers) kept per quarter decade.

    Accuracy:
        About 10 to 100 times rtol in r and M; M' follows from the state without differencing. rho and chi are
        asymptotic: at a = 3/2, q = 1/2 within 10 % for 5 < t < 50 (K = 200) and 5 < t < 200 (K = 600).

    Source: Bordelon, Atanasov and Pehlevan, arXiv:2409.17858.

    Example:
        >>> net = TwoLayerFeatureLearning(num_modes=4, spectrum_exponent=1.0, energy_exponent=0.5)
        >>> net.kernel(0.0).diagonal().round(decimals=9).tolist(), round(net.frontier_exponent, 6)
        ([1.0, 0.5, 0.333333333, 0.25], 1.333333)
    """

    num_modes: int
    spectrum_exponent: float = 1.5
    energy_exponent: float = 0.5
    strength: float = 3.0
    nu: float | None = None
    rtol: float = 1e-8
    _grid: list[FeatureState] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        check.at_least("num_modes", self.num_modes, 1)
        for name in ("spectrum_exponent", "energy_exponent", "strength", "rtol"):
            check.positive(name, getattr(self, name))
        object.__setattr__(self, "nu", self._nu)
        identity = torch.eye(self.num_modes, dtype=torch.float64)
        self._grid.append(FeatureState(0.0, self.target_weights, identity, 0.0))

    @property
    def _nu(self) -> float:
        return check.default_nu(self.nu, self.num_modes)

    @cached_property
    def _rank(self) -> Tensor:
        return torch.arange(1, self.num_modes + 1, dtype=torch.float64)

    @cached_property
    def variances(self) -> Tensor:
        """lambda_k = k^-a, (K,): data variances, and the spectrum of the kernel at t = 0."""
        return self._rank**-self.spectrum_exponent

    @cached_property
    def target_weights(self) -> Tensor:
        """w*, (K,)."""
        return self.strength * self._rank ** (-self.source_exponent / 2) / self.variances.sqrt()

    @property
    def source_exponent(self) -> float:
        """delta = a q + 1."""
        return self.spectrum_exponent * self.energy_exponent + 1

    @property
    def frontier_exponent(self) -> float:
        """rho = 2/(1 + q) for q < 1, else 1."""
        return max(1.0, 2 / (1 + self.energy_exponent))

    @property
    def loss_exponent(self) -> float:
        """chi = q rho."""
        return self.energy_exponent * self.frontier_exponent

    @property
    def loss_tail(self) -> float:
        """``gamma^2 K^(-aq)/(2aq)``: what the modes beyond K would add to the loss; add it before fitting chi."""
        aq = self.spectrum_exponent * self.energy_exponent
        return self.strength**2 * self.num_modes**-aq / (2 * aq)

    def state(self, t: float) -> FeatureState:
        """d, H and s at flow time ``t``; the same whatever was asked before."""
        check.non_negative("t", t)
        while _grid_time(len(self._grid)) <= t:
            self._grid.append(self._advance(self._grid[-1], _grid_time(len(self._grid))))
        start = next(state for state in reversed(self._grid) if state.t <= t)
        return self._advance(start, t)

    def learned_weights(self, t: float) -> Tensor:
        """u(t) = w* - d, (K,)."""
        return self.target_weights - self.state(t).d

    def kernel(self, t: float) -> Tensor:
        """Lambda^{1/2} (H + s I) Lambda^{1/2}, (K, K)."""
        state = self.state(t)
        return self._weighted(state.h, state.s)

    def kernel_velocity(self, t: float) -> Tensor:
        """Lambda^{1/2} (H' + s' I) Lambda^{1/2}, (K, K), from the state, not by differences."""
        state = self.state(t)
        u, v = self.target_weights - state.d, self.variances * state.d
        return self._weighted(torch.outer(v, u) + torch.outer(u, v), 2 * float(u @ v))

    def residual(self, t: float) -> Tensor:
        """-Lambda^{1/2} d, (K,)."""
        return -self.variances.sqrt() * self.state(t).d

    def progress(self, t: float) -> Tensor:
        """``-1/2 log(E_k(t)/E_k(0))`` per mode of the frozen basis (that of t = 0), (K,)."""
        return -(self.state(t).d / self.target_weights).abs().log()

    def frontier(self, t: float, level: float = 0.5) -> float:
        """lambda*_0(t): the variance of the first mode whose progress is below ``level``; slope -rho in log t.

        Interpolated in log lambda between it and the mode before. NaN if all modes or none are past the level.
        """
        progress, log_lam = self.progress(t), self.variances.log()
        behind = int((progress >= level).long().cumprod(0).sum())
        if behind in (0, self.num_modes):
            return math.nan
        above, below = progress[behind - 1], progress[behind]
        share = (above - level) / (above - below)
        return float(torch.lerp(log_lam[behind - 1], log_lam[behind], share).exp())

    @property
    def inputs(self) -> Tensor:
        """diag(sqrt(lambda/nu)), (K, K)."""
        return (self.variances / self._nu).sqrt().diag()

    @property
    def targets(self) -> Tensor:
        """sqrt(lambda/nu) w*, (K, 1)."""
        return self.inputs @ self.target_weights[:, None]

    def model(self) -> nn.Module:
        """Two bias-free linear layers, K -> K -> 1: the first the identity, the second zero."""
        first = nn.Linear(self.num_modes, self.num_modes, bias=False, dtype=torch.float64)
        second = nn.Linear(self.num_modes, 1, bias=False, dtype=torch.float64)
        nn.init.eye_(first.weight)
        nn.init.zeros_(second.weight)
        return nn.Sequential(first, second)

    def _weighted(self, matrix: Tensor, scalar: float) -> Tensor:
        root = self.variances.sqrt()
        return root[:, None] * matrix * root + scalar * self.variances.diag()

    def _advance(self, state: FeatureState, end: float) -> FeatureState:
        step = min(0.05, end - state.t)
        while state.t < end:
            step = min(step, end - state.t)
            proposal, error = self._try_step(state, step)
            if error <= 1:
                state = proposal if state.t + step < end * (1 - 1e-14) else proposal._replace(t=end)
            step *= min(5.0, max(0.2, 0.9 * max(error, 1e-10) ** -0.2))
        return state

    def _try_step(self, state: FeatureState, step: float) -> tuple[FeatureState, float]:
        """One Dormand-Prince step; H never leaves its base point: stages add ``v u^T + u v^T`` as low-rank products."""
        lam, target, h = self.variances.numpy(), self.target_weights.numpy(), state.h.numpy()
        u_jk, v_jk, slope_jk = np.zeros((3, 7, self.num_modes))
        growth_j = np.zeros(7)
        for j, row in enumerate(_STAGES):
            weights = step * row
            d = state.d.numpy() + weights @ slope_jk[:j]
            u, v = target - d, lam * d
            turned = (weights * (u_jk[:j] @ v)) @ v_jk[:j] + (weights * (v_jk[:j] @ v)) @ u_jk[:j]
            slope_jk[j] = -(h @ v + turned + (state.s + weights @ growth_j[:j]) * v)
            u_jk[j], v_jk[j], growth_j[j] = u, v, 2 * u @ v
        final = step * _FINAL
        d = state.d.numpy() + final @ slope_jk
        product = (final[:, None] * v_jk).T @ u_jk
        new = FeatureState(
            state.t + step,
            torch.from_numpy(d),
            torch.from_numpy(h + product + product.T),
            float(state.s + final @ growth_j),
        )
        root = np.sqrt(lam)
        residual_error = np.linalg.norm(root * (step * _ERROR @ slope_jk)) / (np.linalg.norm(root * d) + 1e-150)
        gram = ((root * u_jk) @ (root * u_jk).T) * (
            (root * v_jk) @ (root * v_jk).T
        )  # |sum_j e_j v_j u_j^T|_F^2 = e G e
        kernel_error = 2 * math.sqrt(max(0.0, _ERROR @ gram @ _ERROR)) * step + abs(step * _ERROR @ growth_j)
        return new, max(residual_error, kernel_error) / self.rtol


def _grid_time(index: int) -> float:
    return 0.0 if index == 0 else _FIRST * 10 ** ((index - 1) / _PER_DECADE)
