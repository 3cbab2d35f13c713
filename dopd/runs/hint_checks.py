"""A second look at hints: what a judge says of each, and whether a teacher answers better with it than without."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from datasets import Dataset

from dopd.data.views import (
    PrivilegedTemplate,
    Prompt,
    plain_prompts,
    privileged_prompts,
)
from dopd.errors import ConfigError
from dopd.hints import chat
from dopd.hints.audit import HINT_KIND
from dopd.hints.boxes import pictures_of
from dopd.hints.coverage import is_empty
from dopd.hints.replies import verdict_of_reply
from dopd.hints.templates import filled, prompt_of
from dopd.runs.asking import AskerSettings, Bill, ask_all
from dopd.runs.hint_writing import journal_of, output_path, with_new_columns, write_reasons, write_rows
from dopd.runs.hints import HintData, list_of, rows_of, verifier_of
from dopd.statistics import Interval, difference_interval, paired_scores_interval, wilson_interval
from dopd.step.verifier import Verifier, judged

GAIN = "hint_gain"


class Prompts(Protocol):
    """How a teacher is asked."""

    @property
    def template(self) -> PrivilegedTemplate: ...

    def asked(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]: ...


class Teacher(Protocol):
    """Who answers with p and without it: a `LocalModel`, or `dopd.runs.served_answers.ServedAnswers`."""

    @property
    def prompts(self) -> Prompts: ...

    def answers(self, prompts: Sequence[Prompt], label: str, *, sampled: bool = False) -> list[tuple[str, bool]]: ...


@dataclass
class Checked:
    """What was found of hints.

    Attributes:
        num_rows, num_hints, num_kept (`int`): rows; those with a hint; those that are in the output.
        dropped (`dict[int, list[str]]`): faults of the rows that are not.
        bill (`Bill`): of the judge.
        without, with_p (`Interval`, *optional*): scores of the teacher's answers.
        gain (`Interval`, *optional*): their paired difference over rows.
        output, side_file (`Path`): the rows that are kept, and the others with their reasons.
    """

    num_rows: int
    num_hints: int
    num_kept: int = 0
    dropped: dict[int, list[str]] = field(default_factory=dict)
    bill: Bill = field(default_factory=Bill)
    without: Interval | None = None
    with_p: Interval | None = None
    gain: Interval | None = None
    output: Path = field(default_factory=Path)
    side_file: Path = field(default_factory=Path)

    @property
    def counted(self) -> Counter[str]:
        """Dropped rows by fault."""
        return Counter(fault for faults in self.dropped.values() for fault in faults)


@dataclass(frozen=True)
class Gains:
    """Of each row with a hint: what the answers of a teacher score without p and with it, and the difference."""

    rows: list[int]
    without: list[list[float]]
    with_p: list[list[float]]

    def of_rows(self) -> list[Interval]:
        """The gain of each row, with Newcombe's interval over its answers."""
        return [
            difference_interval(wilson_interval(sum(a), len(a)), wilson_interval(sum(b), len(b)))
            for a, b in zip(self.without, self.with_p, strict=True)
        ]

    def mean(self) -> tuple[Interval, Interval, Interval]:
        """Accuracy without p and with it, and the paired difference over rows."""
        a = [sum(scores) / len(scores) for scores in self.without]
        b = [sum(scores) / len(scores) for scores in self.with_p]
        gain = paired_scores_interval([y - x for x, y in zip(a, b, strict=True)])
        return wilson_interval(sum(a), len(a)), wilson_interval(sum(b), len(b)), gain


def check_hints(
    data: HintData,
    output: str,
    *,
    judge: AskerSettings | None = None,
    prompt_file: str | None = None,
    teacher: Teacher | None = None,
    verifier: str | None = None,
    verifier_options: Mapping[str, Any] | None = None,
    samples: int = 1,
    min_gain: float | None = None,
    keep_rows: bool = False,
) -> Checked:
    """Judge the hints of a dataset, and write the rows whose hints are good.

    Args:
        data (`HintData`): the rows.
        output (`str`): a `.jsonl` or `.parquet` file; what is left out is in `OUTPUT.dropped.jsonl`, with its reason.
        judge (`AskerSettings`, *optional*): who says of a hint whether it is correct, complete, and leaks nothing.
        prompt_file (`str`, *optional*): what the judge is asked.
        teacher (`Teacher`, *optional*): answers each row with and without p; the column `hint_gain` is the
            difference of its scores, `hint_gain_low` and `hint_gain_high` its 95% interval over answers.
        verifier (`str`, *optional*), verifier_options (`dict`, *optional*): of its answers, as in training.
        samples (`int`): answers of the teacher to each prompt: one is greedy, several are drawn.
        min_gain (`float`, *optional*): rows that gain less are dropped.
        keep_rows (`bool`): keep rows whose hint is dropped, without the hint.

    Raises:
        ConfigError, DataError: what cannot work, and the fix.
        ServerError, ServerLostError: the judge refuses, or does not answer; the journal keeps what was received.
    """
    path = output_path(output, "--output", data)
    if judge is None and teacher is None:
        raise ConfigError("nothing says whether hints are good: name a --judge, or a --teacher, or both")
    if min_gain is not None and teacher is None:
        raise ConfigError(f"--min-gain (={min_gain:g}) is of a teacher's answers: name a --teacher")
    dataset = rows_of(data)
    rows = list_of(dataset)
    hinted = [n for n, row in enumerate(rows) if not is_empty(row.get("privileged_context"))]
    found = Checked(len(rows), len(hinted), output=path, side_file=path.with_name(f"{path.name}.dropped.jsonl"))
    reasons: dict[int, str] = {}
    if judge is not None:
        _ask_judge(judge, prompt_of("judge", prompt_file), rows, hinted, found, reasons)
    columns: dict[str, list[Any]] = {}
    if teacher is not None:
        gains = gains_of(teacher, rows, hinted, verifier_of(data, verifier, rows, verifier_options), samples)
        found.without, found.with_p, found.gain = gains.mean()
        columns = _gain_columns(gains, len(rows))
        for n, gain in zip(gains.rows, gains.of_rows(), strict=True):
            if min_gain is not None and gain.mean < min_gain:
                found.dropped.setdefault(n, []).append("no gain")
                reasons.setdefault(n, f"the teacher gains {gain.mean:+.3g} [{gain.low:+.3g}, {gain.high:+.3g}]")
    _write(dataset, rows, columns, found, reasons, keep_rows=keep_rows)
    return found


