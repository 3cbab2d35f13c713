"""Warnings: what in a run's numbers says that it did not do what it should, in words that name the numbers, and what
to change.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dopd.report.groups import RunGroup, seed_of
from dopd.report.headline import evaluations
from dopd.report.monitors import FEW, LENGTH, MONITORS, limits_of, monitored
from dopd.report.records import RunRecord
from dopd.report.series import points_of

_COLLAPSED = 0.25  # of the entropy at the start: answers have lost most of their variety
_ONE_REGIME = 0.99  # share of tokens in one regime: routing says nothing
_ENDLESS = 0.9  # share of rollouts cut at the length limit
_CLIPPED, _OFTEN_CLIPPED = 0.05, 0.3  # the same: worth a note, and spoiling the run


@dataclass(frozen=True)
class Found:
    """One warning of one run: `level` (`bad` or `note`), what is wrong in a few words, its numbers, what to do, and
    whether a higher learning rate or more steps would make it worse.
    """

    level: str
    title: str
    text: str
    advice: str
    overtrained: bool = False


def findings(groups: Sequence[RunGroup], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Warnings by method: `method`, and `warnings` with `level`, `title`, `runs` (`run` and `text` of each run that has
    it), `of` (how many runs the method has), `advice` and `overtrained`; of one method, what is bad first.
    """
    found = []
    about_all = list(_teacher_no_better(summary))
    if about_all:
        found.append({"method": "all methods", "warnings": [_merged([("", one)], 1) for one in about_all]})
    for group in groups:
        by_title: dict[str, list[tuple[str, Found]]] = {}
        for run in group.runs:
            for check in _CHECKS:
                for one in check(run):
                    by_title.setdefault(one.title, []).append((f"seed {seed_of(run)}", one))
        warnings = [_merged(same, len(group.runs)) for same in by_title.values()]
        if warnings:
            warnings.sort(key=lambda warning: (warning["level"] != "bad", -len(warning["runs"])))
            found.append({"method": group.label, "warnings": warnings})
    return found


def _merged(same: Sequence[tuple[str, Found]], of: int) -> dict[str, Any]:
    worst_first = sorted(same, key=lambda named: named[1].level != "bad")
    worst = worst_first[0][1]
    runs = [{"run": run, "text": one.text} for run, one in worst_first]
    summary = {"level": worst.level, "title": worst.title, "runs": runs, "of": of, "advice": worst.advice}
    return summary | {"overtrained": worst.overtrained}


def num_serious(found: Sequence[Mapping[str, Any]]) -> int:
    """How many warnings say that something went wrong."""
    return sum(warning["level"] == "bad" for method in found for warning in method["warnings"])


def _damaged(run: RunRecord) -> Iterator[Found]:
    if run.damaged:
        yield Found(
            "bad",
            "damaged files",
            f"{run.folder.name}: {'; '.join(run.damaged)}.",
            "What they held is missing from this page, and from what it says. Copy them from where they are whole, or "
            "train again.",
        )


def _unread_lines(run: RunRecord) -> Iterator[Found]:
    if run.unread:
        yield Found(
            "note",
            "lines that cannot be read",
            f"{run.unread} lines of metrics or traces do not follow the format and were left out of this page.",
            "Was the file edited, or written by another version? The other lines are shown as they are.",
        )


def _collapse(run: RunRecord) -> Iterator[Found]:
    entropy = list(points_of(run, "eval_entropy").values()) or list(points_of(run, "entropy").values())
    if len(entropy) < 3 or entropy[0] <= 0:
        return
    start, end = entropy[0], statistics.fmean(entropy[-2:])
    accuracy = list(points_of(run, "eval_accuracy_greedy").values())
    worse = len(accuracy) > 1 and accuracy[-1] < max(accuracy) - _noise(run, max(accuracy))
    if end < _COLLAPSED * start and (worse or not accuracy):
        yield Found(
            "bad",
            "collapse",
            f"entropy fell from {start:.3f} to {end:.3f} nats, and accuracy fell from its best.",
            "Lower `learning_rate` to a third and stop at the best step; of routed methods, try "
            "`privileged_student: ema` or `privileged_student: frozen`.",
            overtrained=True,
        )


