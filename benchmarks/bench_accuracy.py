"""Shell energies from K kernel products against the exact spectrum, on trained networks.

The measure of the true residual under M = nu J J^T, four shells a decade. Distance: total variation, half the sum over
shells of |share - true share|. Two estimates from the same products: midpoints of the rigorous bounds (what the package
reports) and Gauss weights put into their nodes' shells. The truth is the exact kernel of the same network in the same
dtype. For "curve", whose spectrum is deeper than a float64 kernel can hold, it is the singular values of explicit rows
in float64; float32 products belong to a kernel that differs from it by their rounding, and the excess there is that.

Round-off: an edge counts as covered if the true cumulative measure within the products' rounding of singular values
around it lies within the bounds, up to 1e-6 of the total; strict coverage is reported beside it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import common, nets
from grsd_callbacks.kernel import NTKOperator
from grsd_callbacks.krylov import Bidiagonalization
from grsd_callbacks.losses import Residual, resolve_loss
from grsd_callbacks.shells import ShellBudget, ShellGrid, shell_budget
from grsd_callbacks.spectrum import Eigendecomposition, SpectralMeasure, eigendecomposition, spectral_measure
from grsd_callbacks.ways import default_grid

PER_DECADE = 4
PRODUCTS = (16, 32, 64, 128)
#: rounding of eigenvalues of either side, in units of the products' rounding of singular values, and of masses
EDGE_ROUNDING, MASS_ROUNDING = 10.0, 1e-6
#: shells of explicit rows begin no deeper than this below lambda_max
ROWS_FLOOR = 1e-13
#: an edge is right if the cumulative midpoint misses the truth by at most this share of the total
RIGHT = 0.01


@dataclass(frozen=True)
class Case:
    """A net trained for some steps on `num_training` samples; the first n are the probe."""

    net: str
    n: int
    steps: int
    num_training: int
    scale: str = "real"
    batch_size: int = 64
    products: tuple[int, ...] = PRODUCTS
    dtype: torch.dtype | None = None
    by_rows: bool = False


_ALL = (*PRODUCTS, 256)
CASES: dict[str, dict[str, Case]] = {
    "tiny": {
        "mlp": Case("mlp", 20, 20, 64, "tiny", products=(8, 16)),
        "gpt": Case("gpt", 4, 5, 16, "tiny", products=(8, 16)),
    },
    "small": {
        "mlp": Case("mlp", 16, 100, 512),
        "curve": Case("curve", 64, 200, 64, products=(16, 64), by_rows=True),
        "curve, float64": Case("curve", 64, 200, 64, products=(16, 64), dtype=torch.float64, by_rows=True),
        "resnet_gn": Case("resnet_gn", 4, 10, 64, batch_size=16, products=(16,)),
        "gpt": Case("gpt", 2, 10, 64, batch_size=16),
    },
    "full": {
        "mlp, untrained": Case("mlp", 64, 0, 2048),
        "mlp": Case("mlp", 64, 500, 2048),
        "gpt, untrained": Case("gpt", 8, 0, 512),
        "gpt": Case("gpt", 8, 150, 512, batch_size=32),
        "resnet_gn": Case("resnet_gn", 32, 150, 512),
        "resnet_bn": Case("resnet_bn", 32, 150, 512),
        "curve": Case("curve", 256, 2000, 256, products=_ALL, by_rows=True),
        "curve, float64": Case("curve", 256, 2000, 256, products=_ALL, dtype=torch.float64, by_rows=True),
    },
}


@dataclass(frozen=True, eq=False)
class Truth:
    """The exact measure of the residual.

    Attributes:
        eigenvalues: ascending, shape (m,).
        shares: g_i^2 / |r|^2.
        grid: the shells.
        energy: shares per shell.
    """

    eigenvalues: Tensor
    shares: Tensor
    grid: ShellGrid
    energy: Tensor

    @property
    def largest(self) -> float:
        """lambda_max."""
        return float(self.eigenvalues[-1])

    def below(self, points: Tensor) -> Tensor:
        """Share at eigenvalues below each point."""
        return (self.shares * (self.eigenvalues < points[:, None])).sum(1)


def main(argv: Sequence[str] | None = None) -> dict:
    parser = common.parser(__doc__.splitlines()[0], "accuracy")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    results = []
    for name, case in common.chosen(CASES[args.size], args.cases).items():
        results.append(measure(name, case, args))
        report(results[-1])
    return common.save(args, results, shells_per_decade=PER_DECADE)


def measure(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Train, take the exact spectrum, and compare every number of products with it."""
    net, data, loss_value, training_seconds = trained(case, args.device)
    x, y = data.inputs[: case.n], data.targets[: case.n]
    op = NTKOperator(net, x, dtype=case.dtype)
    residual = resolve_loss(nets.loss_function(case.net)).evaluate(op.outputs, y)
    start = time.perf_counter()
    truth = exact_by_rows(net, x, residual) if case.by_rows else exact(op, residual)
    exact_seconds = time.perf_counter() - start
    m = op.shape[0]
    most = min(max(case.products), m)
    start = time.perf_counter()
    whole = spectral_measure(op, residual.residual, most, residual.nu).bidiagonal
    seconds = time.perf_counter() - start
    found = [compared(truncated(whole, min(k, m)), truth) for k in case.products]
    return {
        "case": name,
        "net": case.net,
        "n": case.n,
        "m": m,
        "steps": case.steps,
        "batch_loss": loss_value,
        "probe_loss": float(residual.loss),
        "decades_of_spectrum": decades(truth),
        "num_shells": truth.grid.num_shells,
        "training_seconds": training_seconds,
        "exact_seconds": exact_seconds,
        "seconds_per_product": seconds / max(whole.num_products, 1.0),
        "products": found,
    }


