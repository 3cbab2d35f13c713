"""The reference loss against an independent computation."""

import math
from typing import Any

import independent
import pytest
import torch
from loss_kit import SOURCES, TABLES, every_table, mapped, random_batch, run_loss
from torch import Tensor

import dopd
from dopd.assignment import assign
from dopd.errors import ConfigError
from dopd.loss import sequence_mean
from dopd.signals import SignalBatch


def logits_of(probs: list[list[float]]) -> Tensor:
    """(B, T, 2) logits of a vocabulary of two, from the probability of token 0 at every place."""
    p = torch.tensor(probs, dtype=torch.float64)
    return torch.stack([p, 1 - p], dim=-1).log()


def test_hand_computed_example() -> None:
    # Two sequences of two tokens, every sampled token is number 0 of 2; q of it under the privileged views:
    #            q_T  q_S   gap    q_T+q_S           target (t, 1-t)   the plain student is (1/2, 1/2)
    #   a (0,0)  0.8  0.8   0      1.6        LH     0.8   0.6 * KL(S||T) = 0.6 * 1/2 ln(1/4 / 0.16)     = 0.133886
    #   b (0,1)  0.9  0.3   ln 3   1.2        HT     0.9   JS, M = (0.7, 0.3):
    #               1/2 (0.9 ln 9/7 + 0.1 ln 1/3) + 1/2 (1/2 ln 5/7 + 1/2 ln 5/3)                        = 0.101749
    #   c (1,0)  0.1  0.1   0      0.2        LL     0.1   0.3 * KL(S||T) = 0.3 * 1/2 ln(1/4 / 0.09)     = 0.153248
    #   d (1,1)  0.2  0.8   ln 4   1.0        HS     0.8   0.6 * KL(S||T) = 0.6 * 1/2 ln(1/4 / 0.16)     = 0.133886
    #   mean gap 0.621, mean q_T+q_S 1.0; loss = 1/2 ((a + b) / 2 + (c + d) / 2)                          = 0.130692
    result = dopd.routed_loss(
        logits_of([[0.5, 0.5], [0.5, 0.5]]),
        {
            "privileged_teacher": logits_of([[0.8, 0.9], [0.1, 0.2]]),
            "privileged_student": logits_of([[0.8, 0.3], [0.1, 0.8]]),
        },
        torch.zeros(2, 2, dtype=torch.long),
        torch.ones(2, 2),
        dopd.table("dopd"),
    )
    names = [[dopd.Regime(number).name for number in row] for row in result.regimes.tolist()]
    assert names == [["LH", "HT"], ["LL", "HS"]]
    assert result.per_token.flatten().tolist() == pytest.approx([0.133886, 0.101749, 0.153248, 0.133886], abs=1e-6)
    assert float(result.loss) == pytest.approx(0.130692, abs=1e-6)


def test_mean_over_tokens_then_over_sequences_and_not_over_all_tokens() -> None:
    # Sequence 0 has one token of 0.4, sequence 1 has three of 0.1: (0.4 + 0.1) / 2 = 0.25, not 0.7 / 4.
    per_token = torch.tensor([[0.4, 0.0, 0.0], [0.1, 0.1, 0.1]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert float(sequence_mean(per_token, mask)) == pytest.approx(0.25)
    assert float(sequence_mean(per_token, mask, num_sequences=10)) == pytest.approx(0.05)
    assert float(sequence_mean(per_token, torch.zeros(2, 3))) == 0.0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("top_k", [2, 4, 7, 128])
def test_dopd_agrees_with_the_independent_computation(seed: int, tail: str, top_k: int) -> None:
    batch = random_batch(seed)
    result, _ = run_loss(batch, dopd.table("dopd", top_k=top_k, tail=tail))
    student, targets, ids, mask = (mapped(batch, Tensor.tolist)[key] for key in batch)
    expected = independent.dopd_loss(
        student, targets["privileged_teacher"], targets["privileged_student"], ids, mask, k=top_k, tail=tail
    )
    assert float(result.loss) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_vanilla_agrees_with_the_independent_computation(seed: int) -> None:
    batch = random_batch(seed)
    result, _ = run_loss(batch, dopd.table("vanilla"))
    student, targets, _, mask = (mapped(batch, Tensor.tolist)[key] for key in batch)
    assert float(result.loss) == pytest.approx(independent.vanilla_loss(student, targets["teacher"], mask), rel=1e-10)
    assert torch.equal(result.regimes, torch.where(batch["mask"], 0, -1))


@pytest.mark.parametrize("seed", range(3))
def test_sampled_support_reads_the_sampled_tokens(seed: int) -> None:
    batch = random_batch(seed)
    result, _ = run_loss(batch, TABLES["vanilla sampled"])
    student, targets, ids, mask = (mapped(batch, Tensor.tolist)[key] for key in batch)
    for row, token in torch.tensor(mask).nonzero().tolist():
        s, t = (independent.softmax(view[row][token])[ids[row][token]] for view in (student, targets["teacher"]))
        assert float(result.per_token[row, token]) == pytest.approx(math.log(s / t), rel=1e-10)


def gradient_by_differences(batch: dict[str, Any], value_of: Any) -> Tensor:
    student = batch["student_logits"]

    def at(flat: list[float]) -> float:
        return value_of(torch.tensor(flat, dtype=torch.float64).view_as(student).tolist())

    return torch.tensor(independent.central_differences(at, student.flatten().tolist())).view_as(student).double()


@pytest.mark.parametrize(("tail", "top_k"), [("bucket", 2), ("renormalize", 3), ("bucket", 7)])
def test_dopd_gradient_agrees_with_differences_of_the_independent_value(tail: str, top_k: int) -> None:
    batch = random_batch(3, num_rows=3, num_tokens=4)
    result, gradient = run_loss(batch, dopd.table("dopd", top_k=top_k, tail=tail))
    assert set(result.regimes.flatten().tolist()) == {-1, 0, 1, 2, 3}  # every row of the table takes part
    _, targets, ids, mask = (mapped(batch, Tensor.tolist)[key] for key in batch)
    expected = gradient_by_differences(
        batch,
        lambda student: independent.dopd_loss(
            student, targets["privileged_teacher"], targets["privileged_student"], ids, mask, k=top_k, tail=tail
        ),
    )
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)


def test_vanilla_gradient_agrees_with_differences_of_the_independent_value() -> None:
    batch = random_batch(4, num_rows=2, num_tokens=3)
    _, gradient = run_loss(batch, dopd.table("vanilla"))
    _, targets, _, mask = (mapped(batch, Tensor.tolist)[key] for key in batch)
    expected = gradient_by_differences(
        batch, lambda student: independent.vanilla_loss(student, targets["teacher"], mask)
    )
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-8)


