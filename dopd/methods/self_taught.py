"""Methods whose teacher is the student itself, reading privileged context."""

from typing import Any

from dopd.divergences import DivergenceKind, Support, Tail
from dopd.methods.registry import register_method
from dopd.rules import Rule
from dopd.settings import Count, Fraction, NotNegative, Positive, Probability, Share
from dopd.sources import Anchor, Text, TrainedView
from dopd.tables import RoutingTable

SELF = "privileged_student"


@register_method(
    "opcd",
    "OPCD: the frozen student with context teaches the top K of the student without it",
    "arXiv 2602.12275",
    "sum_{v in K} S(v) (log S(v) - log F(v|p)); true probabilities, no tail",
    departures="none; as published, a student that equals its target is still pushed out of the top K",
)
def opcd(*, top_k: Count = 256, tail: Tail = "truncate") -> RoutingTable:
    # Frozen: a live self-teacher would move with the student that it teaches.
    rule = Rule(source=SELF, support="student_topk", top_k=top_k, tail=tail)
    return RoutingTable(name="opcd", rules=(rule,), anchor="frozen")


@register_method(
    "opsd",
    "OPSD: the frozen student, reading a solution, teaches every token",
    "arXiv 2601.18734",
    "JS(S, F(.|p)); with divergence forward_kl and clamp c: sum_v min(F(v|p) (log F(v|p) - log S(v)), c)",
    departures="none: first version of the paper; the authors' repository recommends forward_kl with clamp 0.05, whose "
    "gradient has the opposite sign at every outcome that the clamp bounds (arXiv 2609.38995). Code and scripts were "
    "read",
)
def opsd(
    *,
    divergence: DivergenceKind = "js",
    clamp: Positive | None = None,
    support: Support = "full",
    top_k: Count = 100,
    anchor: Anchor = "frozen",
) -> RoutingTable:
    """`divergence="forward_kl", clamp=0.05` is what the authors' repository recommends."""
    # The clamp bounds each outcome's term: a few style tokens that the solution makes likely would outweigh all others.
    # A bounded term has no gradient of its own, and the student's normalisation alone then pushes that token down.
    rule = Rule(source=SELF, divergence=divergence, clamp=clamp, support=support, top_k=top_k)
    return RoutingTable(name="opsd", rules=(rule,), anchor=anchor)


@register_method(
    "sdft",
    "SDFT: a moving average of the student, reading a demonstration",
    "arXiv 2601.19897",
    "KL(E(.|p) || S)",
    "medium",
    "forward KL, with which an author confirmed (idanshen/Self-Distillation, issue 5) that all published results were "
    "made; the paper's text has KL(S || E(.|p)) (divergence reverse_kl). Reports disagree on the weights: averaged, "
    "frozen (anchor frozen) or live. The official code was not read",
)
def sdft(
    *, divergence: DivergenceKind = "forward_kl", anchor: Anchor = "ema", ema_decay: Fraction | None = 0.99
) -> RoutingTable:
    """`anchor="frozen"`: the static variant; `divergence="reverse_kl"`: the equation in the paper's text."""
    rule = Rule(source=SELF, divergence=divergence)
    return RoutingTable(
        name="sdft",
        rules=(rule,),
        anchor=anchor,
        ema_decay=ema_decay if anchor == "ema" else None,  # the static variant has no average to decay
    )


@register_method(
    "sdpo",
    "SDPO: a moving average of the student, reading a successful rollout of the same prompt",
    "arXiv 2601.20802",
    "JS(S, E(.|sibling)) over the student's top K and a tail; no loss without a sibling",
    departures="no importance weights (rollouts are used once); the sibling is the first right one",
)
def sdpo(*, top_k: Count = 100, ema_decay: Fraction = 0.95) -> RoutingTable:
    rule = Rule(
        source=SELF,
        divergence="js",
        support="student_topk",
        top_k=top_k,
        # Where no rollout of the prompt is right there is no p, and the target would be the student's own past.
        select={"signal": "has_privileged", "above": 0.5},
    )
    return RoutingTable(name="sdpo", rules=(rule,), anchor="ema", ema_decay=ema_decay, context="sibling")


