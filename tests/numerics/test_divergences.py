"""Divergences between next-token distributions: values, gradients, and the mistakes that estimators have shipped."""

import itertools
import math

import independent
import pytest
import torch
from divergence_kit import gradient_of, random_logits
from torch import Tensor

import dopd
from dopd.divergences import entropy, log_probs, on_support
from dopd.errors import ConfigError

KINDS = ["forward_kl", "reverse_kl", "js"]
TOPK = ["student_topk", "target_topk"]
CASES = [
    *((kind, "full", "bucket") for kind in KINDS),
    *itertools.product(KINDS, TOPK, ["bucket", "renormalize"]),
]
every_case = pytest.mark.parametrize(("kind", "support", "tail"), CASES)


# --- values -----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("top_k", [1, 4, 10])
def test_value_agrees_with_the_independent_computation(
    kind: str, support: str, tail: str, seed: int, top_k: int
) -> None:
    student, target = random_logits(seed)
    value = dopd.divergence(student, target, kind=kind, support=support, top_k=top_k, tail=tail)
    expected = [
        independent.divergence(independent.softmax(s), independent.softmax(t), kind, support, top_k, tail)
        for s, t in zip(student.tolist(), target.tolist(), strict=True)
    ]
    assert value.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_direction_is_not_swapped() -> None:
    # S = (1/2, 1/2), T = (1/4, 3/4):
    #   KL(S || T) = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3 = 0.14384
    #   KL(T || S) = 1/4 ln 1/2 + 3/4 ln 3/2            = 0.13081
    #   M = (3/8, 5/8): JS = 1/2 (1/4 ln 2/3 + 3/4 ln 6/5) + 1/2 (1/2 ln 4/3 + 1/2 ln 4/5) = 0.03382
    student, target = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    values = {kind: float(dopd.divergence(student, target, kind=kind)) for kind in KINDS}
    assert values == {
        "reverse_kl": pytest.approx(0.14384, abs=1e-5),
        "forward_kl": pytest.approx(0.13081, abs=1e-5),
        "js": pytest.approx(0.03382, abs=1e-5),
    }


def test_support_of_the_student_and_of_the_target_differ() -> None:
    # Top 1 of S is token 0, top 1 of T is token 1; with a bucket the outcomes are (0, rest) and (1, rest).
    student, target = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.1, 0.8, 0.1]).log()
    of_student = 0.7 * math.log(0.7 / 0.1) + 0.3 * math.log(0.3 / 0.9)
    of_target = 0.2 * math.log(0.2 / 0.8) + 0.8 * math.log(0.8 / 0.2)
    for support, expected in (("student_topk", of_student), ("target_topk", of_target)):
        value = dopd.divergence(student, target, kind="reverse_kl", support=support, top_k=1)
        assert float(value) == pytest.approx(expected, rel=1e-6)


@every_case
@pytest.mark.parametrize("top_k", [11, 12, 500])
def test_top_k_of_the_whole_vocabulary_equals_full(kind: str, support: str, tail: str, top_k: int) -> None:
    student, target = random_logits(0)
    full = dopd.divergence(student, target, kind=kind)
    value = dopd.divergence(student, target, kind=kind, support=support, top_k=top_k, tail=tail)
    assert torch.equal(value, full)


@every_case
@pytest.mark.parametrize("seed", range(10))
def test_never_negative_and_positive_when_different(kind: str, support: str, tail: str, seed: int) -> None:
    student, target = random_logits(seed)
    value = dopd.divergence(student, target, kind=kind, support=support, top_k=4, tail=tail)
    assert bool((value > 1e-6).all())


@pytest.mark.parametrize("seed", range(10))
def test_js_is_symmetric_and_at_most_ln_two(seed: int) -> None:
    student, target = random_logits(seed, scale=8.0)
    forth, back = dopd.divergence(student, target, kind="js"), dopd.divergence(target, student, kind="js")
    torch.testing.assert_close(forth, back, rtol=1e-12, atol=1e-15)
    assert bool((forth <= math.log(2.0)).all())


