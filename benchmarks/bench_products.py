"""One kernel product J (J^T v), in gradients of the same probe batch.

Each way runs in a process of its own and times a gradient and a product in turn; ratios are taken within a run, and
medians over rounds, of wall-clock seconds and of CPU seconds (which a shared machine disturbs less). Set-up is what the
first product costs beyond a later one: copies of the parameters, graphs and, on the path "auto", the trial of paths.
Products are compared with those of double backward, so a wrong path shows.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks import common
from benchmarks.bench_kernel import Case
from benchmarks.peers.launch import Worker

PATHS = ("double_backward", "forward", "central")
#: way -> script in peers/, interpreter, changes of the specification
WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ours-auto": ("run_our_product", "own", {"path": "auto"}),
    "ours-rebuilt": ("run_our_product", "own", {"path": "auto", "share": 0.3}),
    **{f"ours-{path}": ("run_our_product", "own", {"path": path}) for path in PATHS},
    "fresh-vjp-jvp": ("run_fresh_product", "own", {}),
    "curvlinops": ("run_curvlinops_product", "torch", {}),
}
REFERENCE = "ours-double_backward"
CASES: dict[str, dict[str, Case]] = {
    "tiny": {"mlp": Case("mlp", 8, "tiny"), "gpt": Case("gpt", 2, "tiny")},
    "small": {"mlp": Case("mlp", 64), "resnet_gn": Case("resnet_gn", 4), "gpt": Case("gpt", 4)},
    "full": {
        "mlp": Case("mlp", 256),
        "resnet_gn": Case("resnet_gn", 32),
        "resnet_bn": Case("resnet_bn", 32),
        "gpt": Case("gpt", 32),
        "mlp many": Case("mlp", 4096),  # for graphs built again in chunks of some size
        "resnet_gn many": Case("resnet_gn", 192),
        "gpt many": Case("gpt", 128),
    },
}
#: cost of a product against the number of samples and of parameters
SCALING: dict[str, dict[str, list[Case]]] = {
    "tiny": {"n": [Case("mlp", n, "tiny") for n in (8, 16)]},
    "small": {
        "n": [Case("mlp", n) for n in (128, 512)],
        "parameters": [Case("mlp", 128, sizes=(("width", w),)) for w in (256, 1024)],
    },
    "full": {
        "n": [Case("mlp", n) for n in (256, 512, 1024, 2048)],
        "parameters": [Case("mlp", 256, sizes=(("width", w),)) for w in (512, 1024, 2048, 4096)],
        "n, gpt": [Case("gpt", n) for n in (8, 16, 32, 64)],
    },
}


def main(argv: Sequence[str] | None = None) -> dict:
    args = options(argv)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, case in common.chosen(CASES[args.size], args.cases).items():
            results.append(measure(name, case, args, Path(folder)))
            report(results[-1])
    scaling = {} if args.cases else {what: grown(cases, args) for what, cases in SCALING[args.size].items()}
    for what, found in scaling.items():
        taken = ", ".join(common.number(s) for s in found["seconds"])
        sizes = ", ".join(str(v) for v in found["values"])
        print(f"ours-auto in {what} ({sizes}): {taken} s, slope {found['slope']:.2f}")
    return common.save(args, results, scaling=scaling)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__.splitlines()[0], "products")
    parser.add_argument("--methods", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=None, help="default 11, small 5, tiny 2")
    parser.add_argument("--max-seconds", type=float, default=120.0, help="cap of one run")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or {"tiny": 2, "small": 5, "full": 11}[args.size]
    return args


def worker_for(way: str, case: Case, args: argparse.Namespace, result: Path | None = None) -> Worker:
    """The way's process on one case."""
    module, kind, changes = WAYS[way]
    spec = case.spec | {"device": args.device, "threads": args.threads, "result": str(result) if result else None}
    return Worker(module, spec | changes, kind, args.max_seconds)


