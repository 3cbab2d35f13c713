"""The page of an audit: counts, and the worst examples; hints and questions are shown as text and never as markup."""

import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from dopd.hints.audit import Audit
from dopd.hints.coverage import FAULTS
from dopd.hints.leaks import KINDS
from dopd.report.palette import style_variables
from dopd.shown import visible

_MOST_SHOWN = 50
_LONGEST = 4000  # characters of a hint or a question


def audit_page(title: str, audit: Audit) -> str:
    """The page as text; it needs nothing from elsewhere and has no script."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string((files("dopd.hints") / "audit.html").read_text(encoding="utf-8"))
    worst = sorted(audit.leaks, key=lambda row: (-len(audit.leaks[row]), row))
    faulty = [row for row in audit.coverage.about if row not in audit.leaks]
    return template.render(
        title=visible(title),
        style=style_variables(),
        audit=audit,
        kinds=[(kind, count, KINDS[kind]) for kind, count in audit.counts.items()],
        faults=[(name, len(rows), FAULTS[name]) for name, rows in audit.coverage.rows.items()],
        behaviour=[
            (name.replace("_", " "), _shown(value)) for name, value in audit.behaviour.items() if name != "rows"
        ],
        worst=[_example(audit, row) for row in worst[:_MOST_SHOWN]],
        faulty=[_example(audit, row) for row in faulty[:_MOST_SHOWN]],
        num_leaks=len(worst),
        num_faulty=len(faulty),
        most=_MOST_SHOWN,
    )


def _example(audit: Audit, row: int) -> dict[str, Any]:
    hint, leaks = audit.hints[row], audit.leaks.get(row, {})
    text = "" if hint is None else hint.text[:_LONGEST]
    return {
        "row": row,
        "kinds": ", ".join(leaks) or ", ".join(name for name, rows in audit.coverage.rows.items() if row in rows),
        "about": visible(audit.coverage.about.get(row, "")),
        "question": "" if hint is None else visible(hint.question[:_LONGEST]),
        "answer": "" if hint is None or hint.answer is None else visible(hint.answer[:_LONGEST]),
        "parts": _marked(text, list(leaks.values())),
    }


def _marked(text: str, evidence: Sequence[str]) -> list[tuple[str, bool]]:
    """The text in parts, those that give something away marked."""
    marked = sorted({one for one in evidence if one and one in text}, key=len, reverse=True)
    if not marked:
        return [(visible(text), False)]
    parts = re.split("(" + "|".join(map(re.escape, marked)) + ")", text)
    return [(visible(part), part in marked) for part in parts if part]


def _shown(value: Any) -> str:
    if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
        return f"{value['mean']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
    return f"{value:.3g}" if isinstance(value, float) else visible(value)
