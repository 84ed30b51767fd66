"""Losses as residuals: how L(f) becomes the vector r and the scale nu of THEORY (conventions).

    r  = dL/df / sqrt(nu),      M = nu J J^T,      grad L = sqrt(nu) J^T r

For every differentiable loss `r^T M r = |grad L|^2` exactly. For a squared loss `nu` is its curvature,
`r = sqrt(nu) (f - y)` and `1/2 |r|^2 = L` exactly as well.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("squared", "cross_entropy", "general")


@dataclass(frozen=True, eq=False)
class Residual:
    """Loss, residual and scale at one instant.

    Attributes:
        loss: L on the probe, a float64 scalar on the model's device.
        residual: r, shape (m,), float64, rows sample-major.
        nu: the scale in `M = nu J J^T`.
    """

    loss: Tensor
    residual: Tensor
    nu: float


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss `function(outputs, targets) -> scalar` together with the rule for its scale nu.

    Attributes:
        function: the differentiable loss itself.
        kind: "squared" (shell energies sum to the loss), "cross_entropy" (they sum to half the Brier
            score) or "general" (no such meaning; dissipation still sums to the squared gradient norm).
        nu: a fixed scale, or None to derive it from the probe (see `scale`).
        meaning: of energies and dissipation, in words, where the kind does not say it.
        source: where the loss comes from, for the report.
    """

    function: Callable[[Any, Any], Tensor]
    kind: str
    nu: float | None = None
    meaning: str = ""
    source: str = ""

    @property
    def closes(self) -> bool:
        """Whether the dissipation sums to |grad L|^2."""
        return True

    @property
    def energy_meaning(self) -> str:
        """What the shell energies sum to, in words."""
        if self.meaning:
            return self.meaning
        if self.kind == "squared":
            return "shell energies sum to the loss"
        f = self.function
        plain = isinstance(f, nn.CrossEntropyLoss) and f.weight is None and f.label_smoothing == 0
        plain = plain or getattr(f, "is_plain_cross_entropy", False)
        if self.kind == "cross_entropy" and plain:
            return "shell energies sum to half the Brier score, dissipation to |grad L|^2"
        return "dissipation sums to |grad L|^2; energies are 1/2 |dL/df|^2 / nu, not a loss"

    @property
    def energy_is_loss(self) -> bool:
        """Whether the shell energies sum to the loss."""
        return self.kind == "squared"

    def scale(self, outputs: Tensor, targets: Any) -> float:
        """The scale nu: 2/m (mean squared error), one over the averaged targets (cross-entropy), 1/n else."""
        if self.nu is not None:
            if self.kind == "squared" and getattr(self.function, "is_replayed", False):  # its weights may change
                found = curvatures(self, outputs, targets, [outputs.shape[1:].numel()])
                return self.nu if found is None else found[0]
            growth = getattr(self.function, "growth", None)  # of a factor that follows a schedule
            return self.nu if growth is None else self.nu * growth(targets)
        if isinstance(self.function, nn.MSELoss):
            return 2.0 / outputs.numel() if self.function.reduction == "mean" else 2.0
        if isinstance(self.function, nn.CrossEntropyLoss):
            return _cross_entropy_scale(self.function, outputs, targets)
        return 1.0 / outputs.shape[0]

    def evaluate(self, outputs: Tensor, targets: Any) -> Residual:
        """L, r and nu at the given outputs, in float64 where the loss allows it.

        Args:
            outputs: f, shape (n, ...), the model's outputs on the probe.
            targets: whatever the loss takes as second argument.

        Raises:
            ValueError: if the loss is not a differentiable scalar of the outputs.
        """
        with torch.enable_grad():
            wide = wide_dtype(outputs.device)
            f = outputs.detach().to(wide if self._takes_wide(outputs, targets) else outputs.dtype).requires_grad_()
            value = self._scalar(f, targets)
            (gradient,) = torch.autograd.grad(value, f)
        nu = self.scale(f, targets)
        residual = gradient.reshape(-1).to(wide) / math.sqrt(nu)
        return Residual(value.detach().to(wide), residual, nu)

    def target_vector(self, outputs: Tensor, targets: Any) -> Tensor | None:
        """What the outputs should become, shape (m,): the targets, or class indicators centred over classes."""
        if getattr(self.function, "takes_targets_as_they_are", False):
            return None
        if self.kind == "squared" and isinstance(targets, Tensor) and targets.shape == outputs.shape:
            return targets.reshape(-1)
        if self.kind != "cross_entropy" or not isinstance(targets, Tensor):
            return None
        if targets.is_floating_point():
            indicators = targets
        else:
            index = targets.to(outputs.device).unsqueeze(1)
            kept = index != getattr(self.function, "ignore_index", -100)
            indicators = torch.zeros_like(outputs).scatter_(1, torch.where(kept, index, 0), kept.to(outputs.dtype))
        return (indicators - indicators.mean(1, keepdim=True)).reshape(-1)

    def value(self, outputs: Tensor, targets: Any) -> Tensor:
        """L, a differentiable scalar, in float64; in the outputs' dtype for callables that insist on it.

        Raises:
            ValueError: if the callable does not return a scalar that depends on the outputs.
        """
        wide = self._takes_wide(outputs, targets)
        return self._scalar(outputs.to(wide_dtype(outputs.device)) if wide else outputs, targets)

    def _takes_wide(self, outputs: Tensor, targets: Any) -> bool:
        """Whether the loss can be had in float64; a callable that holds float32 tensors of its own may refuse."""
        if self.kind != "general" or outputs.dtype == wide_dtype(outputs.device):
            return True
        try:
            self._scalar(outputs.detach().to(wide_dtype(outputs.device)).requires_grad_(), targets)
        except RuntimeError:
            return False
        return True

    def _scalar(self, f: Tensor, targets: Any) -> Tensor:
        weight = getattr(self.function, "weight", None)
        if isinstance(weight, Tensor) and weight.device != f.device and self.kind != "general":
            self.function.weight = weight.to(f.device)  # type: ignore[attr-defined]  # made before the model moved
        as_they_are = getattr(self.function, "takes_targets_as_they_are", False)
        try:
            value = self.function(f, targets if as_they_are else widened(targets, f))
        except TypeError as error:
            raise TypeError(f"loss cannot be called as loss(outputs, targets): {error}") from error
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss must return a scalar tensor, got {got}; use a 'mean' or 'sum' reduction")
        if not value.requires_grad:
            raise ValueError("loss does not depend differentiably on the outputs; give a differentiable callable")
        return value.reshape(())


