"""`early_stop`: when a run ends early, what it goes on with after a kill, and whose weights it leaves."""

import itertools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from transformers import AutoModelForCausalLM, TrainerCallback

from dopd.cli.main import main
from dopd.report.ending import ending_of
from dopd.report.headline import last_evaluation
from dopd.report.page import report_data
from dopd.report.records import RunRecord, read_run
from dopd.trainer.best import EarlyStop

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 100}


class Cut(TrainerCallback):
    """Leaves a run behind a step as a kill does: without a word to anybody."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def waited_by_definition(values: list[float], min_delta: float) -> int:
    """Evaluations behind the last gain, where a gain is looked for among all earlier marks anew."""
    marks = [0]
    for place in itertools.count(1):
        if place >= len(values):
            return len(values) - 1 - marks[-1]
        if values[place] > values[marks[-1]] + min_delta:
            marks.append(place)


@pytest.mark.parametrize(
    ("values", "min_delta", "waited"),
    [
        ([0.5], 0.0, 0),
        ([0.5, 0.5, 0.5], 0.0, 2),  # no gain is no gain
        ([0.5, 0.6, 0.55, 0.61], 0.0, 0),
        ([0.5, 0.55, 0.60, 0.65], 0.1, 0),  # small gains add up to one that counts, at the last value
        ([0.5, 0.55, 0.60, 0.55], 0.1, 3),
        ([0.9, 0.2, 0.3, 0.4], 0.0, 3),  # never better than the start
    ],
)
def test_waiting_counts_from_the_last_gain(values: list[float], min_delta: float, waited: int) -> None:
    stop = EarlyStop(patience=3, min_delta=min_delta)
    assert stop.waited(values, greater=True) == waited == waited_by_definition(values, min_delta)
    assert stop.waited([-value for value in values], greater=False) == waited


#          step:  0    1    2    3    4    5    6
ACCURACIES = [0.1, 0.5, 0.7, 0.7, 0.6, 0.9, 0.9]


def test_a_run_ends_after_its_patience_with_the_best_weights_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = kit.with_accuracies(tmp_path / "run", ACCURACIES, early_stop={"patience": 2}, disable_tqdm=False, **SAVED)
    with made.recorded():
        made.train()
        made.save_model()
    assert made.state.global_step == 4 and made.state.best_global_step == 2
    assert kit.records(made, "best/step") == [1, 2, 2, 2] and kit.records(made, "best/waited") == [0, 0, 1, 2]
    folders = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert folders == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]  # each best, and where it ended
    best, last, left = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name).state_dict()
        for name in ("checkpoint-2", "checkpoint-4", ".")
    )
    assert all(torch.equal(left[name], best[name]) for name in best)
    assert any(not torch.equal(last[name], best[name]) for name in best)

    run = read_run(tmp_path / "run")
    ending = ending_of(run)
    assert ending is not None and ending.early
    assert (ending.step, ending.planned, ending.weights_of) == (4, 6, 2)
    assert ending.why == (
        "stopped early at step 4 of 6: accuracy_greedy had no gain in 2 evaluations in a row; the weights are those of "
        "step 2, the best by accuracy_greedy"
    )
    assert last_evaluation(run)["metrics"]["accuracy_greedy"] == 0.7  # of the weights, and not the last one
    data = report_data([tmp_path / "run"])
    assert ending.why in data["subtitle"] and "So far" not in data["verdict"]["sentence"]
    assert "from 10.0% to 70.0%" in data["verdict"]["sentence"]
    output = capsys.readouterr()
    assert ending.why in output.out and "step 4 of 6: early_stop ends the run" in output.out + output.err
    assert f"Training {ending.why}." in (tmp_path / "run" / "README.md").read_text()
    assert made.final_evaluation(1) is not None
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["ended"] == ending.to_json()


@pytest.mark.slow
def test_a_run_that_was_cut_off_keeps_its_patience_and_its_best(tmp_path: Path) -> None:
    options: dict[str, Any] = {"early_stop": {"patience": 2}, "save_strategy": "steps", "save_steps": 1}
    cut = kit.with_accuracies(tmp_path, ACCURACIES, **options, callbacks=[Cut(3)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    shutil.rmtree(tmp_path / "checkpoint-1")
    made = kit.with_accuracies(tmp_path, ACCURACIES, **options)
    made.train(resume_from_checkpoint=True)
    assert made.state.global_step == 4 and made.state.best_global_step == 2  # as without the cut
    assert kit.records(made, "best/waited") == [0, 0, 1, 2]

    done = kit.with_accuracies(tmp_path, ACCURACIES, **options)
    assert done.train(resume_from_checkpoint=True).global_step == 4 and not kit.records(done, "train_runtime")
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    left = done.unwrapped_student.state_dict()
    assert all(torch.equal(left[name].cpu(), best[name]) for name in best)

    longer = kit.with_accuracies(tmp_path, ACCURACIES, **options | {"early_stop": {"patience": 3}})
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 6 and longer.state.best_global_step == 5
    ending = ending_of(read_run(tmp_path))
    assert ending is not None and not ending.early and ending.weights_of == 5


def test_what_never_beats_the_start_is_said_to_be_no_better() -> None:
    metrics = [
        {"step": 0, "eval_accuracy_greedy": 0.6},
        {"step": 1, "eval_accuracy_greedy": 0.2, "best/step": 1, "best/waited": 1},
        {"step": 2, "eval_accuracy_greedy": 0.3, "best/step": 2, "best/waited": 2},
    ]
    config = {"max_steps": 3, "early_stop": {"patience": 2, "min_delta": 0.05}}
    ending = ending_of(RunRecord(Path("run"), config, metrics, [], {}))
    assert ending is not None and ending.weights_of == 2
    assert ending.why == (
        "stopped early at step 2 of 3: accuracy_greedy had no gain of more than 0.05 in 2 evaluations in a row; the "
        "weights are those of step 2, the best by accuracy_greedy, which is no better than the start (60.0%)"
    )
    assert ending_of(RunRecord(Path("run"), config, metrics[:2], [], {})) is None  # under way
    assert ending_of(RunRecord(Path("run"), {**config, "early_stop": "junk"}, metrics, [], {})) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--early_stop {patience:0}", "early_stop: unknown key 'patience:0'"),
        (
            "--early_stop 3",
            "early_stop (=3) must be mapping, got int; for example {metric: accuracy_greedy, patience: 3",
        ),
        ("--early_stop '{patience: 0}'", "early_stop: patience (=0) must be int of at least 1"),
        ("--early_stop '{patience: 1.5}'", "early_stop: patience (=1.5) must be int"),
        ("--early_stop '{min_delta: -1}'", "early_stop: min_delta (=-1) must be float of at least 0"),
        ("--early_stop '{metric: acuracy_greedy}'", "Did you mean 'accuracy_greedy'?"),
        ("--early_stop '{patence: 3}'", "early_stop: unknown key 'patence'. Did you mean 'patience'?"),
        ("--early_stop '{metric: entropy}'", "early_stop: metric (='entropy') is good neither high nor low: set"),
        ("--early_stop '{}' --metric_for_best_model accuracy_sampled", "leave metric_for_best_model out"),
        ("--early_stop", "--early_stop has no value: it must be mapping"),
        (
            "--early_stop '{}' --student_eval_steps null",
            "early_stop: metric (='accuracy_greedy') is measured by the student's evaluation: set student_eval_steps",
        ),
        ("--early_stop '{}' --save_strategy no", "save_strategy (='no') saves none"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, words: str
) -> None:
    command = ["train", "tiny-dag", "--output_dir", str(tmp_path / "run"), "--save_strategy", "best"]
    rest = shlex.split(flags)
    if "--save_strategy" in rest:
        command = command[:-2]
    assert main([*command, *rest]) == 2
    output = capsys.readouterr()
    assert words in " ".join((output.out + output.err).split()), output
    assert not (tmp_path / "run").exists()
