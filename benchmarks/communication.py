"""What one measurement on R ranks sends and holds, by method: a calculation from the protocol, no measurement.

A rank computes on n / R samples of the probe. Sent in one measurement, P parameters, m = n C rows, s bytes a number:

    copies    broadcast of all parameters and buffers, once                           s P
    J^T v     message (command and v), sum of J_r^T v_r on rank zero                  8 (m + 2) + s (P + 1)
    J w       message, broadcast of w, sum of the rows on rank zero                   8 (m + 2) + s P + s (m + 1)
    M v       message, sum of J_r^T v_r on all ranks, sum of the rows on rank zero    8 (m + 2) + s (P + 1) + s (m + 1)
    kernel    message, sum of the parts on rank zero                                  8 (m + 2) + 8 m^2
    work      one J w, after the optimizer step; it and the measurement each end with a message
    default   rank zero's decision whether a measurement is made, and an agreement on what it has drawn: flags

`tests/test_distributed.py` counts what two ranks really send against this. A broadcast or a sum to rank zero takes its
bytes through every link once, a sum on all ranks 2 (R - 1) / R times; each collective adds ceil(log2 R) latencies. Not
in it: flags of a few bytes (but for their latencies), the plan of the kernel and the snapshot (some kB), and computing.

Memory of a rank, beside the model in training: copies, the buffers of a sum and of a vector, one J^T v, the copies that
are kept until the next step; rank zero also holds what the method keeps. Graphs are left out: they are those of a
training step on n / R samples, and on rank zero once of all n for |grad L|^2.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

RANKS = (1, 2, 8, 64, 1024)
PARAMETERS = (10**6, 10**7, 10**8, 10**9, 10**10, 10**11)
METHODS = ("exact", "lanczos", "krylov", "randomized")
#: collectives of a session: agreements (one of them on the run being unbroken), copies or the step's change, stop, the
#: snapshot for all
SESSION = 9
#: of the default schedule's decision (agreement, its size, itself), and of figures drawn during the run (agreement)
DECISION, DRAWING = 3, 1
#: and of an exact kernel: message, agreement, plans, sum
KERNEL = 6


@dataclass(frozen=True)
class Traffic:
    """One measurement.

    Attributes:
        to_or_from_zero: bytes broadcast by rank zero or summed on it.
        on_all: bytes summed on all ranks.
        collectives: how many.
        kept: bytes that every rank holds; kept_by_zero: what rank zero holds on top.
    """

    to_or_from_zero: float
    on_all: float
    collectives: int
    kept: float
    kept_by_zero: float

    @property
    def payload(self) -> float:
        """Bytes that go into collectives."""
        return self.to_or_from_zero + self.on_all

    def seconds(self, ranks: int, bandwidth: float, latency: float) -> float:
        """Time on a network of so many bytes a second and rank, with so many seconds a hop."""
        if ranks == 1:
            return 0.0
        moved = self.to_or_from_zero + self.on_all * 2 * (ranks - 1) / ranks
        return moved / bandwidth + self.collectives * latency * math.ceil(math.log2(ranks))


def traffic(
    method: str,
    parameters: int,
    rows: int,
    products: int,
    *,
    density: int = 0,
    itemsize: int = 4,
    work: bool = True,
    schedule: bool = True,
    figures: bool = True,
) -> Traffic:
    """What a measurement sends and holds.

    Args:
        method: "exact", "lanczos", "krylov" or "randomized".
        parameters, rows: P and m.
        products: `num_matvecs`;  density: `num_density_matvecs` (krylov).
        itemsize: bytes a number of the products.
        work: also the work of the step that follows.
        schedule: when to measure is decided by the default schedule (not `every_n_steps`).
        figures: figures are drawn during the run (`figures_every_n_steps` is not None).

    Example:
        >>> traffic("exact", 10**6, 320, 0).payload / 1e6  # 8 MB: copies and the step's w; 0.8 MB: the kernel
        8.83...
    """
    P, m, s = parameters, rows, itemsize
    message, pull, push, spread = 8 * (m + 2), s * (P + 1), s * P, s * (m + 1)
    sessions = 2 if work else 1
    to_zero, on_all = float(s * P + sessions * message), 0.0
    collectives = sessions * SESSION + DECISION * schedule + DRAWING * figures
    vjps, jvps, both = _products(method, products, density)
    jvps += work
    to_zero += vjps * (message + pull) + jvps * (message + push + spread) + both * (message + spread)
    on_all += both * pull
    collectives += 2 * vjps + 3 * jvps + 3 * both
    dense = method in ("exact", "lanczos")
    if dense:
        to_zero += message + 8 * m * m
        collectives += KERNEL
    vectors = {"exact": m, "lanczos": products, "krylov": products + density, "randomized": products // 2}[method]
    held = (2 if work else 1) * s * P + 3 * s * P
    return Traffic(to_zero, on_all, collectives, held + 8.0 * m * (m if dense else 1), 16.0 * m * vectors)


def _products(method: str, products: int, density: int) -> tuple[int, int, int]:
    """J^T v, J w and M v of one measurement."""
    if method == "exact":
        return 0, 0, 0
    if method == "lanczos":  # the alignment with the targets
        return 1, 0, 0
    if method == "krylov":  # and two random images, and the alignment with the targets
        return products + density + 1, products + density, 2
    rank = max(1, products // 2)
    return 2, 1, 2 * rank + 2  # one iteration and one projection; the residual's own, images, alignment


def rows_of_table(args: argparse.Namespace) -> list[dict[str, object]]:
    """One entry a method and number of parameters."""
    found = []
    for method in METHODS:
        rows = args.exact_rows if method == "exact" else args.rows
        for parameters in PARAMETERS:
            one = traffic(method, parameters, rows, args.products, density=args.density)
            training = 16 * parameters  # weight, gradient, two of Adam
            fits = one.kept + one.kept_by_zero + training <= args.memory
            seconds = {str(r): one.seconds(r, args.bandwidth, args.latency) for r in RANKS}
            case = {"method": method, "parameters": parameters, "rows": rows}
            found.append({**case, "fits": fits, "seconds": seconds, **asdict(one)})
    return found


def show(found: list[dict[str, object]], args: argparse.Namespace) -> str:
    """The table."""
    lines = [
        f"calculated: {args.bandwidth / 1e9:g} GB/s a rank, {args.latency * 1e6:g} us a hop, float32 products; exact "
        f"m = {args.exact_rows}, others m = {args.rows} with {args.products} + {args.density} products",
        f"{'method':10} {'P':>6} {'sent, GB':>9} {'calls':>6} {'held, GB':>9}  "
        + " ".join(f"{f'R={r}':>8}" for r in RANKS)
        + "  seconds of communication",
    ]
    for entry in found:
        one = Traffic(**{name: entry[name] for name in Traffic.__dataclass_fields__})  # type: ignore[arg-type]
        seconds = " ".join(f"{one.seconds(r, args.bandwidth, args.latency):8.2g}" for r in RANKS)
        lines.append(
            f"{entry['method']:10} {entry['parameters']:>6.0e} {one.payload / 1e9:>9.3g} {one.collectives:>6} "
            f"{(one.kept + one.kept_by_zero) / 1e9:>9.3g}  {seconds}"
            + ("" if entry["fits"] else f"  does not fit beside Adam in {args.memory / 1e9:g} GB")
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, object]]:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192, help="m of the matrix-free methods")
    parser.add_argument("--exact-rows", type=int, default=2048, help="m of the exact kernel")
    parser.add_argument("--products", type=int, default=64, help="num_matvecs")
    parser.add_argument("--density", type=int, default=32, help="num_density_matvecs")
    parser.add_argument("--bandwidth", type=float, default=25e9, help="bytes a second that a rank sends")
    parser.add_argument("--latency", type=float, default=1e-5, help="seconds a hop")
    parser.add_argument("--memory", type=float, default=80e9, help="bytes of a device")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "communication.json")
    args = parser.parse_args(argv)
    found = rows_of_table(args)
    print(show(found, args))
    given = {name: value for name, value in vars(args).items() if name != "out"}
    args.out.write_text(json.dumps({"results": found, "assumed": given}, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main()
