"""What `RenormalizabilityCallback` costs at its default cadence: the demo's CNN and MLP, in the callback's own figures.

The overhead counts measuring over the training time without it; nulls and probe-resampling at the end are given apart.
"""

from __future__ import annotations

import logging
import sys
import tempfile
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

from benchmarks import common

STEPS = {"full": 12_000, "small": 4000, "tiny": 12}


def measured(name: str, steps: int) -> dict:
    """One run with the callback alone."""
    x, labels = demo.digits()
    L.seed_everything(0, verbose=False)
    if name == "squared":
        module = demo.Net(demo.mlp(), nn.MSELoss(), lr=0.5, adam=False)
        y = F.one_hot(labels, demo.NUM_CLASSES).float()
    else:
        module, y = demo.Net(demo.cnn(), nn.CrossEntropyLoss(), lr=1e-3, adam=True), labels
    callback = grsd.RenormalizabilityCallback(json_lines=None)
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            max_steps=steps, accelerator="cpu", callbacks=[callback], logger=False, default_root_dir=folder,
            enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        ).fit(module, DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True))  # fmt: skip
    found = callback.conditions
    return {
        "steps": steps,
        "measured_at": [c.step for c in found],
        "seconds_each": [round(c.cost["seconds"], 4) for c in found[:-1]],
        "overhead_percent": 100 * callback.monitor.overhead,
        "final_seconds": callback.monitor.final_seconds,
        "verdicts": {v.condition: v.verdict for v in callback.verdict.verdicts},
    }


def main(argv: Sequence[str] | None = None) -> dict:
    options = common.parser(__doc__.splitlines()[0], "conditions").parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message="grsd: the Trainer has no logger")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    results = {name: measured(name, STEPS[options.size]) for name in ("squared", "cross_entropy")}
    for name, r in results.items():
        print(f"{name}: {r['overhead_percent']:.2f} % in {r['steps']} steps, measured at {r['measured_at']}")
        print(f"  {r['final_seconds']:.2f} s for nulls and resampling at the end, on top")
    return common.save(options, results)


if __name__ == "__main__":
    main()
