"""Random scored batches for tests of methods: every source, rewards of groups, in float64."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dopd
from dopd.assignment import Assignment, assign
from dopd.divergences import entropy, log_probs, pick
from dopd.loss import RoutedLoss
from dopd.signals import SignalBatch, take_measure
from dopd.sources import SOURCES

GROUP = 4


@dataclass
class Logits:
    """Logits (B, T, V) of every source, sampled ids, a mask with padding, and rewards; the rollouts of a prompt side by
    side.
    """

    views: dict[str, Tensor]
    ids: Tensor
    mask: Tensor
    rewards: Tensor

    @property
    def student(self) -> Tensor:
        return self.views["student"]

    def log_p(self, source: str) -> Tensor:
        """Log-probs (B, T, V), as plain torch has them."""
        return torch.log_softmax(self.views[source], -1)

    def log_y(self, source: str) -> Tensor:
        """Log-probs of the sampled tokens (B, T)."""
        return self.log_p(source).gather(-1, self.ids.unsqueeze(-1)).squeeze(-1)

    def entropy(self, source: str) -> Tensor:
        return -(self.log_p(source).exp() * self.log_p(source)).sum(-1)

    def assignment(self, table: dopd.RoutingTable, **known: Any) -> Assignment:
        """What the table decides, with rewards and both contexts there for every row."""
        logprobs = {name: pick(log_probs(self.views[name]), self.ids) for name in SOURCES}
        entropies = {name: entropy(log_probs(self.views[name])) for name in SOURCES}
        measures = {name: take_measure(name, self.views) for name in table.measures}
        present = torch.ones(len(self.ids), dtype=torch.bool)
        options: dict[str, Any] = {
            "rewards": self.rewards,
            "scores": self.rewards,
            "num_generations": GROUP,
            "has_privileged": present,
            "has_contrast": present,
        }
        return assign(table, SignalBatch(self.mask, logprobs, entropies, measures, **(options | known)))

    def loss(self, table: dopd.RoutingTable, assignment: Assignment) -> tuple[RoutedLoss, Tensor]:
        """The reference's result, and the gradient by the student's logits."""
        leaf = self.student.clone().requires_grad_()
        targets = {name: self.views[name] for name in table.target_sources}
        result = dopd.routed_loss(leaf, targets, self.ids, self.mask, table, assignment=assignment)
        result.loss.backward()
        assert leaf.grad is not None
        return result, leaf.grad


def random_logits(seed: int = 0, rows: int = 2 * GROUP, tokens: int = 5, vocab: int = 18) -> Logits:
    generator = torch.Generator().manual_seed(seed)
    draws = 1.5 * torch.randn(len(SOURCES), rows, tokens, vocab, generator=generator, dtype=torch.float64)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[1, 3:] = 0
    mask[-1, 1:] = 0
    ids = torch.randint(vocab, (rows, tokens), generator=generator)
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)[:rows]
    return Logits(dict(zip(SOURCES, draws, strict=True)), ids, mask, rewards)


def mean_over_sequences(per_token: Tensor, mask: Tensor) -> Tensor:
    """Eq. 11 in plain torch: over the tokens of a sequence, then over sequences."""
    keep = mask != 0
    return torch.stack([row[kept].mean() for row, kept in zip(per_token, keep, strict=True) if bool(kept.any())]).mean()
