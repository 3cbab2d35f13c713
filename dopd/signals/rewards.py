"""Signals that read rewards or scores. Shapes: B sequences, T completion tokens, G rollouts of a prompt."""

import torch
from torch import Tensor

from dopd.settings import Count, NotNegative, Positive, Probability
from dopd.signals.batch import SignalBatch
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
    "rlcsd",
    "A + clip(l tanh((log S(y|x,right) - log S(y|x,wrong)) / tau), +-2), of the sign of A, where above 0.02",
    sources={"privileged_student", "contrast_student"},
    needs_rewards=True,
)
def rlcsd(
    batch: SignalBatch,
    tau: NotNegative = 0.02,
    mix: Probability = 0.5,
    bound: Positive = 2.0,
    threshold: float = 0.02,
) -> Tensor:
    """The contrast-shifted advantage of RLCSD (arXiv 2606.11709), with one wrong context; (B, T).

    e = log S(y|x, right) - log S(y|x, wrong), r = clip(mix tanh(e / tau), +-bound); where |r| > threshold the advantage
    is A + r, not let over 0 to the other sign, elsewhere A. Rows without both contexts keep A.

    Args:
        tau (`float`): nats.
        mix, bound, threshold (`float`): see above.
    """
    advantage_BT = group_advantage(batch)
    contrast_BT = batch.logprobs["privileged_student"].double() - batch.logprobs["contrast_student"].double()
    shift_BT = (mix * torch.tanh(contrast_BT / tau)).clamp(-bound, bound)
    shifted_BT = advantage_BT + shift_BT
    anchored_BT = torch.where(advantage_BT > 0, shifted_BT.clamp(min=0.0), shifted_BT.clamp(max=0.0))
    anchored_BT = torch.where(advantage_BT == 0, 0.0, anchored_BT)
    selected_BT = shift_BT.abs() > threshold
    for present_B in (batch.has_privileged, batch.has_contrast):
        if present_B is not None:
            selected_BT = selected_BT & (batch.per_token(present_B) > 0)
    return torch.where(selected_BT, anchored_BT, advantage_BT)
