"""Double descent in scales: the test error peaks where the kernel has eigenvalues just above zero, and late.

Ridgeless regression with noise under gradient flow, the number of parameters p swept through the number of samples n.
The kernel of training and test samples together says what the flow has learned at any time t,
`f_test(t) = K_test K_train^-1 (1 - exp(-M t)) y`; noise in a shell of eigenvalue lambda is amplified by
`(1 - e^(-lambda t))^2 / lambda`, so the peak at p = n needs both small eigenvalues and t above 1 / lambda_min. First
for isotropic inputs, where theory is exact, then for random features of handwritten digits with flipped labels.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import grsd_callbacks as grsd
from grsd_callbacks.exponents.intervals import student_quantile
from grsd_callbacks.testing import RidgelessRegression

NOISE, FLIPPED = 0.5, 0.2
Data = tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]


def isotropic(n: int, p: int, seed: int) -> tuple[Data, RidgelessRegression]:
    """A linear model, noisy training data, clean test data; and the closed form."""
    law = RidgelessRegression(num_samples=n, num_params=p, noise=NOISE, seed=seed)
    x_test = torch.randn(400, p, generator=torch.Generator().manual_seed(seed + 10**6), dtype=torch.float64)
    return (law.model(), law.inputs, law.targets, x_test, (x_test @ law.weights)[:, None]), law


class RandomFeatures(nn.Module):
    """Fixed tanh features under a trained head that starts at zero."""

    def __init__(self, num_inputs: int, p: int, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        body = torch.randn(num_inputs, p, generator=random, dtype=torch.float64) / math.sqrt(num_inputs)
        self.register_buffer("body", body)
        self.head = nn.Parameter(torch.zeros(p, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.body) @ self.head / math.sqrt(len(self.head))


def digits(n: int, p: int, seed: int) -> Data:
    """Odd or even, a fifth of the training labels flipped."""
    pixels, labels = load_digits(return_X_y=True)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pixels), generator=random)[: n + 400]
    x = torch.tensor(pixels / 8 - 0.6, dtype=torch.float64)[order]
    y = torch.tensor(labels, dtype=torch.float64)[order, None] % 2 * 2 - 1
    flips = torch.where(torch.rand(n, 1, generator=random) < FLIPPED, -1.0, 1.0)
    return RandomFeatures(64, p, seed), x[:n], y[:n] * flips, x[n:], y[n:]


def errors(data: Data, relative_times: Sequence[float]) -> tuple[list[float], dict[str, float]]:
    """Test error of gradient flow at times t = s / lambda_max (inf: its end), and what the kernel looks like."""
    net, x, y, x_test, y_test = data
    n = len(x)
    K = grsd.NTKOperator(net, torch.cat([x, x_test])).gram()
    residual = grsd.resolve_loss("mse").evaluate(net(x).detach(), y)
    spectrum = grsd.eigendecomposition(K[:n, :n], residual.nu)
    lam, u = spectrum.eigenvalues, spectrum.eigenvectors
    known = lam > 1e-10 * lam[-1]
    g, to_test = u.T @ y, residual.nu * K[n:, :n] @ u
    found = []
    for s in relative_times:
        learned = torch.where(known, -torch.expm1(-lam * (s / lam[-1])) / lam.clamp_min(1e-300), 0.0)
        found.append(float((to_test @ (learned[:, None] * g) - y_test).square().mean()))
    least = float(lam[known].min() / lam[-1])
    return found, {"lambda_min": least, "rank": float(known.sum())}


def sweep(make, sizes: Sequence[int], seeds: int, times: Sequence[float], quiet: bool, name: str) -> dict:
    """Test errors (sizes, seeds, times) and smallest eigenvalues (sizes, seeds)."""
    shape = (len(sizes), seeds)
    out = {"error": np.zeros((*shape, len(times))), "lambda_min": np.zeros(shape)}
    for i, p in enumerate(tqdm(sizes, desc=name, disable=quiet)):
        for seed in range(seeds):
            out["error"][i, seed], facts = errors(make(p, seed), times)
            out["lambda_min"][i, seed] = facts["lambda_min"]
    return out


def theory(n: int, sizes: Sequence[int], seeds: int, times: Sequence[float]) -> np.ndarray:
    """Bias + variance of problem 7 at the same times, mean over seeds, (sizes, times)."""
    out = np.zeros((len(sizes), seeds, len(times)))
    for i, p in enumerate(sizes):
        for seed in range(seeds):
            law = isotropic(n, p, seed)[1]
            top = float(law.eigenvalues.max())
            out[i, seed] = [law.bias(s / top) + law.variance(s / top) for s in times]
    return out.mean(1)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean, lower and upper end of its 95 % interval."""
    n, logs = len(values), np.log(values)
    half = student_quantile(0.95, n - 1) * logs.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return math.exp(logs.mean()), math.exp(logs.mean() - half), math.exp(logs.mean() + half)


