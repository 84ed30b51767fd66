"""`grsd checkpoints`: measure a finished run from its checkpoints, with the exact flux between them."""

from __future__ import annotations

import hashlib
import math
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from grsd_callbacks import tags
from grsd_callbacks.cli.loading import Subject
from grsd_callbacks.cli.runlog import UsageError, read_json
from grsd_callbacks.json_lines import append_json_line, cut_torn_line, read_json_lines
from grsd_callbacks.losses import Loss
from grsd_callbacks.measure import BadState, measure
from grsd_callbacks.optimizer import NO_STEP_SIZE, StepSize
from grsd_callbacks.report import summary_table
from grsd_callbacks.run import Run
from grsd_callbacks.snapshot import Snapshot
from grsd_callbacks.trajectory import Trajectory

FILE = "grsd.jsonl"
SUFFIXES = (".ckpt", ".pt", ".pth")
#: where plain checkpoints keep the parameters, in this order; else the mapping itself
STATE_KEYS = ("state_dict", "model_state_dict", "model", "net")
STEP_KEYS = ("global_step", "step", "iteration", "it")
OPTIMIZER_KEYS = ("optimizer_states", "optimizer_state_dict", "optimizer")
#: largest relative change of the loss when a checkpoint of an interrupted command is measured again
SAME = 1e-6


@dataclass(frozen=True)
class Checkpoint:
    """One saved state.

    Attributes:
        path: the file.
        step: optimizer steps taken.
        digest: SHA-256 of the model's tensors in it.
        size: the step size found in its optimizer state, or `NO_STEP_SIZE`.
    """

    path: Path
    step: int
    digest: str
    size: StepSize


def measure_checkpoints(
    subject: Subject, paths: Sequence[Path], out: Path, *, lr: float | None = None, to_tensorboard: bool = False
) -> None:
    """Measure every checkpoint in the order of steps, write `out/grsd.jsonl`, print the table.

    All checkpoints are read and checked against the model before anything is written. An interrupted command goes on
    where it stopped: the first and the last checkpoint measured are measured again for their bases, and the file has
    every flux that an uninterrupted command would have.

    Raises:
        UsageError: checkpoints of another model, two of the same step, files that are no checkpoints, or an `out`
            that was made from other data, loss or settings.

    Cost: reads every file twice (the first time for its names and shapes), and one measurement for each.
    """
    checkpoints = survey(subject.model, paths, lr)
    path = out / FILE
    setup = fingerprint(subject)
    done = _done(path, checkpoints, setup)
    run = _restarted(subject, checkpoints, done) if done else Run()
    try:
        out.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        for k in _progress(checkpoints, len(done)):
            snapshot = _measured(subject, run, checkpoints[k], checkpoints[k - 1] if k else None)
            origin = {"file": checkpoints[k].path.name, "digest": checkpoints[k].digest, "setup": setup}
            parts = {"scalars": tags.scalars(snapshot), "record": snapshot.to_dict(), "checkpoint": origin}
            append_json_line(path, snapshot.step, **parts)
        if to_tensorboard:
            _write_events(out, run)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror or error}") from None
    print(summary_table(run.history, run.final_exponents()))
    number = len(run.history)
    print(f"\n{number} checkpoint{'s' if number != 1 else ''}; look at them:  grsd report {out} --html report.html")


# -- reading checkpoints ---------------------------------------------------------------------------------


def survey(model: nn.Module, paths: Sequence[Path], lr: float | None = None) -> list[Checkpoint]:
    """All checkpoints in the order of steps, each checked against the model; copies of one file count once.

    Raises:
        UsageError: as `measure_checkpoints`.
    """
    found: dict[str, Checkpoint] = {}
    for place, path in enumerate(_files(paths)):
        content = load(path)
        digest, step = _digest(parameters_of(content, model, path).values()), _step(content, path, place)
        if digest in found and found[digest].step == step:  # last.ckpt beside step=100.ckpt
            continue
        size = NO_STEP_SIZE if lr is None else StepSize(lr, lr)
        found[digest] = Checkpoint(path, step, digest, _size(content) if lr is None else size)
    ordered = sorted(found.values(), key=lambda c: c.step)
    for one, other in zip(ordered, ordered[1:], strict=False):
        if one.step == other.step:
            raise UsageError(f"two different checkpoints at step {one.step}: {one.path} and {other.path}")
    return ordered


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
            if not inside:
                names = ", ".join("*" + s for s in SUFFIXES)
                raise UsageError(f"{path} holds no checkpoint ({names}), nor does a folder below it")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"{path} does not exist")
    return files


