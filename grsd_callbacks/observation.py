"""What of a model's outputs is measured where there are too many: one number a sample, or a random projection.

    loss_gradient   f_i = n l_i, l_i the share of sample i in L = sum_i l_i; nu = 1/n:
                    M_ij = <grad n l_i, grad n l_j> / n, r_i = 1/sqrt(n); sum D = |grad L|^2 exactly, sum E = 1/2
    root_loss       f_i = sqrt(2 n l_i), nu = 1/n: a squared loss L = 1/(2n) |f|^2 with target zero, so sum E = L and
                    sum D = |grad L|^2 exactly, and r' = -M r under gradient flow
    projection      f R for each sample, R a fixed sketch (outputs x k, E R R^T = 1): M_R = nu (J^T R)^T (J^T R), r R.
                    tr M and |r|^2 are unbiased over sketches, sum D is that of the projection and not |grad L|^2

Letters: n samples, C outputs a sample, k numbers kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from grsd_callbacks.functional import ModelFunction, as_outputs, call_model
from grsd_callbacks.losses import Loss, Residual, calibrate, check_pair, resolve_loss
from grsd_callbacks.probe import Probe, take
from grsd_callbacks.sample_axis import SAMPLES_FIRST, SampleAxis, axes_of_samples, has_time_first, second_axis
from grsd_callbacks.training_step import StepLoss, StepOutputs, as_floating

OBSERVE = ("auto", "loss_gradient", "root_loss", "projection")
#: rows m = n C above which "auto" observes losses of samples instead of outputs
MAX_ROWS = 4096
_MEANING = {
    "loss_gradient": "kernel of per-sample loss gradients; dissipation sums to |grad L|^2, energies to 1/2: they say "
    "how the mean gradient is spread over the scales",
    "root_loss": "kernel of the square roots of per-sample losses; shell energies sum to the loss",
    "projection": "random projection of the outputs; trace and residual norm are unbiased, dissipation is that of the "
    "projection and does not sum to |grad L|^2",
}


def check_observe(observe: str | None, num_projections: int) -> None:
    """Raise unless both are as `observed` takes them."""
    if observe is not None and not (isinstance(observe, str) and observe in OBSERVE):
        raise ValueError(f"observe must be None or one of {OBSERVE}, got {observe!r}")
    if isinstance(num_projections, bool) or not isinstance(num_projections, int) or num_projections < 1:
        raise ValueError(f"num_projections must be a positive integer, got {num_projections!r}")


def choose_observe(observe: str | None, loss: Loss, num_rows: int) -> str | None:
    """The kind of observation, where it is left open: all outputs as long as they are few or losses are not known."""
    if observe != "auto":
        return observe
    return "loss_gradient" if num_rows > MAX_ROWS and knows_samples(loss) else None


def knows_samples(loss: Loss) -> bool:
    """Whether the loss can be split into shares of single samples."""
    function = loss.function
    if isinstance(function, StepLoss):
        return function.exact and not function.outputs.time_first
    return isinstance(function, (nn.MSELoss, nn.CrossEntropyLoss))


@dataclass(frozen=True, eq=False)
class Reduced:
    """A probe with the function, loss and scale that go with it."""

    probe: Probe
    loss: Loss
    outputs: Any


def observed(
    function: ModelFunction, probe: Probe, loss: Loss, observe: str | None, *, num_projections: int = 16, seed: int = 0
) -> Reduced:
    """Put an observation of few numbers a sample in the stead of the outputs.

    Args:
        function: the model, with the `outputs=` that picks f.
        probe: the samples; it may become a pair, since losses need targets where the function is evaluated.
        loss: L(f).
        observe: one of `OBSERVE`, or None.
        num_projections: k, numbers a sample ("projection").
        seed: of the private generator behind the projection.

    Raises:
        ValueError: outputs and targets do not fit the loss; losses of single samples are asked for, and the loss is no
            mean squared error or cross-entropy, or the samples are not along the first axis of the inputs.

    Cost: one run of the model on the probe, and three to six on parts of it where losses of samples are observed.
    """
    with torch.no_grad():
        f = function.run(lambda: function.outputs(probe.inputs))
    how = choose_observe(observe, loss, f.numel())
    if how is None:
        return Reduced(probe, loss, function.extract)
    check_pair(loss, f, probe.targets)
    extract: Any = function.extract
    source: _Source = _Step(extract) if isinstance(extract, StepOutputs) else _Plain(extract, loss)
    pair = probe if isinstance(source, _Step) else _paired(probe)
    if how == "projection":
        return _projected(function, source, pair, loss, f, num_projections, seed)
    misplaced = _misplaced_samples(function, probe, f)
    if misplaced and observe == "auto":
        return Reduced(probe, loss, function.extract)
    _check_samples(how, misplaced, loss)
    n = len(f)
    share = n * function.run(lambda: source.unit(loss, f, probe.targets))
    outputs = SampleLosses(source, share, how == "root_loss", how, interacting=function.interacting)
    kind, mean = ("squared", _HalfMeanSquare) if how == "root_loss" else ("general", _Mean)
    whole = mean(source.direct(function.model, loss), getattr(loss.function, "growth", None))
    return Reduced(pair, Loss(whole, kind, 1 / n, _MEANING[how]), outputs)


def _misplaced_samples(function: ModelFunction, probe: Probe, f: Tensor) -> str:
    """Where samples are if not along the first axis of inputs and outputs, as a sentence; nothing if they are."""
    first, second = second_axis(probe.inputs)
    along = f"outputs along it ({first}) depend on each other, but not along the second ({second}), as with time first"
    if isinstance(function.extract, StepOutputs):  # which has looked, and finds them in its outputs wherever they are
        return along if function.extract.time_first else ""
    n = probe.num_samples

    def run(inputs: Any) -> Tensor:
        with torch.no_grad():
            return function.run(lambda: function.outputs(inputs))

    found = axes_of_samples(f, n, lambda some: run(take(probe.inputs, some, n))) if n > 1 else [SampleAxis()]
    if found:
        other = f"outputs of shape {tuple(f.shape)} have them along axis {found[0].axis}"
        return "" if SampleAxis() in found else other
    return along if has_time_first(f, probe.inputs, run) else ""


def _check_samples(how: str, misplaced: str, loss: Loss) -> None:
    """Refuse what has no losses of samples."""
    if misplaced:
        raise ValueError(
            f"observe={how!r} needs samples along the first axis of inputs and outputs, and {misplaced}. Use "
            "observe='projection' or observe=None, or give batches and targets with samples first (x.transpose(0, 1)), "
            f"and transpose in training_step, in forward, or around the model:\n\n{SAMPLES_FIRST}"
        )
    if not knows_samples(loss):
        raise ValueError(
            f"observe={how!r} needs a loss that is a mean squared error or a cross-entropy, whose shares of single "
            "samples are known; use observe='projection', or observe=None with fewer samples (num_probe=)"
        )


def _paired(probe: Probe) -> Probe:
    both = {"inputs": probe.inputs, "targets": probe.targets}
    return Probe(both, both)


# ---- where f and the losses of samples come from ----


@dataclass(frozen=True, eq=False)
class _Plain:
    """The model's own call on pairs of inputs and targets."""

    extract: Callable[[Any], Tensor] | None
    loss: Loss

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return as_outputs(call_model(model, batch["inputs"]), self.extract)

    def targets(self, batch: Any) -> Any:
        return batch["targets"]

    def sample_losses(self, model: nn.Module, batch: Any) -> Tensor:
        f, targets = self.outputs(model, batch), batch["targets"]
        function: Any = self.loss.function
        if isinstance(function, nn.MSELoss):
            each = F.mse_loss(f, targets.to(f), reduction="none")
        else:
            weight = None if function.weight is None else function.weight.to(f)
            targets = targets.to(f) if targets.is_floating_point() else targets.to(f.device)
            each = F.cross_entropy(
                f, targets, weight, None, function.ignore_index, None, "none", function.label_smoothing
            )
        return each.reshape(len(f), -1).sum(1)

    def unit(self, loss: Loss, f: Tensor, targets: Any) -> float:
        """What one of the numbers that `sample_losses` adds up counts in L, whatever nu was asked for."""
        own = resolve_loss(loss.function)
        nu = own.scale(f, targets)
        return nu if own.kind == "cross_entropy" else nu / 2

    def direct(self, model: nn.Module, loss: Loss) -> Callable[[Any], Tensor] | None:
        return lambda batch: loss.value(self.outputs(model, _cast(model, batch)), batch["targets"])


