"""What does an optimizer do to each scale? SGD, Adam and Muon on real digits, by the effective learning rate of shells.

`W_a / (lr D_a)` is exactly 1 in every shell for full-batch gradient descent on the probe, as here. Adam and Muon (a
matrix optimizer: it orthogonalises the update) favour some scales over others; the table and the picture say by how
much. Muon needs a torch that has it and is left out otherwise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import grsd_callbacks as grsd

OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda p: torch.optim.Muon(p, lr=2e-3, weight_decay=0.0)


def train(make: Callable[[Iterable[Tensor]], torch.optim.Optimizer], steps: int, every: int) -> grsd.ShellMonitor:
    """The same net from the same start, full batch, so that only the optimizer differs."""
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.data[:48], dtype=torch.float32) / 16
    y = F.one_hot(torch.tensor(data.target[:48]), 10).float()
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 10, bias=False))  # Muon: matrices only
    optimizer = make(net.parameters())
    monitor = grsd.ShellMonitor(net, "mse", (x, y), every_n_steps=every, method="exact")
    for step in range(steps):
        monitor.step(step, optimizer=optimizer)
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    monitor.finish()
    return monitor


def rates(monitor: grsd.ShellMonitor) -> dict[float, float]:
    """Median over the run of each shell's effective learning rate, over the median of all shells; by lower edge."""
    per_shell = torch.stack([s.effective_lr for s in monitor.history])
    median = per_shell.nanmedian(0).values
    median = median / median.nanmedian()
    edges = monitor.history[0].edges.tolist()
    return {edge: rate for edge, rate in zip(edges, median[1:].tolist(), strict=True) if rate == rate}


def picture(found: dict[str, dict[float, float]], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure((6.4, 4.0), dpi=100, layout="constrained")
    axes = figure.subplots()
    for (name, by_edge), marker, colour in zip(found.items(), "osD", ("#0072b2", "#d55e00", "#009e73")):
        positive = [rate if rate > 0 else float("nan") for rate in by_edge.values()]  # in shells of rounding's size
        axes.plot(list(by_edge), positive, marker=marker, color=colour, label=name, markersize=4)
    axes.axhline(1, color="0.6", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel=r"kernel eigenvalue $\lambda$  (1 / flow time)",
             ylabel="effective learning rate\n(1: the median shell's)",
             title="What an optimizer does to each scale")  # fmt: skip
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[float, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=10, help="steps between measurements")
    parser.add_argument("--out", type=Path, default=Path("optimizers.png"))
    options = parser.parse_args(argv)
    monitors = {name: train(make, options.steps, options.every) for name, make in OPTIMIZERS.items()}
    found = {name: rates(monitor) for name, monitor in monitors.items()}
    print("effective learning rate of a shell over that of the median shell, median over the run")
    print(f"{'from lambda':>12}" + "".join(f"{name:>10}" for name in found))
    for edge in sorted(set().union(*found.values())):
        print(f"{edge:>12.3g}" + "".join(f"{by_edge[edge]:>10.3g}" if edge in by_edge else f"{'-':>10}"
                                         for by_edge in found.values()))  # fmt: skip
    for name, monitor in monitors.items():
        print(f"{name}: loss {monitor.history[0].loss:.4f} -> {monitor.history[-1].loss:.4f}")
    picture(found, options.out)
    print(f"picture: {options.out}")
    return found


if __name__ == "__main__":
    main()
