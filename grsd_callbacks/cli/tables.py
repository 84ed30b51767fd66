"""Tables for people: aligned text, or rich's boxes where rich is installed and a terminal is looking."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence

#: widest column of a plain table; longer cells are wrapped
WIDEST = 76


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """Print a table; rich draws it if it is installed and stdout is a terminal."""
    if sys.stdout.isatty() and _show_rich(title, columns, rows):
        print(*notes, sep="\n", end="\n" if notes else "")
        return
    print(plain_table(title, columns, rows, notes))


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """The same table as text.

    Example:
        >>> print(plain_table("exponents", ["", "run a"], [["chi", "0.51"]]))
        exponents
             run a
        chi  0.51
    """
    cells = [[textwrap.wrap(cell, WIDEST) or [""] for cell in row] for row in [list(columns), *rows]]
    widths = [max(len(line) for row in cells for line in row[k]) for k in range(len(columns))]
    lines = [title] if title else []
    for row in cells:
        for k in range(max(len(cell) for cell in row)):
            parts = [(cell[k] if k < len(cell) else "").ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(parts).rstrip())
    return "\n".join([*lines, *notes])


def _show_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # as it is: brackets of intervals are no markup
    Console().print(table)
    return True
