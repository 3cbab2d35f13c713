"""The reference loss: against an independent computation, and against everything that must not change it."""

import math
from dataclasses import replace
from typing import Any

import independent
import pytest
import torch
from torch import Tensor

import dopd
from dopd.assignment import Assignment
from dopd.divergences import entropy, log_probs, pick
from dopd.errors import ConfigError, ScoringError
from dopd.loss import routing_sums, sequence_mean, stats_of
from dopd.routing import privilege_gap

SOURCES = ["teacher", "privileged_teacher", "privileged_student"]
TABLES = {
    "dopd": dopd.table("dopd", top_k=4),
    "dopd renormalize": dopd.table("dopd", top_k=4, tail="renormalize"),
    "vanilla": dopd.table("vanilla"),
    "vanilla sampled": dopd.table("vanilla", support="sampled"),
    "vanilla js": dopd.table("vanilla", divergence="js", support="target_topk", top_k=3),
}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def random_batch(seed: int, num_rows: int = 4, num_tokens: int = 6, vocab: int = 7) -> dict[str, Any]:
    """The arguments of `routed_loss` but the table, in float64."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(4, num_rows, num_tokens, vocab, generator=generator, dtype=torch.float64)
    teacher, privileged_teacher, student, privileged_student = 2.0 * views
    privileged_student = torch.where(  # part of the tokens agree, so that low regimes occur
        torch.rand(num_rows, num_tokens, 1, generator=generator) < 0.6,
        privileged_teacher + 0.1 * privileged_student,
        privileged_student,
    )
    mask = torch.rand(num_rows, num_tokens, generator=generator) < 0.75
    mask[:, 0] = True
    return {
        "student_logits": student,
        "targets": dict(zip(SOURCES, (teacher, privileged_teacher, privileged_student), strict=True)),
        "completion_ids": torch.randint(vocab, (num_rows, num_tokens), generator=generator),
        "mask": mask,
    }


def mapped(batch: dict[str, Any], function: Any) -> dict[str, Any]:
    """The batch with a function applied to every tensor."""
    return {
        key: {name: function(x) for name, x in value.items()} if isinstance(value, dict) else function(value)
        for key, value in batch.items()
    }


def run_loss(batch: dict[str, Any], table: dopd.RoutingTable, **options: Any) -> tuple[Any, Tensor]:
    """(result, gradient of the loss with respect to the student's logits)."""
    leaf = batch["student_logits"].detach().clone().requires_grad_()
    result = dopd.routed_loss(**{**batch, "student_logits": leaf}, table=table, **options)
    result.loss.backward()
    return replace(result, loss=result.loss.detach(), per_token=result.per_token.detach()), leaf.grad


def gap_of(batch: dict[str, Any]) -> Tensor:
    """The privilege gap of every token, 0 where nothing is scored."""
    teacher, student = (
        pick(log_probs(batch["targets"][name]), batch["completion_ids"])
        for name in ("privileged_teacher", "privileged_student")
    )
    return privilege_gap(teacher, student).masked_fill(~batch["mask"], 0.0)


def logits_of(probs: list[list[float]]) -> Tensor:
    """(B, T, 2) logits of a vocabulary of two, from the probability of token 0 at every place."""
    p = torch.tensor(probs, dtype=torch.float64)
    return torch.stack([p, 1 - p], dim=-1).log()


# --- the definition ---------------------------------------------------------------------------------------------------


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


# --- what must not matter ---------------------------------------------------------------------------------------------


@every_table
def test_unchanged_by_padding(table: dopd.RoutingTable) -> None:
    batch = random_batch(6)
    expected, expected_gradient = run_loss(batch, table)
    rows, tokens = batch["mask"].shape
    for left, right, below in ((0, 3, 0), (2, 0, 0), (0, 0, 2), (1, 4, 3)):

        def pad(x: Tensor, left: int = left, right: int = right, below: int = below) -> Tensor:
            fill = {torch.int64: -100, torch.bool: False}.get(x.dtype, 3.0)  # ids of padding lie outside the vocabulary
            sides = (left, right, 0, below) if x.dim() == 2 else (0, 0, left, right, 0, below)
            return torch.nn.functional.pad(x, sides, value=fill)

        result, gradient = run_loss(mapped(batch, pad), table)
        inside = (slice(0, rows), slice(left, left + tokens))
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(gradient[inside], expected_gradient, rtol=1e-11, atol=1e-15)
        assert torch.equal(result.regimes[inside], expected.regimes)
        assert int((result.regimes != -1).sum()) == int(batch["mask"].sum())
        assert float(gradient.abs().sum()) == pytest.approx(float(expected_gradient.abs().sum()))
        assert result.stats == pytest.approx(expected.stats)


@every_table
def test_unchanged_by_the_order_of_rows(table: dopd.RoutingTable) -> None:
    batch, order = random_batch(7), torch.tensor([2, 0, 3, 1])
    expected, expected_gradient = run_loss(batch, table)
    result, gradient = run_loss(mapped(batch, lambda x: x[order]), table)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, expected_gradient[order], rtol=1e-11, atol=1e-15)
    assert torch.equal(result.regimes, expected.regimes[order])


