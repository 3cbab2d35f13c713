"""Answers of an evaluation that are kept as they come: interrupted anywhere, it goes on where it was."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from dopd.cli.main import main
from dopd.errors import ConfigError, FileError
from dopd.evaluation.kept import KeptAnswers
from dopd.evaluation.results import EvaluationResult
from dopd.interrupts import Stopped
from dopd.runs.evaluate import evaluate_checkpoint

OPTIONS: dict[str, Any] = {"prompts": 10, "batch_size": 4, "max_new_tokens": 20}


def evaluated(output: Path | None, **options: Any) -> EvaluationResult:
    given = {"task": "dag", "teacher_name": "tiny:dag/teacher"} | OPTIONS | options
    return evaluate_checkpoint("tiny:dag/student", output=None if output is None else str(output), **given)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationResult, bytes]:
    output = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    result = evaluated(output)
    assert result == evaluated(None), "what is kept changes nothing"
    return result, output.read_bytes()


def test_every_answer_is_there_with_what_the_evaluation_was(whole: tuple[EvaluationResult, bytes]) -> None:
    result, content = whole
    records = [json.loads(line) for line in content.splitlines()]
    assert records[0]["evaluation"]["seed"] == 0 and records[0]["evaluation"]["model"] == "tiny:dag/student"
    assert set(records[0]["versions"]) == {"dopd", "transformers", "torch"}
    rows = [record for record in records if "row" in record]
    assert [record["row"] for record in rows] == [*range(10)]
    assert [record["greedy"]["score"] for record in rows] == result.greedy
    assert [record["samples"][0]["score"] for record in rows] == result.sampled
    assert all(isinstance(record["privileged"]["text"], str) for record in rows)
    assert records[-1]["metrics"] == result.metrics()


@pytest.mark.parametrize("lines", [1, 3, 6, 7, 11, 14])
@pytest.mark.parametrize("torn", [False, True])
def test_an_evaluation_goes_on_behind_the_last_whole_batch(
    whole: tuple[EvaluationResult, bytes], tmp_path: Path, lines: int, torn: bool
) -> None:
    result, content = whole
    kept = content.splitlines(keepends=True)
    output = tmp_path / "answers.jsonl"
    output.write_bytes(b"".join(kept[:lines]) + (kept[lines][:20] if torn else b""))
    assert evaluated(output) == result
    assert output.read_bytes() == content


def test_a_finished_evaluation_is_read_and_not_answered_again(
    whole: tuple[EvaluationResult, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, content = whole
    output = tmp_path / "answers.jsonl"
    output.write_bytes(content)
    monkeypatch.setattr("dopd.evaluation.student.StudentEvaluator._evaluate_batch", None)
    assert evaluated(output) == result and output.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "words"),
    [({"seed": 1}, "seed is 0 there and 1 here"), ({"max_new_tokens": 19}, "max_new_tokens is 20 there and 19 here"),
     ({"prompts": 9}, "rows is"), ({"teacher_name": None}, "teacher is")],
)  # fmt: skip
def test_answers_of_another_evaluation_are_refused(
    whole: tuple[EvaluationResult, bytes], tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_bytes(whole[1])
    with pytest.raises(ConfigError, match=words):
        evaluated(output, **options)
    assert output.read_bytes() == whole[1]


def test_a_file_that_is_not_ours_is_left_as_it_is(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.txt"
    for content in (b"chapter one\n", b'{"row": 0}\n', b"\xff\xfe\n"):
        thesis.write_bytes(content)
        with pytest.raises(ConfigError, match="no file of an evaluation's answers"):
            evaluated(thesis)
        assert thesis.read_bytes() == content


def test_two_evaluations_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with KeptAnswers(path, {}, {}), pytest.raises(FileError, match="being written by another process"):
        KeptAnswers(path, {}, {}).__enter__()


def test_an_interrupted_command_says_how_to_go_on_and_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dopd.evaluation.student import StudentEvaluator

    command = ["eval", "tiny:dag/student", "--prompts", "10", "--batch-size", "4", "--json"]
    assert main([*command, "--output", str(tmp_path / "whole.jsonl")]) == 0
    expected = capsys.readouterr().out
    answer = StudentEvaluator._evaluate_batch
    calls: list[int] = []

    def stopping(*args: Any) -> Any:
        calls.append(1)
        if len(calls) in (3, 4):
            raise Stopped(signal.SIGTERM, "SIGTERM: interrupted")
        return answer(*args)

    monkeypatch.setattr(StudentEvaluator, "_evaluate_batch", stopping)
    output = str(tmp_path / "answers.jsonl")
    assert main([*command, "--output", output]) == 143
    assert "the same command goes on behind them" in capsys.readouterr().err
    assert main(command) == 143
    assert "no answer is kept; with --output FILE" in capsys.readouterr().err
    calls.clear()
    assert main([*command, "--output", output]) == 0
    assert len(calls) == 1, "two batches were there"
    assert capsys.readouterr().out == expected
