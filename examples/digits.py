"""Train two small nets on real handwritten digits and look at how they learn, scale by scale.

A squared-loss MLP under plain SGD and a cross-entropy CNN under Adam, on scikit-learn's 1,797 digits, with one
callback each. Prints shells, exponents, closures and cost; leaves logs for TensorBoard.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import grsd_callbacks as grsd

NUM_CLASSES = 10
STEPS = {"squared": 15_000, "cross_entropy": 12_000}
#: more than the default 2 %: on nets this small (2 ms a step) that would be a handful of measurements in half a minute
MAX_OVERHEAD = 0.05


class Net(L.LightningModule):
    """A network with its loss as an attribute, which is where loss="auto" finds it."""

    def __init__(self, net: nn.Module, loss: nn.Module, lr: float, adam: bool) -> None:
        super().__init__()
        self.net, self.loss, self.lr, self.adam = net, loss, lr, adam

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return (torch.optim.Adam if self.adam else torch.optim.SGD)(self.parameters(), lr=self.lr)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, NUM_CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.SiLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.GroupNorm(4, 32),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, NUM_CLASSES),
    )


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) in [0, 1] and labels (1797,)."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def train(
    name: str,
    steps: int,
    logdir: Path,
    every_n_steps: int | None,
    measure: bool,
    quiet: bool,
    extra: Sequence[L.Callback] = (),
    figures: bool = True,
    figures_every_n_steps: int | Literal["auto"] = "auto",
) -> dict:
    """Train one of the two nets, with or without the callback."""
    x, labels = digits()
    L.seed_everything(0, verbose=False)
    if name == "squared":
        y: Tensor = F.one_hot(labels, NUM_CLASSES).float()
        module = Net(mlp(), nn.MSELoss(), lr=0.5, adam=False)
    else:
        y, module = labels, Net(cnn(), nn.CrossEntropyLoss(), lr=1e-3, adam=True)
    loader = DataLoader(TensorDataset(x, y), batch_size=128, shuffle=True)
    options = {"every_n_steps": every_n_steps, "max_overhead": MAX_OVERHEAD, "figures": figures}
    options["figures_every_n_steps"] = figures_every_n_steps
    callback = grsd.ShellDynamicsCallback(**options) if measure else None
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=TensorBoardLogger(logdir, name=name),
        callbacks=[*extra, *([callback] if callback is not None else [])],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=not quiet,
        log_every_n_steps=20,
    )
    trainer.fit(module, loader)
    return {"callback": callback, "module": module}


def main(argv: Sequence[str] | None = None) -> dict[str, grsd.ShellDynamicsCallback]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of each net")
    parser.add_argument("--logdir", type=Path, default=Path("logs"), help="where TensorBoard's files go")
    parser.add_argument("--every-n-steps", type=int, default=None, help="fixed cadence instead of the default schedule")
    parser.add_argument(
        "--figures-every-n-steps",
        type=int,
        default=None,
        help="draw heat maps during the run too, however short it is",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")  # its tips on workers and devices
    callbacks = {}
    for name, title in (("squared", "MLP, squared loss, SGD"), ("cross_entropy", "CNN, cross-entropy, Adam")):
        print(f"\n=== {title} ===", flush=True)
        run = train(
            name,
            args.steps or STEPS[name],
            args.logdir,
            args.every_n_steps,
            measure=True,
            quiet=args.quiet,
            figures_every_n_steps=args.figures_every_n_steps or "auto",
        )
        callbacks[name] = run["callback"]
        print(run["callback"].monitor.report)
        print(f"  decided     {run['callback'].monitor.schedule.describe()}")
        print()
        print(run["callback"].summary())
    print(f"\nLook at it:  .venv/bin/tensorboard --logdir {args.logdir}")
    return callbacks


if __name__ == "__main__":
    main()
