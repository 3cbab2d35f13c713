"""What a person sees while a run is under way: one bar, and the numbers that matter beside it."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dopd.shown import visible
from dopd.trainer.host import HostTrainer

_SHOWN = {
    "eval_accuracy_greedy": "greedy",
    "eval_accuracy_sampled": "sampled",
    "rollout/accuracy": "rollouts",
    "entropy": "entropy",
    "loss": "loss",
}


class _VisibleFormatter(logging.Formatter):
    """Messages quote what data and models hold."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def quiet_libraries() -> None:
    """Keep host libraries' chatter out of a run; warnings of dopd stay."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # PEFT looks for a whole model below an adapter on an adapter.
    warnings.filterwarnings("ignore", message="Could not find a config file in .* - will assume that the vocabulary")
    handler = logging.StreamHandler()
    handler.setFormatter(_VisibleFormatter("%(levelname)s: %(message)s"))
    own = logging.getLogger("dopd")
    if not own.handlers:
        own.addHandler(handler)
        own.propagate = False


class RunProgress(TrainerCallback):
    """A bar with accuracy, entropy, tokens per second and the time left, in a terminal or a notebook; elsewhere (a
    file, a pipe, CI) one line for each evaluation.
    """

    def __init__(self, label: str) -> None:
        self._label = visible(label)
        self._bar: Any = None
        self._latest: dict[str, str] = {}
        self._speed = Speed()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._speed = Speed(state.global_step)
        if state.is_world_process_zero and is_watched():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self._label, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self._latest |= {label: f"{logs[name]:.3g}" for name, label in _SHOWN.items() if logs.get(name) is not None}
        self._latest |= self._speed.read(state.global_step, state.max_steps, logs.get("num_tokens"))
        if self._bar is not None:
            self._bar.set_postfix(self._latest)
        elif "eval_accuracy_greedy" in logs:
            numbers = ", ".join(f"{name} {value}" for name, value in self._latest.items())
            say(f"{self._label}: step {state.global_step}/{state.max_steps}, {numbers}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def say(text: str) -> None:
    """Print a line. Where nobody reads it any more, or it does not fit, what it is about goes on."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
            shown["s left"] = f"{pace * (last_step - step):.0f}"
        return shown


def replace_host_progress(trainer: HostTrainer, label: str) -> None:
    """Put `RunProgress` in the place of the host's bar and of its printed dictionaries."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunProgress(label))


def is_watched() -> bool:
    """Whether somebody sees a bar move: a terminal or a notebook, and not the log of a CI job."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    return sys.stderr.isatty() or in_notebook()


def in_notebook() -> bool:
    """Whether the code runs in a cell of Jupyter, Colab or the like."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and type(shell).__name__ != "TerminalInteractiveShell"
