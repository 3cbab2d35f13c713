"""Routing: a function of the multiset of scored tokens of the batch, and of nothing else."""

import math
import os
from pathlib import Path

import independent
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import dopd
from dopd.errors import ConfigError, ScoringError
from dopd.routing import Thresholds, classify, gap_thresholds, privilege_gap

LH, LL, HT, HS = (int(regime) for regime in dopd.Regime)


def random_batch(seed: int, num_rows: int = 5, num_tokens: int = 13) -> tuple[Tensor, Tensor, Tensor]:
    """(teacher log-probs, student log-probs, mask) with gaps large enough that every regime occurs."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_rows, num_tokens)
    log_t = torch.empty(shape, dtype=torch.float64).uniform_(0.02, 0.98, generator=generator).log()
    log_s = torch.empty(shape, dtype=torch.float64).uniform_(0.02, 0.98, generator=generator).log()
    close = torch.rand(shape, generator=generator) < 0.6
    log_s = torch.where(close, (log_t + 0.1 * torch.randn(shape, generator=generator)).clamp(max=-1e-3), log_s)
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[0, 0] = True
    return log_t, log_s, mask


def batch_of(gaps: list[float], teacher_prob: float = 0.9) -> tuple[Tensor, Tensor, Tensor]:
    """One row whose privilege gaps are exactly the given ones (teacher surer), up to one rounding."""
    log_t = torch.full((1, len(gaps)), math.log(teacher_prob), dtype=torch.float64)
    return log_t, log_t - torch.tensor([gaps], dtype=torch.float64), torch.ones(1, len(gaps), dtype=torch.bool)


# --- the four conditions ----------------------------------------------------------------------------------------------


def test_regime_numbers_are_the_public_ones() -> None:
    assert {regime.name: int(regime) for regime in dopd.Regime} == {"LH": 0, "LL": 1, "HT": 2, "HS": 3}


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("trim", [0.0, 0.05, 0.3])
def test_agrees_with_the_independent_computation(seed: int, trim: float) -> None:
    log_t, log_s, mask = random_batch(seed, num_rows=1 + seed % 6, num_tokens=3 + 5 * (seed % 7))
    regimes = dopd.route(log_t, log_s, mask, trim=trim)
    expected = independent.regimes(log_t[mask].exp().tolist(), log_s[mask].exp().tolist(), trim)
    assert [dopd.Regime(value).name for value in regimes[mask].tolist()] == expected


def test_random_batches_reach_every_regime() -> None:
    seen = torch.cat([dopd.route(*random_batch(seed)).flatten() for seed in range(5)])
    assert set(seen.tolist()) == {-1, LH, LL, HT, HS}


def test_hand_computed_example() -> None:
    # gaps 0, ln 3, 0, ln 4: mean 0.621; q_T + q_S = 1.6, 1.2, 0.2, 1.0: mean 1.0
    log_t = torch.tensor([[0.8, 0.9, 0.1, 0.2]]).log()
    log_s = torch.tensor([[0.8, 0.3, 0.1, 0.8]]).log()
    assert dopd.route(log_t, log_s, torch.ones(1, 4)).tolist() == [[LH, HT, LL, HS]]
    thresholds = gap_thresholds(log_t, log_s, torch.ones(1, 4))
    assert thresholds.gap == pytest.approx((math.log(3) + math.log(4)) / 4, rel=1e-6)
    assert (thresholds.teacher_prob, thresholds.student_prob) == (pytest.approx(0.5), pytest.approx(0.5))
    assert thresholds.confidence == pytest.approx(1.0)
    assert (thresholds.num_tokens, thresholds.num_trimmed) == (4, 0)


def test_worked_example_of_the_answer_key() -> None:
    # Teacher 0.9: a peeking student at 0.85 only lacked the hint (LH); at 0.3 it lacks the skill (HT).
    log_t = torch.tensor([[0.9, 0.9]]).log()
    log_s = torch.tensor([[0.85, 0.3]]).log()
    assert dopd.route(log_t, log_s, torch.ones(1, 2)).tolist() == [[LH, HT]]


def test_gap_taken_with_the_plain_student_would_invert_the_routing() -> None:
    """The gap compares both policies under the same p. With the plain student it measures the missing information."""
    # Token 0 needs p: all who read p agree at 0.9, the plain student has 0.1.
    # Token 1 is a skill: the teacher has 0.9, the student has 0.5 with and without p.
    teacher, privileged_student, plain_student = (
        torch.tensor([values]).log() for values in ([0.9, 0.9], [0.9, 0.5], [0.1, 0.5])
    )
    mask = torch.ones(1, 2)
    assert dopd.route(teacher, privileged_student, mask).tolist() == [[LH, HT]]
    assert dopd.route(teacher, plain_student, mask).tolist() == [[HT, LH]]  # the mistake

    # The loss routes by the privileged views, whatever the plain student says.
    def logits(log_p: Tensor) -> Tensor:
        return torch.stack([log_p, (1 - log_p.exp()).log()], dim=-1)

    for plain in (plain_student, teacher, privileged_student):
        targets = {"privileged_teacher": logits(teacher), "privileged_student": logits(privileged_student)}
        ids = torch.zeros(1, 2, dtype=torch.long)
        assert dopd.routed_loss(logits(plain), targets, ids, mask, dopd.table("dopd")).regimes.tolist() == [[LH, HT]]


def test_gap_is_absolute_and_symmetric() -> None:
    log_t, log_s, _ = random_batch(0)
    assert torch.equal(privilege_gap(log_t, log_s), privilege_gap(log_s, log_t))
    assert bool((privilege_gap(log_t, log_s) >= 0).all())


def test_swapping_the_views_swaps_the_high_regimes_only() -> None:
    log_t, log_s, mask = random_batch(1)
    swapped = torch.tensor([LH, LL, HS, HT, -1])  # -1 indexes the last entry
    assert torch.equal(dopd.route(log_s, log_t, mask), swapped[dopd.route(log_t, log_s, mask)])


# --- the mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_partition_is_exhaustive_and_exclusive_and_minus_one_where_masked(seed: int) -> None:
    log_t, log_s, mask = random_batch(seed)
    regimes = dopd.route(log_t, log_s, mask)
    assert regimes.dtype == torch.int64 and regimes.shape == mask.shape
    assert torch.equal(regimes == -1, ~mask)
    assert set(regimes[mask].tolist()) <= {LH, LL, HT, HS}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.float32])
def test_mask_of_any_dtype_means_the_same(dtype: torch.dtype) -> None:
    log_t, log_s, mask = random_batch(3)
    for scored in (1, 7):  # non-zero means scored
        assert torch.equal(dopd.route(log_t, log_s, (scored * mask).to(dtype)), dopd.route(log_t, log_s, mask))


def test_masked_positions_may_hold_anything() -> None:
    log_t, log_s, mask = random_batch(4)
    expected = dopd.route(log_t, log_s, mask)
    for junk in (0.0, 5.0, -math.inf, math.nan):
        assert torch.equal(
            dopd.route(log_t.masked_fill(~mask, junk), log_s.masked_fill(~mask, -junk), mask), expected
        ), junk


def test_empty_mask_routes_nothing() -> None:
    log_t, log_s, mask = random_batch(5)
    nothing = torch.zeros_like(mask)
    assert dopd.route(log_t, log_s, nothing).eq(-1).all()
    thresholds = gap_thresholds(log_t, log_s, nothing)
    assert (thresholds.num_tokens, thresholds.num_trimmed) == (0, 0) and math.isnan(thresholds.gap)
    assert dopd.route(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)


def test_single_token_is_high_gap() -> None:
    assert dopd.route(*batch_of([0.2])).tolist() == [[HT]]  # A >= A~ holds with equality


# --- the trim ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "num_trimmed"), [(1, 0), (19, 0), (20, 1), (39, 1), (40, 2), (60, 3), (100, 5)])
def test_trim_removes_exactly_the_floor_of_five_percent(num_tokens: int, num_trimmed: int) -> None:
    gaps = [0.01 * (1 + i) for i in range(num_tokens)]
    thresholds = gap_thresholds(*batch_of(gaps))
    assert (thresholds.num_tokens, thresholds.num_trimmed) == (num_tokens, num_trimmed)
    kept = gaps[: num_tokens - num_trimmed]
    assert thresholds.gap == pytest.approx(sum(kept) / len(kept), rel=1e-12)


def test_trim_is_not_off_by_one_through_float_rounding() -> None:
    # 0.29 * 100 is 28.999999999999996 in floating point
    assert gap_thresholds(*batch_of([0.01 * i for i in range(100)]), trim=0.29).num_trimmed == 29


def test_trimmed_tokens_leave_all_three_averages_but_are_still_routed() -> None:
    log_t = torch.tensor([[0.5] * 19 + [0.9]], dtype=torch.float64).log()
    log_s = torch.tensor([[0.5] * 18 + [0.4] + [0.001]], dtype=torch.float64).log()
    mask = torch.ones(1, 20)
    thresholds = gap_thresholds(log_t, log_s, mask)
    assert thresholds.gap == pytest.approx(math.log(0.5 / 0.4) / 19)
    assert thresholds.teacher_prob == pytest.approx(0.5)
    assert thresholds.student_prob == pytest.approx((18 * 0.5 + 0.4) / 19)
    assert dopd.route(log_t, log_s, mask)[0, 18:].tolist() == [HT, HT]
    # Without the trim the outlier lifts the average over the other gap.
    assert dopd.route(log_t, log_s, mask, trim=0.0)[0, 18:].tolist() == [LL, HT]


def test_trim_counts_the_scored_tokens_and_not_the_padding() -> None:
    log_t, log_s, mask = batch_of([0.1 * i for i in range(20)])
    mask[0, 0] = False
    assert gap_thresholds(log_t, log_s, mask).num_trimmed == 0


@pytest.mark.parametrize("trim", [-0.01, 1.0, 5.0, math.nan])
def test_trim_outside_its_range_is_refused(trim: float) -> None:
    with pytest.raises(ConfigError, match=r"trim .*must be in \[0, 1\)"):
        dopd.route(*random_batch(0), trim=trim)


def test_ties_at_the_trim_boundary_do_not_depend_on_the_order() -> None:
    # Two of 40 are trimmed and four are tied for it: their q differ, so which two are taken would show in the averages.
    tied = [-0.5, -1.0, -1.5, -3.0]  # exact in binary, and so is the gap of 2 below
    log_t = torch.tensor([math.log(0.9)] * 36 + tied, dtype=torch.float64)
    log_s = log_t - torch.tensor([0.1] * 36 + [2.0] * 4, dtype=torch.float64)
    assert privilege_gap(log_t, log_s)[36:].tolist() == [2.0] * 4
    reference = gap_thresholds(log_t[None], log_s[None], torch.ones(1, 40))
    shared = 0.5 * sum(math.exp(value) for value in tied)
    assert reference.teacher_prob == pytest.approx((36 * 0.9 + shared) / 38, rel=1e-12)
    for seed in range(20):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
        assert gap_thresholds(log_t[order][None], log_s[order][None], torch.ones(1, 40)) == reference


# --- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_unchanged_by_padding_left_right_and_extra_rows(seed: int) -> None:
    log_t, log_s, mask = random_batch(seed)
    expected, thresholds = dopd.route(log_t, log_s, mask), gap_thresholds(log_t, log_s, mask)
    for left, right, rows in ((3, 0, 0), (0, 7, 0), (0, 0, 2), (2, 5, 3)):
        pad = (left, right, 0, rows)
        padded_t, padded_s = (torch.nn.functional.pad(x, pad, value=-0.7) for x in (log_t, log_s))
        padded_mask = torch.nn.functional.pad(mask, pad, value=False)
        assert gap_thresholds(padded_t, padded_s, padded_mask) == thresholds
        regimes = dopd.route(padded_t, padded_s, padded_mask)
        assert torch.equal(regimes[: mask.shape[0], left : left + mask.shape[1]], expected)
        assert int((regimes != -1).sum()) == int(mask.sum())


@pytest.mark.parametrize("seed", range(10))
def test_unchanged_by_the_order_of_rows_and_tokens(seed: int) -> None:
    batch = random_batch(seed, num_rows=8, num_tokens=50)
    expected, thresholds = dopd.route(*batch), gap_thresholds(*batch)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(8, generator=generator), torch.randperm(50, generator=generator)
    shuffled = [tensor[rows][:, columns] for tensor in batch]
    assert gap_thresholds(*shuffled) == thresholds  # bit for bit
    assert torch.equal(dopd.route(*shuffled), expected[rows][:, columns])


@pytest.mark.parametrize("num_parts", [2, 3, 5])
def test_unchanged_by_micro_batches_when_the_thresholds_are_shared(num_parts: int) -> None:
    log_t, log_s, mask = random_batch(7, num_rows=10)
    whole, thresholds = dopd.route(log_t, log_s, mask), gap_thresholds(log_t, log_s, mask)
    parts = [
        classify(*part, thresholds)
        for part in zip(log_t.chunk(num_parts), log_s.chunk(num_parts), mask.chunk(num_parts), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_statistics_per_micro_batch_would_change_the_routing() -> None:
    """Guards the test above: with statistics of its own, a part of the batch routes differently."""
    log_t, log_s, mask = random_batch(7, num_rows=10)
    alone = torch.cat([dopd.route(log_t[i : i + 2], log_s[i : i + 2], mask[i : i + 2]) for i in range(0, 10, 2)])
    assert not torch.equal(alone, dopd.route(log_t, log_s, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_log_probs_are_read_in_double(dtype: torch.dtype) -> None:
    log_t, log_s, mask = (x.to(dtype) if x.is_floating_point() else x for x in random_batch(8))
    assert torch.equal(dopd.route(log_t, log_s, mask), dopd.route(log_t.double(), log_s.double(), mask))


@pytest.mark.parametrize("num_tokens", [2, 3, 7, 10, 20, 49, 100, 333])
@pytest.mark.parametrize("gap", [0.0, 0.1, 0.3, 1.7])
def test_constant_gaps_are_not_split_by_rounding(num_tokens: int, gap: float) -> None:
    """A_n >= A~ holds for equal gaps. A mean that rounds up would turn every token of the batch into a low one."""
    log_t = torch.full((1, num_tokens), -0.25, dtype=torch.float64)
    log_s = log_t - gap
    assert dopd.route(log_t, log_s, torch.ones(1, num_tokens)).eq(HT).all()
    if gap:
        assert dopd.route(log_s, log_t, torch.ones(1, num_tokens)).eq(HS).all()


@pytest.mark.parametrize("prob", [0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("num_tokens", [3, 10, 49])
def test_equal_confidence_counts_as_confident(num_tokens: int, prob: float) -> None:
    # One outlier lifts the mean gap, so the others are low; all have one and the same q_S + q_T but the outlier.
    log_p = torch.full((1, num_tokens), math.log(prob), dtype=torch.float64)
    thresholds = gap_thresholds(log_p, log_p, torch.ones(1, num_tokens))
    lifted = Thresholds(1.0, thresholds.student_prob, thresholds.teacher_prob, num_tokens, 0)
    assert classify(log_p, log_p, torch.ones(1, num_tokens), lifted).eq(LH).all()


def test_thresholds_do_not_depend_on_the_number_of_threads() -> None:
    log_t, log_s, mask = random_batch(9, num_rows=100, num_tokens=1000)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(gap_thresholds(log_t, log_s, mask))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


# --- rank count -------------------------------------------------------------------------------------------------------


def _rank_main(rank: int, world_size: int, rendezvous: str, folder: str, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """One rank: holds its rows only, gathers the scored log-probs of all, and routes its own."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    log_t, log_s, mask = (tensor[rank::world_size] for tensor in batch)
    # Ranks hold different numbers of scored tokens: gather ragged.
    gathered: list[tuple[Tensor, Tensor]] = [None] * world_size  # type: ignore[list-item]
    dist.all_gather_object(gathered, (log_t[mask], log_s[mask]))
    all_t, all_s = (torch.cat(column)[None] for column in zip(*gathered, strict=True))
    thresholds = gap_thresholds(all_t, all_s, torch.ones_like(all_t))
    torch.save((thresholds, classify(log_t, log_s, mask, thresholds)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_statistics_are_not_per_rank_two_gloo_ranks_route_as_one_process(tmp_path: Path) -> None:
    batch = random_batch(11, num_rows=7, num_tokens=40)
    mp.spawn(_rank_main, args=(2, str(tmp_path / "rendezvous"), str(tmp_path), batch), nprocs=2)
    whole, thresholds = dopd.route(*batch), gap_thresholds(*batch)
    for rank in range(2):
        rank_thresholds, regimes = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert rank_thresholds == thresholds  # the same floats, bit for bit
        assert torch.equal(regimes, whole[rank::2])
        own = gap_thresholds(*(tensor[rank::2] for tensor in batch))
        assert own != thresholds  # what one rank would have taken alone


# --- numbers that cannot be right -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("which", ["teacher_logprobs", "student_logprobs"])
def test_non_finite_log_probs_are_refused_by_name(bad: float, which: str) -> None:
    log_t, log_s, mask = random_batch(0)
    (log_t if which == "teacher_logprobs" else log_s)[0, 0] = bad
    with pytest.raises(ScoringError, match=rf"{which}: 1 of {int(mask.sum())} scored log-probs are not finite"):
        dopd.route(log_t, log_s, mask)


@pytest.mark.parametrize("which", ["teacher_logprobs", "student_logprobs"])
def test_probabilities_or_logits_in_place_of_log_probs_are_refused(which: str) -> None:
    log_t, log_s, mask = random_batch(0)
    arguments = {"teacher_logprobs": log_t, "student_logprobs": log_s}
    arguments[which] = arguments[which].exp()
    with pytest.raises(ScoringError, match=rf"{which}: the largest scored log-prob is .* above 0.*log_softmax"):
        dopd.route(**arguments, mask=mask)


def test_certain_tokens_with_rounding_above_zero_are_accepted() -> None:
    log_t, log_s, mask = batch_of([0.0, 0.1, 0.2], teacher_prob=1.0)
    assert dopd.route(log_t + 1e-7, log_s, mask).shape == (1, 3)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_shapes_that_would_broadcast_are_refused(argument: int) -> None:
    batch = list(random_batch(0))
    batch[argument] = batch[argument][:, :1]
    with pytest.raises(ConfigError, match=r"\(5, 1\).*must have one shape \(B, T\)"):
        dopd.route(*batch)
    with pytest.raises(ConfigError, match="must have one shape"):
        classify(*batch, Thresholds(0.1, 0.5, 0.5, 1, 0))
