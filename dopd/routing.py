"""Which regime a token falls into: Eq. 1 and the four conditions of DOPD (arXiv 2606.30626, Section 3).

Shapes: B sequences, T completion tokens, N scored tokens of the batch.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from dopd.errors import ConfigError, ScoringError


class Regime(IntEnum):
    """The four regimes of a token, by the privilege advantage gap A and the joint confidence q_S + q_T.

    `LH`: low gap, high confidence. `LL`: low gap, low confidence. `HT`: high gap, the teacher is surer.
    `HS`: high gap, the student is surer.
    """

    LH = 0
    LL = 1
    HT = 2
    HS = 3


UNROUTED = -1  # the regime of a position that is not scored


@dataclass(frozen=True)
class Thresholds:
    """Averages over the scored tokens of one optimizer batch that the trim keeps.

    Attributes:
        gap (`float`): mean privilege advantage gap, nats (A~ in the paper).
        student_prob (`float`): mean probability of the sampled token under the privileged student (q~_S).
        teacher_prob (`float`): mean probability of the sampled token under the privileged teacher (q~_T).
        num_tokens (`int`): scored tokens, the trimmed ones included.
        num_trimmed (`int`): tokens with the largest gaps, left out of the three averages (they are still routed).
    """

    gap: float
    student_prob: float
    teacher_prob: float
    num_tokens: int
    num_trimmed: int

    @property
    def confidence(self) -> float:
        """q~_S + q~_T, the level that separates `LH` from `LL`."""
        return self.student_prob + self.teacher_prob


def privilege_gap(teacher_logprobs: Tensor, student_logprobs: Tensor) -> Tensor:
    """A_n = |log q_T,n - log q_S,n|, nats, float64 (Eq. 1). Both policies must have read the SAME privileged prompt."""
    return (teacher_logprobs.double() - student_logprobs.double()).abs()


def gap_thresholds(
    teacher_logprobs: Tensor, student_logprobs: Tensor, mask: Tensor, *, trim: float = 0.05
) -> Thresholds:
    """Averages of the gap and of both confidences over the scored tokens, after dropping the largest gaps.

    The result is a function of the multiset of tokens alone: sums are exactly rounded, and tokens tied at the trim
    boundary share what the trim leaves of them. It cannot depend on padding, order, threads, micro-batches or ranks.

    Args:
        teacher_logprobs (`Tensor` (B, T)): log-probs of the sampled tokens under the privileged teacher, nats.
        student_logprobs (`Tensor` (B, T)): the same under the privileged student.
        mask (`Tensor` (B, T)): non-zero where a token is scored.
        trim (`float`): fraction of tokens, largest gaps first, left out of the averages; floor(trim * N) tokens.

    Raises:
        ConfigError: shapes differ, or `trim` is outside [0, 1).
        ScoringError: a scored log-prob is not finite, or above zero.
    """
    keep_BT = _checked_mask(teacher_logprobs, student_logprobs, mask)
    if not 0.0 <= trim < 1.0:
        raise ConfigError(f"trim (={trim}) must be in [0, 1): the fraction of largest gaps left out of the averages")
    log_t_N, log_s_N = teacher_logprobs[keep_BT].double(), student_logprobs[keep_BT].double()
    _check_logprobs("teacher_logprobs", log_t_N)
    _check_logprobs("student_logprobs", log_s_N)
    num_tokens = log_t_N.numel()
    if num_tokens == 0:
        return Thresholds(math.nan, math.nan, math.nan, 0, 0)
    # One wait for a device: exact sums are taken on the CPU. Exponentials are those that `classify` compares.
    numbers_3N = torch.stack([privilege_gap(log_t_N, log_s_N), log_s_N.exp(), log_t_N.exp()]).cpu()
    num_trimmed = math.floor(trim * num_tokens + 1e-9)  # the epsilon undoes 0.05 * 20 == 0.9999...
    weight_N = _trim_weights(numbers_3N[0], num_trimmed)
    gap, student_prob, teacher_prob = (_mean(values_N, weight_N, num_tokens - num_trimmed) for values_N in numbers_3N)
    return Thresholds(gap, student_prob, teacher_prob, num_tokens, num_trimmed)


def classify(teacher_logprobs: Tensor, student_logprobs: Tensor, mask: Tensor, thresholds: Thresholds) -> Tensor:
    """The regime of every token, given the batch averages.

    Returns:
        `LongTensor` (B, T) of `Regime` values, `-1` where `mask` is 0.
    """
    keep_BT = _checked_mask(teacher_logprobs, student_logprobs, mask)
    log_t_BT, log_s_BT = teacher_logprobs.double(), student_logprobs.double()
    high_gap_BT = privilege_gap(log_t_BT, log_s_BT) >= thresholds.gap
    teacher_surer_BT = log_t_BT >= log_s_BT
    confident_BT = log_t_BT.exp() + log_s_BT.exp() >= thresholds.confidence
    regimes_BT = torch.where(
        high_gap_BT,
        torch.where(teacher_surer_BT, Regime.HT, Regime.HS),
        torch.where(confident_BT, Regime.LH, Regime.LL),
    )
    return torch.where(keep_BT, regimes_BT, UNROUTED).long()


def route(teacher_logprobs: Tensor, student_logprobs: Tensor, mask: Tensor, *, trim: float = 0.05) -> Tensor:
    """Route every sampled token to one of the four regimes (Section 3.2 of the paper).

    BOTH log-probs are taken under the privileged prompt. With the plain student in place of the privileged one the gap
    would measure the missing information again, and routing can invert.

    Args:
        teacher_logprobs (`Tensor` (B, T)): log T(y_n | x, p, y_<n), nats.
        student_logprobs (`Tensor` (B, T)): log S(y_n | x, p, y_<n), nats.
        mask (`Tensor` (B, T)): bool or int, non-zero where a token is scored. All averages are over these tokens.
        trim (`float`, *optional*, defaults to `0.05`): see `gap_thresholds`.

    Returns:
        `LongTensor` (B, T) of `Regime` values, `-1` where `mask` is 0.

    Raises:
        ConfigError, ScoringError: as `gap_thresholds`.
    """
    thresholds = gap_thresholds(teacher_logprobs, student_logprobs, mask, trim=trim)
    return classify(teacher_logprobs, student_logprobs, mask, thresholds)


def _trim_weights(gap_N: Tensor, num_trimmed: int) -> Tensor:
    """1 for kept tokens, 0 for trimmed ones; tokens tied at the boundary share what is left of them."""
    if num_trimmed == 0:
        return torch.ones_like(gap_N)
    boundary = gap_N.topk(num_trimmed).values[-1]
    above_N, tied_N = gap_N > boundary, gap_N == boundary
    num_tied = int(tied_N.sum())
    kept_of_tied = num_tied - (num_trimmed - int(above_N.sum()))
    weight_N = (~above_N).to(gap_N.dtype)
    weight_N[tied_N] = kept_of_tied / num_tied
    return weight_N


def _mean(values_N: Tensor, weight_N: Tensor, kept: int) -> float:
    """Weighted mean whose sum is exactly rounded, between its smallest and its largest term.

    Without the bound the mean of equal gaps may be one rounding above them, and every token would change its regime.
    """
    mean = math.fsum((weight_N * values_N).tolist()) / kept
    used_N = values_N[weight_N > 0]
    return min(max(mean, float(used_N.min())), float(used_N.max()))


def _checked_mask(teacher_logprobs: Tensor, student_logprobs: Tensor, mask: Tensor) -> Tensor:
    if not teacher_logprobs.shape == student_logprobs.shape == mask.shape:
        raise ConfigError(
            f"teacher_logprobs {tuple(teacher_logprobs.shape)}, student_logprobs {tuple(student_logprobs.shape)} and "
            f"mask {tuple(mask.shape)} must have one shape (B, T): one log-prob per completion token"
        )
    return mask != 0


def _check_logprobs(name: str, values_N: Tensor) -> None:
    if not bool(torch.isfinite(values_N).all()):
        bad = int((~torch.isfinite(values_N)).sum())
        raise ScoringError(
            f"{name}: {bad} of {values_N.numel()} scored log-probs are not finite. A sampled token must have a "
            "probability above zero in both views: check the checkpoint, and that both suppress the same tokens"
        )
    if values_N.numel() and float(values_N.max()) > 1e-4:
        raise ScoringError(
            f"{name}: the largest scored log-prob is {float(values_N.max()):.4g}, above 0. "
            "Pass log-probabilities (log_softmax of the logits), not probabilities or logits"
        )
