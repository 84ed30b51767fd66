"""What the callback costs: paired training runs with and without it, default schedule.

Each round trains the same net without a callback, with an idle callback of the same hooks (the control: what Lightning
itself spends on one more callback) and with ours, in changing order, and compares the time of `fit` without set-up; CPU
time of the process, which a busy machine disturbs less, and wall-clock time. Medians over rounds of the ratios stand
beside the overhead that the callback itself reports. JSON with the environment goes to benchmarks/results/.

With --together two runs go side by side, each in a process of its own with one thread on a core of its own, and cores
are swapped every other round: whatever disturbs the machine disturbs both. One pair is without and with ours, the other
without and idle.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.call import _call_callback_hooks
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import grsd_callbacks as grsd
from grsd_callbacks.figures import run_figures

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

from benchmarks import common, nets

#: rounds, and by case the optimizer steps of a run
ROUNDS = {"tiny": 1, "small": 3, "full": 5}
STEPS: dict[str, dict[str, int]] = {
    "tiny": {"mlp": 30, "resnet": 12},
    "small": {"mlp": 2000, "cnn": 2000, "resnet": 1000, "gpt": 1000},
    "full": {"mlp": 4000, "cnn": 4000, "resnet": 2000, "gpt": 2000},
}
#: samples of a training batch and of the probe (None: the callback's own choice)
BATCH = {"mlp": 128, "cnn": 128, "resnet": 64, "gpt": 32}
PROBE = {"mlp": None, "cnn": None, "resnet": 16, "gpt": 4}
#: changes of the benchmark nets' sizes: a CIFAR-size ResNet and a 4-layer GPT at full size
CHANGES: dict[str, dict[str, dict[str, int]]] = {
    "tiny": {"resnet": {"width": 4, "blocks": 1, "side": 8}},
    "small": {"resnet": {"width": 8, "side": 16}, "gpt": {"layers": 2, "width": 64, "length": 32}},
    "full": {},
}
VARIANTS = ("off", "control", "on")


class Stopwatch(L.Callback):
    """Seconds from the first batch to the end of training, whatever other callbacks do in between."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.process_time(), time.perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.cpu, self.wall = time.process_time() - self._start[0], time.perf_counter() - self._start[1]


class Idle(L.Callback):
    """The hooks that ours has, empty."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pass

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pass

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass


class Module(L.LightningModule):
    """Adam or SGD on a fixed loss; text nets learn from every position."""

    def __init__(self, net: nn.Module, criterion: nn.Module, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.criterion, self.optimizer = net, criterion, optimizer

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def task(name: str, size: str) -> tuple[L.LightningModule, TensorDataset]:
    """Net, loss and data of a case, the same at every call."""
    L.seed_everything(0, verbose=False)
    if name in ("mlp", "cnn"):
        x, labels = digits.digits()
        if name == "mlp":
            y = torch.nn.functional.one_hot(labels, digits.NUM_CLASSES).float()
            return digits.Net(digits.mlp(), nn.MSELoss(), lr=0.5, adam=False), TensorDataset(x, y)
        return digits.Net(digits.cnn(), nn.CrossEntropyLoss(), lr=1e-3, adam=True), TensorDataset(x, labels)
    kind, changes = {"resnet": "resnet_bn", "gpt": "gpt"}[name], CHANGES[size].get(name, {})
    data_changes = {k: v for k, v in changes.items() if k not in ("width", "blocks", "layers")}
    net, data = nets.build(kind, **changes), nets.batch(kind, n=1024, **data_changes)
    module = Module(net, nets.loss_function(kind), lambda parameters: torch.optim.Adam(parameters, 1e-3))
    return module, TensorDataset(data.inputs, data.targets)


def run(name: str, size: str, steps: int, variant: str, logdir: Path) -> dict[str, Any]:
    """Seconds of one training run, and what the callback says of itself if it was on."""
    module, data = task(name, size)
    watch = Stopwatch()
    callback = grsd.ShellDynamicsCallback(num_probe=PROBE[name], figures=False) if variant == "on" else None
    more = {"off": [], "control": [Idle()], "on": [callback]}[variant]
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=L.pytorch.loggers.TensorBoardLogger(logdir, name=name),
        callbacks=[watch, *more],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=20,
    )
    trainer.fit(module, DataLoader(data, batch_size=BATCH[name], shuffle=True))
    found: dict[str, Any] = {"cpu": watch.cpu, "wall": watch.wall}
    if callback is not None:
        monitor = callback.monitor
        found |= {"reported": monitor.overhead, "measurements": len(callback.history)}
        found |= {"method": monitor.settings.method, "schedule": monitor.schedule.describe()}
    return found


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one case."""
    steps = args.steps or STEPS[args.size][name]
    run(name, args.size, min(50, steps), "on", args.logdir)  # warm up
    rounds = []
    for i in range(args.rounds):
        if args.together:
            rounds.append({what: side_by_side(name, args, steps, what, swapped=i % 2 == 1) for what in VARIANTS[1:]})
            continue
        order = VARIANTS[i % 3 :] + VARIANTS[: i % 3]
        found = {variant: run(name, args.size, steps, variant, args.logdir) for variant in order}
        rounds.append({what: {"off": found["off"], what: found[what]} for what in VARIANTS[1:]})
    ours = [found["on"]["on"] for found in rounds]

    def percent(clock: str, what: str) -> list[float]:
        return [100 * (found[what][what][clock] / found[what]["off"][clock] - 1) for found in rounds]

    return {
        "case": name,
        "steps": steps,
        "together": args.together,
        "step_ms": 1e3 * statistics.median(found["on"]["off"]["cpu"] for found in rounds) / steps,
        "on_cpu_percent": percent("cpu", "on"),
        "control_cpu_percent": percent("cpu", "control"),
        "on_wall_percent": percent("wall", "on"),
        "control_wall_percent": percent("wall", "control"),
        "reported_percent": [100 * found["reported"] for found in ours],
        "measurements": [found["measurements"] for found in ours],
        "method": ours[0]["method"],
        "schedule": ours[0]["schedule"],
    }


