"""Scoring and the routed loss from hidden states and output heads, without the logits of a whole batch."""

from dopd.fused.api import fused_routed_loss, score_tokens
from dopd.fused.scores import TokenScores, TopLogprobs, measures

__all__ = ["TokenScores", "TopLogprobs", "fused_routed_loss", "measures", "score_tokens"]
