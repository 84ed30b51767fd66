"""What the benchmarks share: environment, timing, ratios, tables, files."""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import grsd_callbacks as grsd

RESULTS = Path(__file__).parent / "results"
SIZES = ("tiny", "small", "full")


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--size", choices=SIZES, default="small", help="tiny tries the script, full is for the tables")
    found.add_argument("--cases", nargs="+", default=None, help="only these cases; patterns such as 'gpt*' too")
    found.add_argument("--device", default="cpu")
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    return found


def chosen(cases: dict[str, Any], wanted: Sequence[str] | None) -> dict[str, Any]:
    """The cases that match one of the patterns `wanted`.

    Raises:
        ValueError: none does.
    """
    if wanted is None:
        return cases
    found = {name: case for name, case in cases.items() if any(fnmatch.fnmatchcase(name, w) for w in wanted)}
    if not found:
        raise ValueError(f"no case matches {list(wanted)}; this size has {list(cases)}")
    return found


def environment(args: argparse.Namespace) -> dict[str, object]:
    """What a reader needs to judge the figures."""
    on_gpu = str(args.device).startswith("cuda")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "grsd_callbacks": grsd.__version__,
        "processor": platform.machine(),
        "threads": args.threads,
        "device": torch.cuda.get_device_name(args.device) if on_gpu else args.device,
        "size": args.size,
    }


def save(args: argparse.Namespace, results: Any, **more: Any) -> dict[str, Any]:
    """Write results and environment as JSON, NaN and Inf as null."""
    record = {"results": results, **more, "environment": environment(args)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n")
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns aligned, the first and the last (notes) to the left."""
    cells = [[str(x) for x in row] for row in [columns, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    last = len(columns) - 1
    aligned = [
        [x.ljust(w) if i in (0, last) else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))] for row in cells
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """A figure with so many digits, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "-"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}{unit}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(abs(value))) if value else 0))
    return f"{value:.{decimals}f}{unit}"


def megabytes(value: float | None) -> str:
    """Bytes in MB."""
    return "-" if value is None else f"{value / 1e6:.0f} MB"


def median(values: Sequence[float]) -> float:
    """The median, NaN of nothing."""
    return statistics.median(values) if values else math.nan


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent of y ~ x^s by least squares in logarithms."""
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    mean_u, mean_v = statistics.fmean(u), statistics.fmean(v)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v)) / sum((a - mean_u) ** 2 for a in u)
