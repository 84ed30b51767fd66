"""`grsd doctor`: what would work on a model, by which way, and what it would cost. Tries it, at small scale.

The report and the expected costs are those of a run: its own monitor is set up, and measures twice.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from grsd_callbacks.cli.loading import Subject
from grsd_callbacks.gram import exact_gram, gram_operations
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.measure import operator_for
from grsd_callbacks.method import choose_by_cost
from grsd_callbacks.monitor import ShellMonitor
from grsd_callbacks.probe import Probe
from grsd_callbacks.settings import Settings

KINKS = "has kinks: the instantaneous flux (transfer=True) is the smooth part only; the default flux is not affected"
#: modules whose presence changes what a measurement means: pattern in the class name, and what to know
CAUTIONS = {
    "Dropout": "is off: the measured function is the one in eval mode",
    "BatchNorm": "uses its running statistics: closures between probe and training hold only approximately",
    "ReLU": KINKS,
    "MaxPool": KINKS,
}


def doctor(subject: Subject) -> int:
    """Print the diagnosis.

    Returns:
        0 if the model can be measured, 1 if not.
    """
    for line in _inventory(subject.model):
        print(line)
    try:
        monitor = _monitor(subject)
        op = _operator(subject, monitor)
        n, c = op.num_samples, op.num_outputs
    except Exception as error:
        print(f"  no  kernel: {type(error).__name__}: {error}")
        print("\nThis model cannot be measured.")
        return 1
    print(f"  yes runs on the probe: {n} samples x {c} outputs, m = {n * c}")
    exact = _tried("exact kernel", lambda: _exact_way(op))
    products = _tried("products", lambda: _products_way(op))
    if not exact and not products:
        print("\nThis model cannot be measured.")
        return 1
    op.release()
    print()
    if monitor is None:
        print(_without_loss(op, subject.settings))
        return 0
    print(monitor.report)
    return 0 if _tried("trial measurement", lambda: _trial(subject, monitor)) else 1


def _monitor(subject: Subject) -> ShellMonitor | None:
    """What the callback would measure with, set up as in a run; None without a loss."""
    if subject.loss is None:
        return None
    settings = {field.name: getattr(subject.settings, field.name) for field in fields(subject.settings)}
    return ShellMonitor(
        subject.model, subject.loss, subject.probe, on_error="raise", figures=False, distributed=False, **settings
    )


def _operator(subject: Subject, monitor: ShellMonitor | None) -> NTKOperator:
    """A new operator on what the monitor measures, which need not be all outputs."""
    if monitor is None:
        return operator_for(subject.model, subject.probe, subject.settings)
    return operator_for(subject.model, monitor.probe, monitor.settings)


def _without_loss(op: NTKOperator, settings: Settings) -> str:
    choice = choose_by_cost(op, settings.num_matvecs + settings.num_density_matvecs, settings.memory_limit)
    method = choice.method if settings.method == "auto" else settings.method
    return f"method {method} ({choice.reason}); for a trial measurement give --data with targets"


def _tried(what: str, action: Callable[[], Iterator[str]]) -> bool:
    """Print what an attempt finds; an exception is a finding too."""
    try:
        lines = list(action())
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        print(f"  no  {what}: {type(error).__name__}: {first[:160]}")
        return False
    print(f"  yes {what}: {lines[0]}")
    for line in lines[1:]:
        print(f"      {line}")
    return True


def _inventory(model: nn.Module) -> Iterator[str]:
    parameters = dict(model.named_parameters())
    lazy = [name for name, p in parameters.items() if isinstance(p, UninitializedParameter)]
    if lazy:
        yield f"  no  uninitialized parameters ({lazy[0]} ...): run one batch first"
        return
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    frozen = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    dtypes = ", ".join(sorted({str(p.dtype)[6:] for p in parameters.values()}))
    yield f"{type(model).__name__}: {trainable:,} trainable parameters, {frozen:,} frozen, {dtypes}"
    names = Counter(type(module).__name__ for module in model.modules() if not list(module.children()))
    for pattern, meaning in CAUTIONS.items():
        hits = [f"{count} x {name}" for name, count in names.items() if pattern in name]
        if hits:
            yield f"  !   {', '.join(hits)}: {meaning}"


def _exact_way(op: NTKOperator) -> Iterator[str]:
    estimate = gram_operations(op.function, op.inputs)
    started = time.perf_counter()
    gram = exact_gram(op.function, op.inputs)
    seconds = time.perf_counter() - started
    counts = Counter(gram.paths.values())
    yield (
        f"{seconds:.2g} s; tensors by form: {', '.join(f'{path} {k}' for path, k in sorted(counts.items()))}; "
        f"peak about {estimate.peak_bytes / 2**20:.3g} MiB"
    )
    unused = [name for name, path in gram.paths.items() if path == "unused"]
    if unused:
        yield f"without gradient on the probe: {', '.join(unused[:3])}{' ...' if len(unused) > 3 else ''}"


def _products_way(op: NTKOperator) -> Iterator[str]:
    path = op.choose_forward()
    v = torch.ones(op.shape[0], dtype=op.dtype, device=op.device)
    op @ v
    started = time.perf_counter()
    op @ v
    yield f"{1e3 * (time.perf_counter() - started):.3g} ms each; J w by {path.replace('_', ' ')}"
    for name, why in op.refused.items():
        yield f"refused: {name.replace('_', ' ')} ({why})"


def _trial(subject: Subject, monitor: ShellMonitor) -> Iterator[str]:
    """Two measurements with all that belongs to them; the cheaper one is the cost, as for the default schedule."""
    before = [p.detach().clone() for p in subject.model.parameters()]
    seconds = min(_measuring_seconds(monitor, step) for step in (0, 1))
    found = monitor.history[-1]
    same = all(bool((a == b).all()) for a, b in zip(before, subject.model.parameters(), strict=True))
    step = _step_seconds(subject)
    closure = abs(float(found.dissipation.sum()) - found.grad_norm_sq) / max(found.grad_norm_sq, 1e-300)
    yield f"{seconds:.2g} s, loss {found.loss:.4g}, lambda_max {found.summary['lambda_max']:.4g}"
    yield f"sum D = |grad L|^2 to {closure:.1e}; parameters {'bit-identical' if same else 'CHANGED'} afterwards"
    yield (
        f"one gradient on the probe takes {step:.2g} s: a measurement costs {seconds / step:.3g} of them. To "
        f"spend 2 %, measure every {max(1, round(50 * seconds / step)):,} such steps (the default schedule sees to it)"
    )


def _measuring_seconds(monitor: ShellMonitor, step: int) -> float:
    """A measurement, and the work of the step after it (which moves nothing here)."""
    before = monitor.measuring_seconds
    monitor.step(step, lr=0.0)
    monitor.finish_update(step + 1)
    return monitor.measuring_seconds - before


def _step_seconds(subject: Subject) -> float:
    """One forward and backward pass over the probe."""
    assert subject.loss is not None
    loss, probe = subject.loss, Probe(subject.probe.inputs, subject.probe.targets)
    op = NTKOperator(subject.model, probe.inputs)

    def gradient() -> float:
        started = time.perf_counter()
        value = loss.value(op.function.outputs(probe.inputs), probe.targets)
        torch.autograd.grad(value, list(op.function.parameters.values()), allow_unused=True)
        return time.perf_counter() - started

    op.run(gradient)
    return op.run(gradient)
