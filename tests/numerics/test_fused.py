"""The fused loss against the reference on logits: values, statistics and every gradient, whatever the table or chunk.

Shapes: B sequences, T completion tokens, H hidden size, V vocabulary.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from fused_kit import RULES, assert_same, make_case, one_rule
from torch import Tensor, nn

from dopd import divergences
from dopd.assignment import Assignment
from dopd.errors import ConfigError, ScoringError
from dopd.fused import TokenScores, fused_routed_loss, products, score_tokens
from dopd.fused.products import LOG_ZERO
from dopd.fused.supports import topk_ids
from dopd.heads import Head
from dopd.methods import table as method
from dopd.routing import Regime
from dopd.tables import RoutingTable

SOURCES = ("teacher", "privileged_teacher", "privileged_student")


@pytest.mark.parametrize(("kind", "support", "tail"), RULES)
def test_every_rule_agrees_with_the_reference(kind: str, support: str, tail: str) -> None:
    table = one_rule(kind, support, tail)
    for head in ({}, {"logit_scale": 0.6, "softcap": 4.0, "temperature": 1.3}):
        case = make_case(**head)
        reference = case.run(table, "reference", upstream=-2.5)
        scores = {"teacher": score_tokens(*case.targets["teacher"], case.ids, case.mask)}
        for chunk_tokens in (1, 3, 1000, None):
            assert_same(case.run(table, "chunked", upstream=-2.5, chunk_tokens=chunk_tokens), reference)
        assert_same(case.run(table, "chunked", upstream=-2.5, scores=scores, chunk_tokens=4), reference)


@pytest.mark.parametrize(("kind", "support", "tail"), RULES)
def test_every_rule_agrees_where_only_columns_are_touched(kind: str, support: str, tail: str) -> None:
    # V is large beside K: gathered columns of the target, sparse gradients, two-step selection of the support.
    case = make_case((2, 4, 3, 1601), spread=2.0)
    table = one_rule(kind, support, tail, top_k=3)
    scores = {"teacher": score_tokens(*case.targets["teacher"], case.ids, case.mask)}
    reference = case.run(table, "reference")
    assert_same(case.run(table, "chunked"), reference)
    assert_same(case.run(table, "chunked", scores=scores, chunk_tokens=2), reference)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("shape", [(2, 2, 1, 2), (3, 7, 5, 97), (2, 13, 9, 1543)])
def test_dopd_and_its_relatives_at_odd_shapes(shape: tuple[int, int, int, int], tail: str) -> None:
    case = make_case(shape)
    for top_k in (2, 5, shape[-1] + 4):
        table = method("dopd", top_k=top_k, tail=tail)
        reference = case.run(table, "reference")
        for chunk_tokens in (1, 4, None):
            assert_same(case.run(table, "chunked", chunk_tokens=chunk_tokens), reference)


def test_regimes_and_denominator_can_be_given() -> None:
    case, table = make_case(), method("dopd", top_k=4)
    regimes = torch.randint(len(Regime), case.mask.shape).masked_fill(case.mask == 0, -1)
    regimes[regimes == Regime.LL] = Regime.HT  # an empty regime
    options: dict[str, Any] = {"assignment": Assignment(regimes, torch.rand(regimes.shape)), "num_sequences": 17.0}
    assert_same(case.run(table, "chunked", chunk_tokens=3, **options), case.run(table, "reference", **options))


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    case, table = make_case(), method("dopd", top_k=4)
    whole = case.run(table, "chunked")
    scores = {source: score_tokens(*case.targets[source], case.ids, case.mask) for source in table.sources}
    gap = torch.rand(case.mask.shape)
    total = [torch.zeros_like(grad) for grad in whole.grads if grad is not None]
    for row in range(len(case.mask)):
        part = slice(row, row + 1)
        hidden = case.hidden[part].detach().requires_grad_()
        targets = {source: (states[part], head) for source, (states, head) in case.targets.items()}
        micro = replace(case, hidden=hidden, targets=targets, ids=case.ids[part], mask=case.mask[part])
        run = micro.run(
            table,
            "chunked",
            assignment=Assignment(whole.result.regimes[part], gap[part]),
            num_sequences=float((case.mask != 0).any(1).sum()),
            scores={source: _part(given, part) for source, given in scores.items()},
        )
        total[0][part] += run.grads[0]
        for index in (1, 2):
            total[index] += run.grads[index]
    for mine, theirs in zip(total, whole.grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def _part(scores: TokenScores, part: slice) -> TokenScores:
    return TokenScores(scores.logprobs[part], scores.entropy[part], scores.logsumexp[part])


def test_weight_zero_rows_teach_nothing_but_are_counted() -> None:
    rules = [
        replace(rule, weight=0.0 if rule.regime in (Regime.HT, Regime.LL) else 1.0) for rule in method("dopd").rules
    ]
    case, table = make_case(), RoutingTable(name="two", rules=tuple(rules))
    assert_same(case.run(table, "chunked", chunk_tokens=3), case.run(table, "reference"))


def test_a_source_for_routing_alone_may_come_as_scores() -> None:
    rules = [replace(rule, source="privileged_teacher") for rule in method("dopd", top_k=4).rules]
    case, table = make_case(), RoutingTable(name="teacher only", rules=tuple(rules))
    reference = case.run(table, "reference")
    scores = {source: score_tokens(*case.targets[source], case.ids, case.mask) for source in table.sources}
    del case.targets["privileged_student"]
    assert_same(case.run(table, "chunked", scores=scores), reference)
    with pytest.raises(ConfigError, match="privileged_student"):
        case.run(table, "chunked")


def test_a_batch_without_scored_tokens() -> None:
    case = make_case()
    case.mask.zero_()
    run = case.run(method("dopd"), "chunked")
    assert float(run.result.loss.detach()) == 0.0
    assert all(grad is not None and not grad.any() for grad in run.grads)
    scores = score_tokens(case.hidden, case.head, case.ids, case.mask)
    assert not scores.logprobs.any() and not scores.entropy.any()


def test_tied_head_gets_both_gradients() -> None:
    table, gradients = one_rule("js", "full", "bucket"), []
    case = make_case()
    for backend in ("reference", "chunked"):
        weight = case.head.weight.detach().clone().requires_grad_()
        hidden = nn.functional.embedding(case.ids % len(weight), weight).tanh()
        result = fused_routed_loss(hidden, weight, case.targets, case.ids, case.mask, table, backend=backend)
        result.loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-14)


def test_only_the_head_trains() -> None:
    case, table = make_case(), method("dopd", top_k=4)
    case.hidden.requires_grad_(False)
    assert_same(case.run(table, "chunked"), case.run(table, "reference"))


def test_backward_twice_and_another_factor() -> None:
    case, table = make_case(), method("dopd", top_k=4)
    once = case.run(table, "chunked")
    result = fused_routed_loss(case.hidden, case.head, case.targets, case.ids, case.mask, table)
    first = torch.autograd.grad(result.loss, case.hidden, retain_graph=True)[0]
    again = torch.autograd.grad((result.loss**2).log() * 3, case.hidden)[0]
    torch.testing.assert_close(first, once.grads[0])
    torch.testing.assert_close(again, 6 / result.loss.detach() * first)


DIFFERENTIABLE = [r for r in RULES if r[1] in ("full", "student_topk") and r[0] != "reverse_kl_detached"]


@pytest.mark.parametrize(("kind", "support", "tail"), DIFFERENTIABLE)
def test_gradcheck(kind: str, support: str, tail: str) -> None:
    case = make_case((2, 2, 3, 11), softcap=6.0)
    table = one_rule(kind, support, tail, top_k=4)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        head = replace(case.head, weight=weight, bias=bias)
        return fused_routed_loss(hidden, head, case.targets, case.ids, case.mask, table, chunk_tokens=1).loss

    assert torch.autograd.gradcheck(loss, (case.hidden, case.head.weight, case.head.bias))


def test_forbidden_tokens_by_a_bias_of_minus_infinity() -> None:
    case = make_case()
    forbidden = torch.arange(61) % 3 == 0
    bias = case.head.bias.detach().masked_fill(forbidden, -torch.inf)
    case.ids[:] = 1
    for source, (hidden, head) in case.targets.items():
        case.targets[source] = (hidden, replace(head, bias=bias))
    case.head = replace(case.head, bias=bias)
    for kind, support, tail in RULES:
        table = one_rule(kind, support, tail, top_k=40)
        ours, reference = case.run(table, "chunked"), case.run(table, "reference")
        torch.testing.assert_close(ours.result.loss.detach(), reference.result.loss.detach())
        assert bool(torch.isfinite(ours.grads[0]).all()), (kind, support, tail)
        torch.testing.assert_close(ours.result.sums["entropy"], reference.result.sums["entropy"])


@pytest.mark.parametrize("who", ["student", "target"])
@pytest.mark.parametrize(("kind", "support", "tail"), RULES)
def test_what_one_side_alone_forbids_is_as_far_as_the_reference_says(
    kind: str, support: str, tail: str, who: str
) -> None:
    case = make_case()
    forbidden = torch.zeros(61, dtype=torch.bool)
    forbidden[:3] = True
    case.ids[:] = 5
    if who == "student":
        case.head = replace(case.head, bias=case.head.bias.detach().masked_fill(forbidden, -torch.inf))
    else:
        hidden, head = case.targets["teacher"]
        case.targets["teacher"] = (
            hidden,
            replace(head, bias=torch.zeros(61).to(hidden).masked_fill(forbidden, -torch.inf)),
        )
    table = one_rule(kind, support, tail, top_k=61)
    batch = (case.hidden, case.head, case.targets, case.ids, case.mask, table)
    with torch.no_grad():
        found, expected = (fused_routed_loss(*batch, backend=backend) for backend in ("chunked", "reference"))
    # The reference may say NaN (inf - inf), or as much as a float holds: both must stop a run, or neither.
    impossible = ~(expected.per_token.abs() < 1e30)
    assert torch.equal(impossible, ~found.per_token.isfinite())
    torch.testing.assert_close(found.per_token[~impossible], expected.per_token[~impossible])
    assert bool(impossible.any()) == (not bool(found.loss.isfinite()))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("wrong", [-100, -1, 61])
def test_a_scored_id_outside_the_vocabulary_is_refused(backend: str, wrong: int) -> None:
    case = make_case()
    row, column = case.mask.nonzero()[0].tolist()
    case.ids[row, column] = wrong
    with pytest.raises(ConfigError, match=rf"1 scored ids are outside the vocabulary \[0, 61\), first {wrong}"):
        case.run(one_rule("reverse_kl", "full", "bucket"), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gradients_of_logits_are_in_the_range_of_float16_whatever_the_batch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the product with the head takes them in the head's dtype; here what is handed to it is looked at."""
    case = make_case(dtype=dtype)
    handed = []
    product = products.dense_hidden_grad

    def looked_at(grad: Tensor, head: Head) -> Tensor:
        handed.append(grad.clone())
        return product(grad, head)

    monkeypatch.setattr(products, "dense_hidden_grad", looked_at)
    table = one_rule("reverse_kl", "full", "bucket")
    ours = case.run(table, "chunked", upstream=2.0**16, num_sequences=2.0**20)
    if dtype == torch.float16:
        assert handed and all(bool((grad.to(dtype) != 0).float().mean() > 0.9) for grad in handed)
    reference = case.run(table, "reference", num_sequences=4.0)
    for found, expected in zip(ours.grads, reference.grads, strict=True):
        assert found is not None and expected is not None
        scale = 2.0**16 * 4.0 / 2.0**20
        torch.testing.assert_close(found.double(), expected.double() * scale, rtol=2e-2, atol=2e-3 * scale)


