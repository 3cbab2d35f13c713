"""What is wrong with a user's rows is said with the file, the line and what to write."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from dopd.cli.main import main
from dopd.data.checks import check_columns
from dopd.errors import ConfigError, DataError
from dopd.runs.columns import with_columns
from dopd.runs.rows import load_rows
from dopd.runs.settings import load_settings
from dopd.tiny import TinySpec, build_model, build_tokenizer

pytestmark = pytest.mark.filterwarnings("default")
ROW = {"question": "a 3 b a 4 ? b", "solution": "plan a b", "answer": "7"}


def load(**values: Any) -> tuple[Dataset, Dataset | None]:
    return load_rows(load_settings(None, model_name_or_path="s", output_dir="r", **values))[:2]


BROKEN = {
    "no comma": ('{"prompt": "a"}\n\n{"prompt": "b" "answer": "2"}\n', "line 3, character 16: Expecting ',' delimiter"),
    "cut off": ('{"prompt": "a"}\n{"prompt": "b\n', "line 2, character 12: Unterminated string"),
    "a list": ('{"prompt": "a"}\n[1, 2]\n', "line 2: a row must be a JSON object, and this is a list"),
    "null before all": ('\nnull\n{"prompt": "a"}\n', "line 2: a row must be a JSON object, and this is null"),
    "a text": ('{"prompt": "a"}\n"b"\n', "line 2: a row must be a JSON object, and this is text"),
    "Python's quotes": ("{'prompt': 'a'}\n", "line 1, character 2: Expecting property name"),
    "no JSON": ("prompt: a\n", "line 1, character 1: Expecting value"),
    "a list that is cut off": ('[{"prompt": "a"},\n{"prompt":', "line 2, character 11: Expecting value"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_json_file_is_told_by_file_and_line(name: str, tmp_path: Path) -> None:
    text, words = BROKEN[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        load(dataset_name=str(path))
    assert f"'{path}', {words}" in str(caught.value) and "prompt" in str(caught.value)


def test_columns_are_read_by_the_names_of_the_run(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text(json.dumps(ROW) + "\n")
    held_out.write_text(json.dumps({"question": "x", "answer": "1"}) + "\n")
    columns = {"prompt": "question", "privileged_context": "solution"}
    rows, unseen = load(dataset_name=str(train), dataset_eval_name=str(held_out), columns=columns)
    assert rows[0] == {"prompt": ROW["question"], "privileged_context": ROW["solution"], "answer": "7"}
    assert unseen is not None and unseen[0] == {"prompt": "x", "answer": "1"}


def test_one_column_may_be_read_by_two_names_and_two_may_change_places() -> None:
    rows = Dataset.from_list([{"a": "1", "b": "2"}])
    assert with_columns(rows, {"prompt": "a", "answer": "b", "privileged_context": "b"}, "it")[0] == {
        "prompt": "1", "answer": "2", "privileged_context": "2",
    }  # fmt: skip
    assert with_columns(rows, {"a": "b", "b": "a"}, "it")[0] == {"a": "2", "b": "1"}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"prompt": "qestion"}, "prompt (='qestion') is not a column of it. Did you mean 'question'? It has question"),
        ({"answer": "solution"}, "it has a column 'answer' already"),
    ],
)
def test_columns_that_cannot_be_are_refused(columns: dict[str, str], words: str) -> None:
    with pytest.raises(DataError) as caught:
        with_columns(Dataset.from_list([ROW]), columns, "it")
    assert words in str(caught.value)


def test_columns_are_names() -> None:
    with pytest.raises(ConfigError, match="columns"):
        load_settings(None, model_name_or_path="s", output_dir="r", dataset_name="x.jsonl", columns={"prompt": 3})


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    for name, seed in (("student", 0), ("teacher", 1)):
        build_model(TinySpec(num_layers=1), build_tokenizer(), seed).save_pretrained(tmp_path / name)
        build_tokenizer().save_pretrained(tmp_path / name)
    return {
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "privileged_template": "{prompt} {privileged_context}",
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "max_completion_length": 4,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }


def run(config: dict[str, Any], rows: list[dict[str, Any]], *flags: str) -> int:
    Path(config["dataset_name"]).write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    path = Path(config["dataset_name"]).with_name("settings.yaml")
    path.write_text(yaml.safe_dump(config))
    return main(["train", str(path), *flags])


def test_the_columns_that_a_message_names_are_the_ones_that_work(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config, [ROW] * 8) == 2
    assert "columns: {prompt: question} in the config" in capsys.readouterr().err
    assert run(config, [ROW] * 8, "--columns", "{prompt: question}") == 2
    assert "columns: {privileged_context: solution} in the config" in capsys.readouterr().err
    assert run(config, [ROW] * 8, "--columns", "{prompt: question, privileged_context: solution}") == 0
    out = capsys.readouterr().out.splitlines()
    assert "accuracy was not measured" in out[-4] and out[-2] == f"report: {config['output_dir']}/report.html"
    # The command that it ends with runs, with a question and a hint in it.
    said = out[-1].removeprefix("next: dopd ").replace("QUESTION", f"'{ROW['question']}'").replace("HINT", "'plan b'")
    assert said.startswith(f"inspect --student {config['output_dir']} ")
    assert main([*shlex.split(said), "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize(
    ("columns", "prompt", "hint"),
    [
        (["solution", "answer", "hint", "question"], "question", "hint"),
        (["solution", "text", "problem", "messages"], "problem", "solution"),
        (["text", "Messages", "rationale", "steps"], "Messages", "steps"),
        (["a"], "NAME", None),
    ],
)
def test_the_likeliest_column_is_offered_whatever_their_order(
    columns: list[str], prompt: str, hint: str | None
) -> None:
    for order in (columns, columns[::-1]):
        with pytest.raises(DataError) as caught:
            check_columns(order, needs_privileged=True, method="dopd")
        assert re.search(rf"prompt: {prompt}\b", str(caught.value))
        with pytest.raises(DataError) as caught:
            check_columns([*order, "prompt"], needs_privileged=True, method="dopd")
        assert re.findall(r"privileged_context: (\w+)", str(caught.value)) == ([hint] if hint else [])


def test_a_missing_prompt_comes_before_a_verifier_that_misses_other_columns(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "judge.py").write_text("def score(completion, row):\n    return float(row['answer'] == completion)\n")
    rows = [{"messages": [{"role": "user", "content": "a 3 ? a"}], "privileged_context": "plan a"}]
    assert run(config | {"verifier": f"{tmp_path}/judge.py:score"}, rows * 8) == 2
    said = capsys.readouterr().err
    assert "column 'prompt' is missing" in said and "columns: {prompt: messages}" in said and "KeyError" not in said


def test_a_row_that_cannot_be_used_is_told_by_file_and_line(
    config: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    good = {"prompt": "a 3 b a 4 ? b", "privileged_context": "plan a b"}
    assert run(config, [good, {**good, "prompt": " "}]) == 2
    assert f"'{config['dataset_name']}', line 3: row 1, column 'prompt': the text is empty" in capsys.readouterr().err
    assert run(config, [{**good, "prompt": [[{"role": "user", "content": "a 3 ? a"}]]}]) == 2
    assert f"'{config['dataset_name']}', line 2: row 0, column 'prompt'" in capsys.readouterr().err
    (tmp_path / "test.jsonl").write_text(json.dumps({**good, "prompt": " "}) + "\n")
    assert run(config | {"dataset_eval_name": str(tmp_path / "test.jsonl")}, [good] * 4) == 2
    assert f"'{tmp_path / 'test.jsonl'}', line 1: row 0, column 'prompt'" in capsys.readouterr().err