@every_table
def test_what_stands_at_masked_positions_does_not_matter(table: dopd.RoutingTable) -> None:
    batch = random_batch(8)
    expected, expected_gradient = run_loss(batch, table)
    keep = batch["mask"]
    for junk in (0.0, 1e4, -math.inf, math.nan):

        def spoil(x: Tensor, junk: float = junk) -> Tensor:
            if x.dtype == torch.int64:
                return torch.where(keep, x, -100)
            return torch.where(keep[..., None], x, junk) if x.dim() == 3 else x

        result, gradient = run_loss(mapped(batch, spoil), table)
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-13, atol=0)
        assert torch.equal(gradient[keep], expected_gradient[keep]) and bool((gradient[~keep] == 0).all()), junk
        assert result.stats == pytest.approx(expected.stats), junk


@every_table
def test_micro_batches_with_shared_regimes_sum_to_the_whole(table: dopd.RoutingTable) -> None:
    """Normalised by the sequences of the whole batch: by local counts, short parts would weigh more."""
    batch = random_batch(9)
    whole, whole_gradient = run_loss(batch, table)
    gap = gap_of(batch) if table.routed else None
    for cuts in ([2, 2], [1, 3], [1, 1, 1, 1]):
        parts = []
        for part in range(len(cuts)):

            def cut(x: Tensor, part: int = part, cuts: list[int] = cuts) -> Tensor:
                return x.split(cuts)[part]

            parts.append(
                run_loss(
                    mapped(batch, cut),
                    table,
                    assignment=Assignment(cut(whole.regimes), None if gap is None else cut(gap)),
                    num_sequences=4,
                )
            )
        results, gradients = zip(*parts, strict=True)
        torch.testing.assert_close(sum(r.loss for r in results), whole.loss, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.cat(gradients), whole_gradient, rtol=1e-11, atol=1e-15)
        summed = {name: sum(float(r.sums[name]) for r in results) for name in whole.sums}
        assert summed == pytest.approx({name: float(value) for name, value in whole.sums.items()})
        assert stats_of(summed) == pytest.approx(whole.stats)


def test_micro_batches_that_route_alone_would_change_the_loss() -> None:
    """Guards the test above: the regimes and the denominator of the whole batch are both needed."""
    batch, table = random_batch(9), dopd.table("dopd", top_k=4)
    whole, _ = run_loss(batch, table)
    halves = [mapped(batch, lambda x, i=i: x[i : i + 2]) for i in (0, 2)]
    alone = sum(run_loss(half, table, num_sequences=4)[0].loss for half in halves)
    assert not torch.allclose(alone, whole.loss, rtol=1e-3)


@every_table
def test_rows_without_a_scored_token_do_not_count(table: dopd.RoutingTable) -> None:
    batch = random_batch(10)
    expected, _ = run_loss(mapped(batch, lambda x: x[:3]), table)
    batch["mask"][3] = False
    result, gradient = run_loss(batch, table)
    torch.testing.assert_close(result.loss, expected.loss, rtol=1e-13, atol=0)
    assert bool((gradient[3] == 0).all())


@every_table
def test_batch_without_a_scored_token_is_zero_and_differentiable(table: dopd.RoutingTable) -> None:
    batch = random_batch(10)
    batch["mask"] = torch.zeros_like(batch["mask"])
    result = dopd.routed_loss(**batch, table=table)
    assert float(result.loss) == 0.0 and bool((result.regimes == -1).all())
    assert all(value == 0 for value in result.stats.values())


@every_table
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32])
def test_mask_of_any_dtype_means_the_same(table: dopd.RoutingTable, dtype: torch.dtype) -> None:
    batch = random_batch(11)
    expected, _ = run_loss(batch, table)
    result, _ = run_loss({**batch, "mask": batch["mask"].to(dtype)}, table)
    assert torch.equal(result.loss, expected.loss) and torch.equal(result.regimes, expected.regimes)