def _clipped(run: RunRecord) -> Iterator[Found]:
    cut = list(points_of(run, "completions/clipped_ratio").values())
    if not cut:
        return
    start, end = statistics.fmean(cut[:FEW]), statistics.fmean(cut[-FEW:])
    limit = run.config.get("max_completion_length")
    at = f" (`max_completion_length: {limit}`)" if isinstance(limit, int) else ""
    text = f"{end:.0%} of the last rollouts were cut at the length limit{at}; {start:.0%} of the first."
    if len(cut) >= FEW and end > _ENDLESS > cut[0]:
        yield Found(
            "bad",
            "endless answers",
            text,
            "The student has unlearned to end: lower `learning_rate`, and check that the teacher ends its answers with "
            "a token that the student knows as an end.",
            overtrained=True,
        )
    elif end > _CLIPPED:
        yield Found(
            "bad" if end > _OFTEN_CLIPPED else "note",
            "clipped answers",
            text,
            "What is cut is never judged right, and its end is not taught: raise `max_completion_length` (try twice as "
            "much) until fewer than 1% are cut, or ask for shorter answers in the prompt.",
        )


def _lengths(run: RunRecord) -> Iterator[Found]:
    lengths = list(points_of(run, LENGTH).values())
    found = MONITORS[LENGTH].beyond(lengths, limits_of(run.config)[LENGTH])
    if found is None:
        return
    start, end = found
    text = f"the mean length of rollouts went from {start:.0f} to {end:.0f} tokens."
    if end > start:
        yield Found(
            "note",
            "answers grow longer",
            text,
            "Compare the last answers below with the first: if they repeat themselves or copy the length of p, lower "
            "`learning_rate` or shorten p; if they reason more and accuracy rises, raise `max_completion_length` with "
            "them.",
            overtrained=True,
        )
    else:
        yield Found(
            "note",
            "answers grow shorter",
            text,
            "Compare the last answers below with the first: a student that leaves its reasoning out has learned to "
            "answer as if it had p. Lower `learning_rate`, or try a p that names the steps and not the result.",
            overtrained=True,
        )


def _illusion(run: RunRecord) -> Iterator[Found]:
    """The privilege illusion: from the best plain accuracy on, accuracy with p rises while accuracy without p falls."""
    plain, privileged = points_of(run, "eval_accuracy_greedy"), points_of(run, "eval_accuracy_privileged")
    steps = [step for step in plain if step in privileged]
    if len(steps) < 2:
        return
    best, last = max(steps, key=lambda step: plain[step]), steps[-1]
    fall, rise = plain[best] - plain[last], privileged[last] - privileged[best]
    if fall > _noise(run, plain[best]) and rise > 0.01:
        yield Found(
            "bad",
            "privilege illusion",
            f"from step {best} to {last}, accuracy without p fell by {100 * fall:.1f} points while accuracy with p "
            f"rose by {100 * rise:.1f}: the student learns to use what it will not have.",
            f"Stop at step {best} (`max_steps: {best}`), or try `method: dopd` with `privileged_student: ema`; a p "
            "that says less of the answer leaves less to copy.",
            overtrained=True,
        )
    top = max(privileged.values())
    drift = top - privileged[last]
    if drift > max(0.1, _noise(run, top)) and "privileged_student" in _sources(run):
        yield Found(
            "note",
            "the privileged student drifts",
            f"accuracy with p fell by {100 * drift:.1f} points from its best; its targets get worse.",
            "Lower `learning_rate`, or try `privileged_student: ema` or `privileged_student: frozen`.",
            overtrained=True,
        )


