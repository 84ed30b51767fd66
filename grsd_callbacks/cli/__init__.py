"""The `grsd` command line: look at runs, compare them, measure checkpoints, ask what would work.

Every command ends with exit code 0, or with 2 and one clear sentence on stderr, and then has written nothing.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from grsd_callbacks.cli.runlog import UsageError

__all__ = ["UsageError", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments; None takes the process's own.

    Returns:
        The exit code: 0, or 2 where what was asked for cannot be done (1: `grsd doctor` found that nothing can be
        measured).
    """
    options = parser().parse_args(argv)
    warnings.formatwarning = lambda message, *rest: f"warning: {message}\n"
    try:
        return int(options.run(options) or 0)
    except UsageError as error:
        print(f"grsd {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # piped into head
        sys.stderr.close()
        return 0


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    p = argparse.ArgumentParser(prog="grsd", description="See how a neural network learns, scale by scale.")
    p.add_argument("--version", action="version", version=f"grsd {import_module('grsd_callbacks').__version__}")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    report = commands.add_parser("report", help="shells, exponents, closures and cost of a run")
    report.add_argument("path", type=Path, metavar="RUN", help="grsd.jsonl, an event file, or a folder with runs below")
    report.add_argument("--html", type=Path, metavar="FILE", help="also write one self-contained page with the figures")
    report.set_defaults(run=_report)

    compare = commands.add_parser("compare", help="runs side by side, with the significance of differences")
    compare.add_argument("paths", type=Path, nargs="+", metavar="RUN", help="as for report, one run each")
    compare.set_defaults(run=_compare)

    checkpoints = commands.add_parser("checkpoints", help="measure saved checkpoints, with the flux between them")
    checkpoints.add_argument("paths", type=Path, nargs="+", metavar="CKPT", help="checkpoint files, or folders of them")
    _model_options(checkpoints, data_needed=True)
    checkpoints.add_argument("--out", type=Path, default=Path("grsd_checkpoints"), metavar="FOLDER", help="results; an "
                             "interrupted command goes on from there (default: %(default)s)")  # fmt: skip
    checkpoints.add_argument("--lr", type=float, help="learning rate, where the checkpoints do not hold it")
    checkpoints.add_argument("--tensorboard", action="store_true", help="also write event files, at the end")
    checkpoints.set_defaults(run=_checkpoints)

    tags = commands.add_parser("tags", help="every tag with its unit and meaning")
    tags.add_argument("--markdown", action="store_true", help="as a Markdown table")
    tags.set_defaults(run=_tags)

    doctor = commands.add_parser("doctor", help="what would work on a model, by which way, at what cost")
    _model_options(doctor, data_needed=False)
    doctor.set_defaults(run=_doctor)
    return p


def _model_options(p: argparse.ArgumentParser, data_needed: bool) -> None:
    where = "module:function or file.py:function"
    p.add_argument("--model", required=True, metavar="M:F", help=f"{where} that returns the nn.Module")
    p.add_argument("--data", required=data_needed, metavar="M:F",
                   help=f"{where} that returns (inputs, targets) or a DataLoader"
                   + ("" if data_needed else "; default: the module's example_input_array"))  # fmt: skip
    p.add_argument("--loss", default="auto", metavar="LOSS",
                   help=f"mse, cross_entropy, {where}, or auto: the module's own (default)")  # fmt: skip
    p.add_argument("--num-probe", type=int, metavar="N", help="samples (default: samples x outputs about 320)")
    p.add_argument("--method", default="auto", choices=("auto", "exact", "lanczos", "krylov", "randomized"))
    p.add_argument("--num-matvecs", type=int, default=64, metavar="K", help="kernel products where not exact")
    p.add_argument("--shells-per-decade", type=int, default=3, metavar="N")
    p.add_argument("--device", default="cpu", help="where to measure (default: cpu)")


def _report(options: argparse.Namespace) -> None:
    from grsd_callbacks.cli.report import report

    report(options.path, options.html)


def _compare(options: argparse.Namespace) -> None:
    from grsd_callbacks.cli.compare import compare

    compare(options.paths)


def _checkpoints(options: argparse.Namespace) -> None:
    from grsd_callbacks.cli.checkpoints import measure_checkpoints
    from grsd_callbacks.cli.loading import subject

    measure_checkpoints(subject(options), options.paths, options.out, lr=options.lr, to_tensorboard=options.tensorboard)


def _tags(options: argparse.Namespace) -> None:
    from grsd_callbacks.cli.tables import show_table
    from grsd_callbacks.tags import meaning_card, meanings

    if options.markdown:
        print(meaning_card())
    else:
        show_table("", ["tag", "unit", "meaning"], meanings())


def _doctor(options: argparse.Namespace) -> int:
    from grsd_callbacks.cli.doctor import doctor
    from grsd_callbacks.cli.loading import subject

    return doctor(subject(options, observe="auto"))
