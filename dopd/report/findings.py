"""Warnings: what in a run's numbers says that it did not do what it should, in words that name the numbers."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dopd.report.groups import RunGroup, seed_of
from dopd.report.headline import evaluations
from dopd.report.records import RunRecord
from dopd.report.series import points_of

_COLLAPSED = 0.25  # of the entropy at the start: answers have lost most of their variety
_ONE_REGIME = 0.99  # share of tokens in one regime: routing says nothing
_COPIED_WORDS = 5  # words in a row; shorter runs are common by chance
_LEAKING = 0.05  # share of traced completions
_CUT = 0.9  # share of rollouts cut at the length limit
_SPEAKS_OF_P = re.compile(
    r"\b(hints?|privileged|reference (solution|answer)|(given|provided) (plan|steps|answer))\b", re.I
)


def findings(groups: Sequence[RunGroup], summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Warnings of all runs, the worst first: `level` (`bad` or `note`), `run`, `title`, `text`."""
    found = [*_teacher_no_better(summary)]
    for group in groups:
        for run in group.runs:
            name = group.label if len(group.runs) == 1 else f"{group.label}, seed {seed_of(run)}"
            found += [
                {"level": level, "run": name, "title": title, "text": text}
                for check in _CHECKS
                for level, title, text in check(run)
            ]
    return sorted(found, key=lambda finding: finding["level"] != "bad")


Found = Iterable[tuple[str, str, str]]


def _unread_lines(run: RunRecord) -> Found:
    if run.unread:
        text = f"{run.unread} lines of metrics or traces do not follow the format and were left out of this page"
        yield "note", "lines that cannot be read", text


def _collapse(run: RunRecord) -> Found:
    entropy = list(points_of(run, "eval_entropy").values()) or list(points_of(run, "entropy").values())
    if len(entropy) >= 3 and entropy[0] > 0:
        start, end = entropy[0], statistics.fmean(entropy[-2:])
        accuracy = list(points_of(run, "eval_accuracy_greedy").values())
        worse = len(accuracy) > 1 and accuracy[-1] < max(accuracy) - _noise(run, max(accuracy))
        if end < _COLLAPSED * start and (worse or not accuracy):
            yield (
                "bad",
                "collapse",
                f"entropy fell from {start:.3f} to {end:.3f} nats, and accuracy fell from its best.",
            )
    cut = list(points_of(run, "completions/clipped_ratio").values())
    if len(cut) >= 3 and statistics.fmean(cut[-3:]) > _CUT > cut[0]:
        yield (
            "bad",
            "endless answers",
            f"{statistics.fmean(cut[-3:]):.0%} of the last rollouts were cut at the length limit.",
        )


def _illusion(run: RunRecord) -> Found:
    """The privilege illusion: from the best plain accuracy on, accuracy with p rises while accuracy without p falls."""
    plain, privileged = points_of(run, "eval_accuracy_greedy"), points_of(run, "eval_accuracy_privileged")
    steps = [step for step in plain if step in privileged]
    if len(steps) < 2:
        return
    best, last = max(steps, key=lambda step: plain[step]), steps[-1]
    fall, rise = plain[best] - plain[last], privileged[last] - privileged[best]
    if fall > _noise(run, plain[best]) and rise > 0.01:
        yield (
            "bad",
            "privilege illusion",
            f"from step {best} to {last}, accuracy without p fell by {100 * fall:.1f} points while accuracy with p "
            f"rose by {100 * rise:.1f}: the student learns to use what it will not have.",
        )
    top = max(privileged.values())
    drift = top - privileged[last]
    if drift > max(0.1, _noise(run, top)) and "privileged_student" in _sources(run):
        yield (
            "note",
            "the privileged student drifts",
            f"accuracy with p fell by {100 * drift:.1f} points from its best; its targets get worse. A lower learning "
            "rate, or privileged_student='ema' or 'frozen', helps.",
        )


def _one_regime(run: RunRecord) -> Found:
    names = run.names("share/")
    for name in names if len(names) > 1 else []:
        values = run.series(name)[1]
        count = sum(value > _ONE_REGIME for value in values)
        if count:
            yield (
                "bad",
                "one regime takes all",
                f"{name.removeprefix('share/')} has more than {_ONE_REGIME:.0%} of the tokens in {count} of "
                f"{len(values)} logged steps: routing says nothing there.",
            )


