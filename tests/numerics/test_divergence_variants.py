"""Divergences beyond the three of DOPD, and their options: values by hand, gradients by expectation or by hand."""

import math
from typing import Any

import pytest
import torch
from divergence_kit import gradient_of, random_logits
from torch import Tensor

import dopd
from dopd.divergences import Variant
from dopd.errors import ConfigError


def sampled_over_the_vocabulary(student: Tensor, target: Tensor, **options: Any) -> list[Tensor]:
    """The estimate for every token that could have been sampled, of one distribution each."""
    return [
        dopd.divergence(student, target, support="sampled", sampled_ids=torch.tensor(token), **options)
        for token in range(student.shape[-1])
    ]


# S = (1/2, 1/2), T = (1/4, 3/4) in most tests by hand.
HALF, QUARTER = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.25, 0.75]).double().log()


def test_weighted_js_by_hand_and_its_symmetry() -> None:
    # b = 0.9: M = 0.9 T + 0.1 S = (0.275, 0.725)
    expected = 0.9 * (0.25 * math.log(0.25 / 0.275) + 0.75 * math.log(0.75 / 0.725)) + 0.1 * (
        0.5 * math.log(0.5 / 0.275) + 0.5 * math.log(0.5 / 0.725)
    )
    value = float(dopd.divergence(HALF, QUARTER, kind="js", variant=Variant(beta=0.9)))
    assert value == pytest.approx(expected, rel=1e-12)
    swapped = float(dopd.divergence(QUARTER, HALF, kind="js", variant=Variant(beta=0.1)))
    assert swapped == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("beta", "limit"), [(1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")])
def test_weighted_js_tends_to_the_kl_of_its_limit_once_divided_by_the_small_weight(beta: float, limit: str) -> None:
    """Divided, because the value itself goes to 0: a float that selects the divergence would jump there."""
    student, target = random_logits(0)
    value = dopd.divergence(student, target, kind="js", variant=Variant(beta=beta)) / min(beta, 1 - beta)
    torch.testing.assert_close(value, dopd.divergence(student, target, kind=limit), rtol=1e-3, atol=1e-3)


def test_share_of_clamped_tokens_is_that_of_the_tokens_with_a_term_above_the_clamp() -> None:
    """Terms of T = (.9, .06, .04) and S = (.2, .5, .3): .9 ln 4.5 = 1.35 is above .05; of equal ones none is. The whole
    gradient then points away from the likeliest token of the target (arXiv 2609.38995)."""
    t = torch.tensor([[[0.9, 0.06, 0.04], [0.9, 0.06, 0.04], [0.5, 0.3, 0.2]]], dtype=torch.float64).log()
    s = torch.tensor([[[0.2, 0.5, 0.3], [0.9, 0.06, 0.04], [0.5, 0.3, 0.2]]], dtype=torch.float64).log()
    ids, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3)
    table = dopd.table("opsd", divergence="forward_kl", clamp=0.05)
    leaf = s.clone().requires_grad_()
    result = dopd.routed_loss(leaf, {"privileged_student": t}, ids, mask, table)
    result.loss.backward()
    assert leaf.grad is not None
    assert result.stats["clamped/all"] == pytest.approx(1 / 3)
    # (w S - T) of the two unclamped outcomes, w = .06 + .04 their target mass; third of the mean over three tokens.
    expected = [0.1 * 0.2, 0.1 * 0.5 - 0.06, 0.1 * 0.3 - 0.04]
    assert (3 * leaf.grad[0, 0]).tolist() == pytest.approx(expected)
    free = dopd.routed_loss(s, {"privileged_student": t}, ids, mask, dopd.table("opsd", divergence="forward_kl"))
    assert "clamped/all" not in free.stats


def test_element_clamp_acts_before_the_sum_and_may_make_it_negative() -> None:
    # Terms of KL(T || S): 1/4 ln 1/2 = -0.1733, 3/4 ln 3/2 = 0.3041; the second is bounded by 0.05.
    value = dopd.divergence(HALF, QUARTER, kind="forward_kl", variant=Variant(clamp=0.05))
    assert float(value) == pytest.approx(0.25 * math.log(0.5) + 0.05, rel=1e-12) and float(value) < 0
    # The clamped term gives no gradient: d/dz of -T_0 log S_0 alone is -T_0 (onehot_0 - S).
    gradient = gradient_of(lambda s: dopd.divergence(s, QUARTER, kind="forward_kl", variant=Variant(clamp=0.05)), HALF)
    assert gradient.tolist() == pytest.approx([-0.125, 0.125])


def test_cap_bounds_a_token_and_silences_its_gradient() -> None:
    student, target = random_logits(1)
    free = dopd.divergence(student, target, kind="reverse_kl")
    cap = float(free.median())
    value = dopd.divergence(student, target, kind="reverse_kl", variant=Variant(cap=cap))
    torch.testing.assert_close(value, free.clamp(max=cap))
    gradient = gradient_of(lambda s: dopd.divergence(s, target, kind="reverse_kl", variant=Variant(cap=cap)), student)
    whole = gradient_of(lambda s: dopd.divergence(s, target, kind="reverse_kl"), student)
    assert not gradient[free > cap].any() and torch.equal(gradient[free < cap], whole[free < cap])


def test_plain_truncation_pushes_a_student_that_equals_its_target_and_the_detached_form_does_not() -> None:
    student, _ = random_logits(3)
    options: dict[str, Any] = {"support": "student_topk", "top_k": 4, "tail": "truncate"}
    pushed = gradient_of(lambda s: dopd.divergence(s, student, kind="reverse_kl", **options), student)
    assert float(pushed.abs().max()) > 1e-2
    still = gradient_of(lambda s: dopd.divergence(s, student, kind="reverse_kl_detached", **options), student)
    assert float(still.abs().max()) < 1e-14


def test_truncated_sum_keeps_true_probabilities() -> None:
    student, target = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    value = dopd.divergence(student, target, kind="reverse_kl", support="student_topk", top_k=2, tail="truncate")
    assert float(value) == pytest.approx(0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.2), rel=1e-12)


