"""Instantaneous flux: how the kernel moves along a parameter velocity, and what that does to shell energies.

    M' = d/dt nu J J^T,        Mdot_ij = <u_i, M' u_j>,      Omega_ij = Mdot_ij / (lambda_i - lambda_j)
    T_ab = sum_{i in a, j in b} Omega_ij g_i g_j              energy that shell a gains from shell b by rotation
    J_b  = 1/2 sum_ij Theta_b[lambda_i, lambda_j] Mdot_ij g_i g_j     (Daletskii-Krein; off-diagonal terms are the
           rotation, diagonal ones the drift of eigenvalues; upward, towards larger lambda, is positive)

No eigenvector is tracked in time. For piecewise-linear activations M' leaves out the flips of gates: the value is
the smooth part only, see `kink_gap`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grsd_callbacks.gram import exact_gram
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.memory import row_blocks
from grsd_callbacks.shells import ShellGrid

VELOCITY_METHODS = ("double_backward", "central")
#: eigenvalues closer than this (relative) use the limit of their divided difference
DEGENERATE = 1e-7
#: size of the central-difference step relative to |theta|, float64
DIFFERENCE_STEP = 1e-5


@dataclass(frozen=True, eq=False)
class ShellTransfer:
    """Instantaneous transfer between shells and flux through edges. Float64 on the CPU, loss per flow time.

    Attributes:
        transfer: T_ab, shape (num_shells, num_shells), antisymmetric; row a gains from column b.
        rotation_flux: flux by rotation of eigenvectors through each edge, shape (num_edges,).
        drift_flux: flux by eigenvalues that move over the edge, shape (num_edges,); NaN for sharp edges,
            where it is a sum of delta functions.
        energy, dissipation: shell contents with the same windows, so that `E' = -D + transport` closes.
        width: window width in log lambda; NaN for sharp edges.
        coverage: share of |r|^2 in the basis that was used (1 on the exact path).
    """

    transfer: Tensor
    rotation_flux: Tensor
    drift_flux: Tensor
    energy: Tensor
    dissipation: Tensor
    width: float
    coverage: float

    @property
    def flux(self) -> Tensor:
        """J_b = rotation + drift, shape (num_edges,)."""
        return self.rotation_flux + self.drift_flux

    @property
    def transport(self) -> Tensor:
        """Energy each shell gains by the motion of the basis, J_a - J_{a+1}, shape (num_shells,); sums to 0."""
        zero = torch.zeros(1, dtype=torch.float64)
        return torch.cat([zero, self.flux]) - torch.cat([self.flux, zero])


def shell_transfer(
    eigenvalues: Tensor,
    coefficients: Tensor,
    velocity: Tensor,
    grid: ShellGrid,
    *,
    width: float | None = None,
    coverage: float = 1.0,
) -> ShellTransfer:
    """Transfer matrix and instantaneous flux from eigenvalues, coefficients and the kernel's velocity.

    Args:
        eigenvalues: lambda_i of M (or Ritz values), shape (k,).
        coefficients: g_i = <u_i, r>, shape (k,).
        velocity: Mdot_ij = <u_i, M' u_j>, symmetric, shape (k, k).
        grid: the shells.
        width: w of smooth windows in log lambda; None is sharp (rotation only: drift is NaN).
        coverage: share of |r|^2 that the basis holds, passed on.

    Returns:
        A `ShellTransfer`.

    Raises:
        ValueError: shapes that do not fit.

    Cost: k^2 (num_shells + num_edges) multiplications; no copies of the velocity.

    Accuracy: exact for the given velocity. Pairs closer than `DEGENERATE` use the limit of the divided difference and
        count as drift: rotation within an eigenspace has no meaning, and so nothing depends on the basis chosen in it.

    Source: THEORY, mode and shell dynamics; Daletskii and Krein 1965.

    Example:
        The rotating 2 x 2 kernel (lambda = 2 and 0.3, rate 0.7): M' = [R', R^T] couples the two modes.

        >>> lam, g = torch.tensor([0.3, 2.0]).double(), torch.tensor([0.8, 1.0]).double()
        >>> mdot = torch.tensor([[0.0, 0.7 * 1.7], [0.7 * 1.7, 0.0]]).double()
        >>> out = shell_transfer(lam, g, mdot, ShellGrid.logarithmic(0.1, 10.0, per_decade=1))
        >>> [round(x, 6) for x in out.rotation_flux.tolist()]  # 0.7 g_1 g_2 through the edge at 1
        [0.0, 0.56, 0.0]
    """
    k = eigenvalues.numel()
    if coefficients.shape != (k,) or velocity.shape != (k, k):
        raise ValueError(
            f"coefficients and velocity must have shapes ({k},) and ({k}, {k}), got {tuple(coefficients.shape)} "
            f"and {tuple(velocity.shape)}"
        )
    lam, g = eigenvalues.to("cpu", torch.float64), coefficients.to("cpu", torch.float64)
    windows = grid.windows(lam, width)
    flux = torch.zeros(grid.num_shells - 1, 2, dtype=torch.float64)
    moved = torch.zeros(grid.num_shells, grid.num_shells, dtype=torch.float64)
    for rows in row_blocks(k, k):
        couplings = velocity[rows].to("cpu", torch.float64) * g[rows, None] * g[None, :]
        flux += torch.stack([_edge_flux(lam, couplings, math.log(e), width, rows) for e in grid.edges.tolist()])
        moved += _rotated(lam, couplings, windows, rows)
    return ShellTransfer(
        transfer=(moved - moved.T) / 2,
        rotation_flux=flux[:, 0],
        drift_flux=flux[:, 1] if width is not None else torch.full_like(flux[:, 1], math.nan),
        energy=windows @ (0.5 * g**2),
        dissipation=windows @ (lam * g**2),
        width=math.nan if width is None else width,
        coverage=coverage,
    )


def _edge_flux(lam: Tensor, couplings: Tensor, log_edge: float, width: float | None, rows: slice) -> Tensor:
    """(rotation, drift) through one edge, of the pairs (i, j) with i in some rows."""
    terms = 0.5 * _divided_difference(lam, log_edge, width, rows) * couplings
    still = _degenerate(lam, rows)
    return torch.stack([terms[~still].sum(), terms[still].sum()])


def _degenerate(lam: Tensor, rows: slice) -> Tensor:
    """Pairs without a gap, the diagonal among them: their basis is arbitrary, so all their motion counts as drift."""
    x, y = lam[rows, None], lam[None, :]
    return (x - y).abs() <= DEGENERATE * torch.maximum(x.abs(), y.abs())


def _divided_difference(lam: Tensor, log_edge: float, width: float | None, rows: slice) -> Tensor:
    """Theta[x, y] = (Theta(x) - Theta(y)) / (x - y), the derivative on the diagonal, shape (rows, k)."""
    gap = lam[rows, None] - lam[None, :]
    safe = torch.where(gap == 0, torch.ones_like(gap), gap)
    if width is None:
        step = (lam >= math.exp(log_edge)).to(lam.dtype)
        return torch.where(gap == 0, torch.zeros_like(gap), (step[rows, None] - step[None, :]) / safe)
    positive = lam.clamp_min(torch.finfo(lam.dtype).tiny)
    a = (positive.log() - log_edge) / width
    # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)) for a >= b, without cancellation or overflow
    upper, lower = torch.maximum(a[rows, None], a[None, :]), torch.minimum(a[rows, None], a[None, :])
    difference = torch.sigmoid(upper) * torch.sigmoid(-lower) * -torch.expm1(lower - upper)
    slope = torch.sigmoid(a) * torch.sigmoid(-a) / (width * positive)
    middle = (slope[rows, None] + slope[None, :]) / 2
    both_null = (lam[rows, None] <= 0) & (lam[None, :] <= 0)
    quotient = torch.where(_degenerate(lam, rows), middle, difference / safe.abs())
    return torch.where(both_null, torch.zeros_like(quotient), quotient)


def _rotated(lam: Tensor, couplings: Tensor, windows: Tensor, rows: slice) -> Tensor:
    """sum_ij W_a(i) W_b(j) Omega_ij g_i g_j with i in some rows; its antisymmetric part is T_ab."""
    gap, still = lam[rows, None] - lam[None, :], _degenerate(lam, rows)
    rotation = torch.where(still, torch.zeros_like(gap), couplings / torch.where(still, torch.ones_like(gap), gap))
    return windows[:, rows] @ rotation @ windows.T


# -- the kernel's velocity -------------------------------------------------------------------------------


def kernel_velocity(
    op: NTKOperator, parameter_velocity: Tensor, vectors: Tensor | None = None, *, method: str | None = None
) -> Tensor:
    """V^T (d/dt J J^T) V along a parameter velocity.

    Args:
        op: the operator J J^T at theta.
        parameter_velocity: dtheta/dt, shape (P,).
        vectors: V, shape (m, k); None is the identity (the whole m x m matrix).
        method: "double_backward" (`V^T M' V = V^T J B + B^T J^T V` with B = J'^T V by Hessian-vector products,
            reverse over reverse; right through every layer norm) or "central" (two exact kernels in
            float64); None takes "central" without vectors, else "double_backward".

    Returns:
        shape (k, k), float64, symmetric; times nu it is the velocity of M.

    Raises:
        ValueError: wrong shapes or an unknown method.

    Cost: double_backward: about two kernel products a vector and k m + O(P) numbers in all, graphs in the operator's
        chunks; central: two exact kernels within the operator's memory limit.

    Accuracy: double_backward: rounding of the products' dtype; central: relative 1e-8 on smooth nets.
        On nets with kinks both leave out the flips of gates.

    Example:
        f = w^2 x with w = 3: J J^T = (2 w x)^2 and its velocity along w' = 1 is 8 w x^2.

        >>> class Square(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
        ...     def forward(self, x):
        ...         return self.w**2 * x
        >>> op = NTKOperator(Square(), torch.ones(1, 1, dtype=torch.float64))
        >>> round(kernel_velocity(op, torch.ones(1), torch.ones(1, 1)).item(), 9)
        24.0
    """
    if method is not None and method not in VELOCITY_METHODS:
        raise ValueError(f"method must be one of {VELOCITY_METHODS} or None, got {method!r}")
    if parameter_velocity.shape != (op.num_parameters,):
        raise ValueError(
            f"parameter_velocity must have shape ({op.num_parameters},), got {tuple(parameter_velocity.shape)}"
        )
    m = op.shape[0]
    if vectors is not None and (vectors.dim() != 2 or vectors.shape[0] != m):
        raise ValueError(f"vectors must have shape ({m}, k), got {tuple(vectors.shape)}")
    if (method or ("central" if vectors is None else "double_backward")) == "central":
        dense = _central(op, parameter_velocity)
        return dense if vectors is None else vectors.to(dense).T @ dense @ vectors.to(dense)
    basis = torch.eye(m, dtype=torch.float64, device=op.device) if vectors is None else vectors
    return op.run(lambda: _double_backward(op, parameter_velocity, basis))


def _double_backward(op: NTKOperator, velocity: Tensor, V: Tensor) -> Tensor:
    """V^T M' V = C + C^T with C = V^T J B, one vector after the other, so that two of P numbers are held at most."""
    tangents = op.unflatten(velocity.to(op.device, op.dtype))
    V = V.to(op.device, torch.float64 if op.device.type != "mps" else torch.float32)
    if V.shape[1] == 0:
        return V.new_zeros(0, 0)
    whole: list[Tensor] = []
    images = [op.jvp(_moved_pull_back(op, tangents, v, whole)) for v in V.to(op.dtype).unbind(1)]
    cross = V.T @ torch.stack(images, 1).to(V)
    return cross + cross.T


def _moved_pull_back(op: NTKOperator, tangents: list[Tensor], v: Tensor, whole: list[Tensor]) -> Tensor:
    """J'^T v, the Hessian-vector product of v . f along the velocity, shape (P,).

    `whole` keeps f for the next vector where all samples are in one chunk.
    """
    leaves = list(op.function.parameters.values())
    total = torch.zeros(op.num_parameters, dtype=op.dtype, device=op.device)
    for inputs, part in op.chunked(v):
        f = whole[0] if whole else op.function.outputs(inputs)
        if part.numel() == v.numel():
            whole[:] = [f]
        pulled = torch.autograd.grad(f, leaves, part.view_as(f), create_graph=True, allow_unused=True)
        along = [(g * t).sum() for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
        if along:
            total += op.flatten(
                list(torch.autograd.grad(torch.stack(along).sum(), leaves, retain_graph=True, allow_unused=True))
            )
    return total


def _central(op: NTKOperator, velocity: Tensor) -> Tensor:
    """[K(theta + h theta') - K(theta - h theta')] / 2h with exact kernels in float64."""
    size = float(velocity.double().norm())
    scale = math.sqrt(sum(float(p.detach().double().square().sum()) for p in op.function.parameters.values()))
    if size == 0.0:
        return torch.zeros(op.shape, dtype=torch.float64, device=op.device)
    h = DIFFERENCE_STEP * max(scale, 1e-3) / size
    return shifted_gram(op, velocity, h).sub_(shifted_gram(op, velocity, -h)).div_(2 * h)


def shifted_gram(op: NTKOperator, velocity: Tensor, h: float) -> Tensor:
    """The exact J J^T at theta + h theta', in float64 (the module itself is not touched)."""
    function = op.function.moved(_split(op, velocity), h, dtype=torch.float64)
    return exact_gram(function, op.inputs, memory_limit=op.gram_memory).matrix


def kink_gap(op: NTKOperator, change: Tensor, velocity: Tensor) -> float:
    """How much the flips of gates add to the kernel's motion over an actual update.

    `|[K(theta + d) - K(theta - d)] / 2 - K'| / |K'|` in Frobenius norm, K' the smooth velocity times the same
    interval: O(|d|^2) on smooth nets, of order one or more on ReLU nets at realistic step sizes.

    Args:
        op: the operator at theta.
        change: d, the parameters' actual change, shape (P,).
        velocity: K' along `change` (`kernel_velocity(op, change)`), shape (m, m).

    Cost: two exact kernels.
    """
    quotient = shifted_gram(op, change, 1.0).sub_(shifted_gram(op, change, -1.0)).div_(2)
    size = float(velocity.norm())
    return float(quotient.sub_(velocity).norm()) / size if size > 0 else math.nan


def _split(op: NTKOperator, vector: Tensor) -> dict[str, Tensor]:
    return dict(zip(op.parameter_names, op.unflatten(vector.to(op.device)), strict=True))
