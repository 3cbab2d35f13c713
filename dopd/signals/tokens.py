"""Signals that read what models say of the tokens. Shapes: B sequences, T completion tokens, N scored tokens."""

import math

import torch
from torch import Tensor

from dopd.routing import privilege_gap
from dopd.settings import NotNegative, Positive
from dopd.signals.batch import SignalBatch, has_both, share_of_answers
from dopd.signals.registry import register_signal

STUDENT, TEACHER = {"student"}, {"teacher"}
BOTH = STUDENT | TEACHER


@register_signal("student_entropy", "entropy of the plain student, nats", sources=STUDENT)
def _student_entropy(batch: SignalBatch) -> Tensor:
    return batch.entropies["student"].double()


@register_signal("teacher_entropy", "entropy of the plain teacher, nats", sources=TEACHER)
def _teacher_entropy(batch: SignalBatch) -> Tensor:
    return batch.entropies["teacher"].double()


@register_signal("student_logprob", "log S(y), nats", sources=STUDENT)
def _student_logprob(batch: SignalBatch) -> Tensor:
    return batch.logprobs["student"].double()


@register_signal(
    "privilege_gap",
    "|log T(y|x,p) - log S(y|x,p)|, nats",
    sources={"privileged_teacher", "privileged_student"},
    entropies=(),
)
def _privilege_gap(batch: SignalBatch) -> Tensor:
    return privilege_gap(batch.logprobs["privileged_teacher"], batch.logprobs["privileged_student"])


@register_signal("position", "token position - (start + growth * optimizer step)")
def _position(batch: SignalBatch, start: float = 0.0, growth: float = 0.0) -> Tensor:
    positions_T = torch.arange(batch.mask.shape[1], dtype=torch.float64, device=batch.mask.device)
    return (positions_T - (start + growth * batch.step)).expand(batch.mask.shape)


@register_signal("random", "uniform in [0, 1)")
def _random(batch: SignalBatch) -> Tensor:
    return torch.rand(batch.mask.shape, device=batch.mask.device, dtype=torch.float64)


@register_signal(
    "row_lot", "uniform in [0, 1), one number for a row: the same in every part of a table, drawn by seed and step"
)
def _row_lot(batch: SignalBatch, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + batch.step)
    before = batch.ranks.number * len(batch.mask)  # rows of other processes draw the numbers before
    lots_B = torch.rand(before + len(batch.mask), generator=generator, dtype=torch.float64)[before:]
    return batch.per_token(lots_B.to(batch.mask.device))


@register_signal("teacher_probability", "T(y)", sources=TEACHER, entropies=())
def _teacher_probability(batch: SignalBatch, inverted: bool = False) -> Tensor:
    probability_BT = batch.logprobs["teacher"].double().exp().clamp(max=1.0)
    return 1.0 - probability_BT if inverted else probability_BT


@register_signal(
    "proxy_kd",
    "sigmoid((log T(text) - mean) / deviation), one number for a row; mean and deviation: of the batch if left out",
    sources=TEACHER,
    entropies=(),
)
def _proxy_kd(batch: SignalBatch, mean: float | None = None, deviation: Positive | None = None) -> Tensor:
    """`mean`, `deviation`: of the proxy's log-likelihoods of whole texts in the dataset, nats."""
    likelihoods_B = torch.where(batch.keep, batch.logprobs["teacher"].double(), 0.0).sum(1)
    everyone_N = batch.ranks.gathered(likelihoods_B[batch.keep.any(1)])
    centre = everyone_N.mean() if mean is None and len(everyone_N) else likelihoods_B.new_tensor(mean or 0.0)
    spread = (
        everyone_N.std(unbiased=False) if deviation is None and len(everyone_N) else centre.new_tensor(deviation or 1.0)
    )
    # Where all texts are equally likely, the weight of each is 1/2.
    apart_B = torch.where(spread > 0, (likelihoods_B - centre) / spread.clamp(min=1e-12), 0.0)
    return batch.per_token(torch.sigmoid(apart_B))


@register_signal("student_surer", "sigmoid(H_S - H_T)", sources=BOTH)
def _student_surer(batch: SignalBatch) -> Tensor:
    return torch.sigmoid(batch.entropies["student"].double() - batch.entropies["teacher"].double())


@register_signal("opening", "share of the answer's student entropy that lies before the token", sources=STUDENT)
def _opening(batch: SignalBatch) -> Tensor:
    entropy_BT = torch.where(batch.keep, batch.entropies["student"].double(), 0.0)
    before_BT = entropy_BT.cumsum(1) - entropy_BT
    return before_BT / entropy_BT.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


