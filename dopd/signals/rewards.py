"""Signals that read rewards or scores. Shapes: B sequences, T completion tokens, G rollouts of a prompt."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dopd.settings import Count, NotNegative, Positive, Probability
from dopd.signals.batch import SignalBatch, has_both, share_of_answers
from dopd.signals.registry import register_signal

# Rollouts of one prompt that all got the same reward say nothing about which is better.
_EVEN = 1e-8


@register_signal("group_advantage", "(reward - mean of the group) / its standard deviation", needs_rewards=True)
def group_advantage(batch: SignalBatch, scaled: bool = True) -> Tensor:
    """(r - mean) / std over the rollouts of a prompt (GRPO, arXiv 2402.03300), at each of their tokens; (B, T).

    The standard deviation is the sample's (divided by G - 1). A group of equal rewards has advantage 0, and so has a
    rollout to which no reward function applies, which counts in neither mean nor deviation.

    Args:
        scaled (`bool`): divide by the standard deviation.
    """
    rewards_GG = batch.rewards_of_groups()
    known_GG = ~torch.isnan(rewards_GG)
    num_known_G1 = known_GG.sum(1, keepdim=True)
    mean_G1 = torch.where(known_GG, rewards_GG, 0.0).sum(1, keepdim=True) / num_known_G1.clamp(min=1)
    centred_GG = torch.where(known_GG, rewards_GG - mean_G1, 0.0)
    if scaled and rewards_GG.shape[1] > 1:
        some_known_G1 = (centred_GG.square().sum(1, keepdim=True) / (num_known_G1 - 1).clamp(min=1)).sqrt()
        all_known_G1 = num_known_G1 == rewards_GG.shape[1]
        spread_G1 = torch.where(all_known_G1, rewards_GG.std(1, keepdim=True), some_known_G1)
        centred_GG = torch.where(spread_G1 > _EVEN, centred_GG / spread_G1.clamp(min=_EVEN), 0.0)
    return batch.per_token(centred_GG.flatten())


@register_signal(
    "uni_opd_margin",
    "half of the margin that log T - log S lacks between right and wrong rollouts, signed",
    sources={"student", "teacher"},
    entropies=(),
    needs_scores=True,
)
def uni_opd_margin(batch: SignalBatch, delta: NotNegative = 0.1, threshold: float = 0.5) -> Tensor:
    """The additive shift of Uni-OPD (arXiv 2605.03677), mode "both"; (B, T), nats.

    Per prompt, g = mean(a | right) - mean(a | wrong), a = sequence mean of log T - log S. Where g < delta, right
    rollouts get (delta - g)/2 added to every token's advantage and wrong ones the negative of it.

    Args:
        delta (`float`): the margin asked for, nats.
        threshold (`float`): score from which a rollout is right.
    """
    means_B = batch.sequence_mean(batch.logprobs["teacher"].double() - batch.logprobs["student"].double())
    right_GG = batch.scores_of_groups() >= threshold
    means_GG = means_B.view(right_GG.shape)
    num_right_G1, num_wrong_G1 = right_GG.sum(1, keepdim=True), (~right_GG).sum(1, keepdim=True)
    right_G1 = torch.where(right_GG, means_GG, 0.0).sum(1, keepdim=True) / num_right_G1.clamp(min=1)
    wrong_G1 = torch.where(right_GG, 0.0, means_GG).sum(1, keepdim=True) / num_wrong_G1.clamp(min=1)
    lacking_G1 = (delta - (right_G1 - wrong_G1)).clamp(min=0.0)
    mixed_G1 = (num_right_G1 > 0) & (num_wrong_G1 > 0)
    shift_GG = torch.where(mixed_G1, 0.5 * lacking_G1, 0.0) * torch.where(right_GG, 1.0, -1.0)
    return batch.per_token(shift_GG.flatten())


@register_signal(
    "rlsd",
    "A ((1 - m) + m clip(exp(sign(A) (log S(y|x,p) - log S(y|x))), 1 - e, 1 + e)), A: group advantage",
    sources={"student", "privileged_student"},
    needs_rewards=True,
)
def rlsd(batch: SignalBatch, epsilon: NotNegative = 0.2, mix: Probability = 0.5, decay_steps: Count = 50) -> Tensor:
    """The token-sized advantage of RLSD (arXiv 2604.03128); (B, T).

    Args:
        epsilon (`float`): how far the size of a token may leave 1.
        mix (`float`): share of the self-teacher's size at the first step; it falls to 0 in `decay_steps` steps.
        decay_steps (`int`): optimizer steps.
    """
    advantage_BT = group_advantage(batch)
    shift_BT = batch.logprobs["privileged_student"].double() - batch.logprobs["student"].double()
    size_BT = torch.exp(torch.sign(advantage_BT) * shift_BT).clamp(1.0 - epsilon, 1.0 + epsilon)
    share = mix * max(0.0, 1.0 - batch.step / decay_steps)
    return advantage_BT * (1.0 - share + share * size_BT)


@register_signal(
    "distilled_rl",
    "A w where A > 0, w = clip(T(y) / S(y), 1 / bound, bound) over its geometric mean in the answer; else A",
    sources={"student", "teacher"},
    entropies=(),
    needs_rewards=True,
)
def distilled_rl(batch: SignalBatch, bound: Positive = 3.0) -> Tensor:
    """The token-sized advantage of Distilled RL (arXiv 2607.17247); (B, T).

    Args:
        bound (`float`): of the ratio of teacher to student, either way.
    """
    advantage_BT = group_advantage(batch)
    ratio_BT = batch.logprobs["teacher"].double() - batch.logprobs["student"].double()
    ratio_BT = ratio_BT.clamp(-math.log(bound), math.log(bound))
    size_BT = (ratio_BT - batch.sequence_mean(ratio_BT).unsqueeze(1)).exp()
    return advantage_BT * torch.where(advantage_BT > 0, size_BT, 1.0)


@register_signal(
    "sipo",
    "A + mix clip(log S(y|x,right) - log S(y|x,wrong), +-bound)",
    sources={"privileged_student", "contrast_student"},
    entropies=(),
    needs_rewards=True,
)
def sipo(batch: SignalBatch, mix: NotNegative = 0.5, bound: NotNegative = 0.2) -> Tensor:
    """The shifted advantage of SIPO (arXiv 2609.36742); (B, T). Rows without both contexts keep A.

    Args:
        mix (`float`): factor on the shift.
        bound (`float`): of the log-ratio, nats.
    """
    shift_BT = batch.logprobs["privileged_student"].double() - batch.logprobs["contrast_student"].double()
    shift_BT = torch.where(has_both(batch), shift_BT.clamp(-bound, bound), 0.0)
    return group_advantage(batch) + mix * shift_BT


@register_signal(
    "rlcsd",
    "A + clip(l tanh((log S(y|x,right) - log S(y|x,wrong)) / tau), +-2), of the sign of A, where above 0.02",
    sources={"privileged_student", "contrast_student"},
    entropies=(),
    needs_rewards=True,
)
def rlcsd(
    batch: SignalBatch,
    tau: NotNegative = 0.02,
    mix: Probability = 0.5,
    bound: Positive = 2.0,
    threshold: float = 0.02,
    drop: bool = True,
    apart: bool = True,
    eta: NotNegative = 1.0,
) -> Tensor:
    """The contrast-shifted advantage of RLCSD (arXiv 2606.11709), (B, T).

    e = log S(y|x, right) - log S(y|x, wrong), r = clip(mix tanh(e / tau), +-bound); where |r| > threshold the advantage
    is A + r, not let over 0 to the other sign, elsewhere A.

    Args:
        tau (`float`): nats.
        mix, bound, threshold (`float`): see above.
        drop (`bool`): rows without both contexts are left out, with their A counted in their group; else they keep A.
        apart (`bool`): the mean over all unselected tokens of the batch plus `eta` times the mean over all selected
            ones; else the loss's own mean, over the tokens of an answer and then over answers.
        eta (`float`): see above.
    """
    advantage_BT = group_advantage(batch)
    contrast_BT = batch.logprobs["privileged_student"].double() - batch.logprobs["contrast_student"].double()
    shift_BT = (mix * torch.tanh(contrast_BT / tau)).clamp(-bound, bound)
    shifted_BT = advantage_BT + shift_BT
    anchored_BT = torch.where(advantage_BT > 0, shifted_BT.clamp(min=0.0), shifted_BT.clamp(max=0.0))
    anchored_BT = torch.where(advantage_BT == 0, 0.0, anchored_BT)
    both_BT = has_both(batch)
    selected_BT = (shift_BT.abs() > threshold) & both_BT & batch.keep
    left_BT = ~selected_BT & batch.keep & (both_BT if drop else torch.ones_like(both_BT))
    if not apart:
        factor_BT = (selected_BT | left_BT).double()
        if drop:
            factor_BT = factor_BT * share_of_answers(batch, both_BT.any(1))
    else:
        factor_BT = _as_means_over_tokens(batch, [(selected_BT, eta), (left_BT, 1.0)])
    return torch.where(selected_BT, anchored_BT, advantage_BT) * factor_BT


def _as_means_over_tokens(batch: SignalBatch, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Factors (B, T) that make the loss's mean, over tokens and then answers, a weighted sum of means over the tokens
    of parts of the whole batch; 0 outside of all parts.

    Args:
        parts (`list[tuple[Tensor, float]]`): tokens (B, T), bool, and the weight of their mean.
    """
    counts = [batch.keep.any(1).sum(), *(part_BT.sum() for part_BT, _ in parts)]
    num_answers, *sizes = batch.ranks.total(torch.stack(counts).double()).unbind()
    lengths_B1 = batch.keep.sum(1, keepdim=True).double()
    return sum(
        (part_BT * (weight * num_answers * lengths_B1 / size.clamp(min=1.0)))
        for (part_BT, weight), size in zip(parts, sizes, strict=True)
    ) + torch.zeros_like(lengths_B1)
