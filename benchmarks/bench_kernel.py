"""The exact kernel J J^T: ours against every peer, each in a process of its own.

Rounds ask the methods in turn; ratios are taken within a round, medians over rounds. Peak memory is what the first run
added to its process. Every kernel is compared with ours (sums in float64), so a fast wrong one shows. A method that
needs more than the cap or the memory allowed is tried again at a quarter of the samples, and listed as such: nothing
is extrapolated.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import common, nets
from benchmarks.peers.launch import Worker

#: method -> script in peers/, and which interpreter it needs
METHODS = {
    "ours": ("run_ours", "own"),
    "ours-float32": ("run_ours_float32", "own"),
    "tutorial-contraction": ("run_contraction", "own"),
    "tutorial-products": ("run_vector_products", "own"),
    "torchjd": ("run_torchjd", "torch"),
    "nngeometry": ("run_nngeometry", "torch"),
    "curvlinops": ("run_curvlinops", "torch"),
    "neural-tangents": ("run_neural_tangents", "jax"),
}
OURS = ("ours", "ours-float32")
#: a kernel further than this from ours, relative in Frobenius norm, is wrong
WRONG = 1e-3
TOO_MUCH = ("over the cap", "out of memory")


@dataclass(frozen=True)
class Case:
    """A net and a number of samples."""

    net: str
    n: int
    scale: str = "real"
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def spec(self) -> dict[str, Any]:
        """What a worker needs to build it."""
        return {"net": self.net, "scale": self.scale, "n": self.n, "sizes": dict(self.sizes)}

    @property
    def num_rows(self) -> int:
        """m = n C."""
        sizes = nets.sizes_of(self.net, self.scale, **dict(self.sizes))
        return self.n * sizes.get("outputs", sizes.get("vocabulary", 1))

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(p.numel() for p in nets.build(self.net, self.scale, **dict(self.sizes)).parameters())


CASES: dict[str, dict[str, Case]] = {
    "tiny": {"mlp": Case("mlp", 4, "tiny"), "gpt": Case("gpt", 2, "tiny")},
    "small": {
        "mlp": Case("mlp", 16),
        "resnet_gn": Case("resnet_gn", 4),
        "resnet_bn": Case("resnet_bn", 4),
        "gpt": Case("gpt", 2),
    },
    "full": {
        "mlp": Case("mlp", 64),
        "mlp large": Case("mlp", 256),
        "mlp outputs": Case("mlp", 64, sizes=(("outputs", 40),)),
        "resnet_gn": Case("resnet_gn", 16),
        "resnet_bn": Case("resnet_bn", 16),
        "resnet_gn large": Case("resnet_gn", 64),
        "resnet_gn larger": Case("resnet_gn", 200),
        "gpt": Case("gpt", 4),
        "gpt large": Case("gpt", 16),
    },
}
#: how ours grows: net sizes changed one at a time, by size of the benchmark
SCALING: dict[str, dict[str, list[Case]]] = {
    "tiny": {"n": [Case("mlp", n, "tiny") for n in (4, 8)]},
    "small": {"n": [Case("mlp", n) for n in (16, 32)]},
    "full": {
        "n": [Case("mlp", n) for n in (64, 128, 256)],
        "outputs": [Case("mlp", 64, sizes=(("outputs", c),)) for c in (10, 20, 40)],
        "width": [Case("mlp", 64, sizes=(("width", w),)) for w in (512, 1024, 2048)],
        "depth": [Case("mlp", 64, sizes=(("depth", d),)) for d in (2, 4, 8)],
    },
}


def main(argv: Sequence[str] | None = None) -> dict:
    args = options(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        cases = {} if args.scaling else common.chosen(CASES[args.size], args.cases)
        for name, case in cases.items():
            found = measure(name, case, args.methods, args, Path(folder))
            report(found)
            results.append(found)
            retry = [m for m, x in found["methods"].items() if x["status"] in TOO_MUCH and "seconds" not in x]
            if retry and "ours" not in retry and case.n >= 8:
                less = Case(case.net, case.n // 4, case.scale, case.sizes)
                results.append(measure(f"{name}, a quarter", less, ["ours", *retry], args, Path(folder)))
                report(results[-1])
        scaling = {} if args.cases else {what: grown(cases, args) for what, cases in SCALING[args.size].items()}
    for what, found in scaling.items():
        taken = ", ".join(common.number(s) for s in found["seconds"])
        print(f"ours in {what} {found['values']}: {taken} s, slope {found['slope']:.2f}")
    return common.save(args, results, scaling=scaling)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0], "kernel")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--scaling", action="store_true", help="only how ours grows, no peers")
    parser.add_argument("--rounds", type=int, default=None, help="default 5, tiny 2")
    parser.add_argument("--max-seconds", type=float, default=400.0, help="cap of one run")
    parser.add_argument("--repeat-seconds", type=float, default=120.0, help="no further run once a method spent this")
    parser.add_argument("--max-gigabytes", type=float, default=16.0, help="memory a method may add to its process")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (2 if args.size == "tiny" else 5)
    args.methods = ["ours", *(m for m in args.methods if m != "ours")]
    return args


def measure(name: str, case: Case, methods: Sequence[str], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of every method on one case."""
    if any(METHODS[m][1] == "jax" for m in methods) and case.net == "mlp":
        store_weights(case, folder / "weights.npz")
    workers = {m: worker_for(m, case, args, folder) for m in methods}
    try:
        per_round = [{m: w.run() for m, w in workers.items() if affordable(w, args)} for _ in range(args.rounds)]
        ours = workers["ours"].result
        found = {m: summary(m, w, per_round, ours) for m, w in workers.items()}
    finally:
        for w in workers.values():
            w.close()
    for file in folder.glob("*.npy"):
        file.unlink()
    return {"case": name, **case.spec, "m": case.num_rows, "methods": found, "best_peer": best_peer(found)}