def _unit_interval(batch: SignalBatch, values_BT: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Values moved to [0, 1] by two quantiles of the whole batch; 0 where these are equal."""
    values_N = batch.everywhere(values_BT)
    if not values_N.numel():
        return torch.zeros_like(values_BT, dtype=torch.float64)
    bottom, top = (_quantile(values_N, share) for share in (low, high))
    if top <= bottom:
        return torch.zeros_like(values_BT, dtype=torch.float64)
    return ((values_BT.double() - bottom) / (top - bottom)).clamp(0.0, 1.0)


def _quantile(values_N: Tensor, share: float) -> float:
    ordered_N = values_N.sort().values
    place = share * (len(ordered_N) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered_N) - 1)
    return float(ordered_N[below] + (place - below) * (ordered_N[above] - ordered_N[below]))


@register_signal(
    "tip", "h + d - h d; h, d: H_S and KL(S || T), min-max over the batch", sources=STUDENT, measures={"reverse_kl"}
)
def _tip(batch: SignalBatch) -> Tensor:
    entropy_BT = _unit_interval(batch, batch.entropies["student"])
    divergence_BT = _unit_interval(batch, batch.measures["reverse_kl"])
    return entropy_BT + divergence_BT - entropy_BT * divergence_BT


@register_signal(
    "ta_opd",
    "scaled |log T(y) - log S(y)| times scaled teacher mass on the student's top 16 (5% and 95% quantiles)",
    sources=BOTH,
    entropies=(),
    measures={"compatibility"},
)
def _ta_opd(batch: SignalBatch) -> Tensor:
    disagreement_BT = (batch.logprobs["teacher"].double() - batch.logprobs["student"].double()).abs()
    compatibility_BT = batch.measures["compatibility"]
    return _unit_interval(batch, disagreement_BT, 0.05, 0.95) * _unit_interval(batch, compatibility_BT, 0.05, 0.95)


@register_signal("opsa", "-1/2 - (H - H_min) / (2 (H_max - H_min)); H: student entropy", sources=STUDENT)
def _opsa(batch: SignalBatch) -> Tensor:
    return -0.5 - 0.5 * _unit_interval(batch, batch.entropies["student"])


@register_signal(
    "cal_opd",
    "clip(log S, l0 - c down, l0 + c up) - log S; l0 = log T, down and up: how far praise and criticism move it",
    sources=BOTH | {"praised_teacher", "criticised_teacher"},
    entropies=(),
)
def _cal_opd(batch: SignalBatch, tolerance: NotNegative = 5.0, skip: bool = True) -> Tensor:
    """`skip`: answers without any push are left out of the mean over answers."""
    plain_BT, student_BT = batch.logprobs["teacher"].double(), batch.logprobs["student"].double()
    praised_BT = batch.logprobs["praised_teacher"].double() - plain_BT
    criticised_BT = batch.logprobs["criticised_teacher"].double() - plain_BT
    down_BT = torch.maximum(-praised_BT, -criticised_BT).clamp(min=0.0)
    up_BT = torch.maximum(praised_BT, criticised_BT).clamp(min=0.0)
    inside_BT = torch.minimum(torch.maximum(student_BT, plain_BT - tolerance * down_BT), plain_BT + tolerance * up_BT)
    push_BT = torch.where(batch.keep, inside_BT - student_BT, 0.0)
    return push_BT * share_of_answers(batch, (push_BT != 0).any(1)) if skip else push_BT


@register_signal("teacher_confidence", "max_a T(a)", measures={"teacher_confidence"})
def _teacher_confidence(batch: SignalBatch) -> Tensor:
    return batch.measures["teacher_confidence"]


@register_signal("teacher_doubt", "1 - max_a T(a)", measures={"teacher_confidence"})
def _teacher_doubt(batch: SignalBatch) -> Tensor:
    return 1.0 - batch.measures["teacher_confidence"]


@register_signal("teacher_spread", "the teacher's Tsallis entropy in [0, 1]", measures={"teacher_spread"})
def _teacher_spread(batch: SignalBatch, inverted: bool = False) -> Tensor:
    spread_BT = batch.measures["teacher_spread"]
    return 1.0 - spread_BT if inverted else spread_BT


@register_signal("reverse_kl", "KL(student || teacher), nats", measures={"reverse_kl"})
def _reverse_kl(batch: SignalBatch) -> Tensor:
    return batch.measures["reverse_kl"]


@register_signal(
    "contrast",
    "k / (k + 1), k = KL(right context || wrong context) on the right one's top 100 and a tail",
    measures={"contrast_kl"},
)
def _contrast(batch: SignalBatch) -> Tensor:
    divergence_BT = batch.measures["contrast_kl"]
    return divergence_BT / (divergence_BT + 1.0)


@register_signal("has_privileged", "1 where the row has privileged context")
def _has_privileged(batch: SignalBatch) -> Tensor:
    if batch.has_privileged is None:
        return torch.ones(batch.mask.shape, dtype=torch.float64, device=batch.mask.device)
    return batch.per_token(batch.has_privileged)


@register_signal("has_both", "1 where the row has a right and a wrong context")
def _has_both(batch: SignalBatch) -> Tensor:
    return has_both(batch).double()


@register_signal(
    "unreached",
    "sigmoid(S(y) (log S(y) - log S(y|x,p)) / tau): how far the student is surer of its token without p",
    sources=STUDENT | {"privileged_student"},
    entropies=(),
)
def _unreached(batch: SignalBatch, tau: Positive = 1.0, inverted: bool = False) -> Tensor:
    log_s_BT = batch.logprobs["student"].double()
    apart_BT = log_s_BT - batch.logprobs["privileged_student"].double()
    return torch.sigmoid((-1.0 if inverted else 1.0) * log_s_BT.exp() * apart_BT / tau)
