"""Flux and transfer of one instant from the couplings, in m^2 multiplications once and m a shell.

With `Omega_ij g_i g_j` antisymmetric, `J_b = 1/2 sum_ij (Theta_b(i) - Theta_b(j)) Omega_ij g_i g_j` is
`sum_i Theta_b(i) sum_j Omega_ij g_i g_j`; pairs without a gap enter by the slope of the window (drift).
"""

from __future__ import annotations

import torch
from torch import Tensor

from grsd_callbacks.shells import ShellGrid
from grsd_callbacks.transfer import DEGENERATE


def rotation(lam: Tensor, velocity: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """`Omega_ij g_i g_j` (zero where there is no gap), and the couplings `Mdot_ij g_i g_j` of pairs without a gap."""
    gap = lam[:, None] - lam[None, :]
    still = gap.abs() <= DEGENERATE * torch.maximum(lam[:, None].abs(), lam[None, :].abs())
    couplings = velocity * g[:, None] * g[None, :]
    rotating = torch.where(still, 0.0, couplings / torch.where(still, 1.0, gap))
    return rotating, torch.where(still, couplings, 0.0)


def shell_flux(lam: Tensor, velocity: Tensor, g: Tensor, grid: ShellGrid, width: float) -> Tensor:
    """J_b through smooth edges, upward positive, shape (num_edges,); as `shell_transfer(...).flux`."""
    rotating, still = rotation(lam, velocity, g)
    positive = lam.clamp_min(torch.finfo(lam.dtype).tiny)
    steps = grid.steps(lam, width)
    slopes = torch.where(lam > 0, steps * (1 - steps) / (width * positive), 0.0)
    return (steps @ rotating.sum(1) + 0.5 * slopes @ still.sum(1)).cpu()


def sharp_transfer(lam: Tensor, velocity: Tensor, g: Tensor, grid: ShellGrid) -> Tensor:
    """T_ab between sharp shells, shape (num_shells, num_shells); as `shell_transfer(...).transfer`."""
    member = torch.nn.functional.one_hot(grid.assign(lam), grid.num_shells).to(lam)
    return (member.T @ rotation(lam, velocity, g)[0] @ member).cpu()
