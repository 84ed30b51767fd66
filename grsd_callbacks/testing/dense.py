"""Brute-force oracles: Jacobian, kernel, transfer and flux by definition, with dense matrices and plain loops.

They share no code with the estimators of the package, and are meant for m up to a few hundred.

Legend: J Jacobian, M kernel, r residual, U eigenvectors, g = U^T r, B = U^T M' U, Theta_b step at edge b.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import check

Edges = Tensor | Sequence[float]
MatrixFn = Callable[[float], Tensor]
_NEARLY_EQUAL = 1e-5  # relative gap below which a divided difference is taken as the slope half way


def dense_jacobian(
    model: nn.Module, inputs: Tensor | tuple[Tensor, ...], params: Sequence[str] | None = None
) -> Tensor:
    """The Jacobian of the outputs in the parameters, by ``torch.func.jacrev``; exact to round-off.

    Args:
        model: gives one tensor; used in the mode (train or eval) it is in.
        inputs: one batch, or a tuple of the model's positional arguments.
        params: names of the parameters, in the order of the columns; None for all that require gradients.

    Returns:
        (m, P) with m = samples x outputs, rows sample-major, in the model's dtype.

    Raises:
        ValueError: if ``params`` names something that is not a parameter, or nothing is left.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> dense_jacobian(model, torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist()
        [[1.0, 2.0], [3.0, 4.0]]
    """
    everything = dict(model.named_parameters())
    names = [n for n, p in everything.items() if p.requires_grad] if params is None else list(params)
    unknown = [name for name in names if name not in everything]
    if unknown or not names:
        raise ValueError(f"params must name parameters of the model, got {params!r}; it has {list(everything)}")
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    rest = {n: p.detach() for n, p in everything.items()} | dict(model.named_buffers())

    def outputs(chosen: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, {**rest, **chosen}, arguments).reshape(-1)

    blocks = torch.func.jacrev(outputs)({name: everything[name].detach() for name in names})
    return torch.cat([blocks[name].reshape(len(blocks[name]), -1) for name in names], dim=1)


def dense_kernel(
    model: nn.Module,
    inputs: Tensor | tuple[Tensor, ...],
    params: Sequence[str] | None = None,
    nu: float = 1.0,
) -> Tensor:
    """``nu J J^T`` of ``dense_jacobian``, (m, m); ``nu = 1`` gives J J^T, ``nu = 2/m`` the kernel of ``nn.MSELoss()``.

    Example:
        >>> dense_kernel(nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]]), nu=2.0).item()
        50.0
    """
    jacobian = dense_jacobian(model, inputs, params)
    return check.positive("nu", nu) * jacobian @ jacobian.mT


def exact_transfer(kernel: Tensor, kernel_velocity: Tensor, residual: Tensor, edges: Edges) -> Tensor:
    """Shell-to-shell transfer by rotation, summed mode by mode: ``T_ab = sum_{i in a, j in b} Omega_ij g_i g_j``.

    ``Omega_ij = <u_j, M' u_i> / (lambda_i - lambda_j)``. Pairs within one sharp shell cancel and are left out, so equal
    eigenvalues do no harm. Drift over an edge is not in it. Exact but for pairs that nearly touch across an edge.

    Args:
        kernel: M, (m, m).
        kernel_velocity: M', (m, m).
        residual: r, (m,).
        edges: (B,) inner edges.

    Returns:
        (B + 1, B + 1), antisymmetric: energy per flow time gained by shell a from shell b.

    Example:
        >>> kernel, velocity = torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> exact_transfer(kernel, velocity, torch.tensor([2.0, 5.0]), [2.0]).tolist()  # shell 1 gains 1/2 * 2 * 5
        [[0.0, -5.0], [5.0, 0.0]]
    """
    eigenvalues, g, velocity = _in_eigenbasis(kernel, kernel_velocity, residual)
    shell = [int((lam >= check.edge_tensor(edges)).sum()) for lam in eigenvalues]
    transfer = torch.zeros(len(edges) + 1, len(edges) + 1, dtype=torch.float64)
    for i, a in enumerate(shell):
        for j, b in enumerate(shell):
            if a != b:
                transfer[a, b] += velocity[i, j] / (eigenvalues[i] - eigenvalues[j]) * g[i] * g[j]
    return transfer


def smooth_flux(kernel: Tensor, kernel_velocity: Tensor, residual: Tensor, edges: Edges, width: float) -> Tensor:
    """Flux through smooth steps by the Daletskii-Krein formula, pair by pair; rotation and drift together.

    ``J_b = 1/2 sum_ij Theta_b[lambda_i, lambda_j] <u_i, M' u_j> g_i g_j`` with the divided difference of
    ``Theta_b = sigmoid((log lambda - log e_b) / width)``; pairs closer than 1e-5 use the slope half way (error 1e-11).

    Args:
        kernel: M, (m, m).
        kernel_velocity: M', (m, m).
        residual: r, (m,).
        edges: (B,) inner edges.
        width: of the step, in log lambda.

    Returns:
        (B,), energy per flow time, upward positive.

    Example:
        >>> one = torch.ones(1, 1)  # one eigenvalue 1 on the edge, drifting at speed 3: Theta' = 1/4, energy 2
        >>> smooth_flux(one, 3 * one, 2 * one[0], [1.0], width=1.0).tolist()
        [1.5]
    """
    eigenvalues, g, velocity = _in_eigenbasis(kernel, kernel_velocity, residual)
    weights = velocity * torch.outer(g, g) / 2
    flux = []
    for edge in check.edge_tensor(edges):
        difference = _divided_difference(eigenvalues, edge, check.positive("width", width))
        flux.append((difference * weights).sum())
    return torch.stack(flux)


def exact_flux(
    kernel_fn: MatrixFn,
    residual_fn: MatrixFn,
    t: float,
    edges: Edges,
    width: float | None = None,
    eps: float = 1e-4,
    kernel_velocity_fn: MatrixFn | None = None,
) -> Tensor:
    """Flux through the edges at flow time ``t`` of any M(t), r(t) with ``r' = -M r``, by definition.

    With ``width``: Daletskii-Krein at the instant t (``smooth_flux``); M' from ``kernel_velocity_fn``, else the
    fourth-order difference of ``kernel_fn`` over ``t +- eps, t +- 2 eps``.

    Without: the **mean over** ``[t - eps, t + eps]`` **of the sharp flux**, from the balance above each edge,
    ``J_b = [E_b(t + eps) - E_b(t - eps)] / (2 eps) + mean of D_b``, with ``E_b``, ``D_b`` energy and dissipation in all
    eigenvalues at or above the edge and Simpson's rule for the mean. M' is not used. Where no eigenvalue crosses within
    the window it is the rotation flux to O(eps^2); one that crosses adds its energy over ``2 eps``.

    Args:
        kernel_fn: t -> M, (m, m).
        residual_fn: t -> r, (m,).
        t: flow time.
        edges: (B,) inner edges.
        width: of the smooth step in log lambda, or None.
        eps: half the window, a flow time.
        kernel_velocity_fn: t -> M', (m, m).

    Returns:
        (B,), energy per flow time, upward positive.

    Raises:
        ValueError: if ``eps`` or ``width`` is not positive, or ``edges`` is not increasing.

    Example:
        >>> import math
        >>> kernel = lambda t: torch.ones(1, 1, dtype=torch.float64) * (1 + t)       # crosses 2 at t = 1
        >>> residual = lambda t: torch.ones(1, dtype=torch.float64) * 2 * torch.exp(torch.tensor(-t - t * t / 2))
        >>> carried = 2e-3 * exact_flux(kernel, residual, 1.0, [2.0], eps=1e-3)  # energy at the crossing: 2 e^-3
        >>> round(float(carried), 3), round(2 * math.exp(-3.0), 3)
        (0.1, 0.1)
    """
    check.positive("eps", eps)
    if width is not None:
        velocity = _velocity(kernel_fn, t, eps) if kernel_velocity_fn is None else kernel_velocity_fn(t)
        return smooth_flux(kernel_fn(t), velocity, residual_fn(t), edges, width)
    before, now, after = (_above(kernel_fn(s), residual_fn(s), edges) for s in (t - eps, t, t + eps))
    mean_dissipation = (before[1] + 4 * now[1] + after[1]) / 6
    return (after[0] - before[0]) / (2 * eps) + mean_dissipation


def _in_eigenbasis(kernel: Tensor, velocity: Tensor, residual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    eigenvalues, vectors = torch.linalg.eigh(kernel.double())
    return eigenvalues, vectors.mT @ residual.double(), vectors.mT @ velocity.double() @ vectors


def _above(kernel: Tensor, residual: Tensor, edges: Edges) -> tuple[Tensor, Tensor]:
    eigenvalues, vectors = torch.linalg.eigh(kernel.double())
    g = vectors.mT @ residual.double()
    above = [eigenvalues >= edge for edge in check.edge_tensor(edges)]
    energy = torch.stack([(g[mask] ** 2).sum() / 2 for mask in above])
    return energy, torch.stack([(eigenvalues[mask] * g[mask] ** 2).sum() for mask in above])


def _velocity(kernel_fn: MatrixFn, t: float, eps: float) -> Tensor:
    near = kernel_fn(t + eps) - kernel_fn(t - eps)
    far = kernel_fn(t + 2 * eps) - kernel_fn(t - 2 * eps)
    return (8 * near - far) / (12 * eps)


def _divided_difference(eigenvalues: Tensor, edge: Tensor, width: float) -> Tensor:
    lam = eigenvalues.clamp_min(torch.finfo(torch.float64).tiny)  # null space: far below every edge

    def step(x: Tensor) -> Tensor:
        return torch.sigmoid((x.log() - edge.log()) / width)

    middle = (lam[:, None] + lam) / 2
    slope = step(middle) * (1 - step(middle)) / (width * middle)
    gap = lam[:, None] - lam
    close = gap.abs() <= _NEARLY_EQUAL * middle
    return torch.where(close, slope, (step(lam)[:, None] - step(lam)) / torch.where(close, 1.0, gap))
