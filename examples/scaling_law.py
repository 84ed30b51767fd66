"""Scaling laws from many runs, and the same laws foretold by a single one.

Linear models see the N leading features of a power-law task (eigenvalues i^-a, squared coefficients i^-(aq + 1)) and
learn it by full-batch gradient descent. Over all runs: loss against parameters, flow time and compute (parameters x
flow time), with `fit_scaling_law`. From the largest run alone: a, q and rho as the monitor measures them, and the laws
that follow from these (`resource_laws`). A toy on purpose: theory says what should come out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import grsd_callbacks as grsd
from grsd_callbacks.testing import PowerLawKernel


def train(x: Tensor, y: Tensor, lr: float, steps: int, monitor: bool = False):
    """Flow times, log-spaced, the losses there, and the monitor if asked for."""
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    watch = (
        grsd.ShellMonitor(model, "mse", (x, y), max_overhead=None, total_steps=steps, work=False, method="exact")
        if monitor
        else None
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    due = {int(k) for k in np.geomspace(4, steps, 40)}
    times, losses = [], []
    for step in range(steps + 1):
        if watch is not None:
            watch.step(step, optimizer=optimizer)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        if step in due:
            times.append(lr * step)
            losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    if watch is not None:
        watch.finish(steps + 1)
    return np.array(times), np.array(losses), watch


def envelope(sizes: Sequence[int], times: np.ndarray, losses: np.ndarray, num: int = 24):
    """Compute C = N t on a grid and the least loss of any size there, where neither end of the sizes is best."""
    compute = np.geomspace(sizes[0] * times[0], sizes[-1] * times[-1], num)
    found = np.full((len(sizes), num), np.inf)
    for k, size in enumerate(sizes):
        t = compute / size
        inside = (t >= times[0]) & (t <= times[-1])
        found[k, inside] = np.exp(np.interp(np.log(t[inside]), np.log(times), np.log(losses[k])))
    best = found.argmin(0)
    inner = (best > 0) & (best < len(sizes) - 1)
    return compute[inner], found.min(0)[inner]


def line(name: str, fit: grsd.PowerLawFit, predicted: grsd.Estimate, theory: float) -> str:
    """An exponent of many runs, the one foretold, and theory's."""
    many = f"refused: {fit.reason}" if fit.refused else f"{fit.exponent:.2f} [{fit.lower:.2f}, {fit.upper:.2f}]"
    foretold = f"{predicted.value:.2f} [{predicted.lower:.2f}, {predicted.upper:.2f}]"
    return f"  {name:24} {many:22} {foretold:22} {theory:.2f}"


def main(argv: Sequence[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", type=int, default=300, help="features of the largest model, and samples")
    parser.add_argument("--sizes", type=int, nargs="+", default=[3, 4, 6, 9, 13, 19, 28, 40])
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--a", type=float, default=1.5)
    parser.add_argument("--q", type=float, default=0.6)
    args = parser.parse_args(argv)
    task = PowerLawKernel(args.modes, args.a, 1 + args.a * args.q)
    features = task.basis * (task.eigenvalues / task.nu).sqrt()
    rows = []
    for size in args.sizes:
        times, loss, _ = train(features[:, :size], task.targets, 0.25, args.steps)
        rows.append(loss + task.loss_tail)  # what an endless task would have beyond these modes
        print(f"  {size:4d} parameters: loss {loss[0]:.4g} -> {loss[-1]:.4g}", flush=True)
    losses, sizes = np.array(rows), np.array(args.sizes, float)
    times_all, loss_all, monitor = train(features, task.targets, 0.25, args.steps, monitor=True)
    print(monitor.summary())
    fits = monitor.final_exponents()
    laws = grsd.resource_laws(fits["a_start"], fits["q"], fits["rho_contour"])
    exact = grsd.resource_laws(args.a, args.q, 1.0)
    low, high = fits["chi_tail"].window if "chi_tail" in fits else (0.0, np.inf)  # frontier within the spectrum
    straight = (times_all >= low) & (times_all <= high)
    over = {
        "size": grsd.fit_scaling_law(sizes, losses[:, -1]),
        "time": grsd.fit_scaling_law(times_all[straight], loss_all[straight] + task.loss_tail),
        "compute": grsd.fit_scaling_law(*envelope(args.sizes, times, losses)),
    }
    print(f"\n  {'loss over':24} {'many runs':22} {'foretold by one':22} theory")
    for name, meaning in (("size", "parameters"), ("time", "flow time"), ("compute", "compute, best split")):
        print(line(meaning, over[name], getattr(laws, name), getattr(exact, name).value))
    split = laws.optimal_size
    print(f"  compute-optimal size N ~ C^{split.value:.2f} [{split.lower:.2f}, {split.upper:.2f}], "
          f"theory {exact.optimal_size.value:.2f}")  # fmt: skip
    return {"fits": over, "laws": laws, "exact": exact, "monitor": monitor}


if __name__ == "__main__":
    main()
