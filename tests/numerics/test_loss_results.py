"""What the reference loss gives back, and what it refuses."""

import math

import pytest
import torch
from loss_kit import TABLES, every_table, mapped, random_batch, run_loss

import dopd
from dopd.assignment import Assignment
from dopd.divergences import entropy, log_probs
from dopd.errors import ConfigError, ScoringError
from dopd.loss import routing_sums, stats_of


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
    stats = stats_of({name: float(x) for name, x in routing_sums(table, assignment, per_row, junk, {}).items()})
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
    only_teacher = dopd.RoutingTable.from_dicts(
        [row | {"source": "privileged_teacher"} for row in table.to_dicts()], name="only_teacher"
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