def _dead_teacher(run: RunRecord) -> Found:
    tokens = [token for record in run.trace for token in record["tokens"]]
    teacher = [token["logprob_teacher"] for token in tokens if token.get("logprob_teacher") is not None]
    if len(teacher) >= 20 and statistics.pstdev(teacher) < 1e-3:
        text = f"its log-prob is {teacher[0]:.4f} for all {len(teacher)} traced tokens."
        yield "bad", "dead teacher", f"{text} Check the checkpoint."
    gaps = [token["gap"] for token in tokens if token.get("gap") is not None]
    if len(gaps) >= 20 and max(gaps) < 1e-4:
        yield "bad", "teacher and student are the same", "all gaps of traced tokens are 0: are these one checkpoint?"


def _leak(run: RunRecord) -> Found:
    records = [record for record in run.trace if record.get("privileged_context")]
    if not records:
        return
    copied = [record for record in records if copies_hint(record)]
    if len(copied) > _LEAKING * len(records):
        yield (
            "bad",
            "the hint leaks into answers",
            f"{len(copied)} of {len(records)} traced completions repeat {_COPIED_WORDS} or more words in a row of "
            f"their privileged context that the prompt does not have (first at step {copied[0]['step']}).",
        )
    speaking = [
        record
        for record in records
        if _SPEAKS_OF_P.search(completion_text(record)) and not _SPEAKS_OF_P.search(record["prompt"])
    ]
    if len(speaking) > _LEAKING * len(records):
        yield (
            "bad",
            "answers speak of a hint",
            f"{len(speaking)} of {len(records)} traced completions mention a hint that the student does not see (first "
            f"at step {speaking[0]['step']}).",
        )


def _missing(run: RunRecord) -> Found:
    missing = run.series("privileged/missing_ratio")[1]
    if missing and statistics.fmean(missing) > 0:
        yield "note", "prompts without p", f"{statistics.fmean(missing):.1%} of the prompts had no privileged context."
    dropped = run.series("trace/dropped")[1]
    if dropped:
        yield "note", "the trace is not whole", f"{dropped[-1]:.0f} completions did not fit into trace_max_bytes."


_CHECKS: tuple[Callable[[RunRecord], Found], ...] = (
    _collapse,
    _illusion,
    _one_regime,
    _dead_teacher,
    _leak,
    _missing,
    _unread_lines,
)


def _teacher_no_better(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    if not (summary.get("start") and summary.get("teacher_result")):
        return []
    start, teacher = (summary[name]["metrics"] for name in ("start", "teacher_result"))
    if "accuracy_greedy" not in start or "accuracy_greedy" not in teacher:
        return []
    best = max(teacher["accuracy_greedy"], teacher.get("accuracy_privileged", 0.0))
    if best > start["accuracy_greedy"]:
        return []
    text = f"its best accuracy, with or without p, is {best:.1%}; the student starts at {start['accuracy_greedy']:.1%}."
    return [{"level": "bad", "run": "all", "title": "the teacher is no better than the student", "text": text}]


def copies_hint(record: Mapping[str, Any]) -> bool:
    """Whether a completion repeats words of the privileged context, in a row, that its prompt does not have."""
    prompt, hint = _phrases(record["prompt"]), _phrases(str(record["privileged_context"]))
    return bool((hint - prompt) & _phrases(completion_text(record)))


def completion_text(record: Mapping[str, Any]) -> str:
    return "".join(token["text"] for token in record["tokens"])


def _phrases(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[n : n + _COPIED_WORDS]) for n in range(len(words) - _COPIED_WORDS + 1)}


def _noise(run: RunRecord, accuracy: float) -> float:
    """Two standard errors of the difference of two evaluations on the same prompts; at least 2 points."""
    count = max((int(record.get("eval_num_prompts", 0)) for record in evaluations(run)), default=0)
    return max(0.02, 2 * math.sqrt(2 * accuracy * (1 - accuracy) / count)) if count else 0.1


def _sources(run: RunRecord) -> set[str]:
    return {rule["source"] for record in run.trace for rule in record.get("rules", {}).values()}
