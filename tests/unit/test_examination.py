"""`dopd doctor CONFIG` and `dopd train CONFIG --dry-run` look at the same things, and say them before a run does."""

import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
import yaml
from peft import LoraConfig, get_peft_model

from dopd.cli.main import main
from dopd.runs import examination, memory, sizes
from dopd.runs.examination import Finding, examine
from dopd.runs.settings import load_settings
from dopd.runs.train import make_config, make_trainer

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    for name, model in (("student", kit.student()), ("teacher", kit.teacher())):
        model.save_pretrained(tmp_path / name)
        kit.TOKENIZER.save_pretrained(tmp_path / name)
    return {
        "model_name_or_path": str(tmp_path / "student"),
        "teacher_model_name_or_path": str(tmp_path / "teacher"),
        "task": "dag",
        "privileged_template": "{prompt} {privileged_context}",
        "output_dir": str(tmp_path / "run"),
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "train_prompts": 20,
        "eval_prompts": 2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
    }


def findings(values: dict[str, Any], **options: Any) -> list[Finding]:
    return list(examine(load_settings(None, **values), **options))


def test_both_commands_find_the_same_and_take_every_flag(
    tmp_path: Path, values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    flags = ["--max_steps", "3", "--learning-rate=2e-4", "--token-ids"]
    found = []
    for command in (["doctor", *flags, str(path)], ["train", str(path), "--dry-run", *flags]):
        assert main(command) == 0
        out = capsys.readouterr().out.removesuffix("all well\n")
        found.append(out[out.index("ok    settings and table") :])
    assert "3 steps of 8 prompts x 2 answers" in found[0] and not (tmp_path / "run").exists()
    sizes = [line.split("without a GPU, has")[0] for line in found]  # what is free changes from moment to moment
    assert sizes[0] == sizes[1] and found[0].partition("models, voc")[2] == found[1].partition("models, voc")[2]


def test_doctor_needs_a_config_for_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--max_steps", "3"]) == 2
    assert "a config is missing" in capsys.readouterr().out


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 2.0}, {"num_train_epochs": 0.5}], ids=str)
def test_the_plan_is_what_the_run_does(length: dict[str, Any], values: dict[str, Any]) -> None:
    settings = load_settings(None, **values, **length)
    made = make_trainer(settings, make_config(settings))
    said = examination.plan(made)
    made.train()
    steps = made.state.global_step
    assert said.startswith(f"{steps} steps of 8 prompts x 2 answers: {8 * steps} prompts of 20 rows")
    assert said.endswith(f"{16 * steps} answers of at most 6 tokens, {16 * steps * 6} tokens at most")


def test_row_0_is_shown_as_each_view_reads_it_with_its_token_ids(values: dict[str, Any]) -> None:
    row = kit.TASK.rows("train", 1, "hints_without_execution")[0]
    prompt = row["prompt"][0]["content"]
    shown = [one.text for one in findings(values, token_ids=True) if one.text.startswith("row 0")]
    assert len(shown) == 2
    for text, view, told in zip(shown, ("plain", "privileged"), (prompt, f"{prompt} {row['privileged_context']}"),
                                strict=True):  # fmt: skip
        ids = kit.TOKENIZER.apply_chat_template(
            [{"role": "user", "content": told}], add_generation_prompt=True, return_dict=False
        )
        head, body, numbers = text.split("\n")
        assert f"{view} view" in head and head.endswith(f"{len(ids)} tokens:")
        assert body == kit.TOKENIZER.decode(ids) and numbers == str(list(ids))
    assert "privileged_student, privileged_teacher" in shown[1]


def test_without_token_ids_there_are_none(values: dict[str, Any]) -> None:
    assert all("[" not in one.text for one in findings(values) if one.text.startswith("row 0"))


def test_on_a_cpu_everything_is_looked_at_before_bf16_is_spoken_of(
    values: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    values |= {"use_cpu": False, "bf16": True}
    *before, last = findings(values)
    assert last.level == "here" and "bf16" in last.text
    assert any("fit together" in one.text for one in before) and any("row 0" in one.text for one in before)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["doctor", str(path)]) == 2 and main(["train", str(path), "--dry-run"]) == 0


def test_what_is_not_installed_is_said_once_and_of_this_machine(values: dict[str, Any]) -> None:
    absent = next(name for name in ("wandb", "comet_ml", "clearml", "mlflow") if find_spec(name) is None)
    said = [one for one in findings(values | {"report_to": absent}) if "not installed" in one.text]
    assert [one.level for one in said] == ["here"] and absent in said[0].text


