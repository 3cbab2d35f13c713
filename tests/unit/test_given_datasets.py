"""What is brought as a dataset: formats of tensors and tables, dictionaries of splits, and what is no dataset."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit
from compatibility import tried
from datasets import Dataset, DatasetDict, IterableDatasetDict

from dopd.errors import ConfigError, DataError

ROWS = [{**row, "worth": 1.5} for row in trainer_kit.task_rows(4)]
FORMATS = ("numpy", "torch", "pandas", "arrow")


def trainer(folder: Path, given: Any, **options: Any) -> Any:
    return trainer_kit.trainer(folder, train_dataset=given, per_device_train_batch_size=4, num_generations=2, **options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_format_of_tensors_or_tables_gives_the_rows_that_are_stored(kind: str, stream: bool, tmp_path: Path) -> None:
    stored = Dataset.from_list(ROWS)
    given = (stored.to_iterable_dataset() if stream else stored).with_format(kind)
    seen: list[dict[str, Any]] = []

    def judge(completion: str, row: dict[str, Any]) -> float:
        seen.append(dict(row))
        return 1.0

    made = trainer(tmp_path, given, verifier=judge, shuffle_dataset=False)
    made.train()
    for row in seen:
        assert type(row["worth"]) is float
        assert any(all(row[name] == value for name, value in own.items()) for own in ROWS)
    assert {str(row["prompt"]) for row in seen} >= {str(row["prompt"]) for row in ROWS[:2]}
    tried("dataset", f"with_format({kind!r})", "read as the rows that are stored")


def test_columns_that_a_format_hides_stay_hidden_and_a_transform_acts(tmp_path: Path) -> None:
    stored = Dataset.from_list(ROWS)
    made = trainer(tmp_path / "hidden", stored.with_format("numpy", columns=["prompt", "privileged_context"]))
    assert set(made.train_dataset[0]) == {"prompt", "privileged_context"}
    other = [{"role": "user", "content": ROWS[0]["prompt"][0]["content"]}]
    turned = stored.with_transform(lambda batch: {**batch, "prompt": [other for _ in batch["prompt"]]})
    made = trainer(tmp_path / "turned", turned)
    assert all(row["prompt"] == other for row in made.train_dataset)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (DatasetDict(train=Dataset.from_list(ROWS)), r"a DatasetDict.*choose one of 'train'.*train_dataset\['train'\]"),
        (
            IterableDatasetDict(first=Dataset.from_list(ROWS).to_iterable_dataset()),
            r"an? IterableDatasetDict.*train_dataset\['first'\]",
        ),
        (ROWS, r"a list.*Dataset.from_list\(rows\)"),
        ((row for row in ROWS), "a generator.*Dataset.from_generator"),
        (torch.utils.data.TensorDataset(torch.zeros(2)), "a TensorDataset.*must be a Dataset"),
    ],
)
def test_what_is_no_dataset_is_told_before_a_model_is_loaded(given: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, given, model="no/such-model")
    with pytest.raises(ConfigError, match="eval_dataset"):
        trainer(tmp_path, Dataset.from_list(ROWS), model="no/such-model", eval_dataset={"one": ROWS})
    tried("dataset", f"a {type(given).__name__} as train_dataset", "refused: says what to give")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["question", "answer"], "If 'question' is what the student answers, call it 'prompt'"),
        (["Prompt"], "If 'Prompt' is"),
        (["id", "conversations"], "columns: {prompt: conversations} in the config: they are asked up to the last turn"),
        (["messages"], "columns: {prompt: messages}"),
        (["a"], "Call the column that the student answers 'prompt'"),
    ],
)
def test_a_dataset_without_a_prompt_is_told_how_to_have_one(columns: list[str], message: str, tmp_path: Path) -> None:
    rows = [dict.fromkeys(columns, "text") | {"privileged_context": "p"}]
    with pytest.raises(DataError, match=f"column 'prompt' is missing.*{message}"):
        trainer(tmp_path, Dataset.from_list(rows * 4))
    tried("dataset", f"columns {', '.join(columns)}, no prompt", "refused: says what to rename or to make")
