"""Where the energy goes: transport between shells and flux through their edges.

Signs (THEORY, conventions): transport is the energy a shell gains by the motion of the eigenbasis (rotation and
eigenvalue drift) per flow time and sums to zero; flux J_b through edge b is counted positive upward, towards
larger lambda:  E_a' = -D_a + J_a - J_{a+1}  with the lower and the upper edge of shell a.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from grsd_callbacks.arguments import checked
from grsd_callbacks.shells import ShellGrid


@dataclass(frozen=True, eq=False)
class KernelState:
    """Kernel basis and residual at one instant: all that transport needs to remember.

    Attributes:
        eigenvalues: of M (or Ritz values), shape (k,).
        vectors: eigenvectors (or Ritz vectors) as columns, shape (m, k), orthonormal.
        residual: r, shape (m,).
        kernel: M itself, shape (m, m), where it is at hand.
    """

    eigenvalues: Tensor
    vectors: Tensor
    residual: Tensor
    kernel: Tensor | None = None

    @cached_property
    def matrix(self) -> Tensor:
        """M, or what the basis holds of it: `kernel`, or put together again once (m^2 k multiplications)."""
        if self.kernel is not None:
            return self.kernel
        return (self.vectors * self.eigenvalues.to(self.vectors)) @ self.vectors.T

    @property
    def is_complete(self) -> bool:
        """Whether the basis spans function space (exact path), so that nothing is left over."""
        return self.vectors.shape[0] == self.vectors.shape[1]

    def energies(self, vector: Tensor, grid: ShellGrid, width: float | None = None) -> tuple[Tensor, float]:
        """Shell energies 1/2 <u_i, x>^2 of a vector in this basis, and the share of |x|^2 the basis holds.

        What lies outside an incomplete basis is put in the underflow shell, so that the sum is 1/2 |x|^2.
        """
        x = vector.to(self.vectors)
        c = 0.5 * (self.vectors.T @ x) ** 2
        if width is None:
            shells = grid.collect(self.eigenvalues, c)
        else:
            shells = (grid.windows(self.eigenvalues, width) @ c).to("cpu", torch.float64)
        total = 0.5 * float(x @ x)
        held = float(c.sum())
        if not self.is_complete:
            shells[0] += max(total - held, 0.0)
        return shells, held / total if total > 0 else 1.0


@dataclass(frozen=True, eq=False)
class ShellFlux:
    """Transport and flux over one interval of flow time. Arrays in float64 on the CPU, loss per flow time.

    Attributes:
        transport: energy gained by each shell through the motion of the basis, shape (num_shells,); sums to 0.
        flux: J_b through each edge, upward positive, shape (num_edges,).
        dissipation: energy lost by each shell at fixed basis over the interval, shape (num_shells,).
        dt: flow time of the interval.
        coverage: smallest share of |r|^2 that either basis holds of either residual (1 on the exact path).
        width: window width in log lambda; NaN for sharp edges.
        reason: why all is NaN; empty otherwise.
    """

    transport: Tensor
    flux: Tensor
    dissipation: Tensor
    dt: float
    coverage: float
    width: float = math.nan
    reason: str = ""


@checked
def four_corner_flux(
    before: KernelState, after: KernelState, grid: ShellGrid, dt: float, *, width: float | None = None
) -> ShellFlux:
    """Discrete, exactly conservative transport between two measurements.

    With A = E(r_new; new basis), B = E(r_old; old), C = E(r_new; old), D = E(r_old; new):
    `transport = [(A - C) + (D - B)] / 2dt`, `dissipation = -[(A + C) - (B + D)] / 2dt`, and
    `(A - B)/dt = transport - dissipation` identically, for any optimizer and any minibatch.

    Args:
        before, after: kernel bases and residuals of the same probe at the two ends.
        grid: the shells, the same at both ends.
        dt: flow time between them, positive.
        width: smooth windows of this width in log lambda; None takes sharp edges on complete bases and
            half a shell on incomplete ones (whose sharp edges are not resolved).

    Returns:
        A `ShellFlux`; all NaN with a reason if dt is not positive.

    Raises:
        ValueError: states of different probes.

    Cost: four products of an (m, k) basis with a vector; no kernel product.

    Accuracy: the identities hold to rounding for any bases; second order in dt against the instantaneous flux.

    Source: THEORY, mode and shell dynamics (our operational definition; exact sums).

    Example:
        A quarter turn carries all energy from the lower mode to the upper one:

        >>> lam, eye = torch.tensor([0.5, 2.0]).double(), torch.eye(2).double()
        >>> r = torch.tensor([1.0, 0.0]).double()
        >>> turned = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()
        >>> grid = ShellGrid.logarithmic(0.1, 10.0, per_decade=1)
        >>> four_corner_flux(KernelState(lam, eye, r), KernelState(lam, turned, r), grid, 1.0).flux.tolist()
        [0.0, 0.5, 0.0]
    """
    if before.residual.shape != after.residual.shape:
        raise ValueError(
            f"before and after must be measured on the same probe, got residuals of shape "
            f"{tuple(before.residual.shape)} and {tuple(after.residual.shape)}"
        )
    if not (math.isfinite(dt) and dt > 0):
        return no_flux(grid, f"no flow time has passed (dt = {dt:g})", dt)
    if width is None and not (before.is_complete and after.is_complete):
        width = grid.width / 2
    corners = [
        basis.energies(vector, grid, width)
        for basis, vector in (
            (after, after.residual),
            (before, before.residual),
            (before, after.residual),
            (after, before.residual),
        )
    ]
    (a, b, c, d), held = [e for e, _ in corners], [share for _, share in corners]
    transport = ((a - c) + (d - b)) / (2 * dt)
    return ShellFlux(
        transport=transport,
        flux=flux_from_transport(transport),
        dissipation=-((a + c) - (b + d)) / (2 * dt),
        dt=dt,
        coverage=min(1.0, *held),
        width=math.nan if width is None else width,
    )


def flux_from_transport(transport: Tensor) -> Tensor:
    """J_b = sum of the transport of all shells above edge b, shape (num_shells - 1,)."""
    return torch.flip(torch.cumsum(torch.flip(transport, [0]), 0), [0])[1:]


def no_flux(grid: ShellGrid, reason: str, dt: float = math.nan) -> ShellFlux:
    """A `ShellFlux` of NaN that says why."""
    nan = torch.full((grid.num_shells,), math.nan, dtype=torch.float64)
    return ShellFlux(nan, nan[1:].clone(), nan.clone(), dt, math.nan, reason=reason)
