"""Are residual nets closer to log-shift invariance than plain ones? The published claim as an open experiment.

Residual and plain nets share parameters, activations and forward gain: every layer is scaled by a fixed number so that
activations keep their size at the start. Full-batch gradient descent at the same lr x lambda_max on the samples that
the kernel is measured on; tanh, so that the kernel's velocity has no kinks; one scalar output. Finished runs are lines
of a JSON file; a run that is there is not repeated, so the script can be stopped and started at will.
"""

from __future__ import annotations

import argparse
import itertools
import json
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
from grsd_callbacks.schedule import log_points

FACTORS = ("data", "net", "norm", "depth")
NUMBERS = ("defect", "zeta", "adjusted_r2", "floor", "locality", "kernel_speed", "cross_share", "mean_coherence",
           "spread", "loss", "kernel_drift", "lr_lambda_max", "num_shells")  # fmt: skip
WIDTH = {"mlp": 32, "cnn": 8}


PREAMBLE = """{num} runs. Defect, floor and R^2 as in `grsd.log_shift_invariance`, couplings along gradient flow; means
over seeds with 95 % intervals (Student), differences by pairs of one seed; "during training" is the mean over the
measurements after the first. The floor is what the finite number of modes would give to Gaussian couplings. The
definition of the defect is this package's own: the protocol of arXiv:2512.18209 is not known to us, so this tests its
statement in words (approximate log-shift invariance in residual nets, degraded without skips), not its figures."""


# ---- data ----


def digits(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (num, 64) of zero mean and unit variance over all pixels, and odd or even as +1 or -1."""
    pixels, labels = load_digits(return_X_y=True)
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:num]
    x = torch.tensor(pixels, dtype=torch.float32)[chosen]
    return (x - x.mean()) / x.std(), torch.tensor(labels)[chosen, None].float() % 2 * 2 - 1


def power_law(num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random 8 x 8 fields with spectrum k^-2, and a target whose components fall as 1/j, both of unit variance."""
    random = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)))[0]  # components
    waves = torch.fft.fftfreq(8)
    size = (waves[:, None] ** 2 + waves[None, :] ** 2).sqrt().clamp_min(waves[1]) ** -1
    noise = torch.randn(num, 8, 8, generator=random)
    fields = torch.fft.ifft2(torch.fft.fft2(noise) * size).real
    parts = torch.sin(2 * noise.flatten(1) @ basis)
    y = parts @ (1 / torch.arange(1.0, 65.0))
    return (fields / fields.std()).flatten(1), ((y - y.mean()) / y.std())[:, None]


DATA = {"digits": digits, "power_law": power_law}


# ---- nets ----


class Net(nn.Module):
    """Stem, `depth` blocks of norm, tanh and linear map (or convolution), and a linear head."""

    gains: Tensor

    def __init__(self, net: str, norm: str, depth: int, residual: bool) -> None:
        super().__init__()
        width = WIDTH[net]
        self.residual, self.convolutional = residual, net == "cnn"
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1) if self.convolutional else nn.Linear(64, width)
        self.blocks = nn.ModuleList(self._block(width, norm) for _ in range(depth))
        self.head = nn.Linear(width * (4 if self.convolutional else 1), 1)
        self.register_buffer("gains", torch.ones(depth + 2))

    def _block(self, width: int, norm: str) -> nn.Module:
        if self.convolutional:
            parts: list[nn.Module] = [nn.GroupNorm(1, width)] if norm == "layer" else []
            return nn.Sequential(*parts, nn.Tanh(), nn.Conv2d(width, width, 3, padding=1))
        parts = [nn.LayerNorm(width)] if norm == "layer" else []
        return nn.Sequential(*parts, nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x, calibrate=False)

    def _run(self, x: Tensor, calibrate: bool) -> Tensor:
        h = self.stem(x.view(-1, 1, 8, 8) if self.convolutional else x)
        h = self._scaled(h, 0, calibrate)
        for k, block in enumerate(self.blocks, 1):
            h = self._scaled(h + block(h) if self.residual else block(h), k, calibrate)
        if self.convolutional:
            h = nn.functional.adaptive_avg_pool2d(h, 2).flatten(1)
        return self._scaled(self.head(torch.tanh(h)), len(self.blocks) + 1, calibrate)

    def _scaled(self, h: Tensor, k: int, calibrate: bool) -> Tensor:
        if calibrate:
            self.gains[k] = 1 / h.square().mean().sqrt()
        return self.gains[k] * h

    @torch.no_grad()
    def calibrated(self, x: Tensor) -> Net:
        """The same net with gains that give every layer's activations a mean square of 1 on x."""
        self._run(x, calibrate=True)
        return self


