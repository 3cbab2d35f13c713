"""What a run came to: accuracies at its start and its end, as `dopd train` prints them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dopd.report.closing import say_outcome
from dopd.report.outcome import changes
from dopd.report.records import read_run


def run_folder(folder: Path, records: list[dict[str, Any]], result: dict[str, Any] | None = None) -> Path:
    (folder / "config.yaml").write_text("task: dag\nmethod: dopd\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def bounds(share: float, count: int) -> tuple[float, float]:
    """Proportions that a normal approximation at 95% does not tell from the measured one: roots of a quadratic."""
    z = 1.959963984540054
    low, high = sorted(np.roots([1 + z**2 / count, -2 * share - z**2 / count, share**2]).real)
    return float(low), float(high)


def evaluated(step: int, greedy: float, count: int) -> dict[str, Any]:
    return {"step": step, "eval_accuracy_greedy": greedy, "eval_accuracy_sampled": greedy, "eval_num_prompts": count}


def test_start_and_end_with_intervals(tmp_path: Path) -> None:
    run = read_run(run_folder(tmp_path, [evaluated(0, 0.25, 128), evaluated(5, 0.5, 128), evaluated(9, 0.75, 128)]))
    (greedy, sampled) = changes(run)
    assert greedy.start is not None and greedy.words.startswith("greedy") and sampled.words.startswith("sampled")
    for interval, share in ((greedy.start, 0.25), (greedy.end, 0.75)):
        assert (interval.mean, interval.low, interval.high) == pytest.approx((share, *bounds(share, 128)))


def test_the_evaluation_after_training_counts_and_what_was_not_measured_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interval = {"mean": 0.5, "low": 0.25, "high": 0.75}
    result = {"metrics": {"accuracy_greedy": 0.5, "num_prompts": 8}, "intervals": {"accuracy_greedy": interval}}
    say_outcome(run_folder(tmp_path, [{"step": 1, "loss": 1.0}], result))
    first, folder, report, command = capsys.readouterr().out.splitlines()
    assert first == "greedy accuracy without p: not measured -> 50.0% [25.0, 75.0] (8 prompts)"
    assert folder.endswith(str(tmp_path)) and report.endswith(str(tmp_path / "report.html"))
    assert command == f"next: dopd eval {tmp_path} --split ood"


@pytest.mark.parametrize("variables", [{"LOCAL_RANK": "1", "RANK": "1"}, {"OMPI_COMM_WORLD_RANK": "3"}])
def test_of_several_processes_the_first_alone_prints(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path, [{"step": 1, "loss": 1.0}])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    say_outcome(run)
    assert capsys.readouterr().out == ""
    for name in variables:
        monkeypatch.setenv(name, "0")
    say_outcome(run)
    assert "run folder: " in capsys.readouterr().out


def test_two_numbers_of_prompts_are_both_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "metrics": {"accuracy_greedy": 0.5, "num_prompts": 512},
        "intervals": {"accuracy_greedy": {"mean": 0.5, "low": 0.4, "high": 0.6}},
    }
    say_outcome(run_folder(tmp_path, [evaluated(0, 0.25, 128)], result))
    assert "(128 and 512 prompts)" in capsys.readouterr().out


def test_a_run_that_was_never_evaluated_says_how_it_would_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    say_outcome(run_folder(tmp_path, [{"step": 1, "loss": 1.0}]))
    assert "set student_eval_steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "models", "command"),
    [
        ({}, ["."], "dopd inspect --student {run} --teacher t --method dopd --prompt QUESTION --privileged HINT"),
        ({}, ["checkpoint-9", "checkpoint-10"], "dopd inspect --student {run}/checkpoint-10 --teacher t --method dopd"),
        ({}, [], "dopd report {run} OTHER_RUN --output both.html"),
        ({"teacher_model_name_or_path": "given in Python: Net"}, ["."], "dopd report {run} OTHER_RUN"),
    ],
)
def test_the_next_command_names_a_model_that_is_there(
    config: dict[str, str], models: list[str], command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in models:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    values = {"dataset_name": "x.jsonl", "teacher_model_name_or_path": "t", "method": "dopd"} | config
    (tmp_path / "config.yaml").write_text(json.dumps(values))
    say_outcome(tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"next: {command.format(run=tmp_path)}")
