"""avg@k, pass@k and their intervals; several models on the same rows, prompt by prompt, now or from kept results."""

import json
import random
from itertools import combinations
from math import comb
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from dopd.cli.main import main
from dopd.errors import ConfigError
from dopd.evaluation.comparing import PairedDifference
from dopd.evaluation.kept import read_evaluated
from dopd.evaluation.results import EvaluationResult, JudgedAnswer, PromptResult, Sampling
from dopd.statistics import Interval, pass_at, prompts_interval, wilson_interval

MODELS = ["tiny:dag/student", "tiny:dag/teacher"]
COMMAND = ["eval", *MODELS, "--prompts", "6", "--batch-size", "4", "--samples", "3", "--max-new-tokens", "24"]


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_mean_over_all_sets_of_k_answers(n: int) -> None:
    rng = random.Random(n)
    for right in range(n + 1):
        scores = rng.sample([1.0] * right + [0.0] * (n - right), n)
        for k in range(1, n + 1):
            every = fmean(max(chosen) for chosen in combinations(scores, k))
            assert pass_at(k, scores) == pytest.approx(every, abs=1e-12)
            assert pass_at(k, scores) == pytest.approx(1 - comb(n - right, k) / comb(n, k), abs=1e-12)  # Chen et al.
    parts = [rng.random() for _ in range(n)]
    for k in range(1, n + 1):
        assert pass_at(k, parts) == pytest.approx(fmean(map(max, combinations(parts, k))), abs=1e-12)


def test_pass_at_k_of_many_answers_and_of_too_few() -> None:
    assert pass_at(512, [1.0] + [0.0] * 1023) == pytest.approx(0.5, abs=1e-12)
    assert 0 < pass_at(1000, [1.0] * 3 + [0.0] * 9997) < 0.3
    for k in (0, 3):
        with pytest.raises(ValueError, match="from 1 to the number of scores, 2"):
            pass_at(k, [0.0, 1.0])


@pytest.mark.parametrize("right", [0, 3, 10])
def test_the_interval_of_one_answer_each_is_wilsons(right: int) -> None:
    expected = wilson_interval(right, 10)
    found = prompts_interval([1.0] * right + [0.0] * (10 - right))
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert prompts_interval([float(right == 10)] * 10, 64) == wilson_interval(10 * (right == 10), 10), "prompts count"


@pytest.mark.parametrize(("prompts", "draws", "same"), [(20, 8, False), (60, 4, False), (40, 16, True)])
def test_intervals_over_prompts_cover_the_mean_over_all_prompts(prompts: int, draws: int, same: bool) -> None:
    """Prompts of their own difficulty: an interval over draws, as if they were prompts, would be far too narrow."""
    rng = random.Random(0)
    covered, narrow, widths = 0, 0, []
    for _ in range(400):
        shares = [0.3 if same else rng.betavariate(0.3, 0.7) for _ in range(prompts)]
        scores = [fmean(rng.random() < share for _ in range(draws)) for share in shares]
        interval = prompts_interval(scores, draws)
        covered += interval.low <= 0.3 <= interval.high
        over_draws = wilson_interval(sum(scores) * draws, prompts * draws)
        narrow += over_draws.low <= 0.3 <= over_draws.high
        widths.append((interval.high - interval.low) / (over_draws.high - over_draws.low))
    assert 0.92 <= covered / 400 <= 0.99
    if same:
        assert fmean(widths) < 1.2, "equal prompts: draws are worth nearly as much"
    else:
        assert narrow / 400 < 0.85


def result(draws: list[list[float]]) -> EvaluationResult:
    answers = [tuple(JudgedAnswer("a", score, 5, score > 0) for score in scores) for scores in draws]
    return EvaluationResult.of([PromptResult(samples=samples) for samples in answers])


