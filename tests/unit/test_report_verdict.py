"""The verdict of a page: paired differences against values worked out here, and words that follow from them."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

import tests.report_kit as kit
from dopd.report.comparisons import START, Difference, compare
from dopd.report.findings import findings
from dopd.report.groups import find_runs, find_summary, group_runs
from dopd.report.page import report_data, report_page
from dopd.report.roles import of_interest, places, reference_of
from dopd.report.summary import verdicts
from dopd.report.verdict import _rounded, differences_of, verdict, verdict_sentence
from dopd.statistics import difference_interval, mean_interval, wilson_interval

T95_TWO = 4.302652729911275  # Student's two-sided 95% quantile, two degrees of freedom


def result(greedy: float, sampled: float = 0.3, prompts: int = 512, **more: Any) -> dict[str, Any]:
    metrics = {"accuracy_greedy": greedy, "accuracy_sampled": sampled, "num_prompts": float(prompts)}
    return {"metrics": metrics | {"entropy": 0.2, "length": 20.0}, "intervals": {}, **more}


def by_seed(*accuracies: float) -> dict[int, dict[str, Any]]:
    return {seed: result(accuracy) for seed, accuracy in enumerate(accuracies)}


def p_of_two_degrees(differences: list[float]) -> float:
    """Student's p of three differences, in the closed form for two degrees of freedom."""
    t = statistics.fmean(differences) / (statistics.stdev(differences) / math.sqrt(3))
    return 1 - abs(t) / math.sqrt(2 + t * t)


def compared(methods: dict[str, Any], start: float = 0.4) -> dict[tuple[str, str], Difference]:
    starts = {name: dict.fromkeys(results, result(start)) for name, results in methods.items()}
    found = compare(methods, starts, methods)
    return {(d.method, d.against): d for d in found if d.measure == "greedy"}


def finished(folder: Path, method: str, seed: int, final: float, **options: Any) -> Path:
    kit.run_folder(folder, method, seed, **options)
    (folder / "result.json").write_text(json.dumps(result(final)))
    return folder


# --- Numbers


def test_differences_are_paired_by_seed_and_corrected_across_methods() -> None:
    vanilla, dopd, other = (0.50, 0.52, 0.51), (0.60, 0.625, 0.615), (0.50, 0.56, 0.49)
    found = compared({"vanilla": by_seed(*vanilla), "other": by_seed(*other), "dopd": by_seed(*dopd)})
    assert list(found) == [
        ("vanilla", START),
        ("other", START),
        ("dopd", START),
        ("other", "vanilla"),
        ("dopd", "vanilla"),
    ]
    gained = [a - b for a, b in zip(dopd, vanilla, strict=True)]
    half = T95_TWO * statistics.stdev(gained) / math.sqrt(3)
    ours = found["dopd", "vanilla"]
    assert (ours.interval.mean, ours.interval.low, ours.interval.high) == pytest.approx(
        (statistics.fmean(gained), statistics.fmean(gained) - half, statistics.fmean(gained) + half), rel=1e-3
    )
    raw = {
        "dopd": p_of_two_degrees(gained),
        "other": p_of_two_degrees([a - b for a, b in zip(other, vanilla, strict=True)]),
    }
    assert ours.p == pytest.approx(2 * raw["dopd"])  # the smaller of two
    assert found["other", "vanilla"].p == pytest.approx(max(2 * raw["dopd"], raw["other"]))
    assert (ours.verdict, found["other", "vanilla"].verdict) == ("better", "undecided")
    assert ours.pairs == 3 and ours.family == 2


def test_seeds_that_only_one_of_both_has_are_left_out() -> None:
    found = compared({"vanilla": {0: result(0.5), 1: result(0.5), 7: result(0.1)}, "dopd": by_seed(0.6, 0.7, 0.9)})
    assert found["dopd", "vanilla"].interval.mean == pytest.approx(0.15) and found["dopd", "vanilla"].pairs == 2


def test_a_p_that_counts_is_never_shown_as_the_limit() -> None:
    assert [_rounded(p) for p in (0.0004, 0.0842, 0.04973, 0.049996, 0.05, 0.0503)] == [
        "< 0.001",
        "= 0.084",
        "= 0.0497",
        "= 0.049996",
        "= 0.050000",
        "= 0.0503",
    ]


