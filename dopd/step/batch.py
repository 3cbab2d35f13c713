"""What a step knows of its completions, as typed data.

Shapes: B completions of this rank, T completion tokens, H hidden size of a source.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dopd.assignment import Assignment
from dopd.fused import TokenScores
from dopd.scoring import View, columns_read, unpadded
from dopd.tables import RoutingTable


@dataclass(frozen=True)
class Rollouts:
    """Prompts and the student's answers to them.

    Attributes:
        rows (`list[dict]`): rows of the dataset, with the prompt as the student read it; the rollouts of a prompt side
            by side.
        view (`View`): these prompts, as everyone who reads the plain view reads them.
        completion_ids (`LongTensor` (B, T)): right-padded; the same in every view.
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        logprobs (`Tensor` (B, T), *optional*): of the tokens by the engine that drew them, nats; 0 at padding.
        scores (`list[float]`, *optional*): how right the answers are by the verifier, in [0, 1].
        rewards (`list[float]`, *optional*): what methods learn from: any finite numbers, NaN where nothing applies.
        rewards_by_function (`dict[str, list[float]]`): of each reward function, NaN where it does not apply.
        extra (`dict[str, list]`): columns that reward functions logged (`log_extra`): numbers, texts, truth values or
            `None`, one for each answer.
        texts (`list[str]`, *optional*): the answers without special tokens, where they have been decoded already.
    """

    rows: Sequence[Mapping[str, Any]]
    view: View
    completion_ids: Tensor
    mask: Tensor
    logprobs: Tensor | None = None
    scores: list[float] | None = None
    rewards: list[float] | None = None
    rewards_by_function: Mapping[str, list[float]] = field(default_factory=dict)
    extra: Mapping[str, list[Any]] = field(default_factory=dict)
    texts: list[str] | None = None

    @cached_property
    def answers(self) -> list[list[int]]:
        """Token ids of each answer, without padding."""
        return unpadded(self.completion_ids, self.mask)


@dataclass(frozen=True)
class SourceScores:
    """What one source says about the sampled tokens of a batch.

    Attributes:
        tokens (`TokenScores`): of the sampled tokens (B, T).
        hidden (`Tensor` (B, T, H), *optional*): the states that predict them, where the loss reads whole distributions.
        vocab_size (`int`, *optional*): outcomes of its distributions; `None` where the scorer cannot tell.
    """

    tokens: TokenScores
    hidden: Tensor | None = None
    vocab_size: int | None = None

    def at(self, rows: Tensor) -> "SourceScores":
        hidden = None if self.hidden is None else self.hidden[rows]
        return replace(self, tokens=self.tokens.at(rows), hidden=hidden)


@dataclass(frozen=True)
class ScoredBatch:
    """Texts with everything that their loss reads, for one part of a table; a (micro-)batch.

    Attributes:
        table (`RoutingTable`): the part (`RoutingTable.parts`).
        view (`View`): the prompts in front of the texts that the student is trained on.
        completion_ids (`LongTensor` (B, T)), mask (`Tensor` (B, T)): the rollouts as in `Rollouts`, or the reference
            texts in the same form; a row without one has no scored token.
        sources (`dict[str, SourceScores]`): by name, every source that the table reads.
        assignment (`Assignment`): decided for all ranks at once.
        num_sequences (`float`): sequences with a scored token in the whole step, on all ranks: the denominator of the
            mean over sequences.
        numbers (`LongTensor` (B,)): the place of each completion among those of this rank's step.
        drawn_logprobs (`Tensor` (B, T), *optional*): `Rollouts.logprobs`, where the student answered these prompts.
        read (`tuple[int]`, *optional*): `dopd.scoring.columns_read` of the mask, where somebody has looked.
    """

    table: RoutingTable
    view: View
    completion_ids: Tensor
    mask: Tensor
    sources: Mapping[str, SourceScores]
    assignment: Assignment
    num_sequences: float
    numbers: Tensor
    drawn_logprobs: Tensor | None = None
    read: tuple[int, ...] | None = None

    def at(self, rows: Sequence[int]) -> "ScoredBatch":
        """Some completions, in the order in which they are named."""
        rows_N = torch.tensor(rows, device=self.mask.device)
        return replace(
            self,
            view=self.view.at(rows),
            completion_ids=self.completion_ids[rows_N],
            mask=self.mask[rows_N],
            sources={name: scores.at(rows_N) for name, scores in self.sources.items()},
            assignment=self.assignment.at(rows_N),
            numbers=self.numbers[rows_N],
            drawn_logprobs=None if self.drawn_logprobs is None else self.drawn_logprobs[rows_N],
            read=None if self.read is None else tuple(self.read[row] for row in rows),
        )

    def split(self, count: int, num_generations: int) -> "list[ScoredBatch]":
        """`count` micro-batches of equal numbers of completions. Groups of rollouts are put in the order of their
        longest sequence first, so that micro-batches need little padding.

        Args:
            num_generations (`int`): rollouts of each prompt, which stand side by side. Where a rank holds parts of
                groups, every completion counts as a group of its own.
        """
        batch = replace(self, read=columns_read(self.mask))
        lengths = [prompt + read for prompt, read in zip(self.view.lengths, batch.read or (), strict=True)]
        size = num_generations if len(lengths) % num_generations == 0 else 1
        groups = [range(start, start + size) for start in range(0, len(lengths), size)]
        rows = [row for group in sorted(groups, key=lambda group: max(lengths[row] for row in group)) for row in group]
        per_part = len(rows) // count
        return [batch.at(rows[start : start + per_part]) for start in range(0, len(rows), per_part)]