def test_no_row_is_the_no_op_of_the_students_own_plain_distribution() -> None:
    """LL and HS teach the PRIVILEGED student: every regime has a loss and a gradient of its own."""
    with pytest.raises(ConfigError, match="source='student' alone is the trained distribution itself"):
        dopd.Rule(source="student")
    result, gradient = run_loss(random_batch(3), dopd.table("dopd", top_k=4))
    for regime in dopd.Regime:
        rows = result.regimes == regime
        assert bool(rows.any()) and bool((result.per_token[rows] > 1e-3).all()), regime
        assert bool((gradient[rows].abs().amax(-1) > 1e-4).all()), regime


def test_same_weights_and_same_prompt_give_no_loss_and_no_gradient() -> None:
    batch = random_batch(0)
    batch["targets"] = {name: batch["student_logits"].clone() for name in SOURCES}
    for name, table in TABLES.items():
        result, gradient = run_loss(batch, table)
        assert abs(result.loss.item()) < 1e-12 and gradient.abs().max() < 1e-12, name


def test_weight_multiplies_and_weight_zero_leaves_the_tokens_in_the_denominator() -> None:
    batch = random_batch(5)
    full, _ = run_loss(batch, dopd.table("dopd", top_k=4))
    without, gradient = run_loss(batch, dopd.table("dopd", top_k=4, strong_weight=0.0))
    strong = full.regimes == dopd.Regime.HT
    assert torch.equal(without.per_token, full.per_token.masked_fill(strong, 0.0))
    assert bool((gradient[strong] == 0).all())
    torch.testing.assert_close(without.loss, sequence_mean(without.per_token, batch["mask"]))
    doubled, _ = run_loss(batch, dopd.table("dopd", top_k=4, strong_weight=2.0, light_weight=1.2, weak_weight=0.6))
    torch.testing.assert_close(doubled.loss, 2 * full.loss)


@every_table
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_one_more_factor_multiplies_what_each_token_receives(table: dopd.RoutingTable, backend: str) -> None:
    batch = random_batch(3)
    generator = torch.Generator().manual_seed(4)
    factor_BT = torch.rand(batch["mask"].shape, generator=generator, dtype=torch.float64) * 2
    plain, _ = run_loss(batch, table)
    logprobs = {
        name: logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
        for name, logits in batch["targets"].items()
    }
    decided = assign(table, SignalBatch(batch["mask"], logprobs, {}))
    expected = sequence_mean(plain.per_token * factor_BT, batch["mask"])
    leaf = batch["student_logits"].clone().requires_grad_()
    whole = {"assignment": decided.times(factor_BT, table), "table": table}
    if backend == "reference":
        found = dopd.routed_loss(**{**batch, "student_logits": leaf}, **whole)
    else:
        head = torch.eye(leaf.shape[-1], dtype=torch.float64)
        targets = {name: (logits, head) for name, logits in batch["targets"].items()}
        found = dopd.fused_routed_loss(
            leaf, head, targets, batch["completion_ids"], batch["mask"], backend="chunked", **whole
        )
    torch.testing.assert_close(found.loss, expected)
    # The gradient of a token is its own alone: with the factor it is that much larger.
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    _, plain_gradient = run_loss(batch, table)
    torch.testing.assert_close(gradient, plain_gradient * factor_BT.unsqueeze(-1))
