"""Room on the disk is looked at before the first step, and a full disk names what can be deleted."""

import errno
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trainer_kit as kit
from run_kit import Train

from dopd.tiny import TinySpec
from dopd.trainer import room, whole

WIDE = TinySpec(num_layers=2, hidden_size=192)
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "a limit": {"save_total_limit": 1},
    "weights alone": {"save_only_model": True},
    "without averages": {"optim": "sgd"},
    "two small averages": {"optim": "adafactor"},
}
NEEDED = r"needs about ([\d.]+) MiB \(\d checkpoints of .* and the model of ([\d.]+) MiB\), and 0 bytes are free"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


@pytest.mark.parametrize("case", CASES)
def test_what_is_needed_is_what_the_files_take(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there: list[int] = []
    put = whole.put_in_place

    def measured(made: Path, folder: Path) -> None:
        put(made, folder)
        there.append(sum(size_of(path) for _, path in whole.checkpoints_of(folder.parent)))

    monkeypatch.setattr(whole, "put_in_place", measured)
    with_free(monkeypatch, 0)
    given = {"optim": "adamw_torch", "learning_rate": 1e-3, **SAVES, **CASES[case]}
    kit.trainer(tmp_path / "run", model=kit.student(spec=WIDE), **given).train()
    needed = re.search(NEEDED, caplog.text)
    assert needed is not None, caplog.text
    weights = (tmp_path / "run" / "checkpoint-3" / "model.safetensors").stat().st_size / 2**20
    assert float(needed[2]) == pytest.approx(weights, rel=0.1)
    assert float(needed[1]) == pytest.approx(max(there) / 2**20 + weights, rel=0.1)


def test_a_disk_with_room_is_not_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_free(monkeypatch, 2**40)
    kit.trainer(tmp_path / "run", **SAVES).train()
    assert "needs about" not in caplog.text


def test_a_full_disk_names_the_run_that_is_replaced(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    before = size_of(tmp_path / "run")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "run" / "checkpoint-1"))

    with monkeypatch.context() as patch:
        patch.setattr(whole, "seal", full)
        assert train("--overwrite") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    found = re.search(r"the run that is replaced takes ([\d.]+) KiB until the new one has ended: .*_previous", error)
    assert found is not None, error
    assert float(found[1]) == pytest.approx(before / 2**10, rel=0.1)


@pytest.mark.parametrize("marker", ["none", "older", "newer"])
def test_the_run_of_another_version_is_said_to_be_one(
    marker: str, tmp_path: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train() == 0
    (run / "dopd_run.json").unlink()
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "dopd_checkpoint.json").unlink()
    if marker != "none":
        said = {"older": {"format": 1, "files": ["config.yaml"]}, "newer": {"format": 3, "files": {}}}[marker]
        (run / "dopd_run.json").write_text(json.dumps(said))
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    for flags in ([], ["--overwrite"]):
        assert train(*flags) == 2
        assert "is the run of another version of dopd" in capsys.readouterr().err
    assert train("--resume_from_checkpoint", "true") == 2
    assert "no whole checkpoint" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
