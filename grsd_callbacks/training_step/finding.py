"""Which function a training step's loss is a function of: from the autograd graph of one recorded run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.utils._pytree import tree_map

from grsd_callbacks.functional import ModelFunction
from grsd_callbacks.guard import DisturbedTraining
from grsd_callbacks.losses import Loss, wide_dtype
from grsd_callbacks.memory import is_out_of_memory
from grsd_callbacks.probe import Probe, num_samples, take
from grsd_callbacks.sample_axis import SampleAxis, has_time_first, parts_of, sample_axes, time_first_note
from grsd_callbacks.training_step.observed import Scales, StepLoss, StepOutputs
from grsd_callbacks.training_step.runner import REMEDY, StepRunner
from grsd_callbacks.training_step.tape import Event, Place, Tape, frontier, slope

#: |grad L - J^T dL/df|^2 / |grad L|^2 above which dependence on the parameters is said to bypass f, by dtype
GAP_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
#: and above which squares are no residuals: they say too little of the loss to be measured
_USELESS = 0.9


@dataclass(frozen=True, eq=False)
class Observed:
    """A training step taken apart.

    Attributes:
        outputs: for `ModelFunction(outputs=)`.
        loss: L(f).
        gap: |grad L - J^T dL/df|^2 / |grad L|^2: how much dependence on the parameters bypasses f.
        labels: what f is, in words.
        direct: parameters that reach the loss without passing f.
        notes: sentences for the report.
    """

    outputs: StepOutputs
    loss: Loss
    gap: float
    labels: list[str] = field(default_factory=list)
    direct: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def observe_step(
    function: ModelFunction,
    probe: Probe,
    at: str = "",
    runner: StepRunner | None = None,
    *,
    nu: float | None = None,
    why: str = "",
) -> Observed:
    """Find the function that a training step's loss is a function of.

    Args:
        function: the module as a function of its parameters.
        probe: a batch, as `step_pair` makes it.
        at: name of the submodule whose output is f; nothing: found from the autograd graph.
        runner: how the step is run.
        nu: scale of the kernel, where it is not to be the loss's own.
        why: why the training step is measured, for the report.

    Raises:
        ValueError: no such function: training_step's loss does not depend on the parameters, or on them directly.

    Cost: about seven runs of the step, two of them with a backward pass.
    """
    runner = runner or StepRunner(function.model)
    found = function.run(lambda: _observed(function, probe, at, runner))
    if nu is not None:
        fixed: Any = replace(found.loss.function, start=0.0)  # type: ignore[type-var]
        found = replace(found, loss=replace(found.loss, function=fixed, kind="general", nu=nu))
    return replace(found, outputs=replace(found.outputs, description=tuple(_description(found, why))))


def _description(found: Observed, why: str) -> list[str]:
    lines = [f"training_step: {label}" for label in found.labels]
    lines += [f"because {why}"] if why else []
    passed = "all dependence on the parameters passes there" if not found.gap > 1e-6 else "some bypasses it"
    return [*lines, f"{passed} (gap {found.gap:.1e} of |grad L|^2)", *found.notes]


def warning_of_gap(found: Observed) -> str:
    """What to tell a user whose loss depends on the parameters by other ways as well; nothing if it does not."""
    if found.loss.function.complete:  # type: ignore[attr-defined]
        return ""
    names = ", ".join(found.direct[:3]) + (", ..." if len(found.direct) > 3 else "")
    by = f"on {names} directly" if found.direct else "by another way"
    through = " and ".join(found.labels)
    return (
        f"grsd: the loss of training_step depends on the parameters not through {through} alone, "
        f"but also {by} (a penalty on the weights?): {found.gap:.1e} of |grad L|^2, which is left out of all that is "
        f"measured. If that is too much, {REMEDY}."
    )


def _observed(function: ModelFunction, probe: Probe, at: str, runner: StepRunner) -> Observed:
    batch = tree_map(lambda leaf: leaf.to(function.device) if isinstance(leaf, Tensor) else leaf, probe.inputs)
    with torch.enable_grad(), Tape(function.model) as tape:
        loss = runner(batch)
    if not loss.requires_grad:
        raise ValueError(f"training_step's loss does not depend on the measured parameters; {REMEDY}")
    best: Observed | None = None
    failure: Exception | None = None
    for cut, direct, at_use in _ways(_cuts(loss, tape, function, runner, batch, at)):
        try:
            found = _observe_cut(function, runner, batch, loss, cut, direct, at_use=at_use)
        except Exception as error:  # a step that differentiates f takes no constant in its stead
            if is_out_of_memory(error) or isinstance(error, DisturbedTraining):
                raise
            failure = failure or error
            continue
        if found.gap >= _USELESS and any(event.place.kind == "square" for events in cut for event in events):
            continue
        if best is None or found.gap < 0.9 * best.gap:
            best = found
        if best.gap <= GAP_TOLERANCE.get(function.dtype, 1e-6):
            break
    if best is not None:
        return best
    if failure is not None:
        why = str(failure) or type(failure).__name__
        raise RuntimeError(
            f"training_step does not run with its outputs replaced by constants; {REMEDY} ({why})"
        ) from failure
    raise ValueError(
        f"outputs='training_step:{at}': what {at!r} returns does not reach the loss; name another submodule"
        if at
        else f"training_step: no output with one row per sample was found between parameters and loss; {REMEDY}"
    )


_Cut = list[list[Event]]


def _ways(cuts: Iterator[tuple[_Cut, list[str]]]) -> Iterator[tuple[_Cut, list[str], bool]]:
    """Each cut with its tensors replaced where they are made; then where they are used alone, if that is elsewhere.

    A step that differentiates what a submodule returns needs it as it is, but the loss takes another.
    """
    for cut, direct in cuts:
        yield cut, direct, False
        kinds = [{event.place.kind == "module" for event in events} for events in cut]
        if any(len(kind) > 1 for kind in kinds) and all(False in kind for kind in kinds):
            yield cut, direct, True


def _cuts(
    loss: Tensor, tape: Tape, function: ModelFunction, runner: StepRunner, batch: Any, at: str
) -> Iterator[tuple[_Cut, list[str]]]:
    """Sets of tensors that f may be made of, the best first, with the parameters that bypass them."""
    names, n = {id(p): name for name, p in function.parameters.items()}, num_samples(batch)
    modules = dict(function.model.named_modules())
    seen = [
        event
        for event in tape.events
        if _has_rows(event.tensor, n)
        and not (event.place.kind == "module" and isinstance(modules[event.place.name], _Loss))
    ]
    given, returned, squared = ([e for e in seen if e.place.kind == kind] for kind in ("loss", "module", "square"))
    events = [event for event in seen if event.place.kind != "square"]

    def cut(chosen: list[Event], among: list[Event]) -> Iterator[tuple[_Cut, list[str]]]:
        edges = {event.edge for event in chosen}
        found, direct = frontier(loss, [event for event in among if event.edge in edges], names)
        if found:
            yield found, direct

    if at:
        yield from cut([event for event in returned if event.place.name == at], events)
        return
    for chosen in (given, returned, events):
        yield from cut(chosen, events)
    squared = _of_samples(squared, function, runner, batch)
    if squared:
        yield from cut(given + squared, [e for e in seen if e.place.kind != "square" or e in squared])


def _of_samples(squared: list[Event], function: ModelFunction, runner: StepRunner, batch: Any) -> list[Event]:
    """Squares of what belongs to samples, and not to weights, say: fewer numbers for fewer samples."""
    n = num_samples(batch)
    if not squared or n == 1:
        return squared
    try:
        with torch.no_grad(), Tape(function.model, {event.place for event in squared}) as tape:
            runner(take(batch, parts_of(n)[0], n))
    except Exception as error:  # a step that does not run on parts of a batch
        if is_out_of_memory(error):
            raise
        return []
    fewer = {event.place: event.tensor.shape for event in tape.events}
    return [event for event in squared if event.place in fewer and fewer[event.place] != event.tensor.shape]


def _observe_cut(
    function: ModelFunction,
    runner: StepRunner,
    batch: Any,
    loss: Tensor,
    cut: _Cut,
    direct: list[str],
    *,
    at_use: bool = False,
) -> Observed:
    if at_use:
        cut = [[event for event in events if event.place.kind != "module"] for events in cut]
    known = _known_loss(cut, loss)
    main = [known[0]] if known else [_first(events) for events in cut]
    outputs = StepOutputs(runner, tuple(event.place for event in main), (SampleAxis(),) * len(main))
    outputs, independent = _with_axes(outputs, function.model, batch, main, cut, num_samples(batch))
    notes = []
    if _is_random(function, outputs, batch):
        notes.append("training_step draws random numbers: one fixed draw is measured")
        outputs = replace(outputs, time_first=False)
    elif outputs.time_first:
        notes.append(time_first_note(batch))
    elif not independent:
        notes.append("samples of a batch interact: the kernel is taken from rows on the whole batch")
    outputs = replace(outputs, drop_ignored=known is not None and known[1] == "cross_entropy", interacting=bool(notes))
    aliases = tuple(
        (event.place,) if event.place.kind == "module" else tuple(e.place for e in events)
        for event, events in zip(main, cut)
    )
    step_loss = StepLoss(outputs, aliases)
    scales = Scales(step_loss)
    if len(cut) > 1 and scales.update(function.model, batch):
        outputs = replace(outputs, scales=scales)
        step_loss = StepLoss(outputs, aliases)
        if max(scales.values) > (1 + 1e-5) * min(scales.values):
            factors = ", ".join(f"{scale:.3g}" for scale in scales.values)
            notes.append(f"its parts are scaled as the loss weighs them: by {factors}")
    fixed = Loss(step_loss, "general")
    if known:
        _, kind, own, plain, start = known
        unit = own if kind == "cross_entropy" else own / 2
        fixed = Loss(replace(step_loss, exact=True, plain=plain, start=start, unit=unit), kind, own)
    gap = _gap(function, outputs, fixed, batch)
    if gap > GAP_TOLERANCE.get(function.dtype, 1e-6):
        fixed = replace(fixed, function=replace(fixed.function, complete=False))  # type: ignore[type-var]
    return Observed(outputs, fixed, gap, [_label(events) for events in cut], direct, notes)


def _first(events: list[Event]) -> Event:
    """Where a tensor is made, if a submodule makes it: what is put there reaches every use."""
    return next((event for event in events if event.place.kind == "module"), events[0])


def _label(events: list[Event]) -> str:
    """The outermost submodule that returns a tensor and the loss function that takes it, in words."""
    returned = [event.place for event in events if event.place.kind == "module"]
    given = [event.place for event in events if event.place.kind == "loss"]
    if not returned and not given:
        given = [event.place for event in events]
    return ", ".join(dict.fromkeys(str(place) for place in (*returned[-1:], *given)))


def _has_rows(tensor: Tensor, n: int) -> bool:
    return tensor.numel() > 0 and any(size % n == 0 for size in tensor.shape)


def _with_axes(
    outputs: StepOutputs, model: nn.Module, batch: Any, main: list[Event], cut: list[list[Event]], n: int
) -> tuple[StepOutputs, bool]:
    """The sample axis of each part, by running the step on parts of the batch; and whether samples are independent.

    Args:
        main: the event at each of the outputs' places.   cut: all events of the same tensors.
    """
    first = [SampleAxis(next(d for d, size in enumerate(e.tensor.shape) if size % n == 0)) for e in main]
    outputs = replace(outputs, axes=tuple(first))
    if n == 1:
        return outputs, True
    runs: list[list[list[SampleAxis]]] = []
    for samples in parts_of(n):
        try:
            parts, others = _events(outputs, model, take(batch, samples, n), cut)
        except Exception:  # a step that does not run on parts of a batch
            return _without_samples(outputs, model, batch, main), False
        pairs = [[(e, others[e.place]) for e in events if e.place in others] for events in cut]
        runs.append([_axes(e, some, uses, n, samples) for e, some, uses in zip(main, parts, pairs, strict=True)])
    common = [[axis for axis in those[0] if all(axis in run for run in those)] for those in zip(*runs, strict=True)]
    chosen = [(both or half or [f])[0] for both, half, f in zip(common, runs[0], first, strict=True)]
    outputs, independent = replace(outputs, axes=tuple(chosen)), all(common)
    return outputs if independent else _without_samples(outputs, model, batch, main), independent


def _events(
    outputs: StepOutputs, model: nn.Module, batch: Any, cut: list[list[Event]] | None = None
) -> tuple[list[Event], dict[Place, Event]]:
    """What is seen at the outputs' places, and at those of all events of the same tensors where the step passes."""
    uses = {event.place for events in cut or () for event in events}
    with torch.no_grad(), Tape(model, {*outputs.places, *uses}) as tape:
        outputs.runner(batch)
    return [tape.at(place) for place in outputs.places], {event.place: event for event in tape.events}


