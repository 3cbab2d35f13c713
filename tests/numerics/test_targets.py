"""Products of sources with bounds, outcomes of one source, and the sampled tail: against plain Python floats, and the
fused loss against the reference.
"""

import math
from typing import Any

import pytest
import torch
from fused_kit import DOUBLE, Case, assert_same, make_case
from independent import central_differences, divergence, kl, softmax, top

import dopd
from dopd.errors import ConfigError
from dopd.fused import TokenScores, TopLogprobs, score_tokens
from dopd.loss import rule_divergence
from dopd.rules import Rule
from dopd.sources import SOURCES

# A bounded ratio, a centred and squashed one, a floor, and one whose power moves and that reads the student itself.
RATIO = {"teacher": 1.0, "privileged_teacher": {"power": 0.8, "over": "teacher", "clip": [-1, 2]}}
SQUASHED = {
    "reference": 1.0,
    "privileged_student": {"power": 2.0, "over": "contrast_student", "centre": True, "squash": 1.5},
}
FLOOR = {"privileged_student": 1.5, "contrast_student": {"power": -0.5, "clip": [-2, None]}}
MOVING = {
    "teacher": 1.0,
    "student": {"power": {"start": 1.0, "end": 0.2}, "over": "privileged_teacher", "clip": [-1, 1]},
}
VOCAB = 7
LOGITS = {
    name: [1.7 * math.sin(1.3 * (place + 1) * (number + 2) + number) for place in range(VOCAB)]
    for number, name in enumerate(SOURCES)
}


def logs(p: list[float]) -> list[float]:
    return [math.log(value) for value in p]


def ratio_target(p: dict[str, list[float]]) -> list[float]:
    base, full = logs(p["teacher"]), logs(p["privileged_teacher"])
    return softmax([a + 0.8 * min(max(b - a, -1.0), 2.0) for a, b in zip(base, full, strict=True)])


def squashed_target(p: dict[str, list[float]]) -> list[float]:
    base = p["reference"]
    gain = [a - b for a, b in zip(logs(p["privileged_student"]), logs(p["contrast_student"]), strict=True)]
    mean = math.fsum(a * b for a, b in zip(base, gain, strict=True)) / math.fsum(base)
    bounded = [1.5 * math.tanh((value - mean) / 1.5) for value in gain]
    return softmax([a + 2.0 * b for a, b in zip(logs(base), bounded, strict=True)])


def floor_target(p: dict[str, list[float]]) -> list[float]:
    right, wrong = logs(p["privileged_student"]), logs(p["contrast_student"])
    return softmax([1.5 * a - 0.5 * max(b, -2.0) for a, b in zip(right, wrong, strict=True)])


TARGETS = [(RATIO, ratio_target), (SQUASHED, squashed_target), (FLOOR, floor_target)]


def one_token(rule: Rule, student: list[float], sampled: int = 0, progress: float = 0.0) -> tuple[float, list[float]]:
    """Value and gradient of a rule at one token, by the reference."""
    leaf = torch.tensor([student], dtype=DOUBLE, requires_grad=True)
    targets = {name: torch.tensor([LOGITS[name]], dtype=DOUBLE) for name in rule.target_names}
    value = rule_divergence(rule, leaf, targets, torch.tensor([sampled]), progress=progress)
    value.sum().backward()
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad[0].tolist()


