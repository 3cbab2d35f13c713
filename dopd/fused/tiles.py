"""What is computed from logits, token by token: statistics, divergences, and the gradient in their place.

A tile is walked in blocks of tokens that stay in cache, so that the many elementwise steps cost one pass over memory
and their intermediate tensors are as small as a block. `TileOperations` is the definition; other backends override
its methods.

Shapes: C tokens of a chunk, R tokens of a block, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dopd.divergences import Divergence, forward_kl, js, pick, reverse_kl
from dopd.fused.products import logit_gradient
from dopd.heads import Head

# One token's 151,936 float32 logits are 0.6 MB: a block and its intermediates fit a second-level cache.
CPU_BLOCK_BYTES = 2**20
GPU_BLOCK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Stats:
    """For every token: the log of the sum of exponentials, and E[log p], the negative entropy; nats."""

    logsumexp_C: Tensor
    neg_entropy_C: Tensor


class TileOperations:
    """Operations on a tile of logits in plain torch, for any device and dtype."""

    def stats(self, logits_CV: Tensor) -> Stats:
        """Statistics of every token; the tile is used up."""
        return self.softmax_(logits_CV, None)

    def softmax_(self, logits_CV: Tensor, head: Head | None) -> Stats:
        """Statistics of every token; with a head, the tile becomes probabilities * d logits / d (hidden @ weight.T)."""
        stats = Stats(*(logits_CV.new_empty(logits_CV.shape[0]) for _ in range(2)))
        for block in blocks(logits_CV):
            z_RV = logits_CV[block]
            logit_gradient_RV = None if head is None else logit_gradient(head, z_RV)
            top_R, sum_R, e_RV = _shift_(z_RV)
            log_sum_R = sum_R.log()
            stats.logsumexp_C[block] = top_R + log_sum_R
            stats.neg_entropy_C[block] = torch.linalg.vecdot(e_RV, z_RV) / sum_R - log_sum_R
            if logit_gradient_RV is not None:
                torch.div(e_RV, sum_R.unsqueeze(-1), out=z_RV)
                _scale_(z_RV, logit_gradient_RV)
        return stats

    def full_(
        self, function: Divergence, student_CV: Tensor, target_CV: Tensor, scale_C: Tensor, head: Head
    ) -> tuple[Tensor, Tensor]:
        """Divergences over the whole vocabulary, and entropies of the student; nats.

        The student's tile becomes scale * d divergence / d (hidden @ weight.T); the target's tile is used up.

        Args:
            function (`Divergence`): on log-probs over the vocabulary.
            student_CV, target_CV (`Tensor` (C, V)): logits.
            scale_C (`Tensor` (C,)): d loss / d divergence.
            head (`Head`): the student's.
        """
        value_C, entropy_C = (student_CV.new_empty(student_CV.shape[0]) for _ in range(2))
        step = ANALYTIC.get(function)
        for block in blocks(student_CV):
            z_RV = student_CV[block]
            logit_gradient_RV = logit_gradient(head, z_RV)
            if step is not None:
                value_C[block], entropy_C[block] = step(z_RV, target_CV[block])
            else:
                value_C[block], entropy_C[block] = _by_autograd(function, z_RV, target_CV[block])
            z_RV.mul_(scale_C[block].unsqueeze(-1))
            _scale_(z_RV, logit_gradient_RV)
        return value_C, entropy_C


def score_tile(
    operations: TileOperations, logits_CV: Tensor, ids_C: Tensor, merged_ids: Sequence[int] = ()
) -> tuple[Tensor, Stats]:
    """Log-probs of `ids` (nats; of all merged ones together) and statistics of every token; the tile is used up."""
    picked_C = pick(logits_CV, ids_C, merged_ids)
    stats = operations.stats(logits_CV)
    return picked_C - stats.logsumexp_C, stats


def blocks(tile_CV: Tensor) -> Iterator[slice]:
    """Slices of tokens whose logits stay in cache together."""
    budget = CPU_BLOCK_BYTES if tile_CV.device.type == "cpu" else GPU_BLOCK_BYTES
    step = max(1, budget // (tile_CV.shape[1] * tile_CV.element_size()))
    for start in range(0, tile_CV.shape[0], step):
        yield slice(start, min(start + step, tile_CV.shape[0]))


def _scale_(z_RV: Tensor, factor: Tensor | float) -> None:
    if isinstance(factor, Tensor) or factor != 1.0:
        z_RV.mul_(factor)


def _shift_(z_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract the largest logit in place; returns it, the sum of the exponentials, and the exponentials."""
    top_R = z_RV.amax(-1)
    z_RV.sub_(top_R.unsqueeze(-1))
    e_RV = z_RV.exp()
    return top_R, e_RV.sum(-1), e_RV