def _axes(whole: Event, part: Event, uses: list[tuple[Event, Event]], n: int, samples: slice) -> list[SampleAxis]:
    """Where the samples can be; targets decide where outputs (all zero, say) leave it open.

    Nowhere if the targets of two uses say different things.
    """
    found = possible = sample_axes(whole.tensor.detach(), part.tensor, n, samples)
    for of_all, of_some in uses:
        targets, some_targets = _target(of_all), _target(of_some)
        if len(possible) > 1 and targets is not None and some_targets is not None:
            told = sample_axes(targets, some_targets, n, samples)
            if any(axis in possible for axis in told):  # else they are laid out in another way, and do not say
                found = [axis for axis in found if axis in told]
    return found


def _target(event: Event) -> Tensor | None:
    """The second argument of a loss function."""
    if event.call is None:
        return None
    _, args, kwargs = event.call
    target = args[1] if len(args) > 1 else kwargs.get("target")
    return target.detach() if isinstance(target, Tensor) else None


def _without_samples(outputs: StepOutputs, model: nn.Module, batch: Any, cut: list[Event]) -> StepOutputs:
    """Where samples interact: whether they are those of another axis."""

    def is_second(k: int) -> bool:
        return has_time_first(cut[k].tensor.detach(), batch, lambda some: _events(outputs, model, some)[0][k].tensor)

    return replace(outputs, time_first=all(is_second(k) for k in range(len(cut))))


