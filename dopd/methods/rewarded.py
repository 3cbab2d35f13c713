"""Methods that learn from rewards."""

from typing import Literal

from dopd.methods.dual import by_advantage
from dopd.methods.registry import register_method
from dopd.rules import Rule
from dopd.settings import Count, NotNegative, Positive, Probability, Share
from dopd.tables import RoutingTable, Siblings

_ONCE = "no PPO clipping: rollouts are used once, so that the ratio is 1"


@register_method(
    "grpo",
    "a policy-gradient baseline without any teacher",
    "arXiv 2402.03300",
    "-A log S(y), A = (r - mean) / std over the rollouts of a prompt",
    departures=f"no KL to a reference; {_ONCE}",
)
def grpo() -> RoutingTable:
    return by_advantage("grpo", "group_advantage")


@register_method(
    "uni_opd",
    "Uni-OPD: a sampled reverse KL whose advantages keep right above wrong rollouts",
    "arXiv 2605.03677",
    "-(clip(log T - log S, -10, 10) + shift) log S(y); shift: +-(delta - g) / 2 where the margin g < delta",
    departures=f"no balancing of right and wrong rollouts, no filter of prompts; {_ONCE}",
)
def uni_opd(*, delta: NotNegative = 0.1) -> RoutingTable:
    # Two rules on the same tokens add up to one policy gradient, whose advantage is the sum of theirs.
    rules = (
        Rule(name="teacher", source="teacher", support="sampled", clip=(-10.0, 10.0)),
        Rule(
            name="margin",
            divergence="policy_gradient",
            support="sampled",
            advantage={"signal": "uni_opd_margin", "delta": delta},
        ),
    )
    return RoutingTable(name="uni_opd", rules=rules)


@register_method(
    "rlsd",
    "RLSD: rewards give the sign of a token's advantage, the self-teacher its size",
    "arXiv 2604.03128",
    "-A ((1 - m) + m clip(exp(sign(A) d), 1 - e, 1 + e)) log S(y), d = log S(y|p) - log S(y)",
    departures=_ONCE,
)
def rlsd(*, epsilon: NotNegative = 0.2, mix: Probability = 0.5, decay_steps: Count = 50) -> RoutingTable:
    advantage = {"signal": "rlsd", "epsilon": epsilon, "mix": mix, "decay_steps": decay_steps}
    return by_advantage("rlsd", advantage)


@register_method(
    "rlcsd",
    "RLCSD: group advantages shifted by what a right hint says beyond a wrong one",
    "arXiv 2606.11709 (code THU-BPM/RLCSD)",
    "mean over unselected of -A log S(y) + mean over selected of -(A + r) log S(y), of the sign of A; selected: "
    "|r| > 0.02, r = clip(l tanh(e / tau), +-2), e = log S(y|right) - log mean_k S(y|wrong k)",
    departures="no final answer after the hints, beside the one that they have; wrong hints are rollouts that were not "
    "cut, where the source asks for an answer that can be extracted; means over the tokens of the batch; "
    f"{_ONCE}. Code read, at two of its commits",
)
def rlcsd(
    *,
    tau: NotNegative = 0.02,
    mix: Probability = 0.5,
    snapshot_steps: Count = 10,
    drop: bool = True,
    apart: bool = True,
    siblings: Siblings = "random",
    num_contrast: Count = 4,
    ended: bool = True,
    hints: Literal["sibling", "column"] = "sibling",
) -> RoutingTable:
    """`num_contrast`: most wrong hints of a rollout; `hints="column"`: the right hint is the row's privileged_context.

    DEPARTURES: `ended=False`: rollouts that were cut may be wrong hints;
    `drop=False`: rows without both hints keep A; `apart=False`: one mean over the tokens of answers;
    `siblings="first"`: the first fitting sibling, not a random one.
    """
    advantage = {"signal": "rlcsd", "tau": tau, "mix": mix, "drop": drop, "apart": apart}
    return by_advantage(
        "rlcsd",
        advantage,
        anchor="snapshot",
        snapshot_steps=snapshot_steps,
        context=hints,
        contrast="sibling",
        siblings=siblings,
        siblings_end=ended,
        num_contrast=num_contrast,
    )


@register_method(
    "sipo",
    "SIPO: group advantages plus a bounded share of what a right rollout as hint says beyond a wrong one",
    "arXiv 2609.36742",
    "-(A + 0.5 clip(log S(y|right) - log S(y|wrong), +-0.2)) log S(y)",
    "medium",
    f"read through a report; live weights and random siblings are ours; {_ONCE}",
)
def sipo(*, mix: NotNegative = 0.5, bound: NotNegative = 0.2) -> RoutingTable:
    advantage = {"signal": "sipo", "mix": mix, "bound": bound}
    return by_advantage("sipo", advantage, context="sibling", contrast="sibling", siblings="random")