def _log_softmax_(z_RV: Tensor) -> Tensor:
    """Logits become log-probs in place; returns the probabilities."""
    _, sum_R, e_RV = _shift_(z_RV)
    z_RV.sub_(sum_R.log().unsqueeze(-1))
    return e_RV.div_(sum_R.unsqueeze(-1))


def _forward_kl_(log_s_RV: Tensor, log_t_RV: Tensor) -> tuple[Tensor, Tensor]:
    s_RV, t_RV = _log_softmax_(log_s_RV), _log_softmax_(log_t_RV)
    # d KL(T || S) / dz = S - T.
    entropy_R = -torch.linalg.vecdot(s_RV, log_s_RV)
    value_R = torch.linalg.vecdot(t_RV, log_t_RV.sub_(log_s_RV))
    torch.sub(s_RV, t_RV, out=log_s_RV)
    return value_R, entropy_R


def _reverse_kl_(log_s_RV: Tensor, log_t_RV: Tensor) -> tuple[Tensor, Tensor]:
    # d KL(S || T) / dz = S * (log S - log T - KL): the ratio minus its mean under S.
    s_RV, _ = _log_softmax_(log_s_RV), _log_softmax_(log_t_RV)
    entropy_R = -torch.linalg.vecdot(s_RV, log_s_RV)
    ratio_RV = log_s_RV.sub_(log_t_RV)
    value_R = torch.linalg.vecdot(s_RV, ratio_RV)
    ratio_RV.sub_(value_R.unsqueeze(-1)).mul_(s_RV)
    return value_R, entropy_R


def _js_(log_s_RV: Tensor, log_t_RV: Tensor) -> tuple[Tensor, Tensor]:
    s_RV, t_RV = _log_softmax_(log_s_RV), _log_softmax_(log_t_RV)
    entropy_R = -torch.linalg.vecdot(s_RV, log_s_RV)
    # Both probabilities below the smallest normal number: the outcome adds nothing, and log(0) would add a NaN.
    tiny = torch.finfo(s_RV.dtype).tiny
    log_m_RV = torch.add(s_RV, t_RV).mul_(0.5).clamp_(min=tiny).log_()
    # d JS / dz = S * (log S - log M - KL(S || M)) / 2: M's own dependence on S cancels against T's term.
    kl_t_R = torch.linalg.vecdot(t_RV, log_t_RV.sub_(log_m_RV))
    ratio_RV = log_s_RV.sub_(log_m_RV)
    kl_s_R = torch.linalg.vecdot(s_RV, ratio_RV)
    ratio_RV.sub_(kl_s_R.unsqueeze(-1)).mul_(s_RV).mul_(0.5)
    return 0.5 * (kl_s_R + kl_t_R), entropy_R


# Each writes d divergence / d logits over the student's logits. Keyed by function: what replaces an entry of
# `DIVERGENCES`, or is added to it, is differentiated by autograd, and nothing here has to know it.
ANALYTIC: dict[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    forward_kl: _forward_kl_,
    reverse_kl: _reverse_kl_,
    js: _js_,
}


def _by_autograd(
    function: Callable[[Tensor, Tensor], Tensor], z_RV: Tensor, target_RV: Tensor
) -> tuple[Tensor, Tensor]:
    s_RV = _log_softmax_(z_RV)
    _log_softmax_(target_RV)
    entropy_R = -torch.linalg.vecdot(s_RV, z_RV)
    value_R, grad_RV = outcome_grad(function, z_RV, target_RV)
    # Through the log-softmax: d/dz = g - S * sum(g), with g by the log-probs.
    torch.sub(grad_RV, s_RV.mul_(grad_RV.sum(-1, keepdim=True)), out=z_RV)
    return value_R, entropy_R


def outcome_grad(function: Callable[[Tensor, Tensor], Tensor], log_s: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """A divergence and its gradient by the student's log-probs over a list of outcomes: (..., K) -> (...), (..., K)."""
    with torch.enable_grad():
        leaf = log_s.detach().requires_grad_()
        value = function(leaf, log_t)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient
