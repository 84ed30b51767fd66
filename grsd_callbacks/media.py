"""Texts, tables and figures for loggers that are not TensorBoard, known by the methods that they have.

* W&B: `logger.log_text(key, columns, data, step)` (a table), `logger.log_image(key, images, step)` (PIL images).
* Comet: `experiment.log_text(text, step)`, `experiment.log_figure(figure_name, figure, step)`.
* MLflow: `client.log_text(run_id, text, artifact_file)`, `client.log_figure(run_id, figure, artifact_file)`: files.

Nothing is imported from any of them. A logger may have a part of a convention; what it lacks is left out.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from typing import Any

WriteText = Callable[[str, str, int], None]  # tag, Markdown, step
WriteFigure = Callable[[str, Any, int], None]  # tag, matplotlib figure, step


def text_writer(logger: Any, experiment: Any) -> WriteText | None:
    """How this logger takes texts, or None."""
    log = method(logger, "log_text", "key", "columns", "data", "step")
    if log is not None:
        return lambda tag, text, step: _log_table(log, tag, text, step)
    log_file = method(experiment, "log_text", "run_id", "text", "artifact_file")
    if log_file is not None:
        return lambda tag, text, step: log_file(logger.run_id, text=text, artifact_file=f"{tag}.md")
    log_plain = method(experiment, "log_text", "text", "step")
    if log_plain is not None:
        return lambda tag, text, step: log_plain(text=f"{tag}\n\n{text}", step=step)
    return None


def figure_writer(logger: Any, experiment: Any) -> WriteFigure | None:
    """How this logger takes figures, or None."""
    log = method(logger, "log_image", "key", "images", "step")
    if log is not None:
        return lambda tag, figure, step: log(key=tag, images=[picture(figure)], step=step)
    log_file = method(experiment, "log_figure", "run_id", "figure", "artifact_file")
    if log_file is not None:
        return lambda tag, figure, step: log_file(
            logger.run_id, figure=figure, artifact_file=f"{tag}/step_{step:08d}.png"
        )
    log_named = method(experiment, "log_figure", "figure_name", "figure", "step")
    if log_named is not None:
        return lambda tag, figure, step: log_named(figure_name=tag, figure=figure, step=step)
    return None


def _log_table(log: Callable[..., Any], tag: str, text: str, step: int) -> None:
    columns, rows = table_of(text)
    log(key=tag, columns=columns, data=rows, step=step)


def table_of(text: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a Markdown table; any other text is one cell.

    Example:
        >>> table_of("| tag | unit |\\n|---|---|\\n| `a` | 1 |")
        (['tag', 'unit'], [['a', '1']])
        >>> table_of("hello")
        (['text'], [['hello']])
    """
    lines = text.strip().splitlines()
    if len(lines) < 3 or not all(line.startswith("|") and line.endswith("|") for line in lines):
        return ["text"], [[text]]
    bar = "\0"  # an escaped bar is no border
    rows = [
        [cell.strip().strip("`").replace(bar, "|") for cell in line.replace(r"\|", bar)[1:-1].split("|")]
        for line in lines
    ]
    return rows[0], rows[2:]


def picture(figure: Any) -> Any:
    """A figure as a PIL image."""
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


def method(target: Any, name: str, *parameters: str) -> Callable[..., Any] | None:
    """The method, if it has parameters of these names."""
    found = getattr(target, name, None)
    if not callable(found):
        return None
    return found if set(parameters) <= set(inspect.signature(found).parameters) else None
