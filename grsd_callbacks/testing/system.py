"""What every exact system answers, and the two families: fixed eigenvectors, and fixed spectrum in a turning frame.

Legend: M kernel, r residual, lambda eigenvalues, g coefficients, Omega_ij = <u_j, u_i'>, E energy, D dissipation,
J flux, Theta the step at an edge (sharp, or a sigmoid in log lambda), W shell windows.
"""

import abc
from collections.abc import Sequence

import torch
from torch import Tensor

from . import check, dense, windows

Edges = Tensor | Sequence[float]


class System(abc.ABC):
    """A kernel M(t) and a residual r(t) with ``r' = -M r``, known for every flow time t >= 0.

    Subclasses give ``kernel``, ``kernel_velocity`` and ``residual``; the shell quantities below follow from a dense
    eigendecomposition, and subclasses replace them where they are known in closed form.
    """

    @abc.abstractmethod
    def kernel(self, t: float) -> Tensor:
        """M(t), (m, m), unit 1/flow time."""

    @abc.abstractmethod
    def kernel_velocity(self, t: float) -> Tensor:
        """M'(t), (m, m), unit 1/flow time^2."""

    @abc.abstractmethod
    def residual(self, t: float) -> Tensor:
        """r(t), (m,), with ``1/2 |r|^2`` the loss."""

    def modes(self, t: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,) and coefficients ``g_i = <u_i, r>`` (m,) at flow time ``t``."""
        eigenvalues, vectors = torch.linalg.eigh(self.kernel(t))
        return eigenvalues, vectors.mT @ self.residual(t)

    def spectrum(self, t: float) -> Tensor:
        """Eigenvalues of M(t), (m,), in the system's own order."""
        return self.modes(t)[0]

    def energy(self, t: float, edges: Edges, width: float | None = None) -> Tensor:
        """Shell energies ``1/2 sum_i W_a(lambda_i) g_i^2``, (B + 1,); their sum is the loss."""
        eigenvalues, g = self.modes(t)
        return windows.shell_windows(eigenvalues, edges, width) @ (g**2 / 2)

    def dissipation(self, t: float, edges: Edges, width: float | None = None) -> Tensor:
        """Shell dissipation ``sum_i W_a(lambda_i) lambda_i g_i^2``, (B + 1,); the sum is the squared gradient norm."""
        eigenvalues, g = self.modes(t)
        return windows.shell_windows(eigenvalues, edges, width) @ (eigenvalues * g**2)

    def counts(self, t: float, edges: Edges) -> Tensor:
        """Number of eigenvalues in every shell, (B + 1,)."""
        return windows.shell_counts(self.spectrum(t), edges)

    def loss(self, t: float) -> float:
        """``1/2 |r(t)|^2``."""
        return float(self.residual(t).square().sum() / 2)

    def flux(self, t: float, edges: Edges, width: float | None = None) -> Tensor:
        """Energy per flow time through every edge, upward positive, (B,); steps of ``width`` in log lambda.

        Rotation and drift together, from the exact M'. The sharp flux of a moving spectrum is a train of delta
        functions (one per crossing), so ``width=None`` is refused where eigenvalues move.

        Raises:
            ValueError: if ``width`` is None and the spectrum moves.
        """
        return dense.smooth_flux(self.kernel(t), self.kernel_velocity(t), self.residual(t), edges, _needed(width))


