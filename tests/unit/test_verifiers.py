"""Verifiers are the user's code: tried before training, checked at every call, stopped in time, found by commands."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import resume_kit
import torch
import yaml
from datasets import Dataset
from trainer_kit import task_rows, trainer

from dopd import interrupts
from dopd.cli.main import main
from dopd.errors import ConfigError, DataError, ScoringError
from dopd.runs.settings import load_settings
from dopd.runs.train import make_config, make_trainer
from dopd.step.verifier import TimedVerifier, Verifier, judged
from dopd.verifiers.named import load_verifier

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
        judged(TimedVerifier(endless, 0.05), "a", ROW)
    quick = TimedVerifier(lambda text, row: 1.0, 0.05)
    assert judged(quick, "a", ROW) == 1.0
    time.sleep(0.1)  # an alarm that is left would end this test


def keeps_its_interrupts(completion: str, row: Mapping[str, Any]) -> float:
    try:
        time.sleep(60)
    except BaseException:
        return 1.0
    return 0.0


def makes_another_error(completion: str, row: Mapping[str, Any]) -> float:
    try:
        time.sleep(60)
    except BaseException:
        raise ValueError("interrupted") from None
    return 0.0


def resets_the_alarm(completion: str, row: Mapping[str, Any]) -> float:
    """As math_verify does."""
    signal.alarm(0)
    time.sleep(0.2)
    return 1.0


def blocks_signals(completion: str, row: Mapping[str, Any]) -> float:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(0.2)
    return 1.0


LATE = (keeps_its_interrupts, makes_another_error, resets_the_alarm, blocks_signals)


@pytest.mark.parametrize("verifier", LATE, ids=lambda verifier: verifier.__name__)
@pytest.mark.parametrize("of_a_thread", [False, True])
def test_a_score_that_comes_too_late_is_none(verifier: Verifier, of_a_thread: bool) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    late = resets_the_alarm if of_a_thread else verifier  # in a thread nothing interrupts a sleep of a minute
    with pytest.raises(ScoringError, match=r"more than verifier_timeout \(=0\.1\) seconds"):
        if of_a_thread:
            with ThreadPoolExecutor(1) as threads:
                threads.submit(judged, TimedVerifier(late, 0.1), "a", ROW).result()
        else:
            judged(TimedVerifier(late, 0.1), "a", ROW)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


ENDLESS = {
    "in C, and holds the interpreter": "sum(range(10**15))",
    "in C, with signals blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); time.sleep(600)",
    "without an alarm": "signal.alarm(0); time.sleep(600)",
    "in a loop that catches everything": """
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass""",
    "in a thread": "threading.Thread(target=time.sleep, args=[600]).run()",
}


@pytest.mark.parametrize("way", ENDLESS)
def test_a_call_that_nothing_interrupts_ends_the_process_with_a_line(way: str, tmp_path: Path) -> None:
    call = "score('an answer', {})"
    run = f"threading.Thread(target=lambda: {call}).start()" if way == "in a thread" else call
    script = tmp_path / "endless.py"
    script.write_text(
        "import signal, threading, time\nimport dopd.interrupts\nfrom dopd.step.verifier import TimedVerifier\n"
        f"def endless(text, row):\n    {ENDLESS[way]}\n"
        f"dopd.interrupts.GRACE = 0.2\nscore = TimedVerifier(endless, 0.1)\n{run}\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    line = done.stderr.strip()
    assert line.startswith("error: the verifier, for the answer 'an answer', took more than 0.1 seconds and could not")
    assert "status 137" in line and "\n" not in line


def test_a_verifier_that_is_ended_in_its_trial_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "GRACE", 0.2)
    (tmp_path / "endless.py").write_text("def score(text, row):\n    sum(range(10**15))\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "a"}\n')
    (tmp_path / "student").mkdir()  # no model: it would be read after the trial
    settings = {"model_name_or_path": str(tmp_path / "student"), "dataset_name": str(tmp_path / "rows.jsonl")}
    settings |= {"verifier": f"{tmp_path}/endless.py:score", "verifier_timeout": 1.0, "method": "opsd"}
    settings |= {"output_dir": str(tmp_path / "runs" / "new"), "use_cpu": True, "bf16": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    child = resume_kit.in_a_process(lambda: main(["train", str(tmp_path / "config.yaml")]), tmp_path / "log.txt")
    assert resume_kit.status_of(child) == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    assert "the verifier, for the answer ''" in (tmp_path / "log.txt").read_text()
    assert not (tmp_path / "runs").exists()


def test_a_process_whose_calls_end_in_time_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "GRACE", 0.05)
    quick = TimedVerifier(lambda text, row: 1.0, 0.05)
    assert [quick("a", ROW) for _ in range(100)] == [1.0] * 100
    time.sleep(0.5)  # a watchman that had missed the end of a call would end this test


def test_what_a_call_without_an_end_leaves_can_be_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "GRACE", 0.2)
    run = tmp_path / "run"

    def endless_in_the_third_step(completion: str, row: Mapping[str, Any]) -> float:
        if (run / "checkpoint-2").is_dir():
            sum(range(10**15))
        return resume_kit.kit.TASK.verify(completion, row)

    def train() -> None:
        made = resume_kit.resumable(run, steps=4, verifier=endless_in_the_third_step, verifier_timeout=1.0)
        made.train()

    child = resume_kit.in_a_process(train, tmp_path / "log.txt")
    assert resume_kit.status_of(child) == -signal.SIGKILL, (tmp_path / "log.txt").read_text()
    assert "the last whole checkpoint is as it was" in (tmp_path / "log.txt").read_text()
    resume_kit.resumable(run, steps=4).train(resume_from_checkpoint=True)
    resume_kit.resumable(tmp_path / "whole", steps=4).train()
    assert resume_kit.same_weights(run / "checkpoint-4", tmp_path / "whole" / "checkpoint-4")


def test_an_import_has_the_verifiers_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow_judge.py").write_text("import time\ntime.sleep(60)\ndef score(text, row): return 1.0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"took more than verifier_timeout \(=0\.1\) seconds.*raise verifier_timeout"):
        load_verifier("./slow_judge.py:score", 0.1)


def test_a_command_asks_a_verifier_for_each_dataset_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judge.py").write_text("asked = []\ndef score(text, row): asked.append(row['prompt']); return 1.0\n")
    monkeypatch.chdir(tmp_path)
    settings = load_settings("tiny-dag", verifier="./judge.py:score", output_dir="run")
    made = make_trainer(settings, make_config(settings))
    verifier = load_verifier("./judge.py:score")
    assert verifier is not None
    first = [made.train_dataset[0]["prompt"], made.eval_dataset[0]["prompt"]]
    assert sys.modules[verifier.__module__].asked == first


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
    "no such function": ("def other(): ...", "it has no 'score'"),
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


def goes_elsewhere(completion: str, row: Mapping[str, Any]) -> float:
    os.chdir("/")
    return 1.0


def test_code_that_changes_the_folder_leaves_the_run_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A relative output_dir, and the data that is read while it trains, would be looked for elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "moving.py").write_text(
        "import os\nos.chdir('/')\nfrom test_verifiers import goes_elsewhere as score\n"
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made = trainer(
        Path("run"),
        verifier="./moving.py:score",
        reward_funcs=lambda completions, **_: [goes_elsewhere("", {}) for _ in completions],
        train_dataset=Dataset.from_list(task_rows(8)),
        method="grpo",
    )
    made.train()
    made.save_model()
    assert Path.cwd() == tmp_path and (tmp_path / "run" / "model.safetensors").is_file()
    for name in ("the import of ./moving.py", "the verifier", "reward function '<lambda>'"):
        assert f"{name} left the process in the folder '/'" in caplog.text


CLOSING: dict[str, Callable[[], Any]] = {
    "the object": lambda: sys.stdout.close(),
    "its number": lambda: os.close(1),
    "both": lambda: (sys.stdout.close(), os.close(2)),
}


@pytest.mark.parametrize("name", CLOSING)
def test_code_that_closes_the_output_is_told_so_and_no_file_takes_its_place(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file"

    def closes(completion: str, row: Mapping[str, Any]) -> float:
        CLOSING[name]()
        return 1.0

    def check() -> None:
        sys.stdout = open(1, "w")  # noqa: SIM115 - as that of a command
        try:
            judged(closes, "", ROW)
        except ScoringError as error:
            with file.open("w") as opened:
                print("what is printed", flush=True)
                opened.write(str(error))
            return

    assert resume_kit.status_of(resume_kit.in_a_process(check, tmp_path / "log")) == 0
    assert file.read_text().startswith("the verifier closed standard ")


def test_a_command_whose_output_is_closed_on_the_way_says_so(
    tmp_path: Path, models_of_one_layer: tuple[str, str]
) -> None:
    (tmp_path / "closing.py").write_text("import os\n\ndef score(text, row):\n    os.close(1)\n    return 1.0\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "1"}\n')
    command = [sys.executable, "-m", "dopd.cli.main", "eval", models_of_one_layer[0], "--dataset-name", "rows.jsonl"]
    ended = subprocess.run([*command, "--verifier", "./closing.py:score"], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and "error: the verifier closed standard output" in ended.stderr
    assert "Traceback" not in ended.stderr


CITIES = {"choices": ["Rome", "Paris", "Bern"]}
LETTERS: list[tuple[str, object, dict[str, Any], float]] = [
    ("The answer is (B).", "B", {}, 1.0),
    ("It is \\boxed{\\text{C}}.", "(C)", {}, 1.0),
    ("$\\boxed{\\mathrm{(J)}}$", "J.", {}, 1.0),
    ("**D**", "\\boxed{D}", {}, 1.0),
    ("A looks right, but the correct option is **C**: because A fails", "C", {}, 1.0),
    ("First A.\n\nAnswer: E", "E", {}, 1.0),
    ("Final answer: $\\textbf{(B)}$", "B", {}, 1.0),
    ("Thus\nB) Paris", "B", CITIES, 1.0),
    ("Paris.", "B", CITIES, 1.0),
    ("\\boxed{Paris}", 1, CITIES, 1.0),
    ("(B)", "Paris", CITIES, 1.0),
    ("B. Paris", "B", {"prompt": "Where?\nA. Rome\nB. Paris"}, 1.0),
    ("B", "B", {"options": {"A": "x", "B": "y"}}, 1.0),
    ("B) Rome", "B", CITIES, 0.0),  # a letter beside another option's text
    ("\\boxed{A}", "B", {}, 0.0),
    ("The answer is B or C.", "B", {}, 0.0),
    ("B or C", "B", {}, 0.0),
    ("The answer is A, B", "A", {}, 0.0),
    ("The answer is I think", "I", {}, 0.0),
    ("Because of it", "B", {}, 0.0),
    ("", "B", {}, 0.0),
    ("Lyon", "B", CITIES, 0.0),
    ("The answer is Paris.", "B", CITIES, 1.0),
    ("Answer: Rome, of course", "A", CITIES, 0.0),  # it is not the option's text
    ("<think>The answer is (A).</think>So it is\nB", "B", {}, 1.0),
    ("B", "b", {}, 1.0),
    ("(B)", "1", CITIES, 1.0),  # a number as text, as CSV files have it
]


@pytest.mark.parametrize(("text", "answer", "columns", "score"), LETTERS)
def test_choice_reads_the_letter_that_an_answer_states(
    text: str, answer: object, columns: dict[str, Any], score: float
) -> None:
    verifier = load_verifier("choice")
    assert verifier is not None and verifier(text, {"prompt": "q", "answer": answer, **columns}) == score


@pytest.mark.parametrize(
    ("answer", "columns"), [(7, CITIES), ("Lyon", CITIES), (None, CITIES), ("D", CITIES), ("3", {})]
)
def test_an_answer_that_is_no_option_is_an_error_and_no_score(answer: object, columns: dict[str, Any]) -> None:
    verifier = load_verifier("choice")
    assert verifier is not None
    with pytest.raises(DataError, match=r"column 'answer' \(=.*names none of the row's options.*A to J"):
        verifier("B", {"prompt": "q", "answer": answer, **columns})


def test_exact_reads_a_box_and_missing_answers_are_named() -> None:
    exact = load_verifier("exact")
    assert exact is not None
    assert [exact(text, {"answer": "No way"}) for text in (" No way\n", "So \\boxed{No way}", "So No way")] == [1, 1, 0]
    for name in ("exact", "choice", "math"):
        verifier = load_verifier(name)
        assert verifier is not None
        with pytest.raises(DataError, match=r"needs a column 'answer'.*columns"):
            verifier("x", {"prompt": "q"})