@pytest.mark.parametrize(("source", "target"), TARGETS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_bounded_products_are_what_plain_floats_make_of_them(source: Any, target: Any, kind: str) -> None:
    t = target({name: softmax(logits) for name, logits in LOGITS.items()})
    value, gradient = one_token(Rule(source=source, divergence=kind), LOGITS["student"])
    assert value == pytest.approx(divergence(softmax(LOGITS["student"]), t, kind), rel=1e-10)
    expected = central_differences(lambda z: divergence(softmax(z), t, kind), LOGITS["student"])
    assert gradient == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
@pytest.mark.parametrize(("source", "target"), TARGETS)
def test_a_product_over_the_outcomes_of_one_source(source: Any, target: Any, tail: str) -> None:
    """The K tokens of one source and what is left: every source is taken to these outcomes before the product."""
    of = next(iter(source))
    p = {name: softmax(logits) for name, logits in LOGITS.items()}
    keep = top(p[of], 3)

    def listed(q: list[float]) -> list[float]:
        inside = [q[i] for i in keep]
        total = math.fsum(inside)
        return [value / total for value in inside] if tail == "renormalize" else [*inside, 1.0 - total]

    t = target({name: listed(q) for name, q in p.items()})

    def loss(z: list[float]) -> float:
        terms = [a * math.log(a / b) for a, b in zip(t, listed(softmax(z)), strict=True)]
        return math.fsum(terms[:-1] if tail == "truncate" else terms)

    rule = Rule(source=source, divergence="forward_kl", support="target_topk", tail=tail, top_k=3, outcomes_of=of)
    value, gradient = one_token(rule, LOGITS["student"])
    assert value == pytest.approx(loss(LOGITS["student"]), rel=1e-10)
    assert gradient == pytest.approx(central_differences(loss, LOGITS["student"]), abs=1e-8)


@pytest.mark.parametrize("support", ["target_topk", "student_topk"])
def test_sampled_tail_is_the_published_gradient_and_its_mean_is_that_of_the_whole_vocabulary(support: str) -> None:
    """ResOPD: sum_S p r s + tau_p mu_B + 1[A not in S] (r_A s_A - mu_B), mu_B = log(tau_p / tau_q) grad log tau_p."""
    rule = Rule(source="teacher", support=support, tail="sampled", top_k=3)
    p, q = softmax(LOGITS["student"]), softmax(LOGITS["teacher"])
    inside = top(q if support == "target_topk" else p, 3)
    tau_p, tau_q = (1.0 - math.fsum(v[i] for i in inside) for v in (p, q))
    r = [math.log(a / b) for a, b in zip(p, q, strict=True)]
    score = [[(1.0 if v == w else 0.0) - p[w] for w in range(VOCAB)] for v in range(VOCAB)]  # grad log p_v
    rest = [(0.0 if w in inside else p[w] / tau_p) - p[w] for w in range(VOCAB)]  # grad log tau_p
    middle = [math.log(tau_p / tau_q) * value for value in rest]
    values, gradients = [], []
    for token in range(VOCAB):
        value, gradient = one_token(rule, LOGITS["student"], sampled=token)
        expected = [
            math.fsum(p[v] * r[v] * score[v][w] for v in inside)
            + tau_p * middle[w]
            + (0.0 if token in inside else r[token] * score[token][w] - middle[w])
            for w in range(VOCAB)
        ]
        assert gradient == pytest.approx(expected, abs=1e-12)
        values.append(value)
        gradients.append(gradient)
    assert math.fsum(a * b for a, b in zip(p, values, strict=True)) == pytest.approx(kl(p, q), rel=1e-10)
    mean = [math.fsum(p[t] * gradients[t][w] for t in range(VOCAB)) for w in range(VOCAB)]
    assert mean == pytest.approx(central_differences(lambda z: kl(softmax(z), q), LOGITS["student"]), abs=1e-8)


@pytest.mark.parametrize("kind", ["forward_kl", "js"])
def test_sampled_tail_has_the_mean_of_the_whole_divergence_for_other_divergences(kind: str) -> None:
    rule = Rule(source=RATIO, divergence=kind, support="target_topk", tail="sampled", top_k=2)
    p = softmax(LOGITS["student"])
    t = ratio_target({name: softmax(logits) for name, logits in LOGITS.items()})
    each = [one_token(rule, LOGITS["student"], sampled=token) for token in range(VOCAB)]
    value = math.fsum(a * one for a, (one, _) in zip(p, each, strict=True))
    assert value == pytest.approx(divergence(p, t, kind), rel=1e-10)
    mean = [math.fsum(a * g[w] for a, (_, g) in zip(p, each, strict=True)) for w in range(VOCAB)]
    expected = central_differences(lambda z: divergence(softmax(z), t, kind), LOGITS["student"])
    assert mean == pytest.approx(expected, abs=1e-8)


def test_powers_of_bounded_factors_move_with_the_training() -> None:
    p = {name: softmax(logits) for name, logits in LOGITS.items()}
    for progress, power in ((0.0, 1.0), (0.5, 0.6), (1.0, 0.2)):
        gain = [a - b for a, b in zip(logs(p["student"]), logs(p["privileged_teacher"]), strict=True)]
        bounded = [a + power * min(max(b, -1.0), 1.0) for a, b in zip(logs(p["teacher"]), gain, strict=True)]
        rule = Rule(source=MOVING, divergence="forward_kl")
        value, _ = one_token(rule, LOGITS["student"], progress=progress)
        assert value == pytest.approx(kl(softmax(bounded), p["student"]), rel=1e-10)


def every_source(case: Case) -> Case:
    teacher_head = case.targets["teacher"][1]
    for source, spec in SOURCES.items():
        head = teacher_head if spec.model == "teacher" else case.head
        case.targets[source] = (torch.randn(*case.mask.shape, head.weight.shape[1], dtype=DOUBLE), head)
    return case


def rules_of(source: Any) -> list[Rule]:
    rules = [Rule(source=source, divergence=kind) for kind in ("forward_kl", "reverse_kl", "js")]
    options: dict[str, Any] = {"source": source, "support": "target_topk"}
    rules += [
        Rule(**options, tail=tail, top_k=k, outcomes_of=next(iter(source)))
        for tail in ("bucket", "renormalize", "truncate")
        for k in (5, 60, 200)
    ]
    rules += [Rule(**options, tail="sampled", top_k=k) for k in (1, 5, 200)]
    rules += [Rule(source=source, support="student_topk", tail=tail, top_k=5) for tail in ("bucket", "sampled")]
    return rules + ([] if source is SQUASHED else [Rule(source=source, support="sampled")])


@pytest.mark.parametrize(("source", "softcap"), [(RATIO, None), (SQUASHED, 6.0), (FLOOR, 6.0), (MOVING, None)])
def test_the_fused_loss_agrees_with_the_reference_on_bounded_targets(source: Any, softcap: float | None) -> None:
    case = every_source(make_case((3, 5, 6, 61), softcap=softcap, temperature=1.3))
    forbidden = case.targets["privileged_teacher"][1]
    bias = torch.zeros(61, dtype=DOUBLE)
    bias[[3, 17]] = -math.inf  # what a source rules out is at its bound, or ruled out
    if softcap is None:
        case.targets["privileged_teacher"] = (
            case.targets["privileged_teacher"][0],
            dopd.heads.Head(forbidden.weight, bias, temperature=1.3),
        )
    for rule in rules_of(source):
        table = dopd.RoutingTable(name="x", rules=(rule,))
        reference = case.run(table, "reference", upstream=1.7)
        scores = {name: score_tokens(*case.targets[name], case.ids, case.mask) for name in table.target_sources}
        for options in ({}, {"chunk_tokens": 3}, {"chunk_tokens": 4, "scores": scores}):
            assert_same(case.run(table, "chunked", upstream=1.7, **options), reference, 1e-9)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("support", ["target_topk", "student_topk"])
def test_the_fused_loss_agrees_with_the_reference_on_the_sampled_tail(kind: str, support: str) -> None:
    case = make_case((3, 5, 6, 400), softcap=5.0)
    for k in (1, 5, 399, 400):
        rule = Rule(source="teacher", divergence=kind, support=support, tail="sampled", top_k=k, weight=0.7)
        table = dopd.RoutingTable(name="x", rules=(rule,))
        reference = case.run(table, "reference")
        scores = {"teacher": score_tokens(*case.targets["teacher"], case.ids, case.mask)}
        for options in ({}, {"chunk_tokens": 3}, {"chunk_tokens": 4, "scores": scores}):
            assert_same(case.run(table, "chunked", **options), reference, 1e-9)
        if support == "target_topk" and k < 399:  # from a list of log-probs, as a server gives them
            hidden, head = case.targets["teacher"]
            log_t = torch.log_softmax(head.logits(hidden), -1)
            found = log_t.topk(7, dim=-1)
            listed = TokenScores(scores["teacher"].logprobs, None, None, TopLogprobs(found.indices, found.values))
            kept, case.targets = case.targets, {}
            assert_same(case.run(table, "chunked", chunk_tokens=4, scores={"teacher": listed}), reference, 1e-9)
            case.targets = kept


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"source": {"teacher": 1, "reference": {"over": "teacher"}}}, "takes power, and besides over"),
    ({"source": {"teacher": 1, "reference": {"power": 1, "bound": 2}}}, "takes power, and besides over"),
    ({"source": {"teacher": 1, "reference": {"power": 1, "over": "teacher"}}}, "needs clip: .* or squash"),
    ({"source": {"teacher": 1, "reference": {"power": 1, "over": "reference", "squash": 1}}}, "another source"),
    ({"source": {"teacher": 1, "reference": {"power": 1, "over": "taecher", "squash": 1}}}, "must be one of"),
    ({"source": {"teacher": {"power": 1, "centre": True}}}, "needs clip or squash"),
    ({"source": {"teacher": {"power": 1, "squash": 0}}}, "must be above 0"),
    ({"source": {"teacher": {"power": 1, "clip": [1, 1]}}}, "lowest value below its highest"),
    ({"source": {"teacher": {"power": 1, "clip": 5}}}, "must be a pair"),
    (
        {"source": {"reference": {"power": 1, "over": "teacher", "squash": 1}}},
        "must sum to more than 0 .*'over' do not count",
    ),
    ({"source": SQUASHED, "support": "sampled"}, "centre takes a mean over the vocabulary"),
    ({"source": "teacher", "support": "target_topk", "outcomes_of": "teacher"}, "one of the sources of a product"),
    ({"source": FLOOR, "support": "target_topk", "outcomes_of": "teacher"}, "one of the sources of a product"),
    ({"source": FLOOR, "outcomes_of": "contrast_student"}, "support='target_topk' takes"),
    ({"source": "teacher", "support": "target_topk", "tail": "sampled", "cap": 2.0}, "leave clamp and cap out"),
    (
        {"source": "teacher", "divergence": "list_mle", "support": "target_topk", "tail": "sampled"},
        "tail='sampled' estimates",
    ),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_targets_that_cannot_work_are_refused_when_they_are_made(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Rule(**options)


@pytest.mark.parametrize("source", [RATIO, SQUASHED, FLOOR, MOVING])
def test_bounded_targets_survive_yaml(source: Any) -> None:
    rule = Rule(source=source, support="target_topk", outcomes_of=next(iter(source)))
    table = dopd.RoutingTable(name="x", rules=(rule,))
    again = dopd.RoutingTable.from_dicts(table.to_dicts(), name="x")
    assert again.rules[0].target == rule.target and again.rules[0].outcomes_of == rule.outcomes_of
    assert all(name in table.describe() for name in source)
