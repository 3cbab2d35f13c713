"""Rows of files, folders and saved datasets are those of `datasets`; held-out rows are not the training rows."""

import bz2
import gzip
import json
import logging
import lzma
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compatibility import tried
from datasets import Dataset, DatasetDict
from PIL import Image
from trainer_kit import task_rows, trainer

from dopd.data.overlap import count_overlap
from dopd.errors import ConfigError, DataError
from dopd.runs.rows import load_rows
from dopd.runs.settings import load_settings
from dopd.runs.train import make_config

pytestmark = pytest.mark.filterwarnings("default")
MINIMAL = {"model_name_or_path": "s", "output_dir": "r"}


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [{"prompt": f"question {n}", "answer": str(n)} for n in range(start, start + count)]


def lines(of: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in of).encode()


def load(**values: Any) -> tuple[list[str], list[str] | None]:
    train, held_out, _ = load_rows(load_settings(None, **MINIMAL, **values))
    return train["answer"], None if held_out is None else held_out["answer"]


def numbers(first: int, last: int) -> list[str]:
    return [str(n) for n in range(first, last)]


WRITERS: dict[str, Callable[[Path], Any]] = {
    "rows.json": lambda path: path.write_text(json.dumps(rows(4))),
    "rows.jsonl": lambda path: path.write_bytes(lines(rows(4))),
    "rows.ndjson": lambda path: path.write_bytes(lines(rows(4))),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(lines(rows(4)))),
    "rows.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(lines(rows(4)))),
    "rows.jsonl.xz": lambda path: path.write_bytes(lzma.compress(lines(rows(4)))),
    "rows.csv": lambda path: Dataset.from_list(rows(4)).to_csv(path),
    "rows.tsv": lambda path: path.write_text(
        "prompt\tanswer\n" + "".join(f"{row['prompt']}\t{row['answer']}\n" for row in rows(4))
    ),
    "rows.csv.gz": lambda path: path.write_bytes(gzip.compress(b"prompt,answer\na,0\nb,1\nc,2\nd,3\n")),
    "rows.parquet": lambda path: Dataset.from_list(rows(4)).to_parquet(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_are_read_by_their_ending(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    train, held_out = load(dataset_name=str(tmp_path / name))
    assert list(map(str, train)) == numbers(0, 4) and held_out is None
    tried("dataset", f"file {name.removeprefix('rows')}", "read")


def test_patterns_lists_and_slices_are_those_of_datasets(tmp_path: Path) -> None:
    for part in range(3):
        (tmp_path / f"part{part}.jsonl").write_bytes(lines(rows(4, 4 * part)))
    pattern = str(tmp_path / "part*.jsonl")
    assert load(dataset_name=pattern) == (numbers(0, 12), None)
    assert load(dataset_name=str(tmp_path / "**" / "*.jsonl"))[0] == numbers(0, 12)
    assert load(dataset_name=[str(tmp_path / "part2.jsonl"), str(tmp_path / "part0.jsonl")])[0] == [
        *numbers(8, 12),
        *numbers(0, 4),
    ]
    tried("dataset", "pattern or list of files", "read, in order")
    split = load(dataset_name=pattern, dataset_train_split="train[25%:]", dataset_test_split="train[:25%]")
    assert split == (numbers(3, 12), numbers(0, 3))
    assert load(dataset_name=pattern, dataset_train_split="train[10:]")[0] == numbers(10, 12)
    assert load(dataset_name=pattern, dataset_train_split="train[:2]+train[-1:]")[0] == ["0", "1", "11"]
    tried("dataset", "slices of a split (train[:5%], train[100:])", "as in datasets, for files, folders and hub ids")


def test_a_split_that_a_file_does_not_have_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(rows(4)))
    for key in ("dataset_test_split", "dataset_train_split"):
        with pytest.raises(DataError, match=rf"{key} \(='test'\) is not in dataset_name.*'train' alone.*train\[:5%\]"):
            load(dataset_name=str(path), **{key: "test"})
    for empty in ("train[:0]", "train[4:]", "train[9:]", "train[3:2]", "train[100%:]"):
        with pytest.raises(DataError, match=rf"dataset_train_split \(='{re.escape(empty)}'\), has no rows"):
            load(dataset_name=str(path), dataset_train_split=empty)
    tried("dataset", "dataset_test_split of one file", "refused: a file has the one split train")


def test_held_out_rows_of_a_second_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(rows(4)))
    (tmp_path / "b.jsonl").write_bytes(lines(rows(3, 4)))
    first, second = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    assert load(dataset_name=first, dataset_eval_name=second) == (numbers(0, 4), numbers(4, 7))
    assert load(dataset_name=first, dataset_eval_name=second, dataset_eval_split="train[:1]")[1] == ["4"]
    with pytest.raises(DataError, match=r"dataset_eval_split \(='test'\) is not in dataset_eval_name"):
        load(dataset_name=first, dataset_eval_name=second, dataset_eval_split="test")
    for values, words in (
        ({"dataset_name": first, "dataset_eval_split": "test"}, "needs dataset_eval_name"),
        ({"task": "dag", "dataset_eval_name": second}, "makes its own held-out"),
        (
            {
                "dataset_name": first,
                "dataset_eval_name": second,
                "dataset_test_split": "x",
                "dataset_eval_split": "y",
            },
            "leave one out",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            load(**values)
    tried("dataset", "dataset_eval_name: a second file, folder or dataset", "held out")


def test_folders_of_data_of_saved_datasets_and_of_images(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes(lines(rows(4)))
    (data / "test.jsonl").write_bytes(lines(rows(2, 4)))
    assert load(dataset_name=str(data), dataset_test_split="test") == (numbers(0, 4), numbers(4, 6))
    with pytest.raises(DataError, match=r"dataset_test_split \(='validation'\) is not in dataset_name.*test"):
        load(dataset_name=str(data), dataset_test_split="validation")
    with pytest.raises(DataError, match="has the splits train, test: set dataset_eval_split"):
        load(dataset_name=str(data), dataset_eval_name=str(data))
    tried("dataset", "folder with train.jsonl and test.jsonl", "read")

    Dataset.from_list(rows(4)).save_to_disk(tmp_path / "one")
    parts = {"train": Dataset.from_list(rows(4)), "dev": Dataset.from_list(rows(2, 4))}
    DatasetDict(parts).save_to_disk(tmp_path / "many")
    assert load(dataset_name=str(tmp_path / "one"), dataset_train_split="train[1:3]")[0] == ["1", "2"]
    split = load(dataset_name=str(tmp_path / "many"), dataset_test_split="dev[50%:]")
    assert split == (numbers(0, 4), ["5"])
    with pytest.raises(DataError, match=r"'train', 'dev' alone"):
        load(dataset_name=str(tmp_path / "many"), dataset_test_split="test")
    tried("dataset", "folder of save_to_disk, one dataset or one for each split", "read")

    pictures = tmp_path / "pictures" / "train"
    pictures.mkdir(parents=True)
    for n in range(2):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(pictures / f"{n}.png")
    (pictures / "metadata.jsonl").write_bytes(lines([{"file_name": f"{n}.png", **rows(1, n)[0]} for n in range(2)]))
    train, _, _ = load_rows(load_settings(None, **MINIMAL, dataset_name=str(tmp_path / "pictures")))
    assert train["answer"] == ["0", "1"] and train[1]["image"].getpixel((0, 0)) == (1, 0, 0)
    tried("dataset", "imagefolder", "read")


BROKEN = {
    "odd.csv": (b"prompt,answer\na,1\nb,2,3,4\n", "line 3: 4 fields where the header has 2"),
    "latin.jsonl": (
        '{"prompt": "a", "answer": "1"}\n{"prompt": "caf\u00e9", "answer": "1"}\n'.encode("latin-1"),
        "line 2: the byte 0xe9 is no UTF-8. Save the file as UTF-8",
    ),
    "latin.csv": (
        "prompt,answer\ncaf\u00e9,1\n".encode("latin-1"),
        "line 2: the byte 0xe9 is no UTF-8. Save the file as UTF-8",
    ),
    "utf-16.jsonl": ('{"prompt": "a", "answer": "1"}\n'.encode("utf-16"), "line 1: the byte 0xff .*the file is UTF-16"),
    "twice.jsonl": (
        b'{"prompt": "a"}\n\n{"prompt": "b", "prompt": "c"}\n',
        "line 3: the key 'prompt' stands twice in one object",
    ),
    "cut.jsonl": (b'{"prompt": "a", "answer": "1"}\n{"prompt": "b', "JSON|Missing|parse"),
    "cut.parquet": (b"PAR1", "cannot be read"),
    "cut.jsonl.gz": (gzip.compress(b'{"prompt": "a"}\n' * 50)[:-10], "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    good = tmp_path / f"a.{name.partition('.')[2]}"
    if name.endswith("csv"):
        good.write_bytes(b"prompt,answer\na,1\n")
    given = [str(tmp_path / name)] if not good.exists() else [str(good), str(tmp_path / name)]
    with pytest.raises(DataError, match=words) as caught:
        load(dataset_name=given)
    assert repr(str(tmp_path / name)) in str(caught.value) and "\n" not in str(caught.value)
    tried("dataset", f"file that cannot be read: {name}", "refused: the file is named")


def test_names_that_lead_nowhere_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(rows(1)))
    (tmp_path / "a.doc").write_text("x")
    (tmp_path / "a.csv").write_text("prompt\nx\n")
    for name, words in (
        (str(tmp_path / "none.jsonl"), "is not a file"),
        (str(tmp_path / "*.parquet"), "no file matches"),
        (str(tmp_path / "a.doc"), r"must end in \.json"),
        ([str(tmp_path / "a.jsonl"), str(tmp_path / "a.csv")], "mixes files of the kinds csv, json"),
        (str(tmp_path / "nothing" / "here"), "cannot be read"),
    ):
        with pytest.raises(DataError, match=words):
            load(dataset_name=name)
    for empty in ([], ""):
        with pytest.raises(ConfigError, match=r"dataset_name .* is empty"):
            load(dataset_name=empty)


# --- Overlap


def asks(prompt: Any, **columns: Any) -> Dataset:
    return Dataset.from_list([{"prompt": prompt, **columns}])


def turn(text: Any, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("train", "held_out", "same"),
    [
        (asks("What is 2 + 2?"), asks(" what is 2 +  2?\n"), 1),
        (asks("What is 2 + 2?"), asks([turn("What is 2 + 2?")]), 1),
        (asks([turn("Be brief", "system"), turn("q")]), asks([turn("q")]), 1),
        (asks([turn([{"type": "text", "text": "q"}])]), asks([turn("q")]), 1),
        (asks("caf\u00e9"), asks("cafe\u0301"), 1),
        (asks("What is 2 + 2?"), asks("What is 2 + 3?"), 0),
        (asks("What is 2 + 2?"), asks("What is 2+2 ?"), 1),
        (asks("Wie gro\u00df ist x ?"), asks("wie gross istx?"), 1),
        (asks("Sort 1 12 3"), asks("Sort 11 2 3"), 0),
        (asks("Sort 1  12 3"), asks("Sort 1 12 3 "), 1),
        (asks([turn("q"), turn("a", "assistant"), turn("r")]), asks([turn("r")]), 0),
        (asks([turn("q")], image=b"one"), asks([turn("q")], image=b"one"), 1),
        (asks([turn("q")], image=b"one"), asks([turn("q")], image=b"two"), 0),
        (asks([turn("q")], images=[b"one", b"two"]), asks([turn("q")], images=[b"one"]), 0),
    ],
)
def test_rows_that_ask_the_same_are_counted(train: Dataset, held_out: Dataset, same: int) -> None:
    assert count_overlap(train, held_out) == same


def test_a_run_says_how_many_held_out_rows_are_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held_out = task_rows(4, split="test")
    train = Dataset.from_list([*task_rows(8), *held_out[:3]])
    with caplog.at_level(logging.WARNING, "dopd"):
        trainer(tmp_path, train_dataset=train, eval_dataset=Dataset.from_list(held_out))
    assert "3 of 4 rows of eval_dataset ask what a row of train_dataset asks" in caplog.text
    tried("dataset", "held-out rows that ask what is trained on", "counted and warned of")


def test_a_name_with_brackets_is_a_name_and_never_another_file(tmp_path: Path) -> None:
    for name, first in (("[v]1.jsonl", 0), ("v1.jsonl", 10), ("a?.jsonl", 20), ("ab.jsonl", 30)):
        (tmp_path / name).write_bytes(lines(rows(2, first)))
    assert load(dataset_name=str(tmp_path / "[v]1.jsonl"))[0] == numbers(0, 2)
    assert load(dataset_name=str(tmp_path / "a?.jsonl"))[0] == numbers(20, 22)
    assert sorted(load(dataset_name=str(tmp_path / "*.jsonl"))[0], key=int) == [
        *numbers(0, 2),
        *numbers(10, 12),
        *numbers(20, 22),
        *numbers(30, 32),
    ]
    for folder in ("[m]x", "mx"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.jsonl").write_bytes(lines(rows(2)))
    assert load(dataset_name=str(tmp_path / "[m]x" / "train.jsonl"))[0] == numbers(0, 2)
    with pytest.raises(DataError, match="as a pattern"):
        load(dataset_name=str(tmp_path / "[m]x"))
    tried("dataset", "file whose name has brackets", "used: that file alone")


def test_a_file_without_a_line_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match="it has no rows"):
        load(dataset_name=str(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize("key", ["max_steps", "train_prompts", "per_device_train_batch_size", "lora_r"])
def test_a_number_without_a_value_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} has no value"):
        load_settings(None, [f"--{key}="], **MINIMAL, task="dag")


# --- Values as they are written

AS_WRITTEN = {
    "whole numbers in CSV": ("a.csv", b"prompt,answer\na,1\nb,-20\n", [1, -20]),
    "007 in CSV": ("a.csv", b"prompt,answer\na,007\nb,7\n", ["007", "7"]),
    "NA, None, null, nan in CSV": (
        "a.csv",
        b"prompt,answer\na,NA\nb,None\nc,null\nd,nan\n",
        ["NA", "None", "null", "nan"],
    ),
    "empty fields in CSV": ("a.csv", b"prompt,answer\na,1\nb,\n", ["1", ""]),
    "1.50 in TSV": ("a.tsv", b"prompt\tanswer\na\t1.50\nb\t2.25\n", ["1.50", "2.25"]),
    "True and False in CSV": ("a.csv", b"prompt,answer\na,True\nb,False\n", [True, False]),
    "numbers of more than 64 bits in CSV": (
        "a.csv",
        b"prompt,answer\na,123456789012345678901\n",
        ["123456789012345678901"],
    ),
    "quotes, delimiters and new lines in CSV": ("a.csv", b'prompt,answer\na,"1, ""2""\n3"\n', ['1, "2"\n3']),
    "CSV with a byte order mark": ("a.csv", b"\xef\xbb\xbfprompt,answer\na,x\n", ["x"]),
    "a field of 200,000 characters in CSV": ("a.csv", b"prompt,answer\na," + b"x" * 200_000 + b"\n", ["x" * 200_000]),
    "dates in JSON lines": (
        "a.jsonl",
        b'{"prompt": "a", "answer": "2024-05-01"}\n{"prompt": "b"}\n',
        ["2024-05-01", None],
    ),
    "3 beside 2.5 in JSON lines": (
        "a.jsonl",
        b'{"prompt": "a", "answer": 3}\n{"prompt": "b", "answer": 2.5}\n',
        [3, 2.5],
    ),
    "numbers of more than 64 bits in JSON lines": (
        "a.jsonl",
        b'{"prompt": "a", "answer": 123456789012345678901}\n',
        ["123456789012345678901"],
    ),
    "fractions in nested JSON": ("a.json", b'[{"prompt": "a", "answer": {"x": [1, 2.5]}}]', [{"x": [1, 2.5]}]),
}


@pytest.mark.parametrize("what", AS_WRITTEN)
@pytest.mark.parametrize("place", ["file", "gz", "folder"])
def test_values_are_those_of_the_file(what: str, place: str, tmp_path: Path) -> None:
    name, content, answers = AS_WRITTEN[what]
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / f"{name}.gz" if place == "gz" else folder / name
    path.write_bytes(gzip.compress(content) if place == "gz" else content)
    read, _ = load(dataset_name=str(folder if place == "folder" else path))
    assert list(read) == answers and list(map(type, read)) == list(map(type, answers))
    if place == "file":
        tried("dataset", what, "as written")


NOT_ROWS = {
    "open quote, closed by a later one": (
        "a.csv",
        b'prompt,answer\na,1\n"b,2\nc,3\n"d,4\n',
        "line 3: .*stands in quotes",
    ),
    "open quote to the end": ("a.csv", b'prompt,answer\na,1\n"b,2\nc,3\n', "line 3: unexpected end of data"),
    "a field too many in every row": ("a.csv", b"prompt,answer\na,1,x\nb,2,y\n", "line 2: 3 fields .* header has 2"),
    "a field too few": ("a.csv", b"prompt,answer\na,1\n\nb\n", "line 4: 1 fields"),
    "a column twice": ("a.csv", b"prompt,answer,answer\na,1,2\n", "'answer' more than once"),
    "no line": ("a.csv", b"", "has no rows"),
    "object of splits": (
        "a.json",
        b'{"train": [{"prompt": "a"}], "test": [{"prompt": "b"}]}',
        r"lists \(train, test\)",
    ),
    "object of columns": ("a.json", b'{"prompt": ["a", "b"], "answer": ["1", "2"]}', r"lists \(prompt, answer\)"),
}


@pytest.mark.parametrize("what", NOT_ROWS)
def test_a_file_that_would_be_read_as_other_rows_is_refused(what: str, tmp_path: Path) -> None:
    name, content, words = NOT_ROWS[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        load(dataset_name=str(tmp_path / name))
    assert "\n" not in str(caught.value)
    tried("dataset", f"{name[2:]} with {what}", "refused: the line or the columns are named")


def test_files_with_other_columns_or_types(tmp_path: Path) -> None:
    given = {"a": {"prompt": "a"}, "b": {"prompt": "b", "answer": "x"}, "c": {"prompt": "c", "answer": 1}}
    paths = {name: str(tmp_path / f"{name}.jsonl") for name in given}
    for name, row in given.items():
        Path(paths[name]).write_bytes(lines([row]))
    for order in ("ab", "ba"):
        assert set(load(dataset_name=[paths[name] for name in order])[0]) == {None, "x"}
    (tmp_path / "d.jsonl").write_bytes(lines([{"prompt": "d", "answer": "007"}]))
    assert list(load(dataset_name=[paths["c"], str(tmp_path / "d.jsonl")])[0]) == [1, "007"]
    with pytest.raises(DataError, match=r"column 'answer' is Value\('string'\) in .*b.jsonl.*int64.*c.jsonl"):
        load(dataset_name=[paths["c"], paths["b"]])
    for name, content in (("d", "prompt\na\n"), ("e", "prompt,answer\na,1\n")):
        (tmp_path / f"{name}.csv").write_text(content)
    with pytest.raises(DataError, match=r"e.csv' has the columns prompt, answer, and .*d.csv' has prompt"):
        load(dataset_name=str(tmp_path / "*.csv"))
    tried("dataset", "JSON files of which some lack a column", "null there")


def test_endings_in_capitals_are_endings_and_files_have_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "ROWS.JSONL.GZ"
    path.write_bytes(gzip.compress(lines(rows(2))))
    assert load(dataset_name=str(path))[0] == numbers(0, 2)
    with pytest.raises(DataError, match=r"configurations .'main'. are of hub datasets"):
        load(dataset_name=str(path), dataset_config="main")


SPLITS: dict[str, tuple[dict[str, str], str | None]] = {
    "a file": ({"dataset_name": "rows.jsonl", "dataset_test_split": "test"}, "it has 'train' alone"),
    "a file of elsewhere": ({"dataset_name": "absent.jsonl", "dataset_train_split": "x"}, "it has 'train' alone"),
    "a part": ({"dataset_name": "rows.jsonl", "dataset_train_split": "train[:5%"}, "Unrecognized instruction format"),
    "a folder": ({"dataset_name": "folder", "dataset_test_split": "dev"}, "it has 'train', 'test' alone"),
    "a saved dataset": ({"dataset_name": "saved", "dataset_train_split": "x"}, "it has 'train', 'val' alone"),
    "no split of several": ({"dataset_name": "rows.jsonl", "dataset_eval_name": "saved"}, "set dataset_eval_split"),
    "a file, part": ({"dataset_name": "rows.jsonl", "dataset_test_split": "train[:2]"}, None),
    "a folder's own": ({"dataset_name": "folder", "dataset_test_split": "test[:1]"}, None),
    "a saved dataset's own": ({"dataset_name": "saved", "dataset_test_split": "val"}, None),
    "of the hub": ({"dataset_name": "org/name", "dataset_train_split": "x"}, None),
    "a task": ({"task": "dag"}, None),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_dry_run_refuses_the_splits_that_the_run_would(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, refusal = SPLITS[name]
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for path in ("rows.jsonl", "folder/train.jsonl", "folder/test.jsonl"):
        Path(path).write_bytes(lines(rows(4)))
    DatasetDict({split: Dataset.from_list(rows(4)) for split in ("train", "val")}).save_to_disk("saved")
    trained = {**MINIMAL, "method": "vanilla", "teacher_model_name_or_path": "t", "use_cpu": True, "bf16": False}
    settings = load_settings(None, **trained, **values)
    if refusal is None:
        make_config(settings, elsewhere=True)
        return
    with pytest.raises(ConfigError) as told:
        make_config(settings, elsewhere=True)
    assert refusal in str(told.value)
    if "absent" not in values["dataset_name"]:
        with pytest.raises(DataError) as of_the_run:
            load_rows(settings)
        assert str(of_the_run.value) == str(told.value)
