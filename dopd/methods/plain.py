"""Methods whose teacher reads the plain prompt and teaches every token."""

from typing import Any, Literal

from dopd.divergences import DivergenceKind, Support, Tail
from dopd.methods.dual import one_rule
from dopd.methods.registry import register_method
from dopd.rules import Rule
from dopd.settings import NotNegative, Positive
from dopd.tables import RoutingTable


@register_method(
    "vanilla", "Vanilla OPD: the plain teacher teaches every token", "arXiv 2606.30626, Section 2", "KL(S || T)"
)
def vanilla(
    *,
    divergence: DivergenceKind = "reverse_kl",
    support: Support = "full",
    top_k: int = 128,
    tail: Tail = "bucket",
) -> RoutingTable:
    return one_rule("vanilla", "teacher", divergence, support, top_k, tail)


@register_method(
    "vanilla_pg",
    "Vanilla OPD on the sampled token, as a policy gradient",
    "Thinking Machines, On-Policy Distillation (2025)",
    "-A log S(y), A = log T(y) - log S(y)",
)
def vanilla_pg(*, merge_ends: bool = False) -> RoutingTable:
    """`merge_ends`: score all end-of-sequence tokens as one outcome (arXiv 2609.20511)."""
    # A sampled reverse KL: -A log S(y) is its score-function estimator, so no advantage has to be named.
    rule = Rule(source="teacher", support="sampled")
    return RoutingTable(name="vanilla_pg", rules=(rule,), merge_ends=merge_ends)


@register_method(
    "gkd",
    "GKD on the student's own samples: any divergence, whole vocabulary",
    "arXiv 2306.13649",
    "b KL(T || M) + (1 - b) KL(S || M), M = b T + (1 - b) S; or KL(T || S), KL(S || T)",
    departures="lambda = 1: no sequences from a dataset are mixed in",
)
def gkd(*, divergence: DivergenceKind = "js", beta: float = 0.5) -> RoutingTable:
    rule = Rule(source="teacher", divergence=divergence, beta=beta)
    return RoutingTable(name="gkd", rules=(rule,))


@register_method(
    "exopd",
    "ExOPD: the teacher's change over a reference, extrapolated",
    "arXiv 2602.12125",
    "-A log S(y), A = l log T(y) - (l - 1) log R(y) - log S(y); R: the student's initial weights",
    departures="no PPO clipping and no rollout importance weights: rollouts are used once, so that the ratio is 1",
)
def exopd(*, extrapolation: Positive = 1.25) -> RoutingTable:
    # T^l R^(1 - l): the exponents sum to 1, so that l = 1 is plain distillation, and l > 1 goes beyond the teacher
    # along its change from the reference. The normaliser is no function of y and falls out of the estimator.
    source = {"teacher": extrapolation, "reference": 1.0 - extrapolation}
    rule = Rule(source=source, support="sampled")
    return RoutingTable(name="exopd", rules=(rule,))


@register_method(
    "veto",
    "Veto: the teacher's distribution times a power of the student's",
    "arXiv 2601.07155",
    "KL(Q || S) or KL(S || Q), Q = softmax(z_T + b z_S), b falling linearly to 0",
    "medium",
    "the student inside Q is detached (the source does not say)",
)
def veto(*, divergence: DivergenceKind = "forward_kl", beta: NotNegative = 0.8) -> RoutingTable:
    # The student in the target vetoes tokens that it gives no probability; as b falls to 0 the target is the teacher's.
    source = {"teacher": 1.0, "student": {"start": beta, "end": 0.0}}
    rule = Rule(source=source, divergence=divergence)
    return RoutingTable(name="veto", rules=(rule,))


@register_method(
    "fast_opd",
    "Fast OPD: rollouts end early, later with every step",
    "arXiv 2602.15260",
    "-A log S(y_t) for t <= L, A = log T - log S, L = start + growth * step",
    "medium",
    "nothing is distilled after L (one report mentions off-policy distillation there)",
)
def fast_opd(*, start: int = 1, growth: int = 256) -> RoutingTable:
    rule = Rule(source="teacher", support="sampled")
    # Tokens after L are not masked but never sampled: the saving is in the rollouts.
    return RoutingTable(name="fast_opd", rules=(rule,), rollout_growth=(start, growth))


@register_method(
    "stopgrad_topk",
    "reverse KL on the student's top K with detached weights",
    "arXiv 2605.11182",
    "sum_K sg[S (log S - log T)] log S",
    "medium",
    "whose top K, and where the gradient stops, are read from reports and scripts",
)
def stopgrad_topk(*, top_k: int = 20) -> RoutingTable:
    # tail="truncate": the sum is over K alone, with probabilities of the whole vocabulary, as in the equation.
    rule = Rule(
        source="teacher", divergence="reverse_kl_detached", support="student_topk", tail="truncate", top_k=top_k
    )
    return RoutingTable(name="stopgrad_topk", rules=(rule,))


_SOFT_AND_HARD: dict[str, tuple[Any, Any, float, float]] = {
    # weighting: signals of the soft and of the hard rule, and their weights
    "confidence": ("teacher_doubt", "teacher_confidence", 1.0, 1.0),
    "entropy": ("teacher_spread", {"signal": "teacher_spread", "inverted": True}, 1.0, 1.0),
    "static": (None, None, 0.1, 0.9),
}


@register_method(
    "bridge_garden",
    "Bridge-Garden: soft labels where the teacher is unsure, its likeliest token where it is sure",
    "arXiv 2605.26246",
    "l KL(T || S) - (1 - l) log S(argmax T); l = 1 - max_a T(a) (confidence), "
    "(sum_a T(a)^0.1 - 1) / (V^0.9 - 1) (entropy) or 0.1 (static)",
    departures="on the student's own samples; the source uses teacher or data prefixes. Confidence is the paper's "
    "form; the released code takes 1 - T(data token) with the data token as hard label, and static on its own samples. "
    "No warm-up, no risk-guided term. Code read; the paper through reports",
)
def bridge_garden(*, weighting: Literal["confidence", "entropy", "static"] = "confidence") -> RoutingTable:
    """`weighting`: what the share of soft labels is taken from; "entropy" and "static" are the released code's."""
    # The shares add up to 1 at every token, so that the two rules have one unit of weight.
    soft, hard, soft_weight, hard_weight = _SOFT_AND_HARD[weighting]
    rules = (
        Rule(name="soft", source="teacher", divergence="forward_kl", scale=soft, weight=soft_weight),
        Rule(name="hard", source="teacher", divergence="cross_entropy", scale=hard, weight=hard_weight),
    )
    return RoutingTable(name="bridge_garden", rules=rules)