def worker_for(method: str, case: Case, args: argparse.Namespace, folder: Path | None = None) -> Worker:
    """The method's process on one case; with a folder, its kernel is kept there and the JAX weights are found there."""
    module, kind = METHODS[method]
    spec = case.spec | {
        "device": args.device,
        "threads": args.threads,
        "torch": kind != "jax",
        "max_bytes": int(args.max_gigabytes * 1e9),
    }
    if folder is not None:
        spec |= {"result": str(folder / f"{module}.npy"), "weights": str(folder / "weights.npz")}
    return Worker(module, spec, kind, args.max_seconds)


def affordable(worker: Worker, args: argparse.Namespace) -> bool:
    """The first run always; further ones within the seconds for repeats."""
    spent = [f["seconds"] for f in worker.figures]
    return not spent or sum(spent) + spent[-1] <= args.repeat_seconds


def store_weights(case: Case, path: Path) -> None:
    """The MLP and its inputs, for interpreters without torch."""
    net = nets.build(case.net, case.scale, **dict(case.sizes))
    linear = [layer for layer in net if hasattr(layer, "weight")]
    arrays = {
        f"{kind}{i}": getattr(layer, kind).detach().numpy()
        for i, layer in enumerate(linear)
        for kind in ("weight", "bias")
    }
    inputs = nets.batch(case.net, case.scale, max(case.n, 2), **dict(case.sizes)).inputs[: case.n]
    np.savez(path, inputs=inputs.numpy(), **arrays)


def summary(
    method: str, worker: Worker, per_round: list[dict[str, dict[str, float] | None]], ours: np.ndarray | None
) -> dict[str, Any]:
    """Medians over rounds after the first (which warms up, where there are more)."""
    if not worker.figures:
        return {"status": worker.status, "why": worker.why}
    rounds = [r for r in per_round if r.get(method)]
    counted = rounds[1:] or rounds
    figures = [r[method] for r in counted]
    ratios = {
        f"{key}_over_ours": common.median([r[method][key] / r["ours"][key] for r in counted if r.get("ours")])
        for key in ("seconds", "cpu_seconds")
    }
    first = worker.figures[0]
    more = {k: v for k, v in first.items() if k not in ("seconds", "cpu_seconds", "peak_bytes")}
    return {
        "status": worker.status,
        "why": worker.why,
        "runs": len(figures),
        "seconds": common.median([f["seconds"] for f in figures]),
        "cpu_seconds": common.median([f["cpu_seconds"] for f in figures]),
        "peak_bytes": first["peak_bytes"],
        **ratios,
        "relative_error": relative_error(worker.result, ours),
        **more,
    }


