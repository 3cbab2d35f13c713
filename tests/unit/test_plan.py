"""`dopd plan`: what runs need, from configurations alone."""

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
import yaml
from torch.utils.flop_counter import FlopCounterMode

from dopd.cli.main import main
from dopd.errors import ConfigError
from dopd.methods import table
from dopd.runs.effort import DEVICES, Clock, Efficiency
from dopd.runs.sizes import ModelSize, unloaded
from dopd.runs.splits import Split, split_of

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "explanation" / "scaling.md"
MODELS = ROOT / "docs" / "examples" / "models"
BLOCK = re.compile(r"^```\n\$ (dopd plan [^\n]*)\n(.*?)^```$", re.M | re.S)


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(["plan", "tiny-dag", "--json", *flags]) == 0
    return dict(json.loads(capsys.readouterr().out))


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["plan", *flags]) == 2
    return capsys.readouterr().err


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    model, args = kit.student(), kit.config(tmp_path, max_prompt_length=40, max_completion_length=24)
    clock = Clock(args, Split(), DEVICES["h100"], Efficiency(), 24)
    ids = torch.zeros(8, 64, dtype=torch.long)
    model.set_attn_implementation("eager")  # others are not counted on a CPU
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.model(input_ids=ids, use_cache=False)
    # There every token looks at every other one, behind it too.
    size = ModelSize.of(model)
    unseen = 4.0 * size.queries * size.layers * 8 * 64**2 / 2
    assert clock.pass_flop(size, shared=False) + unseen == pytest.approx(counted.get_total_flops(), rel=1e-6)
    assert clock.head_flop(size) == 2 * size.vocabulary * size.hidden * 8 * 24


def test_every_part_of_a_table_takes_a_pass_and_a_table_of_reference_texts_draws_none(tmp_path: Path) -> None:
    clock = Clock(kit.config(tmp_path, max_prompt_length=40), Split(), DEVICES["h100"], Efficiency(), 24)
    size = ModelSize.of(kit.student())
    own, several, references = (clock.phases(size, size, table(name)) for name in ("vanilla", "dapd", "sft"))
    parts = len({(rule.text, rule.view) for rule in table("dapd").rules})
    assert parts > 1 and several["training"].flop == parts * own["training"].flop
    assert own["rollouts"].flop > 0 and references["rollouts"].flop == references["rollouts"].seconds == 0


def test_sizes_of_published_models() -> None:
    """Billions of parameters, in all and for a token, as their model cards say them, without embeddings."""
    for name, whole, active in (("qwen3-8b", 6.95, 6.95), ("qwen3-1.7b", 1.4, 1.4), ("qwen3-235b-a22b", 234, 21)):
        size = ModelSize.of(unloaded(str(MODELS / name), "auto", {}))
        assert (size.matrices / 1e9, size.active / 1e9) == (
            pytest.approx(whole, rel=0.03),
            pytest.approx(active, rel=0.03),
        )
        assert size.element == 2


def test_a_plan_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    one = planned(capsys, "--gpu-price", "2")
    assert one["peak"] == pytest.approx(max(sum(parts.values()) for parts in one["bytes"].values()), rel=1e-6)
    assert one["fits"] and one["changes"] == []
    seconds = sum(phase["seconds"] + phase["communication"] for phase in one["phases"].values())
    assert one["seconds"] == pytest.approx(seconds)
    assert one["cost_of_1000_steps"] == pytest.approx(2 * one["gpu_hours_of_1000_steps"])
    assert one["gpu_hours_of_1000_steps"] == pytest.approx(seconds / 3.6)
    again = planned(capsys, "--gpus", "4", "--learning_rate", "3e-4", "--num_generations", "2")
    assert again["answers"] == 4 * one["answers"]
    assert again["gpu_hours_of_1000_steps"] > 4 * one["gpu_hours_of_1000_steps"]


def test_what_is_split_takes_less(capsys: pytest.CaptureFixture[str]) -> None:
    whole = planned(capsys, "--gpus", "8")
    for name, weights, optimizer, teacher in (
        ("zero2", 1, 8, 1),
        ("fsdp1", 8, 8, 1),
        ("fsdp2", 8, 8, 8),
        ("zero3", 8, 8, 8),
    ):
        one = planned(capsys, "--accelerate_config", name)
        assert one["devices"] == 8 and one["split"] == name
        parts, before = one["bytes"]["update"], whole["bytes"]["update"]
        for part, count in (("student", weights), ("optimizer", optimizer), ("teacher", teacher)):
            assert parts[part] == pytest.approx(before[part] / count, abs=1)


def test_the_split_that_a_config_names(tmp_path: Path) -> None:
    args = kit.config(tmp_path)
    assert split_of(args, {}, None) == Split() and split_of(args, {}, 8).name == "ddp"
    args.deepspeed = str(tmp_path / "ds.json")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert split_of(args, {"num_processes": 4}, None) == Split.named("zero2", 4)
    given = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}}
    assert split_of(args, given, 2) == Split.named("zero3", 2)
    args.deepspeed = str(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="nothing"):
        split_of(args, {}, 2)


def test_where_it_does_not_fit_changes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    small = planned(capsys, "--gpu-memory", "1.09", "--gpus", "2", "--per_device_train_batch_size", "64")
    assert not small["fits"] and small["changes"]
    assert all(change["peak"] < small["peak"] for change in small["changes"])
    texts = " ".join(change["change"] for change in small["changes"])
    assert all(word in texts for word in ("gradient_accumulation_steps", "zero2", "teacher_server", "use_peft"))


def test_what_cannot_be_planned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "a config is missing" in refused(capsys, "--gpus", "8")
    assert "multiple of num_generations (=4)" in refused(
        capsys, "tiny-dag", "--per_device_train_batch_size", "1", "--gpus", "2", "--gradient_accumulation_steps", "1"
    )
    (tmp_path / "config.json").write_text("{}")
    assert "config.json alone" in refused(capsys, "tiny-dag", "--model_name_or_path", str(tmp_path))
    assert "learning_rat" in refused(capsys, "tiny-dag", "--learning_rat", "1")
    assert "fsdp3" in refused(capsys, "tiny-dag", "--accelerate_config", "fsdp3")
    with pytest.raises(SystemExit):
        main(["plan", "tiny-dag", "--mfu", "1.5"])


@pytest.mark.slow
def test_cases_of_the_page_are_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DOPD_WRITE_PLANS=1 writes them."""
    monkeypatch.chdir(ROOT)
    text = PAGE.read_text(encoding="utf-8")
    assert BLOCK.search(text)

    def block(found: re.Match[str]) -> str:
        assert main(shlex.split(found[1])[1:]) == 0
        return f"```\n$ {found[1]}\n{capsys.readouterr().out}```"

    now = BLOCK.sub(block, text)
    if os.environ.get("DOPD_WRITE_PLANS"):
        PAGE.write_text(now, encoding="utf-8")
    assert now == text


def test_examples_of_the_page_are_configurations() -> None:
    for path in (ROOT / "docs" / "examples").glob("plan*.yaml"):
        assert (ROOT / yaml.safe_load(path.read_text())["model_name_or_path"] / "config.json").is_file()
