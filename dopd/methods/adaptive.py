"""Methods that pick tokens, or weigh them, by what student and teacher say of them; no privileged context."""

import math

from dopd.methods.dual import by_advantage, one_rule
from dopd.methods.registry import register_method
from dopd.rules import Rule
from dopd.settings import Count, Fraction, NotNegative, Share
from dopd.tables import RoutingTable


@register_method(
    "eopd",
    "EOPD: a sampled reverse KL everywhere, and a forward KL where the teacher is unsure",
    "arXiv 2603.07079",
    "-A log S(y) + 1[H_T > t] sum_{v in K} T(v) (log T(v) - log S(v)); K: the teacher's top 16, no tail",
    departures="no PPO clipping: rollouts are used once, so that the ratio is 1",
)
def eopd(*, threshold: NotNegative = 0.8, top_k: Count = 16) -> RoutingTable:
    unsure = {"signal": "teacher_entropy", "above": threshold}
    # A reverse KL alone lets the student settle on one of the teacher's choices; where the teacher has several, a
    # forward KL asks for all of them. It covers the teacher's K tokens without the rest, as in the equation.
    rules = (
        Rule(name="sampled", source="teacher", support="sampled"),
        Rule(
            name="unsure",
            source="teacher",
            divergence="forward_kl",
            support="target_topk",
            tail="truncate",
            top_k=top_k,
            select=unsure,
        ),
    )
    return RoutingTable(name="eopd", rules=rules)


@register_method(
    "tip",
    "TIP: the half of the tokens with the highest student entropy or divergence",
    "arXiv 2604.14084",
    "KL(S || T) on the top half by h + d - h d; h, d: H_S and KL(S || T), min-max",
    departures="min-max over the batch (the source leaves the scope open); divided by the share that is kept, not "
    "by the kept tokens of each sequence",
)
def tip(*, fraction: Share = 0.5) -> RoutingTable:
    # The loss divides by all tokens (Eq. 11), the paper by those that it keeps: 1 / fraction turns one into the other.
    rule = Rule(name="kept", source="teacher", select={"signal": "tip", "top": fraction}, weight=1.0 / fraction)
    return RoutingTable(name="tip", rules=(rule,))


@register_method(
    "ta_opd",
    "TA-OPD: the few tokens where the teacher disagrees and still backs what the student can say",
    "arXiv 2605.26844",
    "-A log S(y) on the top 5% by disagreement x compatibility",
    "medium",
    "disagreement is |log T(y) - log S(y)|; divided by the share that is kept",
)
def ta_opd(*, fraction: Share = 0.05) -> RoutingTable:
    rule = Rule(
        name="kept",
        source="teacher",
        support="sampled",
        select={"signal": "ta_opd", "top": fraction},
        weight=1.0 / fraction,  # mean over the tokens that are kept, as in `tip`
    )
    return RoutingTable(name="ta_opd", rules=(rule,))


@register_method(
    "dial_opd",
    "DIAL-OPD: the tokens of each answer on which student and teacher differ where either is likely",
    "arXiv 2610.11659",
    "-A log S(y), A = log T(y) - log S(y), on the top 40% of an answer by L(p, q)^0.5 |log q - log p|; p = S(y), "
    "q = T(y), L: logarithmic mean",
    departures="the choice of tokens was read, through a report; the loss on them is Vanilla OPD's on the sampled "
    "token, divided by the share that is kept",
)
def dial_opd(*, fraction: Share = 0.4, power: NotNegative = 0.5) -> RoutingTable:
    rule = Rule(
        name="kept",
        source="teacher",
        support="sampled",
        select={"signal": "dial", "power": power, "below": fraction},
        weight=1.0 / fraction,  # mean over the tokens that are kept, as in `tip`
    )
    return RoutingTable(name="dial_opd", rules=(rule,))


@register_method(
    "reopold",
    "REOPOLD: sampled rewards bounded from below, on the tokens with the highest student entropy",
    "arXiv 2603.11137",
    "-max(A, log(l / (1 - l))) log S(y) on the top q by H_S",
    "medium",
    "the second stage alone: the first stage's mask and the step of the switch are not known",
)
def reopold(*, mixture: Fraction = 0.2, fraction: Share = 0.5) -> RoutingTable:
    rule = Rule(
        name="kept",
        source="teacher",
        support="sampled",
        # log T - log S has no lower bound: one token that the teacher rules out would outweigh a whole answer.
        clip=(math.log(mixture / (1.0 - mixture)), None),
        select={"signal": "student_entropy", "top": fraction},
    )
    return RoutingTable(name="reopold", rules=(rule,))


@register_method(
    "tsd_kd",
    "TSD-KD: a weighted JSD, the teacher's order of the student's favourites, and less entropy",
    "arXiv 2603.13260",
    "sigmoid(H_S - H_T) JSD_0.9 + 0.1 ListMLE(top 10) on the opening + H_S on its highest tokens",
    departures="each term is averaged over all tokens; the source averages the last over the tokens that it picks",
)
def tsd_kd(*, beta: Fraction = 0.9, top_k: Count = 10, opening: Share = 0.1, highest: Share = 0.1) -> RoutingTable:
    rules = (
        Rule(name="direct", source="teacher", divergence="js", beta=beta, scale="student_surer"),
        Rule(
            name="order",
            source="teacher",
            divergence="list_mle",
            support="student_topk",
            tail="renormalize",  # an order has no place for the rest of the vocabulary
            top_k=top_k,
            weight=0.1,
            select={"signal": "opening", "below": opening},
        ),
        Rule(name="entropy", divergence="entropy", select={"signal": "student_entropy", "top": highest}),
    )
    return RoutingTable(name="tsd_kd", rules=rules)


@register_method(
    "cal_opd",
    "Cal-OPD: no push inside the band that praise and criticism move the teacher in",
    "arXiv 2609.21619",
    "-A log S(y), A = clip(log S, l0 - c down, l0 + c up) - log S",
    "medium",
    "the words of praise and criticism are ours; no code is published, the paper was read through a recipe",
)
def cal_opd(*, tolerance: NotNegative = 5.0, skip: bool = True) -> RoutingTable:
    """`skip`: answers whose advantages are all 0 are left out of the mean over answers, as in the source."""
    advantage = {"signal": "cal_opd", "tolerance": tolerance, "skip": skip}
    return by_advantage("cal_opd", advantage)


@register_method(
    "opsa",
    "OPSA: a control without a teacher, which pushes the student's unlikeliest tokens down",
    "arXiv 2608.31046",
    "-A log S(y) on the fifth with the lowest log S(y), A = -1/2 - (H - H_min) / (2 (H_max - H_min))",
    "medium",
    "entropies are scaled over the batch",
)
def opsa(*, fraction: Share = 0.2) -> RoutingTable:
    rule = Rule(
        name="unlikely",
        divergence="policy_gradient",
        support="sampled",
        advantage="opsa",
        select={"signal": "student_logprob", "bottom": fraction},
    )
    return RoutingTable(name="opsa", rules=(rule,))


@register_method(
    "res_opd",
    "ResOPD: the whole reverse KL from the teacher's top K and the sampled token",
    "arXiv 2610.04882",
    "KL(S || T) on the teacher's top K and one outcome for the rest, plus 1[y not in K] (a(y) - a(rest)), a: the "
    "one-sample estimate; its mean over y is KL(S || T)",
    departures="read through a report, which has the gradient whole; K is ours: what servers give by default",
)
def res_opd(*, top_k: Count = 20) -> RoutingTable:
    return one_rule("res_opd", "teacher", "reverse_kl", "target_topk", top_k, "sampled")
