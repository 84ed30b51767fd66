"""What is written beside the curves of `TAGS`, and the table that says what every tag means."""

from __future__ import annotations

from grsd_callbacks.figures import FIGURES
from grsd_callbacks.tags.conditions import CONDITION_TAGS, CONDITION_TEMPLATES
from grsd_callbacks.tags.definitions import FAILED, FINAL, KEPT, NOT_DRAWN, SHELL_ENERGY, TAGS, WORK

HISTOGRAMS = {
    "grsd_histograms/count": ("log10 lambda", "eigenvalues of M per shell"),
    "grsd_histograms/energy": ("log10 lambda", "shell energies E_a"),
    "grsd_histograms/dissipation": ("log10 lambda", "shell dissipation D_a"),
}
TEMPLATES = {
    f"{SHELL_ENERGY}/<shell>": ("loss", "E_a = 1/2 sum g_i^2 of the shell; resolved shells that hold energy"),
    f"{WORK}/total": (
        "loss",
        "-<r, sqrt(nu) J dtheta>: first-order loss decrease on the probe by the actual step after the measurement",
    ),
    f"{WORK}/effective_lr": ("1", "sum W_a / (lr sum D_a): 1 for full-batch gradient descent on the probe"),
    FAILED: ("count", "measurements that could not be made, or not be written in full, so far"),
    f"{FINAL}/<exponent>": (
        "1",
        "at the end, over the whole run: each exponent above; a_start, a of the first measurement; pi_c, loss after "
        "forgetting modes below lambda_c ~ lambda_c^pi_c; closure_<closure> (compression: chi / pi_c - rho); "
        "collapse and collapse_frozen, score of E t^chi over lambda t and lambda_0 t^rho (1: one curve; not above its "
        "_null: accident); "
        f"with `_lower` and `_upper`, the ends of the 95 % interval {NOT_DRAWN}",
    ),
}

#: text cards of a run
MEANING, REPORT, SUMMARY = "grsd_run/tags", "grsd_run/report", "grsd_run/summary"


def meanings() -> list[tuple[str, str, str]]:
    """Every tag with unit and meaning."""
    rows = [(tag, spec.unit, spec.meaning + (f" {NOT_DRAWN}" if tag in KEPT else "")) for tag, spec in TAGS.items()]
    rows += [(tag, unit, meaning) for tag, (unit, meaning) in {**TEMPLATES, **HISTOGRAMS, **FIGURES}.items()]
    return rows + _condition_rows()


def meaning_card() -> str:
    """Markdown table of every tag with unit and meaning (the text card `grsd_run/tags`)."""
    return _card(meanings())


def conditions_card() -> str:
    """Markdown table of the conditions' tags (the text card `grsd_renorm/meaning`)."""
    return _card(_condition_rows())


def _condition_rows() -> list[tuple[str, str, str]]:
    rows = [(tag, unit, meaning) for tag, (unit, meaning, _) in CONDITION_TAGS.items()]
    return rows + [(tag, unit, meaning) for tag, (unit, meaning) in CONDITION_TEMPLATES.items()]


def _card(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| tag | unit | meaning |", "|---|---|---|"]
    lines += [f"| `{tag}` | {unit} | {meaning.replace('|', chr(92) + '|')} |" for tag, unit, meaning in rows]
    return "\n".join(lines)


def preformatted(text: str) -> str:
    """Plain text as Markdown that keeps its lines."""
    return f"```\n{text}\n```"
