"""What a page says first: whether it worked, in one sentence with its differences; and what to do next."""

from collections.abc import Mapping, Sequence
from typing import Any

from dopd.report.comparisons import (
    MIN_PAIRS,
    SIGNIFICANT,
    START,
    BySeed,
    Difference,
    compare,
)
from dopd.report.ending import ending_of
from dopd.report.findings import num_serious
from dopd.report.groups import RunGroup, seed_of, settings_of
from dopd.report.headline import as_result, evaluations, last_evaluation, of_the_weights
from dopd.report.roles import of_interest, reference_of

# Settings that say which held-out problems an evaluation answers, and how answers are judged.
_PROBLEMS = (
    "task",
    "task_options",
    "dataset_name",
    "dataset_config",
    "dataset_test_split",
    "dataset_eval_name",
    "dataset_eval_config",
    "dataset_eval_split",
    "verifier",
)
_MOST_STEPS = 3  # that are told
_HIGH_RATE = 1.0  # nobody trains with more
_UNIT = " points"
_KEEP = "Keep the settings; evaluate on problems of another kind before you rely on it."


def verdict(
    groups: Sequence[RunGroup], summary: Mapping[str, Any], warnings: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The verdict as `level` (`better`, `worse`, `undecided`, `untested`, `unknown`), `sentence`, `next` (what to do),
    `table` (`columns`, `rows`) and `note`.

    Args:
        groups (`list[RunGroup]`): the runs.
        summary (`dict`): what `dopd quickstart` wrote beside them, or empty.
        warnings (`list[dict]`): what `findings` gave of them; what is said to do next does not contradict it.
    """
    found = differences_of(groups, summary)
    labels = [group.label for group in groups]
    level, sentence = verdict_sentence(found, labels)
    if level == "unknown":
        sentence = "No accuracy without p was logged before and after training, so nothing here says whether it worked."
        if any(run.damaged for group in groups for run in group.runs):
            sentence = "Files of the run are damaged, and what is left of them does not say whether it worked."
    if _under_way(groups):
        sentence = f"{_under_way(groups)}{sentence}"
    return {
        "level": level,
        "sentence": sentence,
        "next": _next_steps(found, groups, level, warnings),
        "table": _table(found),
        "note": _note(found, groups),
    }


def differences_of(groups: Sequence[RunGroup], summary: Mapping[str, Any]) -> list[Difference]:
    """Differences of all runs, from their start and from one another; none between runs on different problems.

    The start is the one that `dopd quickstart` evaluated on the prompts of the final evaluation; otherwise each run's
    own evaluation at step 0, beside that of its weights on the same prompts.
    """
    methods: dict[str, BySeed] = {}
    starts: dict[str, BySeed] = {}
    afterwards: dict[str, BySeed] = {}
    start = summary.get("start")
    for group in groups:
        last = {seed_of(run): last_evaluation(run) for run in group.runs if last_evaluation(run)}
        methods[group.label] = last
        if start:
            starts[group.label], afterwards[group.label] = dict.fromkeys(last, start), last
            continue
        logged = {seed_of(run): (run, evaluations(run)) for run in group.runs}
        whole = {seed: of for seed, of in logged.items() if len(of[1]) > 1 and of[1][0]["step"] == 0}
        starts[group.label] = {seed: as_result(records[0]) for seed, (_, records) in whole.items()}
        afterwards[group.label] = {seed: as_result(of_the_weights(*of)) for seed, of in whole.items()}
    found = compare(methods, starts, afterwards)
    return found if _same_problems(groups) else [difference for difference in found if difference.against == START]


def _same_problems(groups: Sequence[RunGroup]) -> bool:
    asked = [{name: settings_of(group.runs[0]).get(name) for name in _PROBLEMS} for group in groups]
    return all(problems == asked[0] for problems in asked)


def verdict_sentence(found: Sequence[Difference], labels: Sequence[str]) -> tuple[str, str]:
    """Level and sentence of the method of interest; `("unknown", "")` without a difference of it."""
    if not labels:
        return "unknown", ""
    method = of_interest(labels)
    mine = {(difference.against, difference.measure): difference for difference in found if difference.method == method}
    reference = reference_of(labels)
    start, other = mine.get((START, "greedy")), mine.get((reference or "", "greedy"))
    if start is None and other is None:
        return "unknown", ""
    parts: list[str] = []
    for difference, words in ((start, _OPENINGS), (other, _OTHERS if start else _ALONE)):
        if difference is None:
            continue
        clause = words[difference.verdict].format(method=method, other=difference.against, why=difference.why_untested)
        clause += difference.limits
        if not parts:
            change = f"went from {difference.first:.1%} to {difference.second:.1%}"
            beside = f"is {difference.second:.1%} beside {difference.first:.1%}"
            clause += f": greedy accuracy without p {change if difference is start else beside}"
        parts.append(f"{clause}, {difference.points(_UNIT)}")
        parts += _sampled(difference, mine.get((difference.against, "sampled")))
    differences = [difference for difference in (start, other) if difference is not None]
    return differences[0].verdict, f"{'; '.join(parts)} (95% intervals, {_basis(differences)})."


_OPENINGS = {
    "better": "{method} made the student better",
    "worse": "{method} made the student worse",
    "undecided": "{method} changed nothing in greedy answers beyond chance",
    "untested": "{method} cannot be judged yet ({why})",
}
_OTHERS = {
    "better": "it is better than {other}",
    "worse": "it is worse than {other}",
    "undecided": "it is no better or worse than {other} in greedy answers beyond chance",
    "untested": "it cannot be tested against {other}",
}
_ALONE = {name: text.replace("it ", "{method} ", 1) for name, text in _OTHERS.items()}


def _sampled(greedy: Difference, sampled: Difference | None) -> list[str]:
    """What sampled answers say, where it is something else."""
    if sampled is None or sampled.verdict == greedy.verdict or sampled.verdict not in ("better", "worse"):
        return []
    return [f"sampled answers are {sampled.verdict}, {sampled.points(_UNIT)}"]


def _basis(differences: Sequence[Difference]) -> str:
    """Over what differences are intervals and tests."""
    many = [difference for difference in differences if difference.pairs > 1]
    prompts = [str(difference.prompts) for difference in differences if difference.pairs < 2 and difference.prompts]
    found = [f"{'tested over ' if difference.p is not None else ''}{difference.pairs} seeds" for difference in many]
    if len(many) < len(differences):
        over = f", over {' and '.join(dict.fromkeys(prompts))} prompts" if prompts else ""
        found.append(f"one run{over}")
    corrected = any(difference.p is not None and difference.family > 1 for difference in differences)
    return " and ".join(dict.fromkeys(found)) + ", corrected for the number of methods" * corrected


def _under_way(groups: Sequence[RunGroup]) -> str:
    """How far runs are that have not ended; empty if all have."""
    left = []
    for group in groups:
        for run in group.runs:
            planned, done = run.config.get("max_steps"), max((record["step"] for record in run.metrics), default=0)
            if isinstance(planned, int) and not isinstance(planned, bool) and done < planned and not ending_of(run):
                left.append((done, planned))
    return f"So far (step {min(left)[0]} of {min(left)[1]}): " if left else ""


def _next_steps(
    found: Sequence[Difference], groups: Sequence[RunGroup], level: str, warnings: Sequence[Mapping[str, Any]]
) -> list[str]:
    labels = [group.label for group in groups]
    method, reference = of_interest(labels), reference_of(labels)
    config = groups[labels.index(method)].runs[0].config
    steps = []
    serious = num_serious(warnings)
    if serious:
        steps.append(f"Begin with the {serious} serious warning{'s' * (serious > 1)}.")
    if level == "unknown":
        steps.append(
            "Set `student_eval_steps` (for example to a tenth of the steps) and held-out rows (`dataset_test_split`, "
            "or a `task`) with a `verifier`, so that the student is evaluated at step 0 and while it trains."
        )
        return steps
    mine = [difference for difference in found if difference.method == method and difference.measure == "greedy"]
    if any(difference.pairs < MIN_PAIRS for difference in mine):
        steps.append(
            f"Train at least {MIN_PAIRS} seeds (`seed: 0`, `seed: 1`, `seed: 2`) of every method, and give all run "
            "folders to `dopd report`: fewer cannot tell a difference from chance."
        )
    if reference is None:
        other = "vanilla" if method != "vanilla" else "privileged_teacher"
        steps.append(f"To see what {method} adds, train `method: {other}` with the same seeds and report both.")
    if _under_way(groups):
        steps.insert(
            bool(serious),
            "Let it end, and report again; a run that stopped goes on with `resume_from_checkpoint: true`.",
        )
    else:
        steps += _rate_to_try(config.get("learning_rate"), level, _overtrained(warnings, method))
    against = next((difference for difference in mine if difference.against == reference), None)
    if against is not None and against.verdict == "worse":
        steps.append(f"{reference} is better here: take it, or try `privileged_student: ema` if the method reads one.")
    return steps[:_MOST_STEPS] or [_warned(_own(warnings, method)) or _KEEP]


def _own(warnings: Sequence[Mapping[str, Any]], method: str) -> list[Mapping[str, Any]]:
    return [warning for group in warnings if group["method"] == method for warning in group["warnings"]]


def _overtrained(warnings: Sequence[Mapping[str, Any]], method: str) -> str:
    """The title of the first warning of a method that more training would make worse; `""` without one."""
    return next((warning["title"] for warning in _own(warnings, method) if warning["overtrained"]), "")


def _warned(own: Sequence[Mapping[str, Any]]) -> str:
    """What the first warning asks for, where nothing else is to be done; `""` without one."""
    return f"Before you keep the settings, see the warning '{own[0]['title']}': {own[0]['advice']}" if own else ""


def _rate_to_try(rate: Any, level: str, overtrained: str) -> list[str]:
    """A learning rate to try next, where that may help: lower where training has done harm, higher where nothing was
    gained.
    """
    if not isinstance(rate, float) or not 0 < rate < _HIGH_RATE or level not in ("worse", "undecided"):
        return []
    if level == "worse" or overtrained:
        why = f": see the warning '{overtrained}'" if overtrained else ""
        return [f"Try a lower rate (`learning_rate: {rate / 3:.2g}`; it was {rate:.2g}){why}."]
    return [f"Try a higher rate (`learning_rate: {rate * 3:.2g}`; it was {rate:.2g}), or twice the `max_steps`."]


def _table(found: Sequence[Difference]) -> dict[str, Any]:
    """One row for each pair of methods; a cell has `text`, and `mean`, `low`, `high` in points."""
    pairs = list(dict.fromkeys((difference.method, difference.against) for difference in found))
    rows = []
    for method, against in pairs:
        cells: list[dict[str, Any]] = []
        for measure in ("greedy", "sampled"):
            here = [d for d in found if (d.method, d.against, d.measure) == (method, against, measure)]
            cells += _cells(here[0]) if here else [{"text": "-"}, {"text": "-"}]
        seeds = next(d.pairs for d in found if (d.method, d.against) == (method, against))
        rows.append({"label": f"{method} against {against}", "cells": [*cells, {"text": str(seeds)}]})
    columns = ["greedy, points", "greedy: what it says", "sampled, points", "sampled: what it says", "pairs of seeds"]
    return {"columns": columns, "rows": rows}


def _cells(difference: Difference) -> list[dict[str, Any]]:
    interval = difference.interval
    bounded = abs(interval.low) < 10  # one run without a number of prompts has none
    points: dict[str, Any] = {"text": difference.points(), "mean": 100 * interval.mean}
    if bounded:
        points |= {"low": 100 * interval.low, "high": 100 * interval.high}
    p = "" if difference.p is None else f" (p {_rounded(difference.p)})"
    return [points, {"text": difference.words() + p, "verdict": difference.verdict}]


def _rounded(p: float) -> str:
    """`= 0.084`, with more digits where fewer would put it on the other side of the limit, or on it."""
    if p < 0.001:
        return "< 0.001"
    digits = next((digits for digits in (3, 4, 5) if round(p, digits) != SIGNIFICANT), 6)
    return f"= {p:.{digits}f}"


def _note(found: Sequence[Difference], groups: Sequence[RunGroup]) -> str:
    parts = ["Percentage points of accuracy without p, with 95% intervals."]
    tested = [difference for difference in found if difference.p is not None]
    if tested:
        parts.append(
            f"Runs of equal seeds are paired; intervals and p are Student's over {max(d.pairs for d in tested)} seeds, "
            f"and p is corrected by Holm's method across the methods (up to {max(d.family for d in tested)}) that are "
            "compared with the same thing. A difference counts with p below 0.05."
        )
        parts.append("All answer the same held-out problems; intervals do not cover other problems.")
    if any(difference.pairs < 2 for difference in found):
        parts.append(
            "One pair of runs is judged by whether its interval over prompts (Agresti and Min's for paired answers, "
            "otherwise Newcombe's) leaves out 0: other seeds may differ by more."
        )
    if any(difference.pairs == 2 for difference in found):
        parts.append(f"With fewer than {MIN_PAIRS} seeds nothing is tested.")
    if not _same_problems(groups):
        parts.append("The runs answer different held-out problems, so they are not compared with one another.")
    return " ".join(parts)
