"""The path of a step: judge the rollouts, read the views of the table, score every source, assign, and take the loss.

Shapes: B completions of this rank, T completion tokens, H hidden size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dopd.assignment import Assignment, assign
from dopd.data.contexts import rows_for_view
from dopd.data.views import lacking_privileged
from dopd.errors import ScoringError
from dopd.fused import fused_routed_loss, measures
from dopd.fused.api import Backend
from dopd.heads import Head
from dopd.loss import RoutedLoss
from dopd.ranks import Alone, Ranks, Replayed
from dopd.routing import Thresholds
from dopd.sampling import Ending
from dopd.scoring import View
from dopd.signals import SignalBatch
from dopd.sources import CONTRAST, PLAIN, PRIVILEGED, SELF, SOURCES, TEACHER_COLUMN
from dopd.step.batch import Rollouts, ScoredBatch, SourceScores
from dopd.step.liveness import check_alive
from dopd.step.prompts import PromptEncoder
from dopd.step.rewards import Judge
from dopd.step.scorer import Scorer
from dopd.tables import RoutingTable


@dataclass(frozen=True)
class Moment:
    """Where in a run a step stands.

    Attributes:
        step (`int`): optimizer steps before this one.
        progress (`float`): share of the training that is over, in [0, 1].
        num_generations (`int`): rollouts of each prompt, which stand side by side.
    """

    step: int = 0
    progress: float = 0.0
    num_generations: int = 1


START = Moment()


@dataclass(frozen=True)
class Step:
    """What training, evaluation, inspection and traces do with completions: one definition of their scores and loss.

    Attributes:
        table (`RoutingTable`): the method.
        prompts (`PromptEncoder`): reads rows as views.
        scorer (`Scorer`): of the sources.
        ending (`Ending`): of the answers.
        judge (`Judge`): gives answers scores and rewards.
        ranks (`Ranks`): the processes that share the step.
        max_prompt_tokens (`int`, *optional*): most tokens of a prompt for which the models' context has room; views
            that show an answer of the student's have a length only then.
        backend, chunk_tokens, merged_ids: see `dopd.fused_routed_loss`.
        several_teachers (`bool`): whether rows say which teacher reads them (`teacher_id`).
    """

    table: RoutingTable
    prompts: PromptEncoder
    scorer: Scorer
    ending: Ending
    judge: Judge = field(default_factory=Judge)
    ranks: Ranks = field(default_factory=Alone)
    max_prompt_tokens: int | None = None
    backend: Backend = "auto"
    chunk_tokens: int | None = None
    merged_ids: Sequence[int] = ()
    several_teachers: bool = False

    def judged(self, rollouts: Rollouts, problems: Sequence[Mapping[str, Any]], *, whole: bool = False) -> Rollouts:
        """The rollouts with scores and rewards, where the step has a judge that gives any.

        Args:
            problems (`list[dict]`): the rows as they were brought, as users' code reads them.
            whole (`bool`): whether answers count as finished although nothing ends them.
        """
        if not self.judge.gives_rewards:
            return rollouts
        texts = self.prompts.texts(rollouts)
        ended = [whole or ends for ends in self.ending.ends_of(rollouts.answers)]
        return self.judge.judged(rollouts, problems, texts, ended)

    def views(self, rollouts: Rollouts, num_generations: int = 1) -> tuple[dict[str, View], dict[str, Tensor]]:
        """The views that the table reads, by name, and which rows have the context of a view (B,), by name.

        Raises:
            ScoringError: a view that shows an answer leaves no room for another one.
        """
        views, present = {PLAIN: rollouts.view}, dict[str, Tensor]()
        for name in sorted(self.table.views - {PLAIN}):
            views[name], present[name] = self._view(name, rollouts, num_generations)
        return views, present

    def _view(self, name: str, rollouts: Rollouts, num_generations: int, number: int = 0) -> tuple[View, Tensor]:
        """A view that is not the plain one, and which rows have its context; `number` as of `rows_for_view`."""
        device = rollouts.completion_ids.device
        shows_answers = self.table.needs_scores or SELF in self.table.views
        shown = self._shown(rollouts) if shows_answers else []
        ended = self.ending.ends_of(rollouts.answers) if shows_answers else None
        options: dict[str, Any] = {"ended": ended, "number": number}
        rows = rows_for_view(name, self.table, rollouts.rows, shown, rollouts.scores, num_generations, **options)
        view = replace(self.prompts.privileged_view(rows, device), teachers=rollouts.view.teachers)
        self._check_room(name, view)
        return view, ~torch.tensor(lacking_privileged(rows), device=device)

    def _with_more_contrasts(
        self,
        sources: Mapping[str, SourceScores],
        text: tuple[Tensor, Tensor],
        rollouts: Rollouts,
        num_generations: int,
        has_first: Tensor,
    ) -> dict[str, SourceScores]:
        """The scores of a text (ids and mask), with the log of the mean probability under several wrong contexts."""
        reading = [name for name in sorted(sources) if SOURCES[name].view == CONTRAST]
        logprobs, present = {name: [sources[name].tokens.logprobs] for name in reading}, [has_first]
        for number in range(1, self.table.num_contrast):
            view, has_one = self._view(CONTRAST, rollouts, num_generations, number)
            if not bool(self.ranks.total(has_one.sum().double())):
                break  # no prompt of any rank has so many
            for name, one in self.scorer.score_all(dict.fromkeys(reading, view), *text):
                logprobs[name].append(one.tokens.logprobs)
            present.append(has_one)
        has_KB1 = torch.stack(present).unsqueeze(2)
        averaged = {}
        for name in reading:
            total_BT = torch.stack(logprobs[name]).masked_fill(~has_KB1, -math.inf).logsumexp(0)
            mean_BT = torch.where(
                has_first.unsqueeze(1), total_BT - has_KB1.sum(0).clamp(min=1).log(), logprobs[name][0]
            )
            averaged[name] = replace(
                sources[name], tokens=replace(sources[name].tokens, logprobs=mean_BT, entropy=None)
            )
        return {**sources, **averaged}

    def _shown(self, rollouts: Rollouts) -> list[str]:
        """The answers as texts; one that wrote out a control token would act as markup where it is shown."""
        markup, texts = self.prompts.markup, self.prompts.texts(rollouts)
        return ["" if markup.first_in([text]) else text for text in texts]

    def _check_room(self, name: str, view: View) -> None:
        longest = max(view.lengths)
        if self.max_prompt_tokens is not None and longest > self.max_prompt_tokens:
            raise ScoringError(
                f"the {name} view has prompts of up to {longest} tokens (an answer of the student's is shown in them), "
                f"which leaves no room for an answer in the models' context: {self.max_prompt_tokens} tokens in front "
                "of one are allowed. Lower max_completion_length or max_prompt_length"
            )

    def score(
        self,
        rollouts: Rollouts,
        moment: Moment = START,
        *,
        thresholds: Thresholds | None = None,
        batch: Assignment | None = None,
    ) -> list[ScoredBatch]:
        """Score the texts of every part of the table from every source that it reads, and decide what each token
        receives; one batch for each part.

        Args:
            rollouts (`Rollouts`): of this rank; all ranks call this together.
            moment (`Moment`): where in the run they stand.
            thresholds (`Thresholds`, *optional*): averages that route the tokens; those of all ranks' completions if
                left out.
            batch (`Assignment`, *optional*): decisions about the completions of another batch: averages, extremes and
                shares are of that batch, and not of these completions.

        Raises:
            ScoringError, NotFiniteError: scores that cannot come from a working model.
        """
        rollouts = self._with_teachers(rollouts)
        views, present = self.views(rollouts, moment.num_generations)
        return [
            replace(self, table=part)._score_part(rollouts, moment, views, present, thresholds=thresholds, batch=batch)
            for part in self.table.parts
        ]

    def references(self, rows: Sequence[Mapping[str, Any]], device: Any) -> tuple[Tensor, Tensor]:
        """Ids (B, T) and mask (B, T) of the rows' reference texts, each with an end; nothing for a row without one."""
        end = self.prompts.tokenizer.eos_token_id
        end = end if end in self.ending.token_ids else self.ending.token_ids[0]
        texts = [self.prompts.reference(row) for row in rows]
        ids, mask, _ = self.prompts.padded([[*text, end] if text else [] for text in texts], device)
        return ids, mask

    def _score_part(
        self,
        rollouts: Rollouts,
        moment: Moment,
        views: Mapping[str, View],
        present: Mapping[str, Tensor],
        *,
        thresholds: Thresholds | None,
        batch: Assignment | None,
    ) -> ScoredBatch:
        """`score` of a table that is one part.

        Args:
            views, present: of `views`, for the whole table.
        """
        ids, mask = rollouts.completion_ids, rollouts.mask
        if self.table.text == "reference":
            ids, mask = self.references(rollouts.rows, mask.device)
        drawn = rollouts.logprobs if (self.table.text, self.table.view) == ("rollout", PLAIN) else None
        sources = {}
        read = {source: views[self.table.view_of(source)] for source in self.table.sources}
        for source, scores in self.scorer.score_all(read, ids, mask):
            moved = SOURCES[source].model != "teacher" and moment.step > 0
            _check_alive(source, scores, ids, mask, trained=moved)
            sources[source] = scores if source in self.table.measured_sources else self._kept(source, scores)
        if self.table.num_contrast > 1 and CONTRAST in present:
            sources = self._with_more_contrasts(
                sources, (ids, mask), rollouts, moment.num_generations, present[CONTRAST]
            )
        measured = self._states({name: sources[name] for name in self.table.measured_sources}, rollouts.view)
        signals = SignalBatch(
            mask,
            {name: scores.tokens.logprobs for name, scores in sources.items()},
            {name: s.tokens.entropy for name, s in sources.items() if s.tokens.entropy is not None},
            measures(self.table.measures, measured, mask, chunk_tokens=self.chunk_tokens),
            rewards=_numbers(rollouts.rewards, mask.device),
            scores=_numbers(rollouts.scores, mask.device),
            has_privileged=present.get(PRIVILEGED),
            has_contrast=present.get(CONTRAST),
            num_generations=moment.num_generations,
            step=moment.step,
            progress=moment.progress,
            ranks=self.ranks if batch is None or batch.ranks is None else Replayed(batch.ranks),
        )
        assignment = assign(self.table, signals, thresholds=thresholds)
        kept = {name: self._kept(name, scores) for name, scores in sources.items()}
        num_sequences = float(self.ranks.total((mask != 0).any(1).sum()))
        numbers = torch.arange(len(mask), device=mask.device)
        view = views[self.table.view]
        return ScoredBatch(self.table, view, ids, mask, kept, assignment, num_sequences, numbers, drawn)

    def _with_teachers(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts with the teacher of each row, where there are several."""
        if not self.several_teachers:
            return rollouts
        teachers = tuple(str(row[TEACHER_COLUMN]) for row in rollouts.rows)
        return replace(rollouts, view=replace(rollouts.view, teachers=teachers))

    def _kept(self, source: str, scores: SourceScores) -> SourceScores:
        """What the loss reads of a source."""
        return scores if source in self.table.target_sources else replace(scores, hidden=None)

    def targets(self, batch: ScoredBatch) -> dict[str, tuple[Tensor, Head]]:
        """Hidden states and heads of the sources whose whole distributions the loss reads."""
        return self._states(batch.sources, batch.view)

    def _states(self, sources: Mapping[str, SourceScores], view: View) -> dict[str, tuple[Tensor, Head]]:
        states = {name: scores.hidden for name, scores in sources.items() if scores.hidden is not None}
        # Asked for when it is read: where weights are split, or others take their place, a head does not last.
        return {name: self.scorer.target(name, hidden, view) for name, hidden in states.items()}

    def loss(
        self, batch: ScoredBatch, student: tuple[Tensor, Head], targets: Mapping[str, tuple[Tensor, Head]]
    ) -> RoutedLoss:
        """The loss of a (micro-)batch; the losses of a step's micro-batches and of the table's parts, averaged over
        ranks, add up to the step's.

        Args:
            batch (`ScoredBatch`): the texts.
            student (`tuple[Tensor, Head]`): hidden states (B, T, H) of the student behind the prompts of the batch,
                which carry the gradient, and its head.
            targets: of `targets(batch)`.
        """
        return fused_routed_loss(
            *student,
            targets,
            batch.completion_ids,
            batch.mask,
            batch.table,
            backend=self.backend,
            chunk_tokens=self.chunk_tokens,
            assignment=batch.assignment,
            # Data parallelism averages gradients over ranks; the mean over sequences is over all of them.
            num_sequences=max(batch.num_sequences, 1.0) / self.ranks.count,
            scores={name: scores.tokens for name, scores in batch.sources.items()},
            merged_ids=self.merged_ids,
        )


def _numbers(values: list[float] | None, device: torch.device) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64, device=device)


def _check_alive(source: str, scores: SourceScores, ids: Tensor, mask: Tensor, *, trained: bool) -> None:
    """Refuse scores that no working model gives; where the vocabulary's size is unknown nothing is checked."""
    if scores.vocab_size is not None:
        logprobs, entropy = scores.tokens.logprobs, scores.tokens.entropy
        seen = {"ids": ids, "hidden": scores.hidden}
        check_alive(source, logprobs, entropy, mask, scores.vocab_size, **seen, trained=trained)