# ---- one run ----


def run(case: dict, num_samples: int, num_steps: int, num_measurements: int) -> dict:
    """Train one net and measure it; a record of plain numbers, one list entry a measurement."""
    x, y = DATA[case["data"]](num_samples, case["seed"])
    torch.manual_seed(case["seed"])
    net = Net(case["net"], case["norm"], case["depth"], case["skip"] == "residual").calibrated(x)
    settings = grsd.ConditionSettings(num_steps=2, num_vectors=2, num_resamples=0)
    start = grsd.NTKOperator(net, x).gram()
    largest = 2 / num_samples * float(torch.linalg.eigvalsh(start)[-1])
    lr, grid, rows = 0.3 / largest, None, []
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    due = measured_steps(num_steps, num_measurements)
    for step in range(num_steps + 1):
        if step in due:
            found = grsd.measure_conditions(net, (x, y), "mse", settings, grid, thorough=False)
            grid = grsd.ShellGrid(found.edges)
            kernel = grsd.NTKOperator(net, x).gram()
            top = 2 / num_samples * float(torch.linalg.eigvalsh(kernel)[-1])
            drift = float((kernel - start).norm() / start.norm())
            rows.append(numbers(found, drift, lr * top))
        optimizer.zero_grad()
        nn.functional.mse_loss(net(x), y).backward()
        optimizer.step()
    parameters = sum(p.numel() for p in net.parameters())
    series = {name: [row[name] for row in rows] for name in NUMBERS}
    return {**case, "num_parameters": parameters, "steps": due, **series}


def measured_steps(num_steps: int, num: int) -> list[int]:
    """0, and `num` - 1 log-spaced steps up to the last."""
    points = [s for s in log_points(1, num_steps, 20) if s >= min(10, num_steps)] or [num_steps]
    picked = np.geomspace(num_steps, points[0], max(num - 1, 1)).round().astype(int).tolist()
    return sorted({0, *picked})


def numbers(found: grsd.Conditions, drift: float, lr_lambda_max: float) -> dict[str, float | None]:
    c = found.couplings
    values = {
        "defect": c.defect,
        "zeta": c.zeta,
        "adjusted_r2": c.adjusted_r2,
        "floor": c.floor,
        "locality": c.locality,
        "kernel_speed": found.evolution.kernel_speed,
        "cross_share": found.incoherence.cross_share,
        "mean_coherence": found.incoherence.mean,
        "spread": found.propagation.spread,
        "loss": found.loss,
        "kernel_drift": drift,
        "lr_lambda_max": lr_lambda_max,
        "num_shells": float(len(c.shells)),
    }
    return {name: float(f"{v:.6g}") if math.isfinite(v) else None for name, v in values.items()}


# ---- the experiment ----


def cases(options: argparse.Namespace) -> list[dict]:
    grid = itertools.product(
        range(options.seeds), options.data, options.nets, options.norms, options.depths, ("residual", "plain")
    )
    return [dict(zip(("seed", *FACTORS, "skip"), values, strict=True)) for values in grid]


def key(record: dict) -> tuple:
    return tuple(record[name] for name in ("seed", *FACTORS, "skip"))


