"""Verifiers are the user's code: tried before training, checked at every call, stopped in time, found by commands."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from datasets import Dataset
from trainer_kit import task_rows, trainer

from dopd.errors import ConfigError, DataError, ScoringError
from dopd.runs.verifiers import load_verifier
from dopd.step.verifier import Verifier, judged, limited

ROW = {"prompt": "q", "answer": "1"}


async def waits(completion: str, row: Mapping[str, Any]) -> float:
    return 1.0


def raises(completion: str, row: Mapping[str, Any]) -> float:
    raise KeyError("solution")


def takes_one(completion: str) -> float:
    return 1.0


def leaves(completion: str, row: Mapping[str, Any]) -> float:
    raise SystemExit(0)


def leaves_at_once(completion: str, row: Mapping[str, Any]) -> float:
    os._exit(0)


def in_a_process(completion: str, row: Mapping[str, Any]) -> float:
    """As libraries do that limit the time of what they run."""
    child = os.fork()
    if not child:
        os._exit(7)
    return float(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7)


class Unfit:
    """What raises whenever it is looked at."""

    def __float__(self) -> float:
        raise RuntimeError("no number")

    def __repr__(self) -> str:
        raise RuntimeError("no text")


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "none": (lambda text, row: None, "gave None"),
    "below 0": (lambda text, row: -1.0, r"gave -1\.0"),
    "percent": (lambda text, row: 100, "gave 100"),
    "leaves the program": (leaves, "raised SystemExit"),
    "leaves it at once": (leaves_at_once, "raised SystemExit"),
    "no number and no text": (lambda text, row: Unfit(), "gave a Unfit"),
    "too large for a float": (lambda text, row: 10**400, "gave 1000.*[.]{3} for"),
    "nan": (lambda text, row: float("nan"), "gave nan"),
    "infinity": (lambda text, row: float("inf"), "gave inf"),
    "text": (lambda text, row: "0.5", "gave '0.5'"),
    "a list": (lambda text, row: [1.0], r"gave \[1\.0\]"),
    "several tensors": (lambda text, row: torch.ones(2), "gave tensor"),
    "asynchronous": (waits, "is asynchronous"),
    "an exception": (raises, r"raised KeyError: 'solution'.*row \(prompt, answer\)"),
    "one argument": (takes_one, "raised TypeError: takes_one.*answer's text and the dataset's row"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_score_is_refused_with_the_answer(what: str) -> None:
    verifier, words = WRONG[what]
    with pytest.raises(ScoringError, match=words) as caught:
        judged(verifier, "an answer", ROW)
    if what != "asynchronous":
        assert "'an answer'" in str(caught.value)


@pytest.mark.parametrize("value", [0, 1, True, 0.25, numpy.float32(0.5), numpy.bool_(True), torch.tensor(1.0)])
def test_numbers_of_any_kind_are_scores(value: Any) -> None:
    assert judged(lambda text, row: value, "a", ROW) == float(value)


def test_a_process_of_a_verifiers_own_ends_as_it_likes() -> None:
    assert judged(in_a_process, "a", ROW) == 1.0


@pytest.mark.parametrize("line", ["os._exit(0)", "sys.exit(0)"])
def test_a_module_that_leaves_the_program_is_one_line_and_no_success(line: str, tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text(f"import os, sys\n{line}\ndef score(text, row): return 1.0\n")
    flags = ["--verifier", "./leaving.py:score", "--output_dir", "run", "--max_steps", "1"]
    command = [sys.executable, "-m", "dopd.cli.main", "train", "tiny-dag", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "SystemExit" in done.stderr and "Traceback" not in done.stderr


def test_our_own_errors_keep_their_words() -> None:
    exact = load_verifier("exact")
    assert exact is not None
    with pytest.raises(DataError, match="needs a column 'answer'"):
        judged(exact, "a", {"prompt": "q"})


@pytest.mark.parametrize("way", ["sleeps", "loops", "catches"])
def test_a_verifier_that_does_not_end_is_stopped(way: str) -> None:
    def endless(completion: str, row: Mapping[str, Any]) -> float:
        while True:
            try:
                time.sleep(5 if way != "loops" else 0)
            except Exception:
                if way != "catches":
                    raise

    with pytest.raises(ScoringError, match=r"more than verifier_timeout \(=0\.05\) seconds for the answer 'a'"):
        judged(limited(endless, 0.05), "a", ROW)
    quick: Verifier = limited(lambda text, row: 1.0, 0.05)
    assert judged(quick, "a", ROW) == 1.0
    time.sleep(0.1)  # an alarm that is left would end this test


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset", "eval_dataset of a dict"])
def test_the_trainer_tries_it_on_each_dataset_before_it_loads_a_model(where: str, tmp_path: Path) -> None:
    good, bad = Dataset.from_list(task_rows(2)), Dataset.from_list([{"prompt": "q"}])
    held_out: Any = good if where == "train_dataset" else bad if where == "eval_dataset" else {"one": good, "two": bad}
    with pytest.raises(ScoringError, match="raised KeyError: 'answer'"):
        trainer(
            tmp_path,
            model="not/a/model",
            train_dataset=bad if where == "train_dataset" else good,
            eval_dataset=held_out,
            verifier=lambda text, row: float(row["answer"] == text),
        )


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_the_time_must_be_a_time(value: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="verifier_timeout"):
        trainer(tmp_path, verifier_timeout=value)


MODULES = {
    "no module": (None, "ModuleNotFoundError"),
    "no such function": ("def other(): ...", "AttributeError: .*'score'"),
    "syntax": ("def score(:", "SyntaxError"),
    "fails at import": ("1 / 0", "ZeroDivisionError: division by zero"),
    "no function": ("score = 3", "TypeError: score is int and no function"),
}


@pytest.mark.parametrize("what", MODULES)
def test_a_module_that_gives_no_function_is_told(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, words = MODULES[what]
    module = f"judge_{what.replace(' ', '_')}"
    if text is not None:
        (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ConfigError, match=rf"verifier \(='{module}:score'\) cannot be read: {words}"):
        load_verifier(f"{module}:score")


def test_a_module_beside_the_config_is_found_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "my_judge.py").write_text("def score(completion, row):\n    return row['points']\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "points": 7}\n')
    config = {
        "model_name_or_path": "tiny:dag/student",
        "method": "vanilla",
        "teacher_model_name_or_path": "tiny:dag/teacher",
        "dataset_name": "rows.jsonl",
        "verifier": "my_judge:score",
        "output_dir": "run",
        "use_cpu": True,
        "bf16": False,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = Path(sys.executable).parent / "dopd"
    done = subprocess.run([command, "train", "c.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "the verifier gave 7 for the answer ''" in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()
