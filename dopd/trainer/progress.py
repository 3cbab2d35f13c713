"""How far a training is: one line, and a small table of the numbers that matter."""

import html
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from transformers import TrainerCallback

from dopd.progress import in_notebook, is_watched, progress_bar, say
from dopd.report.terminal import print_table
from dopd.shown import visible

_SHOWN = {
    "eval_accuracy_greedy": "greedy",
    "eval_accuracy_sampled": "sampled",
    "rollout/accuracy": "rollouts",
    "entropy": "entropy",
    "loss": "loss",
}
_NUM_ROWS = 10
_LINE_EVERY = 30.0  # seconds
_TIME_LEFT = "s left"  # which a bar has by itself
_SHARE = "share/"
_COLUMNS = {
    "step": ("step", "{:.0f}"),
    "loss": ("loss", "{:.3g}"),
    "eval_accuracy_greedy": ("accuracy", "{:.1%}"),
    "rollout/accuracy": ("rollouts", "{:.1%}"),
    "step_time": ("s/step", "{:.2g}"),
}


class RunProgress(TrainerCallback):
    """One line with accuracy, entropy, tokens per second and the time left, and a small table, in a terminal or a
    notebook; elsewhere (a file, a pipe, CI) a line for each evaluation and at least one in half a minute of steps.
    It comes before the callback that evaluates the start, whose numbers are the table's first.

    Args:
        label (`str`): what is trained.
        bar (`bool`): whether a line that moves is wanted.
    """

    def __init__(self, label: str, *, bar: bool = True) -> None:
        self._label, self._wants_bar = visible(label), bar
        self._view: _View = _Lines(self._label)
        self._latest: dict[str, str] = {}
        self._speed, self._table, self._at_start = Speed(), ProgressTable(), True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._speed, self._table, self._at_start = Speed(state.global_step), ProgressTable(), True
        self._latest = {}
        self._view = _Lines(self._label)
        if state.is_world_process_zero and self._wants_bar and is_watched():
            view = _Notebook if in_notebook() else _Terminal
            self._view = view(self._label)
            self._view.update(state.global_step, state.max_steps, self._latest, self._table)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._at_start:  # the start's evaluation is none of the steps' time
            self._speed, self._at_start = Speed(state.global_step), False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._view.update(state.global_step, state.max_steps, self._latest, self._table)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self._latest |= {label: f"{logs[name]:.3g}" for name, label in _SHOWN.items() if logs.get(name) is not None}
        self._latest |= self._speed.read(state.global_step, state.max_steps, logs.get("num_tokens"))
        self._table.add(state.global_step, logs)
        evaluated = "eval_accuracy_greedy" in logs
        self._view.update(state.global_step, state.max_steps, self._latest, self._table, evaluated=evaluated)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._view.close(self._table)
        self._view = _Lines(self._label)


class ProgressTable:
    """Loss, accuracy, shares and seconds at a few of the logged steps: those that were evaluated, where any was."""

    def __init__(self) -> None:
        self._records: dict[int, dict[str, float]] = {}

    def add(self, step: int, logs: Mapping[str, Any]) -> None:
        """Take over what was logged at a step."""
        wanted = {name: value for name, value in logs.items() if name in _COLUMNS or name.startswith(_SHARE)}
        numbers = {name: float(value) for name, value in wanted.items() if isinstance(value, int | float)}
        if numbers:
            self._records.setdefault(step, {"step": float(step)}).update(numbers)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and at most ten rows of text; the first and the last step are among them."""
        shown = self._chosen()
        shares = sorted({name for record in shown for name in record if name.startswith(_SHARE)})
        columns = dict(_COLUMNS) | {name: (name.removeprefix(_SHARE), "{:.0%}") for name in shares}
        order = [name for name in columns if any(name in record for record in shown)]
        rows = [[columns[name][1].format(one[name]) if name in one else "-" for name in order] for one in shown]
        return [columns[name][0] for name in order], rows

    def _chosen(self) -> list[dict[str, float]]:
        records = list(self._records.values())
        evaluated = [record for record in records if "eval_accuracy_greedy" in record]
        chosen = evaluated or records
        if len(chosen) <= _NUM_ROWS:
            return chosen
        places = {round(number * (len(chosen) - 1) / (_NUM_ROWS - 1)) for number in range(_NUM_ROWS)}
        return [chosen[place] for place in sorted(places)]


class _View(ABC):
    """Where a progress is shown."""

    def __init__(self, label: str) -> None:
        self._label = label

    @abstractmethod
    def update(
        self, step: int, last: int, numbers: Mapping[str, str], table: ProgressTable, *, evaluated: bool = False
    ) -> None:
        """A step ended, or numbers were logged; `evaluated` if they are of the student's evaluation."""

    @abstractmethod
    def close(self, table: ProgressTable) -> None:
        """The training ended."""


