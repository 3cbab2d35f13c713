"""Every method's rows reproduce its published formula, written out in plain torch here: values and gradients.

A formula returns what each token's loss is, as a function whose gradient by the student's logits is the published
one: a policy gradient is -sg(A) log S(y).
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from methods_kit import GROUP, Logits, mean_over_sequences, random_logits
from torch import Tensor

import dopd
from dopd.errors import ConfigError
from dopd.methods import METHODS

Formula = Callable[[Logits, Tensor], Tensor]  # scored batch, student's log-probs (B, T, V) with gradient -> (B, T)


def at(log_p: Tensor, ids: Tensor) -> Tensor:
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def policy_gradient(advantage: Tensor, log_s: Tensor, ids: Tensor) -> Tensor:
    log_y = at(log_s, ids)
    return -advantage.detach() * log_y


def kl(first: Tensor, second: Tensor) -> Tensor:
    return (first.exp() * (first - second)).sum(-1)


def jsd(target: Tensor, log_s: Tensor, beta: float = 0.5) -> Tensor:
    mixture = (beta * target.exp() + (1 - beta) * log_s.exp()).log()
    return beta * kl(target, mixture) + (1 - beta) * kl(log_s, mixture)


def top(log_p: Tensor, k: int) -> Tensor:
    return log_p.detach().topk(k, dim=-1).indices


def with_tail(log_p: Tensor, ids: Tensor) -> Tensor:
    inside = log_p.gather(-1, ids)
    return torch.cat([inside, (1 - inside.exp().sum(-1, keepdim=True)).log()], -1)


def scored(b: Logits) -> Tensor:
    return b.mask != 0


def unit(values: Tensor, b: Logits, low: float = 0.0, high: float = 1.0) -> Tensor:
    bottom, ceiling = (torch.quantile(values[scored(b)], share) for share in (low, high))
    return ((values - bottom) / (ceiling - bottom)).clamp(0, 1)


def top_share(values: Tensor, b: Logits, share: float) -> Tensor:
    flat = values[scored(b)]
    return values >= flat.topk(max(1, round(share * len(flat)))).values[-1]


def group_advantage(b: Logits) -> Tensor:
    groups = b.rewards.view(-1, GROUP)
    advantage = (groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)
    return advantage.flatten().unsqueeze(1).expand(b.mask.shape)


def vanilla_pg(b: Logits, s: Tensor) -> Tensor:
    return policy_gradient(b.log_y("teacher") - at(s, b.ids), s, b.ids)


def exopd(b: Logits, s: Tensor) -> Tensor:
    # lambda log T - (lambda - 1) log R - log S, which is log T - log S + (lambda - 1)(log T - log R)
    reward = 1.25 * (b.log_y("teacher") - b.log_y("reference"))
    return policy_gradient(reward - (at(s, b.ids) - b.log_y("reference")), s, b.ids)


def veto(b: Logits, s: Tensor) -> Tensor:
    target = torch.log_softmax(b.views["teacher"] + 0.8 * b.student, -1)
    return kl(target, s)


def opcd(b: Logits, s: Tensor, k: int = 4) -> Tensor:
    ids = top(s, k)
    inside = s.gather(-1, ids)
    return (inside.exp() * (inside - b.log_p("privileged_student").gather(-1, ids))).sum(-1)


def stopgrad_topk(b: Logits, s: Tensor, k: int = 4) -> Tensor:
    ids = top(s, k)
    inside, target = s.gather(-1, ids), b.log_p("teacher").gather(-1, ids)
    return ((inside.exp() * (inside - target)).detach() * inside).sum(-1)


def opsd(b: Logits, s: Tensor) -> Tensor:
    target = b.log_p("privileged_student")
    return (target.exp() * (target - s)).clamp(max=0.05).sum(-1)


def self_js_topk(b: Logits, s: Tensor, k: int = 4) -> Tensor:
    ids = top(s, k)
    return jsd(with_tail(b.log_p("privileged_student"), ids), with_tail(s, ids))


def eopd(b: Logits, s: Tensor, k: int = 4) -> Tensor:
    ids = top(b.log_p("teacher"), k)
    target = b.log_p("teacher").gather(-1, ids)
    forward = (target.exp() * (target - s.gather(-1, ids))).sum(-1)
    return vanilla_pg(b, s) + (b.entropy("teacher") > 0.8) * forward


def tip(b: Logits, s: Tensor) -> Tensor:
    h, d = unit(b.entropy("student"), b), unit(kl(b.log_p("student"), b.log_p("teacher")), b)
    return 2.0 * top_share(h + d - h * d, b, 0.5) * kl(s, b.log_p("teacher"))


def ta_opd(b: Logits, s: Tensor) -> Tensor:
    disagreement = (b.log_y("teacher") - b.log_y("student")).abs()
    compatibility = b.log_p("teacher").gather(-1, top(b.log_p("student"), 16)).exp().sum(-1)
    score = unit(disagreement, b, 0.05, 0.95) * unit(compatibility, b, 0.05, 0.95)
    return 20.0 * top_share(score, b, 0.05) * vanilla_pg(b, s)


def reopold(b: Logits, s: Tensor) -> Tensor:
    advantage = (b.log_y("teacher") - at(s, b.ids)).clamp(min=math.log(0.25))
    return top_share(b.entropy("student"), b, 0.5) * policy_gradient(advantage, s, b.ids)


def tsd_kd(b: Logits, s: Tensor, k: int = 4) -> Tensor:
    h = b.entropy("student")
    direct = torch.sigmoid(h - b.entropy("teacher")) * jsd(b.log_p("teacher"), s, 0.9)
    ids = top(s, k)
    order = b.log_p("teacher").gather(-1, ids).argsort(-1, descending=True)
    ranked = s.gather(-1, ids.gather(-1, order))
    plackett_luce = -sum(ranked[..., i] - ranked[..., i:].logsumexp(-1) for i in range(k))
    h_scored = torch.where(scored(b), h, 0.0)
    before = (h_scored.cumsum(1) - h_scored) / h_scored.sum(1, keepdim=True)
    return direct + 0.1 * ((before < 0.1) * plackett_luce) + top_share(h, b, 0.1) * -(s.exp() * s).sum(-1)


def cal_opd(b: Logits, s: Tensor) -> Tensor:
    plain = b.log_y("teacher")
    praised, criticised = b.log_y("praised_teacher") - plain, b.log_y("criticised_teacher") - plain
    down = torch.stack([torch.zeros_like(plain), -praised, -criticised]).amax(0)
    up = torch.stack([torch.zeros_like(plain), praised, criticised]).amax(0)
    log_y = b.log_y("student")
    advantage = torch.where(scored(b), torch.clamp(log_y, plain - 5 * down, plain + 5 * up) - log_y, 0.0)
    pushed = int(advantage.any(1).sum())  # answers without any push are left out of the mean
    return policy_gradient(advantage * len(advantage) / pushed, s, b.ids)


def opsa(b: Logits, s: Tensor) -> Tensor:
    h = b.entropy("student")
    low, high = h[scored(b)].min(), h[scored(b)].max()
    advantage = -0.5 - (h - low) / (2 * (high - low))
    return top_share(-b.log_y("student"), b, 0.2) * policy_gradient(advantage, s, b.ids)


def bridge_garden(b: Logits, s: Tensor) -> Tensor:
    confidence = b.log_p("teacher").exp().amax(-1)
    hard = -at(s, b.log_p("teacher").argmax(-1))
    return (1 - confidence) * kl(b.log_p("teacher"), s) + confidence * hard


def bridge_garden_by_entropy(b: Logits, s: Tensor) -> Tensor:
    teacher = b.log_p("teacher")
    soft = ((teacher.exp() ** 0.1).sum(-1) - 1) / (teacher.shape[-1] ** 0.9 - 1)
    return soft * kl(teacher, s) - (1 - soft) * at(s, teacher.argmax(-1))


def uni_opd(b: Logits, s: Tensor) -> Tensor:
    advantage = b.log_y("teacher") - b.log_y("student")
    means = torch.stack([row[kept].mean() for row, kept in zip(advantage, scored(b), strict=True)]).view(-1, GROUP)
    shift = torch.zeros_like(means)
    for group, rewards in enumerate(b.rewards.view(-1, GROUP)):
        right = rewards > 0.5
        margin = means[group][right].mean() - means[group][~right].mean()
        shift[group] = torch.where(right, 0.5, -0.5).double() * (0.1 - margin).clamp(min=0)
    return policy_gradient(advantage.clamp(-10, 10) + shift.view(-1, 1), s, b.ids)


def rlsd(b: Logits, s: Tensor) -> Tensor:
    advantage = group_advantage(b)
    size = (advantage.sign() * (b.log_y("privileged_student") - b.log_y("student"))).exp().clamp(0.8, 1.2)
    return policy_gradient(advantage * (0.5 + 0.5 * size), s, b.ids)


def rlcsd_parts(b: Logits) -> tuple[Tensor, Tensor, Tensor]:
    """A, A + r of the sign of A, and where |r| > 0.02."""
    advantage = group_advantage(b)
    shift = 0.5 * torch.tanh((b.log_y("privileged_student") - b.log_y("contrast_student")) / 0.02)
    shifted = torch.where(advantage > 0, (advantage + shift).clamp(min=0), (advantage + shift).clamp(max=0))
    return advantage, shifted, (shift.abs() > 0.02) & scored(b)


def rlcsd(b: Logits, s: Tensor) -> Tensor:
    advantage, shifted, selected = rlcsd_parts(b)
    left = scored(b) & ~selected
    total = policy_gradient(shifted, s, b.ids)[selected].mean()
    if bool(left.any()):
        total = total + policy_gradient(advantage, s, b.ids)[left].mean()
    return total.expand(b.mask.shape)  # the mean of one number is the number


def rlcsd_together(b: Logits, s: Tensor) -> Tensor:
    advantage, shifted, selected = rlcsd_parts(b)
    return policy_gradient(torch.where(selected, shifted, advantage), s, b.ids)


def conspo(b: Logits, s: Tensor, t: float = 10.0, m: float = 0.0) -> Tensor:
    means = torch.stack([row[kept].mean() for row, kept in zip(at(s, b.ids), scored(b), strict=True)]).view(-1, GROUP)
    losses = []
    for group, rewards in zip(means, b.rewards.view(-1, GROUP), strict=True):
        right, wrong = group[rewards > 0.5], group[rewards < 0.5]
        pulls = [((one - m) / t).exp() / (((one - m) / t).exp() + (wrong / t).exp().sum()) for one in right]
        losses.append(-t * torch.stack(pulls).log().mean())
    return torch.stack(losses).repeat_interleave(GROUP).unsqueeze(1).expand(b.mask.shape)


def conspo_uniform(b: Logits, s: Tensor) -> Tensor:
    """GRPO with the deviation of the population, times G sqrt(N- / N+) / (1 + N-)."""
    groups = b.rewards.view(-1, GROUP)
    right = groups.sum(1, keepdim=True)
    wrong = GROUP - right
    advantage = (groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True, correction=0)
    advantage = advantage * GROUP * (wrong / right).sqrt() / (1 + wrong)
    return policy_gradient(advantage.view(-1, 1).expand(b.mask.shape), s, b.ids)


def sipo(b: Logits, s: Tensor) -> Tensor:
    shift = (b.log_y("privileged_student") - b.log_y("contrast_student")).clamp(-0.2, 0.2)
    return policy_gradient(group_advantage(b) + 0.5 * shift, s, b.ids)


def distilled_rl(b: Logits, s: Tensor) -> Tensor:
    weight = (b.log_y("teacher") - b.log_y("student")).exp().clamp(1 / 3, 3)
    for row, kept in zip(weight, scored(b), strict=True):
        row /= row[kept].prod() ** (1 / int(kept.sum()))
    return policy_gradient(group_advantage(b) * torch.where(group_advantage(b) > 0, weight, 1.0), s, b.ids)


def dial_opd(b: Logits, s: Tensor) -> Tensor:
    p, q = b.log_y("student").exp(), b.log_y("teacher").exp()
    score = ((q - p) / (q.log() - p.log())).sqrt() * (q.log() - p.log()).abs()
    kept = torch.zeros_like(b.mask, dtype=torch.bool)
    for row, values, there in zip(kept, score, scored(b), strict=True):
        row[values.masked_fill(~there, -1).topk(math.ceil(0.4 * int(there.sum()))).indices] = True
    return 2.5 * kept * vanilla_pg(b, s)


def oasis(b: Logits, s: Tensor) -> Tensor:
    shortest = torch.zeros(len(b.ids), 1)
    shortest[[0, 3, 7]] = (
        1.0  # answers 0 and 3 have 5 tokens, as all right ones of their prompt; 7 has 1, 5 and 6 have 5
    )
    return shortest * kl(b.log_p("privileged_student"), s)


def proxy_kd(b: Logits, s: Tensor) -> Tensor:
    likely = torch.where(scored(b), b.log_y("teacher"), 0.0).sum(1)
    weight = 1 / (1 + torch.exp(-(likely - likely.mean()) / likely.std(correction=0)))
    return -at(s, b.ids) + weight.unsqueeze(1) * kl(b.log_p("teacher"), s)


def proxy_kd_of_a_dataset(b: Logits, s: Tensor) -> Tensor:
    likely = torch.where(scored(b), b.log_y("teacher"), 0.0).sum(1)
    return -at(s, b.ids) + 100 / (1 + torch.exp(-(likely + 9.0) / 4.0)).unsqueeze(1) * kl(b.log_p("teacher"), s)


def garden_of_data(b: Logits, s: Tensor) -> Tensor:
    sure = b.log_y("teacher").exp()
    return (1 - sure) * kl(b.log_p("teacher"), s) - sure * at(s, b.ids)


def garden_of_confidence(b: Logits, s: Tensor) -> Tensor:
    sure = b.log_p("teacher").exp().amax(-1)
    return (1 - sure) * kl(b.log_p("teacher"), s) - sure * at(s, b.ids)


def beta_opsd(b: Logits, s: Tensor) -> Tensor:
    return kl(s, torch.log_softmax(0.5 * b.log_p("reference") + 0.5 * b.log_p("privileged_student"), -1))


def sdpg(b: Logits, s: Tensor) -> Tensor:
    reward = policy_gradient(group_advantage(b), s, b.ids)
    tether = policy_gradient(b.log_y("reference") - at(s, b.ids), s, b.ids)
    return reward + 1e-3 * kl(s, b.log_p("privileged_student")).clamp(max=20) + 1e-3 * tether


def opsd_contrast(b: Logits, s: Tensor, k: int = 4, floor: float = -3.0, clamp: float = 0.05) -> Tensor:
    """As released: outcomes are the top k of the right hint and the rest; the wrong hint is floored on them."""
    right, wrong = b.log_p("privileged_student"), b.log_p("contrast_student")
    ids = top(right, k)
    tilted = 1.5 * with_tail(right, ids) - 0.5 * with_tail(wrong, ids).clamp(min=floor)
    target = tilted - tilted.logsumexp(-1, keepdim=True)
    weight = kl(right, wrong)  # fewer than 100 tokens: the outcomes of the weight are the vocabulary
    return weight / (weight + 1) * (target.exp() * (target - with_tail(s, ids))).clamp(max=clamp).sum(-1)


def ar_opd(b: Logits, s: Tensor) -> Tensor:
    part = b.log_p("partial_student")
    residual = (b.log_p("privileged_student") - part).clamp(-2.0, 2.0)
    return kl(torch.log_softmax(part + 0.6 * residual, -1), s)


def purified_opsd(b: Logits, s: Tensor) -> Tensor:
    base = b.log_p("reference")
    gain = b.log_p("privileged_student") - b.log_p("context_student")
    gain = gain - (base.exp() * gain).sum(-1, keepdim=True)
    return jsd(torch.log_softmax(base + 2.0 * 1.5 * torch.tanh(gain / 1.5), -1), s)


def ad_opsd(b: Logits, s: Tensor) -> Tensor:
    y, with_p = b.log_y("student"), b.log_y("privileged_student")
    u = (1 / (1 + (-y.exp() * (y - with_p) / 0.5).exp())).unsqueeze(-1)
    target = u * b.log_p("reference").exp() + (1 - u) * b.log_p("privileged_student").exp()
    return top_share(b.entropy("student"), b, 0.2) * (target.detach() * (target.log() - s)).sum(-1)


def res_opd(b: Logits, s: Tensor, k: int = 4) -> Tensor:
    """The published gradient, term by term: sum_S p r s + tau_p mu_B + 1[A not in S] (r_A s_A - mu_B)."""
    teacher = b.log_p("teacher")
    ids = top(teacher, k)
    mine, theirs = with_tail(s, ids), with_tail(teacher, ids)
    listed = (mine.detach().exp() * (mine - theirs).detach() * mine).sum(-1)  # tau_p mu_B is its last term
    outside = (ids != b.ids.unsqueeze(-1)).all(-1)
    ratio = at(s, b.ids).detach() - b.log_y("teacher")
    middle = (mine - theirs)[..., -1].detach() * mine[..., -1]
    return listed + outside * (ratio * at(s, b.ids) - middle)


def diffgate(b: Logits, s: Tensor) -> Tensor:
    wrong = (b.rewards < 0.5).double().view(-1, GROUP)
    share = (wrong * wrong.mean(1, keepdim=True)).flatten().unsqueeze(1)
    return policy_gradient(group_advantage(b), s, b.ids) + 0.5 * share * kl(s, b.log_p("teacher")).clamp(max=10.0)


def rg_opd(b: Logits, s: Tensor) -> Tensor:
    a, apart = group_advantage(b), b.log_y("teacher") - b.log_y("student")
    gate = ((a > 0) & (apart > 0.1)) | ((a <= 0) & (apart < -0.1))
    return gate * vanilla_pg(b, s)


FORMULAS: dict[str, tuple[Formula, dict[str, Any]]] = {
    "vanilla": (lambda b, s: kl(s, b.log_p("teacher")), {}),
    "vanilla_pg": (vanilla_pg, {}),
    "gkd": (lambda b, s: jsd(b.log_p("teacher"), s, 0.3), {"beta": 0.3}),
    "exopd": (exopd, {}),
    "veto": (veto, {}),
    "fast_opd": (vanilla_pg, {}),
    "stopgrad_topk": (stopgrad_topk, {"top_k": 4}),
    "bridge_garden": (bridge_garden, {}),
    "opcd": (opcd, {"top_k": 4}),
    "opsd": (lambda b, s: jsd(b.log_p("privileged_student"), s), {}),
    "sdft": (lambda b, s: kl(b.log_p("privileged_student"), s), {}),
    "sft": (lambda b, s: -at(s, b.ids), {}),
    "proxy_kd": (proxy_kd, {}),
    "bridge_garden_off_policy": (garden_of_confidence, {}),
    "sdpo": (self_js_topk, {"top_k": 4}),
    "vision_opd": (self_js_topk, {"top_k": 4}),
    "dapd_entangled": (opsd, {}),
    "feedback": (lambda b, s: kl(s, b.log_p("privileged_student")), {}),
    "eopd": (eopd, {"top_k": 4}),
    "tip": (tip, {}),
    "ta_opd": (ta_opd, {}),
    "reopold": (reopold, {}),
    "tsd_kd": (tsd_kd, {"top_k": 4}),
    "cal_opd": (cal_opd, {}),
    "opsa": (opsa, {}),
    "grpo": (lambda b, s: policy_gradient(group_advantage(b), s, b.ids), {}),
    "uni_opd": (uni_opd, {}),
    "rlsd": (rlsd, {}),
    "rlcsd": (rlcsd, {}),
    "sipo": (sipo, {}),
    "distilled_rl": (distilled_rl, {}),
    "conspo": (conspo, {}),
    "conspo_uniform": (conspo_uniform, {}),
    "dial_opd": (dial_opd, {}),
    "oasis": (oasis, {}),
    "beta_opsd": (beta_opsd, {}),
    "sdpg": (sdpg, {}),
    "opsd_contrast": (opsd_contrast, {"top_k": 4, "wrong_floor": -3.0}),
    "ar_opd": (ar_opd, {"residual": 0.6, "bound": 2.0}),
    "purified_opsd": (purified_opsd, {"beta": 0.5, "bound": 1.5}),
    "ad_opsd": (ad_opsd, {"tau": 0.5}),
    "res_opd": (res_opd, {"top_k": 4}),
    "diffgate": (diffgate, {"weight": 0.5}),
    "rg_opd": (rg_opd, {"margin": 0.1}),
    "privileged_teacher": (lambda b, s: kl(s, b.log_p("privileged_teacher")), {}),
    "privileged_student": (lambda b, s: kl(s, b.log_p("privileged_student")), {}),
    "privileged_both": (lambda b, s: kl(s, b.log_p("teacher")), {}),
}
# DAPD, whose parts are several batches, is tested in the trainer (test_texts_and_views.py).
# DOPD and its ablations are tested against an independent computation in test_loss.py and below.
ROUTED = {name for name in METHODS if dopd.table(name).routed}


def test_every_method_has_a_formula_here() -> None:
    assert set(FORMULAS) | ROUTED | {"vanilla_drop", "dopd_unrouted", "dapd"} == set(METHODS)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMULAS)
def test_rows_have_the_gradient_of_the_published_formula(name: str, seed: int) -> None:
    formula, options = FORMULAS[name]
    batch, table = random_logits(seed), dopd.table(name, **options)
    _, gradient = batch.loss(table, batch.assignment(table))
    leaf = batch.student.clone().requires_grad_()
    mean_over_sequences(formula(batch, torch.log_softmax(leaf, -1)), batch.mask).backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-11)
    assert bool(gradient.any())


# The same with options: what else was published under a name.
VARIANTS: list[tuple[str, Formula, dict[str, Any]]] = [
    (
        "opsd_contrast",
        lambda b, s: opsd_contrast(b, s, floor=-math.inf, clamp=math.inf),
        {"top_k": 4, "wrong_floor": None, "clamp": None},
    ),
    ("opsd", opsd, {"divergence": "forward_kl", "clamp": 0.05}),
    ("sdft", lambda b, s: kl(s, b.log_p("privileged_student")), {"divergence": "reverse_kl"}),
    ("gkd", lambda b, s: jsd(b.log_p("teacher"), s, 0.3), {"beta": 0.3, "lmbda": 0.0}),
    ("proxy_kd", proxy_kd_of_a_dataset, {"alpha": 100.0, "mean": -9.0, "deviation": 4.0}),
    ("bridge_garden_off_policy", garden_of_data, {"weighting": "data"}),
    ("rlcsd", rlcsd_together, {"drop": False, "apart": False}),
    ("conspo", lambda b, s: conspo(b, s, 0.1), {"temperature": 0.1}),
    ("bridge_garden", bridge_garden_by_entropy, {"weighting": "entropy"}),
    (
        "bridge_garden",
        lambda b, s: 0.1 * kl(b.log_p("teacher"), s) - 0.9 * at(s, b.log_p("teacher").argmax(-1)),
        {"weighting": "static"},
    ),
]


@pytest.mark.parametrize(("name", "formula", "options"), VARIANTS)
def test_options_have_the_gradient_of_the_published_formula(
    name: str, formula: Formula, options: dict[str, Any]
) -> None:
    batch, table = random_logits(1), dopd.table(name, **options)
    _, gradient = batch.loss(table, batch.assignment(table))
    leaf = batch.student.clone().requires_grad_()
    mean_over_sequences(formula(batch, torch.log_softmax(leaf, -1)), batch.mask).backward()
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-11)


def test_answers_without_any_push_are_left_out_of_cal_opds_mean() -> None:
    batch = random_logits(4)
    for name in ("teacher", "praised_teacher", "criticised_teacher"):
        batch.views[name][:3] = batch.student[:3]  # inside the band, which is a point
    skipped, plain = (batch.assignment(dopd.table("cal_opd", skip=skip)).advantages[0] for skip in (True, False))
    assert not plain[:3].any() and bool(plain[3:].any())
    torch.testing.assert_close(skipped, plain * 8 / int(plain.any(1).sum()))


DIVERGENCES = [name for name in FORMULAS if all(rule.support != "sampled" for rule in dopd.table(name).rules)]


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in ("stopgrad_topk", "ad_opsd", "res_opd")])
def test_rows_have_the_value_of_the_published_formula(name: str) -> None:
    formula, options = FORMULAS[name]
    batch, table = random_logits(5), dopd.table(name, **options)
    result, _ = batch.loss(table, batch.assignment(table))
    expected = mean_over_sequences(formula(batch, batch.log_p("student")), batch.mask)
    assert float(result.loss.detach()) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize(("drop", "fraction"), [("top", 0.2), ("bottom", 0.4)])
def test_dropped_tokens_are_those_with_the_largest_or_smallest_gaps(drop: str, fraction: float) -> None:
    batch, table = random_logits(1), dopd.table("vanilla_drop", drop=drop, fraction=fraction)
    assignment = batch.assignment(table)
    keep = scored(batch)
    gap = (batch.log_y("privileged_teacher") - batch.log_y("privileged_student")).abs()[keep]
    kept = assignment.factors[0][keep] > 0
    assert int((~kept).sum()) == round(fraction * len(gap))
    largest = gap[kept].max() <= gap[~kept].min() if drop == "top" else gap[kept].min() >= gap[~kept].max()
    assert bool(largest)


def test_random_drop_leaves_out_the_share_that_was_asked_for() -> None:
    batch, table = random_logits(1), dopd.table("vanilla_drop", drop="random", fraction=0.25)
    kept = batch.assignment(table).factors[0][scored(batch)] > 0
    assert int((~kept).sum()) == round(0.25 * len(kept))
    assert not torch.equal(kept, batch.assignment(table).factors[0][scored(batch)] > 0)


def test_ablations_differ_from_dopd_in_what_their_names_say() -> None:
    whole = {rule.label: rule for rule in dopd.table("dopd").rules}
    for name, field, labels in (
        ("dopd_no_student_targets", "source", {"LL", "HS"}),
        ("dopd_no_teacher_targets", "source", {"LH", "HT"}),
        ("dopd_one_divergence", "divergence", {"LH", "LL", "HS"}),
        ("dopd_one_support", "support", {"HT"}),
        ("dopd_no_privilege", "source", set()),
    ):
        changed = {
            (rule.label, item)
            for rule in dopd.table(name).rules
            for item in ("source", "divergence", "support", "top_k", "tail", "weight")
            if getattr(rule, item) != getattr(whole[rule.label], item)
        }
        assert changed == {(label, field) for label in labels}, name
    assert dopd.table("dopd_no_privilege").context == "none"


def test_moving_exponents_and_decaying_mixtures_follow_the_training() -> None:
    batch = random_logits(2)
    veto_table, rlsd_table = dopd.table("veto"), dopd.table("rlsd")
    late, _ = batch.loss(veto_table, batch.assignment(veto_table, progress=1.0))
    assert float(late.loss.detach()) == pytest.approx(
        float(mean_over_sequences(kl(batch.log_p("teacher"), batch.log_p("student")), batch.mask))
    )
    for step, share in ((0, 0.5), (25, 0.25), (50, 0.0), (500, 0.0)):
        advantage = batch.assignment(rlsd_table, step=step).advantages[0]
        size = (
            (group_advantage(batch).sign() * (batch.log_y("privileged_student") - batch.log_y("student")))
            .exp()
            .clamp(0.8, 1.2)
        )
        expected = group_advantage(batch) * (1 - share + share * size)
        torch.testing.assert_close(advantage[scored(batch)], expected[scored(batch)])


def test_rows_without_a_sibling_are_left_out_of_sdpo_and_of_rlcsd() -> None:
    batch = random_logits(3)
    present = torch.ones(len(batch.ids), dtype=torch.bool)
    present[2] = False
    factors = batch.assignment(dopd.table("sdpo"), has_privileged=present).factors[0]
    assert not factors[2].any() and bool((factors[:2][scored(batch)[:2]] == 1).all())
    kept = dopd.table("rlcsd", drop=False, apart=False)
    unshifted = batch.assignment(kept, has_contrast=present).advantages[0]
    torch.testing.assert_close(unshifted[2], group_advantage(batch)[2].double())
    # As published the row is gone, and the two means are over the tokens of the others; its reward stays in its group.
    advantage, shifted, selected = rlcsd_parts(batch)
    selected[2] = False
    left = scored(batch) & ~selected & present.unsqueeze(1)
    lengths, answers = scored(batch).sum(1, keepdim=True), len(batch.ids)
    expected = selected * shifted * answers * lengths / selected.sum()
    expected = expected + left * advantage * answers * lengths / max(int(left.sum()), 1)
    dropped = batch.assignment(dopd.table("rlcsd"), has_contrast=present).advantages[0]
    torch.testing.assert_close(dropped, expected)
    assert not dropped[2].any()
    joint = batch.assignment(dopd.table("rlcsd", apart=False), has_contrast=present).advantages[0]
    torch.testing.assert_close(joint[present], unshifted[present] * 8 / 7)
    assert not joint[2].any()


def test_conspos_margin_grows_and_a_group_without_right_or_wrong_rollouts_has_no_advantage() -> None:
    batch, table = random_logits(3), dopd.table("conspo", temperature=0.1, margin=0.2, warmup=0.5)
    for progress, margin in ((0.0, 0.0), (0.25, 0.1), (0.5, 0.2), (1.0, 0.2)):
        _, gradient = batch.loss(table, batch.assignment(table, progress=progress))
        leaf = batch.student.clone().requires_grad_()
        mean_over_sequences(conspo(batch, torch.log_softmax(leaf, -1), 0.1, margin), batch.mask).backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-11)
    for score in (0.0, 1.0):
        batch.rewards[:GROUP] = score
        for name in ("conspo", "conspo_uniform"):
            advantage = batch.assignment(dopd.table(name)).advantages[0]
            assert not advantage[:GROUP].any() and bool(advantage[GROUP:].any()), name


def test_conspo_as_published_is_nearly_its_control_and_at_a_low_temperature_is_not() -> None:
    batch = random_logits(3)
    limit = batch.assignment(dopd.table("conspo_uniform")).advantages[0][scored(batch)]
    for temperature, near in ((10.0, True), (0.1, False)):
        advantage = batch.assignment(dopd.table("conspo", temperature=temperature)).advantages[0][scored(batch)]
        assert torch.allclose(advantage, limit, rtol=0.1) is near


def test_a_group_of_equal_rewards_has_no_advantage() -> None:
    batch = random_logits(4)
    batch.rewards[:GROUP] = 1.0
    advantages = batch.assignment(dopd.table("grpo")).advantages[0]
    assert not advantages[:GROUP].any() and bool(advantages[GROUP:].any())
    assert not batch.assignment(dopd.table("uni_opd")).advantages[1][:GROUP].any()


def test_end_tokens_that_disagree_are_scored_as_one_outcome() -> None:
    """Teacher and student end answers with different tokens: alone, the student's is pushed away; merged, it is not."""
    ends, ids = [0, 1], torch.zeros(1, 1, dtype=torch.long)
    student = torch.tensor([[[0.5, 0.1, 0.4]]], dtype=torch.float64).log()
    teacher = torch.tensor([[[0.01, 0.59, 0.4]]], dtype=torch.float64).log()
    table, mask = dopd.table("vanilla_pg", merge_ends=True), torch.ones(1, 1)
    for merged, expected in (([], math.log(0.5 / 0.01)), (ends, 0.0)):
        leaf = student.clone().requires_grad_()
        result = dopd.routed_loss(leaf, {"teacher": teacher}, ids, mask, table, merged_ids=merged)
        assert float(result.loss.detach()) == pytest.approx(expected, abs=1e-12)
        result.loss.backward()
        assert leaf.grad is not None and bool((leaf.grad.abs() > 1e-9).any()) == (expected != 0.0)
    with pytest.raises(ConfigError, match="merge_ends scores the sampled token alone"):
        dopd.RoutingTable.from_dicts([{"source": "teacher"}], merge_ends=True)
