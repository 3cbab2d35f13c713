"""Run folders from elsewhere: shown as far as they can be, nothing outside of them is read, and nothing is obeyed."""

import copy
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import report_kit as kit
from PIL import Image

from dopd.errors import DataError
from dopd.report.curves import draw_run
from dopd.report.page import report_page
from dopd.report.traces import _small_uri

STRANGE: list[Any] = [
    None,
    True,
    -1,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "text",
    "",
    [],
    {},
    [1],
    {"a": 1},
    [None],
]
FILES = ("config.yaml", "metrics.jsonl", "trace.jsonl", "result.json", "summary.json", "table.txt")
RESULT = {
    "method": "dopd",
    "metrics": {"accuracy_greedy": 0.5, "entropy": 0.2, "length": 9.0},
    "intervals": {"accuracy_greedy": {"mean": 0.5, "low": 0.4, "high": 0.6}},
    "scores": {"greedy": [0.0, 1.0], "sampled": [1.0, 1.0]},
}
BYTES = [
    b"",
    b"\0" * 100,
    b"\xff\xfe\x00",
    b"[" * 100_000,
    b"{",
    b"null",
    b"[]",
    b'{"a": &a [*a]}',
    b"- - -",
    b"1e999",
    b"step: " + b"9" * 5000,
    b"\n\n",
]


def whole(folder: Path) -> Path:
    kit.run_folder(folder)
    (folder / "result.json").write_text(json.dumps(RESULT))
    return folder


def shown(folder: Path, *, curves: bool = False) -> str:
    """The page, or the one line that says why there is none."""
    try:
        if curves:
            draw_run(folder)
        return report_page([folder])
    except DataError as error:
        assert "\n" not in str(error)
        return ""


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("number", range(len(BYTES)))
def test_files_of_any_bytes_are_shown_or_refused_in_a_line(tmp_path: Path, name: str, number: int) -> None:
    folder = whole(tmp_path / "run")
    (folder / name).write_bytes(BYTES[number])
    page = shown(folder, curves=name in ("metrics.jsonl", "result.json"))
    assert page
    is_read = BYTES[number].strip() and (name != "config.yaml" or number not in (4, 7))
    if name in FILES[:4] and is_read:
        assert "damaged files" in page and f"{name}" in page


def changed(value: Any, rng: random.Random) -> Any:
    """A copy with one value, somewhere in it, that does not belong there (or gone)."""
    result = copy.deepcopy(value)
    here = result
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = rng.choice(keys)
        if isinstance(here[key], dict | list) and here[key] and rng.random() < 0.7:
            here = here[key]
            continue
        if rng.random() < 0.2:
            del here[key]
        else:
            here[key] = rng.choice(STRANGE)
        return result


@pytest.mark.parametrize("name", ["metrics.jsonl", "trace.jsonl", "result.json", "config.yaml"])
def test_values_that_do_not_belong_there_are_left_out(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    folder = whole(tmp_path / "run")
    path = folder / name
    text = path.read_text()
    for turn in range(25):
        if name.endswith(".jsonl"):
            lines = [json.loads(line) for line in text.splitlines()]
            for _ in range(rng.randint(1, 4)):
                n = rng.randrange(len(lines))
                lines[n] = changed(lines[n], rng)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        elif name == "result.json":
            path.write_text(json.dumps(changed(RESULT, rng)))
        else:
            lines = text.splitlines()
            lines[rng.randrange(len(lines))] = rng.choice(
                ["seed: [1]", "method: {a: 1}", "task: 3", "learning_rate: .nan"]
            )
            path.write_text("\n".join(lines))
        assert shown(folder, curves=name != "trace.jsonl" and turn < 5) or name == "config.yaml"


def picture(path: Path) -> Path:
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    return path


OUTSIDE: dict[str, Callable[[Path, Path], str]] = {
    "absolute path": lambda folder, secret: str(secret),
    "parent": lambda folder, secret: "../secret.png",
    "file URL": lambda folder, secret: f"file://{secret}",
    "link": lambda folder, secret: (folder / "link.png").symlink_to(secret) or "link.png",
    "link of a folder": lambda folder, secret: (folder / "sub").symlink_to(secret.parent) or "sub/secret.png",
    "pipe": lambda folder, secret: os.mkfifo(folder / "pipe.png") or "pipe.png",  # type: ignore[func-returns-value]
    "device": lambda folder, secret: "/dev/zero",
    "no picture": lambda folder, secret: "config.yaml",
    "folder": lambda folder, secret: ".",
    "broken data": lambda folder, secret: "data:image/png;base64,AAAA",
}


def test_traces_of_another_version_are_counted_and_not_read(tmp_path: Path) -> None:
    folder = whole(tmp_path / "run")
    strange = [{"schema": 99}, {"step": 1}, {"schema": 0, "tokens": [], "privileged_context": "p", "rules": 3}]
    with (folder / "trace.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in strange)
    assert '"left_out":3' in report_page([folder])


@pytest.mark.parametrize("regime", [["LH"], {"a": 1}, 3])
def test_a_regime_that_is_no_text_is_left_out(tmp_path: Path, regime: Any) -> None:
    folder = whole(tmp_path / "run")
    record = kit.record(1, 0)
    record["tokens"][0]["regime"] = regime
    kit.write_lines(folder / "trace.jsonl", [record])
    assert shown(folder)


def test_a_picture_that_another_program_reads_is_not_shown(tmp_path: Path) -> None:
    folder = whole(tmp_path / "run")
    (folder / "seen.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    assert _small_uri("seen.png", folder) is None
    Image.new("RGB", (9, 9)).save(folder / "seen.png")
    assert _small_uri("seen.png", folder) is not None


@pytest.mark.parametrize("what", OUTSIDE)
def test_a_picture_outside_of_the_run_is_not_read(tmp_path: Path, what: str) -> None:
    folder, secret = whole(tmp_path / "run"), picture(tmp_path / "secret.png")
    kit.write_lines(folder / "trace.jsonl", [kit.record(0, 0, images=[OUTSIDE[what](folder, secret)])])
    assert '"images":[null]' in shown(folder)


def test_a_picture_inside_of_the_run_is_shown(tmp_path: Path) -> None:
    folder = whole(tmp_path / "run")
    picture(folder / "seen.png")
    kit.write_lines(folder / "trace.jsonl", [kit.record(0, 0, images=["seen.png"])])
    assert '"images":["data:image/jpeg' in shown(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "trace.jsonl", "result.json", "config.yaml"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_link_or_a_pipe_is_no_file_of_a_run(tmp_path: Path, name: str, kind: str) -> None:
    folder, other = whole(tmp_path / "run"), whole(tmp_path / "other")
    (folder / name).unlink()
    if kind == "link":
        (folder / name).symlink_to(other / name)
    else:
        os.mkfifo(folder / name)
    assert bool(shown(folder)) is (name != "config.yaml")


def test_a_run_whose_numbers_are_damaged_is_not_taken_for_one_without_an_evaluation(tmp_path: Path) -> None:
    folder = whole(tmp_path / "run")
    (folder / "metrics.jsonl").write_bytes(os.urandom(3000))
    (folder / "result.json").write_text(json.dumps(RESULT)[:-9])
    page = report_page([folder])
    assert "Files of the run are damaged" in page and "No accuracy" not in page
    assert "result.json holds no evaluation; no line of metrics.jsonl can be read" in page
