"""Completions token by token in a terminal."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from dopd.report.palette import blend, label_colours, label_meanings
from dopd.report.terminal import print_table
from dopd.shown import visible

_NUM_LISTED = 8
_BLACK, _WHITE = "#000000", "#ffffff"


def print_records(console: Console, records: Sequence[Mapping[str, Any]]) -> None:
    """Every completion in colours, a legend, and the tokens with the largest gaps (or losses, where none is routed)."""
    labels = dict.fromkeys(label for record in records for label in record["rules"])
    for label, (name, meaning) in label_meanings(labels).items():
        if label in labels:
            line = Text.assemble((f" {label} ", _style(label, 1.0, labels)), f" {name}: {meaning}")
            console.print(line, soft_wrap=True)
    for record in records:
        thresholds = record["thresholds"]
        averages = "" if thresholds is None else f", gap threshold {thresholds['gap']:.3f} nats"
        console.print()
        console.print(Text(f"answer {record['rollout'] + 1}: {record['num_tokens']} tokens{averages}", style="bold"))
        console.print(completion_text(record, marked=console.color_system is None))
        _print_largest(console, record)


def completion_text(record: Mapping[str, Any], *, marked: bool) -> Text:
    """The tokens, each on the colour of its regime; `marked` puts the regime behind every token that is routed."""
    text = Text()
    for token, share in zip(record["tokens"], strengths(record), strict=True):
        label = token["regime"] or "all"
        shown = visible(token["text"])
        lead = shown[: len(shown) - len(shown.lstrip(" "))] if shown.strip() else ""
        text.append(lead)
        text.append(shown[len(lead) :].replace("\n", "\\n\n"), style=_style(label, share, record["rules"]))
        if marked and label != "all":
            text.append(f"[{label}]")
    return text


def strengths(record: Mapping[str, Any]) -> list[float]:
    """How strong the colour of each token is, 0 to 1: half at the threshold (unrouted: at the mean loss)."""
    name, half = "gap", (record["thresholds"] or {}).get("gap", 0.0)
    if record["thresholds"] is None:
        name, half = "loss", sum(token["loss"] for token in record["tokens"]) / len(record["tokens"])
    return [token[name] / ((token[name] + half) or 1.0) for token in record["tokens"]]


def _style(label: str, share: float, labels: Iterable[str]) -> str:
    return f"{_BLACK} on {blend(label_colours(labels)[label], _WHITE, 0.15 + 0.85 * share)}"


def _print_largest(console: Console, record: Mapping[str, Any]) -> None:
    routed = record["thresholds"] is not None
    name = "gap" if routed else "loss"
    columns = ["token", "regime", "gap", "q_T", "q_S", "student", "entropy", "loss", "target"]
    rows = []
    for token in sorted(record["tokens"], key=lambda token: -token[name])[:_NUM_LISTED]:
        label = token["regime"] or "all"
        cells = [
            _number(token["gap"]),
            _probability(token["logprob_teacher"]),
            _probability(token["logprob_student"]),
            _probability(token["logprob_plain"]),
            _number(token["entropy"]),
            _number(token["loss"]),
        ]
        shown, first = _visible(token["text"]), (token["top_target"] or [["-", 0.0]])[0]
        cells.append(f"{_visible(first[0])} {first[1]:.2f}")
        rows.append([Text(shown), Text(label, style=_style(label, 1.0, record["rules"])), *map(Text, cells)])
    title = f"largest {'gaps' if routed else 'losses'} (nats)"
    print_table(console, columns, rows, title=title, right=set(columns) - {"token", "regime", "target"})


def _visible(text: str) -> str:
    return visible(text).strip() or repr(text)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _probability(logprob: float | None) -> str:
    return "-" if logprob is None else f"{math.exp(logprob):.3f}"