def test_one_run_on_two_numbers_of_prompts_is_said_once() -> None:
    first, last = result(0.4, prompts=256), result(0.6, prompts=512)
    start = {name: {0: result(0.4, prompts=256)} for name in ("vanilla", "dopd")}
    after = {name: {0: result(0.5, prompts=256)} for name in start}
    found = compare({"vanilla": {0: first | last}, "dopd": {0: last}}, start, after)
    assert verdict_sentence(found, ["vanilla", "dopd"])[1].endswith(
        "(95% intervals, one run, over 256 and 512 prompts)."
    )


def test_two_seeds_are_not_tested() -> None:
    ours = compared({"vanilla": by_seed(0.5, 0.501), "dopd": by_seed(0.6, 0.601)})["dopd", "vanilla"]
    assert ours.p is None and ours.verdict == "untested" and "2 seeds are too few" in ours.words()


def test_a_significant_difference_that_correction_takes_away_is_said() -> None:
    gains = [0.01, 0.02, 0.03]
    alone = p_of_two_degrees(gains)
    assert 0.05 < 2 * alone < 0.2 and alone > 0.05
    sure = [0.02, 0.03, 0.028]
    assert 0.025 > p_of_two_degrees(sure) > 0.0125
    methods = {"vanilla": by_seed(0.5, 0.5, 0.5)} | {f"m{n}": by_seed(*(0.5 + gain for gain in sure)) for n in range(4)}
    ours = compared(methods)["m0", "vanilla"]
    assert ours.p == pytest.approx(4 * p_of_two_degrees(sure)) and ours.interval.low > 0
    assert ours.verdict == "undecided" and ours.words() == "no difference beyond chance after correction"
    _, sentence = verdict_sentence(sorted(compared(methods).values(), key=lambda d: d.method != "m3"), list(methods))
    assert "than vanilla in greedy answers beyond chance after correction" in sentence
    assert sentence.endswith("(95% intervals, tested over 3 seeds, corrected for the number of methods).")


def test_one_pair_is_judged_over_prompts() -> None:
    before, after = [0.0, 0.0, 1.0, 0.0] * 40, [1.0, 0.0, 1.0, 0.0] * 40
    first = result(0.25, prompts=160, scores={"greedy": before})
    second = result(0.5, prompts=160, scores={"greedy": after})
    (paired,) = (d for d in compare({"dopd": {0: second}}, {"dopd": {0: first}}, {"dopd": {0: second}})
                 if d.measure == "greedy")  # fmt: skip
    gained = [b - a for a, b in zip(before, after, strict=True)]
    with_half_more = [*gained, *[math.sqrt(0.5), -math.sqrt(0.5)]]  # Agresti and Min, 2005: half a pair more each way
    half = 1.959964 * statistics.pstdev(with_half_more) / math.sqrt(162)
    centre = statistics.fmean(with_half_more)
    assert (paired.interval.low, paired.interval.high) == pytest.approx((centre - half, centre + half))
    assert paired.verdict == "better" and paired.p is None and "one seed says nothing about others" in paired.words()


def test_newcombes_interval_of_a_published_example() -> None:
    """56 of 70 against 48 of 80, method 10 of Newcombe (1998): 0.2, from 0.0524 to 0.3339."""
    interval = difference_interval(wilson_interval(48, 80), wilson_interval(56, 70))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)


def test_runs_without_a_common_seed_count_as_independent() -> None:
    ours = compared({"vanilla": {3: result(0.5, prompts=100)}, "dopd": {4: result(0.6, prompts=50)}})["dopd", "vanilla"]
    expected = difference_interval(wilson_interval(50, 100), wilson_interval(30, 50))
    assert ours.pairs == 0 and (ours.interval.low, ours.interval.high) == (expected.low, expected.high)
    assert ("dopd", "vanilla") not in compared({"vanilla": {3: result(0.5), 5: result(0.5)}, "dopd": {4: result(0.6)}})


def test_evaluations_of_other_prompts_are_not_paired() -> None:
    fewer = {seed: result(0.6, prompts=64) for seed in range(3)}
    assert ("dopd", "vanilla") not in compared({"vanilla": by_seed(0.5, 0.5, 0.5), "dopd": fewer})


