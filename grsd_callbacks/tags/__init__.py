"""Every tag that is emitted: its unit and its meaning, once.

Shell curves are `grsd_shell_energy/<shell>` with the labels of `ShellGrid.names`. Conventions: THEORY, section 1.
`definitions` and `conditions` hold the curves, `cards` the other tags and the table of all, `snapshots` what is emitted
when, and `charts` the layout in TensorBoard.
"""

from grsd_callbacks.tags.cards import (
    HISTOGRAMS,
    MEANING,
    REPORT,
    SUMMARY,
    TEMPLATES,
    conditions_card,
    meaning_card,
    meanings,
    preformatted,
)
from grsd_callbacks.tags.charts import (
    layout,
    renamed,
)
from grsd_callbacks.tags.conditions import (
    CONDITION_TAGS,
    CONDITION_TEMPLATES,
    CONDITIONS_FAILED,
    CONDITIONS_FIGURE,
    CONDITIONS_MEANING,
    VERDICT_TAGS,
    VERDICTS,
    condition_scalars,
    verdict_scalars,
)
from grsd_callbacks.tags.definitions import (
    FAILED,
    FINAL,
    KEPT,
    MAIN_EXPONENTS,
    SHELL_ENERGY,
    TAGS,
    TRANSFER_TAGS,
    WORK,
    Tag,
)
from grsd_callbacks.tags.snapshots import (
    emission,
    final_scalars,
    histograms,
    scalars,
    update_scalars,
)

__all__ = [
    "CONDITIONS_FAILED",
    "CONDITIONS_FIGURE",
    "CONDITIONS_MEANING",
    "CONDITION_TAGS",
    "CONDITION_TEMPLATES",
    "FAILED",
    "FINAL",
    "HISTOGRAMS",
    "KEPT",
    "MAIN_EXPONENTS",
    "MEANING",
    "REPORT",
    "SHELL_ENERGY",
    "SUMMARY",
    "TAGS",
    "TEMPLATES",
    "TRANSFER_TAGS",
    "Tag",
    "VERDICTS",
    "VERDICT_TAGS",
    "WORK",
    "condition_scalars",
    "conditions_card",
    "emission",
    "final_scalars",
    "histograms",
    "layout",
    "meaning_card",
    "meanings",
    "preformatted",
    "renamed",
    "scalars",
    "update_scalars",
    "verdict_scalars",
]
