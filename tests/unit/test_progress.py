"""What a person sees of a run: tokens per second, the time left, and silence in CI."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

import dopd.progress
from dopd.trainer import progress


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
    monkeypatch.setattr(dopd.progress, "in_notebook", lambda: notebook)
    assert dopd.progress.is_watched() == watched


@pytest.mark.parametrize(
    ("shell", "expected"), [(None, False), ("TerminalInteractiveShell", False), ("ZMQInteractiveShell", True)]
)
def test_notebooks_are_recognised(monkeypatch: pytest.MonkeyPatch, shell: str | None, expected: bool) -> None:
    made = None if shell is None else type(shell, (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: made))
    assert dopd.progress.in_notebook() == expected


STATE = SimpleNamespace(is_world_process_zero=True, max_steps=4, global_step=2)


def test_the_bar_shows_accuracy_entropy_speed_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []
    nothing = dict.fromkeys(("update", "close", "refresh"), lambda *_: None)
    bar = SimpleNamespace(n=0, set_postfix=lambda numbers, refresh: shown.append(numbers), **nothing)
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    monkeypatch.setattr(progress, "progress_bar", lambda *_, **__: bar)
    callback = progress.RunProgress("dopd")
    callback.on_train_begin(None, SimpleNamespace(**{**vars(STATE), "global_step": 0}), None)
    for tokens in (10.0, 20.0):
        logs = {"rollout/accuracy": 0.5, "entropy": 1.0, "loss": 0.1, "num_tokens": tokens}
        callback.on_log(None, STATE, None, logs)
    assert set(shown[-1]) == {"rollouts", "entropy", "loss", "tokens/s"}  # a bar has the time left by itself


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


def test_a_log_file_of_a_run_that_is_never_evaluated_is_not_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress, "is_watched", lambda: False)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    callback = progress.RunProgress("dopd")
    callback.on_train_begin(None, STATE, None)
    for step in range(1, 8):  # of ten seconds each
        now[0] += 10.0
        callback.on_step_end(None, SimpleNamespace(**{**vars(STATE), "global_step": step, "max_steps": 9}), None)
    assert capsys.readouterr().out == "dopd: step 3/9\ndopd: step 6/9\n"


def test_the_table_begins_with_the_start_and_its_evaluation_is_none_of_the_steps_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress.Speed.__init__, "__defaults__", (0, lambda: now[0]))
    callback = progress.RunProgress("dopd", bar=False)
    start, end = (SimpleNamespace(**{**vars(STATE), "global_step": step}) for step in (0, 2))
    callback.on_train_begin(None, start, None)
    callback.on_log(None, start, None, {"eval_accuracy_greedy": 0.25})
    now[0] = 100.0
    for _ in range(2):
        callback.on_step_begin(None, start, None)
        now[0] += 1.0
    callback.on_log(None, end, None, {"eval_accuracy_greedy": 0.5})
    assert callback._table.rows()[1] == [["0", "25.0%"], ["2", "50.0%"]]
    assert callback._latest["s left"] == "2"


def logged(step: int, **numbers: float) -> tuple[int, dict[str, float]]:
    return step, {"learning_rate": 1e-5, "gap/HS": 3.0, **{name.replace("__", "/"): v for name, v in numbers.items()}}


def test_the_table_has_loss_accuracy_shares_and_seconds_of_evaluated_steps() -> None:
    table = progress.ProgressTable()
    table.add(*logged(0, eval_accuracy_greedy=0.25))
    for step in (1, 2):
        table.add(*logged(step, loss=1.0 / step, share__HT=0.75, share__LL=0.25, step_time=0.5))
    table.add(*logged(2, eval_accuracy_greedy=0.5))
    header, rows = table.rows()
    assert header == ["step", "loss", "accuracy", "s/step", "HT", "LL"]
    assert rows == [["0", "-", "25.0%", "-", "-", "-"], ["2", "0.5", "50.0%", "0.5", "75%", "25%"]]


def test_a_long_run_that_is_never_evaluated_has_ten_rows_with_its_first_and_last_step() -> None:
    table = progress.ProgressTable()
    for step in range(1, 501):
        table.add(*logged(step, loss=1.0))
    rows = table.rows()[1]
    assert len(rows) == 10 and rows[0][0] == "1" and rows[-1][0] == "500"


def test_a_notebook_has_one_display_that_is_renewed_and_needs_no_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[str] = []
    displays: list[str] = []

    def display(page: str, display_id: bool) -> Any:
        displays.append(page)
        return SimpleNamespace(update=pages.append)

    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(HTML=str, display=display))
    monkeypatch.setattr(progress, "is_watched", lambda: True)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    callback = progress.RunProgress("dopd <b>")
    callback.on_train_begin(None, SimpleNamespace(**{**vars(STATE), "global_step": 0}), None)
    callback.on_log(None, STATE, None, {"loss": 0.5, "share/HT": 1.0, **{f"noise/{n}": 1.0 for n in range(60)}})
    callback.on_train_end(None, STATE, None)
    assert len(displays) == 1 and "step 2/4" in pages[-1] and "<td>100%</td>" in pages[-1]
    assert "noise" not in pages[-1] and "<b>" not in pages[-1]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", ["60", "80"])
def test_what_takes_long_has_a_bar_with_the_time_left_in_the_width_of_the_terminal(
    width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("CI", "")
    monkeypatch.setenv("COLUMNS", width)
    bar = dopd.progress.progress_bar("reading", 4, "run", delay=0)
    bar.set_postfix(dict.fromkeys(("greedy", "sampled", "rollouts", "entropy", "loss", "tokens/s"), "0.123"))
    bar.update(2)
    bar.refresh()
    bar.close()
    lines = [line for line in screen.getvalue().replace("\n", "\r").split("\r") if line.strip()]
    assert "left" in lines[-1]
    assert max(map(len, lines)) <= int(width)


def test_nothing_is_shown_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(dopd.progress.tracked("reading", "run", [1, 2])) == [1, 2] and stream.getvalue() == ""
