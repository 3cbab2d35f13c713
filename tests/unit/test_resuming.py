"""A run that is killed, torn or changed goes on to the bit from its newest whole checkpoint, or says why it cannot."""

import hashlib
import io
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import trainer_kit as kit
from compatibility import tried
from datasets import Dataset, Image, List, load_from_disk
from resume_kit import (
    EMA,
    in_a_process,
    kill_me,
    killed_at_random,
    resumable,
    same_files,
    same_weights,
    status_of,
    weights_of,
)

from dopd.errors import ConfigError, FileError
from dopd.inspection.schema import read_json_lines
from dopd.trainer import callbacks, saving, whole
from dopd.trainer.identity import rows_digest
from dopd.trainer.resuming import checkpoint_to_resume


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    resumable(folder, steps=6, **EMA).train()
    return folder


def cut_line(path: Path, line: bytes) -> None:
    with path.open("ab") as file:
        file.write(line[: len(line) // 2])
        file.flush()
        if b'"step":3' in line:
            kill_me()
        file.write(line[len(line) // 2 :])


# What is killed in the middle of what: (module, name of a function, what stands in its place).
KILLS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "before a checkpoint is sealed": (
        whole,
        "seal",
        lambda folder, step, run: kill_me() if step == 4 else SEAL(folder, step, run),
    ),
    "before older checkpoints are deleted": (whole, "delete", kill_me),
    "while a line is written": (callbacks, "append_line", cut_line),
}
SEAL = whole.seal


@pytest.mark.parametrize("name", KILLS)
def test_a_killed_run_goes_on_to_the_bit(
    name: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one checkpoint kept and a moving average, there is a whole one at every moment."""
    module, function, stand_in = KILLS[name]
    with monkeypatch.context() as patch:
        patch.setattr(module, function, stand_in)
        child = in_a_process(resumable(tmp_path, steps=6, **EMA).train, tmp_path.with_suffix(".log"))
        assert status_of(child) == -signal.SIGKILL
    resumed = resumable(tmp_path, steps=6, **EMA)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(tmp_path / "checkpoint-6", unbroken / "checkpoint-6")
    assert torch.equal(*(torch.cat([v.flatten() for v in average_of(f).values()]) for f in (tmp_path, unbroken)))
    assert same_files(tmp_path, unbroken)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (tmp_path / whole.UNFINISHED).exists()


def average_of(folder: Path) -> Any:
    return torch.load(folder / "checkpoint-6" / "privileged_student.pt", weights_only=True)


# --- Torn checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    resumable(folder, steps=6).train()
    return folder


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


TORN: dict[str, tuple[Callable[[Path], None], str]] = {
    "a file that is cut": (lambda folder: tear(folder / "optimizer.pt"), "is torn: optimizer.pt has"),
    "a file that is gone": (lambda folder: (folder / "rng_state.pth").unlink(), "lacks rng_state.pth"),
    "a bit of the weights": (
        lambda folder: flip(folder / "model.safetensors"),
        "model.safetensors has another checksum",
    ),
    "its state": (lambda folder: (folder / "trainer_state.json").unlink(), "lacks trainer_state.json"),
    "its manifest": (lambda folder: tear(folder / whole.MANIFEST_FILE), "its writing was cut off, or another program"),
    "all of it": (lambda folder: [p.unlink() for p in folder.iterdir()] and None, "has no dopd_checkpoint.json"),
}


@pytest.mark.parametrize("name", TORN)
def test_a_torn_checkpoint_is_left_out_with_a_sentence(
    name: str, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    damage, words = TORN[name]
    damage(run / "checkpoint-6")
    assert checkpoint_to_resume(True, run) == str(run / "checkpoint-4")
    assert words in caplog.text and "checkpoint-6 is left out" in caplog.text
    with pytest.raises(ConfigError, match="checkpoint-6"):
        checkpoint_to_resume(str(run / "checkpoint-6"), run)
    for folder in (run / "checkpoint-4", run / "checkpoint-2"):
        damage(folder)
    with pytest.raises(ConfigError, match="there is no whole checkpoint"):
        checkpoint_to_resume("last", run)
    tried("checkpoint", f"a checkpoint that lost {name}", "left out with a sentence, the one before is taken")


def test_a_checkpoint_of_another_name_is_not_taken_for_that_step(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    (run / "checkpoint-6").rename(run / "checkpoint-9")
    assert checkpoint_to_resume(True, run) == str(run / "checkpoint-4")
    assert "checkpoint-9 is left out: it was made at step 6" in caplog.text
    with pytest.raises(ConfigError, match=r"checkpoint-9.*was made at step 6, and its name says another"):
        checkpoint_to_resume(str(run / "checkpoint-9"), run)
    (run / "checkpoint-9").rename(run / "best")
    assert checkpoint_to_resume(str(run / "best"), run) == str(run / "best")


@pytest.mark.slow
def test_the_trainer_takes_the_newest_whole_one(saved: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    tear(run / "checkpoint-6" / "scheduler.pt")
    resumed = resumable(run, steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert same_weights(run / "checkpoint-6", saved / "checkpoint-6") and same_files(run, saved)


def test_lines_that_are_no_records_are_mended_and_told(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    for name in ("metrics.jsonl", "trace.jsonl"):
        lines = (run / name).read_bytes().splitlines(keepends=True)
        (run / name).write_bytes(lines[0] + lines[1][:20] + b"\n[1]\n" + b"".join(lines[1:]) + lines[-1][:9])
    resumable(run, steps=6).train(resume_from_checkpoint="checkpoint-4")
    assert same_files(run, saved)
    assert caplog.text.count("3 line(s) that were cut off") == 2


def test_later_checkpoints_of_a_run_that_was_left_are_set_aside(saved: Path, tmp_path: Path) -> None:
    """Otherwise the last one would be theirs as soon as the new run is cut off."""
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    (run / "checkpoint-9").mkdir()  # somebody else's
    resumable(run, steps=3, resume_with_changes="max_steps").train(resume_from_checkpoint="checkpoint-2")
    assert checkpoint_to_resume(True, run) == str(run / "checkpoint-3")
    assert {path.name for path in (run / whole.ABANDONED).iterdir()} == {"checkpoint-4", "checkpoint-6"}
    assert whole.damage(run / whole.ABANDONED / "checkpoint-6") is None
    resumable(run, steps=1).train()  # a new run in the folder
    assert checkpoint_to_resume("false", run) is None and [step for step, _ in whole.checkpoints_of(run)] == [1, 9]


# --- Rotation


def test_rotation_deletes_what_is_listed_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.py").write_text("mine")
    made = resumable(run, steps=6, save_total_limit=1)

    class Guest(kit.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                (run / "checkpoint-2" / "notes.txt").write_text("mine")
                (run / "checkpoint-2" / "linked").symlink_to(elsewhere)
                (run / "checkpoint-1").symlink_to(elsewhere)
                (run / "checkpoint-0").mkdir()
                (run / "checkpoint-0" / "notes.txt").write_text("mine")

    made.add_callback(Guest())
    made.train()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (0, 1, 2, 6)]
    assert sorted(path.name for path in (run / "checkpoint-2").iterdir()) == ["linked", "notes.txt"]
    assert (run / "checkpoint-0" / "notes.txt").exists() and (elsewhere / "thesis.py").read_text() == "mine"


@pytest.mark.slow
def test_the_best_checkpoint_stays_and_is_known_by_its_own_place(tmp_path: Path) -> None:
    made = resumable(
        tmp_path,
        steps=6,
        save_total_limit=2,
        metric_for_best_model="entropy",
        greater_is_better=False,
        load_best_model_at_end=True,
    )
    values = iter([3.0, 1.0, 2.0, 2.5])
    evaluate = saving.SavingTrainer._determine_best_metric

    def measured(metrics: dict[str, float], trial: Any) -> bool:
        return evaluate(made, metrics | {"eval_entropy": next(values)}, trial)

    made._determine_best_metric = measured  # type: ignore[method-assign]
    next(values)  # of the start, which is no checkpoint
    made.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


# --- What a resumed run must share


def other_rows() -> Dataset:
    return Dataset.from_list(kit.task_rows(6, kind="none"))


CHANGED: dict[str, dict[str, Any]] = {
    "method_options": {"method_options": {"top_k": 8}},
    "seed": {"seed": 7},
    "train_dataset": {"train_dataset": other_rows()},
    "per_device_train_batch_size": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "num_generations": {"num_generations": 4},
    "teacher_model_name_or_path": {"teacher_model": kit.teacher(5)},
    "learning_rate": {"learning_rate": 2e-2},
    "lr_scheduler_type": {"lr_scheduler_type": "linear"},
    "weight_decay": {"weight_decay": 0.1},
    "temperature": {"temperature": 0.7},
}


QUICK = ("seed", "train_dataset", "teacher_model_name_or_path")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CHANGED]
)
def test_what_a_resumed_run_must_share_is_refused_by_name_unless_it_is_meant(
    name: str, saved: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    options = dict(CHANGED[name])
    wanted = "checkpoint-4"
    with pytest.raises(ConfigError, match=rf"is of another run: .*{name}.*resume_with_changes=.*{name}"):
        resumable(run, steps=6, **options).train(resume_from_checkpoint=wanted)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    tried("setting", f"resuming with another {name}", "refused by name, unless resume_with_changes names it")


def test_any_row_that_changes_makes_a_dataset_another_one_and_where_it_is_stored_does_not(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": f"{number}"}] for number in range(100)]
    red, blue = (picture(colour) for colour in ("red", "blue"))

    def made(prompts: Any, image: bytes = red, path: str = "a/x.png") -> Dataset:
        stored = [[{"bytes": image, "path": path}]] * len(prompts)
        return Dataset.from_dict({"prompt": prompts, "images": stored}).cast_column("images", List(Image()))

    known = rows_digest(made(turns))
    made(turns).save_to_disk(tmp_path / "stored")
    same = [
        load_from_disk(tmp_path / "stored"),
        made(turns, path="b/x.png"),
        made(turns + turns[:1]).select(range(100)),
    ]
    assert {rows_digest(dataset) for dataset in same} == {known}
    other = [made(turns[:row] + turns[row + 1 :] + turns[row : row + 1]) for row in range(0, 99, 7)]
    others = [rows_digest(dataset) for dataset in [*other, made(turns[:99]), made(turns, image=blue)]]
    assert len({known, *others}) == len(others) + 1


def picture(colour: str) -> bytes:
    stored = io.BytesIO()
    PIL.Image.new("RGB", (2, 2), colour).save(stored, "PNG")
    return stored.getvalue()


def test_what_changes_the_rounding_of_a_resumed_run_is_refused_by_name(saved: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    changes: dict[str, Any] = {
        "activation_checkpointing": True,  # the other name of gradient_checkpointing
        "share_prompts": False,
        "loss_backend": "reference",
        "loss_chunk_tokens": 3,
        "per_device_scoring_batch_size": 1,
        "neftune_noise_alpha": 0.1,
        "bf16": True,
    }

    def trainer(**options: Any) -> Any:
        model = kit.student()
        model.set_attn_implementation("eager")
        return resumable(run, steps=6, model=model, **changes, **options)

    with pytest.raises(ConfigError) as error:
        trainer().train(resume_from_checkpoint="checkpoint-4")
    names = {*changes, "gradient_checkpointing", "attn_implementation"} - {"activation_checkpointing"}
    said, allowed = str(error.value).split("resume_with_changes=")
    assert set(allowed.split(",")) == names and "attn_implementation (of the models)" in said
    trainer(resume_with_changes=allowed).train(resume_from_checkpoint="checkpoint-4")
    assert (run / "checkpoint-6").is_dir()


@pytest.mark.parametrize(
    ("name", "rate"), [("learning_rate", 2e-2), pytest.param("lr_scheduler_type", 1e-2 / 6, marks=pytest.mark.slow)]
)
def test_a_change_that_is_meant_takes_effect(name: str, rate: float, saved: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    resumed = resumable(run, steps=6, weight_decay=0.1, resume_with_changes=f"{name}, weight_decay", **CHANGED[name])
    resumed.train(resume_from_checkpoint="checkpoint-4")
    assert kit.train_records(resumed)[-1]["learning_rate"] == pytest.approx(rate)
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.1, 0.0}


def test_another_model_or_optimizer_cannot_go_on(saved: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    for options, words in (
        ({"optim": "sgd"}, "optim is adamw_torch there and sgd here"),
        ({"peft_config": kit.lora()}, "model is 25 trained tensors"),
    ):
        with pytest.raises(ConfigError, match=words):
            resumable(run, steps=6, resume_with_changes="optim,model", **options).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="'learnin_rate' is not one of"):
        resumable(run, steps=6, resume_with_changes="learnin_rate").train(resume_from_checkpoint="checkpoint-4")


@pytest.mark.slow
def test_a_checkpoint_of_weights_alone_cannot_go_on(tmp_path: Path) -> None:
    resumable(tmp_path, steps=2, save_only_model=True).train()
    with pytest.raises(ConfigError, match="save_only_model"):
        resumable(tmp_path, steps=4).train(resume_from_checkpoint=True)


# --- A disk that is full


@pytest.mark.parametrize("size", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1_000, 60_000)), 200_000])
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(size: int, saved: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk; it meets weights, optimizer, state or metrics."""
    import resource

    run, log = Path(shutil.copytree(saved, tmp_path / "run")), tmp_path / "log"
    made = resumable(run, steps=6, save_total_limit=1)

    def train() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            made.train(resume_from_checkpoint="checkpoint-4")
        except FileError as error:
            raise SystemExit(f"{error}") from None

    child = in_a_process(train, log)
    assert status_of(child) == 1
    said = log.read_text()
    assert "Traceback" not in said and str(run) in said and "free space there" in said, said
    assert checkpoint_to_resume(True, run) == str(run / "checkpoint-4")
    assert not (run / whole.UNFINISHED).exists()


def test_random_kills_are_counted_once_each(unbroken: Path, tmp_path: Path) -> None:
    """The helper of the slow tests: a killed copy is seen as killed, one that ended as ended."""
    made = resumable(tmp_path, steps=6, **EMA)
    assert killed_at_random(made.train, tmp_path / "log", random.Random(0), 0.01) == -signal.SIGKILL
    steps = Counter(record["step"] for record in read_json_lines(unbroken / "metrics.jsonl") if "loss" in record)
    assert steps == dict.fromkeys(range(1, 7), 1)


def test_a_complete_run_that_was_moved_ends_with_its_best_weights_again(tmp_path: Path) -> None:
    """The first checkpoint is the best: an untrained student is right nowhere, before and after."""
    options = {"metric_for_best_model": "accuracy_greedy", "load_best_model_at_end": True}
    made = resumable(tmp_path / "before", steps=4, **options)
    made.train()
    assert made.state.best_model_checkpoint == str(tmp_path / "before" / "checkpoint-2")
    (tmp_path / "before").rename(tmp_path / "now")
    again = resumable(tmp_path / "now", steps=4, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.best_model_checkpoint == str(tmp_path / "now" / "checkpoint-2")
    best = weights_of(tmp_path / "now" / "checkpoint-2")
    for trained in (made, again):
        state = trained.model.state_dict()
        assert all(torch.equal(state[name.partition(" ")[2]], value) for name, value in best.items())


def test_a_whole_model_goes_on_from_the_weights_that_it_began_with_wherever_they_are(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(saved, tmp_path / "run"))
    began = json.loads((run / "checkpoint-4" / whole.MANIFEST_FILE).read_text())["run"]

    def go_on(model: Any, **options: Any) -> Any:
        resumable(run, steps=6, model=model, **options).train(resume_from_checkpoint="checkpoint-4")
        return json.loads((run / "checkpoint-6" / whole.MANIFEST_FILE).read_text())["run"]

    with pytest.raises(ConfigError, match=r"model_name_or_path \(its weights\).*resume_with_changes=model_name_or"):
        go_on(kit.student(seed=7))
    kit.student().save_pretrained(tmp_path / "moved")
    assert go_on(type(kit.student()).from_pretrained(tmp_path / "moved")) == began
    # The run's own checkpoint in the student's place: what follows still began where the run began.
    assert go_on(type(kit.student()).from_pretrained(run / "checkpoint-2")) == began
    other = go_on(kit.student(seed=7), resume_with_changes="model_name_or_path")
    assert other != began and same_weights(run / "checkpoint-6", saved / "checkpoint-6")
    # A checkpoint of an earlier version, which did not note it.
    without = {"format": 1, "run": {**began, "model_name_or_path (its weights)": hashlib.sha256().hexdigest()[:12]}}
    manifest = run / "checkpoint-4" / whole.MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | without))
    go_on(kit.student(seed=7))
    assert "did not note what weights a run began with" in caplog.text


def test_a_checkpoint_of_the_run_is_no_beginning_where_a_privileged_student_is_made_of_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"privileged_student": "frozen"}
    resumable(tmp_path, steps=2, **options).train()
    model = type(kit.student()).from_pretrained(tmp_path / "checkpoint-2")
    with pytest.raises(ConfigError, match=r"model_name_or_path \(its weights\)"):
        resumable(tmp_path, steps=4, model=model, resume_with_changes="max_steps", **options).train("true")