def report(results: dict, options: argparse.Namespace, times: Sequence[float], command: str) -> str:
    n, sizes = options.samples, options.sizes
    lines = ["# Double descent in scales", "", f"Made by `{command}`.", "", (__doc__ or "").split("\n\n", 1)[1].strip()]
    lines += ["", f"n = {n}; test error without label noise, geometric mean over {options.seeds} seeds with 95 %"]
    lines += ["intervals (Student, of the logarithm: single draws at p = n differ by powers of ten).", ""]
    for name, found in results.items():
        early, ends = (np.exp(np.log(found["error"][:, :, k]).mean(1)) for k in (0, -1))
        peak = int(ends.argmax())
        lines += [
            f"- {name}: at the end of the flow the error peaks at p = {sizes[peak]} (p / n = {sizes[peak] / n:.2g}), "
            f"{ends[peak] / ends[-1]:.3g} times that of the widest; at t = {times[0]:g} / lambda_max the error there "
            f"is {early[peak] / early[-1]:.2g} times that of the widest."
        ]
    law = results["isotropic"]
    gap = np.abs(law["error"].mean(1) / law["theory"] - 1)
    lines += [
        f"- isotropic: the mean error differs from theory (dashed) by {np.median(gap):.1%} in the median, at most "
        f"{gap.max():.0%}: theory averages over beta and noise given X, and one draw of each is seen.",
        "",
    ]
    for name, found in results.items():
        head = ["p", "lambda_min / lambda_max", *(f"t = {s:g} / lambda_max" for s in times)]
        lines += [f"## {name}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for i, p in enumerate(sizes):
            cells = ["{:.3g} [{:.3g}, {:.3g}]".format(*interval(found["error"][i, :, k])) for k in range(len(times))]
            least = math.exp(float(np.log(found["lambda_min"][i]).mean()))
            lines.append("| " + " | ".join([str(p), f"{least:.1e}", *cells]) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(results: dict, options: argparse.Namespace, times: Sequence[float], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for ax, (name, found) in zip(figure.subplots(1, 2), results.items(), strict=True):
        for k, s in enumerate(times):
            colour = colormaps["viridis"](0.9 * k / max(len(times) - 1, 1))
            mean, low, high = np.array([interval(values) for values in found["error"][:, :, k]]).T
            text = f"t = {s:g} / $\\lambda_{{\\max}}$"
            bars = [mean - low, high - mean]
            ax.errorbar(options.sizes, mean, bars, color=colour, marker="o", markersize=3, capsize=2, label=text)
            if "theory" in found:
                ax.plot(options.sizes, found["theory"][:, k], "--", color=colour)
        ax.axvline(options.samples, color="0.7")
        ax.set(xscale="log", yscale="log", xlabel="parameters p", ylabel="test error", title=name)
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("double_descent"), help="folder of table and figure")
    parser.add_argument("--samples", type=int, default=100, help="training samples n")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 40, 60, 80, 90, 100, 110, 130, 200, 400, 1000])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    n, times = options.samples, (30.0, 1e3, math.inf)
    results = {
        "isotropic": sweep(
            lambda p, s: isotropic(n, p, s)[0], options.sizes, options.seeds, times, options.quiet, "isotropic"
        ),
        "digits": sweep(lambda p, s: digits(n, p, s), options.sizes, options.seeds, times, options.quiet, "digits"),
    }
    results["isotropic"]["theory"] = theory(n, options.sizes, options.seeds, times)
    text = report(results, options, times, f"python examples/double_descent.py --out {options.out}")
    (options.out / "README.md").write_text(text + "\n")
    draw(results, options, times, options.out / "double_descent.png")
    print(text)
    return results


if __name__ == "__main__":
    main()