def test_detached_reverse_kl_is_the_reverse_kl_on_the_whole_vocabulary() -> None:
    student, target = random_logits(4)
    for kind in ("reverse_kl", "reverse_kl_detached"):
        torch.testing.assert_close(
            dopd.divergence(student, target, kind=kind), dopd.divergence(student, target, kind="reverse_kl")
        )
    first, second = (
        gradient_of(lambda s, kind=kind: dopd.divergence(s, target, kind=kind), student)
        for kind in ("reverse_kl", "reverse_kl_detached")
    )
    torch.testing.assert_close(first, second)


def test_detached_reverse_kl_on_a_truncated_support_by_hand() -> None:
    # sum_v sg[S_v (log S_v - log T_v)] grad log S_v over v in {0, 1}: c = (1/2 ln 5/2, 3/10 ln 3/2), d/dz = c -
    # sum(c) S
    student, target = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.3, 0.2], [0.2, 0.2, 0.6]))
    gradient = gradient_of(
        lambda s: dopd.divergence(
            s, target, kind="reverse_kl_detached", support="student_topk", top_k=2, tail="truncate"
        ),
        student,
    )
    first, second = 0.5 * math.log(2.5), 0.3 * math.log(1.5)
    total = first + second
    assert gradient.tolist() == pytest.approx([first - 0.5 * total, second - 0.3 * total, -0.2 * total])


def test_cross_entropy_is_a_hard_label_from_the_target() -> None:
    assert float(dopd.divergence(HALF, QUARTER, kind="cross_entropy")) == pytest.approx(math.log(2))
    gradient = gradient_of(lambda s: dopd.divergence(s, QUARTER, kind="cross_entropy"), HALF)
    assert gradient.tolist() == pytest.approx([0.5, -0.5])  # S - onehot(1)


def test_list_mle_by_hand() -> None:
    # The target's order is 2, 0, 1: -log of s2/(s2+s0+s1) * s0/(s0+s1) * 1, with S = (0.5, 0.3, 0.2)
    student, target = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.3, 0.2], [0.3, 0.1, 0.6]))
    expected = -math.log(0.2) - math.log(0.5 / 0.8)
    assert float(dopd.divergence(student, target, kind="list_mle")) == pytest.approx(expected, rel=1e-12)
    topk = dopd.divergence(student, target, kind="list_mle", support="student_topk", top_k=2, tail="renormalize")
    assert float(topk) == pytest.approx(-math.log(0.5 / 0.8), rel=1e-12)  # of tokens 0 and 1, the target puts 0 first


