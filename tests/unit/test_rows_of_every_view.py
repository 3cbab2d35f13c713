"""Rows that only one view reads: wrong hints, answers of siblings, held-out rows with and without p."""

from pathlib import Path
from typing import Any

import pytest
import trainer_kit as kit
from compatibility import tried
from datasets import Dataset, IterableDataset

from dopd.errors import ConfigError, DataError, ScoringError

HELD_OUT = [{name: row[name] for name in ("prompt", "answer")} for row in kit.task_rows(4, split="test")]


def messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_wrong_hint_that_does_not_fit_is_refused_by_row(tmp_path: Path, streamed: bool) -> None:
    rows = [{**row, "contrast_context": row["privileged_context"]} for row in kit.task_rows(8)]
    rows[3]["contrast_context"] = " ".join([rows[3]["prompt"][0]["content"]] * 60)
    options: dict[str, Any] = {"method_options": {"hints": "column"}}
    data = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    with pytest.raises(DataError, match="row 3: a view of the prompt has"):
        kit.trainer(tmp_path, "opsd_contrast", train_dataset=data, max_steps=4, **options).train()
    rows_here = Dataset.from_list(rows)
    kept = kit.trainer(tmp_path, "opsd_contrast", train_dataset=rows_here, overlong_prompts="drop", **options)
    assert len(kept.train_dataset) == 7
    tried("dataset", "contrast_context longer than the models read", "refused: names row; or counted")


def test_an_answer_of_a_sibling_that_does_not_fit_stops_the_run(tmp_path: Path) -> None:
    rows = kit.task_rows(8)
    longest = max(len(kit.TOKENIZER.apply_chat_template(row["prompt"])["input_ids"]) for row in rows)
    options: dict[str, Any] = {"verifier": lambda text, row: 1.0, "model": kit.many_ends(kit.student(), 3)}
    made = kit.trainer(tmp_path, "sdpo", max_context=longest + 8 + 2, **options)
    with pytest.raises(ScoringError, match=r"privileged view has prompts of up to \d+ tokens .*leaves no room"):
        kit.rollout(made)
    kit.rollout(kit.trainer(tmp_path, "sdpo", max_context=longest + 40, **options))
    tried("setting", "contexts from siblings, longer than the models read", "stops with what to lower")


def test_held_out_rows_need_no_p(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    made = kit.trainer(
        tmp_path,
        eval_dataset=Dataset.from_list(HELD_OUT),
        verifier=kit.TASK.verify,
        student_eval_steps=1,
        **options,
    )
    assert "eval_dataset has no column 'privileged_context'" in messages(caplog)
    made.train()
    logged = {name for record in made.state.log_history for name in record}
    assert {"eval_accuracy_greedy", "eval_divergence_to_teacher", "eval_loss"} <= logged
    assert "eval_accuracy_privileged" not in logged
    with pytest.raises(DataError, match="column 'privileged_context' is missing"):
        kit.trainer(tmp_path, train_dataset=Dataset.from_list(HELD_OUT))
    tried("dataset", "held-out rows without p", "evaluated without it; told")


def test_held_out_p_that_does_not_fit_is_refused_though_the_method_reads_none(tmp_path: Path) -> None:
    rows = [{**row, "privileged_context": " ".join([row["prompt"][0]["content"]] * 60)} for row in HELD_OUT]
    with pytest.raises(DataError, match="row 0: a view of the prompt has"):
        kit.trainer(tmp_path, "vanilla", eval_dataset=Dataset.from_list(rows))


def test_several_held_out_datasets_have_losses_and_one_answers(tmp_path: Path) -> None:
    several = {"a": Dataset.from_list(HELD_OUT), "b": Dataset.from_list(HELD_OUT)}
    made = kit.trainer(tmp_path, eval_dataset=several, per_device_eval_batch_size=4)
    assert list(made.eval_dataset) == ["a", "b"]
    assert {"eval_a_loss", "eval_b_loss"} <= made.evaluate().keys()
    with pytest.raises(ConfigError, match=r"eval_dataset is a dict \(a, b\)"):
        kit.trainer(tmp_path, eval_dataset=several, verifier=kit.TASK.verify, student_eval_steps=1)
    tried("dataset", "eval_dataset as a dict", "losses of each; refused for answers of the student")
