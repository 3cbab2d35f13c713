"""`dopd data`: what is found in rows of many kinds, the mapping that it writes, and the rows that filters keep."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset
from PIL import Image

from dopd.cli.main import main
from dopd.data.overlap import count_overlap
from dopd.errors import ConfigError
from dopd.runs.layouts import layout_names, read_layout
from dopd.runs.row_filters import Keep
from dopd.runs.rows import load_rows
from dopd.runs.settings import load_settings
from dopd.tasks import get_source, rows_of_task

pytestmark = pytest.mark.filterwarnings("default")


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def look(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["data", *words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_none(one) for name, one in value.items() if one is not None}
    return [without_none(one) for one in value] if isinstance(value, list) else value


ROWS = [
    {"question": "2 + 3 = ?", "solution": "Add.", "final_answer": "5"},
    {"question": "2 + 3 =  ?", "solution": "Add.", "final_answer": "6"},
    {"question": "3 + 3 = ?", "solution": None, "final_answer": "6"},
    {"question": " ", "solution": "Add.", "final_answer": "6"},
]


def test_a_file_is_looked_at_and_the_mapping_is_one_that_a_run_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    held_out = write(tmp_path / "test.jsonl", [{"question": "2 + 3 = ?"}, {"question": "9 = ?"}])
    mapping = tmp_path / "data.yaml"
    found = look(capsys, path, "--held-out", held_out, "--write", str(mapping))
    columns = {"prompt": "question", "privileged_context": "solution", "answer": "final_answer"}
    assert found["mapping"] == columns and sorted(found["guessed"]) == sorted(columns)
    assert {one["name"]: one["missing"] for one in found["columns"]}["solution"] == 1
    assert (found["num_repeated"], found["num_contradictory"], found["num_without_privileged"]) == (1, 1, 1)
    assert found["overlaps"] == {held_out: 1}
    assert found["unusable"] == {"column 'prompt': the text is empty": [3]}
    assert len(found["examples"]) == 3 and set(found["examples"][0]) == {"plain", "privileged"}
    assert found["examples"][0]["plain"] == "user: 2 + 3 = ?" and "Add." in found["examples"][0]["privileged"]
    assert main(["data", path]) == 0
    assert "columns: {prompt: question, privileged_context: solution" in capsys.readouterr().out
    settings = load_settings(str(mapping), model_name_or_path="s", output_dir="r")
    assert load_rows(settings)[0][0] == {"prompt": "2 + 3 = ?", "privileged_context": "Add.", "answer": "5"}


def test_a_models_tokens_and_context_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of_task(get_source("dag"), "train", 3, "hints_without_execution")
    path = write(tmp_path / "rows.jsonl", rows)
    found = look(
        capsys, path, "--model", "tiny:dag/student", "--max-prompt-length", "1", "--max-completion-length", "8"
    )
    lengths = {one["view"]: one for one in found["lengths"]}
    assert lengths["privileged"]["longest"] > lengths["plain"]["longest"] > 1
    assert lengths["plain"]["num_too_long"] == 3 and lengths["plain"]["allowed"] == 1
    (reason,) = found["unusable"]
    assert "longer than the 1 tokens" in reason and found["unusable"][reason] == [0, 1, 2]
    assert main(["data", path, "--model", "tiny:dag/student", "--max-prompt-length", "1"]) == 0
    assert "overlong_prompts: drop" in capsys.readouterr().out


def test_overlap_of_the_splits_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train.jsonl", [{"prompt": "a b"}, {"prompt": "c"}])
    write(tmp_path / "test.jsonl", [{"prompt": "A  b"}, {"prompt": "d"}])
    assert look(capsys, str(tmp_path))["overlaps"] == {"test": 1}


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        (
            {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
            {"prompt": "conversations", "answer": "conversations.-1.value"},
        ),
        (
            {"prompt": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]},
            {"prompt": "prompt", "answer": "prompt.-1.content"},
        ),
        (
            {
                "data_source": "x",
                "prompt": [{"role": "user", "content": "a?"}],
                "reward_model": {"style": "rule", "ground_truth": "b"},
                "extra_info": {"index": 0, "answer": "c"},
            },
            {"answer": "reward_model.ground_truth"},
        ),
        (
            {
                "messages": [{"role": "user", "content": "a?"}],
                "teacher_prompt": [{"role": "user", "content": "a? It is b"}],
            },
            {"prompt": "messages", "privileged_context": "teacher_prompt.-1.content"},
        ),
        (
            {"instruction": "a?", "input": "", "output": "b"},
            {"prompt": ["instruction", "input"], "answer": "output"},
        ),
        (
            {"instruction": "a?", "input": ["b"], "output": "b"},
            {"prompt": "instruction", "answer": "output"},
        ),
        (
            {"context": None, "question": "a?", "answers": {"text": ["b"], "answer_start": [0]}},
            {"prompt": "question", "answer": "answers.text.0"},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a?"}]},
                          {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
            {"prompt": "messages", "answer": "messages.-1.content.0.text"},
        ),
        ({"问题": "b", "question": "a?", "system_prompt": ["s"]}, {"prompt": "question"}),
        ({"problem": "a?", "solution": "b", "Answer": "c"},
         {"prompt": "problem", "privileged_context": "solution", "answer": "Answer"}),
    ],
)  # fmt: skip
def test_layouts_of_other_projects_need_no_code(
    row: dict[str, Any], mapping: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = look(capsys, write(tmp_path / "rows.jsonl", [row, row]))
    assert found["mapping"] == mapping and found["unusable"] == {} and found["num_repeated"] == 1
    assert found["examples"][0]["plain"] == "user: a?"


def test_markup_in_rows_is_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", write(tmp_path / "rows.jsonl", [{"prompt": "\x1b[31mred [bold]b[/bold]"}])]) == 0
    out = capsys.readouterr().out
    assert "\x1b[31m" not in out and "\\x1b[31mred [bold]b[/bold]" in out


DIFFICULTY = "DeepSeek-R1-Distill-Qwen-7B"


def verl(answer: str, asked: str = "2 + 3 = ?", **extra: Any) -> dict[str, Any]:
    return {
        "data_source": "d", "prompt": [{"role": "user", "content": asked}], "ability": "MATH",
        "reward_model": {"style": "rule", "ground_truth": answer}, "extra_info": {"index": 0, **extra},
    }  # fmt: skip


def coding(asked: str, wrong: int) -> dict[str, Any]:
    return verl('["assert f(1) == 2"]', asked, model_difficulty={DIFFICULTY: wrong, "DeepSeek-R1-Distill-Qwen-1.5B": 9})


def virl(asked: str, rate: float, image: str = "one.png") -> dict[str, Any]:
    return {
        "question": asked, "answer": "\\boxed{A}", "PassRate_32BTrained": rate, "PassRate_7BBase": 0.0,
        "category": "c", "source": "s", "qid": asked, "image": [image],
    }  # fmt: skip


RUBRIC = [{"title": "t", "description": "d", "weight": 5}]
COPIES: dict[str, tuple[list[dict[str, Any]], list[int]]] = {
    "rar-science-20k": (
        [
            {"question": "Why?", "reference_answer": "So.", "question_source": "x", "rubric": RUBRIC},
            {"question": "why?", "reference_answer": "So.", "question_source": "x", "rubric": RUBRIC},
            {"question": "How?", "reference_answer": "", "question_source": "x", "rubric": RUBRIC},
        ],
        [0],
    ),
    "dapo-math-17k": ([verl("5"), verl("5"), verl("6", "3 + 3 = ?"), verl("", "4 = ?")], [0, 2]),
    "skywork-or1-coding": ([coding("f", 0), coding("g", 1), coding("h", 16), coding("i", 15)], [1, 3]),
    "virl39k": ([virl("<image>Which?", 0.5), virl("What?", 0.0), virl("Who?", 1.0)], [0, 2]),
    "ample-math": (
        [
            {"problem": "2 + 3 = ?", "answer": "5", "gist": "g", "key_points": "Add.", "solution": "s"},
            {"problem": "3 + 3 = ?", "answer": "6", "gist": "g", "key_points": "", "solution": "s"},
        ],
        [0],
    ),
}


@pytest.mark.parametrize("name", sorted(COPIES))
def test_datasets_of_the_field_are_read_and_filtered_by_name(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, kept = COPIES[name]
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    path, output = str(tmp_path / "copy.parquet"), tmp_path / "out.parquet"
    Dataset.from_list(rows).to_parquet(path)
    found = look(capsys, path, "--layout", name, "--output", str(output))
    assert found["num_kept"] == len(kept) and sum(found["filtered"].values()) == len(rows) - len(kept)
    assert found["unusable"] == {}
    written = Dataset.from_parquet(str(output))
    asked = [one.get("question", one.get("problem", one.get("prompt"))) for one in (rows[place] for place in kept)]
    if name == "virl39k":
        blocks = [[{"type": "image"}, {"type": "text", "text": "Which?"}], [{"type": "text", "text": "Who?"}]]
        asked = [[{"role": "user", "content": content}] for content in blocks]
    assert [without_none(prompt) for prompt in written["prompt"]] == asked
    assert all(written["answer"])


def test_every_layout_is_tried() -> None:
    assert layout_names() == sorted(COPIES)
    for name in layout_names():
        assert read_layout(name).keep.distinct


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({"filed": ["answer"]}, "Did you mean 'filled'"),
        ({"filled": "answer"}, "must be a list"),
        ({"between": {"a": [2, 1]}}, "the least and the most"),
        ({"between": {"a": 2}}, "the least and the most"),
    ],
)
def test_filters_that_cannot_be_meant_are_refused(keep: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Keep.from_mapping(keep)


def test_what_cannot_be_read_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    for words in (
        [str(tmp_path / "none.jsonl")],
        [path, "--columns", "{prompt: nothing}"],
        [path, "--keep", yaml.safe_dump({"filled": ["nothing"]})],
        [path, "--layout", "virl39k", "--columns", "{}"],
    ):
        assert main(["data", *words]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_texts_with_pictures_are_compared_with_held_out_ones(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    rows = [{"prompt": "Which?", "images": [str(tmp_path / "one.png")]}, {"prompt": "Which?", "images": []}]
    assert count_overlap(Dataset.from_list(rows[:1]), Dataset.from_list(rows)) == 1


def test_pictures_of_other_projects_are_found_and_broken_ones_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "one.png")
    turns = [{"from": "human", "value": "<image>a?"}, {"from": "gpt", "value": "b"}]
    rows = [
        {"conversations": turns, "picture": "one.png", "system": "Be short."},
        {"conversations": turns, "picture": "none.png", "system": None},
        {"conversations": turns, "picture": None, "system": ""},
        {"conversations": [{"from": "human", "value": "<image><image>a?"}], "picture": "one.png", "system": None},
    ]
    found = look(capsys, write(tmp_path / "rows.jsonl", rows))
    assert found["mapping"] == {
        "prompt": "conversations", "images": "picture", "system": "system", "answer": "conversations.-1.value"
    }  # fmt: skip
    assert [one["plain"] for one in found["examples"]] == [
        "system: Be short.\nuser: [image] a?", "user: <image>a?"
    ]  # fmt: skip
    assert sorted(found["unusable"].values()) == [[1], [3]]
    assert any("row 1" in note and "none.png" in note for note in found["notes"])
    kept = {"prompt": "<image>a?", "images": ["one.png"]}
    assert look(capsys, write(tmp_path / "kept.jsonl", [kept]))["mapping"] == {"prompt": "prompt"}
    assert main(["data", str(tmp_path / "rows.jsonl"), "--columns", "{prompt: [picture, 'no such: one']}"]) == 2
