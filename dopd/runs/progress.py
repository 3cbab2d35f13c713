"""What a person sees while a run is under way: one bar, and the numbers that matter beside it."""

import logging
import sys
import warnings
from typing import Any

import transformers
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

_SHOWN = {
    "eval_accuracy_greedy": "greedy",
    "eval_accuracy_sampled": "sampled",
    "rollout/accuracy": "rollouts",
    "entropy": "entropy",
    "loss": "loss",
}


def quiet_libraries() -> None:
    """Keep host libraries' chatter out of a run; warnings of dopd stay."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    own = logging.getLogger("dopd")
    if not own.handlers:
        own.addHandler(handler)
        own.propagate = False


class RunProgress(TrainerCallback):
    """A progress bar with accuracy, entropy and loss in a terminal or notebook; one line per evaluation elsewhere."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None
        self._latest: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and _is_watched():
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self._label, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        self._latest |= {label: f"{logs[name]:.3g}" for name, label in _SHOWN.items() if logs.get(name) is not None}
        if self._bar is not None:
            self._bar.set_postfix(self._latest)
        elif "eval_accuracy_greedy" in logs:
            numbers = ", ".join(f"{name} {value}" for name, value in self._latest.items())
            print(f"{self._label}: step {state.global_step}/{state.max_steps}, {numbers}", flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def replace_host_progress(trainer: Any, label: str) -> None:
    """Put `RunProgress` in the place of the host's bar and of its printed dictionaries."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunProgress(label))


def _is_watched() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
