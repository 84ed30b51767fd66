"""Draw the picture of the README: one net on real handwritten digits, all shells over all of its training.

An MLP with squared loss under plain minibatch SGD in a training loop of one's own, measured by `ShellMonitor`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import grsd_callbacks as grsd
from grsd_callbacks.figures import overview

NUM_CLASSES = 10


def digits() -> tuple[Tensor, Tensor]:
    pixels, digit = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), F.one_hot(torch.tensor(digit), NUM_CLASSES).float()


def train(num_steps: int, num_probe: int, width: int, batch_size: int, lr: float, seed: int = 0) -> grsd.ShellMonitor:
    torch.manual_seed(seed)
    inputs, targets = digits()
    hidden = [nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    net = nn.Sequential(*hidden, nn.Linear(width, NUM_CLASSES))
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    probe = inputs[:num_probe], targets[:num_probe]
    monitor = grsd.ShellMonitor(net, "mse", probe, total_steps=num_steps, max_overhead=None)  # every due measurement
    for step in range(num_steps):
        monitor.step(step, optimizer=optimizer)
        batch = torch.randint(len(inputs), (batch_size,))
        optimizer.zero_grad()
        F.mse_loss(net(inputs[batch]), targets[batch]).backward()
        optimizer.step()
    monitor.finish(num_steps)
    return monitor


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("overview.png"), help="the picture")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps")
    parser.add_argument("--num-probe", type=int, default=64, help="digits that the kernel is measured on")
    parser.add_argument("--width", type=int, default=128, help="neurons in a hidden layer")
    parser.add_argument("--batch-size", type=int, default=256, help="digits in a step")
    parser.add_argument("--lr", type=float, default=0.5, help="learning rate")
    options = parser.parse_args(argv)
    monitor = train(options.steps, options.num_probe, options.width, options.batch_size, options.lr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    overview(monitor.history).savefig(options.out)
    print(f"{len(monitor.history)} measurements in {options.steps} steps; picture: {options.out}")
    return options.out


if __name__ == "__main__":
    main()
