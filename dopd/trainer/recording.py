"""The part of the trainer that leaves a run folder: its configuration and table, the final evaluation, the report."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import TrainerCallback

from dopd.evaluation.results import EvaluationResult
from dopd.report.closing import say_outcome
from dopd.report.curves import CURVES_FILE, draw_run
from dopd.report.ending import ending_of
from dopd.report.outcome import changes
from dopd.report.page import REPORT_FILE, write_report
from dopd.report.records import CONFIG_FILE, RESULT_FILE, RunRecord
from dopd.settings import read_yaml
from dopd.trainer.card import card_text
from dopd.trainer.continuing import ContinuingTrainer
from dopd.trainer.folder import RunFolder
from dopd.trainer.owned import CARD_FILE, make_own, write_own
from dopd.trainer.setup import evaluated, make_evaluator


class RecordingTrainer(ContinuingTrainer):
    """Writes beside metrics and traces what a run was, and at its end what it came to.

    Attributes:
        configuration (`str`): the run as YAML, as `config.yaml` has it.
        seconds (`float`): that `train` took.
        says_outcome (`bool`): whether the end of the run is followed by what it came to and where its report is;
            `disable_tqdm=True` leaves that out, too.
    """

    configuration: str
    says_outcome = True
    seconds = 0.0

    _depth = 0
    _final: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self.recorded():
            start = time.perf_counter()
            result = super().train(*args, **kwargs)
            self.seconds = time.perf_counter() - start
        return result

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, the run is not over: its report is written, and it is marked complete, at the end of the outermost
        one. Enter it around `train` to have what is saved and evaluated afterwards in the report too.
        """
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0 and self.is_world_process_zero():
            self._conclude()

    def _conclude(self) -> None:
        folder = RunFolder(self.run_folder)
        if not (folder.path / CONFIG_FILE).is_file():  # a complete run of an earlier version, which was resumed
            folder.describe(self.configuration, self.table.describe() + "\n")
        self.create_model_card(model_name=folder.path.name)
        make_own(folder.path, CURVES_FILE, lambda: draw_run(folder.path))
        make_own(folder.path, REPORT_FILE, lambda: write_report([folder.path]))
        folder.complete()
        if self.says_outcome and self.args.chosen().get("disable_tqdm") is not True:
            say_outcome(folder.path)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write `README.md`, with the results so far; arguments are TRL's. A user's card, or an edited one, is kept."""
        names = ("model_name", "dataset_name", "tags")
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        arguments["model_name"] = arguments.get("model_name") or self.run_folder.name
        run = self._record()
        facts = (run, self.table, vars(self.args), changes(run), self._paper)

        def write() -> None:
            super(RecordingTrainer, self).create_model_card(**arguments)
            path = Path(str(self.args.output_dir)) / CARD_FILE
            path.write_text(card_text(ModelCard.load(path), arguments["model_name"], *facts), encoding="utf-8")

        self.write_own_files(write)

    def _record(self) -> RunRecord:
        """The run so far."""
        return RunRecord(self.run_folder, read_yaml(self.configuration), self.state.log_history, [], self._final)

    def final_evaluation(self, num_prompts: int) -> EvaluationResult:
        """Answer held-out prompts without privileged context, and beside it with it, and write `result.json`.

        Args:
            num_prompts (`int`): from the start of `eval_dataset`.

        Returns:
            The whole result, on every process.

        Raises:
            ConfigError: there is no `eval_dataset`, or no verifier.
        """
        result = evaluated(self, make_evaluator(self, num_prompts=num_prompts))
        self._final = result.to_json()
        if self.accelerator.is_main_process:
            record = {"method": self.table.name, "train_seconds": round(self.seconds, 2), **self._final}
            ending = ending_of(self._record())
            record |= {} if ending is None else {"ended": ending.to_json()}
            write_own(self.run_folder, RESULT_FILE, (json.dumps(record, indent=1) + "\n").encode())
        return result


class KeptRun(TrainerCallback):
    """Describes a run in its folder once it begins, or once the checkpoint from which it goes on has been read."""

    def __init__(self, trainer: RecordingTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            trainer = self._trainer
            RunFolder(trainer.run_folder).describe(trainer.configuration, trainer.table.describe() + "\n")
