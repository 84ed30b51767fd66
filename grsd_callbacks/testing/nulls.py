"""Nulls: a network whose kernel cannot move, and a rotation of function space that nothing may notice."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import check


class FrozenFeatures(nn.Module):
    """Random fixed features under a trained linear head: ``f(x) = head(tanh(body(x)))``; flux zero to round-off.

    The body is a buffer-free frozen module (``requires_grad`` off), the head starts at zero and has no bias. The kernel
    is ``nu Phi Phi^T`` (x) identity over outputs, for every head.

    Args:
        num_inputs: of a sample. num_features: width of the body. num_outputs: of the head.
        seed: of the private generator that draws the body, Gaussian of variance 1/num_inputs.

    Raises:
        ValueError: if a size is below 1.

    Example:
        >>> net = FrozenFeatures(num_inputs=2, num_features=5)
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['head.weight']
    """

    def __init__(self, num_inputs: int, num_features: int, num_outputs: int = 1, seed: int = 0) -> None:
        super().__init__()
        for name, size in (("num_inputs", num_inputs), ("num_features", num_features), ("num_outputs", num_outputs)):
            check.at_least(name, size, 1)
        weight = torch.randn(num_features, num_inputs, generator=check.generator(seed), dtype=torch.float64)
        self.body = nn.Linear(num_inputs, num_features, bias=False, dtype=torch.float64)
        self.body.weight = nn.Parameter(weight / math.sqrt(num_inputs), requires_grad=False)
        self.head = nn.Linear(num_features, num_outputs, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.head.weight)

    def features(self, inputs: Tensor) -> Tensor:
        """Phi = tanh(body(x)), (n, num_features)."""
        return torch.tanh(self.body(inputs))

    def forward(self, inputs: Tensor) -> Tensor:
        """head(features(x)), (n, num_outputs)."""
        return self.head(self.features(inputs))


class _RotatedOutputs(nn.Module):
    rotation: Tensor

    def __init__(self, model: nn.Module, rotation: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("rotation", rotation)

    def forward(self, *inputs: Tensor) -> Tensor:
        return _rotate(self.model(*inputs), self.rotation)


def rotate_outputs(model: nn.Module, targets: Tensor, rotation: Tensor) -> tuple[nn.Module, Tensor]:
    """Rotate function space: one orthogonal Q times outputs and targets turns M into ``Q M Q^T`` and r into ``Q r``.

    Loss, gradients, spectrum, shell energies, dissipation and flux do not change; eigenvectors do.

    Args:
        model: shares its parameters with the result.
        targets: (n, ...), floating point.
        rotation: orthogonal, (c, c) with c outputs per sample to mix within samples, or (m, m) with m = n c to mix the
            whole batch (then the model takes that one batch only).

    Returns:
        The wrapped model and the rotated targets.

    Raises:
        ValueError: if ``rotation`` is not orthogonal, or of neither size.

    Example:
        >>> half_turn = -torch.eye(2)
        >>> model, targets = rotate_outputs(nn.Identity(), torch.tensor([[1.0, 2.0]]), half_turn)
        >>> targets.tolist(), model(torch.tensor([[3.0, 4.0]])).tolist()
        ([[-1.0, -2.0]], [[-3.0, -4.0]])
    """
    sizes: Sequence[int] = (targets[0].numel(), targets.numel())
    if rotation.ndim != 2 or rotation.shape[0] not in sizes or rotation.shape[0] != rotation.shape[1]:
        raise ValueError(f"rotation must be square of size {sizes[0]} or {sizes[1]}, got {tuple(rotation.shape)}")
    identity = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    error = float((rotation @ rotation.mT - identity).abs().max())
    if error > 10 * math.sqrt(torch.finfo(rotation.dtype).eps):
        raise ValueError(f"rotation must be orthogonal, got Q Q^T off the identity by {error:.1e}")
    return _RotatedOutputs(model, rotation), _rotate(targets, rotation)


def _rotate(values: Tensor, rotation: Tensor) -> Tensor:
    return (values.reshape(-1, len(rotation)) @ rotation.mT).reshape(values.shape)
