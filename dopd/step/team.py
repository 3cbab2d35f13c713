"""Several teachers, each of its own rows: their models come to the device one after the other, once for a batch.

Shapes: B completions, T completion tokens, H hidden size, the widest of all teachers' in a batch of several.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dopd.fused import TokenScores
from dopd.heads import Head
from dopd.scoring import View
from dopd.sources import TEACHER_SOURCES
from dopd.step.batch import SourceScores
from dopd.step.scorer import LocalScorer


class Team(Protocol):
    """Models of this process, of which several are the teacher in turn."""

    def teacher_in_place(self, teacher: str) -> AbstractContextManager[None]:
        """Inside, this one is the teacher, on the device of the student."""


@dataclass(frozen=True)
class TeamScorer:
    """Scores of several teachers; implements `Scorer`.

    States of teachers of different widths are filled up with zeros. Where a loss reads a batch of several teachers,
    states and heads stand side by side (`Head.joined`); one of a single teacher costs what it costs without others.

    Attributes:
        local (`LocalScorer`): of every model of this process, and of the teacher that is in place.
        team (`Team`): puts one there.
    """

    local: LocalScorer
    team: Team
    _heads: dict[str, Head] = field(default_factory=dict)

    def supports(self, source: str) -> frozenset[str]:
        return self.local.supports(source)

    def head(self, source: str) -> Head:
        return self.local.head(source)

    def score(self, source: str, view: View, completion_ids: Tensor, mask: Tensor) -> SourceScores:
        return dict(self.score_all({source: view}, completion_ids, mask))[source]

    def score_all(
        self, views: Mapping[str, View], completion_ids: Tensor, mask: Tensor
    ) -> Iterator[tuple[str, SourceScores]]:
        theirs = sorted(views.keys() & TEACHER_SOURCES)
        others = {source: view for source, view in views.items() if source not in TEACHER_SOURCES}
        yield from self.local.score_all(others, completion_ids, mask)
        if not theirs:
            return
        parts: dict[str, list[tuple[Tensor, SourceScores]]] = {source: [] for source in theirs}
        for teacher, rows in _rows_by_teacher(views[theirs[0]]).items():
            numbers = torch.tensor(rows, device=mask.device)
            with self.team.teacher_in_place(teacher):
                for source in theirs:
                    read = (views[source].at(rows), completion_ids[numbers], mask[numbers])
                    parts[source].append((numbers, self.local.score(source, *read)))
                if teacher not in self._heads:  # frozen, so it is kept where it is when its model goes
                    head = self.local.whole_head(theirs[0])
                    bias = None if head.bias is None else head.bias.detach()
                    self._heads[teacher] = replace(head, weight=head.weight.detach(), bias=bias)
        for source in theirs:
            yield source, _put_together(parts.pop(source))

    def forget(self) -> None:
        self.local.forget()

    def target(self, source: str, hidden: Tensor, view: View) -> tuple[Tensor, Head]:
        if source not in TEACHER_SOURCES:
            return self.local.target(source, hidden, view)
        groups = _rows_by_teacher(view)
        heads = [self._heads[teacher] for teacher in groups]
        widths = [head.weight.shape[1] for head in heads]
        if len(groups) == 1:
            return hidden[..., : widths[0]], heads[0]
        beside, start = hidden.new_zeros(*hidden.shape[:2], sum(widths)), 0
        for rows, width in zip(groups.values(), widths, strict=True):
            numbers = torch.tensor(rows, device=hidden.device)
            beside[numbers, :, start : start + width] = hidden[numbers, :, :width]
            start += width
        return beside, Head.joined(heads)


def _rows_by_teacher(view: View) -> dict[str, list[int]]:
    """The rows of each teacher, in the order of their names."""
    return {
        teacher: [row for row, one in enumerate(view.teachers) if one == teacher]
        for teacher in sorted(set(view.teachers))
    }


def _put_together(parts: Sequence[tuple[Tensor, SourceScores]]) -> SourceScores:
    tokens = TokenScores.put_together([(numbers, scores.tokens) for numbers, scores in parts])
    states = [(numbers, scores.hidden) for numbers, scores in parts if scores.hidden is not None]
    hidden = None
    if len(states) == len(parts):
        widest = max(one.shape[-1] for _, one in states)
        order = torch.cat([numbers for numbers, _ in states]).argsort()
        hidden = torch.cat([functional.pad(one, (0, widest - one.shape[-1])) for _, one in states])[order]
    return SourceScores(tokens, hidden, parts[0][1].vocab_size)