def test_js_of_distributions_that_share_nothing_is_ln_two() -> None:
    student, target = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    assert float(dopd.divergence(student, target, kind="js")) == pytest.approx(math.log(2.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("support", TOPK)
@pytest.mark.parametrize("seed", range(5))
def test_bucket_is_a_lower_bound_that_grows_to_the_full_divergence(kind: str, support: str, seed: int) -> None:
    student, target = random_logits(seed, vocab=40)
    full = dopd.divergence(student, target, kind=kind)
    values = [
        dopd.divergence(student, target, kind=kind, support=support, top_k=k, tail="bucket") for k in range(1, 40)
    ]
    for smaller, larger in itertools.pairwise([*values, full]):
        assert bool((smaller <= larger + 1e-12).all())  # splitting an outcome cannot lose information
    torch.testing.assert_close(values[-1], full, rtol=1e-9, atol=1e-12)  # one token is in the bucket: the same thing


def test_entropy() -> None:
    assert float(entropy(log_probs(torch.zeros(8)))) == pytest.approx(math.log(8))
    assert float(entropy(torch.tensor([0.0, -math.inf]))) == 0.0


# --- gradients --------------------------------------------------------------------------------------------------------


@every_case
def test_gradient_agrees_with_central_differences_of_the_independent_value(kind: str, support: str, tail: str) -> None:
    student, target = random_logits(1)
    gradient = gradient_of(
        lambda s: dopd.divergence(s, target, kind=kind, support=support, top_k=4, tail=tail), student
    )
    for s, t, row in zip(student.tolist(), target.tolist(), gradient.tolist(), strict=True):
        expected = independent.central_differences(
            lambda logits, t=t: independent.divergence(
                independent.softmax(logits), independent.softmax(t), kind, support, 4, tail
            ),
            s,
        )
        assert row == pytest.approx(expected, abs=1e-8)


@every_case
def test_gradcheck(kind: str, support: str, tail: str) -> None:
    student, target = random_logits(2, num_tokens=2, vocab=7)
    assert torch.autograd.gradcheck(
        lambda s: dopd.divergence(s, target, kind=kind, support=support, top_k=3, tail=tail),
        student.requires_grad_(),
    )


@every_case
@pytest.mark.parametrize("top_k", [1, 3, 10])
def test_student_at_its_target_has_no_loss_and_no_gradient(kind: str, support: str, tail: str, top_k: int) -> None:
    """Plain truncation of a top-k support pushes a student that has arrived; a bucket or conditioning does not."""
    logits, _ = random_logits(3)
    leaf = logits.clone().requires_grad_()
    value = dopd.divergence(leaf, logits.clone(), kind=kind, support=support, top_k=top_k, tail=tail)
    assert value.abs().max() < 1e-12
    value.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().max() < 1e-12


def test_plain_truncation_has_the_gradient_that_the_test_above_would_catch() -> None:
    logits, _ = random_logits(3)

    def truncated(student: Tensor) -> Tensor:
        log_s, log_t = log_probs(student), log_probs(logits)
        ids = log_s.detach().topk(3, dim=-1).indices
        log_s, log_t = log_s.gather(-1, ids), log_t.gather(-1, ids)
        return (log_s.exp() * (log_s - log_t)).sum(-1)

    assert float(truncated(logits).abs().max()) < 1e-12  # the value says nothing
    assert float(gradient_of(truncated, logits).abs().max()) > 0.05


def test_plain_truncation_is_not_a_choice() -> None:
    with pytest.raises(ConfigError, match=r"tail \(='none'\) must be one of 'bucket', 'renormalize'"):
        dopd.divergence(*random_logits(0), kind="reverse_kl", support="student_topk", tail="none")


@every_case
def test_target_gets_no_gradient(kind: str, support: str, tail: str) -> None:
    student, target = (logits.requires_grad_() for logits in random_logits(4))
    dopd.divergence(student, target, kind=kind, support=support, top_k=4, tail=tail).sum().backward()
    assert student.grad is not None and student.grad.abs().max() > 1e-3
    assert target.grad is None


@every_case
def test_gradients_of_each_token_sum_to_zero(kind: str, support: str, tail: str) -> None:
    student, target = random_logits(5)
    gradient = gradient_of(
        lambda s: dopd.divergence(s, target, kind=kind, support=support, top_k=4, tail=tail), student
    )
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_divergence_from_the_students_own_detached_distribution_is_a_no_op() -> None:
    """KL(p || sg p): a self-anchor on the plain student would look like a feature and teach nothing."""
    student, _ = random_logits(6)
    for kind, support, tail in CASES:
        leaf = student.clone().requires_grad_()
        value = dopd.divergence(leaf, leaf.detach(), kind=kind, support=support, top_k=4, tail=tail)
        value.sum().backward()
        assert value.detach().abs().max() < 1e-12 and leaf.grad is not None and leaf.grad.abs().max() < 1e-12


# --- the one-sample estimate ------------------------------------------------------------------------------------------


def sampled_over_the_vocabulary(student: Tensor, target: Tensor) -> list[Tensor]:
    """The estimate for every token that could have been sampled, of one distribution each."""
    return [
        dopd.divergence(student, target, kind="reverse_kl", support="sampled", sampled_ids=torch.tensor(token))
        for token in range(student.shape[-1])
    ]


@pytest.mark.parametrize("seed", range(5))
def test_sampled_value_is_k1_and_its_expectation_the_full_reverse_kl(seed: int) -> None:
    student, target = (logits[0] for logits in random_logits(seed))
    values = torch.stack(sampled_over_the_vocabulary(student, target))
    torch.testing.assert_close(values, student.log_softmax(-1) - target.log_softmax(-1))
    expectation = (student.softmax(-1) * values).sum()
    torch.testing.assert_close(expectation, dopd.divergence(student, target, kind="reverse_kl"))


@pytest.mark.parametrize("seed", range(5))
def test_sampled_gradient_has_the_expectation_of_the_full_gradient(seed: int) -> None:
    student, target = (logits[0] for logits in random_logits(seed))
    full = gradient_of(lambda s: dopd.divergence(s, target, kind="reverse_kl"), student)
    p = student.softmax(-1)
    expected = gradient_of(lambda s: (p * torch.stack(sampled_over_the_vocabulary(s, target))).sum(), student)
    torch.testing.assert_close(expected, full, rtol=1e-10, atol=1e-12)


def test_k1_back_propagated_directly_would_have_no_expected_gradient() -> None:
    student, target = (logits[0] for logits in random_logits(0))
    p = student.softmax(-1)

    def k1(s: Tensor) -> Tensor:
        return (p * (s.log_softmax(-1) - target.log_softmax(-1))).sum()

    def k3(s: Tensor) -> Tensor:
        log_ratio = target.log_softmax(-1) - s.log_softmax(-1)
        return (p * (log_ratio.exp() - 1 - log_ratio)).sum()

    assert gradient_of(k1, student).abs().max() < 1e-12
    forward = gradient_of(lambda s: dopd.divergence(s, target, kind="forward_kl"), student)
    torch.testing.assert_close(gradient_of(k3, student), forward)  # k3: the gradient of the other divergence


def test_dense_value_as_a_detached_advantage_would_have_no_expected_gradient() -> None:
    student, target = (logits[0] for logits in random_logits(0))
    p, value = student.softmax(-1), dopd.divergence(student, target, kind="reverse_kl")

    def score_function(s: Tensor) -> Tensor:
        return (p * value * s.log_softmax(-1)).sum()  # one constant for whatever was sampled

    assert gradient_of(score_function, student).abs().max() < 1e-12
    assert gradient_of(lambda s: dopd.divergence(s, target, kind="reverse_kl"), student).abs().max() > 1e-3


def test_negative_k1_is_not_clamped_and_keeps_its_gradient() -> None:
    # S = (1/4, 3/4), T = (3/4, 1/4), sampled token 0: k1 = ln 1/3, gradient k1 * (onehot - S) = k1 * (3/4, -3/4)
    student, target = torch.tensor([0.25, 0.75]).double().log(), torch.tensor([0.75, 0.25]).double().log()
    estimate = sampled_over_the_vocabulary(student, target)[0]
    assert float(estimate) == pytest.approx(-math.log(3))
    gradient = gradient_of(lambda s: sampled_over_the_vocabulary(s, target)[0], student)
    assert gradient.tolist() == pytest.approx([-0.75 * math.log(3), 0.75 * math.log(3)])


@pytest.mark.parametrize("difference", [1e-3, 1e-6])
def test_tiny_divergences_are_not_floored(difference: float) -> None:
    student, _ = random_logits(7)
    target = student.clone()
    target[:, 0] += difference
    gradient = gradient_of(lambda s: dopd.divergence(s, target, kind="reverse_kl"), student)
    assert bool((gradient.abs().amax(-1) > 1e-4 * difference).all())


def test_sampled_support_needs_one_id_for_each_distribution() -> None:
    student, target = random_logits(0)
    with pytest.raises(ConfigError, match="needs sampled_ids"):
        dopd.divergence(student, target, kind="reverse_kl", support="sampled")
    for shape in [(3,), (1,), (4, 1), (5,)]:
        ids = torch.zeros(shape, dtype=torch.long)
        with pytest.raises(ConfigError, match=r"sampled_ids .* must have the shape \(4,\)"):
            dopd.divergence(student, target, kind="reverse_kl", support="sampled", sampled_ids=ids)


# --- numbers and shapes -----------------------------------------------------------------------------------------------


@every_case
def test_shifting_the_logits_changes_nothing(kind: str, support: str, tail: str) -> None:
    student, target = random_logits(8)
    options = {"kind": kind, "support": support, "tail": tail, "top_k": 4}
    torch.testing.assert_close(
        dopd.divergence(student + 17.0, target - 5.0, **options),
        dopd.divergence(student, target, **options),
        rtol=1e-11,
        atol=1e-13,
    )


@every_case
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_stay_finite(kind: str, support: str, tail: str, scale: float) -> None:
    student, target = (logits.float() for logits in random_logits(9, scale=scale))
    leaf = student.requires_grad_()
    value = dopd.divergence(leaf, target, kind=kind, support=support, top_k=4, tail=tail)
    value.sum().backward()
    assert bool(torch.isfinite(value).all()) and leaf.grad is not None and bool(torch.isfinite(leaf.grad).all())
    assert bool((value >= -1e-6).all())


def test_small_remaining_mass_is_not_lost_to_rounding() -> None:
    # One token has all but 1e-9 of the mass: 1 - sum(inside) is 0 in float32, and log of it -inf.
    student = torch.tensor([0.0, -21.0, -21.0])
    rest = on_support(log_probs(student), torch.tensor([0]), "bucket")[1]
    assert float(rest) == pytest.approx(math.log(2) - 21.0, abs=1e-5)


@every_case
@pytest.mark.parametrize("top_k", [3, 8])
def test_tokens_that_do_not_exist_are_minus_inf_in_both_and_change_nothing(
    kind: str, support: str, tail: str, top_k: int
) -> None:
    """Vocabulary padding with -inf. (With zeros the padding would carry real probability.)"""
    student, target = random_logits(10, vocab=7)
    options = {"kind": kind, "support": support, "tail": tail, "top_k": top_k}
    padded = [torch.nn.functional.pad(logits, (0, 4), value=-math.inf) for logits in (student, target)]
    expected_gradient = gradient_of(lambda s: dopd.divergence(s, target, **options), student)
    gradient = gradient_of(lambda s: dopd.divergence(s, padded[1], **options), padded[0])
    torch.testing.assert_close(dopd.divergence(*padded, **options), dopd.divergence(student, target, **options))
    torch.testing.assert_close(gradient[:, :7], expected_gradient)
    assert bool((gradient[:, 7:] == 0).all())
    zero_padded = [torch.nn.functional.pad(logits, (0, 4), value=0.0) for logits in (student, target)]
    assert not torch.allclose(
        dopd.divergence(*zero_padded, kind="reverse_kl"), dopd.divergence(student, target, kind="reverse_kl")
    )


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_in_float32(kind: str, support: str, tail: str, dtype: torch.dtype) -> None:
    student, target = (logits.to(dtype) for logits in random_logits(11))
    options = {"kind": kind, "support": support, "tail": tail, "top_k": 4}
    value = dopd.divergence(student, target, **options)
    assert value.dtype == torch.float32
    assert torch.equal(value, dopd.divergence(student.float(), target.float(), **options))
    assert dopd.divergence(student.double(), target, **options).dtype == torch.float64


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3), (2, 1, 3)])
@every_case
def test_any_leading_dimensions(kind: str, support: str, tail: str, leading: tuple[int, ...]) -> None:
    student, target = torch.randn(2, *leading, 9)
    assert dopd.divergence(student, target, kind=kind, support=support, top_k=4, tail=tail).shape == leading


@pytest.mark.parametrize("shape", [(1, 11), (11,), (4, 1), (4, 12), (4, 10), (2, 4, 11)])
def test_shapes_that_would_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    student, _ = random_logits(0)
    with pytest.raises(ConfigError, match=r"must have one shape \(\.\.\., V\): nothing is broadcast"):
        dopd.divergence(student, torch.randn(shape), kind="reverse_kl")


def test_divergence_is_named_and_never_a_number_that_blends() -> None:
    """A weight between two divergences jumps at its ends; here the name is one of three."""
    for kind in ("kl", "jsd", 0.5, None):
        with pytest.raises(ConfigError, match=r"kind .* must be one of forward_kl, reverse_kl, js"):
            dopd.divergence(*random_logits(0), kind=kind)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, True, "8", None])
def test_top_k_must_be_a_positive_whole_number(top_k: object) -> None:
    with pytest.raises(ConfigError, match=r"top_k .* must be a whole number of at least 1"):
        dopd.divergence(*random_logits(0), kind="js", support="student_topk", top_k=top_k)


def test_unknown_support_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"support \(='topk'\) must be one of 'full', 'student_topk', 'target_topk'"):
        dopd.divergence(*random_logits(0), kind="js", support="topk")