def _ask_judge(
    judge: AskerSettings,
    template: str,
    rows: Sequence[Mapping[str, Any]],
    hinted: Sequence[int],
    found: Checked,
    reasons: dict[int, str],
) -> None:
    asker = judge.asker("--judge", "judging hints")
    name, settings = asker.model(), judge.settings
    requests = []
    for n in hinted:
        own = rows[n].get(HINT_KIND)
        text = filled(
            template, rows[n], hint=rows[n]["privileged_context"], kind=own if isinstance(own, str) else "steps"
        )
        requests.append(chat.request(name, text, pictures_of(rows[n]), settings))
    replies, found.bill = ask_all(asker, requests, journal_of(found.output), judge.prices)
    for n, reply in zip(hinted, replies, strict=True):
        if reply is None:
            found.dropped[n], reasons[n] = ["unjudged"], "the budget was used up"
            continue
        verdict = verdict_of_reply(reply)
        if verdict.faults:
            found.dropped[n], reasons[n] = list(verdict.faults), verdict.reason


def gains_of(
    teacher: Teacher, rows: Sequence[Mapping[str, Any]], hinted: Sequence[int], verifier: Verifier, samples: int
) -> Gains:
    """What a teacher's answers score without p and with it, in pairs.

    Args:
        teacher (`Teacher`): answers.
        rows: of the dataset.
        hinted: numbers of those with a hint.
        verifier (`Verifier`): of answers.
        samples (`int`): answers to each prompt.

    Raises:
        ConfigError: no row has a hint.
        ScoringError: the verifier gives no score.
    """
    if not hinted:
        raise ConfigError("no row has a hint: there is nothing that a teacher could gain by")
    asked = teacher.prompts.asked([rows[n] for n in hinted])
    prompts = {
        "without p": plain_prompts(asked),
        "with p": privileged_prompts(asked, teacher.prompts.template),
    }
    scores: dict[str, list[list[float]]] = {}
    for label, own in prompts.items():
        repeated = [prompt for prompt in own for _ in range(samples)]
        answers = teacher.answers(repeated, f"the teacher {label}", sampled=samples > 1)
        flat = [
            judged(verifier, text, rows[hinted[n // samples]]) if ended else 0.0
            for n, (text, ended) in enumerate(answers)
        ]
        scores[label] = [flat[n : n + samples] for n in range(0, len(flat), samples)]
    return Gains(list(hinted), scores["without p"], scores["with p"])


def _gain_columns(gains: Gains, count: int) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {name: [None] * count for name in (GAIN, f"{GAIN}_low", f"{GAIN}_high")}
    for n, gain in zip(gains.rows, gains.of_rows(), strict=True):
        for name, value in ((GAIN, gain.mean), (f"{GAIN}_low", gain.low), (f"{GAIN}_high", gain.high)):
            columns[name][n] = round(value, 6)
    return columns


def _write(
    dataset: Dataset,
    rows: Sequence[Mapping[str, Any]],
    columns: dict[str, list[Any]],
    found: Checked,
    reasons: Mapping[int, str],
    *,
    keep_rows: bool,
) -> None:
    if keep_rows:
        hints = [None if n in found.dropped else row.get("privileged_context") for n, row in enumerate(rows)]
        kept = with_new_columns(dataset, {**columns, "privileged_context": hints})
    else:
        whole = with_new_columns(dataset, columns)
        kept = whole.select([n for n in range(len(rows)) if n not in found.dropped])
    found.num_kept = len(kept)
    write_rows(kept, found.output)
    write_reasons(
        found.side_file,
        [
            {
                "row": n,
                "faults": faults,
                "reason": reasons.get(n, ""),
                "privileged_context": rows[n]["privileged_context"],
            }
            for n, faults in sorted(found.dropped.items())
        ],
    )