def test_what_the_hub_has_and_this_machine_has_not_is_no_fault_of_the_config(values: dict[str, Any]) -> None:
    found = findings(values | {"model_name_or_path": "no-such-organisation/no-such-model"})
    assert [one.level for one in found] == ["ok", "here"] and "no-such-model" in found[1].text


def test_what_cannot_work_anywhere_fails(values: dict[str, Any], tmp_path: Path) -> None:
    found = findings(values | {"teacher_model_name_or_path": str(tmp_path / "nothing")})
    assert found[-1].level == "fail" and "nothing" in found[-1].text


def test_models_that_do_not_fit_are_not_loaded(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: ("this machine has", 1000))
    monkeypatch.setattr(examination, "make_trainer", lambda *_: pytest.fail("loaded"))
    found = findings(values)
    assert found[-1].level == "here" and "Lower batch sizes" in found[-1].text


def test_memory_of_weights_gradients_optimizer_and_cache_is_what_they_take(tmp_path: Path) -> None:
    student, teacher = kit.student(), kit.teacher()
    args = kit.config(tmp_path, optim="adamw_torch", max_prompt_length=1, max_completion_length=11)
    room = memory.Room(gpu=False)
    sizes = [memory.ModelSize.of(model) for model in (student, teacher)]
    found = memory.phases(*sizes, args, args.routing_table(), room=room)
    assert memory.totals(found)["weights"] == bytes_of([*student.parameters(), *teacher.parameters()])

    optimizer = torch.optim.AdamW(student.parameters())
    out = student(torch.zeros(8, 12, dtype=torch.long), use_cache=True)
    keys = [tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)]
    assert found["rollouts"]["keys and values"] == bytes_of(keys)
    out.logits.sum().backward()
    optimizer.step()
    assert found["update"]["gradients"] == bytes_of(one.grad for one in student.parameters())
    states = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert all(found[phase]["optimizer"] == bytes_of(states) for phase in ("rollouts", "scoring", "training", "update"))


def bytes_of(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors if one is not None)


def test_memory_is_that_of_the_loaded_model_where_nothing_was_loaded(values: dict[str, Any]) -> None:
    made = sizes.student_size(load_settings(None, **values), "float32", {})
    assert made == memory.ModelSize.of(kit.student())


@pytest.mark.parametrize("packed", [False, True])
def test_memory_of_an_adapter_is_that_of_its_own_weights(values: dict[str, Any], packed: bool) -> None:
    values |= {"use_peft": True, "lora_r": 3, "lora_target_modules": ["q_proj", "down_proj"], "load_in_4bit": packed}
    made = sizes.student_size(load_settings(None, **values), "bfloat16", {})
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"])
    student = get_peft_model(kit.student().to(torch.bfloat16), config)
    own = [weight for name, weight in student.named_parameters() if "lora_" in name]
    base = sum(weight.numel() for name, weight in student.named_parameters() if "lora_" not in name)
    trained = sum(weight.numel() * weight.element_size() for weight in own)
    assert own[0].dtype == torch.float32 and made.trained == trained
    assert made.trainable == sum(weight.numel() for weight in own)
    assert made.weights == base * 2 // (4 if packed else 1) + trained


def test_doctor_counts_what_an_adapter_trains(values: dict[str, Any]) -> None:
    def training(**more: Any) -> float:
        settings = load_settings(None, **values, **more)
        (said,) = examination._memory(settings, make_config(settings))
        number, unit = re.search(r"training ([\d.]+) (\w+),", said.text).groups()  # type: ignore[union-attr]
        return float(number) * {"KiB": 1, "MiB": 1024}[unit]

    lora = {"use_peft": True, "lora_target_modules": ["q_proj", "down_proj"]}
    assert training(**lora, lora_r=1) < training() < training(**lora, lora_r=512)


def test_half_precision_copies_and_checkpointing_count(tmp_path: Path) -> None:
    size = memory.ModelSize.of(kit.student())

    def needed(**options: Any) -> dict[str, float]:
        args = kit.config(tmp_path, share_prompts=False, **options)
        return memory.totals(memory.phases(size, None, args, args.routing_table(), room=memory.Room(gpu=False)))

    assert needed(privileged_student="ema")["weights"] == 2 * needed()["weights"]
    assert needed(activation_checkpointing=True)["training"] < needed()["training"]