def _digest(tensors: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for t in tensors:
        digest.update(f"{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(path: Path) -> Mapping[str, Any]:
    """The content of a checkpoint; nothing in the file is executed (weights_only).

    Raises:
        UsageError: the file is broken, holds more than tensors and plain types, or is no mapping.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{path} cannot be loaded with weights_only=True ({first[:200]}). Broken files, and files that need "
            "unpickling of objects, are not read; save the state_dict alone"
        ) from None
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} is no checkpoint: expected a mapping, got {type(content).__name__}")
    return content


def parameters_of(content: Mapping[str, Any], model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the model's own names.

    The checkpoint may hold the model under a prefix (`net.`, `module.`, `_orig_mod.`), which is taken off.

    Raises:
        UsageError: names or shapes are those of another model.
    """
    inner = next((content[key] for key in STATE_KEYS if isinstance(content.get(key), Mapping)), content)
    state = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if not state or not own:
        raise UsageError(f"{path} holds no state_dict" if own else "the model has no parameters")
    first = next(iter(own))
    prefixes = [name.removesuffix(first) for name in state if name == first or name.endswith("." + first)]
    fitting = [prefix for prefix in prefixes if all(prefix + name in state for name in own)]
    chosen = next((prefix for prefix in fitting if prefix == ""), fitting[0] if len(fitting) == 1 else None)
    if chosen is None:
        if len(fitting) > 1:
            raise UsageError(f"{path} holds several such models, under {', '.join(fitting)}; give a model of the whole")
        missing = [name for name in own if name not in state]
        raise UsageError(f"{path} is a checkpoint of another model: it lacks {_some(missing)}; it has {_some(state)}")
    if chosen == "" and len(state) > len(own):
        extra = [name for name in state if name not in own]
        raise UsageError(f"{path} is a checkpoint of another model: the model has no {_some(extra)}")
    taken = {name: state[chosen + name] for name in own}
    wrong = [name for name in own if taken[name].shape != own[name].shape]
    if wrong:
        shapes = f"{tuple(taken[wrong[0]].shape)}, the model {tuple(own[wrong[0]].shape)}"
        raise UsageError(f"{path} is a checkpoint of another model: {wrong[0]} has shape {shapes}")
    return taken


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _step(content: Mapping[str, Any], path: Path, place: int) -> int:
    """Optimizer steps: what the checkpoint says, else the last number in the file's name, else its place."""
    for key in STEP_KEYS:
        if isinstance(content.get(key), int):
            return int(content[key])
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else place


def _size(content: Mapping[str, Any]) -> StepSize:
    """Step size of a saved optimizer state: plain or heavy-ball SGD is known by its options."""
    state = next((content[key] for key in OPTIMIZER_KEYS if content.get(key)), None)
    several = state if isinstance(state, (list, tuple)) else [state]
    groups = [g for s in several if isinstance(s, Mapping) for g in s.get("param_groups", [])]
    rates = {float(g["lr"]) for g in groups if isinstance(g.get("lr"), (int, float, Tensor))}
    if len(rates) != 1:
        return replace(NO_STEP_SIZE, why="several learning rates") if rates else NO_STEP_SIZE
    lr, group = rates.pop(), groups[0]
    if not {"momentum", "dampening", "nesterov"} <= set(group) or "betas" in group:
        return StepSize(lr, lr, True, "the optimizer does not step along the gradient")
    momentum, dampening = float(group["momentum"] or 0.0), float(group["dampening"] or 0.0)
    flow = lr * (1 - dampening) / (1 - momentum) if 0 < momentum < 1 else lr
    return StepSize(lr, flow)


# -- measuring -------------------------------------------------------------------------------------------


def _measured(subject: Subject, run: Run, checkpoint: Checkpoint, before: Checkpoint | None) -> Snapshot:
    """Measure one checkpoint and add it to the run."""
    content = load(checkpoint.path)
    with torch.no_grad():
        own = subject.model.state_dict()
        for name, value in parameters_of(content, subject.model, checkpoint.path).items():
            own[name].copy_(value)
    assert subject.loss is not None
    try:
        instant = measure(subject.model, subject.probe, subject.loss, subject.settings, run.grid)
    except (BadState, ValueError, RuntimeError) as error:
        raise UsageError(f"{checkpoint.path} cannot be measured: {error}; earlier ones stay measured") from None
    if before is not None:
        size = between(before.size, checkpoint.size)
        run.steps_since = checkpoint.step - before.step
        run.flow_time += run.steps_since * size.flow
        run.nominal = run.nominal or (size.why if size.nominal else "")
    run.size = checkpoint.size
    return run.add(checkpoint.step, instant, subject.loss.energy_is_loss)


def between(one: StepSize, other: StepSize) -> StepSize:
    """Mean step size between two checkpoints; without any, steps are the time. Nominal unless both ends agree."""
    if not (math.isfinite(one.flow) and math.isfinite(other.flow)):
        return StepSize(1.0, 1.0, True, "no learning rate is known: flow time counts steps")
    nominal, why = one.nominal or other.nominal, one.why or other.why
    if one.flow != other.flow:
        nominal, why = True, why or "the learning rate changed between checkpoints"
    return StepSize((one.lr + other.lr) / 2, (one.flow + other.flow) / 2, nominal, why)


def _restarted(subject: Subject, checkpoints: Sequence[Checkpoint], done: list[Snapshot]) -> Run:
    """The run as it was when the command was interrupted: bases of the first and last checkpoint measured again."""
    run = Run()
    for k in dict.fromkeys((0, len(done) - 1)):
        run.flow_time = done[k].flow_time
        again = _measured(subject, run, checkpoints[k], None)
        if abs(again.loss - done[k].loss) > SAME * max(abs(done[k].loss), 1e-300):
            raise UsageError(
                f"{checkpoints[k].path} now gives the loss {again.loss:.6g}, where it gave {done[k].loss:.6g}: the "
                "model's code or the data have changed; give another --out"
            )
    run.history, run.trajectory = list(done), Trajectory(frozen=run.trajectory.frozen)
    for s in done:
        run.trajectory.append(s.flow_time, s.loss, s.frozen_energy, s.health.get("frozen_coverage", 1.0))
    run.nominal = "flow time is nominal" if done[-1].health.get("nominal_flow_time") else ""
    return run


def _done(path: Path, checkpoints: Sequence[Checkpoint], setup: str) -> list[Snapshot]:
    """Measurements of an interrupted command, which must be the first of the checkpoints asked for."""
    if not path.exists() or not path.read_bytes():
        return []
    try:
        lines = [line.get("checkpoint", {}) for line in read_json_lines(path)]
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not lines:  # one half-written line
        return []
    if any(line.get("setup") != setup for line in lines):
        raise UsageError(f"{path} was made from other data, loss, model or settings; give another --out")
    if [line["digest"] for line in lines] != [c.digest for c in checkpoints[: len(lines)]]:
        raise UsageError(f"{path} was made from other checkpoints; give another --out")
    return read_json(path).history


def fingerprint(subject: Subject) -> str:
    """What decides the numbers beside the checkpoints: probe, loss, settings, names of parameters."""
    leaves = tree_flatten((subject.probe.inputs, subject.probe.targets))[0]
    probe = _digest(leaf for leaf in leaves if isinstance(leaf, Tensor))
    names = [(name, tuple(t.shape)) for name, t in subject.model.named_parameters()]
    described = repr((probe, _described(subject.loss), subject.settings, names))
    return hashlib.sha256(described.encode()).hexdigest()


def _described(loss: Loss | None) -> tuple[str, ...]:
    assert loss is not None
    name = getattr(loss.function, "__qualname__", type(loss.function).__name__)
    options = [str(getattr(loss.function, key, "")) for key in ("reduction", "label_smoothing", "ignore_index")]
    return (loss.kind, name, str(loss.nu), *options)


def _progress(checkpoints: Sequence[Checkpoint], start: int) -> Iterator[int]:
    """Places of the checkpoints from `start` on, with a bar on stderr."""
    total, live = len(checkpoints), sys.stderr.isatty()
    for k in range(start, total):
        filled = 30 * k // total
        bar = f"[{'#' * filled}{'.' * (30 - filled)}] {k}/{total}  step {checkpoints[k].step}  "
        print(bar, end="\r" if live else "\n", file=sys.stderr, flush=True)
        yield k
    if total > start:
        print(f"[{'#' * 30}] {total}/{total}{' ' * 20}", file=sys.stderr)


def _write_events(out: Path, run: Run) -> None:
    """TensorBoard's files of the whole run, replacing those of an earlier command."""
    from grsd_callbacks.figures import run_figures
    from grsd_callbacks.sinks import TensorBoardSink

    fits = run.final_exponents()
    for old in out.glob("events.out.tfevents.*"):
        old.unlink()
    sink = TensorBoardSink(out)
    for k, snapshot in enumerate(run.history):
        emission = tags.emission(snapshot)
        if k == 0:
            emission = replace(emission, texts={tags.MEANING: tags.meaning_card()}, layout=tags.layout())
        if k == len(run.history) - 1:
            table = tags.preformatted(summary_table(run.history, fits))
            emission = replace(
                emission, texts={**emission.texts, tags.SUMMARY: table}, figures=run_figures(run.history, fits)
            )
        sink.write(emission)
    sink.close()
