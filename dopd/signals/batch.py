"""What signals are computed from: one optimizer batch.

Shapes: B sequences of this rank, T completion tokens, N scored tokens of every rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dopd.errors import ConfigError
from dopd.ranks import Alone, Ranks


@dataclass(frozen=True)
class SignalBatch:
    """Scores of a whole optimizer batch; a signal is a function of it.

    Attributes:
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        logprobs (`dict[str, Tensor]`): source -> log-probs of the sampled tokens (B, T), nats.
        entropies (`dict[str, Tensor]`): source -> entropies (B, T), nats.
        measures (`dict[str, Tensor]`): measure -> (B, T).
        rewards (`Tensor` (B,), *optional*): of reward functions or a verifier: finite numbers on any scale, NaN where
            no function applies.
        scores (`Tensor` (B,), *optional*): how right each answer is by the verifier, in [0, 1].
        has_privileged (`Tensor` (B,), *optional*): whether a row has privileged context.
        has_contrast (`Tensor` (B,), *optional*): whether a row has a contrasting context.
        num_generations (`int`): rollouts of each prompt, side by side.
        step (`int`): optimizer steps before this batch.
        progress (`float`): share of the training that is over, in [0, 1].
        ranks (`Ranks`): the processes that share the batch.
    """

    mask: Tensor
    logprobs: Mapping[str, Tensor]
    entropies: Mapping[str, Tensor]
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    rewards: Tensor | None = None
    scores: Tensor | None = None
    has_privileged: Tensor | None = None
    has_contrast: Tensor | None = None
    num_generations: int = 1
    step: int = 0
    progress: float = 0.0
    ranks: Ranks = field(default_factory=Alone)

    @property
    def keep(self) -> Tensor:
        """Scored positions, bool (B, T)."""
        return self.mask != 0

    def everywhere(self, values_BT: Tensor) -> Tensor:
        """Values of the scored tokens of every rank, float64 (N,), in an order that nothing may depend on."""
        return self.ranks.gathered(values_BT[self.keep].double())

    def per_token(self, values_B: Tensor) -> Tensor:
        """A number of every sequence, at each of its positions: (B,) -> (B, T)."""
        return values_B.double().unsqueeze(1).expand(self.mask.shape)

    def rewards_of_groups(self) -> Tensor:
        """Rewards (B / G, G) of the rollouts of each prompt, NaN where no reward function applies.

        Raises:
            ConfigError: nobody gave rewards, or a rank holds a part of a prompt's rollouts.
        """
        needs = "rewards: pass reward_funcs=... or verifier=... to the trainer (a task brings a verifier)"
        return self._of_groups(self.rewards, f"{needs}, or rewards to SignalBatch")

    def scores_of_groups(self) -> Tensor:
        """The verifier's scores (B / G, G) of the rollouts of each prompt.

        Raises:
            ConfigError: no verifier gave scores, or a rank holds a part of a prompt's rollouts.
        """
        needs = "to know which answers are right: pass verifier=... to the trainer (a task brings its own)"
        return self._of_groups(self.scores, f"{needs}, or scores to SignalBatch")

    def _of_groups(self, values_B: Tensor | None, needs: str) -> Tensor:
        if values_B is None:
            raise ConfigError(f"this method needs {needs}")
        if len(values_B) % self.num_generations:
            raise ConfigError(
                f"a rank holds {len(values_B)} completions, which is not a multiple of num_generations "
                f"(={self.num_generations}): this method compares the rollouts of a prompt. Set "
                "per_device_train_batch_size * gradient_accumulation_steps to a multiple of num_generations"
            )
        return values_B.double().view(-1, self.num_generations)

    def sequence_mean(self, values_BT: Tensor) -> Tensor:
        """Mean over the scored tokens of every sequence, float64 (B,); 0 where there are none."""
        keep_BT = self.keep
        total_B = torch.where(keep_BT, values_BT.double(), 0.0).sum(1)
        return total_B / keep_BT.sum(1).clamp(min=1)


def has_both(batch: SignalBatch) -> Tensor:
    """Rows with a right and a wrong context, at each of their positions, bool (B, T)."""
    both_BT = torch.ones(batch.mask.shape, dtype=torch.bool, device=batch.mask.device)
    for present_B in (batch.has_privileged, batch.has_contrast):
        if present_B is not None:
            both_BT = both_BT & present_B.bool().unsqueeze(1)
    return both_BT


def share_of_answers(batch: SignalBatch, kept_B: Tensor) -> Tensor:
    """Answers with scored tokens per answer that is kept, (): a factor that makes a mean over all answers one over the
    kept ones; 0 where none is kept. The same on every rank.
    """
    counts_2 = torch.stack([batch.keep.any(1).sum(), (kept_B & batch.keep.any(1)).sum()]).double()
    total, kept = batch.ranks.total(counts_2).unbind()
    return torch.where(kept > 0, total / kept.clamp(min=1.0), 0.0)