def completed(path: Path) -> list[dict]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def train_all(options: argparse.Namespace, path: Path) -> list[dict]:
    done = {key(r) for r in completed(path)}
    todo = [case for case in cases(options) if key(case) not in done]
    for case in tqdm(todo, desc="runs", disable=options.quiet):
        record = run(case, options.samples, options.steps, options.measurements)
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    wanted = {key(case) for case in cases(options)}
    return [r for r in completed(path) if key(r) in wanted]


# ---- what comes out ----


def of_run(record: dict, name: str, when: str) -> float:
    """One number of a run: at the start, or the mean over the later measurements."""
    values = [math.nan if v is None else v for v in record[name]]
    picked = values[:1] if when == "start" else values[1:]
    known = [v for v in picked if math.isfinite(v)]
    return float(np.mean(known)) if known else math.nan


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval (Student) over seeds."""
    known = np.array([v for v in values if math.isfinite(v)])
    if len(known) < 2:
        return (float(known[0]) if len(known) else math.nan), math.nan
    error = float(known.std(ddof=1)) / math.sqrt(len(known))
    return float(known.mean()), student_quantile(0.95, len(known) - 1) * error


def compared(records: list[dict], name: str, when: str) -> list[dict]:
    """Residual against plain in every group of runs that differ in skip and seed only, by pairs of one seed."""
    rows = []
    for group in dict.fromkeys(tuple(r[f] for f in FACTORS) for r in records):
        inside = [r for r in records if tuple(r[f] for f in FACTORS) == group]
        by = {(r["skip"], r["seed"]): of_run(r, name, when) for r in inside}
        seeds = sorted({r["seed"] for r in inside})
        pairs = [by.get(("residual", s), math.nan) - by.get(("plain", s), math.nan) for s in seeds]
        row = dict(zip(FACTORS, group, strict=True))
        row["difference"] = interval(pairs)
        for skip in ("residual", "plain"):
            row[skip] = interval([by.get((skip, s), math.nan) for s in seeds])
        rows.append(row)
    return rows


def sentence(rows: list[dict]) -> str:
    told = [row["difference"] for row in rows if math.isfinite(row["difference"][1])]
    below = sum(mean + half < 0 for mean, half in told)
    above = sum(mean - half > 0 for mean, half in told)
    return (
        f"of {len(told)} comparisons, the residual nets' value is lower in {below}, higher in {above}, and not told "
        f"apart in {len(told) - below - above} (95 % intervals; by chance alone {0.05 * len(told):.1g} would differ)"
    )


def table(rows: list[dict]) -> list[str]:
    lines = ["| data | net | norm | depth | residual | plain | difference |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[name][0]:.3f} +- {row[name][1]:.3f}" for name in ("residual", "plain", "difference")]
        lines.append("| " + " | ".join([*(str(row[f]) for f in FACTORS), *cells]) + " |")
    return lines


def report(records: list[dict], command: str) -> str:
    """The result as Markdown: what is supported, what is not, and the numbers."""
    shown = (
        ("defect", "later", "Toeplitz defect during training (0 is exact log-shift invariance)"),
        ("defect", "start", "Toeplitz defect at initialization"),
        ("floor", "later", "Floor of the defect during training (a confounder: how many modes the shells hold)"),
        ("adjusted_r2", "later", "Adjusted R^2 of the fit during training"),
        ("kernel_drift", "later", "Kernel drift during training (a confounder: how far the kernel has moved)"),
    )
    compared_rows = {(name, when): compared(records, name, when) for name, when, _ in shown}
    lines = ["# Residual against plain nets: log-shift invariance of the couplings", "", f"Made by `{command}`.", ""]
    lines += [PREAMBLE.format(num=len(records)), ""]
    lines += [f"- {title}: {sentence(compared_rows[name, when])}." for name, when, title in shown]
    lines += ["", *verdict(compared_rows["defect", "later"]), ""]
    for name, when, title in shown:
        lines += [f"## {title}", "", *table(compared_rows[name, when]), ""]
    return "\n".join(lines)


def verdict(rows: list[dict]) -> list[str]:
    """What the comparisons support: by depth, since the claim is about depth, and by kind of net."""
    lines = ["Defect during training, by depth and by kind of net:", ""]
    for factor in ("depth", "net"):
        for value in dict.fromkeys(row[factor] for row in rows):
            lines.append(f"- {factor} {value}: {sentence([row for row in rows if row[factor] == value])}.")
    told = [row["difference"] for row in rows if math.isfinite(row["difference"][1])]
    below = sum(mean + half < 0 for mean, half in told)
    above = sum(mean - half > 0 for mean, half in told)
    supported = bool(told) and below > len(told) / 2 and above <= 0.05 * len(told) + 1
    claim = "that residual nets are closer to log-shift invariance than matched plain ones"
    if supported:
        lines += ["", f"Supported here: {claim}. Not supported: that this holds in every setting, or at other sizes."]
    else:
        lines += ["", f"Not supported here as a general statement: {claim}. The rows below say where it does hold."]
    lines += ["A confounder is not removed: kernels of the two kinds of nets move by different amounts (drift above);"]
    lines += ["only at initialization have both not moved.", ""]
    lines += ["Not tested: wide or deep nets beyond these, other activations, minibatch noise, other optimizers."]
    return lines


def draw(records: list[dict], path: Path) -> None:
    """Defect during training against depth, one panel a setting."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = compared(records, "defect", "later")
    columns = list(dict.fromkeys((r["data"], r["net"]) for r in rows))
    norms = list(dict.fromkeys(r["norm"] for r in rows))
    figure = Figure(figsize=(3.2 * len(columns), 2.7 * len(norms)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(norms), len(columns), squeeze=False, sharey=True)
    for (i, norm), (j, (data, net)) in itertools.product(enumerate(norms), enumerate(columns)):
        ax = axes[i, j]
        panel = [r for r in rows if (r["norm"], r["data"], r["net"]) == (norm, data, net)]
        for skip, colour, marker in (("residual", "#0072b2", "o"), ("plain", "#d55e00", "s")):
            mean, half = zip(*(r[skip] for r in panel), strict=True)
            ax.errorbar([r["depth"] for r in panel], mean, half, color=colour, marker=marker, capsize=3, label=skip)
        ax.set_xscale("log", base=2)
        ax.set_title(f"{net}, {data}, norm: {norm}", fontsize=9)
        ax.set_xlabel("blocks")
    for row in axes:
        row[0].set_ylabel("defect of log R")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("residual_vs_plain"), help="folder of runs, table and figure")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each setting")
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16], help="numbers of blocks")
    parser.add_argument("--nets", nargs="+", default=["mlp", "cnn"], choices=["mlp", "cnn"])
    parser.add_argument("--norms", nargs="+", default=["none", "layer"], choices=["none", "layer"])
    parser.add_argument("--data", nargs="+", default=["digits", "power_law"], choices=list(DATA))
    parser.add_argument("--samples", type=int, default=128, help="samples, of training and probe alike")
    parser.add_argument("--steps", type=int, default=300, help="steps of gradient descent")
    parser.add_argument("--measurements", type=int, default=4, help="measurements a run, log-spaced")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    records = train_all(options, options.out / "runs.jsonl")
    command = f"python examples/residual_vs_plain.py --out {options.out}"
    for name, value in vars(options).items():
        if name not in ("out", "quiet") and value != parser.get_default(name):
            command += f" --{name} " + (" ".join(map(str, value)) if isinstance(value, list) else str(value))
    text = report(records, command)
    (options.out / "README.md").write_text(text + "\n")
    draw(records, options.out / "defect.png")
    print(text.split("## ")[0])
    return {"records": records, "text": text}


if __name__ == "__main__":
    main()
