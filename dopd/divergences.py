"""How far the student's next-token distribution is from a target's, over a chosen support.

Everything is written on log-probabilities over a list of outcomes: the whole vocabulary, or K tokens with or without
one extra outcome for the remaining mass. Shapes: `...` any leading dimensions, V vocabulary, K support.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dopd.errors import ConfigError

DivergenceKind = Literal["forward_kl", "reverse_kl", "js"]
Support = Literal["full", "student_topk", "target_topk", "sampled"]
Tail = Literal["bucket", "renormalize"]


def _expectation(log_p: Tensor, log_ratio: Tensor) -> Tensor:
    """E_p[log_ratio] over the last dimension, where an outcome of probability zero contributes nothing."""
    impossible = torch.isneginf(log_p)
    ratio = torch.where(impossible, torch.zeros_like(log_ratio), log_ratio)
    return (log_p.exp() * ratio).sum(-1)


def forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(T || S) = E_T[log T - log S], nats. (..., K) -> (...)."""
    return _expectation(log_t, log_t - log_s)


def reverse_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(S || T) = E_S[log S - log T], nats. (..., K) -> (...)."""
    return _expectation(log_s, log_s - log_t)


def js(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Jensen-Shannon: 1/2 KL(T || M) + 1/2 KL(S || M), M = (S + T)/2, nats, at most ln 2. (..., K) -> (...)."""
    impossible = torch.isneginf(log_s) & torch.isneginf(log_t)
    log_m = torch.logaddexp(log_s.masked_fill(impossible, 0.0), log_t.masked_fill(impossible, 0.0)) - math.log(2.0)
    return 0.5 * _expectation(log_t, log_t - log_m) + 0.5 * _expectation(log_s, log_s - log_m)


# A new divergence is one function on log-probabilities and one entry here (and in `DivergenceKind`).
DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "js": js,
}


def sampled_reverse_kl(log_s_y: Tensor, log_t_y: Tensor) -> Tensor:
    """One-sample estimate of KL(S || T) at a token y ~ S: value log S(y) - log T(y), nats.

    Its gradient is (log S(y) - log T(y)) * grad log S(y), whose expectation under S is the gradient of the full
    reverse KL. Back-propagating the value itself would have zero expected gradient, because E_S[grad log S] = 0.
    """
    k1 = (log_s_y - log_t_y).detach()
    return k1 + k1 * (log_s_y - log_s_y.detach())


def divergence(
    student_logits: Tensor,
    target_logits: Tensor,
    *,
    kind: DivergenceKind,
    support: Support = "full",
    top_k: int = 128,
    tail: Tail = "bucket",
    sampled_ids: Tensor | None = None,
) -> Tensor:
    """Divergence between the student's and the target's next-token distributions, token by token.

    Args:
        student_logits (`Tensor` (..., V)): logits of the trained distribution. Gradients reach these alone.
        target_logits (`Tensor` (..., V)): logits of the target over the same vocabulary; never differentiated.
        kind (`str`): `"forward_kl"` KL(T || S), `"reverse_kl"` KL(S || T), or `"js"` with equal halves.
        support (`str`, *optional*, defaults to `"full"`): `"full"` vocabulary, the K most probable tokens of the
            student (`"student_topk"`) or of the target (`"target_topk"`), or `"sampled"`, the one-sample estimate.
        top_k (`int`, *optional*, defaults to `128`): K of a top-k support; K >= V is the full vocabulary.
        tail (`str`, *optional*, defaults to `"bucket"`): what becomes of the mass outside a top-k support: one extra
            outcome (`"bucket"`: a lower bound of the full divergence that converges to it), or nothing, with both
            distributions conditioned on the support (`"renormalize"`). There is no plain truncation: it breaks
            sum(p grad log p) = 0, and a student equal to its target would still be pushed.
        sampled_ids (`LongTensor` (...), *optional*): the sampled tokens; needed by, and only read for, `"sampled"`.

    Returns:
        `Tensor` (...): nats, float32 or wider.

    Raises:
        ConfigError: an unknown name, shapes that differ, or a combination that has no meaning.
    """
    check_choice("kind", kind, DivergenceKind)
    check_support(kind, support, top_k, tail)
    if student_logits.shape != target_logits.shape:
        raise ConfigError(
            f"student_logits {tuple(student_logits.shape)} and target_logits {tuple(target_logits.shape)} must have "
            "one shape (..., V): nothing is broadcast, and vocabularies are never padded"
        )
    log_s, log_t = log_probs(student_logits), log_probs(target_logits.detach())
    if support == "sampled":
        if sampled_ids is None:
            raise ConfigError('support="sampled" needs sampled_ids (...): the token ids that the student sampled')
        if sampled_ids.shape != student_logits.shape[:-1]:
            raise ConfigError(
                f"sampled_ids {tuple(sampled_ids.shape)} must have the shape {tuple(student_logits.shape[:-1])}: one "
                f"sampled token for each distribution in student_logits {tuple(student_logits.shape)}"
            )
        return sampled_reverse_kl(pick(log_s, sampled_ids), pick(log_t, sampled_ids))
    if support != "full" and top_k < log_s.shape[-1]:
        ranked = log_s.detach() if support == "student_topk" else log_t
        support_ids = ranked.topk(top_k, dim=-1).indices
        log_s, log_t = on_support(log_s, support_ids, tail), on_support(log_t, support_ids, tail)
    return DIVERGENCES[kind](log_s, log_t)


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension in float32, or float64 if that is what came in."""
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def entropy(log_p: Tensor) -> Tensor:
    """Entropy of a distribution given its log-probs, nats. (..., V) -> (...)."""
    return -_expectation(log_p, log_p)


def pick(log_p: Tensor, ids: Tensor) -> Tensor:
    """log_p at `ids`: (..., V) and (...) -> (...)."""
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def on_support(log_p: Tensor, support_ids: Tensor, tail: Tail) -> Tensor:
    """Restrict log-probs to K tokens: renormalised (..., K), or with one outcome for the other mass (..., K + 1)."""
    inside = log_p.gather(-1, support_ids)
    if tail == "renormalize":
        return inside.log_softmax(-1)
    # The remaining mass is summed over the other tokens: 1 - sum(inside) would lose it to rounding.
    outside = log_p.scatter(-1, support_ids, -math.inf)
    empty = torch.isneginf(outside).all(-1, keepdim=True)
    rest = torch.where(empty, -math.inf, outside.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True))
    return torch.cat([inside, rest], dim=-1)


def check_choice(field: str, value: object, choices: object) -> None:
    """Raise `ConfigError` unless `value` is one of the strings of a `Literal`."""
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{field} (={value!r}) must be one of {', '.join(map(repr, allowed))}")


def check_support(kind: str, support: str, top_k: int, tail: str) -> None:
    """Raise `ConfigError` for a support that does not exist or cannot carry this divergence."""
    check_choice("support", support, Support)
    check_choice("tail", tail, Tail)
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"top_k (={top_k!r}) must be a whole number of at least 1: the tokens of a top-k support")
    if support == "sampled" and kind != "reverse_kl":
        raise ConfigError(
            f"support='sampled' estimates only divergence='reverse_kl' (the samples come from the student), got "
            f"divergence={kind!r}. Use support='target_topk' or 'full' for it"
        )