def test_a_mass_lost_in_rounding_is_summed_instead() -> None:
    # The target is a sharpened student: 1 - (mass of K columns) is lost in float32, and the student's rest weighs it.
    # So many tokens of the vocabulary that the target is asked for the K columns alone.
    case = make_case((3, 6, 4, 20 * products.CPU_SPARSE_RATIO), dtype=torch.float32, bias=False)
    case.targets["teacher"] = (9.0 * case.hidden.detach(), Head(case.head.weight.detach()))
    table = one_rule("reverse_kl", "student_topk", "bucket", top_k=20)
    scores = {"teacher": score_tokens(*case.targets["teacher"], case.ids, case.mask)}
    assert_same(case.run(table, "chunked", scores=scores), case.run(table, "reference"), tolerance=2e-4)


def test_scores_agree_with_the_logits() -> None:
    for head in ({}, {"logit_scale": 0.6, "softcap": 4.0, "temperature": 1.3}):
        case = make_case(**head)
        keep = case.mask != 0
        logits = case.head.logits(case.hidden).detach()
        log_p = logits.log_softmax(-1)[keep]
        for chunk_tokens in (1, 3, None):
            scores = score_tokens(case.hidden, case.head, case.ids, case.mask, chunk_tokens=chunk_tokens)
            torch.testing.assert_close(scores.logprobs[keep], divergences.pick(log_p, case.ids[keep]))
            torch.testing.assert_close(scores.entropy[keep], -(log_p.exp() * log_p).sum(-1))
            torch.testing.assert_close(scores.logsumexp[keep], logits[keep].logsumexp(-1))
            assert not scores.logprobs[~keep].any()


