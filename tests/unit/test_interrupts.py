"""Signals: the step is finished and saved, the exit status says which, a second one leaves at once, no child stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainer_kit as kit
from resume_kit import EMA, in_a_process, resumable, same_files, same_weights, status_of
from rich.console import Console

from dopd.errors import ConfigError
from dopd.interrupts import SIGNALS, Stopped, exit_status, noted, raising
from dopd.runs.jobs import Job, run_jobs
from dopd.runs.quickstart import quickstart
from dopd.trainer.progress import RunProgress

pytestmark = pytest.mark.filterwarnings("default")


class At(kit.TrainerCallback):
    """Does something in the middle of a step."""

    def __init__(self, step: int, do: Callable[[], object]) -> None:
        self._step, self._do = step, do

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self._do()


def send(*numbers: int) -> Callable[[], object]:
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    resumable(folder, steps=6, **EMA).train()
    return folder


@pytest.mark.parametrize(
    "number", [n if n == signal.SIGTERM else pytest.param(n, marks=pytest.mark.slow) for n in SIGNALS]
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number: int, unbroken: Path, tmp_path: Path) -> None:
    made = resumable(tmp_path, steps=6, **EMA)
    made.add_callback(At(2, send(number)))
    with pytest.raises(Stopped, match=r"stopped after step 3 of 6, saved as .*resume_from_checkpoint") as caught:
        made.train()
    assert (
        caught.value.code
        == exit_status(number)
        == {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}.get(signal.Signals(number).name, 138)
    )
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if number != signal.SIGTERM:
        return
    resumed = resumable(tmp_path, steps=6, **EMA)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(tmp_path / "checkpoint-6", unbroken / "checkpoint-6") and same_files(tmp_path, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"save_strategy": "no"}, {"save_strategy": "best", "metric_for_best_model": "accuracy_greedy"}]
)
def test_it_is_saved_whatever_is_saved_otherwise(options: dict[str, Any], tmp_path: Path) -> None:
    made = resumable(tmp_path, steps=6, load_best_model_at_end=False, save_total_limit=1, **options)
    made.add_callback(At(4, send(signal.SIGTERM)))
    with pytest.raises(Stopped, match="stopped after step 5"):
        made.train()
    assert (tmp_path / "checkpoint-5" / "optimizer.pt").is_file()


def test_a_second_signal_leaves_at_once(tmp_path: Path) -> None:
    made = resumable(tmp_path, steps=6)
    made.add_callback(At(2, send(signal.SIGTERM, signal.SIGINT)))
    log = tmp_path.with_suffix(".log")
    assert status_of(in_a_process(made.train, log)) == 130
    assert "SIGTERM: this step is finished" in log.read_text() and "SIGINT: left at once" in log.read_text()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_handlers_of_others_stay_and_ours_go() -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    mine = lambda *_: None  # noqa: E731
    signal.signal(signal.SIGUSR1, mine)
    try:
        with raising():
            assert signal.getsignal(signal.SIGUSR1) is mine
            with noted() as requests:
                os.kill(os.getpid(), signal.SIGTERM)
                assert requests.number == signal.SIGTERM
            with pytest.raises(Stopped, match="SIGTERM: interrupted"):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
    finally:
        signal.signal(signal.SIGUSR1, before[signal.SIGUSR1])
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_lost_terminal_is_noted_unless_nohup_has_it_ignored() -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with noted() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.number == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with noted() as requests:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- Commands that start others

CHILD = """
import os, pathlib, sys, time
from dopd.interrupts import ENDS_WITH, end_with, raising
end_with(int(os.environ.pop(ENDS_WITH)))
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
with raising():
    time.sleep(60)
"""


def lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:1]
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_no_children(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a copy of this process, so that nothing is imported again: its jobs are small programs."""
    real = subprocess.Popen

    def popen(command: list[str], **kwargs: Any) -> Any:
        return real([sys.executable, "-c", CHILD, command[-1]], **kwargs)

    marks = [tmp_path / f"child{n}" for n in range(2)]

    def start() -> None:
        monkeypatch.setattr(subprocess, "Popen", popen)
        jobs = [Job(mark.name, [str(mark)], tmp_path / f"{mark.name}.log") for mark in marks]
        with raising(), open(os.devnull, "w") as nowhere:
            run_jobs(jobs, at_once=2, console=Console(file=nowhere))

    parent = in_a_process(start, tmp_path / "log")
    assert wait_for(lambda: all(mark.exists() and mark.read_text() for mark in marks)), (tmp_path / "log").read_text()
    children = [int(mark.read_text()) for mark in marks]
    assert all(map(lives, children))
    os.kill(parent, number)
    assert status_of(parent) == (-number if number == signal.SIGKILL else exit_status(number))
    assert wait_for(lambda: not any(map(lives, children)))


def test_runs_at_a_time_are_at_least_one(tmp_path: Path) -> None:
    for jobs in (0, -1):
        with pytest.raises(ConfigError, match=rf"jobs \(={jobs}\) must be at least 1"):
            quickstart(config=None, folder=str(tmp_path / "q"), methods=["dopd"], seeds=1, jobs=jobs)
        with pytest.raises(ConfigError, match="must be at least 1"):
            run_jobs([], at_once=jobs, console=Console())
    assert not (tmp_path / "q").exists()


def test_a_run_goes_on_where_nobody_reads_it(tmp_path: Path) -> None:
    made = resumable(tmp_path, steps=2)
    made.add_callback(RunProgress("x"))
    read, write = os.pipe()
    os.close(read)

    def train() -> None:
        os.dup2(write, 1)
        sys.stdout = os.fdopen(1, "w")
        made.train()
        print("not read either", flush=True)

    assert status_of(in_a_process(train, tmp_path.with_suffix(".log"))) == 0, tmp_path.with_suffix(".log").read_text()
    assert (tmp_path / "checkpoint-2").is_dir()
