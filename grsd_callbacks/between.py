"""Notice that parameters are written to between two optimizer steps: weights loaded, averaged, or swapped for good.

No copies of the model: version counters say that something was written, one small tensor says whether it has stayed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: parameters whose version counters are looked at
MOST_WATCHED = 8
#: why flux is missing across such a write
REASON = "parameters were written to between two optimizer steps (weights loaded, averaged or clipped)"


class BetweenSteps:
    """Watches the parameters of a module from the end of one step to the start of the next.

    A swap that has been undone (an average put in place for a validation) leaves no trace. What is written between
    the first two steps already is taken for a part of every step (weight clipping, say), and is no event.

    Cost: one look at the version counters of at most `MOST_WATCHED` parameters, spread over the module (what loads,
        averages or swaps weights writes to all), and a copy of the smallest one, at each step.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(2, 1)
        >>> watch = BetweenSteps(net)
        >>> found = []
        >>> for step in range(3):
        ...     watch.step_ended()
        ...     if step == 2:
        ...         net.load_state_dict({"weight": torch.zeros(1, 2), "bias": torch.zeros(1)})
        ...     found.append(watch.written())
        <All keys matched successfully>
        >>> found
        [False, False, True]
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = parameters = list(module.parameters())
        self._small = min(parameters, key=lambda p: p.numel())
        self._watched = [self._small, *parameters[:: -(-len(parameters) // MOST_WATCHED)]]
        self._versions: int | None = None
        self._alias: Tensor | None = None  # the smallest one without its gradient, and a copy of it
        self._values = torch.empty(0)
        self._intervals = 0
        self._usual = False

    def step_ended(self) -> None:
        """Remember the parameters as an optimizer step has left them."""
        self._versions = self._version()
        if self._alias is None or not self._is_current(self._alias):
            self._alias = self._small.detach()
            self._values = self._alias.clone()
        else:
            self._values.copy_(self._alias)

    def _is_current(self, alias: Tensor) -> bool:
        """Whether the alias still shows the parameter: that may have been moved, or its `.data` replaced."""
        plain = type(self._small) in (Tensor, nn.Parameter)  # others have no pointer to compare
        return plain and alias.data_ptr() == self._small.data_ptr()

    def written(self) -> bool:
        """Whether they have been written to since, and differ (asked once an interval)."""
        before, self._versions = self._versions, None
        if before is None or self._usual:
            return False
        self._intervals += 1
        if before == self._version() or bool((self._values == self._small).all()):
            return False
        self._usual = self._intervals == 1
        return not self._usual

    @property
    def writes(self) -> int:
        """How often parameters have been written to, all of them: not for every step."""
        return sum(p._version for p in self._parameters)

    def _version(self) -> int:
        """How often the watched parameters have been written to."""
        return sum([p._version for p in self._watched])  # a list: this runs twice a step
