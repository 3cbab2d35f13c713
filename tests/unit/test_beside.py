"""Relative paths of pictures are meant from where the file of their rows is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vision_kit as kit
from compatibility import tried
from datasets import Dataset

from dopd.data.encode import image_sources
from dopd.data.images import open_image
from dopd.data.views import as_conversation, plain_prompt
from dopd.errors import DataError
from dopd.runs.rows import load_rows
from dopd.runs.settings import load_settings

pytestmark = pytest.mark.filterwarnings("default")


def load(name: str | list[str]) -> Any:
    return load_rows(load_settings(None, model_name_or_path="s", output_dir="r", dataset_name=name))[0]


def block(path: str, key: str = "path") -> list[dict[str, Any]]:
    held = {"type": "image_url", "image_url": {"url": path}} if key == "image_url" else {"type": "image", key: path}
    return [{"role": "user", "content": [held, {"type": "text", "text": "how ?"}]}]


def seen(row: dict[str, Any]) -> list[Any]:
    prompt = plain_prompt(as_conversation(row))
    assert not row.get("privileged_images") or row["privileged_images"] == row["images"]
    return image_sources(prompt)


ROWS = {
    "images": lambda path: {
        "prompt": [{"role": "user", "content": "how ?"}],
        "images": [path],
        "privileged_images": [path],
    },
    "image": lambda path: {"prompt": "how ?", "image": path},
    "image: a mapping with path": lambda path: {"prompt": "how ?", "image": {"path": path}},
    "images: a file address": lambda path: {"prompt": "how ?", "images": ["file://" + path]},
    "a block's path": lambda path: {"prompt": block(path)},
    "a block's url": lambda path: {"prompt": block(path, "url")},
    "a block's image_url": lambda path: {"prompt": block(path, "image_url")},
}


@pytest.mark.parametrize("how", ROWS)
def test_a_relative_path_is_one_from_the_file_of_its_row(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files in two folders, each with a picture of the same relative path; and a row without any."""
    for n, folder in enumerate(("a", "b")):
        (tmp_path / folder / "img").mkdir(parents=True)
        kit.picture(n).save(tmp_path / folder / "img" / "0 0.png")
        rows = [ROWS[how]("img/0 0.png"), ROWS[how](str(tmp_path / folder / "img" / "0 0.png"))]
        (tmp_path / folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    names = [str(tmp_path / folder / "train.jsonl") for folder in ("b", "a")]
    for given, pictures in ((names, [1, 1, 0, 0]), (names[0], [1, 1]), ("../a/train.jsonl", [0, 0])):
        rows = [seen(row) for row in load(given)]
        for (source,), number in zip(rows, pictures, strict=True):
            assert np.array_equal(np.asarray(open_image(source)), np.asarray(kit.picture(number)))
    tried("dataset", f"relative path of a picture, {how}", "from the folder of the file of rows")


def test_a_path_that_names_two_pictures_or_none_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, data = tmp_path / "here", tmp_path / "data"
    for folder in (here, data):
        folder.mkdir()
        kit.picture(0).save(folder / "0.png")
    (data / "train.jsonl").write_text(json.dumps({"prompt": "how ?", "images": ["0.png"]}))
    monkeypatch.chdir(here)
    with pytest.raises(DataError, match=r"row 0, column 'images': '0\.png' is there twice: '.*data/0.png' and '.*here"):
        load("../data/train.jsonl")
    (data / "0.png").unlink()
    (path,) = load("../data/train.jsonl")[0]["images"]
    assert path == str(here / "0.png")  # as `datasets` reads it
    (here / "0.png").unlink()
    (path,) = load("../data/train.jsonl")[0]["images"]
    assert path == str(data / "0.png")  # where it is looked for


def test_a_folder_of_rows_has_its_pictures_beside_the_rows_or_at_its_top(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "img").mkdir()
    kit.picture(0).save(tmp_path / "img" / "0.png")
    kit.picture(1).save(tmp_path / "data" / "1.png")
    rows = [{"prompt": "how ?", "images": [path]} for path in ("img/0.png", "1.png")]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = [row["images"][0] for row in load(str(tmp_path / "data"))]
    assert found[1] == str(tmp_path / "data" / "1.png")


def test_the_bar_of_rows_of_text_speaks_of_no_pictures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "how ?"}]}], "privileged_context": "p"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert len(load(str(tmp_path / "rows.jsonl"))) == 1
    shown = capfd.readouterr().err
    assert "reading rows" in shown and "picture" not in shown


MAPPED = {
    "a column": (lambda path: {"q": "how ?", "photo": path}, {"prompt": "q", "images": "photo"}),
    "a path": (lambda path: {"q": "how ?", "meta": {"n": "x", "p": [{"path": path}]}},
               {"prompt": "q", "images": "meta.p"}),
    "JSON text": (lambda path: {"q": "how ?", "meta": json.dumps({"n": "x", "p": path})},
                  {"prompt": "q", "images": "meta.p"}),
    "two columns": (lambda path: {"q": "how ?", "image_1": path, "image_2": None},
                    {"prompt": "q", "images": ["image_1", "image_2"]}),
    "blocks": (lambda path: {"messages": block(path, "image")}, {"prompt": "messages"}),
    "LLaVA": (lambda path: {"image": path, "conversations": [{"from": "human", "value": "<image>\nhow ?"},
                                                            {"from": "gpt", "value": "so"}]},
              {"prompt": "conversations"}),
}  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "folder"])
@pytest.mark.parametrize("how", MAPPED)
def test_paths_under_other_names_are_from_the_file_of_their_row_too(how: str, ending: str, tmp_path: Path) -> None:
    make, columns = MAPPED[how]
    names = []
    for n, folder in enumerate(("a", "b")):
        (tmp_path / folder / "img").mkdir(parents=True)
        kit.picture(n).save(tmp_path / folder / "img" / "0.png")
        names.append(str(tmp_path / folder / ("rows.parquet" if ending == "parquet" else "rows.jsonl")))
        rows = [make("img/0.png"), make(str(tmp_path / folder / "img" / "0.png"))]
        if ending == "parquet":
            Dataset.from_list(rows).to_parquet(names[-1])
        else:
            Path(names[-1]).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    name: Any = str(tmp_path / "b") if ending == "folder" else names
    found = load_rows(load_settings(None, model_name_or_path="s", output_dir="r", dataset_name=name, columns=columns))
    pictures = [seen(row) for row in found[0]]
    numbers = [1, 1] if ending == "folder" else [0, 0, 1, 1]
    assert all(len(one) == 1 for one in pictures)
    for (source,), n in zip(pictures, numbers, strict=True):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(kit.picture(n)))
