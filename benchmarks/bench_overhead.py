"""What the callback costs: paired training runs with and without it, on the demo's nets, default schedule.

Each pair trains the same net twice, in alternating order, and compares wall-clock time of `fit` without set-up; the
median over pairs of the ratio is set against the overhead that the callback itself reports. JSON with the environment
goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch

import grsd_callbacks as grsd

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import digits

#: optimizer steps of a run, and pairs of runs
SIZES = {"tiny": (60, 1), "small": (2000, 3), "full": (4000, 5)}
RESULTS = Path(__file__).parent / "results"


class Stopwatch(L.Callback):
    """Seconds from the first batch to the end of training, whatever other callbacks do in between."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.start


def run(name: str, steps: int, measure: bool, logdir: Path) -> tuple[float, grsd.ShellDynamicsCallback | None]:
    """Seconds of training and the callback, if there was one."""
    watch = Stopwatch()
    found = digits.train(name, steps, logdir, None, measure=measure, quiet=True, extra=[watch], figures=False)
    return watch.seconds, found["callback"]


def flux_share(repeats: int = 15) -> float:
    """Time of the four-corner flux over that of one exact measurement, medians, on the demo's MLP."""
    x, labels = digits.digits()
    probe = grsd.Probe(x[:32], torch.nn.functional.one_hot(labels[:32], digits.NUM_CLASSES).float())
    net, loss = digits.mlp(), grsd.resolve_loss("mse")
    state = grsd.measure(net, probe, loss)
    grid = state.budget.grid
    tasks = (lambda: grsd.four_corner_flux(state.state, state.state, grid, 1.0), lambda: grsd.measure(net, probe, loss))
    medians = []
    for task in tasks:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            task()
            times.append(time.perf_counter() - start)
        medians.append(statistics.median(times))
    return medians[0] / medians[1]


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="full", help="steps and pairs of runs")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--pairs", type=int, default=None)
    parser.add_argument("--logdir", type=Path, default=Path("logs/bench"))
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    args = parser.parse_args(argv)
    steps, pairs = args.steps or SIZES[args.size][0], args.pairs or SIZES[args.size][1]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    results = {}
    for name in ("squared", "cross_entropy"):
        run(name, 50, True, args.logdir)  # warm up
        ratios, reported, counts = [], [], []
        for pair in range(pairs):
            seconds = {}
            for measure in (True, False) if pair % 2 else (False, True):
                seconds[measure], callback = run(name, steps, measure, args.logdir)
                if callback is not None:
                    reported.append(100 * callback.monitor.overhead)
                    counts.append(len(callback.history))
            ratios.append(100 * (seconds[True] / seconds[False] - 1))
        results[name] = {
            "steps": steps,
            "measured_overhead_percent": statistics.median(ratios),
            "all_pairs_percent": ratios,
            "reported_overhead_percent": statistics.median(reported),
            "measurements": counts,
        }
        print(
            f"{name}: {results[name]['measured_overhead_percent']:.2f} % measured (median of {pairs} pairs), "
            f"{results[name]['reported_overhead_percent']:.2f} % reported, {counts} measurements"
        )
    share = flux_share()
    print(f"four-corner flux: {100 * share:.1f} % of an exact measurement")
    record = {"results": results, "flux_share_of_measurement": share, "environment": environment()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def environment() -> dict[str, object]:
    """What a reader needs to judge the figures."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "grsd_callbacks": grsd.__version__,
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


if __name__ == "__main__":
    main()