def test_token_t_is_predicted_by_logit_t_of_what_is_passed_and_not_by_its_neighbour() -> None:
    """The off-by-one guard: position t of every argument is about completion token t, and about no other."""
    batch, table = random_batch(12), dopd.table("dopd", top_k=4)
    leaf = batch["student_logits"].clone().requires_grad_()
    result = dopd.routed_loss(**{**batch, "student_logits": leaf}, table=table)
    row, token = 1, 0
    (gradient,) = torch.autograd.grad(result.per_token[row, token], leaf)
    touched = gradient.abs().amax(-1) > 0
    assert touched.nonzero().tolist() == [[row, token]]
    # The gap reads the privileged logits of position t at completion id t.
    targets, ids = batch["targets"], batch["completion_ids"]
    gap = privilege_gap(*(pick(log_probs(targets[name]), ids) for name in ("privileged_teacher", "privileged_student")))
    for regime in dopd.Regime:
        rows = result.regimes == regime
        assert result.stats[f"gap/{regime.name}"] == pytest.approx(float(gap[rows].mean()))
    shifted = dopd.routed_loss(**{**batch, "completion_ids": ids.roll(1, dims=1)}, table=table)
    assert not torch.equal(shifted.regimes, result.regimes)


# --- what comes back --------------------------------------------------------------------------------------------------


@every_table
def test_per_token_values_add_up_to_the_loss_and_are_zero_where_masked(table: dopd.RoutingTable) -> None:
    batch = random_batch(13)
    result = dopd.routed_loss(**batch, table=table)
    mask = batch["mask"]
    assert bool((result.per_token[~mask] == 0).all()) and torch.equal(result.regimes == -1, ~mask)
    by_hand = sum(float(row[keep].mean()) for row, keep in zip(result.per_token, mask, strict=True)) / len(mask)
    assert float(result.loss) == pytest.approx(by_hand, rel=1e-13)


@every_table
def test_stats_equal_those_recomputed_and_shares_sum_to_one(table: dopd.RoutingTable) -> None:
    batch = random_batch(14)
    result = dopd.routed_loss(**batch, table=table)
    mask, stats = batch["mask"], result.stats
    assert stats["num_tokens"] == int(mask.sum()) and stats["num_sequences"] == len(mask)
    assert sum(value for name, value in stats.items() if name.startswith("share/")) == pytest.approx(1.0)
    assert stats["entropy"] == pytest.approx(float(entropy(log_probs(batch["student_logits"]))[mask].mean()))
    for rule in table.rules:
        rows = mask if rule.regime is None else result.regimes == int(rule.regime)
        assert stats[f"share/{rule.label}"] == pytest.approx(float(rows.sum() / mask.sum()))
        assert stats[f"weight/{rule.label}"] == pytest.approx(rule.weight)
        assert stats[f"loss/{rule.label}"] == pytest.approx(float(result.per_token[rows].mean()))
        assert (f"gap/{rule.label}" in stats) == table.routed


def test_sums_ignore_what_stands_at_masked_positions() -> None:
    table, batch = TABLES["dopd"], random_batch(14)
    result = dopd.routed_loss(**batch, table=table)
    junk = torch.where(batch["mask"], 0.5, math.nan)
    assignment = Assignment(result.regimes, junk)
    per_row = [torch.where(assignment.chosen(index, rule), 0.5, 0.0) for index, rule in enumerate(table.rules)]
    stats = stats_of({name: float(x) for name, x in routing_sums(table, assignment, per_row, junk).items()})
    assert stats["entropy"] == 0.5
    assert all(stats[f"{name}/{rule.label}"] == 0.5 for name in ("loss", "gap") for rule in table.rules)


def test_empty_regime_has_zero_share_and_means() -> None:
    batch = random_batch(15)
    batch["targets"]["privileged_student"] = batch["targets"]["privileged_teacher"].clone()
    stats = dopd.routed_loss(**batch, table=dopd.table("dopd", top_k=4)).stats
    assert stats["share/HT"] == 1.0  # gap 0 everywhere is A_n >= A~: all tokens in one regime, which stats show
    assert [stats[f"{name}/HS"] for name in ("share", "weight", "loss", "gap")] == [0.0] * 4


def test_stats_and_sums_carry_no_gradient() -> None:
    batch = random_batch(16)
    leaf = batch["student_logits"].requires_grad_()
    result = dopd.routed_loss(**{**batch, "student_logits": leaf}, table=dopd.table("dopd", top_k=4))
    assert result.loss.requires_grad and not any(value.requires_grad for value in result.sums.values())


