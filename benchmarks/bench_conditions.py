"""What `RenormalizabilityCallback` costs at its default cadence: the demo's CNN and MLP, in runs of about a minute.

The callback's own account: measuring (set-up and every hook included) over the training time without it, nulls and
probe-resampling at the end given apart. Beside it pairs of runs with and without the callback, in changing order, by
CPU time of the process, which a busy machine disturbs less, and by wall-clock time; the end's part is taken out there
too. JSON with the environment goes to benchmarks/results/.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import grsd_callbacks as grsd

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits as demo

from benchmarks import bench_overhead, common

#: optimizer steps by size and net, and pairs of runs
STEPS = {
    "full": {"squared": 36_000, "cross_entropy": 15_000},
    "small": {"squared": 4000, "cross_entropy": 4000},
    "tiny": {"squared": 12, "cross_entropy": 12},
}
PAIRS = {"full": 3, "small": 1, "tiny": 1}


class TimedMonitor(grsd.RenormalizabilityMonitor):
    """Also the CPU time of the end."""

    final_cpu = 0.0

    def _conclude(self) -> None:
        began = time.process_time()
        super()._conclude()
        self.final_cpu = time.process_time() - began


class TimedCallback(grsd.RenormalizabilityCallback):
    """The callback, with that monitor."""

    _monitor_type = TimedMonitor


def trained(name: str, steps: int, measure: bool) -> dict:
    """Seconds of one training run, those of the callback's end taken out, and the callback if there was one."""
    x, labels = demo.digits()
    L.seed_everything(0, verbose=False)
    if name == "squared":
        module = demo.Net(demo.mlp(), nn.MSELoss(), lr=0.5, adam=False)
        y = F.one_hot(labels, demo.NUM_CLASSES).float()
    else:
        module, y = demo.Net(demo.cnn(), nn.CrossEntropyLoss(), lr=1e-3, adam=True), labels
    watch, callback = bench_overhead.Stopwatch(), TimedCallback(json_lines=None) if measure else None
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=[watch, *([callback] if callback else [])], logger=False,
            default_root_dir=folder, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False,
        ).fit(module, DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True))  # fmt: skip
    cpu, wall = watch.cpu, watch.wall
    if callback is not None:
        cpu, wall = cpu - callback.monitor.final_cpu, wall - callback.monitor.final_seconds
    return {"cpu": cpu, "wall": wall, "callback": callback}


def measured(name: str, steps: int, pairs: int) -> dict:
    """Figures of one net: the median pair, and what the callback says of itself in the median run."""
    rounds = []
    for pair in range(pairs):
        order = (False, True) if pair % 2 else (True, False)
        rounds.append({on: trained(name, steps, on) for on in order})
    callbacks = sorted((found[True]["callback"] for found in rounds), key=lambda c: c.monitor.overhead)
    callback = callbacks[len(callbacks) // 2]
    found = callback.conditions

    def percent(clock: str) -> list[float]:
        return [100 * (found[True][clock] / found[False][clock] - 1) for found in rounds]

    return {
        "steps": steps,
        "training_cpu_seconds": statistics.median(found[False]["cpu"] for found in rounds),
        "measured_at": [c.step for c in found],
        "seconds_each": [round(c.cost["seconds"], 4) for c in found[:-1]],
        "overhead_percent": 100 * callback.monitor.overhead,
        "overhead_percent_of_runs": [100 * c.monitor.overhead for c in callbacks],
        "schedule": callback.monitor.schedule.describe(),
        "paired_cpu_percent": percent("cpu"),
        "paired_wall_percent": percent("wall"),
        "final_seconds": callback.monitor.final_seconds,
        "verdicts": {v.condition: v.verdict for v in callback.verdict.verdicts},
    }


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__.splitlines()[0], "conditions")
    parser.add_argument("--pairs", type=int, default=None, help="pairs of runs with and without the callback")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="grsd: the Trainer has no logger")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    pairs = options.pairs or PAIRS[options.size]
    cases = common.chosen(STEPS[options.size], options.cases)
    results = {name: measured(name, steps, pairs) for name, steps in cases.items()}
    for name, r in results.items():
        print(
            f"{name}: {r['overhead_percent']:.2f} % by its own account in "
            f"{r['steps']} steps of {r['training_cpu_seconds']:.0f} s CPU, measured at {r['measured_at']}"
        )
        print(
            f"  pairs: CPU {statistics.median(r['paired_cpu_percent']):+.2f} %, "
            f"wall {statistics.median(r['paired_wall_percent']):+.2f} % (medians of {pairs})"
        )
        print(f"  {r['final_seconds']:.2f} s for nulls and resampling at the end, on top")
    return common.save(options, results)


if __name__ == "__main__":
    main()
