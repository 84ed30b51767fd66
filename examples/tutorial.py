"""Draw the pictures of docs/tutorial.md: a small net on real handwritten digits, and what each figure shows of it.

The same code as the tutorial's, but for the folder it writes to.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from digits import Net, digits, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import grsd_callbacks as grsd
from grsd_callbacks.figures import run_figures


def main(argv: Sequence[str] | None = None) -> grsd.ShellDynamicsCallback:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/tutorial"))
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args(argv)

    L.seed_everything(0, verbose=False)
    x, labels = digits()
    loader = DataLoader(TensorDataset(x, F.one_hot(labels, 10).float()), batch_size=128, shuffle=True)
    callback = grsd.ShellDynamicsCallback(max_overhead=None, per_decade=8)
    trainer = L.Trainer(
        max_steps=options.steps, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(mlp(), nn.MSELoss(), lr=0.5, adam=False), loader)
    options.out.mkdir(parents=True, exist_ok=True)
    for tag, draw in run_figures(callback.history, callback.monitor.final_exponents()).items():
        draw().savefig(options.out / f"{tag.split('/')[1]}.png")
    torch.set_printoptions(precision=3)
    print(callback.monitor.report, callback.summary(), sep="\n\n")
    return callback


if __name__ == "__main__":
    main()