@pytest.mark.parametrize(
    ("student", "target", "loss"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
@every_table
def test_dtypes_may_differ_between_student_and_target(
    table: dopd.RoutingTable, student: torch.dtype, target: torch.dtype, loss: torch.dtype
) -> None:
    batch = random_batch(17)
    batch["student_logits"] = batch["student_logits"].to(student)
    batch["targets"] = {name: logits.to(target) for name, logits in batch["targets"].items()}
    result, gradient = run_loss(batch, table)
    assert result.loss.dtype == result.per_token.dtype == loss and gradient.dtype == student
    exact, _ = run_loss(mapped(batch, lambda x: x.double() if x.is_floating_point() else x), table)
    assert float(result.loss) == pytest.approx(float(exact.loss), rel=1e-5)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["privileged_teacher", "privileged_student"])
def test_missing_source_is_refused_by_name(missing: str) -> None:
    batch = random_batch(0)
    del batch["targets"][missing]
    with pytest.raises(ConfigError, match=rf"table 'dopd' needs {missing} \(.*nobody provides it; provided: "):
        dopd.routed_loss(**batch, table=dopd.table("dopd"))


def test_views_that_a_table_does_not_need_may_be_missing() -> None:
    batch = random_batch(0)
    batch["targets"] = {"teacher": batch["targets"]["teacher"]}
    dopd.routed_loss(**batch, table=dopd.table("vanilla"))


def test_routing_needs_both_privileged_views_even_where_no_row_is_taught_by_one() -> None:
    batch = random_batch(0)
    del batch["targets"]["privileged_student"]
    table = dopd.table("dopd", weak_weight=0.0)
    only_teacher = dopd.RoutingTable.from_rows(
        [row | {"source": "privileged_teacher"} for row in table.to_rows()], name="only_teacher"
    )
    with pytest.raises(ConfigError, match="'only_teacher' needs privileged_student"):
        dopd.routed_loss(**batch, table=only_teacher)


@pytest.mark.parametrize("shape", [(4, 6, 1), (4, 1, 7), (1, 6, 7), (4, 6, 8), (4, 5, 7), (6, 7)])
def test_target_of_another_shape_or_vocabulary_is_refused(shape: tuple[int, ...]) -> None:
    batch = random_batch(0)
    batch["targets"]["teacher"] = torch.randn(shape)
    with pytest.raises(ConfigError, match=r"targets\['teacher'\] .* must have the shape of student_logits \(4, 6, 7\)"):
        dopd.routed_loss(**batch, table=dopd.table("vanilla"))


@pytest.mark.parametrize("name", ["completion_ids", "mask"])
@pytest.mark.parametrize("shape", [(4, 1), (1, 6), (4, 7), (24,)])
def test_ids_or_mask_of_another_length_are_refused(name: str, shape: tuple[int, ...]) -> None:
    batch = random_batch(0)
    batch[name] = torch.ones(shape, dtype=torch.long)
    with pytest.raises(ConfigError, match=rf"{name} .* must have the shape \(B, T\) \(4, 6\)"):
        dopd.routed_loss(**batch, table=dopd.table("vanilla"))


def test_logits_without_a_batch_dimension_are_refused() -> None:
    batch = mapped(random_batch(0), lambda x: x[0])
    with pytest.raises(ConfigError, match=r"student_logits \(6, 7\) must have the shape \(B, T, V\)"):
        dopd.routed_loss(**batch, table=dopd.table("vanilla"))


@pytest.mark.parametrize("bad", [-100, -1, 7, 50_000])
def test_scored_ids_outside_the_vocabulary_are_refused(bad: int) -> None:
    batch = random_batch(0)
    batch["completion_ids"][1, 0] = bad
    with pytest.raises(ConfigError, match=rf"1 scored ids are outside the vocabulary \[0, 7\), first {bad}\. Set mask"):
        dopd.routed_loss(**batch, table=dopd.table("vanilla"))


@pytest.mark.parametrize("name", ["dopd", "vanilla"])
def test_regimes_that_do_not_fit_the_mask_are_refused(name: str) -> None:
    batch, table = random_batch(0), TABLES[name]
    regimes = dopd.routed_loss(**batch, table=table).regimes
    for spoiled in (regimes.masked_fill(regimes == -1, 0), torch.full_like(regimes, -1), regimes + 4, regimes.roll(1)):
        with pytest.raises(ConfigError, match="do not fit the mask and table"):
            dopd.routed_loss(**batch, table=table, assignment=Assignment(spoiled))
    with pytest.raises(ConfigError, match=r"regimes \(4, 5\) must have the shape"):
        dopd.routed_loss(**batch, table=table, assignment=Assignment(regimes[:, :5]))


def test_sampled_token_that_a_privileged_view_rules_out_is_refused() -> None:
    batch = random_batch(0)
    batch["targets"]["privileged_teacher"][0, 0, batch["completion_ids"][0, 0]] = -math.inf
    with pytest.raises(ScoringError, match=r"privileged_teacher: 1 of 18 scored log-probs are not finite"):
        dopd.routed_loss(**batch, table=dopd.table("dopd"))
