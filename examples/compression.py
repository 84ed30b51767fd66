"""Learning and compression of one net on real digits: what pruning modes and rounding weights cost after training.

Trains a small MLP with the squared loss, full batch, on some of scikit-learn's digits, then (1) truncates the learned
function in the spectrum of the first kernel, (2) rounds the weights, and prints the exponents with their intervals.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import grsd_callbacks as grsd

NUM_CLASSES = 10


def digits(num: int) -> tuple[Tensor, Tensor]:
    """Images (num, 64), centred, and one-hot targets (num, 10), centred over classes."""
    data = load_digits()
    x = torch.tensor(data.data[:num], dtype=torch.float64) / 16
    y = F.one_hot(torch.tensor(data.target[:num]), NUM_CLASSES).double()
    return x - x.mean(0), y - y.mean(1, keepdim=True)


def train(num: int, width: int, steps: int, lr: float) -> tuple[nn.Module, grsd.ShellMonitor, tuple[Tensor, Tensor]]:
    """Full-batch gradient descent, measured on its own training set."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, NUM_CLASSES)).double()
    x, y = digits(num)
    monitor = grsd.ShellMonitor(net, "mse", (x, y), max_overhead=None, total_steps=steps, work=False, method="exact")
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for step in range(steps):
        monitor.step(step, optimizer=optimizer)
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    monitor.finish(steps)
    return net, monitor, (x, y)


def line(name: str, fit: grsd.PowerLawFit) -> str:
    """One exponent with its interval, or why there is none."""
    if fit.refused:
        return f"  {name:34} refused: {fit.reason}"
    value = f"{fit.exponent:.2f} [{fit.lower:.2f}, {fit.upper:.2f}]"
    return f"  {name:34} {value:22} {fit.num_decades:.1f} decades, {fit.verdict.replace('_', ' ')}"


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=40, help="digits to train on")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--lr", type=float, default=1.0)
    args = parser.parse_args(argv)
    net, monitor, probe = train(args.samples, args.width, args.steps, args.lr)
    print(monitor.summary())
    fits = monitor.final_exponents()
    learned = monitor.run.compression(fits)
    print("\npruning: the learned function cut below lambda_c in the first kernel's spectrum")
    for cut, loss in list(zip(learned.cuts, learned.loss))[:: max(len(learned.cuts) // 8, 1)]:
        print(f"  lambda_c {cut:9.3g}   loss {loss:9.4g}")
    print(line("pi_c of L_prune ~ lambda_c^pi_c", learned.pi_c))
    if "densing" in fits:
        print(line("densing of k* ~ t^densing", fits["densing"]))
    ratio, gap = learned.chi_over_pi_c, learned.invariant
    print(f"  chi / pi_c {ratio.value:.2f} [{ratio.lower:.2f}, {ratio.upper:.2f}]; less rho: "
          f"{gap.value:.2f} [{gap.lower:.2f}, {gap.upper:.2f}]")  # fmt: skip
    rounded = grsd.quantisation_exponents(net, "mse", probe)
    print("\nrounding the weights to b bits")
    for b, loss, energy in zip(rounded.bits, rounded.loss, rounded.energy):
        print(f"  {b:3d} bits   loss {loss:9.4g}   outputs moved by {energy:9.3g}")
    print(line("energy over the step (2 if small)", rounded.step))
    print(line("energy a mode over lambda (1)", rounded.spread))
    return {"monitor": monitor, "pruning": learned, "rounding": rounded}


if __name__ == "__main__":
    main()
