"""Completions looked at outside of a training batch: answered, scored from every view, routed, and recorded."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from dopd.assignment import Assignment
from dopd.data.views import plain_prompts
from dopd.errors import ConfigError, ScoringError
from dopd.evaluation.student import StudentEvaluator
from dopd.inspection.details import Completion, completion_record, thresholds_of, whole_models
from dopd.inspection.pictures import row_key
from dopd.inspection.schema import MAX_TOKENS
from dopd.routing import Thresholds
from dopd.scoring import evaluation_mode, random_state_kept
from dopd.sources import LIVE
from dopd.step import Moment, Rollouts, Step
from dopd.step.engine import WholeStudent
from dopd.step.step import START
from dopd.tables import RoutingTable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inspector:
    """Answers prompts with the plain student and records every token of the answers.

    Attributes:
        step (`Step`): scores and routes the answers, as training does.
        answering (`StudentEvaluator`): limits and seed of the answers; its rows are not read.
        student (`WholeStudent`): whose answers they are.
    """

    step: Step
    answering: StudentEvaluator
    student: WholeStudent

    def records(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        answers: Sequence[list[int]] | None = None,
        greedy: bool = False,
        thresholds: Mapping[str, float] | None = None,
        batch: Assignment | None = None,
        kind: str = "inspect",
        moment: Moment = START,
        first_number: int = 0,
        every: bool = False,
        whole: bool = False,
    ) -> list[dict[str, Any]]:
        """Records (`docs/reference/trace.md`) of one completion of each row; the random state is left as it was.

        Args:
            rows (`list[dict]`): `prompt`, `privileged_context` (optional), and what the verifier reads.
            answers (`list[list[int]]`, *optional*): token ids to look at; the plain student answers if left out.
            greedy (`bool`): the student's likeliest tokens in place of drawn ones.
            thresholds (`dict`, *optional*): `gap` and `confidence` that route the tokens; the averages over these
                completions if left out.
            batch (`Assignment`, *optional*): decisions about the batch that these completions are shown with: averages,
                extremes and shares are of that batch.
            kind: what the records say of themselves.
            moment (`Moment`): where in a run this is. With `num_generations` above 1 rows stand side by side as often;
                they count as one another's rollouts, and the first of them is recorded.
            first_number (`int`): number of the first record.
            every (`bool`): record all of them.
            whole (`bool`): answers count as finished although nothing ends them.
        """
        with self._random_state_kept(), torch.no_grad():
            step = self._step(moment)
            judged = rollouts = step.judged(self._rollouts(rows, answers, greedy=greedy), rows, whole=whole)
            if not step.judge.gives_rewards and step.table.is_judged:
                logger.warning(
                    f"method {step.table.name!r} learns from rewards or scores of its rollouts, and nobody gives any "
                    "here: all count as 0, and advantages that compare them are 0"
                )
                rollouts = replace(rollouts, rewards=[0.0] * len(rows), scores=[0.0] * len(rows))
            averages = _averages(thresholds, rollouts)
            (scored,) = step.score(rollouts, moment, thresholds=averages, batch=batch)
            live = step.scorer.score(LIVE, scored.view, scored.completion_ids, scored.mask)
            if live.hidden is None:
                raise ScoringError("the scorer gives no hidden states of the student, which a look at its tokens needs")
            student = (live.hidden, step.scorer.head(LIVE))
            targets = step.targets(scored)
            routed = step.loss(scored, student, targets)
        models = whole_models(student, targets)
        seen: dict[str, int] = {}
        records = []
        for number, place in enumerate(range(0, len(rows), 1 if every else moment.num_generations), first_number):
            key = row_key(rows[place])
            rollout = seen[key] = seen.get(key, -1) + 1
            about = {"step": moment.step, "number": number, "rollout": rollout, "kind": kind}
            completion = Completion.of(judged, place, rows[place], **about)
            records.append(
                completion_record(completion, step, scored, place, models, routed.per_token, thresholds_of(scored))
            )
        return records

    def _step(self, moment: Moment) -> Step:
        """The step on the part of the table that is shown, as if its texts were the completions; where a completion has
        no siblings, what its row says takes their place."""
        shown = self.step.table.shown
        table = replace(shown, rules=tuple(replace(rule, text="rollout") for rule in shown.rules))
        if moment.num_generations > 1 and self.step.judge.gives_rewards:
            return replace(self.step, table=table)
        return replace(self.step, table=_without_siblings(table))

    @contextmanager
    def _random_state_kept(self) -> Iterator[None]:
        """Inside, what is drawn depends on the seed alone: users' signals and reward functions may draw numbers too."""
        with self.student.whole_student() as student:
            kept = random_state_kept(student)
        with kept:
            torch.manual_seed(self.answering.seed)
            yield

    def _rollouts(
        self, rows: Sequence[Mapping[str, Any]], answers: Sequence[list[int]] | None, *, greedy: bool
    ) -> Rollouts:
        prompts = self.step.prompts
        asked = prompts.read_by_student(rows, self.step.table)
        with self.student.whole_student() as student, torch.no_grad():
            plain = plain_prompts(asked)
            if answers is None:
                with evaluation_mode(student):
                    answers = self.answering.answers(student, plain, sampled=not greedy)
            if not all(answers):
                raise ConfigError("a completion without tokens has nothing to look at")
            view = prompts.shared_view(plain, student.device)
            ids, mask, _ = prompts.padded([ids[:MAX_TOKENS] for ids in answers], student.device)
        return Rollouts(asked, view, ids, mask)


def _without_siblings(table: RoutingTable) -> RoutingTable:
    return replace(table, context="none" if table.context == "none" else "column", contrast="column", num_contrast=1)


def _averages(thresholds: Mapping[str, float] | None, rollouts: Rollouts) -> Thresholds | None:
    if thresholds is None:
        return None
    return Thresholds(thresholds["gap"], thresholds["confidence"], 0.0, int(rollouts.mask.sum()), 0)
