"""A user's files are never deleted: a run owns what it has written, and replaces another run with that alone."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trainer_kit as kit
import yaml
from resume_kit import in_a_process, kill_me, resumable, status_of
from run_kit import files_of, steps_of

from dopd.errors import ConfigError, FileError
from dopd.report.page import write_report
from dopd.trainer import folder as folders
from dopd.trainer import whole
from dopd.trainer.folder import PREVIOUS, RunFolder
from dopd.trainer.lock import LOCK_FILE
from dopd.trainer.owned import MARKER_FILE, make_own, own

pytestmark = pytest.mark.filterwarnings("default")


def test_overwrite_deletes_what_the_run_made_and_nothing_else(tmp_path: Path, train: Any) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert train("--save_total_limit", "1") == 0
    first = files_of(run)
    assert {"config.yaml", "model.safetensors", "report.html", "README.md"} <= set(
        json.loads(first[MARKER_FILE])["files"]
    )
    elsewhere.mkdir()
    (elsewhere / "page.html").write_text("mine")
    mine = {
        "thesis.py": b"mine",
        "data/rows.jsonl": b"{}",
        "checkpoint-2/notes.txt": b"mine",
        "checkpoint-7/x": b"mine",
    }
    for name, content in mine.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)
    (run / "report.html").unlink()
    (run / "report.html").symlink_to(elsewhere / "page.html")
    (run / "linked").symlink_to(elsewhere)
    assert train("--overwrite", "--save_steps", "2", "--method", "vanilla") == 0
    left = files_of(run)
    mine["_kept/checkpoint-2/notes.txt"] = mine.pop("checkpoint-2/notes.txt")
    assert {name: left.get(name) for name in mine} == mine
    assert files_of(elsewhere) == {"page.html": b"mine"} and (run / "linked").is_symlink()
    assert (run / "report.html").is_file() and not (run / "report.html").is_symlink()
    assert left["table.txt"].startswith(b"vanilla") and left["model.safetensors"] != first["model.safetensors"]
    assert (run / "_kept" / "report.html").is_symlink()  # somebody has put it there
    assert set(left) - set(mine) == {*first, "_kept/report.html"}


def test_files_that_are_not_a_runs_are_never_overwritten(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("another: program")
    (run / "thesis.py").write_text("mine")
    before = files_of(run)
    assert train() == 2
    said = capsys.readouterr().err  # what would not help is not advised
    assert "is not empty" in said and "overwrite=true" not in said and "resume_from_checkpoint" not in said
    assert train("--overwrite") == 2
    assert "holds files that are not a run's" in capsys.readouterr().err and files_of(run) == before
    (run / MARKER_FILE).write_text(json.dumps({"format": 2, "files": {"../models": None, "thesis.pyc": None}}))
    assert train("--overwrite") == 2
    assert "has a config.yaml that is not the run's" in capsys.readouterr().err
    (run / MARKER_FILE).write_text("mine")
    with pytest.raises(ConfigError, match=r"has a dopd_run\.json that is not the run's"):
        RunFolder(run).check(overwrite=True, resume=False, steps=2)
    (run / MARKER_FILE).unlink()
    names = ["config.yaml"]
    RunFolder(tmp_path).check(names, overwrite=False, resume=True, steps=2)  # nothing in it has that name
    with pytest.raises(ConfigError, match=r"has a config\.yaml that is not the run's"):
        RunFolder(run).check(names, overwrite=False, resume=True, steps=2)


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_the_place_of_a_replaced_run_is_nobody_elses(
    kind: str, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert train() == 0
    elsewhere.mkdir()
    (elsewhere / "README.md").write_text("mine")
    aside = run / PREVIOUS
    if kind == "link":
        aside.symlink_to(elsewhere)
    elif kind == "file":
        aside.write_text("mine")
    else:
        shutil.copytree(elsewhere, aside)
    before = files_of(run)
    assert train("--overwrite") == 2
    assert f"{PREVIOUS}" in capsys.readouterr().err
    assert files_of(run) == before and files_of(elsewhere) == {"README.md": b"mine"}


def test_the_old_run_returns_where_its_replacement_fails_and_goes_where_it_does_not(
    tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert train() == 0
    before = files_of(run)
    with monkeypatch.context() as patched:
        kit.let_diverge(patched)
        assert train("--overwrite", "--save_steps", "2", "--max_grad_norm", "0") == 2
    after = files_of(run)
    assert after.pop("non_finite.json")  # what the failed one leaves to be looked at
    assert {**after, MARKER_FILE: b""} == {**before, MARKER_FILE: b""}
    (run / "non_finite.json").unlink()
    # Killed in its first step, it has set the old one aside; killed while that is moved, it goes on with moving.
    moves, move = iter(range(99)), os.replace
    stand_ins = {
        "moving": (folders.os, "replace", lambda *args: kill_me() if next(moves) == 9 else move(*args)),
        "begun": (RunFolder, "describe", kill_me),
    }
    for module, name, stand_in in stand_ins.values():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stand_in)
            child = in_a_process(lambda: train("--overwrite"), tmp_path / "log")
            assert status_of(child) == -signal.SIGKILL
    aside = files_of(run / PREVIOUS)
    assert {name: content for name, content in before.items() if name != MARKER_FILE}.items() <= aside.items()
    assert train() == 2
    assert train("--overwrite") == 0
    assert not (run / PREVIOUS).exists() and steps_of(run) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
def test_a_command_that_is_told_to_end_leaves_in_order(tmp_path: Path, train: Any) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    assert train() == 0
    flags = ["--overwrite", "--max_steps", "500", "--save_total_limit", "1"]
    child = in_a_process(lambda: sys.exit(train(*flags)), log)
    end = time.monotonic() + 60
    while not (run / "checkpoint-3").exists() and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(child, signal.SIGTERM)
    assert status_of(child) == 143
    said = log.read_text()
    assert "Traceback" not in said and "To go on: the same again with resume_from_checkpoint=true" in said, said
    (last,) = run.glob("checkpoint-*")
    assert whole.damage(last) is None and f"saved as {last}" in said
    assert not (run / LOCK_FILE).exists()
    assert (run / PREVIOUS / "model.safetensors").exists()  # the new run has not ended
    assert train("--resume_from_checkpoint", "--max_steps", "500", "--save_total_limit", "1") == 0
    assert not (run / PREVIOUS).exists()


def test_a_run_that_is_ended_after_training_does_the_rest_when_it_is_resumed(
    tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("dopd.trainer.recording.write_report", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train() == 143
    assert f"resume_from_checkpoint=true goes on from {run / 'checkpoint-2'}" in capsys.readouterr().err
    before = files_of(run)
    assert train("--resume_from_checkpoint") == 0
    after = files_of(run)
    assert RunFolder(run).is_complete and after["model.safetensors"] == before["model.safetensors"]
    assert after["metrics.jsonl"] == before["metrics.jsonl"] and "report.html" in after


def test_what_a_kill_left_half_written_is_removed_and_what_is_missing_is_said(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / ".dopd_run.json.0123abcd.part").write_text("{")
    assert train() == 0
    ours, mine = (".config.yaml.0123abcd.part", ".metrics.jsonl.00000000.part"), (".thesis.py.0123abcd.part", "a.part")
    for name in (*ours, *mine):
        (run / name).write_text("half")
    (run / "metrics.jsonl").unlink()
    capsys.readouterr()
    assert train("--resume_from_checkpoint", "--max_steps", "3", "--resume_with_changes", "max_steps") == 0
    assert capsys.readouterr().err.count(f"{run / 'metrics.jsonl'} is not there any more") == 1
    assert {path.name for path in run.iterdir() if path.name.endswith(".part")} == set(mine)


def test_a_report_writes_over_its_own_pages_alone(tmp_path: Path) -> None:
    run, target = tmp_path / "run", tmp_path / "mine.html"
    run.mkdir()
    (run / "config.yaml").write_text("task: dag\n")
    target.write_text("mine")
    (run / "report.html").symlink_to(target)
    for place in (None, run / "report.html", target):  # a link, and what is no page of ours
        with pytest.raises(FileError, match=r"is no page that dopd has written.*--output"):
            write_report([run], place)
    assert target.read_text() == "mine" and (run / "report.html").is_symlink()
    for _ in range(2):  # a page of ours is made anew
        assert "<html" in write_report([run], tmp_path / "new" / "page.html").read_text()


def test_a_resumed_run_describes_itself_once_its_checkpoint_was_read(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    assert train() == 0
    before = files_of(run)
    assert train("--resume_from_checkpoint") == 0
    assert files_of(run) == before, "a complete run is left as it is"
    assert train("--resume_from_checkpoint", "--max_steps", "4", "--seed", "3") == 2
    assert "seed is 42 there and 3 here" in capsys.readouterr().err and files_of(run) == before
    assert train("--resume_from_checkpoint", "--max_steps", "3", "--resume_with_changes", "max_steps") == 0
    assert steps_of(run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 3
    assert whole.damage(run / "checkpoint-3") is None and RunFolder(run).is_complete
    there = ["--output_dir", str(tmp_path / "other"), "--resume_from_checkpoint", str(run / "checkpoint-1")]
    assert train(*there) == 0 and steps_of(tmp_path / "other") == ["checkpoint-2"]


def test_what_a_user_edits_in_a_run_folder_stays(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train() == 0
    (run / "README.md").write_text("my card")
    (run / "config.json").write_text(kept := (run / "config.json").read_text() + "\n")
    assert train("--resume_from_checkpoint", "--max_steps", "3", "--resume_with_changes", "max_steps") == 0
    said = capsys.readouterr().err
    assert f"{run / 'README.md'} was not written by the run, or was edited since: it is kept" in said
    assert (run / "README.md").read_text() == "my card" and f"moved to {run / '_kept' / 'config.json'}" in said
    assert (run / "_kept" / "config.json").read_text() == kept and json.loads((run / "config.json").read_text())
    (run / "checkpoint-2" / "config.json").write_text(kept)
    assert train("--overwrite", "--save_total_limit", "1") == 0
    left = files_of(run)
    assert left["_kept/README.md"] == b"my card" and left["README.md"] != b"my card"
    assert left["_kept/checkpoint-2/config.json"].decode() == left["_kept/config.json"].decode() == kept
    assert not (run / PREVIOUS).exists()
    (run / "config.json").write_text(again := kept + "\n")
    assert train("--overwrite", "--save_total_limit", "1") == 0  # edited files are not in the way of the next one
    assert (run / "_kept" / "config.json-2").read_text() == again


def test_what_a_user_edits_in_a_report_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dopd.runs import quickstart as module

    target = tmp_path / "q"

    def write(*_: Any) -> dict[str, Any]:
        (target / "summary.md").write_text("ours")
        return {"task": "dag"}

    def run(jobs: list[Any], **_: Any) -> None:
        for job in jobs:
            job.log.parent.mkdir(exist_ok=True)
            job.log.write_text("ours")

    stand_ins = {
        "run_jobs": run,
        "read_run": lambda *_: None,
        "_write_report": write,
        "write_report": lambda *_: target / "report.html",
        "summary_rows": lambda *_: ([], []),
        "print_table": lambda *_, **__: None,
        "verdicts": lambda *_: [],
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(module, name, stand_in)
    for _ in range(2):  # what nobody has edited is renewed
        module.quickstart(config=None, folder=str(target), methods=["vanilla"], seeds=1)
        assert not (target / "_kept").exists()
    (log,) = target.rglob("*.log")
    edited = (target / "summary.md", log)
    for path in edited:
        path.write_text("mine")
    module.quickstart(config=None, folder=str(target), methods=["vanilla"], seeds=1)
    for path in edited:
        assert path.read_text() == "ours"
        assert (target / "_kept" / path.relative_to(target)).read_text() == "mine"


@pytest.mark.parametrize("name", ["metrics.jsonl", "trace.jsonl"])
@pytest.mark.parametrize("edit", ["another", "added", "changed", "added after a kill"])
def test_a_file_that_grows_is_a_users_once_one_has_written_it(
    name: str, edit: str, tmp_path: Path, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, rows = tmp_path / "run", '{"prompt":"2+2","answer":"4"}\n'
    flags = ("--trace_steps", "1", "--logging_steps", "1", "--save_steps", "2")
    long = ("--max_steps", "3")
    if edit == "added after a kill":
        with monkeypatch.context() as patch:
            patch.setattr("dopd.trainer.callbacks.MetricsFile.on_train_end", kill_me)
            assert status_of(in_a_process(lambda: train(*flags, *long), tmp_path / "log")) == -signal.SIGKILL
    else:
        assert train(*flags, *long) == 0
    ours = (run / name).read_text()
    assert json.loads(ours.splitlines()[-1])["step"] >= 2  # it has grown since the checkpoint
    changed = ours.replace('"step":1', '"step":9', 1)
    mine = {"another": rows, "changed": changed}.get(edit, ours + rows)
    assert mine != ours
    (run / name).write_text(mine)
    assert train(*flags, *long, "--overwrite") == 0
    assert (run / "_kept" / name).read_text() == mine and rows not in (run / name).read_text()
    (run / name).write_text(mine)
    changes = ("--max_steps", "4", "--resume_with_changes", "max_steps")
    assert train(*flags, *changes, "--resume_from_checkpoint") == 0
    assert (run / "_kept" / f"{name}-2").read_text() == mine and rows not in (run / name).read_text()
    assert train(*flags, "--overwrite") == 0
    assert len(list((run / "_kept").iterdir())) == 2, "nothing of the run's own is taken for a user's"


def test_what_a_run_evaluates_after_training_is_its_own(tmp_path: Path) -> None:
    from dopd.trainer.owned import users

    trainer = resumable(tmp_path, steps=1)
    trainer.train()
    trainer.log({"later": 1.0})
    assert '"later":1.0' in (tmp_path / "metrics.jsonl").read_text() and not users(tmp_path, ["metrics.jsonl"])


def test_the_old_run_is_there_until_the_new_one_has_ended(
    tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(*flags: str) -> int:
        with monkeypatch.context() as patch:
            kit.let_diverge(patch)
            return train(*flags, "--max_grad_norm", "0")

    run = tmp_path / "run"
    assert train() == 0
    model = (run / "model.safetensors").read_bytes()
    assert diverging("--overwrite") == 2
    assert steps_of(run) == ["checkpoint-1"]  # whole, and worth nothing
    assert f"is still in {run / PREVIOUS}" in capsys.readouterr().err
    assert (run / PREVIOUS / "model.safetensors").read_bytes() == model
    assert diverging("--overwrite") == 2
    assert (run / PREVIOUS / "model.safetensors").read_bytes() == model  # not that of the run that never ended
    assert train("--overwrite", "--seed", "7") == 0
    assert not (run / PREVIOUS).exists() and (run / "model.safetensors").read_bytes() != model


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (("--model_name_or_path", "{run}"), "model_name_or_path"),
        (("--model_name_or_path", "{run}/checkpoint-1"), "model_name_or_path"),
        (("--model_name_or_path", "{run}/_previous"), "model_name_or_path"),
        (("--model_name_or_path", "{adapter}"), "the base of model_name_or_path"),
        (("--teacher_model_name_or_path", "{run}"), "teacher_model_name_or_path"),
        (("--task", "null", "--dataset_name", "{run}/tra*.jsonl"), "dataset_name"),
        (("--task", "null", "--dataset_name", "{run}/mine.jsonl"), None),
    ],
)
def test_overwrite_does_not_delete_what_the_new_run_is_made_from(
    flags: tuple[str, ...], what: str | None, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run, adapter = tmp_path / "run", tmp_path / "adapter"
    for folder in (run, run / PREVIOUS):
        (folder / "checkpoint-1").mkdir(parents=True)
        for name in ("model.safetensors", "trace.jsonl", f"checkpoint-1/{whole.MANIFEST_FILE}"):
            (folder / name).write_text("{}")
        own(folder, ["model.safetensors", "trace.jsonl"], complete=True)
    (run / "mine.jsonl").write_text("not rows")  # a user's file stays, whatever becomes of the run
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(run)}))
    before = files_of(run)
    assert train("--overwrite", *(flag.format(run=run, adapter=adapter) for flag in flags)) == 2
    said = capsys.readouterr().err
    if what is None:
        assert "which overwrite replaces" not in said
    else:
        assert what in said and f"is of the run in output_dir (={str(run)!r}), which overwrite replaces" in said
    assert files_of(run) == before


@pytest.mark.parametrize("name", ["trace.jsonl", "non_finite.json", "result.json", "notes.jsonl"])
def test_a_users_file_of_a_name_that_the_run_did_not_write_is_not_deleted(
    name: str, tmp_path: Path, train: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ("--trace_steps", "null", "--final_eval_prompts", "null")
    assert train(*flags) == 0 and not (run / name).exists()
    (run / name).write_text("mine")
    status = train(*flags, "--overwrite")
    assert (run / name).read_text() == "mine"
    if name == "non_finite.json":  # this one a run may have to write
        assert status == 2 and "has a non_finite.json that is not the run's" in capsys.readouterr().err
    else:
        assert status == 0


@pytest.mark.parametrize("name", ["metrics.jsonl", "trace.jsonl", "checkpoint-1", "_unfinished", "_abandoned", "_kept"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_from_python_what_no_run_wrote_is_refused_by_name(name: str, kind: str, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run, elsewhere):
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")
    if kind == "file":
        (run / name).write_text("mine")
    elif kind == "folder":
        shutil.copytree(elsewhere, run / name)
    else:
        (run / name).symlink_to(elsewhere)
    before = files_of(tmp_path)
    trainer = resumable(run, steps=1)
    if kind == "folder" and name in ("_abandoned", "_kept"):  # only added to
        trainer.train()
        assert before.items() <= files_of(tmp_path).items()
        return
    with pytest.raises(ConfigError, match=rf"output_dir .* has a {name} that is"):
        trainer.train()
    assert files_of(tmp_path) == before


def test_from_python_a_users_files_beside_a_run_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("README.md", "config.json", "thesis.txt", "checkpoint-9/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for _ in range(2):
        trainer = resumable(tmp_path, steps=1)
        trainer.train()
        trainer.save_model()
    left = {name: content for name, content in files_of(tmp_path).items() if content == b"mine"}
    assert set(left) == {"README.md", "_kept/config.json", "thesis.txt", "checkpoint-9/config.json"}
    assert json.loads((tmp_path / "config.json").read_text()) and "moved to" in caplog.text
    resumed = resumable(tmp_path, steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert steps_of(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-9"]


def test_what_the_host_writes_on_demand_replaces_no_file_of_a_user(tmp_path: Path) -> None:
    names = ("trainer_state.json", "train_results.json", "all_results.json")
    trainer = resumable(tmp_path, steps=1)
    trainer.train()
    for name in names:
        (tmp_path / name).write_text("mine")
    for metrics in ({"a": 1.0}, {"b": 2.0}):
        trainer.save_state()
        trainer.save_metrics("train", metrics)
    left = files_of(tmp_path)
    assert {name: left[f"_kept/{name}"] for name in names} == dict.fromkeys(names, b"mine")
    assert len([name for name in left if name.startswith("_kept/")]) == 3
    assert json.loads(left["trainer_state.json"])["global_step"] == 1
    assert json.loads(left["train_results.json"]) == {"b": 2.0}
    assert json.loads(left["all_results.json"]) == {"a": 1.0, "b": 2.0}
    assert trainer.args.output_dir == str(tmp_path)


@pytest.mark.parametrize("name", [LOCK_FILE, MARKER_FILE, "_unfinished/thesis.txt"])
def test_a_users_file_is_not_taken_for_what_a_run_keeps_for_itself(name: str, tmp_path: Path, train: Any) -> None:
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    assert train() == 2 and files_of(tmp_path / "run") == {name: b"mine"}


def test_a_page_that_was_made_of_a_run_is_the_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = RunFolder(tmp_path)
    run.describe("method: dopd\nseed: 0\n", "table")
    write_report([tmp_path])  # somebody has looked at a run that was not over
    run.check(["report.html"], overwrite=False, resume=True, steps=3)
    make_own(tmp_path, "report.html", lambda: write_report([tmp_path]))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    write_report([tmp_path])  # and again, once it was
    make_own(tmp_path, "report.html", lambda: write_report([tmp_path]))
    assert not (tmp_path / "_kept").exists() and "report.html" not in caplog.text
    foreign = tmp_path / "other"
    RunFolder(foreign).describe("method: dopd\n", "table")
    (foreign / "report.html").write_text("<p>mine</p>")
    with pytest.raises(ConfigError, match=r"has a report.html that is not the run's"):
        RunFolder(foreign).check(["report.html"], overwrite=False, resume=True, steps=3)
