"""Tables and examples as text, from what runs left behind."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from dopd.report.comparisons import compare, over_seeds
from dopd.report.palette import REGIMES
from dopd.report.verdict import verdict_sentence
from dopd.statistics import Interval

_KINDS = {
    "greedy": "greedy, no p",
    "sampled": "sampled, no p",
    "blank": "greedy, grey images",
    "privileged": "greedy WITH p",
}


def summary_table(summary: Mapping[str, Any]) -> str:
    """Start, teacher and every method: accuracies without p with 95% intervals, entropy, length, as Markdown.

    Intervals of start and teacher are over prompts (Wilson); those of methods over seeds (Student's t), where there are
    at least two.
    """
    header, rows = summary_rows(summary)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    title = f"# {summary['task']}: {summary['student']} taught by {summary['teacher']}"
    note = (
        "Accuracy on held-out problems, mean [95% interval]: over prompts for start and teacher, over seeds for "
        "methods (all from the same start). Privileged information is never used when answers are judged, except in "
        "the column that says so."
    )
    return "\n".join([title, "", *lines, "", note, *verdicts(summary), ""])


def summary_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table, as text."""
    pictured = "accuracy_blank" in summary["start"]["metrics"]
    kinds = [kind for kind in _KINDS if pictured or kind != "blank"]
    rows = [_single("start (student)", summary["start"], kinds), _single("teacher", summary["teacher_result"], kinds)]
    rows += [_over_seeds(name, results, kinds) for name, results in summary["methods"].items()]
    return ["", *(f"{_KINDS[kind]} (%)" for kind in kinds), "entropy (nats)", "length (tokens)", "runs"], rows


def _single(name: str, record: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    def cell(key: str) -> str:
        interval = record["intervals"].get(key)
        return "-" if interval is None else Interval(**interval).percent()

    metrics = record["metrics"]
    accuracies = [cell(f"accuracy_{kind}") for kind in kinds]
    return [name, *accuracies, f"{metrics['entropy']:.3f}", f"{metrics['length']:.1f}", "1"]


def _over_seeds(name: str, results: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> list[str]:
    if len(results) == 1:
        return _single(name, results[0], kinds)
    found = [over_seeds(results, f"accuracy_{kind}") for kind in kinds]
    accuracies = ["-" if interval is None else interval.percent() for interval in found]
    entropy, length = (fmean(result["metrics"][name] for result in results) for name in ("entropy", "length"))
    return [name, *accuracies, f"{entropy:.3f}", f"{length:.1f}", str(len(results))]


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """What the differences say: one sentence, then every method against the start, and against the reference."""
    methods = {name: dict(enumerate(results)) for name, results in summary["methods"].items()}
    starts = {name: dict.fromkeys(results, summary["start"]) for name, results in methods.items()}
    found = compare(methods, starts, methods)
    _, sentence = verdict_sentence(found, list(methods))
    lines = ["", sentence, "", "Differences in points, 95% intervals:", ""]
    for method, against in dict.fromkeys((difference.method, difference.against) for difference in found):
        parts = [
            f"{difference.measure} {difference.points()}, {difference.words()}"
            for difference in found
            if (difference.method, difference.against) == (method, against)
        ]
        lines.append(f"- {method} against {against}: {'; '.join(parts)}.")
    return lines


def examples_text(traces: Sequence[Mapping[str, Any]]) -> str:
    """Traced completions as Markdown, every token followed by its regime."""
    lines = ["# Completions with the regime of every token", ""]
    lines += [f"- **{name}**: {what}; {taught}" for name, (what, taught) in REGIMES.items() if name != "all"]
    if not traces:
        return "\n".join([*lines, "", "No routed run was traced.", ""])
    for trace in traces:
        tokens = " ".join(f"{token['text'].strip()}[{token['regime']}]" for token in trace["tokens"])
        score = "" if trace["score"] is None else f", score {trace['score']:g}"
        lines += [
            "",
            f"## Step {trace['step']}, completion {trace['row']}{score}",
            "",
            f"- prompt: `{trace['prompt']}`",
            f"- privileged context: `{trace['privileged_context']}`",
            f"- completion: `{tokens}`",
        ]
    return "\n".join([*lines, ""])