class FixedBasis(System):
    """Eigenvectors at rest: ``M = sum_i lambda_i(t) u_i u_i^T``, so no rotation and all flux is drift."""

    @property
    @abc.abstractmethod
    def basis(self) -> Tensor:
        """Eigenvectors in columns, (m, k); beyond them the kernel and the residual vanish."""

    @abc.abstractmethod
    def spectrum(self, t: float) -> Tensor:
        """lambda_i(t), (k,), in the order of ``basis``."""

    @abc.abstractmethod
    def spectrum_velocity(self, t: float) -> Tensor:
        """lambda_i'(t), (k,), unit 1/flow time^2."""

    @abc.abstractmethod
    def coefficients(self, t: float) -> Tensor:
        """g_i(t) = <u_i, r(t)>, (k,)."""

    def modes(self, t: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues and coefficients, (k,) each, without forming a matrix."""
        return self.spectrum(t), self.coefficients(t)

    def kernel(self, t: float) -> Tensor:
        """M(t), (m, m), unit 1/flow time."""
        return (self.basis * self.spectrum(t)) @ self.basis.mT

    def kernel_velocity(self, t: float) -> Tensor:
        """M'(t), (m, m), unit 1/flow time^2."""
        return (self.basis * self.spectrum_velocity(t)) @ self.basis.mT

    def residual(self, t: float) -> Tensor:
        """r(t), (m,), with ``1/2 |r|^2`` the loss."""
        return self.basis @ self.coefficients(t)

    def loss(self, t: float) -> float:
        """``1/2 |r(t)|^2``."""
        return float(self.coefficients(t).square().sum() / 2)

    def flux(self, t: float, edges: Edges, width: float | None = None) -> Tensor:
        """Drift flux ``J_b = 1/2 sum_i Theta_b'(lambda_i) lambda_i' g_i^2``, (B,), upward positive; exact.

        Zero, with or without ``width``, where the spectrum is at rest.

        Raises:
            ValueError: if ``width`` is None and the spectrum moves (see ``MonotoneDrift.crossed_energy``).
        """
        velocity = self.spectrum_velocity(t)
        if not velocity.any():
            return torch.zeros_like(check.edge_tensor(edges))
        eigenvalues, g = self.modes(t)
        return windows.step_slopes(eigenvalues, edges, _needed(width)) @ (velocity * g**2) / 2


class MonotoneDrift(FixedBasis):
    """Fixed eigenvectors whose eigenvalues move one way only, so that sharp crossings can be listed exactly."""

    @abc.abstractmethod
    def energy_at(self, eigenvalue: float) -> Tensor:
        """``1/2 g_i^2``, (k,), of every mode at the moment its own eigenvalue equals ``eigenvalue``."""

    def crossed_energy(self, start: float, end: float, edges: Edges) -> Tensor:
        """Energy carried over every sharp edge between two flow times, upward positive, (B,); exact.

        The integral of the sharp flux. It closes the sharp budget:
        ``E_a(end) - E_a(start) = -integral of D_a + K_a - K_{a+1}`` with K this function.

        Raises:
            ValueError: if ``end`` is before ``start``.
        """
        if end < start:
            raise ValueError(f"end must not be before start, got end={end!r}, start={start!r}")
        edges_B = check.edge_tensor(edges)
        moved_Bk = windows.steps(self.spectrum(end), edges_B, None) - windows.steps(self.spectrum(start), edges_B, None)
        energy_Bk = torch.stack([self.energy_at(float(edge)) for edge in edges_B])
        return torch.where(moved_Bk == 0, 0.0, moved_Bk * energy_Bk).sum(1)


class RotatingFrame(System):
    """Fixed spectrum, eigenvectors turning at constant rates: ``u_i' = sum_j Omega_ij u_j``, ``u_i(0) = e_i``.

    In the turning frame the generator is constant, ``g' = (-Lambda + Omega) g``, so ``g(t)`` is one matrix exponential:
    exact to about ``eps * |Omega - Lambda| t``.
    """

    @property
    @abc.abstractmethod
    def eigenvalues(self) -> Tensor:
        """lambda_i, (m,), at rest."""

    @property
    @abc.abstractmethod
    def rotation_rates(self) -> Tensor:
        """Omega_ij = <u_j, u_i'>, (m, m), antisymmetric, unit 1/flow time."""

    @property
    @abc.abstractmethod
    def initial_coefficients(self) -> Tensor:
        """g(0), (m,)."""

    def coefficients(self, t: float) -> Tensor:
        """g(t) = exp((-Lambda + Omega) t) g(0), (m,)."""
        generator = self.rotation_rates - self.eigenvalues.diag()
        return torch.linalg.matrix_exp(generator * check.non_negative("t", t)) @ self.initial_coefficients

    def basis(self, t: float) -> Tensor:
        """Eigenvectors in columns, (m, m): ``exp(-Omega t)``, orthonormal to round-off for every t."""
        rates, vectors = torch.linalg.eigh(-1j * self.rotation_rates.mT)  # U' = U Omega^T, Omega^T = i Hermitian
        return ((vectors * torch.exp(1j * rates * check.non_negative("t", t))) @ vectors.mH).real

    def modes(self, t: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues and coefficients, (m,) each, without an eigendecomposition."""
        return self.eigenvalues, self.coefficients(t)

    def kernel(self, t: float) -> Tensor:
        """M(t), (m, m), unit 1/flow time."""
        basis = self.basis(t)
        return (basis * self.eigenvalues) @ basis.mT

    def kernel_velocity(self, t: float) -> Tensor:
        """M'(t) with ``<u_i, M' u_j> = Omega_ij (lambda_i - lambda_j)``, (m, m)."""
        basis, lam = self.basis(t), self.eigenvalues
        return basis @ (self.rotation_rates * (lam[:, None] - lam)) @ basis.mT

    def residual(self, t: float) -> Tensor:
        """r(t) = U(t) g(t), (m,)."""
        return self.basis(t) @ self.coefficients(t)

    def mode_transfer(self, t: float) -> Tensor:
        """T_ij = Omega_ij g_i g_j: energy per flow time gained by mode i from mode j, (m, m), antisymmetric."""
        g = self.coefficients(t)
        return self.rotation_rates * torch.outer(g, g)

    def mode_dissipation(self, t: float) -> Tensor:
        """D_i = lambda_i g_i^2, (m,)."""
        return self.eigenvalues * self.coefficients(t) ** 2

    def transfer(self, t: float, edges: Edges) -> Tensor:
        """T_ab: energy per flow time gained by sharp shell a from shell b, (B + 1, B + 1), antisymmetric."""
        windows_am = windows.shell_windows(self.eigenvalues, edges)
        transfer_ab = windows_am @ self.mode_transfer(t) @ windows_am.mT
        return (transfer_ab - transfer_ab.mT) / 2  # within a shell it cancels: make that exact

    def flux(self, t: float, edges: Edges, width: float | None = None) -> Tensor:
        """Rotation flux ``J_b = sum_ij Theta_b(lambda_i) T_ij``, (B,), upward positive; sharp if ``width`` is None."""
        return windows.steps(self.eigenvalues, edges, width) @ self.mode_transfer(t).sum(1)


def _needed(width: float | None) -> float:
    if width is None:
        raise ValueError("width must be given: eigenvalues move, and their sharp flux is a train of delta functions")
    return width
