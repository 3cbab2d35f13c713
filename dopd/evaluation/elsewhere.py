"""Evaluate models that answer elsewhere, on a server or in an engine of their own: texts come back, and no scores of
their tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dopd.data.views import PrivilegedTemplate, Prompt
from dopd.evaluation.kept import KeptAnswers
from dopd.evaluation.results import EvaluationResult, JudgedAnswer, PromptResult, Sampling
from dopd.evaluation.student import questions
from dopd.step.verifier import Verifier, judged

_AT_ONCE = 1024  # rows whose questions are asked together, and whose answers are kept together


@dataclass(frozen=True)
class Answer:
    """An answer that is not judged yet.

    Attributes:
        text (`str`): without special tokens.
        length (`int`, *optional*): its tokens; `None` where nobody says them.
        ended (`bool`): whether it ended by itself, and was neither cut nor refused.
        refused (`bool`): whether there is none, since the request was refused.
    """

    text: str
    length: int | None
    ended: bool
    refused: bool = False


class Answerer(Protocol):
    """Somebody who answers prompts."""

    @property
    def template(self) -> PrivilegedTemplate:
        """Where p goes in a prompt."""

    def asked(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows as they are asked."""

    def answered(self, prompts: Sequence[Prompt], label: str, sampling: Sampling | None) -> list[list[Answer]]:
        """Answers to each prompt: as many as are drawn, or the likeliest one without `sampling`."""


def evaluate_elsewhere(
    answerer: Answerer,
    rows: Sequence[Mapping[str, Any]],
    verifier: Verifier,
    *,
    measures: Sequence[str],
    sampling: Sampling,
    kept: KeptAnswers | None = None,
) -> EvaluationResult:
    """Have rows answered, and judge the answers.

    Args:
        answerer (`Answerer`): who answers.
        rows (`list[dict]`): dataset rows, as `dopd.evaluation.student.StudentEvaluator` reads them.
        verifier (`Verifier`): scores an answer that ended.
        measures, sampling: as of `StudentEvaluator`.
        kept (`KeptAnswers`, *optional*): gets each batch of answers; what it has already is not asked again.
    """
    results = [] if kept is None else [*kept.results]
    for start in range(len(results), len(rows), _AT_ONCE):
        batch = _answered(answerer, rows[start : start + _AT_ONCE], verifier, measures, sampling)
        results += batch
        if kept is not None:
            kept.add(batch, ())
    if kept is not None:
        kept.finish()
    return EvaluationResult.of(results)


def _answered(
    answerer: Answerer,
    rows: Sequence[Mapping[str, Any]],
    verifier: Verifier,
    measures: Sequence[str],
    sampling: Sampling,
) -> list[PromptResult]:
    found: dict[str, dict[int, tuple[JudgedAnswer, ...]]] = {}
    for name, prompts in questions(answerer.asked(rows), answerer.template, measures).items():
        found[name] = {}
        if prompts:
            answers = answerer.answered([*prompts.values()], name, sampling if name == "sampled" else None)
            for number, group in zip(prompts, answers, strict=True):
                found[name][number] = tuple(_judged(answer, rows[number], verifier) for answer in group)
    single = {name: {number: group[0] for number, group in found[name].items()} for name in found}
    return [
        PromptResult(
            greedy=single["greedy"].get(number),
            samples=found["sampled"].get(number, ()),
            privileged=single["privileged"].get(number),
            blank=single["blank"].get(number),
        )
        for number in range(len(rows))
    ]


def _judged(answer: Answer, row: Mapping[str, Any], verifier: Verifier) -> JudgedAnswer:
    score = judged(verifier, answer.text, row) if answer.ended else 0.0
    return JudgedAnswer(answer.text, score, answer.length, answer.ended, answer.refused)