def _known_loss(cut: list[list[Event]], loss: Tensor) -> tuple[Event, str, float, bool, float] | None:
    """Event, kind, nu, plainness and c (see `StepLoss`) of the only function by which f enters the loss, if known."""
    given = [event for event in cut[0] if event.call is not None]
    if len(cut) > 1 or len(given) != 1 or given[0].place.part not in (0, "input"):
        return None
    event = given[0]
    function, args, kwargs = event.call  # type: ignore[misc]
    c = slope(loss, event.value)
    target = _target(event)
    reduction = kwargs.get("reduction", "mean")
    if c is None or not _enters_only(event, loss, c) or not isinstance(target, Tensor) or target.requires_grad:
        return None
    if function is F.mse_loss and target.shape == event.tensor.shape and kwargs.get("weight") is None:
        return event, "squared", 2 * c / (event.tensor.numel() if reduction == "mean" else 1), False, c
    if function is F.cross_entropy and event.tensor.dim() > 1:
        plain = kwargs.get("weight") is None and not kwargs.get("label_smoothing")
        nu = c * _averaged(event.tensor, target, kwargs, reduction)
        return event, "cross_entropy", nu, plain, c
    return None


def _enters_only(event: Event, loss: Tensor, c: float) -> bool:
    """Whether dL/df is c times the derivative of the loss function's value: f enters in no other way."""
    f = event.tensor
    (whole,) = torch.autograd.grad(loss, f, torch.ones_like(loss), retain_graph=True)
    (part,) = torch.autograd.grad(event.value, f, torch.ones_like(event.value), retain_graph=True)
    return float((whole - c * part).norm()) <= 1e-5 * float(whole.norm())


