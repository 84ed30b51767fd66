"""Stop a Lightning run and resume it: one history, one set of shells, one frozen basis, as if nothing had happened.

The callback's state is in the Trainer's checkpoint. Only the flux over the gap is unknown, and says so.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from digits import Net, digits, mlp
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import grsd_callbacks as grsd


def fit(logdir: Path, max_steps: int, every: int, ckpt: Path | None) -> tuple[grsd.ShellDynamicsCallback, L.Trainer]:
    """Train up to `max_steps`, from a checkpoint if there is one."""
    torch.manual_seed(0)
    x, labels = digits()
    loader = DataLoader(TensorDataset(x, F.one_hot(labels, 10).float()), batch_size=128, shuffle=True)
    callback = grsd.ShellDynamicsCallback(every_n_steps=every)
    trainer = L.Trainer(
        max_steps=max_steps, accelerator="cpu", logger=TensorBoardLogger(logdir, name="", version=""),
        callbacks=[callback], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Net(mlp(), nn.MSELoss(), lr=0.5, adam=False), loader, ckpt_path=ckpt)
    return callback, trainer


def main(argv: Sequence[str] | None = None) -> grsd.ShellDynamicsCallback:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="in all; the run is stopped half-way")
    parser.add_argument("--logdir", type=Path, default=Path("logs/resume"))
    options = parser.parse_args(argv)
    every, half = max(1, options.steps // 8), options.steps // 2

    _, trainer = fit(options.logdir, half, every, None)
    checkpoint = options.logdir / "half.ckpt"
    trainer.save_checkpoint(checkpoint)
    callback, _ = fit(options.logdir, options.steps, every, checkpoint)
    for s in callback.history:
        print(f"step {s.step:5d}  loss {s.loss:.5f}  flux {'known' if s.flux.isfinite().all() else s.reasons['flux']}")
    print(callback.summary())
    return callback


if __name__ == "__main__":
    main()
