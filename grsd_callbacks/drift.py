"""How fast does energy move through log lambda? The spectral velocity at the shell edges, between two measurements.

Legend: Theta_b the step at edge b smoothed over w in log lambda (normal distribution function: a logistic one has tails
that drown steep spectra), c coefficients of a residual in a basis, J flux, e energy in log lambda, u = J / e.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grsd_callbacks.flux import KernelState
from grsd_callbacks.shells import ShellGrid

#: modes within about w of an edge, below which its velocity is that of single modes
LEAST_MODES = 2.0
#: share of the loss that must have passed an edge; less is rounding
LEAST_PASSED = 1e-11


def spectral_velocity(
    before: KernelState, after: KernelState, grid: ShellGrid, dt: float, *, width: float | None = None
) -> Tensor:
    """v_b = lambda_b u_b at every edge, `u_b = J_b / e_b` in log lambda, upward positive.

    `J_b` is the four-corner flux through the smoothed edge and `e_b = 1/2 sum Theta_b' c_i^2` the energy in log lambda
    there, the mean of the same four corners: for a drifting spectrum, u_b is the energy-weighted mean of
    `d log lambda_i / dt` at the edge. With shells much wider than w this is `J_b h / mean(E_below, E_above)`.

    Args:
        before, after: kernel bases and residuals of the same probe at the two ends.
        grid: whose edges are meant.
        dt: flow time between them, positive.
        width: w in log lambda; None: a quarter of a shell.

    Returns:
        v, shape (num_edges,), float64 on the CPU, (1/flow time)^2; NaN where fewer than `LEAST_MODES` modes are near
        the edge or no more than rounding has passed it.

    Cost: four products of an (m, k) basis with a vector and (num_edges, k) windows.

    Accuracy: of first order in w where the energy changes much over w. On a transport problem with b = 2, p = 0 (300
        modes, 3 shells a decade) b came out as 1.984 and 2.001 with w a quarter of a shell, 1.89 with half a shell.

    Source: THEORY of this package (exponents), after arXiv:2512.10427; the smoothing is our operational definition.
    """
    w = grid.width / 4 if width is None else width
    corners, density, modes = [], [], []
    for basis in (before, after):
        z = _distance(basis.eigenvalues, grid, w)
        bell = torch.exp(-0.5 * z**2)
        modes.append(bell.sum(1))
        for r in (before.residual, after.residual):
            c = 0.5 * (basis.vectors.T @ r.to(basis.vectors)).to("cpu", torch.float64) ** 2
            corners.append(0.5 * torch.special.erfc(-z / math.sqrt(2)) @ c)
            density.append(bell @ c / (w * math.sqrt(2 * math.pi)))
    passed = ((corners[2] - corners[0]) + (corners[3] - corners[1])) / 2
    e = torch.stack(density).mean(0)
    loss = 0.5 * float(before.residual.square().sum())
    known = (torch.minimum(*modes) >= LEAST_MODES) & (passed.abs() > LEAST_PASSED * loss) & (e > 0)
    return torch.where(known, grid.edges * passed / (dt * e.clamp_min(1e-300)), math.nan)


def _distance(eigenvalues: Tensor, grid: ShellGrid, w: float) -> Tensor:
    """(log lambda_i - s_b) / w, shape (num_edges, k)."""
    logs = eigenvalues.to("cpu", torch.float64).clamp_min(torch.finfo(torch.float64).tiny).log()
    return (logs[None] - grid.edges.log()[:, None]) / w
