"""`grsd report`: a run as the callback's own table, and as one self-contained page with its figures."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grsd_callbacks.cli.runlog import EXPONENTS, RunLog, UsageError, find_runs, summary_card, verdict_card
from grsd_callbacks.cli.tables import plain_table
from grsd_callbacks.figures import FIGURES, overview, run_figures
from grsd_callbacks.report import EXPONENT_NAMES, summary_table
from grsd_callbacks.tags import SHELL_ENERGY, TAGS

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; font-size: 13px; line-height: 1.35; }
figure { display: inline-block; margin: 0.5rem; max-width: 100%; vertical-align: top; }
figcaption { font-size: 14px; color: #555; max-width: 640px; }
img { max-width: 100%; }
"""


def report(path: Path, page: Path | None = None) -> None:
    """Print every run at a path; with a page, also write it as HTML.

    Raises:
        UsageError: nothing of ours at the path, or the page cannot be written; nothing is written then.
    """
    if page is not None and not page.parent.is_dir():
        raise UsageError(f"{page} cannot be written: there is no folder {page.parent}")
    runs = find_runs(path)
    texts = [run_text(run) for run in runs]
    for k, (run, text) in enumerate(zip(runs, texts, strict=True)):
        if len(runs) > 1:
            print(f"{'' if k == 0 else chr(10)}=== {run.name} ({run.path}) ===")
        print(text)
        print(*(f"note: {note}" for note in run.notes), sep="\n", end="\n" if run.notes else "")
    if page is not None:
        write_page(page, html_page(str(path), runs, texts))
        print(f"page: {page}")


def run_text(run: RunLog) -> str:
    """The callback's summary of a run: made again from its measurements, or the card, or what the curves tell."""
    if run.history:
        shells = summary_table(run.history, run.fits())
    elif run.curves:
        shells = summary_card(run) or curves_text(run)
    else:
        shells = ""
    return "\n\n".join(text for text in (shells, verdict_card(run)) if text)


def curves_text(run: RunLog) -> str:
    """What the curves of a run without snapshots and summary (stopped early) tell."""
    loss = run.curves["grsd_loss/probe"]
    lines = [f"from curves: {len(loss)} measurements, step {loss[0][0]} -> {loss[-1][0]}"]
    rows = [[tag, *(f"{points[k][1]:.4g}" for k in (0, -1)), _unit(tag)] for tag, points in sorted(run.curves.items())]
    shells = [row for row in rows if row[0].startswith(SHELL_ENERGY)]
    others = [row for row in rows if row[0] in TAGS and not row[0].startswith(("grsd_exponents", "grsd_bands"))]
    found = run.estimates()
    exponents = []
    for name in EXPONENTS:
        fit = found.get(name)
        value = "not drawn"
        if fit is not None:
            middle = getattr(fit, "value", None)
            value = f"{middle:.3f} [{fit.lower:.3f}, {fit.upper:.3f}]"
        exponents.append([f"  {name}", EXPONENT_NAMES[name], value])
    columns = ["", "first", "last", "unit"]
    return "\n\n".join(
        [
            lines[0],
            plain_table("shell energies (resolved shells that held energy)", columns, shells),
            plain_table("exponents, 95 % intervals, as last drawn (q: at the start)", ["", "", ""], exponents),
            plain_table("curves", columns, others),
        ]
    )


def _unit(tag: str) -> str:
    return TAGS[tag].unit if tag in TAGS else "loss"


# -- the page --------------------------------------------------------------------------------------------


def html_page(title: str, runs: Sequence[RunLog], texts: Sequence[str]) -> str:
    """One page without any reference to the outside: tables as text, figures as data.

    Raises:
        UsageError: matplotlib is not installed.
    """
    parts = [f"<h1>grsd report: {html.escape(title)}</h1>"]
    for run, text in zip(runs, texts, strict=True):
        parts.append(f"<h2>{html.escape(run.name)}</h2>\n<p><code>{html.escape(str(run.path))}</code></p>")
        parts += [f"<p>Note: {html.escape(note)}.</p>" for note in run.notes]
        parts.append(f"<pre>{html.escape(text)}</pre>")
        for tag, picture in pictures(run).items():
            caption = f"{FIGURES[tag][1]} ({FIGURES[tag][0]})" if tag in FIGURES else "overview of the run"
            data = base64.b64encode(picture).decode()
            parts.append(
                f'<figure><img alt="{html.escape(tag)}" src="data:image/png;base64,{data}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
    head = f'<meta charset="utf-8"><title>grsd: {html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def pictures(run: RunLog) -> dict[str, bytes]:
    """PNG files by tag: drawn from the measurements, or those that the run has drawn itself.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if not run.history:
        return run.images
    try:
        drawn = {"overview": _png(overview(run.history))}
    except ImportError as error:
        raise UsageError(f"the page needs figures: {error}") from None
    return {**drawn, **{tag: _png(draw()) for tag, draw in run_figures(run.history, run.fits()).items()}}


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def write_page(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        UsageError: the folder is missing or cannot be written to.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
