"""Methods whose teacher reads the plain prompt and teaches every token."""

import math
from dataclasses import replace
from typing import Any, Literal

from dopd.divergences import DivergenceKind, Support, Tail
from dopd.methods.dual import one_rule
from dopd.methods.registry import register_method
from dopd.rules import Rule
from dopd.settings import NotNegative, Positive, Probability
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
    departures="lambda is 1 unless lmbda is set; with less, each row draws whether it is trained on its answer or on "
    "its reference text, where the source draws for a whole step",
)
def gkd(
    *, divergence: DivergenceKind = "js", beta: float = 0.5, lmbda: Probability = 1.0, seed: int = 0
) -> RoutingTable:
    """`lmbda`: share of the rows that are trained on the student's own answers, the others on their reference texts;
    `seed`: of these draws."""
    lot = {"signal": "row_lot", "seed": seed}
    teach: dict[str, Any] = {"source": "teacher", "divergence": divergence, "beta": beta}
    own, others = Rule(**teach), Rule(**teach, name="references", text="reference")
    if lmbda in (0.0, 1.0):
        return RoutingTable(name="gkd", rules=(own if lmbda else others,))
    # What is not below the share is above the next smaller number.
    rules = (
        replace(own, name="rollouts", select={**lot, "below": lmbda}),
        replace(others, select={**lot, "above": math.nextafter(lmbda, 0.0)}),
    )
    return RoutingTable(name="gkd", rules=rules)


@register_method(
    "sft",
    "supervised fine-tuning on the reference texts, as a control",
    "the usual one",
    "-log S(y*), y*: the row's reference text",
    departures="none; the mean is over the tokens of a text, then over texts",
)
def sft() -> RoutingTable:
    return RoutingTable(name="sft", rules=(Rule(name="nll", divergence="nll", support="sampled", text="reference"),))


@register_method(
    "proxy_kd",
    "Proxy-KD's third stage: a proxy of a teacher that gives texts alone teaches along these texts",
    "arXiv 2401.07013",
    "-log S(y*) + a w KL(P || S) along y*, P: the proxy as teacher_model, w = sigmoid((log P(y*) - mean) / deviation)",
    "medium",
    "read through reports: a is 1 or 100 there, 1 here; mean and deviation are the batch's unless they are set to the "
    "dataset's. The proxy is aligned beforehand: an unaligned one was worse than no proxy",
)
def proxy_kd(*, alpha: NotNegative = 1.0, mean: float | None = None, deviation: Positive | None = None) -> RoutingTable:
    """`mean`, `deviation`: of the proxy's log-likelihoods of the texts in the dataset, nats."""
    bounds = {key: value for key, value in (("mean", mean), ("deviation", deviation)) if value is not None}
    rules = (
        Rule(name="nll", divergence="nll", support="sampled", text="reference"),
        Rule(
            name="proxy",
            source="teacher",
            divergence="forward_kl",
            scale={"signal": "proxy_kd", **bounds},
            weight=alpha,
            text="reference",
        ),
    )
    return RoutingTable(name="proxy_kd", rules=rules)


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


@register_method(
    "bridge_garden_off_policy",
    "Bridge-Garden as published, on reference texts: their tokens as hard labels where the teacher is sure",
    "arXiv 2605.26246",
    "l KL(T || S) - (1 - l) log S(y*); l = 1 - max_a T(a) (confidence), 1 - T(y*) (data) or "
    "(sum_a T(a)^0.1 - 1) / (V^0.9 - 1) (entropy)",
    "medium",
    "texts are the rows' own; the source also has the teacher write them. Confidence is the paper's form, data and "
    "entropy are the released code's. No warm-up, no risk-guided term. Code read; the paper through reports",
)
def bridge_garden_off_policy(*, weighting: Literal["confidence", "data", "entropy"] = "confidence") -> RoutingTable:
    """`weighting`: what the share of soft labels is taken from; "data" and "entropy" are the released code's."""
    of_data = ({"signal": "teacher_probability", "inverted": True}, "teacher_probability")
    soft, hard = of_data if weighting == "data" else _SOFT_AND_HARD[weighting][:2]
    rules = (
        Rule(name="soft", source="teacher", divergence="forward_kl", scale=soft, text="reference"),
        Rule(name="hard", divergence="nll", support="sampled", scale=hard, text="reference"),
    )
    return RoutingTable(name="bridge_garden_off_policy", rules=rules)
