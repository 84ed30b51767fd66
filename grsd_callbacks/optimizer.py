"""Flow time from optimizers: what a step advances t by, the learning rate (heavy ball: lr / (1 - momentum))."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import SGD, Optimizer


@dataclass(frozen=True)
class StepSize:
    """The size of one optimizer step.

    Attributes:
        lr: learning rate (the parameter-weighted mean where groups differ).
        flow: flow time of the step: lr, for heavy ball lr (1 - dampening) / (1 - momentum), right for slow modes.
        nominal: the flow time is only nominal (adaptive optimizer, several learning rates or momenta).
        why: the reason for that, in words.
    """

    lr: float
    flow: float
    nominal: bool = False
    why: str = ""


NO_STEP_SIZE = StepSize(math.nan, math.nan, True, "no learning rate is known")


def step_size(optimizers: Optimizer | Iterable[Optimizer]) -> StepSize:
    """The step size of one optimizer, or of several that share the parameters between them.

    Args:
        optimizers: one or several `torch.optim.Optimizer`; wrappers with `param_groups` will do.

    Returns:
        A `StepSize`; several learning rates are averaged over parameters and marked nominal.

    Raises:
        TypeError: something without `param_groups`.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.zeros(2))
        >>> step_size(torch.optim.SGD([w], lr=0.5, momentum=0.5)).flow
        1.0
    """
    alone = hasattr(optimizers, "param_groups") or not isinstance(optimizers, Iterable)
    several: list[Any] = [optimizers] if alone else list(optimizers)  # type: ignore[arg-type]
    for optimizer in several:
        if not hasattr(optimizer, "param_groups"):
            kind = type(optimizer).__name__
            raise TypeError(f"optimizers must be a torch optimizer with param_groups, or several, got {kind}")
    flows = [_group_flow(optimizer, group) for optimizer in several for group in optimizer.param_groups]
    if not flows or any(math.isnan(lr) for lr, _ in flows):
        return NO_STEP_SIZE
    reasons = _reasons(several, flows)
    if len(set(flows)) == 1:  # nothing to average: this runs at every step of a training
        return StepSize(*flows[0], bool(reasons), "; ".join(reasons))
    sizes = [sum(p.numel() for p in group["params"]) for optimizer in several for group in optimizer.param_groups]
    total = max(sum(sizes), 1)
    lr, flow = (sum(n * pair[k] for n, pair in zip(sizes, flows, strict=True)) / total for k in (0, 1))
    return StepSize(lr, flow, bool(reasons), "; ".join(reasons))


class StepSizes:
    """`step_size` of one optimizer at every step of a training: read in full only where its numbers have changed.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.5)
        >>> sizes = StepSizes()
        >>> sizes.of(optimizer) is sizes.of(optimizer)
        True
        >>> optimizer.param_groups[0]["lr"] = 0.25
        >>> sizes.of(optimizer).flow
        0.25
    """

    def __init__(self) -> None:
        self._known: tuple[Any, ...] = ()
        self._size = NO_STEP_SIZE

    def of(self, optimizer: Any) -> StepSize:
        """As `step_size(optimizer)`; numbers that are tensors may change in place, and are always read."""
        groups = optimizer.param_groups
        if len(groups) != 1:
            return step_size(optimizer)
        group, kinds = groups[0], (type(optimizer), type(getattr(optimizer, "optimizer", optimizer)))
        lr, momentum, dampening = group.get("lr"), group.get("momentum"), group.get("dampening")
        if isinstance(lr, Tensor) or isinstance(momentum, Tensor) or isinstance(dampening, Tensor):
            return step_size(optimizer)
        if (kinds, lr, momentum, dampening) != self._known:
            self._known, self._size = (kinds, lr, momentum, dampening), step_size(optimizer)
        return self._size


def _group_flow(optimizer: Optimizer, group: dict[str, Any]) -> tuple[float, float]:
    lr = group.get("lr")
    if not isinstance(lr, (int, float, Tensor)):  # optimizers that set their own step size
        return math.nan, math.nan
    lr = float(lr.detach() if isinstance(lr, Tensor) else lr)
    momentum, dampening = float(group.get("momentum", 0.0) or 0.0), float(group.get("dampening", 0.0) or 0.0)
    if _is_sgd(optimizer) and 0 < momentum < 1:
        return lr, lr * (1 - dampening) / (1 - momentum)
    return lr, lr


def _is_sgd(optimizer: Optimizer) -> bool:
    return isinstance(getattr(optimizer, "optimizer", optimizer), SGD)


def _reasons(optimizers: list[Optimizer], flows: list[tuple[float, float]]) -> list[str]:
    reasons = []
    adaptive = sorted({type(o).__name__ for o in optimizers if not _is_sgd(o)})
    if adaptive:
        reasons.append(f"{', '.join(adaptive)} does not step along the gradient")
    if len(set(flows)) > 1:
        reasons.append("several learning rates")
    if len(optimizers) > 1:
        reasons.append("several optimizers")
    return reasons