@register_method(
    "vision_opd",
    "Vision-OPD: a moving average of the student, seeing the crop of the evidence",
    "arXiv 2605.18740",
    "JS(S, E(.|crop)) over the student's top K and a tail",
    departures="no importance weights (rollouts are used once); the crop is the column privileged_images",
)
def vision_opd(*, top_k: Count = 100, ema_decay: Fraction = 0.95) -> RoutingTable:
    rule = Rule(source=SELF, divergence="js", support="student_topk", top_k=top_k)
    return RoutingTable(name="vision_opd", rules=(rule,), anchor="ema", ema_decay=ema_decay)


@register_method(
    "beta_opsd",
    "beta-OPSD: towards an interpolation of the frozen student without and with privileged context",
    "arXiv 2607.28582",
    "KL(S || Q), Q = R^(1 - b) F(.|p)^b, normalised; R = F: the student's initial weights, without p",
    "medium",
    "read through a report: the divergence, b and frozen weights are ours",
)
def beta_opsd(*, beta: Probability = 0.5, divergence: DivergenceKind = "reverse_kl") -> RoutingTable:
    """`beta`: 0 is the reference, 1 the student with privileged context."""
    source = {"reference": 1.0 - beta, SELF: beta}
    return RoutingTable(name="beta_opsd", rules=(Rule(source=source, divergence=divergence),), anchor="frozen")


@register_method(
    "ar_opd",
    "AR-OPD: towards the student reading a part of the privileged context, plus a bounded share of what all of it adds",
    "arXiv 2606.10385",
    "KL(Q || S), Q = softmax(log F(.|part) + l clip(log F(.|p) - log F(.|part), +-c))",
    departures="the target was read through a report, the abstract besides; divergence, weights and l inside 0.6 to "
    "1.2 are ours; the part of the context is the column partial_context",
)
def ar_opd(
    *,
    residual: NotNegative = 1.0,
    bound: Positive = 5.0,
    divergence: DivergenceKind = "forward_kl",
    anchor: Anchor = "frozen",
) -> RoutingTable:
    """`residual`: l; `bound`: c, nats."""
    full = {"power": residual, "over": "partial_student", "clip": [-bound, bound]}
    rule = Rule(source={"partial_student": 1.0, SELF: full}, divergence=divergence)
    return RoutingTable(name="ar_opd", rules=(rule,), anchor=anchor)


@register_method(
    "purified_opsd",
    "Purified OPSD: the start model tilted by what the question adds to the privileged context",
    "arXiv 2607.02234",
    "JS(S, Q), Q ~ R exp(D / b), D = c tanh((d - mean d) / c), d = log F(.|p) - log F(.|p without x); R = F without p",
    "medium",
    "read through reports: b, c, and the mean under R are ours; p without x is the privileged prompt with an empty "
    "question",
)
def purified_opsd(*, beta: Positive = 1.0, bound: Positive = 5.0) -> RoutingTable:
    """`beta`: b; `bound`: c, nats."""
    gain = {"power": 1.0 / beta, "over": "context_student", "centre": True, "squash": bound}
    rule = Rule(source={"reference": 1.0, SELF: gain}, divergence="js")
    return RoutingTable(name="purified_opsd", rules=(rule,), anchor="frozen")


@register_method(
    "ad_opsd",
    "AD-OPSD: at unsure tokens, between the start model and the student with privileged context",
    "arXiv 2607.10805",
    "KL(u R + (1 - u) F(.|p) || S) on the top fifth by H_S, u = sigmoid(S(y) (log S(y) - log F(y|p)) / tau)",
    "medium",
    "read through a report: forward KL (of a mixture it is the mixture of forward KLs, up to a constant), frozen "
    "weights, tau and nothing elsewhere are ours",
)
def ad_opsd(*, fraction: Share = 0.2, tau: Positive = 1.0) -> RoutingTable:
    select = {"signal": "student_entropy", "top": fraction}
    shared: dict[str, Any] = {"divergence": "forward_kl", "select": select}
    rules = (
        Rule(name="base", source="reference", scale={"signal": "unreached", "tau": tau}, **shared),
        Rule(name="self", source=SELF, scale={"signal": "unreached", "tau": tau, "inverted": True}, **shared),
    )
    return RoutingTable(name="ad_opsd", rules=rules, anchor="frozen")