def test_an_average_over_draws_and_its_passes() -> None:
    found = result([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 1]])
    metrics = found.metrics()
    assert metrics["accuracy_sampled"] == pytest.approx(0.5) and metrics["num_samples"] == 3
    assert metrics["pass@2"] == pytest.approx((2 / 3 + 1 + 0 + 1) / 4)
    assert metrics["pass@3"] == 0.75 and "pass@1" not in metrics
    assert metrics["eos_ratio"] == 0.5 and metrics["length"] == 5 and "accuracy_greedy" not in metrics
    assert set(found.intervals()) == {"accuracy_sampled", "pass@2", "pass@3"}
    assert list(result([[0.0] * 16]).passes()) == [2, 4, 8, 16] and result([[1.0]]).passes() == {}


@pytest.mark.parametrize(("value", "words"), [({"samples": 0}, "samples"), ({"temperature": 0.0}, "temperature"),
                                              ({"top_p": 1.5}, "top_p"), ({"top_k": -1}, "top_k")])  # fmt: skip
def test_settings_of_draws_that_cannot_be_are_refused_by_name(value: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=rf"{words} \(="):
        Sampling(**value)


@pytest.mark.parametrize(("low", "high", "says"), [(0.1, 0.3, "better"), (-0.3, -0.1, "worse"),
                                                   (-0.1, 0.3, "within chance")])  # fmt: skip
def test_what_a_difference_says(low: float, high: float, says: str) -> None:
    assert PairedDifference("a", "b", "greedy", Interval((low + high) / 2, low, high), 9).says == says


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder of two models' answers, and the comparison as the command prints it."""
    folder = tmp_path_factory.mktemp("both") / "answers"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main([*COMMAND, "--output", str(folder), "--json"]) == 0
    return folder, json.loads(printed[-1])


def test_two_models_answer_the_same_rows_and_are_paired(both: tuple[Path, dict[str, Any]]) -> None:
    folder, found = both
    assert [one["model"] for one in found["models"]] == MODELS
    student, teacher = found["models"]
    assert student["evaluation"]["rows"] == teacher["evaluation"]["rows"]
    assert student["evaluation"]["seed"] == teacher["evaluation"]["seed"] == 0
    assert len(student["evaluation"]["chat_template"]["sha256"]) == 64
    assert [len(scores) for scores in student["draws"]] == [3] * 6
    differences = {one["measure"]: one for one in found["differences"]}
    assert set(differences) == {"greedy", "sampled", "privileged", "pass@2", "pass@3"}
    for measure in ("greedy", "sampled"):
        pairs = zip(student["scores"][measure], teacher["scores"][measure], strict=True)
        assert differences[measure]["mean"] == pytest.approx(fmean(b - a for a, b in pairs))
    assert differences["greedy"]["low"] < differences["greedy"]["mean"] < differences["greedy"]["high"]
    lines = [json.loads(line) for line in (folder / "tiny-dag-teacher.jsonl").read_text().splitlines()]
    rows = [line for line in lines if "row" in line]
    assert [[one["score"] for one in row["samples"]] for row in rows] == teacher["draws"]
    assert all(one["text"] and one["length"] >= 1 for row in rows for one in row["samples"])


