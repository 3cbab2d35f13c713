"""What a person sees of a run: tokens per second, the time left, and silence in CI."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dopd.runs import progress


def test_speed_and_time_left() -> None:
    times = iter([0.0, 2.0, 4.0])
    speed = progress.Speed(first_step=10, clock=lambda: next(times))
    assert speed.read(11, 14, 100.0) == {"s left": "6"}
    assert speed.read(12, 14, 300.0) == {"tokens/s": "100", "s left": "4"}


def test_before_the_first_step_there_is_no_speed() -> None:
    assert progress.Speed().read(0, 10, None) == {}


@pytest.mark.parametrize(
    ("ci", "terminal", "notebook", "watched"),
    [
        ("", True, False, True),
        ("false", True, False, True),
        ("true", True, True, False),
        ("1", True, False, False),
        ("", False, True, True),
        ("", False, False, False),
    ],
)
def test_who_watches(monkeypatch: pytest.MonkeyPatch, ci: str, terminal: bool, notebook: bool, watched: bool) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    monkeypatch.setattr(progress, "in_notebook", lambda: notebook)
    assert progress.is_watched() == watched


@pytest.mark.parametrize(
    ("shell", "expected"), [(None, False), ("TerminalInteractiveShell", False), ("ZMQInteractiveShell", True)]
)
def test_notebooks_are_recognised(monkeypatch: pytest.MonkeyPatch, shell: str | None, expected: bool) -> None:
    made = None if shell is None else type(shell, (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: made))
    assert progress.in_notebook() == expected


STATE = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=2)


def test_the_bar_shows_accuracy_entropy_speed_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    bar = SimpleNamespace(n=0, update=lambda n: None, set_postfix=shown.append, close=lambda: None)
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    monkeypatch.setattr(progress, "tqdm", lambda **_: bar)
    callback = progress.RunProgress("dopd")
    callback.on_train_begin(None, SimpleNamespace(**{**vars(STATE), "global_step": 0}), None)
    for tokens in (10.0, 20.0):
        logs = {"rollout/accuracy": 0.5, "entropy": 1.0, "loss": 0.1, "num_tokens": tokens}
        callback.on_log(None, STATE, None, logs)
    assert {"rollouts", "entropy", "loss", "tokens/s", "s left"} <= set(shown[-1])


def test_a_log_file_gets_one_line_for_each_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "is_watched", lambda: False)
    callback = progress.RunProgress("dopd")
    callback.on_train_begin(None, STATE, None)
    records: list[dict[str, Any]] = [{"loss": 1.0}, {"eval_accuracy_greedy": 0.25}, {"loss": 0.5}]
    for logs in records:
        callback.on_log(None, STATE, None, logs)
    out, err = capsys.readouterr()
    assert out == "dopd: step 2/4, loss 1, greedy 0.25\n" and err == ""