def trained(case: Case, device: str) -> tuple[nn.Module, nets.Batch, float, float]:
    """The net after training, its data, the last batch's loss, seconds."""
    net = nets.build(case.net, case.scale).to(device)
    data = nets.batch(case.net, case.scale, max(case.num_training, case.n))
    moved = (t if t is None else t.to(device) for t in (data.inputs, data.targets, data.sequences))
    data = nets.Batch(*moved)
    start = time.perf_counter()
    value = nets.train(net, case.net, data, case.steps, batch_size=case.batch_size)
    return net, data, value, time.perf_counter() - start


def exact(op: NTKOperator, r: Residual) -> Truth:
    """All eigenpairs of the exact kernel, and shells that hold them."""
    spectrum: Eigendecomposition = eigendecomposition(op, r.nu)
    return _truth(spectrum.eigenvalues.cpu(), spectrum.project(r.residual).cpu(), spectrum.floor)


def exact_by_rows(net: nn.Module, x: Tensor, r: Residual) -> Truth:
    """The same from the singular values of J in float64, which keep eigenvalues that J J^T would round away."""
    theta = {name: p.detach().double() for name, p in net.named_parameters()}
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (x.double(),)).flatten())(theta)
    rows = torch.cat([j.flatten(1) for j in jacobian.values()], 1)
    left, singular, _ = torch.linalg.svd(r.nu**0.5 * rows, full_matrices=False)
    values = singular.flip(0).cpu() ** 2
    return _truth(values, (left.T @ r.residual).flip(0).cpu(), ROWS_FLOOR * float(values[-1]))


def _truth(values: Tensor, coefficients: Tensor, floor: float) -> Truth:
    above = values[values > floor]
    grid = default_grid(float(values[-1]), float(above[0]), floor, PER_DECADE)
    shares = coefficients**2 / coefficients.square().sum()
    return Truth(values, shares, grid, grid.collect(values, shares))


def decades(truth: Truth) -> float:
    """log10 of the largest over the smallest eigenvalue within the grid."""
    inside = truth.eigenvalues[truth.eigenvalues >= truth.grid.edges[0]]
    return math.log10(truth.largest / float(inside[0]))


