"""Where a run writes: one run at a time, through no link, and what cannot be written is one line with the way out."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from resume_kit import in_a_process, status_of
from run_kit import files_of

from dopd.cli.main import main
from dopd.errors import ConfigError
from dopd.runs.settings import load_settings
from dopd.trainer import whole
from dopd.trainer.config import DOPDConfig
from dopd.trainer.folder import RunFolder
from dopd.trainer.lock import LOCK_FILE, FolderLock
from dopd.trainer.owned import MARKER_FILE

pytestmark = pytest.mark.filterwarnings("default")


def test_a_second_run_in_one_folder_is_refused_and_a_dead_one_is_not_in_the_way(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def hold() -> None:
        with FolderLock(run):
            gate.open("w").close()  # waits for a reader: the lock is held
            signal.pause()

    child = in_a_process(hold, tmp_path / "log")
    gate.open().close()
    assert train() == 2
    assert f"is in use by process {child} on" in capsys.readouterr().err
    os.kill(child, signal.SIGKILL)
    assert status_of(child) == -signal.SIGKILL and (run / LOCK_FILE).exists()
    assert train() == 0
    assert not (run / LOCK_FILE).exists()


def test_copies_of_a_dataset_that_cannot_be_written_are_told_with_the_way_out(
    tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x"}\n')

    def full(*_: Any, **__: Any) -> None:
        try:
            raise OSError(errno.EROFS, "Read-only file system", "/cache")
        except OSError as error:
            raise RuntimeError("no dataset was made") from error

    monkeypatch.setattr("dopd.runs.rows._files", full)
    flags = ["--task", "null", "--dataset_name", str(tmp_path / "rows.jsonl")]
    assert train(*flags) == 2
    assert "'/cache': Read-only file system" in (said := capsys.readouterr().err) and "HF_DATASETS_CACHE" in said


@pytest.mark.parametrize(
    ("variable", "value", "advised"),
    [("DOPD_CACHE", "/dev/null", "DOPD_CACHE"), ("HOME", "/proc/nope", "DOPD_CACHE"), ("full", "", "DOPD_CACHE")],
)
def test_where_a_cache_cannot_be_written_it_is_what_to_choose_anew(
    variable: str, value: str, advised: str, tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("No space left on device (os error 28)")  # as safetensors has it: without a path

    monkeypatch.delenv("DOPD_CACHE", raising=False)
    if variable == "full":
        monkeypatch.setenv("DOPD_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("dopd.tiny.shipped.save", full)
    else:
        monkeypatch.setenv(variable, value)
    assert train("--model_name_or_path", "tiny:dag/student") == 2
    said = capsys.readouterr().err
    assert advised in said and "another output_dir" not in said and len(said.splitlines()) == 1, said
    place = {"DOPD_CACHE": "/dev/null/tiny", "HOME": "/proc/nope/.cache/dopd/tiny", "full": str(tmp_path / "cache")}
    assert f"'{place[variable]}" in said
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("file", "advised"),
    [
        ("/h/.cache/huggingface/hub/models--a/blobs/b", "HF_HUB_CACHE"),
        ("/h/.cache/huggingface/token", "HF_HOME"),
        ("/h/.cache/huggingface/datasets/x", "HF_DATASETS_CACHE"),
        ("/h/.config/other", "HOME"),
        ("/h/run/metrics.jsonl", "output_dir"),
        ("/elsewhere/x", "output_dir"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_by_what_sets_it(
    file: str, advised: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dopd.files import not_written

    for name in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME", "DOPD_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    for number in (errno.ENOSPC, errno.EACCES, errno.ENOTDIR):
        said = str(not_written(OSError(number, "", file), "/h/run", choose="another output_dir"))
        assert f"choose another {advised}" in said and repr(file) in said, said


def test_where_the_system_has_no_locks_the_process_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dopd.trainer import lock

    monkeypatch.setattr(lock, "fcntl", None)
    path = tmp_path / LOCK_FILE
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    host = lock.socket.gethostname()
    for owner, refused in (
        ({"pid": int(ended.stdout), "host": host}, False),
        ({"pid": os.getppid(), "host": host}, True),
        ({"pid": 1, "host": "another"}, True),
        (None, False),
    ):
        path.write_text("" if owner is None else json.dumps(owner))  # empty: it was killed while it took the lock
        if refused:
            with pytest.raises(ConfigError, match="is in use by process"):
                FolderLock(tmp_path).take()
        else:
            with FolderLock(tmp_path), FolderLock(tmp_path):
                assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_folder_that_cannot_be_written_is_one_line(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "not-there")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for place, words in (
        (tmp_path / "file", "is a file: choose another"),
        (tmp_path / "file" / "run", "choose another output_dir"),
        (tmp_path / "nowhere", "is a link to"),
        (Path("/proc/run"), "/proc/run"),
        (tmp_path / ("x" * 300), "choose another output_dir"),
    ):
        assert train("--output_dir", str(place)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and len(error.splitlines()) == 1 and words in error, error
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "nowhere").exists()
    RunFolder(tmp_path / "link").check(overwrite=False, resume=False, steps=2)


RENEWED = ("config.yaml", "README.md", "config.json", "tokenizer.json", "training_args.bin", "metrics.jsonl")


@pytest.mark.parametrize("name", [*RENEWED, "model.safetensors", "table.txt", "curves.png"])
def test_a_resumed_run_writes_through_no_other_name_of_a_file(name: str, tmp_path: Path, train: Any) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    assert train() == 0
    os.link(run / name, mine)
    before = mine.read_bytes()
    assert train("--resume_from_checkpoint", "--max_steps", "3", "--resume_with_changes", "max_steps") == 0
    assert mine.read_bytes() == before and not mine.samefile(run / name)


@pytest.mark.parametrize("name", ["README.md", "config.json", "training_args.bin", "config.yaml"])
def test_a_resumed_run_follows_no_link(name: str, tmp_path: Path, train: Any) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    assert train() == 0
    mine.write_text("mine")
    (run / name).unlink()
    (run / name).symlink_to(mine)
    assert train("--resume_from_checkpoint", "--max_steps", "3", "--resume_with_changes", "max_steps") == 0
    assert mine.read_text() == "mine"
    links = [path for path in run.rglob("*") if path.is_symlink()]
    assert [path.resolve() for path in links] == [mine], "the link itself is kept, here or in _kept"


@pytest.mark.parametrize("name", ["_unfinished", "_abandoned", "_kept"])
def test_places_of_a_run_are_not_looked_for_behind_links(name: str, tmp_path: Path, train: Any) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert train() == 0
    elsewhere.mkdir()
    (run / name).symlink_to(elsewhere)
    assert train("--resume_from_checkpoint", "--max_steps", "3", "--resume_with_changes", "max_steps") == 2
    assert files_of(elsewhere) == {} and list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", ["metrics.jsonl", MARKER_FILE, LOCK_FILE, "checkpoint-2/dopd_checkpoint.json"])
def test_a_pipe_in_a_run_folder_is_not_waited_for(name: str, tmp_path: Path, train: Any) -> None:
    run = tmp_path / "run"
    assert train() == 0
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    status = train("--resume_from_checkpoint", "--max_steps", "3", "--resume_with_changes", "max_steps")
    assert status == (0 if name.startswith("checkpoint") else 2)  # an earlier checkpoint is gone on from


def test_commands_that_are_refused_say_which_flag_and_leave_nothing(
    tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run, pipe, mine = tmp_path / "run", tmp_path / "pipe", tmp_path / "mine.html"
    run.mkdir()
    (run / "config.yaml").write_text("task: dag\n")
    os.mkfifo(pipe)
    mine.write_text("mine")
    (tmp_path / "q" / "vanilla-seed0").mkdir(parents=True)
    (tmp_path / "q" / "vanilla-seed0" / "thesis.txt").write_text("mine")
    (tmp_path / "x" / "figure3").mkdir(parents=True)
    (tmp_path / "x" / "figure3" / "README.md").write_text("mine")
    (tmp_path / "nul.yaml").write_text('{model_name_or_path: x, output_dir: "a\\0b"}\n')
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "logs").symlink_to(tmp_path / "x")
    before = files_of(tmp_path / "q") | files_of(tmp_path / "x")
    inspect = ["inspect", "--student", "tiny:dag/student", "--teacher", "tiny:dag/teacher"]
    quick = ["quickstart", "--seeds", "1", "--methods", "vanilla", "--output-dir"]
    for arguments, words in (
        (["report", str(run), "--output", "/proc/nowhere/page.html"], "choose another --output"),
        (["report", str(run), "--output", "/proc/page.html"], "choose another --output"),
        (["report", str(run), "--output", str(pipe)], "--output"),
        ([*inspect, "--prompt", "x", "--html", str(mine)], "--html"),
        ([*inspect, "--prompt", f"@{pipe}"], "--prompt (="),
        ([*inspect, "--prompt", "x", "--privileged", "@/dev/zero"], "is a device"),
        ([*quick, "q"], "vanilla-seed0') is not empty, and holds files that are not a run's"),
        ([*quick, "linked"], "logs/start.json' was not written by dopd"),
        ([*quick, "/proc/nowhere"], "choose another --output-dir"),
        (["experiment", "figure3", "--output-dir", "x"], "README.md' is not of experiment 'figure3'"),
        (["experiment", "figure3", "--output-dir", "/proc/nowhere"], "choose another --output-dir"),
        (["experiment", "figure3", "--scale", "full", "--output-dir", "/proc/nowhere"], "choose another --output-dir"),
        (["train", "nul.yaml"], "must be text without NUL"),
        (["train", "tiny-dag", "--output_dir", "/proc/nowhere"], "choose another output_dir"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert words in error.splitlines()[-1] and "HF_HOME" not in error and "Traceback" not in error, error
    assert files_of(tmp_path / "q") | files_of(tmp_path / "x") == before and mine.read_text() == "mine"
    with pytest.raises(SystemExit, match="2"):
        main(["report", "a\udce9"])
    assert "is not UTF-8" in capsys.readouterr().err
    assert train("--overwrite", "--resume_from_checkpoint", "false") == 2  # there is no such run
    (run / "config.yaml").unlink()
    assert train() == 0 and train("--overwrite", "--resume_from_checkpoint") == 2
    assert "overwrite (=True) begins anew, and resume_from_checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_that_has_no_room_for_its_first_checkpoint_says_how_to_begin_again(
    tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "run"))

    with monkeypatch.context() as patch:
        patch.setattr(whole, "seal", full)
        assert train() == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in error and error.endswith("overwrite=true begins again here")
    assert train("--overwrite") == 0


def test_a_linked_folder_in_the_way_of_a_model_is_moved_and_not_written_into(tmp_path: Path) -> None:
    from dopd.trainer.owned import move_in

    run, made, elsewhere = (tmp_path / name for name in ("run", "made", "elsewhere"))
    for folder in (run, made / "adapter", elsewhere):
        folder.mkdir(parents=True)
    (made / "adapter" / "weights").write_text("new")
    (elsewhere / "weights").write_text("mine")
    (run / "adapter").symlink_to(elsewhere)
    move_in(made, run)
    assert files_of(elsewhere) == {"weights": b"mine"} and (run / "_kept" / "adapter").is_symlink()
    assert (run / "adapter" / "weights").read_text() == "new"


@pytest.mark.parametrize("key", ["output_dir", "model_name_or_path", "dataset_name", "verifier", "deepspeed"])
def test_a_variable_that_no_shell_has_put_in_is_named(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values: dict[str, Any] = {"model_name_or_path": "a/b", "dataset_name": "x.jsonl", "output_dir": "runs/x"}
    for place, words in (
        ("$HOME/x", f"{key} (='$HOME/x') has $HOME in it"),
        ("a/${SCRATCH}", "has ${SCRATCH} in it"),
        ("~nobody-of-this-name/x", "begins with the home of a user who is not here"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_settings(None, **values | {key: place})
        assert words in str(caught.value)
    (tmp_path / "cost$USD").write_text("")  # a name like any other
    if key != "output_dir":
        load_settings(None, **values | {key: "cost$USD"})
    assert load_settings(None, **values | {key: "cost$5"})


@pytest.mark.parametrize("key", ["output_dir", "teacher_model_name_or_path", "method"])
def test_python_reads_places_as_files_do(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    here: dict[str, Any] = {"output_dir": "runs/x", "use_cpu": True, "bf16": False}
    with pytest.raises(ConfigError, match=re.escape(f"{key} (='$HOME/x') has $HOME in it")):
        DOPDConfig(**here | {key: "$HOME/x"})
    if key != "method":
        assert getattr(DOPDConfig(**here | {key: "~/x"}), key) == str(tmp_path / "x")


def test_a_folder_that_cannot_be_made_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for place, words in (
        ("file/run", "HERE  '{}': Not a directory; nothing more was written. To go on, move away what is there, or"),
        ("x" * 300, "HERE  '{}': File name too long"),
        ("full", "note  output_dir (='{}') is not empty, and holds files that are not a run's"),
    ):
        small = ["--train_prompts", "8", "--eval_prompts", "2", "--per_device_train_batch_size", "4"]
        assert main(["train", "tiny-dag", "--output_dir", str(tmp_path / place), "--dry-run", *small]) == 0
        assert words.format(tmp_path / place) in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]