def resolve_loss(loss: Any, nu: float | None = None) -> Loss:
    """The `Loss` meant by a user's `loss=` argument.

    Args:
        loss: "mse", "cross_entropy", an `nn.MSELoss`/`nn.CrossEntropyLoss` (its options are respected),
            the functions `F.mse_loss`/`F.cross_entropy`, or any callable (outputs, targets) -> scalar.
        nu: scale for `M = nu J J^T`; None takes it from the loss, and 1/n for a general callable unless
            its curvature is found to be nu times the identity (`calibrate`).

    Raises:
        ValueError, TypeError: naming what was expected.
    """
    if nu is not None and not (isinstance(nu, (int, float)) and math.isfinite(nu) and nu > 0):
        raise ValueError(f"nu must be a positive number, got {nu!r}")
    if isinstance(loss, Loss):
        return loss
    name = loss if isinstance(loss, str) else None
    if name == "mse" or loss is F.mse_loss:
        loss = nn.MSELoss()
    elif name == "cross_entropy" or loss is F.cross_entropy:
        loss = nn.CrossEntropyLoss()
    if isinstance(loss, str):
        raise ValueError(f"loss must be 'auto', 'mse', 'cross_entropy' or a callable, got {loss!r}")
    if isinstance(loss, (nn.MSELoss, nn.CrossEntropyLoss)):
        return _module_loss(loss, nu)
    if not callable(loss):
        raise TypeError(f"loss must be 'auto', 'mse', 'cross_entropy' or a callable, got {type(loss).__name__}")
    return Loss(loss, "general", nu)


def _module_loss(loss: nn.MSELoss | nn.CrossEntropyLoss, nu: float | None) -> Loss:
    if loss.reduction == "none":
        raise ValueError(f"loss: {type(loss).__name__}(reduction='none') has no scalar value; use 'mean' or 'sum'")
    function = copy.deepcopy(loss)
    weight = getattr(function, "weight", None)
    if isinstance(weight, Tensor):
        function.weight = weight.detach().to(wide_dtype(weight.device))
    if nu is not None:  # another scale than the loss's own: energies lose their meaning
        return Loss(function, "general", nu)
    return Loss(function, "squared" if isinstance(loss, nn.MSELoss) else "cross_entropy")


def calibrate(loss: Loss, outputs: Tensor, targets: Any, seed: int = 0) -> Loss:
    """Fix the scale of a general callable: its curvature where that is nu times the identity.

    Two products of the loss's Hessian with random vectors (in output space, drawn from a private
    generator) test `d2L/df2 = nu I`; if it holds, nu is taken from it, and if also `1/2 |r|^2 = L` the
    loss is treated as squared (so 10 x MSE gives nu = 20/m). Otherwise the loss is returned unchanged.
    """
    if loss.kind != "general" or loss.nu is not None:
        return loss
    found = curvatures(loss, outputs, targets, [outputs.shape[1:].numel()], seed)
    if found is None:
        return loss
    (curvature,) = found
    fixed = Loss(loss.function, "general", curvature)
    at = fixed.evaluate(outputs, targets)
    half_norm = 0.5 * float(at.residual @ at.residual)
    is_squared = math.isclose(half_norm, float(at.loss), rel_tol=1e-6, abs_tol=1e-300)
    return Loss(loss.function, "squared" if is_squared else "general", curvature)