def test_two_step_selection_finds_the_largest() -> None:
    logits = torch.randn(5, 64 * 50 + 13).double()
    logits[0, -13:] += 9.0  # the edge that fills no block
    logits[1, 640:700] += 9.0  # more large ones in a block than there are blocks to take
    logits[2].fill_(LOG_ZERO)
    for k in (1, 7, 12):
        chosen = logits.gather(1, topk_ids(logits, k)).sort(-1).values
        torch.testing.assert_close(chosen, logits.topk(k).values.sort(-1).values)


def test_a_dead_source_is_named() -> None:
    case = make_case()
    case.targets["privileged_teacher"][0][0, 0, 0] = torch.nan
    with pytest.raises(ScoringError, match="not finite"):
        case.run(method("dopd"), "chunked")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, "backend"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"backend": "triton"}, "needs CUDA tensors.*use backend='chunked'"),
        ({"scores": {"teacher": TokenScores(torch.zeros(1, 2), torch.zeros(1, 2))}}, "scores"),
    ],
)
def test_bad_options_are_refused(change: dict[str, Any], message: str) -> None:
    case = make_case()
    with pytest.raises(ConfigError, match=message):
        case.run(method("vanilla"), **({"backend": "chunked"} | change))


def test_shapes_that_differ_are_refused() -> None:
    case, table = make_case(), method("vanilla")
    hidden, head = case.targets["teacher"]
    for name, pair in {
        "H": (hidden[..., 1:], head),
        "V": (hidden, Head(head.weight[1:])),
        "T": (hidden[:, 1:], head),
    }.items():
        with pytest.raises(ConfigError, match=r"targets\['teacher'\]"):
            replace(case, targets={"teacher": pair}).run(table, "chunked")
            pytest.fail(name)


def test_inside_a_compiled_function() -> None:
    case, table = make_case(), method("dopd", top_k=4)
    plain = case.run(table, "chunked")

    @torch.compile(backend="eager")
    def step(hidden: Tensor) -> Tensor:
        scaled = hidden * 1.0
        return fused_routed_loss(scaled, case.head, case.targets, case.ids, case.mask, table).loss * 2

    case.hidden.grad = None
    step(case.hidden).backward()
    torch.testing.assert_close(case.hidden.grad, 2 * plain.grads[0])