def test_kept_results_are_compared_to_the_same_figures(
    both: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found = both
    files = [str(folder / "tiny-dag-student.jsonl"), str(folder / "tiny-dag-teacher.jsonl")]
    assert main(["eval", "--json", "--compare", *files]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert main(["eval", "--compare", *files]) == 0
    printed = capsys.readouterr().out
    assert "avg@3" in printed and "paired differences" in printed and "pass@3" in printed
    assert read_evaluated(files[0]).result.to_json()["draws"] == found["models"][0]["draws"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rows": "6 rows, 0"}, "rows of .* is not that of"),
        ({"verifier": "math"}, "verifier of .* is not that of"),
    ],
)
def test_results_of_other_rows_are_refused(
    both: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    changed: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = both[0] / "tiny-dag-student.jsonl"
    first, *lines = path.read_text().splitlines(keepends=True)
    other = tmp_path / "other.jsonl"
    record = json.loads(first)
    record["evaluation"] |= changed
    other.write_text(json.dumps(record) + "\n" + "".join(lines))
    assert main(["eval", "--compare", str(path), str(other)]) == 2
    error = capsys.readouterr().err
    assert words.split()[0] in error and "is not that of" in error and "by the same verifier" in error


def test_results_that_are_not_whole_or_none_are_refused(
    both: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = both[0] / "tiny-dag-student.jsonl"
    half, empty = tmp_path / "half.jsonl", tmp_path / "empty.jsonl"
    half.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    empty.write_text("")
    for other, words in (
        (half, "has not ended"),
        (empty, "has no results of an evaluation"),
        (tmp_path / "none.jsonl", "cannot be read"),
        (tmp_path, "is a folder"),
    ):
        assert main(["eval", "--compare", str(path), str(other)]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["eval"], "neither is"),
        (["eval", "tiny:dag/student", "--compare", "a", "b"], "both are named"),
        (["eval", "--compare", "a"], "needs two files"),
        (["eval", *MODELS, "--output", __file__], "give a folder for the answers of several models"),
        (["eval", "tiny:dag/student", "--output", str(Path(__file__).parent)], "give a file"),
    ],
)
def test_commands_that_cannot_be_meant_load_nothing(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dopd.runs.evaluate.load_model", None)
    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_a_report_of_results_shows_models_with_intervals_and_their_differences(
    both: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, found = both
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "paired differences" in printed and str(page.name) in printed
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    assert [row["label"] for row in data["headline"]["rows"]] == MODELS
    cells = dict(zip(data["headline"]["columns"], data["headline"]["rows"][1]["cells"], strict=True))
    teacher = found["models"][1]
    for column, name in (("greedy, no p", "accuracy_greedy"), ("pass@3", "pass@3")):
        shown = {key: cells[column][key] for key in ("mean", "low", "high")}
        assert shown == pytest.approx(teacher["intervals"][name])
    assert cells["prompts"]["text"] == "6" and cells["samples"]["text"] == "3"
    table = data["verdict"]["table"]["rows"]
    assert [row["cells"][0]["text"] for row in table] == [one["measure"] for one in found["differences"]]
    assert table[0]["cells"][1]["mean"] == pytest.approx(100 * found["differences"][0]["mean"])
    assert "tiny:dag/teacher" in data["verdict"]["sentence"] and "95% intervals" in data["verdict"]["sentence"]
    one = folder / "tiny-dag-student.jsonl"
    assert main(["report", str(one), "--output", str(page)]) == 0
    data = json.loads(page.read_text().split('id="data">')[1].split("</script>")[0])
    assert data["verdict"] is None and len(data["headline"]["rows"]) == 1


def test_results_of_other_rows_are_shown_apart_and_runs_apart_from_results(
    both: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *lines = (both[0] / "tiny-dag-student.jsonl").read_text().splitlines(keepends=True)
    record = json.loads(first)
    record["evaluation"] |= {"rows": "6 rows, 0", "task": "<script>alert(1)</script>"}
    (tmp_path / "other.jsonl").write_text(json.dumps(record) + "\n" + "".join(lines))
    (tmp_path / "other.jsonl.journal.jsonl").write_text("")
    page = tmp_path / "page.html"
    assert main(["report", str(both[0]), str(tmp_path), "--output", str(page)]) == 0
    text = page.read_text()
    assert "<script>alert" not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert len(data["headline"]["rows"]) == 3 and len(data["verdict"]["table"]["rows"]) == 5
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("task: dag\n")
    capsys.readouterr()
    assert main(["report", str(both[0]), str(run), "--output", str(page)]) == 2
    assert "report evaluations and run folders apart" in capsys.readouterr().err


def test_several_models_go_on_where_they_were(
    both: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first model's answers are whole, of the second a batch is left: one more batch is answered."""
    folder, found = both
    contents = {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}
    for name, content in contents.items():
        keep = content if "student" in name else b"".join(content.splitlines(keepends=True)[:6])
        (tmp_path / name).write_bytes(keep)
    assert main([*COMMAND, "--output", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == contents