def side_by_side(name: str, args: argparse.Namespace, steps: int, what: str, *, swapped: bool) -> dict[str, Any]:
    """A run without a callback and one with, at the same time on two cores."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    workers = {}
    for variant, core in zip(("off", what), reversed(cores) if swapped else cores):
        command = [sys.executable, __file__, "--size", args.size, "--steps", str(steps), "--cases", name]
        command += ["--logdir", str(args.logdir / variant), "--one", f"{variant}:{core}"]
        workers[variant] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    found = {variant: worker.communicate()[0] for variant, worker in workers.items()}
    if any(worker.returncode for worker in workers.values()):
        raise RuntimeError("a run ended with an error, shown above")
    return {variant: json.loads(text.splitlines()[-1]) for variant, text in found.items()}


def num_cores() -> int:
    """Cores that a process can be bound to; none where the system cannot."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def one(args: argparse.Namespace) -> None:
    """One run on one core, its figures as the last line."""
    variant, core = args.one.split(":")
    os.sched_setaffinity(0, {int(core)})
    torch.set_num_threads(1)
    (name,) = args.cases
    run(name, args.size, min(20, args.steps), variant, args.logdir)  # warm up
    print(json.dumps(run(name, args.size, args.steps, variant, args.logdir)))


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table: medians."""
    keys = ("on_cpu_percent", "control_cpu_percent", "on_wall_percent", "reported_percent")
    shares = [f"{statistics.median(found[key]):+.2f} %" for key in keys]
    return (found["case"], f"{found['step_ms']:.2f} ms", *shares, str(found["measurements"]), found["schedule"])


def flux_share(repeats: int = 15) -> float:
    """Time of the four-corner flux over that of one exact measurement, medians, on the demo's MLP."""
    x, labels = digits.digits()
    probe = grsd.Probe(x[:32], torch.nn.functional.one_hot(labels[:32], digits.NUM_CLASSES).float())
    net, loss = digits.mlp(), grsd.resolve_loss("mse")
    state = grsd.measure(net, probe, loss)
    grid = state.budget.grid
    tasks = (lambda: grsd.four_corner_flux(state.state, state.state, grid, 1.0), lambda: grsd.measure(net, probe, loss))
    medians = []
    for each in tasks:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            each()
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    return medians[0] / medians[1]


