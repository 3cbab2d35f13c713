"""How far the student's next-token distribution is from a target's, over a chosen support.

Everything is written on log-probabilities over a list of outcomes: the whole vocabulary, or K tokens with or without
one extra outcome for the remaining mass. Shapes: `...` any leading dimensions, V vocabulary, K support.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import DocInfo
from torch import Tensor

from dopd.errors import ConfigError, check_choice
from dopd.kinds import DIVERGENCES, LIKELIHOOD, OF_THE_TOKEN, Divergence, check_divergence, register_divergence

Support = Literal["full", "student_topk", "target_topk", "sampled"]
Tail = Literal["bucket", "renormalize", "truncate", "sampled"]


def _terms(log_p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio, outcome by outcome; one of probability zero contributes nothing."""
    impossible = torch.isneginf(log_p)
    return log_p.exp() * torch.where(impossible, torch.zeros_like(log_ratio), log_ratio)


def _expectation(log_p: Tensor, log_ratio: Tensor) -> Tensor:
    """E_p[log_ratio] over the last dimension."""
    return _terms(log_p, log_ratio).sum(-1)


@register_divergence("forward_kl")
def forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(T || S) = E_T[log T - log S], nats. (..., K) -> (...)."""
    return _expectation(log_t, log_t - log_s)


@register_divergence("reverse_kl")
def reverse_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(S || T) = E_S[log S - log T], nats. (..., K) -> (...)."""
    return _expectation(log_s, log_s - log_t)