def curvatures(loss: Loss, outputs: Tensor, targets: Any, widths: Sequence[int], seed: int = 0) -> list[float] | None:
    """nu by part where d2L/df2 is nu times the identity on each part of the outputs, and zero between parts.

    To 1e-6, at f and at a shifted f; None if it is not.

    Args:
        loss, outputs, targets: L, f of shape (n, ...) and what it is compared with.
        widths: numbers of a sample's outputs in each part.
        seed: of the private generator that draws the vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[list[float]] = []
    for shift in (0.0, 1.0):
        z = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs.device)
        z = z.to(wide_dtype(outputs.device))
        with torch.enable_grad():
            f = (outputs.detach().to(z) + shift * z).requires_grad_()
            try:
                (gradient,) = torch.autograd.grad(loss.value(f, targets), f, create_graph=True)
                if not gradient.requires_grad:
                    return None
                (product,) = torch.autograd.grad(gradient, f, z, allow_unused=True)
            except (RuntimeError, NotImplementedError):  # no second derivative: its curvature cannot be had
                return None
        if product is None:
            return None
        found.append([])
        for Hz, part in zip(*(x.reshape(len(x), -1).split(list(widths), 1) for x in (product, z)), strict=True):
            ratio = float((Hz * part).sum() / (part * part).sum())
            if not ratio > 0 or float((Hz - ratio * part).norm()) > 1e-6 * float(Hz.norm()):
                return None
            found[-1].append(ratio)
    return found[0] if all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(*found)) else None


def _cross_entropy_scale(loss: nn.CrossEntropyLoss, outputs: Tensor, targets: Tensor) -> float:
    """1 / (number of averaged targets), the sum of their class weights where there are any; 1 for a sum."""
    if loss.reduction == "sum":
        return 1.0
    if targets.is_floating_point():  # class probabilities: torch averages over the positions
        return 1.0 / (targets.numel() / targets.shape[1])
    kept = targets[targets != loss.ignore_index]
    total = float(kept.numel()) if loss.weight is None else float(loss.weight.to(targets.device)[kept].sum())
    return 1.0 / total if total > 0 else 1.0


def check_pair(loss: Loss, outputs: Tensor, targets: Any) -> None:
    """Refuse outputs and targets that the loss would broadcast or misread.

    Raises:
        ValueError: with the shapes and the remedy.
    """
    if isinstance(loss.function, nn.MSELoss):
        if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
            got = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(
                f"probe targets must have the outputs' shape {tuple(outputs.shape)} for a squared loss, got {got}"
            )
    if isinstance(loss.function, nn.CrossEntropyLoss):
        _check_classes(loss.function, outputs, targets)


def _check_classes(loss: nn.CrossEntropyLoss, outputs: Tensor, targets: Any) -> None:
    if not isinstance(targets, Tensor):
        raise ValueError(f"probe targets must be a tensor for cross-entropy, got {type(targets).__name__}")
    if outputs.dim() < 2:
        raise ValueError(f"outputs must have shape (n, classes, ...) for cross-entropy, got {tuple(outputs.shape)}")
    if targets.is_floating_point():
        if targets.shape != outputs.shape:
            raise ValueError(
                f"probe targets (class probabilities) must have the outputs' shape {tuple(outputs.shape)}, "
                f"got {tuple(targets.shape)}"
            )
        return
    expected = (outputs.shape[0], *outputs.shape[2:])
    if tuple(targets.shape) != expected:
        raise ValueError(
            f"probe targets (class indices) must have shape {expected} for outputs of shape "
            f"{tuple(outputs.shape)}, got {tuple(targets.shape)}"
        )
    valid = targets[targets != loss.ignore_index]
    if valid.numel() and (int(valid.min()) < 0 or int(valid.max()) >= outputs.shape[1]):
        raise ValueError(
            f"probe targets must be class indices in [0, {outputs.shape[1]}), "
            f"got values from {int(valid.min())} to {int(valid.max())}"
        )


def wide_dtype(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on devices without it (MPS)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def widened(targets: Any, like: Tensor) -> Any:
    """Floating targets in the dtype and on the device of `like`; others only moved."""
    if not isinstance(targets, Tensor):
        return targets
    return targets.to(like) if targets.is_floating_point() else targets.to(like.device)