def measure(name: str, case: Case, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of every way on one case."""
    workers = {way: worker_for(way, case, args, folder / f"{way}.npy") for way in args.methods}
    try:
        for _ in range(args.rounds):
            for w in workers.values():
                w.run()
        exact = workers[REFERENCE].result if REFERENCE in workers else None
        found = {way: summary(w, exact) for way, w in workers.items()}
    finally:
        for w in workers.values():
            w.close()
    for file in folder.glob("*.npy"):
        file.unlink()
    return {"case": name, **case.spec, "m": case.num_rows, "rounds": args.rounds, "methods": found}


def summary(worker: Worker, exact: np.ndarray | None) -> dict[str, Any]:
    """Medians over rounds after the first (which warms up, where there are more)."""
    if not worker.figures:
        return {"status": worker.status, "why": worker.why}
    counted = worker.figures[1:] or worker.figures
    found = {
        "status": worker.status,
        "why": worker.why,
        "product_in_gradients": common.median([f["product_seconds"] / f["gradient_seconds"] for f in counted]),
        "product_cpu_in_gradients": common.median(
            [f["product_cpu_seconds"] / f["gradient_cpu_seconds"] for f in counted]
        ),
        "product_seconds": common.median([f["product_seconds"] for f in counted]),
        "gradient_seconds": common.median([f["gradient_seconds"] for f in counted]),
        "product_bytes": worker.figures[0]["product_bytes"],
        "relative_error": relative_error(worker.result, exact),
    }
    if "first_seconds" in counted[0]:
        found["set_up_in_gradients"] = common.median(
            [(f["first_seconds"] - f["product_seconds"]) / f["gradient_seconds"] for f in counted]
        )
        found["set_up_cpu_in_gradients"] = common.median(
            [(f["first_cpu_seconds"] - f["product_cpu_seconds"]) / f["gradient_cpu_seconds"] for f in counted]
        )
        found["paths"] = sorted({PATHS[int(f["path"])] for f in counted})
    return found


def relative_error(result: np.ndarray | None, exact: np.ndarray | None) -> float | None:
    """|M v - reference| / |reference|."""
    if result is None or exact is None:
        return None
    return float(np.linalg.norm(result - exact) / np.linalg.norm(exact))


def report(found: dict[str, Any]) -> None:
    """Print one case."""
    print(f"\n{found['case']}: n = {found['n']}, m = {found['m']}, in gradients of the probe batch")
    rows = [row(way, x) for way, x in found["methods"].items()]
    print(common.table(("way", "product", "CPU", "set-up", "CPU", "seconds", "memory", "error", ""), rows))
    sys.stdout.flush()


def row(way: str, x: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table."""
    if "product_seconds" not in x:
        return (way, *["-"] * 7, f"{x['status']}: {x['why'][:90]}")
    return (
        way,
        common.number(x["product_in_gradients"]),
        common.number(x["product_cpu_in_gradients"]),
        common.number(x.get("set_up_in_gradients")),
        common.number(x.get("set_up_cpu_in_gradients")),
        common.number(x["product_seconds"]),
        common.megabytes(x["product_bytes"]),
        common.number(x["relative_error"], 2),
        ", ".join(x.get("paths", [])),
    )


def grown(cases: list[Case], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of a product over a family of cases, in turn, and the slope in the logarithm."""
    workers = [worker_for("ours-auto", case, args) for case in cases]
    try:
        for _ in range(args.rounds):
            for w in workers:
                w.run()
    finally:
        for w in workers:
            w.close()
    taken = [common.median([f["product_seconds"] for f in w.figures[1:] or w.figures]) for w in workers]
    values = [case.num_parameters if "width" in dict(case.sizes) else case.n for case in cases]
    steep = common.slope(values, taken) if all(math.isfinite(s) for s in taken) else math.nan
    return {
        "values": values,
        "seconds": taken,
        "product_bytes": [w.figures[0]["product_bytes"] if w.figures else None for w in workers],
        "slope": steep,
    }


if __name__ == "__main__":
    main()