@dataclass(frozen=True, eq=False)
class _Step:
    """A training step on batches."""

    step: StepOutputs

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return self.step.call(model, batch)

    def targets(self, batch: Any) -> Any:
        return batch

    def sample_losses(self, model: nn.Module, batch: Any) -> Tensor:
        return self.step.sample_losses(model, batch)

    def unit(self, loss: Loss, f: Tensor, targets: Any) -> float:
        return loss.function.unit  # type: ignore[attr-defined]

    def direct(self, model: nn.Module, loss: Loss) -> Callable[[Any], Tensor] | None:
        return loss.function.direct  # type: ignore[attr-defined]


_Source = _Plain | _Step


def _cast(model: nn.Module, batch: Any) -> Any:
    """Floating tensors in the parameters' dtype."""
    dtype = next(model.parameters()).dtype
    return tree_map(lambda leaf: as_floating(leaf, dtype), batch)


# ---- losses of samples ----


@dataclass(frozen=True, eq=False)
class SampleLosses:
    """One number a sample: n times its share of L, or the root of twice that. An `outputs=` for `ModelFunction`.

    Attributes:
        source: f and the losses of samples.
        share: what makes the mean over samples L.
        root: whether the root is taken.
        interacting: see `StepOutputs`.
    """

    source: Any
    share: float
    root: bool
    how: str
    interacting: bool = False

    @property
    def description(self) -> tuple[str, ...]:
        """Lines for the report."""
        return (*_described(self.source), f"observed: {self.how.replace('_', ' ')}, {_MEANING[self.how].split(';')[0]}")

    def call(self, model: nn.Module, batch: Any) -> Tensor:
        """(n, 1)."""
        losses = self.share * self.source.sample_losses(model, batch)
        if self.root:
            losses = (2 * losses).clamp_min(torch.finfo(losses.dtype).tiny).sqrt()
        return losses.unsqueeze(1)

    def __call__(self, raw: Tensor) -> Tensor:
        """The outputs are already f."""
        return raw


