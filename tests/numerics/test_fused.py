"""The fused loss against the reference on logits: values, statistics and every gradient, whatever the table or chunk.

Shapes: B sequences, T completion tokens, H hidden size, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from methods_kit import random_logits
from torch import Tensor, nn

from dopd import divergences
from dopd.assignment import Assignment
from dopd.errors import ConfigError, ScoringError
from dopd.fused import TokenScores, fused_routed_loss, score_tokens
from dopd.fused.products import LOG_ZERO
from dopd.fused.supports import topk_ids
from dopd.heads import Head
from dopd.loss import RoutedLoss
from dopd.methods import METHODS
from dopd.methods import table as method
from dopd.routing import Regime
from dopd.rules import Rule
from dopd.sources import SOURCES as SOURCE_SPECS
from dopd.tables import RoutingTable

DOUBLE = torch.float64
SOURCES = ("teacher", "privileged_teacher", "privileged_student")
SUPPORTS = [
    ("full", "bucket"),
    ("student_topk", "bucket"),
    ("student_topk", "renormalize"),
    ("target_topk", "bucket"),
    ("target_topk", "renormalize"),
    ("student_topk", "truncate"),
    ("target_topk", "truncate"),
]
RULES = [(kind, support, tail) for kind in divergences.DIVERGENCES for support, tail in SUPPORTS]
RULES += [(kind, "sampled", "bucket") for kind in ("reverse_kl", "forward_kl", "js")]


@dataclass
class Case:
    """Hidden states, heads, tokens and a mask with padding, an empty sequence and an id outside the vocabulary."""

    hidden: Tensor
    head: Head
    targets: dict[str, tuple[Tensor, Head]]
    ids: Tensor
    mask: Tensor

    def run(self, table: RoutingTable, backend: str, upstream: float = 1.0, **options: Any) -> "Run":
        leaves = [tensor for tensor in (self.hidden, self.head.weight, self.head.bias) if tensor is not None]
        for leaf in leaves:
            leaf.grad = None
        result = fused_routed_loss(
            self.hidden, self.head, self.targets, self.ids, self.mask, table, backend=backend, **options
        )
        (result.loss * upstream).backward()
        return Run(result, [leaf.grad for leaf in leaves])


@dataclass
class Run:
    result: RoutedLoss
    grads: list[Tensor | None]


def make_case(
    shape: tuple[int, int, int, int] = (4, 5, 6, 61),
    *,
    dtype: torch.dtype = DOUBLE,
    bias: bool = True,
    spread: float = 1.0,
    **head: Any,
) -> Case:
    B, T, H, V = shape
    weight = (spread * torch.randn(V, H, dtype=DOUBLE)).to(dtype).requires_grad_()
    bias_V = torch.randn(V, dtype=DOUBLE).to(dtype).requires_grad_() if bias else None
    student_head = Head(weight, bias_V, **head)
    teacher_head = Head((spread * torch.randn(V, H + 3, dtype=DOUBLE)).to(dtype), **head)

    def hidden(size: int) -> Tensor:
        return torch.randn(B, T, size, dtype=DOUBLE).to(dtype)

    ids, mask = torch.randint(V, (B, T)), torch.ones(B, T, dtype=torch.long)
    mask[0, T // 2 :] = 0
    mask[-1] = 0
    ids[mask == 0] = V + 7
    targets = {"teacher": (hidden(H + 3), teacher_head), "privileged_teacher": (hidden(H + 3), teacher_head)}
    targets["privileged_student"] = (hidden(H), student_head)
    return Case(hidden(H).requires_grad_(), student_head, targets, ids, mask)


def one_rule(kind: str, support: str, tail: str, top_k: int = 5, weight: float = 0.7) -> RoutingTable:
    source = None if kind in divergences.WITHOUT_TARGET else "teacher"
    rule = Rule(source=source, divergence=kind, support=support, tail=tail, top_k=top_k, weight=weight)
    return RoutingTable(name="one", rules=(rule,))


def assert_same(ours: Run, reference: Run, tolerance: float = 1e-10) -> None:
    a, b = ours.result, reference.result
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    assert torch.equal(a.regimes, b.regimes)
    torch.testing.assert_close(a.loss.detach(), b.loss.detach(), **close)
    torch.testing.assert_close(a.per_token, b.per_token.detach(), **close)
    assert a.sums.keys() == b.sums.keys()
    for name, value in b.sums.items():
        torch.testing.assert_close(torch.as_tensor(a.sums[name]), torch.as_tensor(value), **close, msg=name)
    for mine, theirs in zip(ours.grads, reference.grads, strict=True):
        if mine is None or theirs is None:  # nothing reaches a leaf: None in one, zeros in the other
            present = theirs if mine is None else mine
            assert present is None or not present.any()
            continue
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, **close)


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


def every_source(case: Case) -> None:
    """Give the case hidden states and heads for all sources that there are, in place."""
    teacher_head = case.targets["teacher"][1]
    for source, spec in SOURCE_SPECS.items():
        head = teacher_head if spec.model == "teacher" else case.head
        case.targets[source] = (torch.randn(*case.mask.shape, head.weight.shape[1], dtype=DOUBLE), head)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_agrees_with_the_reference(name: str) -> None:
    """Rows that add up, products of sources, selections, scales and advantages, whatever the chunk."""
    table, logits = method(name), random_logits(3, tokens=4, vocab=61)
    case = make_case((8, 4, 6, 61), softcap=6.0)
    case.mask, case.ids = logits.mask, torch.where(logits.mask != 0, logits.ids, 61 + 7)
    every_source(case)
    case.targets = {source: case.targets[source] for source in table.target_sources}
    assignment = logits.assignment(table, progress=0.25, step=10)
    reference = case.run(table, "reference", assignment=assignment, upstream=1.7)
    scores = {source: score_tokens(*pair, case.ids, case.mask) for source, pair in case.targets.items()}
    for options in ({}, {"chunk_tokens": 3}, {"chunk_tokens": 5, "scores": scores}):
        assert_same(case.run(table, "chunked", assignment=assignment, upstream=1.7, **options), reference, 1e-9)


@pytest.mark.parametrize("name", [name for name in METHODS if not method(name).needs_rewards])
def test_decisions_made_from_hidden_states_are_those_made_from_logits(name: str) -> None:
    case, table = make_case((4, 5, 6, 61)), method(name)
    every_source(case)
    del case.targets["student"]  # the trained distribution itself
    assert_same(case.run(table, "chunked", chunk_tokens=4), case.run(table, "reference"), 1e-9)


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


def test_a_new_divergence_needs_no_change_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def hellinger(log_s: Tensor, log_t: Tensor) -> Tensor:
        return ((log_s / 2).exp() - (log_t / 2).exp()).square().sum(-1)

    # The registry is what a contributor edits; the name check reads `DivergenceKind` beside it.
    monkeypatch.setitem(divergences.DIVERGENCES, "js", hellinger)
    for support, tail in SUPPORTS:
        case, table = make_case(), one_rule("js", support, tail)
        assert_same(case.run(table, "chunked", chunk_tokens=3), case.run(table, "reference"))


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


def test_a_mass_lost_in_rounding_is_summed_instead() -> None:
    # The target is a sharpened student: 1 - (mass of K columns) is lost in float32, and the student's rest weighs it.
    case = make_case((3, 6, 4, 901), dtype=torch.float32, bias=False)
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
