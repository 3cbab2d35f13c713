"""Runs of `dopd train` on models of one layer, as a user starts them, and what they leave."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dopd.cli.main import main

Train = Callable[..., int]


@pytest.fixture(scope="session")
def models_of_one_layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a student and a teacher."""
    from dopd.tiny import TinySpec, build_model, build_tokenizer

    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("student", "teacher")):
        build_model(TinySpec(num_layers=1, hidden_size=32), build_tokenizer(), seed).save_pretrained(folder / name)
        build_tokenizer().save_pretrained(folder / name)
    return str(folder / "student"), str(folder / "teacher")


@pytest.fixture
def train(tmp_path: Path, models_of_one_layer: tuple[str, str]) -> Train:
    """`dopd train` into `tmp_path/run` with flags; returns the status."""
    student, teacher = models_of_one_layer
    values = {
        "model_name_or_path": student,
        "teacher_model_name_or_path": teacher,
        "task": "dag",
        "privileged_template": "{prompt} {privileged_context}",
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "max_completion_length": 6,
        "train_prompts": 8,
        "eval_prompts": 2,
        "save_steps": 1,
        "save_strategy": "steps",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    return lambda *flags: main(["train", str(path), *flags])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))
