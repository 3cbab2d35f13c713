"""Divergences over K tokens of the vocabulary, with or without one outcome for the remaining mass.

The gradient by the logits is then `coefficient * rest`, where rest is the distribution outside the support, plus K
columns. Without the outcome for the remaining mass the coefficient is 0, and the K columns are all there is.
Shapes: C tokens of a chunk, V vocabulary, K tokens of the support.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dopd.divergences import Variant, sampled_terms
from dopd.fused.tiles import blocks, outcome_grad

# Vocabulary entries in one block of the two-step selection.
TOPK_BLOCK = 64


@dataclass(frozen=True)
class Outcomes:
    """Log-masses over K tokens and, if it is an outcome, of everything else; nats, up to a constant per token.

    Attributes:
        inside_CK (`Tensor` (C, K)): logits, or log-probs.
        rest_C (`Tensor` (C,), *optional*): log of the summed exponentials of the other logits.
    """

    inside_CK: Tensor
    rest_C: Tensor | None

    @property
    def log_probs(self) -> Tensor:
        """Normalised over the outcomes: (C, K) or (C, K + 1)."""
        if self.rest_C is None:
            return self.inside_CK.log_softmax(-1)
        return torch.cat([self.inside_CK, self.rest_C.unsqueeze(-1)], dim=-1).log_softmax(-1)


@dataclass(frozen=True)
class SupportGrad:
    """Divergence (nats) and its gradient by the student's logits.

    Attributes:
        value_C (`Tensor` (C,)): divergences.
        columns_CK (`Tensor` (C, K)): gradient at the tokens of the support.
        rest_C (`Tensor` (C,), *optional*): gradient summed over all other tokens, spread in proportion to their
            probabilities.
        sensitivity_C (`Tensor` (C,), *optional*): |d value / d log of the target's remaining mass|.
        token_C (`Tensor` (C,), *optional*): gradient at the sampled token besides, where it is outside the support.
    """

    value_C: Tensor
    columns_CK: Tensor
    rest_C: Tensor | None
    sensitivity_C: Tensor | None
    token_C: Tensor | None = None


@dataclass(frozen=True)
class SampledToken:
    """What student and target say of the sampled token.

    Attributes:
        logit_C (`Tensor` (C,)): the student's logit.
        log_t_C (`Tensor` (C,)): the target's log-prob, nats.
        is_outside_C (`Tensor` (C,), bool): whether it is outside the support.
        logit_gradient_C1 (`Tensor` (C, 1)): d logit / d (hidden @ weight.T).
    """

    logit_C: Tensor
    log_t_C: Tensor
    is_outside_C: Tensor
    logit_gradient_C1: Tensor


def support_grad(function: Callable[[Tensor, Tensor], Tensor], student: Outcomes, target: Outcomes) -> SupportGrad:
    """A divergence over outcomes, differentiated by autograd on K + 1 numbers a token: any function will do."""
    log_s, log_t = student.log_probs, target.log_probs
    value_C, grad = outcome_grad(function, log_s, log_t)
    # Softmax over the outcomes: what reaches an outcome's log-mass; it sums to zero.
    by_mass = grad - log_s.exp() * grad.sum(-1, keepdim=True)
    if student.rest_C is None:
        return SupportGrad(value_C, by_mass, None, None)
    with torch.enable_grad():
        leaf = log_t.detach().requires_grad_()
        value = function(log_s, leaf)
        # A divergence may read the target's order alone, or nothing of it.
        by_target = torch.autograd.grad(value.sum(), leaf, allow_unused=True)[0] if value.requires_grad else None
    sensitivity_C = torch.zeros_like(value_C) if by_target is None else by_target[:, -1].abs()
    return SupportGrad(value_C, by_mass[:, :-1], by_mass[:, -1], sensitivity_C)


def corrected(
    kind: str, variant: Variant, result: SupportGrad, outcomes: tuple[Outcomes, Outcomes], token: SampledToken
) -> SupportGrad:
    """A divergence over a support and one outcome for the rest, with `dopd.divergences.tail_correction` added.

    Args:
        kind (`str`), variant (`Variant`): the divergence.
        outcomes (`tuple[Outcomes, Outcomes]`): of student and target, with the outcome for the rest.
        token (`SampledToken`): the sampled tokens.
    """
    student, target = outcomes
    assert student.rest_C is not None and result.rest_C is not None
    log_s_CK, log_t_CK = student.log_probs, target.log_probs
    log_s_y = token.logit_C - torch.logaddexp(student.inside_CK.logsumexp(-1), student.rest_C)

    def outside(values_C: Tensor) -> Tensor:
        return torch.where(token.is_outside_C, values_C, 0.0)

    value_y, push_y = sampled_terms(kind, outside(log_s_y), outside(token.log_t_C), variant)
    value_rest, push_rest = sampled_terms(kind, outside(log_s_CK[:, -1]), outside(log_t_CK[:, -1]), variant)
    # -push_y grad log S(y) + push_rest grad log S(rest), by logits: the onehot of y, the distribution of the rest, and
    # the whole distribution S, which is S(rest) times that of the rest outside the support.
    whole_C = outside(push_y - push_rest)
    return SupportGrad(
        result.value_C + outside(value_y - value_rest),
        result.columns_CK + whole_C.unsqueeze(-1) * log_s_CK[:, :-1].exp(),
        result.rest_C + whole_C * log_s_CK[:, -1].exp() + outside(push_rest),
        result.sensitivity_C,
        outside(-push_y),
    )


def topk_ids(logits_CV: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits of every token, (C, V) -> (C, k).

    The k largest lie in the k blocks of the vocabulary with the largest maxima, so only those are looked through.
    """
    num_blocks = logits_CV.shape[1] // TOPK_BLOCK
    if num_blocks <= 4 * k:
        return logits_CV.topk(k, dim=-1).indices
    ids_CK = torch.empty(logits_CV.shape[0], k, dtype=torch.long, device=logits_CV.device)
    inner = torch.arange(TOPK_BLOCK, device=logits_CV.device)
    edge = torch.arange(num_blocks * TOPK_BLOCK, logits_CV.shape[1], device=logits_CV.device)
    for block in blocks(logits_CV):
        z_RV = logits_CV[block]
        maxima = z_RV[:, : num_blocks * TOPK_BLOCK].unflatten(1, (num_blocks, TOPK_BLOCK)).amax(-1)
        best = maxima.topk(k, dim=-1, sorted=False).indices
        candidates = (best.unsqueeze(-1) * TOPK_BLOCK + inner).flatten(1)
        candidates = torch.cat([candidates, edge.expand(z_RV.shape[0], -1)], dim=1)
        chosen = z_RV.gather(1, candidates).topk(k, dim=-1).indices
        ids_CK[block] = candidates.gather(1, chosen)
    return ids_CK


def mass_outside(inside_CK: Tensor, logsumexp_C: Tensor) -> Tensor:
    """Log-mass outside K tokens from their logits and the log-sum-exp of all; -inf where rounding leaves none."""
    share_C = (inside_CK.logsumexp(-1) - logsumexp_C).exp()
    return logsumexp_C + torch.log1p(-share_C.clamp(max=1.0))