@register_divergence("js")
def js(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Jensen-Shannon: 1/2 KL(T || M) + 1/2 KL(S || M), M = (S + T)/2, nats, at most ln 2. (..., K) -> (...)."""
    return _js_terms(log_s, log_t, 0.5).sum(-1)


def _js_terms(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """b T log(T/M) + (1-b) S log(S/M) with M = b T + (1-b) S, outcome by outcome."""
    impossible = torch.isneginf(log_s) & torch.isneginf(log_t)
    log_m = torch.logaddexp(
        log_s.masked_fill(impossible, 0.0) + math.log1p(-beta), log_t.masked_fill(impossible, 0.0) + math.log(beta)
    )
    return beta * _terms(log_t, log_t - log_m) + (1.0 - beta) * _terms(log_s, log_s - log_m)


@register_divergence("reverse_kl_detached")
def reverse_kl_detached(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(S || T) with the gradient sum_v sg[S (log S - log T)] grad log S (arXiv 2605.11182), nats. (..., K) -> (...).

    On the whole vocabulary that is the gradient of the reverse KL. On a truncated support it leaves out the term
    sum_v S grad log S, which would otherwise drain the student's mass out of the support.
    """
    weight = _terms(log_s, log_s - log_t).detach()
    still = torch.where(torch.isneginf(log_s), 0.0, log_s)
    return weight.sum(-1) + (weight * (still - still.detach())).sum(-1)


@register_divergence("cross_entropy")
def cross_entropy(log_s: Tensor, log_t: Tensor) -> Tensor:
    """-log S at the target's most probable outcome: a hard label, nats. (..., K) -> (...)."""
    return -pick(log_s, log_t.argmax(-1))


@register_divergence("list_mle")
def list_mle(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Plackett-Luce negative log-likelihood of the target's order of the outcomes under the student, nats.

    Sum over ranks i of logsumexp_{j >= i} log S - log S_i, outcomes in the order of falling log T. (..., K) -> (...).
    """
    ranked = log_s.gather(-1, log_t.argsort(dim=-1, descending=True, stable=True))
    possible = torch.where(torch.isneginf(ranked), torch.finfo(ranked.dtype).min / 4, ranked)
    rest = possible.flip(-1).logcumsumexp(-1).flip(-1)
    return (rest - possible).sum(-1)


@register_divergence("entropy", reads_target=False)
def student_entropy(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Entropy of the student, nats; it reads no target. (..., K) -> (...)."""
    return -_expectation(log_s, log_s)


# What a rule's divergence may be.
DivergenceKind = Annotated[
    str, DocInfo(" or ".join([*map(repr, sorted([*DIVERGENCES, *OF_THE_TOKEN])), "package.module:function"]))
]
_TERMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda log_s, log_t, beta: _terms(log_t, log_t - log_s),
    "reverse_kl": lambda log_s, log_t, beta: _terms(log_s, log_s - log_t),
    "js": _js_terms,
}


@dataclass(frozen=True)
class Variant:
    """What may be changed in a divergence.

    Attributes:
        beta (`float`): the target's share b in the mixture of `"js"`: b KL(T || M) + (1 - b) KL(S || M),
            M = b T + (1 - b) S.
        clamp (`float`, *optional*): upper bound of every outcome's term, before the sum over outcomes (OPSD, arXiv
            2601.18734); the clamped sum can be negative. Nats.
        cap (`float`, *optional*): upper bound of a token's divergence; a token above it gives no gradient. Nats.
        clip (`tuple[float, float]`, *optional*): bounds of the advantage in `"sampled"` support, nats.
    """

    beta: float = 0.5
    clamp: float | None = None
    cap: float | None = None
    clip: tuple[float, float] | None = None

    def check(self, kind: str, support: str) -> None:
        """Raise `ConfigError` for an option that is out of range or that this divergence does not have."""
        if not 0.0 < self.beta < 1.0:
            raise ConfigError(
                f"beta (={self.beta}) must be between 0 and 1, both excluded: the target's share in the mixture of "
                "'js'. Use divergence='forward_kl' or 'reverse_kl' for its limits"
            )
        if self.beta != 0.5 and kind != "js":
            raise ConfigError(f"beta (={self.beta}) is an option of divergence='js', got divergence={kind!r}")
        if self.clamp is not None and (kind not in _TERMS or support == "sampled" or not self.clamp > 0):
            raise ConfigError(
                f"clamp (={self.clamp}) must be above 0, and bounds the terms of {', '.join(map(repr, _TERMS))} over a "
                f"support of several tokens, got divergence={kind!r}, support={support!r}"
            )
        if self.cap is not None and (support == "sampled" or not self.cap > 0):
            raise ConfigError(
                f"cap (={self.cap}) must be above 0, and has no meaning with support='sampled' (use clip)"
            )
        if self.clip is not None and (support != "sampled" or kind == LIKELIHOOD or not self.clip[0] <= self.clip[1]):
            raise ConfigError(
                f"clip (={self.clip}) must be (lowest, highest) advantage, and is an option of support='sampled' "
                f"with an advantage, got support={support!r}, divergence={kind!r}"
            )


PLAIN_VARIANT = Variant()


def divergence_function(kind: str, variant: Variant = PLAIN_VARIANT, tail: Tail = "bucket") -> Divergence:
    """The function over outcomes of a divergence with its options; the registered one itself where it has none.

    With `tail="truncate"` the last outcome is the remaining mass, which normalises and is then left out of the sum.
    """
    function = DIVERGENCES.find(kind)
    if kind in _TERMS and (variant.clamp is not None or variant.beta != 0.5):
        terms, limit, beta = _TERMS[kind], variant.clamp, variant.beta

        def of_terms(log_s: Tensor, log_t: Tensor) -> Tensor:
            values = terms(log_s, log_t, beta)
            return (values if limit is None else values.clamp(max=limit)).sum(-1)

        function = of_terms
    if variant.cap is not None:
        uncapped, cap = function, variant.cap

        def capped(log_s: Tensor, log_t: Tensor) -> Tensor:
            return uncapped(log_s, log_t).clamp(max=cap)

        function = capped
    if tail == "truncate":
        whole = function

        def truncated(log_s: Tensor, log_t: Tensor) -> Tensor:
            return whole(log_s[..., :-1], log_t[..., :-1])

        function = truncated
    return function


def is_clamped(kind: str, log_s: Tensor, log_t: Tensor, variant: Variant, tail: Tail = "bucket") -> Tensor:
    """Where some outcome's term is above the clamp: (..., K) -> bool (...). There its gradient is the normaliser's
    alone, which pushes the outcome the other way (arXiv 2609.38995).
    """
    terms = _TERMS[kind](log_s, log_t, variant.beta)
    assert variant.clamp is not None
    return ((terms[..., :-1] if tail == "truncate" else terms) > variant.clamp).any(-1)


def sampled_terms(
    kind: str, log_s_y: Tensor, log_t_y: Tensor, variant: Variant = PLAIN_VARIANT
) -> tuple[Tensor, Tensor]:
    """One-sample estimate of a divergence at a token y ~ S, and the token's advantage, nats; neither has a gradient.

    With r = T(y) / S(y) and D = E_S[f(r)], the gradient of D is E_S[(f(r) - r f'(r)) grad log S(y)]. The advantage is
    the negative of that factor, shifted so that it is 0 where S(y) = T(y) (a constant has no effect, because
    E_S[grad log S] = 0): log r for the reverse KL, r - 1 for the forward KL, (1 - b) log(b r + 1 - b) for "js".

    `"nll"` is -log S(y) itself, of a y from anywhere: its advantage is 1, and T is not read.
    """
    if kind == LIKELIHOOD:
        return -log_s_y.detach(), torch.ones_like(log_s_y)
    log_r = (log_t_y - log_s_y).detach()
    if kind == "reverse_kl":
        value, advantage = -log_r, log_r
    elif kind == "forward_kl":
        ratio = log_r.exp()
        value, advantage = ratio * log_r, ratio - 1.0
    else:
        beta, ratio = variant.beta, log_r.exp()
        log_u = torch.log(beta * ratio + 1.0 - beta)
        value = beta * ratio * (log_r - log_u) - (1.0 - beta) * log_u
        advantage = (1.0 - beta) * log_u
    if variant.clip is not None:
        advantage = advantage.clamp(*variant.clip)
    return value, advantage


def tail_correction(
    kind: str,
    of_token: tuple[Tensor, Tensor],
    of_rest: tuple[Tensor, Tensor],
    is_outside: Tensor,
    variant: Variant = PLAIN_VARIANT,
) -> Tensor:
    """What a sampled token outside a top-k support adds to the divergence over the support and one outcome for the
    rest, so that their mean over samples is the divergence over the whole vocabulary, in value and gradient.

    With a the one-sample estimate of `sampled_terms`, at the token and at the outcome of the rest, it is
    1[y not in K] (a(y) - a(rest)): the second estimates what the outcome contributes, and is a control variate (ResOPD,
    arXiv 2610.04882).

    Args:
        kind (`str`): the divergence.
        of_token, of_rest (`tuple[Tensor, Tensor]`): log-probs (...) by student and target of the sampled token, and of
            everything outside the support; the student's carry the gradient.
        is_outside (`Tensor` (...), bool): whether the sampled token is outside the support.
        variant (`Variant`, *optional*): see there.
    """
    added = []
    for log_s, log_t in (of_token, of_rest):
        log_s, log_t = torch.where(is_outside, log_s, 0.0), torch.where(is_outside, log_t, 0.0)
        added.append(surrogate(*sampled_terms(kind, log_s.detach(), log_t, variant), log_s))
    return torch.where(is_outside, added[0] - added[1], 0.0)


def surrogate(value: Tensor, advantage: Tensor, log_s_y: Tensor) -> Tensor:
    """A number that reads `value` and whose gradient is -advantage * grad log S(y): one step of policy gradient.

    The rollouts are the current student's, so the ratio of policies is 1 and its clipping has nothing to clip.
    """
    return value.detach() - advantage.detach() * (log_s_y - log_s_y.detach())


def divergence(
    student_logits: Tensor,
    target_logits: Tensor,
    *,
    kind: DivergenceKind,
    support: Support = "full",
    top_k: int = 128,
    tail: Tail = "bucket",
    sampled_ids: Tensor | None = None,
    variant: Variant = PLAIN_VARIANT,
) -> Tensor:
    """Divergence between the student's and the target's next-token distributions, token by token.

    Args:
        student_logits (`Tensor` (..., V)): logits of the trained distribution. Gradients reach these alone.
        target_logits (`Tensor` (..., V)): logits of the target over the same vocabulary; never differentiated.
        kind (`str`): the name of a divergence, such as `"forward_kl"` KL(T || S), `"reverse_kl"` KL(S || T), or `"js"`;
            see `register_divergence` for one of your own.
        support (`str`, *optional*, defaults to `"full"`): `"full"` vocabulary, the K most probable tokens of the
            student (`"student_topk"`) or of the target (`"target_topk"`), or `"sampled"`, the one-sample estimate.
        top_k (`int`, *optional*, defaults to `128`): K of a top-k support; K >= V is the full vocabulary.
        tail (`str`, *optional*, defaults to `"bucket"`): what becomes of the mass outside a top-k support: one extra
            outcome (`"bucket"`: a lower bound of the full divergence that converges to it), or nothing, with both
            distributions conditioned on the support (`"renormalize"`). `"truncate"` sums true probabilities over the
            support alone, as some published methods do: it breaks sum(p grad log p) = 0, so that a reverse KL pushes
            even a student that equals its target out of the support. `"sampled"` is `"bucket"` and, where the sampled
            token is outside the support, a correction with which the mean over samples is the full divergence
            (`tail_correction`).
        sampled_ids (`LongTensor` (...), *optional*): the sampled tokens; needed by, and only read for, `"sampled"`.
        variant (`Variant`, *optional*): see there.

    Returns:
        `Tensor` (...): nats, float32 or wider.

    Raises:
        ConfigError: an unknown name, shapes that differ, or a combination that has no meaning.
    """
    check_divergence("kind", kind)
    check_support(kind, support, top_k, tail)
    variant.check(kind, support)
    if kind in OF_THE_TOKEN:
        raise ConfigError(f"kind={kind!r} has no target: it is a function of the sampled token (see dopd.Rule)")
    if student_logits.shape != target_logits.shape:
        raise ConfigError(
            f"student_logits {tuple(student_logits.shape)} and target_logits {tuple(target_logits.shape)} must have "
            "one shape (..., V): nothing is broadcast, and vocabularies are never padded"
        )
    log_s, log_t = log_probs(student_logits), log_probs(target_logits.detach())
    if support == "sampled":
        ids = _sampled(sampled_ids, student_logits, 'support="sampled"')
        log_s_y = pick(log_s, ids)
        return surrogate(*sampled_terms(kind, log_s_y, pick(log_t, ids), variant), log_s_y)
    if support == "full" or top_k >= log_s.shape[-1]:
        return divergence_function(kind, variant)(log_s, log_t)
    ranked = log_s.detach() if support == "student_topk" else log_t
    support_ids = ranked.topk(top_k, dim=-1).indices
    listed_s, listed_t = on_support(log_s, support_ids, tail), on_support(log_t, support_ids, tail)
    value = divergence_function(kind, variant, tail)(listed_s, listed_t)
    if tail != "sampled":
        return value
    ids = _sampled(sampled_ids, student_logits, 'tail="sampled"')
    of_token, of_rest = (pick(log_s, ids), pick(log_t, ids)), (listed_s[..., -1], listed_t[..., -1])
    is_outside = (support_ids != ids.unsqueeze(-1)).all(-1)
    return value + tail_correction(kind, of_token, of_rest, is_outside, variant)


def _sampled(sampled_ids: Tensor | None, student_logits: Tensor, reader: str) -> Tensor:
    if sampled_ids is None:
        raise ConfigError(f"{reader} needs sampled_ids (...): the token ids that the student sampled")
    if sampled_ids.shape != student_logits.shape[:-1]:
        raise ConfigError(
            f"sampled_ids {tuple(sampled_ids.shape)} must have the shape {tuple(student_logits.shape[:-1])}: one "
            f"sampled token for each distribution in student_logits {tuple(student_logits.shape)}"
        )
    return sampled_ids


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension in float32, or float64 if that is what came in."""
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def entropy(log_p: Tensor) -> Tensor:
    """Entropy of a distribution given its log-probs, nats. (..., V) -> (...)."""
    return -_expectation(log_p, log_p)


def pick(log_p: Tensor, ids: Tensor, merged: Sequence[int] = ()) -> Tensor:
    """log_p at `ids`: (..., V) and (...) -> (...). Where an id is in `merged`, the log of the mass of all of these."""
    picked = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    if not merged:
        return picked
    together = torch.tensor(list(merged), device=ids.device)
    return torch.where(torch.isin(ids, together), log_p[..., together].logsumexp(-1), picked)


def on_support(log_p: Tensor, support_ids: Tensor, tail: Tail) -> Tensor:
    """Restrict log-probs to K tokens: renormalised (..., K), or with one outcome for the other mass (..., K + 1).

    `"sampled"` and `"truncate"` have that outcome too; `"truncate"` leaves it out of the sum (`divergence_function`),
    not of the normalisation.
    """
    inside = log_p.gather(-1, support_ids)
    if tail == "renormalize":
        return inside.log_softmax(-1)
    # The remaining mass is summed over the other tokens: 1 - sum(inside) would lose it to rounding.
    outside = log_p.scatter(-1, support_ids, -math.inf)
    empty = torch.isneginf(outside).all(-1, keepdim=True)
    rest = torch.where(empty, -math.inf, outside.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True))
    return torch.cat([inside, rest], dim=-1)


def check_support(kind: str, support: str, top_k: int, tail: str) -> None:
    """Raise `ConfigError` for a support that does not exist or cannot carry this divergence."""
    check_choice("support", support, Support)
    check_choice("tail", tail, Tail)
    if tail == "sampled" and support.endswith("topk") and kind not in _TERMS:
        raise ConfigError(
            f"tail='sampled' estimates {', '.join(map(repr, _TERMS))}, got divergence={kind!r}. Use tail='bucket'"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"top_k (={top_k!r}) must be a whole number of at least 1: the tokens of a top-k support")
    if support == "sampled" and kind not in (*_TERMS, *OF_THE_TOKEN):
        raise ConfigError(
            f"support='sampled' estimates {', '.join(map(repr, _TERMS))} or is the support of "
            f"{' and '.join(map(repr, OF_THE_TOKEN))}, got divergence={kind!r}. Use support='target_topk' or 'full' "
            "for it"
        )
    if kind in OF_THE_TOKEN and support != "sampled":
        raise ConfigError(f"divergence={kind!r} acts on the sampled token: set support='sampled', got {support!r}")
