"""Columns of other projects are read without code: values inside columns by their paths, conversations as prompts."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from dopd.data.column_names import guessed_columns
from dopd.errors import DataError
from dopd.runs.columns import all_paths, with_columns
from dopd.runs.rows import load_rows
from dopd.runs.settings import load_settings

pytestmark = pytest.mark.filterwarnings("default")
ASKED = [{"role": "user", "content": "2 + 3 = ?"}]
VERL = {
    "data_source": "made/up",
    "prompt": ASKED,
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"answer": "Add them. #### 5", "index": 0, "hints": ["Count on.", "Add."]},
}
CHAT = [
    {"from": "system", "value": "Be short."},
    {"from": "human", "value": "2 + 3 = ?"},
    {"from": "gpt", "value": "5"},
    {"from": "human", "value": "and 4?"},
    {"from": "gpt", "value": "9"},
]
CHAT_ASKED = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "2 + 3 = ?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "and 4?"},
]


def mapped(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    return dict(with_columns(Dataset.from_list([row, row]), columns, "it")[1])


def test_values_inside_columns_are_read_by_their_paths() -> None:
    columns = {
        "answer": "reward_model.ground_truth",
        "privileged_context": "extra_info.hints.-1",
        "number": "extra_info.index",
        "first": "extra_info.hints.0",
        "tenth": "extra_info.answer",
    }
    row = mapped(VERL, columns)
    assert [row[name] for name in columns] == ["5", "Add.", 0, "Count on.", VERL["extra_info"]["answer"]]
    assert row["prompt"] == ASKED and row["reward_model"] == VERL["reward_model"]


def test_a_path_may_take_the_place_of_its_own_column_and_goes_into_text_that_is_json() -> None:
    row = {"prompt": {"question": "2 + 3 = ?", "level": 1}, "extra": json.dumps({"a": [{"b": "5"}]}), "c.d": "plan"}
    columns = {"prompt": "prompt.question", "answer": "extra.a.0.b", "privileged_context": "c.d"}
    found = mapped(row, columns)
    assert (found["prompt"], found["answer"], found["privileged_context"]) == ("2 + 3 = ?", "5", "plan")
    assert "c.d" not in found


def test_keys_may_have_dots_in_them() -> None:
    row = {"prompt": "a", "rates": {"Qwen-1.5B": {"wrong": 3}}}
    assert mapped(row, {"rate": "rates.Qwen-1.5B.wrong"})["rate"] == 3


def test_a_row_without_the_value_has_none() -> None:
    rows = Dataset.from_list([{"p": "a", "e": {"x": ["1"]}}, {"p": "b", "e": {"x": []}}, {"p": "c", "e": None}])
    assert list(with_columns(rows, {"prompt": "p", "answer": "e.x.0"}, "it")["answer"]) == ["1", None, None]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("reward_model.ground_thruth", "'ground_thruth' is not in column 'reward_model' of it. Did you mean 'ground_"),
        ("extra_info.hints.last", "'last' must be a whole number"),
        ("extra_info.hints.7", "leads to nothing in any row of it"),
        (
            "data_source.name",
            "row 0, column 'data_source': columns: answer (='data_source.name'): 'name' is looked for",
        ),
        ("rewardmodel.x", "is not a column of it"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(path: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        with_columns(Dataset.from_list([VERL]), {"answer": path}, "it")
    assert words in str(caught.value)


def test_conversations_are_asked_up_to_the_answer(caplog: pytest.LogCaptureFixture) -> None:
    columns = {"prompt": "conversations", "answer": "conversations.-1.value"}
    with caplog.at_level(logging.WARNING):
        row = mapped({"conversations": CHAT}, columns)
    assert row["prompt"] == CHAT_ASKED and row["answer"] == "9"
    assert "2 of 2 conversations" in caplog.text
    ours = [*CHAT_ASKED, {"role": "assistant", "content": "9"}]
    assert mapped({"messages": ours}, {"prompt": "messages"})["prompt"] == CHAT_ASKED
    assert mapped({"messages": CHAT_ASKED}, {"prompt": "messages"})["prompt"] == CHAT_ASKED


def test_conversations_written_as_text_are_read() -> None:
    for text in (json.dumps(CHAT), repr(CHAT)):
        assert mapped({"prompt": text}, {"prompt": "prompt"})["prompt"] == CHAT_ASKED
    assert mapped({"question": "[role]"}, {"prompt": "question"})["prompt"] == "[role]"


def test_a_turn_of_somebody_unknown_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 0, columns: prompt .*'narrator', which must be one of human, user"):
        mapped({"c": [{"from": "narrator", "value": "x"}]}, {"prompt": "c"})


def test_a_tools_turn_at_the_end_stays() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "tool", "content": "c"}]
    assert mapped({"m": turns}, {"prompt": "m"})["prompt"] == turns


def test_a_configuration_reads_paths_for_training_and_held_out_rows(tmp_path: Path) -> None:
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text(json.dumps(VERL) + "\n")
    test.write_text(json.dumps({"conversations": CHAT, "prompt": ASKED}) + "\n")
    columns = {"answer": "reward_model.ground_truth"}
    settings = load_settings(
        None, model_name_or_path="s", output_dir="r", dataset_name=str(train), dataset_eval_name=str(test),
        columns=columns,
    )  # fmt: skip
    rows, held_out, _ = load_rows(settings)
    assert rows[0]["answer"] == "5" and held_out is not None and "answer" not in held_out.column_names


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (VERL, {"privileged_context": "extra_info.hint", "answer": "reward_model.ground_truth"}),
        ({"problem": "a", "solution": "b", "Answer": "c"}, {"prompt": "problem", "privileged_context": "solution",
                                                              "answer": "Answer"}),
        ({"question": "a", "answer": "b"}, {"prompt": "question"}),
        ({"conversations": CHAT}, {"prompt": "conversations"}),
        ({"messages": ASKED, "teacher_prompt": "a"}, {"prompt": "messages", "privileged_context": "teacher_prompt"}),
        ({"prompt": "a", "privileged_context": "b", "answer": "c"}, {}),
    ],
)  # fmt: skip
def test_the_mapping_is_guessed_by_names(row: dict[str, Any], columns: dict[str, str]) -> None:
    if row is VERL:
        row = {**VERL, "extra_info": {**VERL["extra_info"], "hint": "Count on."}}
    assert guessed_columns(all_paths(Dataset.from_list([row]).features)) == columns
