"""Settings, model references, verifiers and jobs: what the command line is made of."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from dopd.errors import ConfigError, DataError, ModelError
from dopd.runs.build import load_model, resolve_model
from dopd.runs.jobs import Job, JobError, run_jobs
from dopd.runs.rows import load_rows
from dopd.runs.settings import load_settings, parse_flags
from dopd.tiny import TinySpec, build_model, build_tokenizer
from dopd.verifiers.named import load_verifier

MINIMAL = {"model_name_or_path": "student", "task": "dag", "output_dir": "runs/x"}


def write(folder: Path, values: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_flags_override_the_file_and_keep_their_types(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL | {"learning_rate": 1e-3, "max_steps": 5})
    settings = load_settings(path, ["--learning_rate", "5e-6", "--max-steps=7", "--overwrite", "--task", "graph"])
    assert settings.trainer["learning_rate"] == 5e-6
    assert settings.trainer["max_steps"] == 7
    assert settings.overwrite is True
    assert settings.task == "graph"


def test_resolved_settings_read_back_as_the_same_settings(tmp_path: Path) -> None:
    settings = load_settings(
        write(tmp_path, MINIMAL | {"method_options": {"top_k": 8}, "task_options": {"num_needed": 3}})
    )
    again = tmp_path / "again.yaml"
    again.write_text(settings.to_yaml())
    assert load_settings(again) == settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (MINIMAL | {"metod": "dopd"}, ["unknown key 'metod'", "'method'"]),
        (MINIMAL | {"learning_rate": "fast"}, ["learning_rate", "'fast'", "float"]),
        (MINIMAL | {"max_steps": True}, ["max_steps", "int"]),
        (MINIMAL | {"dataset_name": "x"}, ["exactly one of task", "dataset_name"]),
        ({key: MINIMAL[key] for key in ("task", "output_dir")}, ["model_name_or_path is missing"]),
        ({key: MINIMAL[key] for key in ("task", "model_name_or_path")}, ["output_dir is missing"]),
        (MINIMAL | {"privileged_kind": "oracle"}, ["privileged_kind", "'oracle'", "final_answer"]),
        (MINIMAL | {"train_prompts": 0}, ["train_prompts", "at least 1"]),
        ([1, 2], ["must be a mapping"]),
    ],
)
def test_a_bad_config_is_refused_with_field_value_and_fix(tmp_path: Path, values: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(write(tmp_path, values))
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_unreadable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_settings(broken)


def test_flags_without_dashes_or_with_broken_yaml_are_refused() -> None:
    assert parse_flags(["--a", "[1, 2]", "--b=null", "--c"]) == {"a": [1, 2], "b": None, "c": True}
    with pytest.raises(ConfigError, match="expected --key value"):
        parse_flags(["value"])
    with pytest.raises(ConfigError, match="not a YAML value"):
        parse_flags(["--a", "{x"])


@pytest.mark.parametrize("name", ["tiny:dag", "tiny:dag/student?sed=1", "tiny:dag/student?seed=x"])
def test_a_misspelt_tiny_reference_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must look like tiny:TASK/ROLE"):
        resolve_model(name)


def test_an_unreadable_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(str(tmp_path / "nothing"))
    build_model(TinySpec(num_layers=1), build_tokenizer()).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(str(tmp_path / "cut"))


def test_rows_of_a_task_bring_their_verifier(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, MINIMAL | {"train_prompts": 8, "eval_prompts": 4}))
    train, held_out, verifier = load_rows(settings)
    assert (len(train), len(held_out)) == (8, 4)
    assert verifier is not None
    assert verifier(train[0]["solution"], train[0]) == 1.0
    assert verifier("", train[0]) == 0.0


def test_rows_of_a_file_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": str(i)}) + "\n" for i in range(3)))
    values = {"model_name_or_path": "s", "output_dir": "r", "dataset_name": str(path), "verifier": "exact"}
    train, held_out, verifier = load_rows(load_settings(write(tmp_path, values)))
    assert train["answer"][2] == "2"
    assert held_out is None
    assert verifier is not None
    assert (verifier(" 2\n", train[2]), verifier("3", train[2])) == (1.0, 0.0)
    with pytest.raises(DataError, match="is not a file"):
        load_rows(load_settings(write(tmp_path, values | {"dataset_name": str(tmp_path / "none.jsonl")})))


def test_verifiers_by_name() -> None:
    import os.path

    assert load_verifier("os.path:join") is os.path.join
    with pytest.raises(ConfigError, match=r"package\.module:name"):
        load_verifier("os.path:nothing")
    with pytest.raises(ConfigError, match="math, exact"):
        load_verifier("fuzzy")


def test_a_failing_job_stops_the_others_and_shows_the_end_of_its_log(tmp_path: Path) -> None:
    jobs = [Job("bad", ["train", "no-such-config.yaml"], tmp_path / "bad.log")]
    with pytest.raises(JobError, match=r"bad failed with exit status 2(.|\n)*no-such-config"):
        run_jobs(jobs, at_once=2, console=Console(file=sys.stderr, force_terminal=False))