def _described(source: Any) -> tuple[str, ...]:
    return source.step.description if isinstance(source, _Step) else ()


class _Mean:
    """L = mean f; `direct` is the loss without the detour over f.

    `factor` is what L has grown by since f was scaled; the scale nu goes with its square, so that energies stay 1/2.
    """

    takes_targets_as_they_are = True

    def __init__(self, direct: Callable[[Any], Tensor] | None, factor: Callable[[Any], float] | None = None) -> None:
        self.direct, self.factor = direct, factor or (lambda batch: 1.0)

    def __call__(self, f: Tensor, batch: Any) -> Tensor:
        return self.factor(batch) * f.mean()

    def growth(self, batch: Any) -> float:
        """nu now over nu at the start."""
        return self.factor(batch) ** 2


class _HalfMeanSquare(_Mean):
    """L = 1/(2n) |f|^2."""

    def __call__(self, f: Tensor, batch: Any) -> Tensor:
        return self.factor(batch) * f.square().mean() / 2

    def growth(self, batch: Any) -> float:
        """nu now over nu at the start."""
        return self.factor(batch)


# ---- projections ----


@dataclass(frozen=True, eq=False)
class Sketch:
    """R: every output goes, with a random sign, to one of k numbers."""

    to: Tensor
    sign: Tensor
    k: int

    @classmethod
    def draw(cls, num_outputs: int, k: int, seed: int) -> Sketch:
        """A sketch from a private generator."""
        generator = torch.Generator().manual_seed(seed)
        to = torch.randint(k, (num_outputs,), generator=generator)
        return cls(to, 2.0 * torch.randint(2, (num_outputs,), generator=generator) - 1, k)

    def __call__(self, f: Tensor) -> Tensor:
        """(n, C) to (n, k)."""
        f = f.reshape(len(f), -1)
        return f.new_zeros(len(f), self.k).index_add(1, self.to.to(f.device), f * self.sign.to(f))


@dataclass(frozen=True, eq=False)
class Projection:
    """f R for each sample. An `outputs=` for `ModelFunction`."""

    source: Any
    sketch: Sketch
    interacting: bool = False

    @property
    def description(self) -> tuple[str, ...]:
        """Lines for the report."""
        what = f"{len(self.sketch.sign)} outputs a sample on {self.sketch.k} numbers"
        return (*_described(self.source), f"observed: a fixed random projection of {what}")

    def call(self, model: nn.Module, batch: Any) -> Tensor:
        """(n, k)."""
        return self.sketch(self.source.outputs(model, batch))

    def __call__(self, raw: Tensor) -> Tensor:
        """The outputs are already f."""
        return raw


@dataclass(frozen=True, eq=False)
class ProjectedLoss(Loss):
    """The residual of L(f), projected like f. Of the projection it is no derivative of anything."""

    residual_of: Callable[[Any], Residual] | None = None
    sketch: Callable[[Tensor], Tensor] | None = None

    @property
    def closes(self) -> bool:
        """Whether the dissipation sums to |grad L|^2."""
        return False

    def evaluate(self, outputs: Tensor, targets: Any) -> Residual:
        """L itself, with the projected residual."""
        assert self.residual_of is not None and self.sketch is not None
        found = self.residual_of(targets)
        return replace(found, residual=self.sketch(found.residual.view(len(outputs), -1)).reshape(-1))


def _projected(
    function: ModelFunction, source: _Source, pair: Probe, loss: Loss, f: Tensor, k: int, seed: int
) -> Reduced:
    targets = source.targets(pair.targets)
    loss = function.run(lambda: calibrate(loss, f, targets))
    nu = function.run(lambda: loss.scale(f, targets))
    sketch = Sketch.draw(f[0].numel(), k, seed)
    projected = ProjectedLoss(
        _Mean(partial(_linearised, function.model, source, loss)),
        "projected",
        nu,
        _MEANING["projection"],
        residual_of=partial(_residual, function.model, source, loss),
        sketch=sketch,
    )
    return Reduced(pair, projected, Projection(source, sketch, function.interacting))


def _residual(model: nn.Module, source: _Source, loss: Loss, batch: Any) -> Residual:
    with torch.no_grad():
        f = source.outputs(model, _cast(model, batch))
    return loss.evaluate(f, source.targets(batch))


def _linearised(model: nn.Module, source: _Source, loss: Loss, batch: Any) -> Tensor:
    """A function with the gradient of L: <dL/df, f>, dL/df held fixed."""
    f = source.outputs(model, _cast(model, batch))
    at = loss.evaluate(f, source.targets(batch))
    return (at.residual * at.nu**0.5).view_as(f).to(f.dtype).mul(f).sum()
