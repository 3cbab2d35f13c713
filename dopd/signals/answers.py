"""Signals that compare the answers to a prompt. Shapes: B sequences, T completion tokens, G rollouts of a prompt."""

import math

import torch
from torch import Tensor

from dopd.settings import NotNegative, Positive, Share
from dopd.signals.batch import SignalBatch
from dopd.signals.registry import register_signal
from dopd.signals.rewards import group_advantage

RIGHT_FROM = 0.5  # the score from which a rollout counts as right


@register_signal(
    "conspo",
    "G / N+ (1 - P+) of a right rollout, -G / N+ sum P- of a wrong one: the gradient of ConSPO's contrast",
    sources={"student"},
    entropies=(),
    needs_scores=True,
)
def conspo(batch: SignalBatch, temperature: Positive = 10.0, margin: NotNegative = 0.01, warmup: Share = 0.3) -> Tensor:
    """The per-rollout advantage whose policy gradient is that of ConSPO (arXiv 2605.12969); (B, T).

    With s = sequence mean of log S and the margin m = (margin / 2) (1 - cos(pi min(progress / warmup, 1))), each right
    rollout i has Z_i = e^((s_i - m) / t) + sum_j e^(s_j / t) over the wrong rollouts j of its prompt, P_i+ and P_ij-
    the shares of its terms. Groups that are all right or all wrong have advantage 0.

    Args:
        temperature (`float`): t, nats.
        margin (`float`): of right above wrong rollouts at the end of the warm-up, nats.
        warmup (`float`): share of the training in which the margin grows.
    """
    right_GG = batch.scores_of_groups() >= RIGHT_FROM
    scores_GG = batch.sequence_mean(batch.logprobs["student"]).view(right_GG.shape)
    reached = 0.5 * margin * (1.0 - math.cos(math.pi * min(batch.progress / warmup, 1.0)))
    own_GG1 = ((scores_GG - reached) / temperature).unsqueeze(2)
    others_GGG = (scores_GG / temperature).unsqueeze(1).expand(-1, right_GG.shape[1], -1)
    others_GGG = others_GGG.masked_fill(right_GG.unsqueeze(1), -math.inf)  # other right ones are not in Z
    shares_GGG = torch.cat([own_GG1, others_GGG], dim=2).softmax(2) * right_GG.unsqueeze(2)
    num_right_G1 = right_GG.sum(1, keepdim=True).double()
    pull_GG = (1.0 - shares_GGG[..., 0]) * right_GG
    push_GG = shares_GGG[..., 1:].sum(1)
    return batch.per_token((right_GG.shape[1] / num_right_G1.clamp(min=1) * (pull_GG - push_GG)).flatten())


@register_signal(
    "conspo_uniform",
    "G N- / (N+ (1 + N-)) of a right rollout, -G / (1 + N-) of a wrong one: `conspo` at an infinite temperature",
    needs_scores=True,
)
def conspo_uniform(batch: SignalBatch) -> Tensor:
    """GRPO's advantage times a factor of the prompt, G sqrt(N- / N+) / (1 + N-); (B, T). It reads no model."""
    right_GG = batch.scores_of_groups() >= RIGHT_FROM
    group = right_GG.shape[1]
    num_right_G1 = right_GG.sum(1, keepdim=True).double()
    num_wrong_G1 = group - num_right_G1
    pull_G1 = num_wrong_G1 / num_right_G1.clamp(min=1)
    advantage_GG = torch.where(right_GG, pull_G1, -1.0) * group / (1.0 + num_wrong_G1)
    mixed_G1 = (num_right_G1 > 0) & (num_wrong_G1 > 0)
    return batch.per_token(torch.where(mixed_G1, advantage_GG, 0.0).flatten())


@register_signal(
    "shortest_right",
    "1 at the shortest right rollout of its prompt that has privileged context, else 0",
    needs_scores=True,
)
def shortest_right(batch: SignalBatch) -> Tensor:
    """The rollouts that OASIS (arXiv 2609.37915) learns from; (B, T). Of equally short ones it takes all."""
    right_GG = batch.scores_of_groups() >= RIGHT_FROM
    if batch.has_privileged is not None:
        right_GG = right_GG & batch.has_privileged.view(right_GG.shape)
    lengths_GG = batch.keep.sum(1).view(right_GG.shape).double().masked_fill(~right_GG, math.inf)
    shortest_GG = right_GG & (lengths_GG == lengths_GG.amin(1, keepdim=True))
    return batch.per_token(shortest_GG.flatten())


@register_signal(
    "dial",
    "share of the answer's tokens with a higher L(p, q)^b |log q - log p|; p = S(y), q = T(y), L: logarithmic mean",
    sources={"student", "teacher"},
    entropies=(),
)
def dial(batch: SignalBatch, power: NotNegative = 0.5) -> Tensor:
    """The rank of a token in its answer by which DIAL-OPD (arXiv 2610.11659) picks, in [0, 1), 0 the highest; (B, T).

    Args:
        power (`float`): b; 0 ranks by the log-ratio alone.
    """
    log_p_BT, log_q_BT = batch.logprobs["student"].double(), batch.logprobs["teacher"].double()
    apart_BT = (log_q_BT - log_p_BT).abs()
    # L = (q - p) / (log q - log p) = the larger of the two times (1 - e^-d) / d, d = |log q - log p|; 1 at d = 0.
    ratio_BT = torch.where(apart_BT > 0, -torch.expm1(-apart_BT) / apart_BT.clamp(min=1e-300), 1.0)
    score_BT = (torch.maximum(log_p_BT, log_q_BT).exp() * ratio_BT).pow(power) * apart_BT
    score_BT = score_BT.masked_fill(~batch.keep, -math.inf)
    above_BT = (score_BT.unsqueeze(1) > score_BT.unsqueeze(2)).sum(2)
    return above_BT.double() / batch.keep.sum(1, keepdim=True).clamp(min=1)


@register_signal(
    "failed",
    "the share of wrong rollouts of its prompt at a wrong rollout, else 0",
    needs_scores=True,
)
def failed(batch: SignalBatch) -> Tensor:
    """How much DiffGate (arXiv 2610.04596) lets a teacher say of a rollout; (B, T)."""
    wrong_GG = (batch.scores_of_groups() < RIGHT_FROM).double()
    return batch.per_token((wrong_GG * wrong_GG.mean(1, keepdim=True)).flatten())


@register_signal(
    "agrees",
    "1 where A > 0 and log T(y) > log S(y) + d, or A <= 0 and log T(y) < log S(y) - d; A: group advantage",
    sources={"student", "teacher"},
    entropies=(),
    needs_rewards=True,
)
def agrees(batch: SignalBatch, margin: NotNegative = 0.0) -> Tensor:
    """The gate of RG-OPD (arXiv 2607.04037): tokens on which the teacher pushes the way the reward does; (B, T).

    Args:
        margin (`float`): d, nats.
    """
    apart_BT = batch.logprobs["teacher"].double() - batch.logprobs["student"].double()
    up_BT = group_advantage(batch) > 0
    return torch.where(up_BT, apart_BT > margin, apart_BT < -margin).double()
