"""What must not change the reference loss: padding, order, micro-batches, masked positions, types."""

import math

import pytest
import torch
from loss_kit import every_table, gap_of, mapped, random_batch, run_loss
from torch import Tensor

import dopd
from dopd.assignment import Assignment
from dopd.divergences import log_probs, pick
from dopd.loss import stats_of
from dopd.routing import privilege_gap


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
