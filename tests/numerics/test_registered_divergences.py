"""Divergences that a user registers, in the reference and in the fused loss, against formulas written in numpy."""

from typing import Any

import numpy
import pytest
import torch
from fused_kit import SUPPORTS, Case, assert_same, make_case, one_rule
from torch import Tensor

import dopd
from dopd.errors import ConfigError

ALPHA, TOP_K, WEIGHT = 0.3, 5, 0.7
Array = Any  # numpy.ndarray, float64


def alpha_divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
    """Amari's (1 - sum T^a S^(1 - a)) / (a (1 - a)), and a sum over a part of the outcomes likewise."""
    return (1 - (ALPHA * log_t + (1 - ALPHA) * log_s).exp().sum(-1)) / (ALPHA * (1 - ALPHA))


def jeffreys(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(S || T) + KL(T || S)."""
    return ((log_s.exp() - log_t.exp()) * (log_s - log_t)).sum(-1)


# Value, and derivative by the student's mass of each outcome.
FORMULAS: dict[str, Any] = {
    "alpha": (
        lambda s, t: (1 - sum(t**ALPHA * s ** (1 - ALPHA))) / (ALPHA * (1 - ALPHA)),
        lambda s, t: -((t / s) ** ALPHA) / ALPHA,
    ),
    "jeffreys": (
        lambda s, t: sum(s * numpy.log(s / t)) + sum(t * numpy.log(t / s)),
        lambda s, t: numpy.log(s / t) + 1 - t / s,
    ),
}
FUNCTIONS = {"alpha": alpha_divergence, "jeffreys": jeffreys}


def softmax(z: Array) -> Array:
    return numpy.exp(z - z.max()) / numpy.exp(z - z.max()).sum()


def expected_token(kind: str, support: str, tail: str, z_s: Array, z_t: Array) -> tuple[float, Array]:
    """Divergence of one token, and its gradient by the student's logits."""
    value, by_mass = FORMULAS[kind]
    s, t = softmax(z_s), softmax(z_t)
    if support == "full":
        inside = numpy.arange(len(s))
    else:
        inside = numpy.argsort(-(s if support == "student_topk" else t))[:TOP_K]
    outside = numpy.setdiff1d(numpy.arange(len(s)), inside)
    a, b = s[inside], t[inside]
    if support != "full" and tail == "renormalize":
        a, b = a / a.sum(), b / b.sum()
    elif support != "full" and tail == "bucket":
        a, b = numpy.append(a, s[outside].sum()), numpy.append(b, t[outside].sum())
    slope = by_mass(a, b)
    gradient = numpy.zeros_like(s)
    mean = (a * slope).sum()  # d mass_i / d z_j = mass_i (1[j in i] - s_j), or of the conditional distribution
    gradient[inside] = a[: len(inside)] * (slope[: len(inside)] - mean)
    if support != "full" and tail != "renormalize":
        gradient[outside] = s[outside] * ((slope[-1] if tail == "bucket" else 0.0) - mean)
    return value(a, b), gradient


def expected(kind: str, support: str, tail: str, case: Case) -> tuple[float, list[Array]]:
    """Loss, and its gradients by hidden states, weight and bias: the mean over tokens, then over sequences."""
    hidden, weight, bias = (
        tensor.detach().numpy() for tensor in (case.hidden, case.head.weight, case.head.bias) if tensor is not None
    )
    states, head = case.targets["teacher"]
    target = states.numpy() @ head.weight.numpy().T + (0.0 if head.bias is None else head.bias.numpy())
    mask = case.mask.numpy() != 0
    loss, grads = 0.0, [numpy.zeros_like(hidden), numpy.zeros_like(weight), numpy.zeros_like(bias)]
    for row in range(len(mask)):
        for token in numpy.flatnonzero(mask[row]):
            scale = WEIGHT / mask[row].sum() / mask.any(1).sum()
            h = hidden[row, token]
            value, by_logits = expected_token(kind, support, tail, weight @ h + bias, target[row, token])
            loss += scale * value
            grads[0][row, token] = scale * by_logits @ weight
            grads[1] += scale * numpy.outer(by_logits, h)
            grads[2] += scale * by_logits
    return loss, grads


@pytest.fixture(autouse=True)
def registered(registries: None) -> None:
    for name, function in FUNCTIONS.items():
        assert dopd.register_divergence(name)(function) is function


@pytest.mark.parametrize(("support", "tail"), SUPPORTS)
@pytest.mark.parametrize("kind", FORMULAS)
def test_fused_and_reference_have_the_value_and_gradients_of_the_formula(kind: str, support: str, tail: str) -> None:
    case, table = make_case(), one_rule(kind, support, tail, top_k=TOP_K, weight=WEIGHT)
    loss, grads = expected(kind, support, tail, case)
    reference = case.run(table, "reference")
    for ours in (reference, *(case.run(table, "chunked", chunk_tokens=chunk) for chunk in (1, 3, None))):
        assert float(ours.result.loss.detach()) == pytest.approx(loss, rel=1e-12)
        for mine, right in zip(ours.grads, grads, strict=True):
            assert mine is not None
            torch.testing.assert_close(mine, torch.from_numpy(right), rtol=1e-10, atol=1e-12)
        assert_same(ours, reference)


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_cap_leaves_the_tokens_above_it_without_a_gradient(kind: str) -> None:
    case = make_case()
    values = case.run(one_rule(kind, "full", "bucket", weight=1.0), "reference").result.per_token.detach()
    low, high = sorted(values[case.mask != 0].tolist())[5:7]
    cap = (low + high) / 2
    table = dopd.RoutingTable(name="capped", rules=(dopd.Rule(source="teacher", divergence=kind, cap=cap),))
    ours, reference = case.run(table, "chunked", chunk_tokens=3), case.run(table, "reference")
    assert_same(ours, reference)
    capped = values > cap
    assert torch.equal(reference.result.per_token.detach(), values.clamp(max=cap)) and int(capped.sum()) == 6
    assert ours.grads[0] is not None
    assert not ours.grads[0][capped].any() and ours.grads[0][(case.mask != 0) & ~capped].any()


@pytest.mark.parametrize(
    ("support", "outcomes"), [("full", 61), ("student_topk", TOP_K + 1), ("target_topk", TOP_K + 1)]
)
def test_it_is_never_asked_about_more_than_a_chunk_of_tokens(support: str, outcomes: int) -> None:
    asked: list[torch.Size] = []

    @dopd.register_divergence("asked")
    def noted(log_s: Tensor, log_t: Tensor) -> Tensor:
        asked.extend((log_s.shape, log_t.shape))
        return jeffreys(log_s, log_t)

    case, table = make_case(), one_rule("asked", support, "bucket", top_k=TOP_K)
    asked.clear()  # the trial at the row
    case.run(table, "chunked", chunk_tokens=2)
    assert max(shape[0] for shape in asked) == 2 and {shape[1] for shape in asked} == {outcomes}


def test_a_divergence_without_a_target_needs_no_source() -> None:
    @dopd.register_divergence("collision", reads_target=False)
    def collision(log_s: Tensor, log_t: Tensor) -> Tensor:
        return (2 * log_s).logsumexp(-1)

    case, table = make_case(), dopd.RoutingTable(name="own", rules=(dopd.Rule(divergence="collision"),))
    assert table.sources == frozenset()
    case.targets = {}
    assert_same(case.run(table, "chunked", chunk_tokens=2), case.run(table, "reference"))
    with pytest.raises(ConfigError, match="divergence='collision' reads no target"):
        dopd.Rule(source="teacher", divergence="collision")


def test_only_divergences_that_say_how_are_estimated_from_one_sample() -> None:
    with pytest.raises(ConfigError, match=r"support='sampled' estimates 'forward_kl', .* got divergence='alpha'"):
        dopd.Rule(source="teacher", divergence="alpha", support="sampled")


WRONG = {
    "a number": (lambda log_s, log_t: 0.0, "returns float for"),
    "one number for all": (lambda log_s, log_t: (log_s - log_t).sum(), r"returns torch.float64 \(\) for"),
    "a value of each outcome": (lambda log_s, log_t: log_s - log_t, r"returns torch.float64 \(2, 3\) for"),
    "whole numbers": (lambda log_s, log_t: log_s.argmax(-1), r"returns torch.int64 \(2,\) for"),
    "no gradient": (lambda log_s, log_t: (log_s.detach() - log_t).sum(-1), "has no gradient by its first argument"),
    "a gradient by the target": (lambda log_s, log_t: log_t.sum(-1), "has no gradient by its first argument"),
    "an error": (lambda log_s, log_t: log_s @ log_t, "raises RuntimeError: mat1 and mat2"),
    "one argument": (lambda log_s: log_s.sum(-1), "raises TypeError: .* takes 1 positional argument"),
    "NaN": (lambda log_s, log_t: (log_s * float("nan")).sum(-1), "is not finite, or its gradient"),
    "no end": (lambda log_s, log_t: log_s.sum(-1) + float("inf"), "is not finite, or its gradient"),
    "a slope without an end": (lambda log_s, log_t: (log_s - log_s).abs().sqrt().sum(-1), "is not finite, or its grad"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_divergence_is_refused_where_a_row_names_it(what: str) -> None:
    function, words = WRONG[what]
    dopd.register_divergence("wrong")(function)
    with pytest.raises(ConfigError, match=rf"rule 'all': divergence \(='wrong'\), .*test_registered_.*, {words}"):
        dopd.Rule(source="teacher", divergence="wrong")
    with pytest.raises(ConfigError, match=rf"kind \(='wrong'\), .*{words}"):
        dopd.divergence(torch.randn(2, 5), torch.randn(2, 5), kind="wrong")
