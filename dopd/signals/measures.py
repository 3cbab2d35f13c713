"""Numbers that take whole distributions, of one source or of several, at every token.

They are computed a chunk of tokens at a time, before the loss. Shapes: M tokens, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dopd.divergences import forward_kl, log_probs, on_support, reverse_kl

COMPATIBILITY_TOKENS = 16
CONTRAST_TOKENS = 100
SPREAD_POWER = 0.1


@dataclass(frozen=True)
class Measure:
    """A number of every token from whole distributions.

    Attributes:
        sources (`tuple[str, ...]`): whose distributions it reads, in the order of the arguments of `compute`.
        compute (callable): log-probs (M, V) of each source -> (M,).
        about (`str`): in words.
    """

    sources: tuple[str, ...]
    compute: Callable[..., Tensor]
    about: str


def _mass_on_student_top(log_s_MV: Tensor, log_t_MV: Tensor) -> Tensor:
    top_MK = log_s_MV.topk(min(COMPATIBILITY_TOKENS, log_s_MV.shape[-1]), dim=-1).indices
    return log_t_MV.gather(-1, top_MK).exp().sum(-1)


def _contrast_kl(log_wrong_MV: Tensor, log_right_MV: Tensor) -> Tensor:
    if log_right_MV.shape[-1] > CONTRAST_TOKENS:
        ids_MK = log_right_MV.topk(CONTRAST_TOKENS, dim=-1).indices
        log_wrong_MV, log_right_MV = (on_support(log_p, ids_MK, "bucket") for log_p in (log_wrong_MV, log_right_MV))
    return forward_kl(log_wrong_MV, log_right_MV)


def _confidence(log_t_MV: Tensor) -> Tensor:
    return log_t_MV.amax(-1).exp()


def _spread(log_t_MV: Tensor) -> Tensor:
    vocab_size = log_t_MV.shape[-1]
    most = vocab_size ** (1.0 - SPREAD_POWER) - 1.0
    return (
        ((SPREAD_POWER * log_t_MV).exp().sum(-1) - 1.0) / most if vocab_size > 1 else torch.zeros_like(log_t_MV[:, 0])
    )


MEASURES: dict[str, Measure] = {
    "reverse_kl": Measure(("student", "teacher"), reverse_kl, "KL(student || teacher), nats"),
    "compatibility": Measure(
        ("student", "teacher"),
        _mass_on_student_top,
        f"the teacher's mass on the student's {COMPATIBILITY_TOKENS} most probable tokens",
    ),
    "teacher_confidence": Measure(("teacher",), _confidence, "the teacher's largest probability"),
    "teacher_spread": Measure(
        ("teacher",),
        _spread,
        f"(sum_a T(a)^{SPREAD_POWER} - 1) / (V^{1 - SPREAD_POWER} - 1): the teacher's Tsallis entropy, in [0, 1]",
    ),
    "contrast_kl": Measure(
        ("contrast_student", "privileged_student"),
        _contrast_kl,
        f"KL(privileged student || the same with a wrong context) on the first one's top {CONTRAST_TOKENS} and one "
        "outcome for all others, nats",
    ),
}


def take_measure(name: str, logits: Mapping[str, Tensor]) -> Tensor:
    """A measure of M tokens from logits (M, V) by source, (M,), float32 or wider; no gradient."""
    measure = MEASURES[name]
    with torch.no_grad():
        return measure.compute(*(log_probs(logits[source]) for source in measure.sources))