class _Lines(_View):
    def __init__(self, label: str) -> None:
        super().__init__(label)
        self._last_line = time.monotonic()

    def update(
        self, step: int, last: int, numbers: Mapping[str, str], table: ProgressTable, *, evaluated: bool = False
    ) -> None:
        now = time.monotonic()
        if evaluated or now - self._last_line >= _LINE_EVERY:
            self._last_line = now
            shown = (f"{name} {value}" for name, value in numbers.items())
            say(", ".join([f"{self._label}: step {step}/{last}", *shown]))

    def close(self, table: ProgressTable) -> None:
        pass


class _Terminal(_View):
    _bar: Any = None

    def update(
        self, step: int, last: int, numbers: Mapping[str, str], table: ProgressTable, *, evaluated: bool = False
    ) -> None:
        if self._bar is None:
            self._bar = progress_bar(self._label, last, "step", initial=step, delay=0)
        self._bar.set_postfix({name: value for name, value in numbers.items() if name != _TIME_LEFT}, refresh=False)
        self._bar.update(step - self._bar.n)
        self._bar.refresh()

    def close(self, table: ProgressTable) -> None:
        if self._bar is not None:
            self._bar.close()
        header, rows = table.rows()
        if rows:
            print_table(Console(stderr=True), header, rows, right=header)


class _Notebook(_View):
    """One display that is renewed; it needs no widgets."""

    _handle: Any = None

    def update(
        self, step: int, last: int, numbers: Mapping[str, str], table: ProgressTable, *, evaluated: bool = False
    ) -> None:
        from IPython.display import HTML, display

        page = HTML(as_html(self._label, step, last, numbers, table))
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)

    def close(self, table: ProgressTable) -> None:
        pass


def as_html(label: str, step: int, last: int, numbers: Mapping[str, str], table: ProgressTable) -> str:
    """A line with the numbers of the latest step, and the table under it."""
    line = ", ".join([f"{label}: step {step}/{last}", *(f"{name} {value}" for name, value in numbers.items())])
    header, rows = table.rows()
    head = _html_row("th", header)
    body = "".join(_html_row("td", row) for row in rows)
    bar = f'<progress value="{step}" max="{max(last, 1)}"></progress> {html.escape(line)}'
    return f"<div>{bar}</div>" + (f"<table>{head}{body}</table>" if rows else "")


def _html_row(kind: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"


class Speed:
    """Tokens per second of the latest steps, and the seconds that the remaining steps will take at the mean pace."""

    def __init__(self, first_step: int = 0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._first_step, self._start = first_step, clock()
        self._tokens: tuple[float, float] | None = None  # when, how many so far

    def read(self, step: int, last_step: int, tokens: float | None) -> dict[str, str]:
        """What there is to show at a step; `tokens` counts those of the whole run so far."""
        now, shown = self._clock(), {}
        if tokens is not None:
            if self._tokens is not None and tokens > self._tokens[1] and now > self._tokens[0]:
                shown["tokens/s"] = f"{(tokens - self._tokens[1]) / (now - self._tokens[0]):.0f}"
            self._tokens = (now, tokens)
        if step > self._first_step:
            pace = (now - self._start) / (step - self._first_step)
            shown[_TIME_LEFT] = f"{pace * (last_step - step):.0f}"
        return shown
