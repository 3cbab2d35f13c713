"""DOPD, its ablations, and the naive ways to use privileged context (arXiv 2606.30626)."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from dopd.divergences import DivergenceKind, Support, Tail
from dopd.methods.registry import CARDS, Build, register_method
from dopd.routing import Regime
from dopd.rules import Rule
from dopd.settings import Count, Fraction, NotNegative
from dopd.sources import Anchor
from dopd.tables import RoutingTable

PAPER = "arXiv 2606.30626"
TEACHER, STUDENT = "privileged_teacher", "privileged_student"
EQUATION = "by regime: w KL(S || T(.|p)), w KL(S || S(.|p)) on the top K, or JS(S, T(.|p))"


@register_method(
    "dopd", "routes each token by the privilege gap to one of four targets", f"{PAPER}, Section 3.3", EQUATION
)
def dopd(
    *,
    top_k: Count = 128,
    tail: Tail = "bucket",
    strong_weight: NotNegative = 1.0,
    light_weight: NotNegative = 0.6,
    weak_weight: NotNegative = 0.3,
    anchor: Anchor = "current",
    trim: float = 0.05,
) -> RoutingTable:
    """The paper's four rules: Section 3.3, weights b_l = 0.6 and b_w = 0.3, K = 128, the live privileged student.

    DEPARTURE under another name: with `anchor` "frozen", "ema" or "snapshot" the table is called `dopd_ANCHOR`.
    """

    def light(regime: Regime, source: str, weight: float) -> Rule:
        return Rule(regime=regime, source=source, support="student_topk", tail=tail, top_k=top_k, weight=weight)

    return RoutingTable(
        name="dopd" if anchor == "current" else f"dopd_{anchor}",
        rules=(
            # Low gap: privilege changes little, so a cheap top K is enough; less weight where both are unsure.
            light(Regime.LH, TEACHER, light_weight),
            light(Regime.LL, STUDENT, weak_weight),
            # The teacher alone finds the token likely: the one regime with much to learn. JS over the whole vocabulary
            # is bounded where the student gives the teacher's token next to no probability; a reverse KL is not.
            Rule(regime=Regime.HT, source=TEACHER, divergence="js", support="full", weight=strong_weight),
            # The student with p finds it likely and the teacher does not: the target is what the student can reach.
            light(Regime.HS, STUDENT, light_weight),
        ),
        anchor=anchor,
        trim=trim,
        source_note=CARDS["dopd" if anchor == "current" else f"dopd_{anchor}"].note,
    )


def _fixed(base: Build, **settled: Any) -> Build:
    """`base` with some options settled; the others keep their defaults."""

    def build(**options: Any) -> RoutingTable:
        return base(**settled, **options)

    signature = inspect.signature(base)
    left = [parameter for name, parameter in signature.parameters.items() if name not in settled]
    build.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return build


for _anchor, _weights in (
    ("frozen", "the student's initial weights"),
    ("ema", "a moving average of the student's weights"),
    ("snapshot", "a copy of the student that is renewed every few steps"),
):
    register_method(
        f"dopd_{_anchor}",
        f"DOPD whose privileged student has {_weights}",
        f"{PAPER}, Section 3.3",
        EQUATION,
        departures=f"{_anchor} privileged student; the paper's is the live one",
    )(_fixed(dopd, anchor=_anchor))


def _ablated(name: str, **changes: Any) -> RoutingTable:
    """A variant of DOPD: `targets`, `divergence`, `support`, `weights` by regime in the order LH, LL, HT, HS."""
    targets = changes.get("targets", (TEACHER, STUDENT, TEACHER, STUDENT))
    weights = changes.get("weights", (0.6, 0.3, 1.0, 0.6))
    rules = tuple(
        Rule(
            regime=regime,
            source=target,
            divergence=changes.get("divergence") or ("js" if regime is Regime.HT else "reverse_kl"),
            support=changes.get("support") or ("full" if regime is Regime.HT else "student_topk"),
            top_k=changes["top_k"],
            weight=weight,
        )
        for regime, target, weight in zip(Regime, targets, weights, strict=True)
    )
    return RoutingTable(name=name, rules=rules, context=changes.get("context", "column"))


def _ablation(name: str, about: str, reading: str = "") -> Callable[[Build], Build]:
    """Register an ablation; `reading`: how its line in the paper is read, where that is open."""
    return register_method(name, about, f"{PAPER}, Table 8", EQUATION, "medium" if reading else "high", reading)


@_ablation("dopd_no_privilege", "DOPD without privileged context: both policies read the plain prompt")
def dopd_no_privilege(*, top_k: Count = 128) -> RoutingTable:
    return _ablated("dopd_no_privilege", top_k=top_k, context="none")


@_ablation("dopd_no_student_targets", "DOPD with the privileged teacher as target in every regime")
def dopd_no_student_targets(*, top_k: Count = 128) -> RoutingTable:
    return _ablated("dopd_no_student_targets", top_k=top_k, targets=(TEACHER,) * 4)


@_ablation("dopd_no_teacher_targets", "DOPD with the privileged student as target in every regime")
def dopd_no_teacher_targets(*, top_k: Count = 128) -> RoutingTable:
    return _ablated("dopd_no_teacher_targets", top_k=top_k, targets=(STUDENT,) * 4)


@_ablation(
    "dopd_one_divergence",
    "DOPD with one divergence in every regime",
    "the paper does not say which; JS by default",
)
def dopd_one_divergence(*, divergence: DivergenceKind = "js", top_k: Count = 128) -> RoutingTable:
    return _ablated("dopd_one_divergence", top_k=top_k, divergence=divergence)


@_ablation(
    "dopd_one_support",
    "DOPD with one support in every regime",
    "the paper does not say which; top K by default",
)
def dopd_one_support(*, support: Support = "student_topk", top_k: Count = 128) -> RoutingTable:
    return _ablated("dopd_one_support", top_k=top_k, support=support)


@register_method(
    "dopd_equal",
    "all four regimes with JS over the top K and equal weights",
    f"{PAPER}, Table 6",
    "JS(S, target of the regime)",
)
def dopd_equal(*, top_k: Count = 128) -> RoutingTable:
    return _ablated("dopd_equal", top_k=top_k, divergence="js", support="student_topk", weights=(1.0,) * 4)


@_ablation(
    "dopd_unrouted",
    "both targets on every token, without routing",
    "the paper does not say what replaces routing; here every token gets half of the teacher's rule and half of the "
    "student's",
)
def dopd_unrouted(*, top_k: Count = 128) -> RoutingTable:
    return RoutingTable(
        name="dopd_unrouted",
        # Halves, so that a token has the weight of one target in all; 0.6 is the paper's b_l of the student's rules.
        rules=(
            Rule(name="teacher", source=TEACHER, divergence="js", weight=0.5),
            Rule(name="student", source=STUDENT, support="student_topk", top_k=top_k, weight=0.5 * 0.6),
        ),
    )


def one_rule(
    name: str,
    source: str,
    divergence: DivergenceKind,
    support: Support,
    top_k: Count,
    tail: Tail,
    anchor: Anchor = "current",
) -> RoutingTable:
    """A table that teaches every token alike."""
    rule = Rule(source=source, divergence=divergence, support=support, top_k=top_k, tail=tail)
    return RoutingTable(name=name, rules=(rule,), anchor=anchor)


def by_advantage(name: str, signal: Any, **options: Any) -> RoutingTable:
    """A table that is one policy gradient.

    Args:
        name (`str`): of the method.
        signal (`str` or `dict`): the advantage, as a rule takes it.
        options: of the table.
    """
    rule = Rule(divergence="policy_gradient", support="sampled", advantage=signal)
    return RoutingTable(name=name, rules=(rule,), **options)


@register_method(
    "privileged_teacher",
    "the privileged teacher teaches every token",
    f"{PAPER}, Figure 3 (naive, teacher only)",
    "KL(S || T(.|p))",
)
def privileged_teacher(
    *,
    divergence: DivergenceKind = "reverse_kl",
    support: Support = "full",
    top_k: Count = 128,
    tail: Tail = "bucket",
) -> RoutingTable:
    return one_rule("privileged_teacher", TEACHER, divergence, support, top_k, tail)


@register_method(
    "privileged_student",
    "the privileged student teaches every token",
    f"{PAPER}, Figure 3 (naive, student only)",
    "KL(S || S(.|p))",
)
def privileged_student(
    *,
    divergence: DivergenceKind = "reverse_kl",
    support: Support = "full",
    top_k: Count = 128,
    tail: Tail = "bucket",
    anchor: Anchor = "current",
) -> RoutingTable:
    return one_rule("privileged_student", STUDENT, divergence, support, top_k, tail, anchor)


@register_method(
    "privileged_both",
    "teacher and student both read the privileged context, in rollouts too",
    f"{PAPER}, Figure 3 (naive, both)",
    "KL(S(.|p) || T(.|p)), y ~ S(.|p)",
)
def privileged_both(
    *,
    divergence: DivergenceKind = "reverse_kl",
    support: Support = "full",
    top_k: Count = 128,
    tail: Tail = "bucket",
) -> RoutingTable:
    rule = Rule(source="teacher", divergence=divergence, support=support, top_k=top_k, tail=tail)
    return RoutingTable(name="privileged_both", rules=(rule,), student_view="privileged")


@register_method(
    "vanilla_drop",
    "Vanilla OPD without a share of its tokens, picked by the privilege gap or at random",
    f"{PAPER}, Figure 4",
    "KL(S || T) on the tokens that are left",
)
def vanilla_drop(*, drop: Literal["top", "bottom", "random"] = "top", fraction: Fraction = 0.2) -> RoutingTable:
    """`drop`: "top" or "bottom" (by the privilege gap), or "random"; `fraction`: the share of tokens left out."""
    signal, kept = {
        "top": ("privilege_gap", "bottom"),
        "bottom": ("privilege_gap", "top"),
        "random": ("random", "bottom"),
    }[drop]
    select = {"signal": signal, kept: 1.0 - fraction}
    rule = Rule(name="kept", source="teacher", select=select)
    return RoutingTable(name="vanilla_drop", rules=(rule,))