def relative_error(kernel: np.ndarray | None, ours: np.ndarray | None) -> float | None:
    """|K - ours| / |ours|, in blocks of rows so that no third matrix is made."""
    if kernel is None or ours is None or kernel.shape != ours.shape:
        return None
    squares = sum(float(((k - o) ** 2).sum()) for k, o in zip(np.array_split(kernel, 32), np.array_split(ours, 32)))
    return float((squares / (ours**2).sum()) ** 0.5)


def best_peer(found: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The fastest peer in PyTorch whose kernel is right, against both of ours."""
    right = {
        m: x
        for m, x in found.items()
        if m not in (*OURS, "neural-tangents") and x.get("seconds") and (x.get("relative_error") or 0.0) < WRONG
    }
    if not right or not found["ours"].get("seconds"):
        return None
    name = min(right, key=lambda m: right[m]["seconds_over_ours"])
    theirs = right[name]
    speed_ups = {
        m: theirs["seconds_over_ours"] / found[m]["seconds_over_ours"] for m in OURS if found.get(m, {}).get("seconds")
    }
    memory = {m: found[m]["peak_bytes"] / max(theirs["peak_bytes"], 1) for m in speed_ups}
    return {"method": name, "speed_up": speed_ups, "our_memory_over_its": memory}


def report(found: dict[str, Any]) -> None:
    """Print one case."""
    matrix = common.megabytes(8 * found["m"] ** 2)
    print(f"\n{found['case']}: n = {found['n']}, m = {found['m']}  (the kernel itself in float64: {matrix})")
    rows = [row(method, x) for method, x in found["methods"].items()]
    print(common.table(("method", "seconds", "runs", "/ ours", "cpu / ours", "memory", "error", ""), rows))
    if found["best_peer"]:
        best = found["best_peer"]
        for ours, gain in best["speed_up"].items():
            share = f"{best['our_memory_over_its'][ours]:.2f}"
            print(f"best right PyTorch peer: {best['method']}; {ours} {gain:.2f} times faster in {share} of its memory")
    sys.stdout.flush()


def row(method: str, x: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    if "seconds" not in x:
        return (method, "-", "-", "-", "-", "-", "-", f"{x['status']}: {x['why'][:90]}")
    error = x["relative_error"]
    notes = ["WRONG"] if error is None or error >= WRONG else []
    notes += [f"compiled in {x['compile_seconds']:.1f} s"] if "compile_seconds" in x else []
    notes += ["batch_dim=None"] if x.get("batch_dim") == 0.0 else []
    notes += [f"then {x['status']}"] if x["status"] not in ("done", "ready") else []
    return (
        method,
        common.number(x["seconds"]),
        str(x["runs"]),
        common.number(x["seconds_over_ours"]),
        common.number(x["cpu_seconds_over_ours"]),
        common.megabytes(x["peak_bytes"]),
        common.number(error, 2),
        ", ".join(notes),
    )


def grown(cases: list[Case], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of ours over a family of cases, in turn, and the slope in the logarithm."""
    workers = [worker_for("ours", case, args) for case in cases]
    try:
        for _ in range(args.rounds):
            for w in workers:
                w.run()
    finally:
        for w in workers:
            w.close()
    taken = [common.median([f["seconds"] for f in w.figures[1:] or w.figures]) for w in workers]
    changed = [dict(case.sizes) or {"n": case.n} for case in cases]
    values = [next(iter(x.values())) for x in changed]
    return {
        "values": values,
        "seconds": taken,
        "peak_bytes": [w.figures[0]["peak_bytes"] if w.figures else None for w in workers],
        "slope": common.slope(values, taken) if all(math.isfinite(s) for s in taken) else math.nan,
    }


if __name__ == "__main__":
    main()