@register_method(
    "oasis",
    "OASIS: the student, reading another right rollout, teaches the shortest right one",
    "arXiv 2609.37915",
    "KL(F(.|sibling) || S) on the shortest right rollout of a prompt",
    "medium",
    "read through a report: frozen weights and a random right sibling are ours; the mean is over all rollouts",
)
def oasis(*, anchor: Anchor = "frozen") -> RoutingTable:
    rule = Rule(
        source=SELF,
        divergence="forward_kl",
        select={"signal": "shortest_right", "above": 0.5},
    )
    return RoutingTable(name="oasis", rules=(rule,), anchor=anchor, context="sibling", siblings="random")


@register_method(
    "dapd_entangled",
    "one of DAPD's six terms: a snapshot of the student, reading the reference, teaches the rollout without it",
    "arXiv 2608.01735 (code uanu2002/DAPD)",
    "sum_v min(N(v|p) (log N(v|p) - log S(v)), c); N: the student of up to 100 steps ago",
    departures="the term that the paper calls insufficient, alone (factor 2/15 there): dapd has all six. Temperature "
    "1, not 1.1. The gradient has the opposite sign at every outcome that the clamp bounds; clamp null leaves it out. "
    "Code read",
)
def dapd_entangled(*, clamp: Positive | None = 0.05, snapshot_steps: Count = 100) -> RoutingTable:
    rule = Rule(source=SELF, divergence="forward_kl", clamp=clamp)
    return RoutingTable(name="dapd_entangled", rules=(rule,), anchor="snapshot", snapshot_steps=snapshot_steps)


@register_method(
    "dapd",
    "DAPD: the student without p, with p and with its own answer as p teach one another, on answers and references",
    "arXiv 2608.01735 (code uanu2002/DAPD)",
    "2/15 [F(N|p, S) + F(R|p, S(.|y)) + 3 F(R, S(.|y))] on y + 2/15 [F(R, S(.|p)) + 3 F(N(.|y), S) + "
    "6 F(R(.|y), S(.|p))] on y*; F(Q, S) = sum_v min(Q(v) (log Q(v) - log S(v)), c), N: the student of up to 100 steps "
    "ago, R: its initial weights",
    departures="temperature is the run's, 1.1 there; the student's own answer stands in p's place in "
    "privileged_template, where the source puts it behind the prompt without one; one chat template for all views, "
    "where the source has thinking off without p. The gradient has the opposite sign at every outcome that the clamp "
    "bounds; clamp null leaves it out. Code read",
)
def dapd(*, clamp: Positive | None = 0.05, snapshot_steps: Count = 100) -> RoutingTable:
    def term(name: str, source: str, text: Text, view: TrainedView, parts: int) -> Rule:
        weight = parts / 15
        return Rule(name=name, source=source, divergence="forward_kl", clamp=clamp, weight=weight, text=text, view=view)

    rules = (
        term("answer_hinted", SELF, "rollout", "plain", 2),
        term("answer_hinted_to_own", "privileged_reference", "rollout", "self", 2),
        term("answer_plain_to_own", "reference", "rollout", "self", 6),
        term("reference_plain_to_hinted", "reference", "reference", "privileged", 2),
        term("reference_own", "self_student", "reference", "plain", 6),
        term("reference_own_to_hinted", "self_reference", "reference", "privileged", 12),
    )
    return RoutingTable(name="dapd", rules=rules, anchor="snapshot", snapshot_steps=snapshot_steps)


@register_method(
    "feedback",
    "Feedback Distillation: a moving average of the student, reading feedback",
    "arXiv 2605.30861",
    "KL(S || E(.|feedback))",
    "low",
    "direction, support and decay are not known (the abstract alone was read); feedback comes with the row, where the "
    "source has a critique of the attempt, so that this is a hint method",
)
def feedback(*, divergence: DivergenceKind = "reverse_kl", ema_decay: Fraction = 0.95) -> RoutingTable:
    rule = Rule(source=SELF, divergence=divergence)
    return RoutingTable(name="feedback", rules=(rule,), anchor="ema", ema_decay=ema_decay)
