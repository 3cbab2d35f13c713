"""The target of a rule as a pass reads it: whole, from hidden states, or as a list of its most probable tokens.

Shapes: P positions of the batch, H hidden size, V vocabulary, K tokens of a support, C tokens of a chunk.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dopd.fused import products
from dopd.fused.scores import TokenScores
from dopd.fused.supports import Outcomes, SupportGrad, mass_outside
from dopd.heads import Head

# Rounding of a log-sum-exp, in units of the spacing of numbers of its size; measured with hidden sizes to 2048.
LOGSUMEXP_ULPS = 4
# 1 - (mass of K listed tokens) is not known better than this, as their log-probs are rounded to single precision: less
# would make the remaining mass of a sure teacher 0 and a reverse KL infinite.
UNKNOWN_MASS = 1e-6


@dataclass(frozen=True)
class Target:
    """One source: hidden states (P, H) and a working head, or scores that are all that is read of it, or both."""

    hidden_PH: Tensor | None
    head: Head | None
    scores: TokenScores | None

    def logits(self, index_C: Tensor, out_CV: Tensor) -> Tensor:
        """Logits at some positions, in a tile."""
        hidden_PH, head = self._states
        return products.dense_logits(hidden_PH[index_C], head, out_CV)

    def columns(self, index_C: Tensor, ids_CK: Tensor) -> Tensor:
        """Logits (C, K) of K tokens at some positions."""
        hidden_PH, head = self._states
        return products.column_logits(hidden_PH[index_C], head, ids_CK)

    def listed(self, index_C: Tensor, top_k: int) -> tuple[Tensor, Tensor] | None:
        """Its k most probable tokens at some positions, ids and log-probs (C, K); `None` where it is read whole."""
        if self.hidden_PH is not None:
            return None
        assert self.scores is not None and self.scores.top is not None
        top = self.scores.top
        return top.ids[..., :top_k].flatten(0, 1)[index_C], top.logprobs[..., :top_k].flatten(0, 1)[index_C]

    @property
    def _states(self) -> tuple[Tensor, Head]:
        assert self.hidden_PH is not None and self.head is not None  # `TokenScores.give` has said what is read
        return self.hidden_PH, self.head


def listed_outcomes(inside_CK: Tensor, *, bucket: bool) -> Outcomes:
    """Outcomes from log-probs of a whole distribution, of which nothing but these is known."""
    if not bucket:
        return Outcomes(inside_CK, None)
    rest_C = mass_outside(inside_CK, torch.zeros_like(inside_CK[:, 0]))
    return Outcomes(inside_CK, rest_C.clamp(min=math.log(UNKNOWN_MASS)))


def rounding_dominates(guess: SupportGrad, rest_C: Tensor, logsumexp_C: Tensor) -> Tensor:
    """Tokens whose divergence would feel the rounding of the target's remaining mass.

    1 - (mass of K columns) is exact to the rounding of the log-sum-exp. That is harmless unless the divergence leans on
    the logarithm of a mass that small; those few tokens get the sum over the other tokens.
    """
    assert guess.sensitivity_C is not None
    eps = torch.finfo(rest_C.dtype).eps
    mass_error_C = LOGSUMEXP_ULPS * eps * logsumexp_C.abs().clamp(min=1.0)
    error_C = guess.sensitivity_C * mass_error_C / (rest_C - logsumexp_C).exp()
    return ~(error_C <= 0.25 * eps**0.5)  # written so that a NaN counts as poor