# --- From run folders


def test_a_run_is_compared_with_its_own_start_on_the_same_prompts(tmp_path: Path) -> None:
    """The start that a run logs is of fewer prompts than its final evaluation: the two are no pair."""
    finished(tmp_path / "run", "dopd", 0, 0.9, greedy=lambda t: 0.4 + 0.2 * t)
    found = differences_of(group_runs(find_runs([tmp_path])), {})
    (greedy,) = (d for d in found if d.measure == "greedy")
    assert (greedy.first, greedy.second, greedy.prompts) == (0.4, pytest.approx(0.6), 256)


def test_runs_on_other_problems_are_not_compared_with_one_another(tmp_path: Path) -> None:
    for seed in range(3):
        for method, task in (("vanilla", "dag"), ("dopd", "graph")):
            finished(tmp_path / f"{method}{seed}", method, seed, 0.5, config={"task": task})
    groups = group_runs(find_runs([tmp_path]))
    assert {d.against for d in differences_of(groups, {})} == {START}
    assert "different held-out problems" in verdict(groups, {})["note"]


def test_the_page_the_terminal_and_the_summary_say_the_same(tmp_path: Path) -> None:
    accuracies = {"vanilla": (0.5, 0.52, 0.51), "dopd": (0.6, 0.625, 0.615)}
    for method, values in accuracies.items():
        for seed, value in enumerate(values):
            finished(tmp_path / f"{method}-seed{seed}", method, seed, value)
    methods = {method: [result(value) for value in values] for method, values in accuracies.items()}
    summary = {"start": result(0.4), "teacher_result": result(0.9), "task": "dag", "methods": methods}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = verdict(group_runs(find_runs([tmp_path])), find_summary([tmp_path]))
    lines = verdicts(summary)
    assert found["sentence"] in lines and found["level"] == "better"
    gain = mean_interval([value - 0.4 for value in accuracies["dopd"]])
    assert f"went from 40.0% to 61.3%, +{100 * gain.mean:.1f} points [+{100 * gain.low:.1f}," in found["sentence"]
    assert "it is better than vanilla, +10.3 points" in found["sentence"] and "3 seeds" in found["sentence"]
    ours = next(row for row in found["table"]["rows"] if row["label"] == "dopd against vanilla")
    assert any(line.startswith(f"- dopd against vanilla: greedy {ours['cells'][0]['text']}, better") for line in lines)
    assert found["sentence"] in report_page([tmp_path]).replace("\\u0026", "&")


# --- Words


def levels(folder: Path, **options: Any) -> tuple[str, str, list[str]]:
    groups = group_runs(find_runs([kit.run_folder(folder, **options)]))
    found = verdict(groups, {}, findings(groups, {}))
    return found["level"], found["sentence"], found["next"]


def test_levels_of_single_runs_and_what_to_do_next(tmp_path: Path) -> None:
    level, _, steps = levels(tmp_path / "up", greedy=lambda t: 0.2 + 0.5 * t)
    assert level == "better" and any("`seed: 0`" in step for step in steps)
    assert any("`method: vanilla`" in step for step in steps)
    level, _, steps = levels(tmp_path / "down", greedy=lambda t: 0.7 - 0.5 * t)
    assert level == "worse" and any("learning_rate: 0.00033" in step for step in steps)
    level, sentence, steps = levels(tmp_path / "same", greedy=lambda t: 0.5)
    assert level == "undecided" and "one run, over 256 prompts" in sentence
    assert "changed nothing in greedy answers beyond chance on these prompts: " in sentence
    assert any("learning_rate: 0.003`" in step for step in steps)


