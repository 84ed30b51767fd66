"""Pure rotation: a turning 2x2 kernel, and the log-shift covariant chain.

Legend: lambda eigenvalues, w rotation rate or coupling, h log spacing, s_a = log lambda_a, Omega rotation rates, g
coefficients, q exponent of the shell energies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import check
from .system import RotatingFrame


@dataclass(frozen=True, eq=False)
class RotatingPair(RotatingFrame):
    """``M = R(w t) diag(l1, l2) R(w t)^T``: the smallest system with flux, and the one that fixes its sign.

    ``Omega_12 = w``, so ``T_12 = w g_1 g_2`` is what mode 1 gains from mode 2; with l1 > l2 that is the upward flux.

    Args:
        eigenvalues_pair: (l1, l2), unit 1/flow time, positive and different.
        frequency: w, radians per flow time.
        initial: g(0), two numbers.

    Raises:
        ValueError: if the eigenvalues are equal or not positive, or a pair has not two entries.

    Example:
        >>> pair = RotatingPair()
        >>> round(float(pair.mode_transfer(1.0)[0, 1]), 7), round(float(pair.flux(1.0, [1.0])), 7)
        (0.0501245, 0.0501245)
        >>> [round(float(x), 6) for x in pair.mode_dissipation(1.0)]
        [0.133893, 0.022977]
    """

    eigenvalues_pair: Sequence[float] = (2.0, 0.3)
    frequency: float = 0.7
    initial: Sequence[float] = (1.0, 0.8)

    def __post_init__(self) -> None:
        for name in ("eigenvalues_pair", "initial"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name} must have two entries, got {getattr(self, name)!r}")
        lower, upper = sorted(self.eigenvalues_pair)
        if not 0 < lower < upper < math.inf:
            raise ValueError(f"eigenvalues_pair must be positive and different, got {self.eigenvalues_pair!r}")

    @cached_property
    def eigenvalues(self) -> Tensor:
        """(l1, l2)."""
        return torch.tensor(self.eigenvalues_pair, dtype=torch.float64)

    @cached_property
    def rotation_rates(self) -> Tensor:
        """Omega, (2, 2)."""
        return self.frequency * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)

    @cached_property
    def initial_coefficients(self) -> Tensor:
        """g(0), (2,)."""
        return torch.tensor(self.initial, dtype=torch.float64)

    def basis(self, t: float) -> Tensor:
        """R(w t), the counter-clockwise rotation, (2, 2)."""
        c, s = math.cos(self.frequency * t), math.sin(self.frequency * t)
        return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class CovariantChain(RotatingFrame):
    """One mode per shell and nearest-neighbour rotation that no shift of log lambda changes.

    ``g' = G g``, ``G_ab = e^{(s_a + s_b)/2} [-delta_ab + w (delta_{b,a+1} - delta_{b,a-1})]``: log-shift invariant
    exactly (defect 0, zeta 1). Loss ``~ t^-q`` for every w, after a transient and before ``1/lambda_min``.

    Args:
        num_modes: n, at least 2.
        coupling: w.
        spacing: h, of log lambda between neighbours.
        energy_exponent: q, of ``E_a(0) = 1/2 lambda_a^q``.
        largest: the top eigenvalue, unit 1/flow time.

    Modes are in increasing order of eigenvalue, so index a + 1 is upward.

    Raises:
        ValueError: if a size, spacing or eigenvalue is not positive.

    Source: derived (THEORY, problem 6), for the conditions of arXiv:2512.18209.

    Example:
        >>> chain = CovariantChain(num_modes=3, coupling=0.5, spacing=math.log(4.0))
        >>> chain.eigenvalues.tolist()
        [0.0625, 0.25, 1.0]
        >>> chain.coupling_ratio()[1].tolist()  # 2 w sinh(h/2) = 0.75, times sqrt(lambda_a lambda_b) = 1/8, 1/2
        [0.09375, 0.0, 0.375]
    """

    num_modes: int = 24
    coupling: float = 1.0
    spacing: float = math.log(10.0) / 3
    energy_exponent: float = 0.5
    largest: float = 1.0

    def __post_init__(self) -> None:
        check.at_least("num_modes", self.num_modes, 2)
        check.positive("spacing", self.spacing)
        check.positive("largest", self.largest)

    @cached_property
    def eigenvalues(self) -> Tensor:
        """lambda_a = largest e^{-(n - 1 - a) h}, (n,), increasing."""
        depth = torch.arange(self.num_modes - 1, -1, -1, dtype=torch.float64)
        return self.largest * torch.exp(-self.spacing * depth)

    @cached_property
    def edges(self) -> Tensor:
        """Inner edges half way (in log lambda) between neighbours, (n - 1,): one mode in each of the n shells."""
        return (self.eigenvalues[1:] * self.eigenvalues[:-1]).sqrt()

    @cached_property
    def rotation_rates(self) -> Tensor:
        """Omega_ab = w sqrt(lambda_a lambda_b) (delta_{b,a+1} - delta_{b,a-1}), (n, n)."""
        upper = self.coupling * self.edges.diag(1)
        return upper - upper.mT

    @cached_property
    def initial_coefficients(self) -> Tensor:
        """g(0) = lambda^{q/2}, (n,)."""
        return self.eigenvalues ** (self.energy_exponent / 2)

    @property
    def loss_exponent(self) -> float:
        """chi = q."""
        return self.energy_exponent

    def coupling_ratio(self) -> Tensor:
        """R_ab = |<u_a, M' u_b>| / sqrt(lambda_a lambda_b), (n, n).

        ``2 w sinh(h/2) e^{(s_a+s_b)/2}`` for neighbours, else 0: ``log R_ab`` has slope zeta = 1 on ``(s_a + s_b)/2``,
        without scatter. Unit 1/flow time, the same for every t.
        """
        neighbours = 2 * abs(self.coupling) * math.sinh(self.spacing / 2) * self.edges
        return neighbours.diag(1) + neighbours.diag(-1)