def test_entropy_falls_along_its_gradient_and_reads_no_target() -> None:
    student, target = random_logits(5)
    value = dopd.divergence(student, target, kind="entropy")
    torch.testing.assert_close(value, torch.distributions.Categorical(logits=student).entropy())
    torch.testing.assert_close(value, dopd.divergence(student, 2 * target, kind="entropy"))
    gradient = gradient_of(lambda s: dopd.divergence(s, target, kind="entropy"), student)
    assert bool((dopd.divergence(student - 0.1 * gradient, target, kind="entropy") < value).all())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("js", 0.5), ("js", 0.1), ("js", 0.9)]
)
def test_sampled_estimates_have_the_expected_value_and_gradient_of_the_full_divergence(
    kind: str, beta: float, seed: int
) -> None:
    student, target = (logits[0] for logits in random_logits(seed))
    options = {"kind": kind, "variant": Variant(beta=beta)}
    p = student.softmax(-1)
    torch.testing.assert_close(
        (p * torch.stack(sampled_over_the_vocabulary(student, target, **options))).sum(),
        dopd.divergence(student, target, **options),
    )
    torch.testing.assert_close(
        gradient_of(lambda s: (p * torch.stack(sampled_over_the_vocabulary(s, target, **options))).sum(), student),
        gradient_of(lambda s: dopd.divergence(s, target, **options), student),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_sampled_estimates_push_nothing_where_student_and_target_agree(kind: str) -> None:
    student, _ = (logits[0] for logits in random_logits(2))
    for estimate in sampled_over_the_vocabulary(student, student.clone(), kind=kind):
        assert float(estimate) == pytest.approx(0.0, abs=1e-15)
    gradient = gradient_of(lambda s: torch.stack(sampled_over_the_vocabulary(s, student, kind=kind)).sum(), student)
    assert float(gradient.abs().max()) < 1e-14


@pytest.mark.parametrize("kind", ["cross_entropy", "list_mle", "entropy", "reverse_kl_detached"])
def test_sampled_support_is_refused_for_what_it_does_not_estimate(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"support='sampled' estimates 'forward_kl'.*got divergence='{kind}'.*Use"):
        dopd.divergence(*random_logits(0), kind=kind, support="sampled", sampled_ids=torch.zeros(4, dtype=torch.long))


def test_clip_bounds_the_advantage_and_not_the_value() -> None:
    variant = Variant(clip=(-0.1, 0.2))
    for token, (value, advantage) in enumerate([(math.log(2), -0.1), (math.log(2 / 3), 0.2)]):

        def estimate(s: Tensor, token: int = token) -> Tensor:
            return sampled_over_the_vocabulary(s, QUARTER, kind="reverse_kl", variant=variant)[token]

        assert float(estimate(HALF)) == pytest.approx(value)
        sign = 1.0 if token == 0 else -1.0
        assert gradient_of(estimate, HALF).tolist() == pytest.approx([-advantage * 0.5 * sign, advantage * 0.5 * sign])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0, "kind": "js"}, r"beta \(=0.0\) must be between 0 and 1, both excluded.*'forward_kl'"),
        ({"beta": 0.3, "kind": "reverse_kl"}, r"beta \(=0.3\) is an option of divergence='js'"),
        ({"clamp": 0.0, "kind": "forward_kl"}, r"clamp \(=0.0\) must be above 0"),
        ({"clamp": 0.1, "kind": "entropy"}, r"clamp \(=0.1\) .* got divergence='entropy'"),
        ({"cap": -1.0, "kind": "js"}, r"cap \(=-1.0\) must be above 0"),
        (
            {"clip": (1.0, 0.0), "kind": "js", "support": "sampled"},
            r"clip \(=\(1.0, 0.0\)\) must be \(lowest, highest\)",
        ),
        ({"clip": (0.0, 1.0), "kind": "js"}, "is an option of support='sampled' with an advantage, got support='full'"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], words: str) -> None:
    kind, support = options.pop("kind"), options.pop("support", "full")
    student, target = random_logits(0)
    with pytest.raises(ConfigError, match=words):
        dopd.divergence(
            student, target, kind=kind, support=support, sampled_ids=torch.zeros(4).long(), variant=Variant(**options)
        )