@pytest.mark.parametrize(
    ("warned", "series"),
    [
        ("the privileged student drifts", {"privileged": lambda t: 0.9 - 0.4 * t}),
        ("privilege illusion", {"greedy": lambda t: 0.5 + t * (1 - t), "privileged": lambda t: 0.7 + 0.2 * t}),
    ],
)
def test_where_a_warning_says_that_it_was_too_much_the_verdict_asks_for_no_more(
    warned: str, series: Any, tmp_path: Path
) -> None:
    options: Any = {"greedy": lambda t: 0.5} | series
    groups = group_runs(find_runs([kit.run_folder(tmp_path / "run", **options)]))
    warnings = findings(groups, {})
    assert [one["title"] for one in warnings[0]["warnings"]] == [warned]
    found = verdict(groups, {}, warnings)
    assert found["level"] == "undecided"
    lower = f"Try a lower rate (`learning_rate: 0.00033`; it was 0.001): see the warning '{warned}'."
    shown = [] if warnings[0]["warnings"][0]["level"] == "bad" else [lower]  # what is serious comes first, of three
    assert [step for step in found["next"] if "learning_rate" in step or "max_steps" in step] == shown
    assert found["next"] == report_data([tmp_path])["verdict"]["next"]


def test_settings_are_kept_only_where_nothing_warns_of_them(tmp_path: Path) -> None:
    def steps(drift: float) -> list[str]:
        runs = [
            kit.run_folder(
                tmp_path / f"{drift}" / f"{method}-seed{seed}",
                method,
                seed,
                greedy=lambda t, seed=seed, gain=gain: 0.3 + (gain + 0.01 * seed) * t,
                privileged=lambda t: 0.9 - drift * t,
            )
            for method, gain in (("dopd", 0.5), ("vanilla", 0.1))
            for seed in range(3)
        ]
        groups = group_runs(find_runs(runs))
        return verdict(groups, {}, findings(groups, {}))["next"]

    assert steps(0.0) == ["Keep the settings; evaluate on problems of another kind before you rely on it."]
    (step,) = steps(0.4)
    assert step.startswith(
        "Before you keep the settings, see the warning 'the privileged student drifts': Lower `learn"
    )


def test_a_run_that_was_never_evaluated_gets_no_verdict(tmp_path: Path) -> None:
    run = kit.run_folder(tmp_path / "run")
    kit.write_lines(run / "metrics.jsonl", [{"step": 1, "loss": 0.5}])
    serious = {"level": "bad", "title": "dead teacher", "overtrained": False}
    found = verdict(group_runs(find_runs([run])), {}, [{"method": "dopd", "warnings": [serious] * 2}])
    assert found["level"] == "unknown" and found["table"]["rows"] == []
    assert "2 serious warnings" in found["next"][0] and "`student_eval_steps`" in found["next"][1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_prompts", -1),
        ("num_prompts", 1e299),
        ("num_prompts", 0),
        ("accuracy_greedy", 7.0),
        ("accuracy_greedy", -1),
    ],
)
def test_evaluations_that_cannot_be_are_left_out(tmp_path: Path, name: str, value: float) -> None:
    run = kit.run_folder(tmp_path / "run", config={"learning_rate": float("nan"), "max_steps": 10**30})
    records = [{**line, f"eval_{name}": value} if "eval_entropy" in line else line for line in kit.metrics(6)]
    kit.write_lines(run / "metrics.jsonl", records)
    (run / "result.json").write_text(json.dumps({"metrics": {name: value}, "scores": {"greedy": [1e299, -1e299]}}))
    found = verdict(group_runs(find_runs([run])), {})
    assert report_page([run]) and "nan" not in json.dumps(found).lower()
    assert found["level"] == ("unknown" if name == "accuracy_greedy" else "untested")
    assert name == "accuracy_greedy" or "the number of prompts is unknown" in found["sentence"]


def test_a_run_under_way_says_how_far_it_is(tmp_path: Path) -> None:
    _, sentence, steps = levels(tmp_path / "run", greedy=lambda t: 0.5, config={"max_steps": 60})
    assert sentence.startswith("So far (step 6 of 60): ")
    assert steps[0].startswith("Let it end") and not any("learning_rate" in step for step in steps)


def test_the_method_of_interest_is_dopd_and_the_reference_vanilla() -> None:
    assert of_interest(["vanilla", "dopd_ema", "dopd"]) == "dopd_ema" and of_interest(["a", "b"]) == "b"
    assert reference_of(["a", "dopd", "vanilla"]) == "vanilla" and reference_of(["a", "dopd"]) == "a"
    assert reference_of(["dopd"]) is None
    assert places(["vanilla", "privileged_student", "dopd"]) == [1, 2, 0]
