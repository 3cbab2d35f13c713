"""A run that a program starts leaves the folder of `dopd train`: configuration, table, metrics, traces, report."""

import importlib.metadata
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import trainer_kit as kit
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import SchedulerType

from dopd.cli.main import main
from dopd.errors import ConfigError
from dopd.report.records import GIVEN_IN_PYTHON, RunRecord, read_run
from dopd.runs.settings import load_settings
from dopd.trainer.card import card_text
from dopd.trainer.folder import RunFolder

pytestmark = pytest.mark.filterwarnings("default")


def trained(folder: Path, **options: Any) -> Any:
    given: dict[str, Any] = {
        "verifier": kit.TASK.verify,
        "eval_dataset": Dataset.from_list(kit.task_rows(4, split="test")),
        "student_eval_steps": 1,
        "trace_steps": 1,
        "max_steps": 2,
    }
    made = kit.trainer(folder, **(given | options))
    made.train()
    return made


def of_command(folder: Path, models: Path) -> set[str]:
    """Names of what `dopd train` writes, but for the model."""
    values = {
        "model_name_or_path": str(models / "student"),
        "teacher_model_name_or_path": str(models / "teacher"),
        "task": "dag",
        "privileged_template": "{prompt} {privileged_context}",
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "max_completion_length": 6,
        "train_prompts": 8,
        "eval_prompts": 2,
        "trace_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    path = models / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["train", str(path)]) == 0
    return {path.name for path in folder.iterdir()}


def test_a_program_leaves_the_run_folder_of_the_command(tmp_path: Path) -> None:
    for name, model in (("student", kit.student()), ("teacher", kit.teacher())):
        model.save_pretrained(tmp_path / name)
        kit.TOKENIZER.save_pretrained(tmp_path / name)
    made = trained(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    made.save_model()
    assert {path.name for path in (tmp_path / "run").iterdir()} == of_command(tmp_path / "other", tmp_path)
    assert names == {
        "README.md", "config.yaml", "curves.png", "dopd_run.json", "metrics.jsonl", "report.html", "table.txt",
        "trace.jsonl",
    }  # fmt: skip
    assert RunFolder(tmp_path / "run").is_complete


def test_the_configuration_says_what_the_objects_are_and_the_settings_that_were_chosen(tmp_path: Path) -> None:
    rows = Dataset.from_list(kit.task_rows(8))
    trained(tmp_path, train_dataset=rows, method="vanilla")
    config = read_run(tmp_path).config
    size = sum(parameter.numel() for parameter in kit.student().parameters()) / 1e6
    assert config["model_name_or_path"] == f"{GIVEN_IN_PYTHON}Qwen3ForCausalLM, {size:.1f} M parameters"
    assert config["dataset_name"] == (
        f"{GIVEN_IN_PYTHON}Dataset, 8 rows, columns {', '.join(rows.column_names)}, fingerprint {rows._fingerprint}"
    )
    assert "verify" in config["verifier"] and config["method"] == "vanilla" and config["max_steps"] == 2
    assert config["learning_rate"] == 0.1 and "weight_decay" not in config
    assert (tmp_path / "table.txt").read_text().startswith("vanilla")


def test_settings_that_are_changed_after_they_were_made_are_in_the_configuration(tmp_path: Path) -> None:
    args = kit.config(tmp_path)
    args.seed = 7
    assert args.chosen()["seed"] == 7 and "weight_decay" not in args.chosen()


def test_settings_of_any_kind_are_written_as_yaml_has_them(tmp_path: Path) -> None:
    kinds = {"sequence_bias": {(3, 4): 1.0}, "suppress_tokens": (3,)}
    args = kit.config(tmp_path, generation_kwargs=kinds, lr_scheduler_type=SchedulerType.LINEAR)
    chosen = args.chosen()
    assert yaml.safe_load(yaml.safe_dump(chosen)) == chosen
    assert chosen["generation_kwargs"] == {"sequence_bias": {"(3, 4)": 1.0}, "suppress_tokens": [3]}
    assert chosen["lr_scheduler_type"] == "linear"


def test_names_stay_names_and_an_adapter_is_written_in_the_keys_of_the_command(tmp_path: Path) -> None:
    kit.teacher().save_pretrained(tmp_path / "teacher")
    kit.TOKENIZER.save_pretrained(tmp_path / "teacher")
    adapter = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"])
    trained(tmp_path / "run", teacher_model=str(tmp_path / "teacher"), peft_config=adapter)
    config = read_run(tmp_path / "run").config
    assert config["teacher_model_name_or_path"] == str(tmp_path / "teacher")
    names = ("use_peft", "lora_r", "lora_alpha", "lora_target_modules")
    assert [config[name] for name in names] == [True, 3, 5, ["q_proj"]]


def test_the_folder_is_reported_and_evaluated_like_any_other(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    trained(tmp_path, max_completion_length=9).save_model()
    assert main(["report", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path), "--task", "dag", "--prompts", "2", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "max_new_tokens 9" in err and json.loads(out.splitlines()[-1])["metrics"]["length"] <= 9


def test_a_configuration_of_objects_is_refused_by_the_command_with_the_reason(tmp_path: Path) -> None:
    trained(tmp_path)
    with pytest.raises(ConfigError, match=r"model_name_or_path .* was an object of a program"):
        load_settings(tmp_path / "config.yaml")


def test_a_run_goes_on_and_its_report_is_renewed(tmp_path: Path) -> None:
    trained(tmp_path, save_strategy="steps", save_steps=1)
    before = (tmp_path / "report.html").read_bytes()
    made = kit.trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, resume_with_changes="max_steps")
    made.train(resume_from_checkpoint=True)
    assert RunFolder(tmp_path).is_complete and (tmp_path / "report.html").read_bytes() != before


def test_what_is_evaluated_within_the_record_is_in_the_report(tmp_path: Path) -> None:
    made = kit.trainer(
        tmp_path, verifier=kit.TASK.verify, eval_dataset=Dataset.from_list(kit.task_rows(4, split="test"))
    )
    with made.recorded():
        made.train()
        assert not RunFolder(tmp_path).is_complete and not (tmp_path / "report.html").exists()
        result = made.final_evaluation(3)
    assert RunFolder(tmp_path).is_complete
    assert read_run(tmp_path).result["metrics"]["accuracy_greedy"] == result.metrics()["accuracy_greedy"]
    assert result.metrics()["num_prompts"] == 3


def test_a_run_that_fails_is_not_complete(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path)
    with pytest.raises(KeyError), made.recorded():
        made.train()
        raise KeyError("x")
    assert not RunFolder(tmp_path).is_complete and not (tmp_path / "report.html").exists()


def table_of(card: str, title: str) -> list[list[str]]:
    """Cells of the first table below a heading."""
    lines = card.split(f"{title}\n")[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


def test_the_card_says_what_was_trained_from_what_and_what_it_came_to(tmp_path: Path) -> None:
    made = trained(tmp_path / "my-run", method="vanilla")
    card = (tmp_path / "my-run" / "README.md").read_text()
    facts = dict(table_of(card, "# my-run"))
    assert "Qwen3ForCausalLM" in facts["base model"] and "Qwen3ForCausalLM" in facts["teacher"]
    assert facts["method"].startswith("`vanilla`: ") and "8 rows" in facts["data"] and "verify" in facts["verifier"]
    (greedy, *_) = table_of(card, "## Results")
    first, *_, last = kit.records(made, "eval_accuracy_greedy")
    assert greedy[1].startswith(f"{100 * first:.1f} [") and greedy[2].startswith(f"{100 * last:.1f} [")
    assert greedy[3] == "4" and made.table.describe() in card
    settings = dict(table_of(card, "## Training"))
    assert settings["max_steps"] == "2" and "num_train_epochs" not in settings  # one of the two ends a run
    versions = dict(table_of(card, "## Versions"))
    assert versions["trl"] == importlib.metadata.version("trl") and "None" not in card
    assert ModelCard.load(tmp_path / "my-run" / "README.md").data.tags is not None


def test_the_card_links_what_is_on_the_hub_and_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    run = {"model_name_or_path": "Qwen/Qwen3-1.7B", "teacher_model_name_or_path": str(tmp_path)}
    made = kit.trainer(tmp_path)
    host_card = ModelCard("---\ntags: [dopd]\n---\n")
    record = RunRecord(tmp_path, {**run, "dataset_name": str(tmp_path)}, [], [], {})
    text = card_text(host_card, "x", record, made.table, vars(made.args), [], made._paper)
    assert "[Qwen/Qwen3-1.7B](https://huggingface.co/Qwen/Qwen3-1.7B)" in text and "not evaluated" in text
    assert str(tmp_path.parent) not in text and tmp_path.name in text


def test_a_run_of_a_program_ends_with_its_report_and_says_what_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "run", learning_rate=0.0, student_eval_prompts=9, max_steps=1, disable_tqdm=False)
    ended = capsys.readouterr().out.splitlines()
    assert [line for line in ended if line.startswith("report: ")] == [f"report: {tmp_path / 'run' / 'report.html'}"]
    assert ended[-1].startswith("next: dopd ") and any(line.startswith("greedy accuracy without p: ") for line in ended)
    assert "student_eval_prompts (=9) is more than there are held-out rows: all 4 are answered" in caplog.text
    assert "learning_rate (=0) changes no weight" in caplog.text
    trained(tmp_path / "quiet", disable_tqdm=True, max_steps=1)
    assert "report: " not in capsys.readouterr().out