def _averaged(logits: Tensor, target: Tensor, kwargs: Mapping[str, Any], reduction: str) -> float:
    """1 / (number of averaged targets), 1 for a sum."""
    settings = {
        key: kwargs[key] for key in ("weight", "ignore_index", "label_smoothing") if kwargs.get(key) is not None
    }
    return Loss(nn.CrossEntropyLoss(reduction=reduction, **settings), "cross_entropy").scale(logits, target)


def _gap(function: ModelFunction, outputs: StepOutputs, loss: Loss, batch: Any) -> float:
    """|grad L - J^T dL/df|^2 / |grad L|^2."""
    leaves = list(function.parameters.values())
    with torch.enable_grad():
        direct = torch.autograd.grad(outputs.runner(batch), leaves, allow_unused=True)
        f = outputs.call(function.model, batch)
        at = loss.evaluate(f, batch)
        cotangent = (at.residual * at.nu**0.5).view_as(f).to(f.dtype)
        through = torch.autograd.grad(f, leaves, cotangent, allow_unused=True)
    total = missed = 0.0
    for p, a, b in zip(leaves, direct, through):
        a, b = (torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g for g in (a, b))
        wide = wide_dtype(p.device)
        total += float(a.to(wide).square().sum())
        missed += float((a.to(wide) - b.to(wide)).square().sum())
    return missed / total if total > 0 else missed


def _is_random(function: ModelFunction, outputs: StepOutputs, batch: Any) -> bool:
    """Whether other draws give other outputs."""
    other = replace(outputs, runner=replace(outputs.runner, seed=outputs.runner.seed + 1))
    with torch.no_grad():
        return not torch.equal(outputs.call(function.model, batch), other.call(function.model, batch))
