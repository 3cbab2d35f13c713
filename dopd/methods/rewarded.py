"""Methods that learn from rewards."""

from dopd.methods.registry import register_method
from dopd.rules import Rule
from dopd.settings import Count, NotNegative, Probability
from dopd.tables import RoutingTable

_ONCE = "no PPO clipping: rollouts are used once, so that the ratio is 1"


@register_method(
    "grpo",
    "a policy-gradient baseline without any teacher",
    "arXiv 2402.03300",
    "-A log S(y), A = (r - mean) / std over the rollouts of a prompt",
    departures=f"no KL to a reference; {_ONCE}",
)
def grpo() -> RoutingTable:
    rule = Rule(divergence="policy_gradient", support="sampled", advantage="group_advantage")
    return RoutingTable(name="grpo", rules=(rule,))


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
    rule = Rule(divergence="policy_gradient", support="sampled", advantage=advantage)
    return RoutingTable(name="rlsd", rules=(rule,))


@register_method(
    "rlcsd",
    "RLCSD: group advantages shifted by what a right hint says beyond a wrong one",
    "arXiv 2606.11709",
    "-(A + r) log S(y) of the sign of A where |r| > 0.02, r = clip(l tanh(e / tau), +-2), "
    "e = log S(y|right) - log S(y|wrong)",
    departures=f"one wrong hint in place of up to four, one mean over all tokens; {_ONCE}",
)
def rlcsd(*, tau: NotNegative = 0.02, mix: Probability = 0.5, snapshot_steps: Count = 10) -> RoutingTable:
    rule = Rule(divergence="policy_gradient", support="sampled", advantage={"signal": "rlcsd", "tau": tau, "mix": mix})
    return RoutingTable(
        name="rlcsd",
        rules=(rule,),
        anchor="snapshot",
        snapshot_steps=snapshot_steps,
        context="sibling",
        contrast="sibling",
    )


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
