"""Completions looked at outside of a training batch: answered, scored from every view, routed, and recorded.

Shapes: B completions, T completion tokens, H hidden size.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dopd.assignment import Assignment, assign
from dopd.data.contexts import rows_for_view
from dopd.data.privileged import Prompt
from dopd.data.views import plain_prompt, privileged_prompt
from dopd.errors import ConfigError
from dopd.evaluation.student import StudentEvaluator
from dopd.evaluation.verifier import judged, unjudged
from dopd.fused import TokenScores, fused_routed_loss, measures, score_tokens
from dopd.heads import Head
from dopd.inspection.details import Completion, TokenDetails, token_details, trace_record
from dopd.inspection.pictures import row_key
from dopd.inspection.schema import MAX_TOKENS
from dopd.routing import Thresholds
from dopd.scoring import View, evaluation_mode, in_batches, random_state_kept, view_hidden_states
from dopd.signals import SignalBatch
from dopd.sources import LIVE, PLAIN, SOURCES, TEACHER_SOURCES
from dopd.tables import RoutingTable


@dataclass(frozen=True)
class Inspector:
    """Answers prompts with the plain student and records every token of the answers.

    Attributes:
        table (`RoutingTable`): the method.
        answering (`StudentEvaluator`): tokenizer, template, limits, seed and verifier (`unjudged` for none) of the
            answers; its rows are not read.
        models (callable): `"student"` or a source of the table -> context with that model.
        hidden_states (callable): (model, view, completion_ids, mask) -> (B, T, H).
        temperature (`float`): of the distributions that answers are drawn from and scored by.
    """

    table: RoutingTable
    answering: StudentEvaluator
    models: Callable[[str], AbstractContextManager[Any]]
    hidden_states: Callable[[Any, View, Tensor, Tensor], Tensor] = view_hidden_states
    temperature: float = 1.0

    def records(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        answers: Sequence[list[int]] | None = None,
        greedy: bool = False,
        thresholds: Mapping[str, float] | None = None,
        kind: str = "inspect",
        step: int = 0,
        first_number: int = 0,
    ) -> list[dict[str, Any]]:
        """Records (`docs/trace_schema.md`) of one completion of each row; the random state is left as it was.

        Args:
            rows (`list[dict]`): `prompt`, `privileged_context` (optional), and what the verifier reads.
            answers (`list[list[int]]`, *optional*): token ids to look at; the plain student answers if left out.
            greedy (`bool`): the student's likeliest tokens in place of drawn ones.
            thresholds (`dict`, *optional*): `gap` and `confidence` that route the tokens; the averages over these
                completions if left out.
            kind, step, first_number: what the records say of themselves.
        """
        with self.models(LIVE) as student, torch.no_grad(), random_state_kept(student):
            torch.manual_seed(self.answering.seed)
            with evaluation_mode(student):
                if answers is None:
                    answers = self.answering.answers(
                        student,
                        [plain_prompt(row) for row in self.answering.asked(rows)],
                        sampled=not greedy,
                        temperature=self.temperature,
                    )
                device = student.device
        answers = [ids[:MAX_TOKENS] for ids in answers]
        ids_BT, mask_BT = self._padded(answers, device)
        states = {name: self._states(name, rows, ids_BT, mask_BT) for name in {LIVE, *self.table.sources}}
        scores = {name: score_tokens(*pair, ids_BT, mask_BT) for name, pair in states.items()}
        assignment = self._assigned(states, scores, mask_BT, rows, answers, thresholds)
        targets = {name: states[name] for name in self.table.target_sources}
        with torch.no_grad():
            routed = fused_routed_loss(
                *states[LIVE], targets, ids_BT, mask_BT, self.table, assignment=assignment, scores=scores
            )
        teacher = scores.get("privileged_teacher", scores.get("teacher"))
        student_scores = scores.get("privileged_student")
        columns = {
            "gap": assignment.gap,
            "logprob_teacher": None if teacher is None else teacher.logprobs,
            "logprob_student": None if student_scores is None else student_scores.logprobs,
        }
        seen: dict[str, int] = {}
        made = []
        for n, (row, ids) in enumerate(zip(rows, answers, strict=True)):
            key = row_key(row)
            rollout = seen[key] = seen.get(key, -1) + 1
            details = {name: self._details(states[name], ids, n) for name in (LIVE, *targets)}
            made.append(
                trace_record(
                    Completion(row, step, first_number + n, rollout, kind, self._score(ids, row)),
                    self.table,
                    self.answering.tokenizer,
                    ids=ids,
                    student=details.pop(LIVE),
                    targets=details,
                    columns={k: None if c is None else c[n, : len(ids)].tolist() for k, c in columns.items()},
                    regimes=assignment.regimes[n, : len(ids)].tolist() if self.table.routed else None,
                    losses=routed.per_token[n, : len(ids)].tolist(),
                    thresholds=thresholds_of(assignment),
                )
            )
        return made

    def _states(
        self, name: str, rows: Sequence[Mapping[str, Any]], ids_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, Head]:
        """Hidden states (B, T, H) and head of a model at the completions, behind the prompts of its view."""
        view_name, template = SOURCES[name].view, self.answering.template
        prompts: list[Prompt]
        if view_name == PLAIN:
            prompts = [plain_prompt(row) for row in self.answering.asked(rows)]
        else:
            # A completion that is looked at has no siblings: what the row says takes their place.
            table = replace(self.table, context="none" if self.table.context == "none" else "column", contrast="column")
            told = rows_for_view(view_name, table, self.answering.asked(rows))
            prompts = [privileged_prompt(row, template) for row in told]
        view = self.answering.view(prompts, ids_BT.device, teacher=name in TEACHER_SOURCES)
        with self.models(name) as model, evaluation_mode(model):
            forward = partial(self.hidden_states, model)
            hidden = in_batches(forward, view, ids_BT, mask_BT, self.answering.batch_size)
            return hidden, Head.of_model(model, self.temperature)

    def _padded(self, answers: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        if not all(answers):
            raise ConfigError("a completion without tokens has nothing to look at")
        longest = max(map(len, answers))
        pad = self.answering.tokenizer.pad_token_id
        ids = [[*ids, *[pad] * (longest - len(ids))] for ids in answers]
        mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in answers]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _assigned(
        self,
        states: Mapping[str, tuple[Tensor, Head]],
        scores: Mapping[str, TokenScores],
        mask_BT: Tensor,
        rows: Sequence[Mapping[str, Any]],
        answers: Sequence[list[int]],
        given: Mapping[str, float] | None,
    ) -> Assignment:
        rewards = [self._score(ids, row) or 0.0 for ids, row in zip(answers, rows, strict=True)]
        batch = SignalBatch(
            mask_BT,
            {name: known.logprobs for name, known in scores.items()},
            {name: known.entropy for name, known in scores.items()},
            measures(self.table.measures, states, mask_BT),
            rewards=torch.tensor(rewards, dtype=torch.float64, device=mask_BT.device),
        )
        averages = None if given is None else Thresholds(given["gap"], given["confidence"], 0.0, int(mask_BT.sum()), 0)
        return assign(self.table, batch, thresholds=averages)

    def _details(self, state: tuple[Tensor, Head], ids: list[int], n: int) -> TokenDetails:
        hidden, head = state
        head = head.gathered(hidden.dtype)
        return token_details(hidden[n, : len(ids)], head, torch.tensor(ids, device=hidden.device))

    def _score(self, ids: list[int], row: Mapping[str, Any]) -> float | None:
        """The verifier's score; an answer that was cut at the length limit is not a finished one."""
        if self.answering.verifier is unjudged:
            return None
        ended = self.answering.ending.ended(ids)
        return judged(self.answering.verifier, self.answering.text(ids), row) if ended else 0.0


def thresholds_of(assignment: Assignment) -> dict[str, float] | None:
    """The averages that routed some tokens, as a record has them; `None` in an unrouted table."""
    averages = assignment.thresholds
    return None if averages is None else {"gap": averages.gap, "confidence": averages.confidence}
