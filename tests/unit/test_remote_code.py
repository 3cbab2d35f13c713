"""Code that a checkpoint brings is run where it is asked for, and nobody is asked in the middle of a command."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from compatibility import tried
from datasets import Dataset
from trainer_kit import TOKENIZER, student, task_rows, trainer

from dopd.checkpoints import config_of, load
from dopd.cli.main import main
from dopd.errors import ModelError
from dopd.runs.build import load_model


@pytest.fixture
def bringing_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose configuration, model and tokenizer are its own; each leaves a file when it runs."""

    def answered(prompt: str = "") -> str:
        raise AssertionError(f"somebody is asked: {prompt}")

    monkeypatch.setattr(builtins, "input", answered)
    folder = tmp_path / "model"
    student().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    ran = f"open({str(tmp_path / 'ran')!r}, 'a').close()\n"
    (folder / "own.py").write_text(
        f"{ran}from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class OwnModel(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


WAYS = ["student", "teacher", "eval", "inspect"]


@pytest.mark.parametrize("way", WAYS)
def test_a_command_refuses_and_says_how_to_ask(
    way: str, bringing_code: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = str(bringing_code)
    train = ["train", "tiny-dag", "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    commands = {
        "student": [*train, "--model_name_or_path", name],
        "teacher": [*train, "--teacher_model_name_or_path", name],
        "eval": ["eval", name, "--task", "dag"],
        "inspect": ["inspect", "--student", "tiny:dag/student", "--teacher", name, "--prompt", "B"],
    }
    assert main(commands[way]) == 2
    error = capfd.readouterr().err
    assert "contains custom code" in error and "trust_remote_code" in error and "Traceback" not in error
    assert not (tmp_path / "ran").exists()
    tried("checkpoint", f"{way} that brings its own code", "refused unless trust_remote_code asks for it")


@pytest.mark.parametrize("role", ["model", "teacher_model"])
def test_the_trainer_refuses(role: str, bringing_code: Path, tmp_path: Path) -> None:
    with pytest.raises((ModelError, ValueError), match="contains custom code"):
        trainer(tmp_path / "run", **{role: str(bringing_code)})
    assert not (tmp_path / "ran").exists()


def test_code_that_is_asked_for_runs(bringing_code: Path, tmp_path: Path) -> None:
    for read in (load, load_model):
        made: Any = read(str(bringing_code), trust_remote_code=True)
        assert type(made).__name__ == "OwnModel"
    assert config_of(str(bringing_code), trust_remote_code=True).model_type == "own"
    assert (tmp_path / "ran").exists()
    made = trainer(
        tmp_path / "run",
        model=str(bringing_code),
        trust_remote_code=True,
        train_dataset=Dataset.from_list(task_rows(8)),
    )
    assert type(made.unwrapped_student).__name__ == "OwnModel"