@register_method(
    "distilled_rl",
    "Distilled RL: the tokens of good answers weighted by what the teacher says of them",
    "arXiv 2607.17247",
    "-A w log S(y), w = clip(T(y) / S(y), 1/3, 3) / its geometric mean in the answer where A > 0, else 1",
    departures=f"read through a report; {_ONCE}",
)
def distilled_rl(*, bound: Positive = 3.0) -> RoutingTable:
    advantage = {"signal": "distilled_rl", "bound": bound}
    return by_advantage("distilled_rl", advantage)


@register_method(
    "conspo",
    "ConSPO: each right rollout contrasted with the wrong ones of its prompt, without a teacher",
    "arXiv 2605.12969",
    "-A log S(y), A = G / N+ (1 - P+) of a right rollout, -G / N+ sum P- of a wrong one; P: shares of e^(s / t), "
    "s the mean log S of an answer",
    departures="none: the gradient is that of the published contrast. At the published temperature of 10 the weights "
    "of wrong rollouts differ by 2% at most, so that it is nearly conspo_uniform; temperature 0.1 tells them apart, "
    "and is not the paper's. The full text was read",
)
def conspo(*, temperature: Positive = 10.0, margin: NotNegative = 0.01, warmup: Share = 0.3) -> RoutingTable:
    advantage = {"signal": "conspo", "temperature": temperature, "margin": margin, "warmup": warmup}
    return by_advantage("conspo", advantage)


@register_method(
    "conspo_uniform",
    "a control of ConSPO: GRPO times a factor of the prompt, which ConSPO is at an infinite temperature",
    "arXiv 2605.12969 (its limit)",
    "-A log S(y), A = G N- / (N+ (1 + N-)) of a right rollout, -G / (1 + N-) of a wrong one",
    departures="no published method: derived from ConSPO's objective",
)
def conspo_uniform() -> RoutingTable:
    return by_advantage("conspo_uniform", "conspo_uniform")


@register_method(
    "sdpg",
    "SDPG: group advantages, a reverse KL to the live self-teacher, and a tether to the initial weights",
    "arXiv 2606.04036",
    "-A log S(y) + b min(KL(S || S(.|p)), 20) + a (log S(y) - log R(y))^2 / 2",
    departures=f"the tether's gradient is that of (log S - log R) log S(y), its expectation under S; {_ONCE}",
)
def sdpg(*, beta: NotNegative = 1e-3, alpha: NotNegative = 1e-3) -> RoutingTable:
    rules = (
        Rule(name="reward", divergence="policy_gradient", support="sampled", advantage="group_advantage"),
        # The cap bounds a token's divergence: its gradient is 0 above, so that no token outweighs the rewards.
        Rule(name="self", source="privileged_student", cap=20.0, weight=beta),
        Rule(name="tether", source="reference", support="sampled", weight=alpha),
    )
    return RoutingTable(name="sdpg", rules=rules)


@register_method(
    "diffgate",
    "DiffGate: group advantages, and the teacher on wrong rollouts, the more of its prompt are wrong",
    "arXiv 2610.04596",
    "-A log S(y) + b f min(KL(S || T), c); f: the share of wrong rollouts of the prompt at a wrong one, else 0",
    departures=f"read through a report: b and c are ours; {_ONCE}",
)
def diffgate(*, weight: NotNegative = 1.0, cap: Positive = 10.0) -> RoutingTable:
    """`weight`: b; `cap`: c, nats."""
    rules = (
        Rule(name="reward", divergence="policy_gradient", support="sampled", advantage="group_advantage"),
        Rule(name="teacher", source="teacher", cap=cap, scale="failed", weight=weight),
    )
    return RoutingTable(name="diffgate", rules=rules)


@register_method(
    "rg_opd",
    "RG-OPD: the sampled reverse KL where teacher and reward push a token the same way",
    "arXiv 2607.04037",
    "-(log T(y) - log S(y)) log S(y) where A > 0 and log T(y) > log S(y) + d, or A <= 0 and log T(y) < log S(y) - d",
    "medium",
    f"read through a report: d is ours, and the gate is taken token by token; {_ONCE}",
)
def rg_opd(*, margin: NotNegative = 0.0) -> RoutingTable:
    select = {"signal": "agrees", "margin": margin, "above": 0.5}
    rule = Rule(name="agreed", source="teacher", support="sampled", select=select)
    return RoutingTable(name="rg_opd", rules=(rule,))
