"""Any training loop: regression on real digits in plain PyTorch, measured by `ShellMonitor`.

Prints the table of the run and leaves logs for TensorBoard and `grsd report`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import grsd_callbacks as grsd


def main(argv: Sequence[str] | None = None) -> grsd.ShellMonitor:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--logdir", type=Path, default=Path("logs/custom_loop"))
    options = parser.parse_args(argv)

    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.data, dtype=torch.float32) / 16
    y = F.one_hot(torch.tensor(data.target), 10).float()
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    logs = [options.logdir, options.logdir / "grsd.jsonl"]  # TensorBoard's files, and one line a measurement
    monitor = grsd.ShellMonitor(model, "mse", (x[:32], y[:32]), total_steps=options.steps, writer=logs)
    for step in range(options.steps):
        monitor.step(step, optimizer=optimizer)  # before the optimizer's step
        batch = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        F.mse_loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
    monitor.finish()  # last measurement, table, figures
    monitor.close()
    print(monitor.summary())
    print(f"\nLook at it:  tensorboard --logdir {options.logdir}    or:  grsd report {options.logdir}")
    return monitor


if __name__ == "__main__":
    main()
