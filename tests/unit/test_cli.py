"""The command as a user meets it: exit status 2 and one line for bad input, nothing half-written."""

import errno
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dopd.cli.main import main
from dopd.cli.output import with_any_output
from dopd.interrupts import Stopped
from dopd.methods import METHODS
from dopd.tasks import get_task
from dopd.tiny import TinySpec, build_model, build_tokenizer

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = build_tokenizer()
    for name, size, seed in (("student", 32, 0), ("teacher", 64, 1)):
        build_model(TinySpec(num_layers=2, hidden_size=size), tokenizer, seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")


@pytest.fixture
def config(tmp_path: Path, models: tuple[str, str]) -> dict[str, Any]:
    return {
        "model_name_or_path": models[0],
        "teacher_model_name_or_path": models[1],
        "task": "dag",
        "privileged_template": "{prompt} {privileged_context}",
        "output_dir": str(tmp_path / "run"),
        "method_options": {"top_k": 8},
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "max_completion_length": 12,
        "train_prompts": 16,
        "eval_prompts": 8,
        "student_eval_steps": 1,
        "student_eval_prompts": 8,
        "final_eval_prompts": 8,
        "trace_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }


def run(tmp_path: Path, values: dict[str, Any], *flags: str) -> int:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return main(["train", str(path), *flags])


def test_train_leaves_a_whole_run_folder(tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path, config) == 0
    folder = Path(config["output_dir"])
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        "table.txt",
        "metrics.jsonl",
        "trace.jsonl",
        "result.json",
        "curves.png",
        "report.html",
        "README.md",
    } <= names
    assert {"model.safetensors", "tokenizer.json"} <= names
    result = json.loads((folder / "result.json").read_text())
    assert result["method"] == "dopd"
    assert result["metrics"]["num_prompts"] == 8
    assert "run folder" in capsys.readouterr().out
    assert run(tmp_path, config) == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(tmp_path, config, "--overwrite", "--method", "vanilla") == 0
    assert (folder / "table.txt").read_text().startswith("vanilla")
    assert main(["eval", str(folder), "--task", "dag", "--prompts", "4", "--max-new-tokens", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["metrics"]["num_prompts"] == 4


def test_dry_run_prints_config_and_table_and_writes_nothing(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    assert run(tmp_path, config, "--dry-run", "--learning_rate", "2e-4") == 0
    out = capsys.readouterr().out
    assert "learning_rate: 0.0002" in out
    assert "HT" in out and "js" in out
    assert not Path(config["output_dir"]).exists()


BAD_INPUT = {
    "unknown key": ({"metod": "dopd"}, "unknown key"),
    "unknown method": ({"method": "dodp"}, "Did you mean 'dopd'"),
    "unknown task": ({"task": "dga"}, "Did you mean 'dag'"),
    "unreadable student": ({"model_name_or_path": "no/such-model"}, "cannot be read"),
    "unreadable teacher": ({"teacher_model_name_or_path": "no/such-model"}, "cannot be read"),
    "beta of the host": ({"beta": 0.5}, "beta"),
    "not whole groups": ({"per_device_train_batch_size": 6}, "num_generations"),
    "one step does not fit": ({"train_prompts": 1}, "one optimizer step takes"),
    "no room for a prompt": ({"max_completion_length": 600}, "no room for a prompt"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_and_status_2_and_nothing_is_written(
    name: str, tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    change, words = BAD_INPUT[name]
    assert run(tmp_path, config | change) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not Path(config["output_dir"]).exists()


def rows_file(tmp_path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"task": None, "dataset_name": str(path), "student_eval_steps": None, "final_eval_prompts": None}


def test_a_missing_column_and_an_empty_dataset_are_refused(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    row = get_task("dag").rows("train", 1, "none")[0]
    assert run(tmp_path, config | rows_file(tmp_path, [{"prompt": row["prompt"]}] * 8)) == 2
    assert "column 'privileged_context' is missing" in capsys.readouterr().err
    assert run(tmp_path, config | rows_file(tmp_path, [{"text": "x"}] * 8)) == 2
    assert "column 'prompt' is missing" in capsys.readouterr().err
    assert run(tmp_path, config | rows_file(tmp_path, [])) == 2
    assert "error:" in capsys.readouterr().err
    assert not Path(config["output_dir"]).exists()


def test_mismatched_vocabularies_are_refused(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    tokenizer = build_tokenizer(["a", "b", ":"])
    build_model(TinySpec(num_layers=1), tokenizer).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert run(tmp_path, config | {"teacher_model_name_or_path": str(tmp_path / "other")}) == 2
    assert "vocabulary" in capsys.readouterr().err


def test_a_nan_loss_stops_the_run_with_a_clear_error(
    tmp_path: Path, config: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    model = build_model(TinySpec(num_layers=1), build_tokenizer(), 3)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    build_tokenizer().save_pretrained(tmp_path / "nan")
    assert run(tmp_path, config | {"teacher_model_name_or_path": str(tmp_path / "nan")}) == 2
    error = capsys.readouterr().err
    assert "error:" in error
    assert "Traceback" not in error
    assert not (Path(config["output_dir"]) / "model.safetensors").exists()


def test_listings_and_doctor(capsys: pytest.CaptureFixture, tmp_path: Path, config: dict[str, Any]) -> None:
    assert main(["tasks"]) == 0
    assert main(["tasks", "graph"]) == 0
    assert main(["methods"]) == 0
    assert main(["methods", "dopd"]) == 0
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("dag", "gsm_symbolic", "hints_without_execution", "vanilla", "privileged_student", "all well"):
        assert word in out
    for whole_name in METHODS:  # in a terminal of 80 columns, too
        assert f"  {whole_name}: " in out
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config | {"method": "nope"}))
    assert main(["doctor", str(path)]) == 2
    path.write_text(yaml.safe_dump(config))
    assert main(["doctor", str(path)]) == 0
    assert not Path(config["output_dir"]).exists()


def test_unknown_flags_and_commands_are_refused(capsys: pytest.CaptureFixture) -> None:
    for arguments in (["tasks", "--nope"], ["fly"], []):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    assert "examples:" not in capsys.readouterr().out


def test_experiments_are_listed_and_a_wrong_name_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["experiment"]) == 0
    listed = capsys.readouterr().out
    assert "figure3" in listed and "Table 8" in listed
    assert main(["experiment", "figure33"]) == 2
    assert "Did you mean 'figure3'" in capsys.readouterr().err
    assert main(["experiment", "table8", "--scale", "full", "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "table8" / "full" / "launch.sh").is_file()
    assert main(["experiment", "table8", "--report", "--restart"]) == 2
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert main(["experiment", "table8", "--scale", "full", "--output-dir", str(tmp_path / "file" / "in")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "output_dir" in line.replace("-", "_")


def test_flags_alone_are_a_run_where_they_name_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model_name_or_path", "tiny:dag/student", "--task", "dag", "--output_dir", str(tmp_path / "run")]
    flags += ["--teacher_model_name_or_path=tiny:dag/teacher", "--max_completion_length", "16"]
    assert main(["train", "--dry-run", *flags]) == 0
    assert "tiny:dag/teacher" in capsys.readouterr().out
    for command in ("train", "doctor", "plan"):
        assert main([command, "--max_steps", "3"]) == 2
        printed = capsys.readouterr()
        assert "at least --model_name_or_path and --output_dir" in " ".join((printed.out + printed.err).split())


def test_a_terminal_that_is_gone_ends_a_stopped_command_with_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> int:
        try:
            raise Stopped(signal.SIGHUP, "saved")
        finally:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("dopd.cli.output._to_nowhere", lambda: None)
    assert with_any_output(gone) == 129

    class Gone(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(sys, "stdout", Gone())
    assert with_any_output(lambda: 2) == 2