def truncated(whole: Bidiagonalization, k: int) -> Bidiagonalization:
    """The same process after k steps."""
    if k >= whole.num_steps:
        return whole
    return replace(
        whole,
        alphas=whole.alphas[:k],
        betas=whole.betas[:k],
        left=whole.left[:, : k + 1],
        exhausted=False,
        num_products=float(k),
    )


def compared(bidiagonal: Bidiagonalization, truth: Truth) -> dict[str, Any]:
    """Distances and coverage of one measurement."""
    measured = SpectralMeasure(bidiagonal)
    budget: ShellBudget = shell_budget(measured, None, truth.grid)
    binned = truth.grid.collect(measured.nodes, measured.weights / measured.mass)
    lower, upper = measured.bounds(truth.grid.edges)
    missing = ~budget.resolved
    return {
        "products": bidiagonal.num_products,
        "total_variation": variation(budget.energy / budget.energy.sum(), truth.energy),
        "total_variation_binned": variation(binned, truth.energy),
        **coverage(lower, upper, truth, bidiagonal.rounding),
        "unresolved_shells": int(missing.sum()),
        "unresolved_share": float(truth.energy[missing].sum()),
        "mean_width": float((upper - lower).mean()),
        "decades_right": decades_right((lower + upper) / 2, truth),
    }


def variation(shares: Tensor, true: Tensor) -> float:
    """Half the sum of absolute differences."""
    return 0.5 * float((shares - true).abs().sum())


def coverage(lower: Tensor, upper: Tensor, truth: Truth, rounding: float) -> dict[str, float]:
    """Fractions of edges whose true cumulative measure lies within the bounds."""
    edges = truth.grid.edges
    true = truth.below(edges)
    blur = EDGE_ROUNDING * rounding * truth.largest**0.5
    least, greatest = (truth.below((edges.sqrt() + side * blur).clamp_min(0.0) ** 2) for side in (-1.0, 1.0))
    strict = (true >= lower) & (true <= upper)
    rounded = (greatest >= lower - MASS_ROUNDING) & (least <= upper + MASS_ROUNDING)
    excess = torch.maximum(lower - true, true - upper).clamp_min(0.0).max()
    return {
        "covered_strictly": float(strict.double().mean()),
        "covered": float(rounded.double().mean()),
        "largest_excess": float(excess),
    }


def decades_right(middle: Tensor, truth: Truth) -> float:
    """Decades below lambda_max down to which the cumulative midpoint is right at every edge."""
    right = (middle - truth.below(truth.grid.edges)).abs() <= RIGHT
    wrong = torch.nonzero(~right).flatten()
    last = int(wrong[-1]) + 1 if wrong.numel() else 0
    return math.log10(truth.largest / float(truth.grid.edges[min(last, len(right) - 1)]))


def report(found: dict[str, Any]) -> None:
    """Print one case."""
    print(
        f"\n{found['case']}: n = {found['n']}, m = {found['m']}, {found['steps']} steps to a loss of "
        f"{found['probe_loss']:.3g}, spectrum of {found['decades_of_spectrum']:.1f} decades in {found['num_shells']} "
        f"shells; exact in {common.number(found['exact_seconds'])} s, "
        f"{common.number(found['seconds_per_product'])} s a product"
    )
    columns = ("products", "midpoints", "binned", "covered", "strictly", "excess", "unresolved", "share", "decades", "")
    print(common.table(columns, [row(x) for x in found["products"]]))
    sys.stdout.flush()


def row(x: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    return (
        f"{x['products']:.0f}",
        common.number(x["total_variation"]),
        common.number(x["total_variation_binned"]),
        f"{100 * x['covered']:.0f} %",
        f"{100 * x['covered_strictly']:.0f} %",
        common.number(x["largest_excess"], 1),
        str(x["unresolved_shells"]),
        common.number(x["unresolved_share"]),
        f"{x['decades_right']:.1f}",
        "",
    )


if __name__ == "__main__":
    main()
