"""Columns of other projects are read without code: values inside columns by their paths, conversations as prompts."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from dopd.data.column_names import guessed_columns
from dopd.data.views import plain_prompt
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


ALPACA = [
    {"instruction": "Add.", "input": "2 and 3", "output": "5"},
    {"instruction": "Say hello.", "input": "", "output": "hello"},
    {"instruction": "Sing.", "input": None, "output": "la"},
]


def test_several_columns_are_one_text_and_empty_ones_are_left_out() -> None:
    rows = with_columns(
        Dataset.from_list(ALPACA), {"prompt": ["instruction", "input"], "answer": "output"}, "it"
    ).to_list()  # fmt: skip
    assert rows == [
        {"prompt": "Add.\n\n2 and 3", "answer": "5"},
        {"prompt": "Say hello.", "answer": "hello"},
        {"prompt": "Sing.", "answer": "la"},
    ]


def test_parts_may_be_paths_and_numbers_and_one_may_have_the_name_itself() -> None:
    row = {"prompt": "How many?", "meta": {"context": "Two cows."}, "level": 3, "kept": ["x"]}
    found = mapped(row, {"prompt": ["meta.context", "prompt", "level"]})
    assert found == {"prompt": "Two cows.\n\nHow many?\n\n3", "meta": row["meta"], "kept": ["x"]}
    nothing = Dataset.from_list([{"a": None, "b": None}, {"a": "", "b": None}, {"a": "x", "b": None}])
    assert with_columns(nothing, {"privileged_context": ["a", "b"]}, "it")["privileged_context"][:] == [None, "", "x"]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {"prompt": ["a", "c"]},
            "row 0, columns: prompt (=['a', 'c']): 'c' has a list, and only texts",
        ),
        ({"prompt": ["a", "bb"]}, "columns: prompt (='bb') is not a column of it"),
        ({"prompt": "m", "system": "c"}, "a system prompt is text, got list"),
        ({"prompt": "m", "system": "a"}, "begins with a system prompt ('Be short.'), and the row has another ('x')"),
    ],
)
def test_what_cannot_be_put_together_is_refused(columns: dict[str, Any], words: str) -> None:
    row = {"a": "x", "c": ["y"], "m": [{"role": "system", "content": "Be short."}, *ASKED]}
    with pytest.raises(DataError) as caught:
        with_columns(Dataset.from_list([row]), columns, "it")
    assert words in str(caught.value)


def test_a_system_column_begins_the_conversation() -> None:
    rows = [{"q": "a", "system": "Be short."}, {"q": "b", "system": " "}, {"q": "c", "system": None}]
    found = with_columns(Dataset.from_list(rows), {"prompt": "q", "system": "system"}, "it").to_list()
    asked = [[{"role": "user", "content": text}] for text in "abc"]
    asked[0].insert(0, {"role": "system", "content": "Be short."})
    assert found == [{"prompt": turns} for turns in asked]
    chat = {"conversations": CHAT[1:], "meta": {"system": "Be short."}}
    assert mapped(chat, {"prompt": "conversations", "system": "meta.system"})["prompt"] == CHAT_ASKED
    assert mapped({"prompt": CHAT_ASKED, "system": "Be short."}, {"system": "system"}) == {"prompt": CHAT_ASKED}
    blocks = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    turns = mapped({"m": blocks, "s": "Be short."}, {"prompt": "m", "system": "s"})["prompt"]
    assert turns == [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}, *blocks]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"conversations": [{"from": "human", "value": "<image>\nHow?"}, {"from": "gpt", "value": "So."}],
          "image": "p"}, {"prompt": "conversations"}),
        ({"messages": [{"role": "user", "content": "<image>\nHow?"}], "pics": ["p"]},
         {"prompt": "messages", "images": "pics"}),
        ({"prompt": "<image>\nHow?", "images": ["p"]}, {"prompt": "prompt"}),
        ({"a": "<image>", "b": "\nHow?", "image_1": "p", "image_2": None},
         {"prompt": ["a", "b"], "images": ["image_1", "image_2"]}),
    ],
)  # fmt: skip
def test_marks_are_the_places_of_pictures(row: dict[str, Any], columns: dict[str, Any]) -> None:
    """Beside a row without a picture, whose text is asked as it stands, in blocks like the others'."""
    without = {name: None if name in ("image", "images", "pics", "image_1") else value for name, value in row.items()}
    found = with_columns(Dataset.from_list([row, without]), columns, "it")
    first, second = (plain_prompt(one) for one in found)
    text = "\n\n\nHow?" if len(row) == 4 else "\nHow?"
    assert first == user({"type": "image", "image": "p"}, {"type": "text", "text": text})
    assert second == user({"type": "text", "text": f"<image>{text}"})


def user(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(blocks)}]


def test_marks_and_pictures_that_do_not_match_are_refused_with_the_row() -> None:
    rows = with_columns(
        Dataset.from_list([{"q": "<image> and <image>", "images": ["p"]}]), {"prompt": "q"}, "it"
    )  # fmt: skip
    with pytest.raises(DataError, match="2 image blocks without an image and the row has 1 image"):
        plain_prompt(rows[0])
    plain = {"q": "What is <image> in HTML?"}
    assert mapped(plain, {"prompt": "q"})["prompt"] == plain["q"]


def test_names_of_columns_may_be_of_any_script() -> None:
    assert mapped({"问题": "a", "подсказка": "b", "x: y, z": "c"},
                  {"prompt": "问题", "privileged_context": "подсказка", "answer": "x: y, z"}) == {
        "prompt": "a", "privileged_context": "b", "answer": "c"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (ALPACA[0], {"prompt": ["instruction", "input"], "answer": "output"}),
        ({"Context": "c", "Question": "q", "answers": {"text": ["a"], "answer_start": [0]}},
         {"prompt": ["Context", "Question"], "answer": "answers"}),
        ({"conversations": CHAT, "system": "s", "tools": "[]"}, {"prompt": "conversations", "system": "system"}),
        ({"question": "q", "image_1": "p", "image_2": "p", "image_10": "p"},
         {"prompt": "question", "images": ["image_1", "image_2", "image_10"]}),
        ({"question": "q", "picture": "p"}, {"prompt": "question", "images": "picture"}),
        ({"question": "q", "image": "p", "picture": "p"}, {"prompt": "question"}),
    ],
)  # fmt: skip
def test_several_columns_and_pictures_are_guessed_by_names(row: dict[str, Any], columns: dict[str, Any]) -> None:
    assert guessed_columns(list(row)) == columns


def test_a_users_turn_at_the_end_of_a_path_is_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    question, answer = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    rows = Dataset.from_list([{"messages": [question, answer]}, {"messages": [question]}])
    mapped = with_columns(rows, {"prompt": "messages", "answer": "messages.-1.content"}, "data.jsonl")
    assert mapped["answer"] == ["4", None]
    assert "leads to a turn of the user's in 1 of 2 rows, which is no answer" in caplog.text
    told = Dataset.from_list([{"talk": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}])
    assert with_columns(told, {"prompt": "talk", "answer": "talk.-1.value"}, "data.jsonl")["answer"] == ["4"]
    with pytest.raises(DataError, match="leads to nothing in any row"):
        with_columns(told, {"prompt": "talk", "answer": "talk.0.value"}, "data.jsonl")
