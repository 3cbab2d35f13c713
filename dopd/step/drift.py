"""How far an engine with weights of its own is from the student whose answers it draws.

Its numerics differ (kernels, precision, a cache of its own), and its weights may be older than they should be. Both
show in the log-probs of the sampled tokens: the engine's when it drew them, and the student's own of the same tokens,
which the training pass makes anyway.

Shapes: B completions, T completion tokens, N tokens.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dopd.errors import ScoringError
from dopd.fused import score_tokens
from dopd.heads import Head
from dopd.ranks import Ranks
from dopd.step.batch import ScoredBatch

_RARE = 0.99  # the quantile that is logged beside the mean
_JUMP = 10.0  # a mean this many times the first step's cannot come from numerics
_OTHER_MODEL = 1.0  # nats; between two models, not between two ways to compute one


def importance(student: Tensor, drawn: Tensor, cap: float) -> Tensor:
    """min(S(y) / E(y), cap) of tokens (B, T) that an engine drew with E: truncated importance weights, by which an
    average over E's tokens becomes one over S's, up to the truncation.

    Args:
        student (`Tensor` (B, T)): log-probs log S(y), nats.
        drawn (`Tensor` (B, T)): log-probs log E(y), nats.
        cap (`float`): largest weight.
    """
    return (student.double() - drawn.double()).exp().clamp(max=cap)


class Drift:
    """Collects a step's tokens, micro-batch by micro-batch, and says how far the engine was from the student.

    Args:
        limit (`float`): mean drift from which it is worth a warning, nats.
        cap (`float`, *optional*): of importance weights, where the run has them.
    """

    def __init__(self, limit: float, cap: float | None = None) -> None:
        self._limit, self._cap = limit, cap
        self._differences: list[Tensor] = []
        self._first: float | None = None

    def weighed(self, batch: ScoredBatch, hidden: Tensor, head: Head, chunk_tokens: int | None = None) -> ScoredBatch:
        """A micro-batch whose tokens are added, with its importance weights where the run has them; as it is where the
        engine said nothing of its tokens, or drew none of them.

        Args:
            hidden (`Tensor` (B, T, H)), head (`Head`): of the plain student, as it is trained on.
            chunk_tokens (`int`, *optional*): tokens whose logits exist at a time.

        Raises:
            ScoringError: importance weights without log-probs of the engine.
        """
        drawn = batch.drawn_logprobs
        if batch.table.text == "reference":
            return batch
        if drawn is None:
            if self._cap is not None:
                raise ScoringError(
                    "rollout_importance (='truncated') weighs by the log-probs of the engine, and the rollout engine "
                    "gave token ids alone: have it return dopd.step.Answers(token_ids, logprobs)"
                )
            return batch
        ids, mask = batch.completion_ids, batch.mask
        student = score_tokens(hidden.detach(), head, ids, mask, chunk_tokens=chunk_tokens).logprobs
        self.add(student, drawn, mask)
        if self._cap is None:
            return batch
        return replace(batch, assignment=batch.assignment.times(importance(student, drawn, self._cap), batch.table))

    def add(self, student: Tensor, drawn: Tensor, mask: Tensor) -> None:
        """Add tokens (B, T) where `mask` is non-zero, by their log-probs of student and engine, nats."""
        keep = mask != 0
        self._differences.append((student.double() - drawn.double())[keep].detach())

    def taken(self, ranks: Ranks) -> dict[str, float]:
        """Metrics of the tokens that were added on all ranks since the last call; nothing where there are none."""
        if not self._differences:
            return {}
        difference_N = ranks.gathered(torch.cat(self._differences))
        self._differences = []
        if not len(difference_N):
            return {}
        far_N = difference_N.abs()
        place = min(len(far_N) - 1, int(_RARE * len(far_N)))
        metrics = {"rollout/drift": far_N.mean().item(), "rollout/drift_p99": far_N.sort().values[place].item()}
        if self._cap is not None:
            weights_N = difference_N.exp()
            metrics["rollout/importance"] = weights_N.clamp(max=self._cap).mean().item()
            metrics["rollout/importance_capped"] = (weights_N > self._cap).double().mean().item()
        return metrics

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """What a step's drift says, where it is worth a warning.

        Args:
            metrics (`dict`): of `taken`.

        Raises:
            ScoringError: the engine draws from another model, or from older weights than the student has.
        """
        mean = metrics.get("rollout/drift")
        if mean is None:
            return None
        first = self._first = mean if self._first is None else self._first
        numbers = f"rollout/drift is {mean:.3g} nats: the mean over tokens of |log S(y) - log E(y)|"
        if mean > self._limit and mean > _JUMP * first:
            raise ScoringError(
                f"{numbers}, and was {first:.3g} at the first step. The rollout engine E draws with older weights than "
                "the student S has: check that its weights are brought up to date at each step. rollout_drift_limit "
                f"(={self._limit:g}) is where a run begins to look at this"
            )
        if mean > _OTHER_MODEL:
            raise ScoringError(
                f"{numbers}, more than {_OTHER_MODEL:g}. The rollout engine E draws from another model than the "
                "student S, or says the log-probs of other tokens, or of another temperature: check the model that it "
                "serves, and that it is brought up to date at each step"
            )
        if mean > self._limit:
            return (
                f"{numbers}, above rollout_drift_limit (={self._limit:g}): the engine E computes other probabilities "
                "than the student S. Have both compute in one precision, or correct for it with "
                "rollout_importance='truncated'"
            )
        return None