def _one_regime(run: RunRecord) -> Iterator[Found]:
    names = run.names("share/")
    for name in names if len(names) > 1 else []:
        values = run.series(name)[1]
        count = sum(value > _ONE_REGIME for value in values)
        if count:
            label = name.removeprefix("share/")
            yield Found(
                "bad",
                f"one regime ({label}) takes all",
                f"{label} has more than {_ONE_REGIME:.0%} of the tokens in {count} of {len(values)} logged steps: "
                "routing says nothing there.",
                "Look at gaps and p below: a p that says nothing new, or a teacher like the student, leaves no gap. "
                "Try `method: privileged_teacher`, which routes nothing.",
            )


def _dead_teacher(run: RunRecord) -> Iterator[Found]:
    tokens = [token for record in run.trace for token in record["tokens"]]
    teacher = [token["logprob_teacher"] for token in tokens if token.get("logprob_teacher") is not None]
    if len(teacher) >= 20 and statistics.pstdev(teacher) < 1e-3:
        yield Found(
            "bad",
            "dead teacher",
            f"its log-prob is {teacher[0]:.4f} for all {len(teacher)} traced tokens.",
            "Check the checkpoint of `teacher_model_name_or_path`: its answers to a prompt, and its tokenizer.",
        )
    gaps = [token["gap"] for token in tokens if token.get("gap") is not None]
    if len(gaps) >= 20 and max(gaps) < 1e-4:
        yield Found(
            "bad",
            "teacher and student are the same",
            "all gaps of traced tokens are 0.",
            "Check that `model_name_or_path` and `teacher_model_name_or_path` are not one checkpoint.",
        )


def _monitored(run: RunRecord) -> Iterator[Found]:
    for level, title, text, advice in monitored(run):
        yield Found(level, title, text, advice, overtrained=True)


def _missing(run: RunRecord) -> Iterator[Found]:
    missing = run.series("privileged/missing_ratio")[1]
    if missing and statistics.fmean(missing) > 0:
        yield Found(
            "note",
            "prompts without p",
            f"{statistics.fmean(missing):.1%} of the prompts had no privileged context.",
            "Fill the column `privileged_context`, or leave those rows out: they are taught without p.",
        )
    dropped = run.series("trace/dropped")[1]
    if dropped:
        yield Found(
            "note",
            "the trace is not whole",
            f"{dropped[-1]:.0f} completions did not fit into the trace file.",
            "Raise `trace_max_bytes` or `trace_steps`, or lower `trace_examples`.",
        )


_CHECKS: tuple[Callable[[RunRecord], Iterator[Found]], ...] = (
    _collapse,
    _clipped,
    _lengths,
    _illusion,
    _one_regime,
    _dead_teacher,
    _monitored,
    _missing,
    _damaged,
    _unread_lines,
)


def _teacher_no_better(summary: Mapping[str, Any]) -> Iterator[Found]:
    if not (summary.get("start") and summary.get("teacher_result")):
        return
    start, teacher = (summary[name]["metrics"] for name in ("start", "teacher_result"))
    if "accuracy_greedy" not in start or "accuracy_greedy" not in teacher:
        return
    best = max(teacher["accuracy_greedy"], teacher.get("accuracy_privileged", 0.0))
    if best <= start["accuracy_greedy"]:
        yield Found(
            "bad",
            "the teacher is no better than the student",
            f"its best accuracy, with or without p, is {best:.1%}; the student starts at "
            f"{start['accuracy_greedy']:.1%}.",
            "Take a larger `teacher_model_name_or_path`, or a p that helps it more; compare both with `dopd eval`.",
        )


def _noise(run: RunRecord, accuracy: float) -> float:
    """Two standard errors of the difference of two evaluations on the same prompts; at least 2 points."""
    count = max((int(record.get("eval_num_prompts", 0)) for record in evaluations(run)), default=0)
    return max(0.02, 2 * math.sqrt(2 * accuracy * (1 - accuracy) / count)) if count > 0 else 0.1


def _sources(run: RunRecord) -> set[str]:
    return {rule["source"] for record in run.trace for rule in record.get("rules", {}).values()}