def drawing_seconds(logdir: Path, steps: int = 100, repeats: int = 3) -> float:
    """CPU seconds of drawing all figures of a run of the demo's MLP into an event file, median; imports left out."""
    x, labels = digits.digits()
    x, y = x[:32], torch.nn.functional.one_hot(labels[:32], digits.NUM_CLASSES).float()
    net = digits.mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    monitor = grsd.ShellMonitor(net, "mse", (x, y), total_steps=steps, max_overhead=None)
    for step in range(steps):
        monitor.step(step, optimizer=optimizer)
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    sink, times = grsd.TensorBoardSink(logdir / "figures"), []
    for step in range(repeats + 1):
        start = time.process_time()
        sink.write(grsd.Emission(step, figures=run_figures(monitor.history)))
        times.append(time.process_time() - start)
    sink.close()
    return statistics.median(times[1:])


class HookTimer(L.Callback):
    """At the end of training, CPU seconds that Lightning spends on one step's hooks of an idle callback and of ours."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        kept, (optimizer,) = trainer.callbacks, trainer.optimizers
        hooks: dict[str, tuple[Any, ...]] = {
            "on_train_batch_start": (None, 0),
            "on_before_zero_grad": (optimizer,),
            "on_before_backward": (None,),
            "on_after_backward": (),
            "on_before_optimizer_step": (optimizer,),
            "on_train_batch_end": (None, None, 0),
        }
        ours = [callback for callback in kept if isinstance(callback, grsd.ShellDynamicsCallback)]
        none, idle, mine = (self._seconds(trainer, callbacks, hooks) for callbacks in ([], [Idle()], ours))
        trainer.callbacks = kept
        self.idle, self.ours = idle - none, mine - none

    def _seconds(self, trainer: L.Trainer, callbacks: list[L.Callback], hooks: dict[str, tuple[Any, ...]]) -> float:
        trainer.callbacks, times = callbacks, []
        for _ in range(7):
            start = time.process_time()
            for _ in range(1000):
                for name, arguments in hooks.items():
                    _call_callback_hooks(trainer, name, *arguments)
            times.append((time.process_time() - start) / 1000)
        return min(times)


def hook_seconds(logdir: Path) -> dict[str, float]:
    """CPU seconds a step of an idle callback and of ours between measurements, the least of seven tries."""
    module, data = task("mlp", "small")
    timer = HookTimer()
    trainer = L.Trainer(
        max_steps=30,
        accelerator="cpu",
        logger=False,
        callbacks=[timer, grsd.ShellDynamicsCallback(figures=False)],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=logdir,
    )
    trainer.fit(module, DataLoader(data, batch_size=BATCH["mlp"], shuffle=True))
    return {"idle": timer.idle, "ours": timer.ours}


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__.splitlines()[0], "overhead")
    parser.add_argument("--steps", type=int, default=None, help="of every run")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--logdir", type=Path, default=Path("logs/bench"))
    parser.add_argument("--together", action="store_true", help="runs side by side on two cores (Linux)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.rounds = args.rounds or ROUNDS[args.size]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if args.one:
        one(args)
        return {}
    if args.together and num_cores() < 2:
        parser.error("--together needs two cores that a process can be bound to (Linux)")
    torch.set_num_threads(args.threads)
    results = []
    for name in common.chosen(STEPS[args.size], args.cases):
        results.append(measure(name, args))
        columns = ("case", "step", "on, CPU", "control, CPU", "on, wall", "reported", "measurements", "schedule")
        print(common.table(columns, [row(results[-1])]), flush=True)
    hooks = hook_seconds(args.logdir)
    print(f"hooks of a step without a measurement: {1e6 * hooks['ours']:.0f} us, idle {1e6 * hooks['idle']:.0f} us")
    share = flux_share()
    print(f"four-corner flux: {100 * share:.1f} % of an exact measurement")
    drawing = drawing_seconds(args.logdir, repeats=min(3, args.rounds))
    print(f"one drawing of all figures: {drawing:.2g} s of one core")
    return common.save(args, results, hook_seconds=hooks, flux_share_of_measurement=share, drawing_seconds=drawing)


if __name__ == "__main__":
    main()
