"""Analyse a finished run from its checkpoints, without training again.

Trains a small net, saves plain checkpoints, and then calls what you would type for your own:

    grsd checkpoints logs/checkpoints/saved --model examples/checkpoints.py:model --data examples/checkpoints.py:probe
        --loss mse --out logs/checkpoints
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from grsd_callbacks.cli import main as grsd


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, F.one_hot(torch.tensor(data.target), 10).float()


def probe() -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[:32], y[:32]


def train(folder: Path, steps: int) -> None:
    """Plain gradient descent, with a checkpoint at every power of two."""
    folder.mkdir(parents=True, exist_ok=True)
    net, (x, y) = model(), digits()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for step in range(steps + 1):
        if step & (step - 1) == 0:
            state = {"step": step, "model": net.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, folder / f"{step:06d}.pt")
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1024)
    parser.add_argument("--logdir", type=Path, default=Path("logs/checkpoints"))
    options = parser.parse_args(argv)
    train(options.logdir / "saved", options.steps)
    here = str(Path(__file__).resolve())
    words = ["checkpoints", str(options.logdir / "saved"), "--model", f"{here}:model", "--data", f"{here}:probe"]
    return grsd([*words, "--loss", "mse", "--out", str(options.logdir)])


if __name__ == "__main__":
    main()
