"""Whole runs: adapters, anchors, checkpointing, precision."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback


def merged(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT itself merges, by the names of a model without adapters."""
    plain = copy.deepcopy(model).merge_and_unload()
    return {name: weight.detach().clone() for name, weight in plain.named_parameters()}


def scored_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights that a model amounts to as it stands, read off its layers' outputs."""
    plain = copy.deepcopy(model)
    plain = plain.base_model.model if hasattr(plain, "peft_config") else plain
    weights = {}
    for name, module in plain.named_modules():
        if ".base_layer" in name or ".lora_" in name:
            continue
        if hasattr(module, "base_layer"):
            size = module.base_layer.in_features
            with torch.no_grad():
                weights[f"{name}.weight"] = module.eval()(torch.eye(size)).T
        else:
            for own, parameter in module.named_parameters(prefix=name, recurse=False):
                weights[own] = parameter.detach().clone()
    return weights


class AfterEveryStep(TrainerCallback):
    def __init__(self, keep: Any) -> None:
        self._keep = keep
        self.kept: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept.append(self._keep())


# --- Adapters and anchors


@pytest.mark.parametrize("anchor", ["current", "frozen", "ema"])
def test_adapters_train_and_the_base_and_the_initial_weights_stay(tmp_path: Path, anchor: str) -> None:
    made = kit.lora_trainer(tmp_path, privileged_student=anchor, max_steps=2)
    before = kit.parameters(made.model)
    initial = merged(made.model)
    made.train()
    changed = {name for name, delta in kit.update(before, made.model).items() if bool(delta.any())}
    assert changed and all("lora_" in name for name in changed)
    now = merged(made.model)
    with made.models.source_model("privileged_student") as model:
        kept = scored_weights(model)
        assert anchor == "current" or not any(value.requires_grad for value in model.parameters())
    assert merged(made.model).keys() == kept.keys()
    expected = {"current": now, "frozen": initial}.get(anchor)
    if expected is None:
        assert any(not torch.allclose(kept[name], initial[name], atol=1e-6) for name in initial)
        assert any(not torch.allclose(kept[name], now[name], atol=1e-6) for name in now)
    else:
        for name, value in expected.items():
            torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-6)
    assert made.table.name == ("dopd" if anchor == "current" else f"dopd_{anchor}")


def test_a_frozen_anchor_is_what_is_scored_after_the_student_has_moved(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, privileged_student="frozen", max_steps=2, learning_rate=1.0)
    before = kit.rollout(made)
    made.train()
    rows = [made.train_dataset[n] for n in range(8)]
    again = kit.scored_again(made, {"privileged": kit.privileged_view(made, rows)}, before)
    assert torch.equal(again["logprobs/privileged_student"], before["logprobs/privileged_student"])


def test_the_moving_average_of_an_adapter_is_of_the_product_and_not_of_its_factors(tmp_path: Path) -> None:
    made = kit.lora_trainer(
        tmp_path, privileged_student="ema", ema_decay=0.7, max_steps=3, optim="adamw_torch", weight_decay=0.0
    )
    average = merged(made.model)
    callback = AfterEveryStep(lambda: (merged(made.model), kit.parameters(made.model)))
    made.add_callback(callback)
    factors = kit.parameters(made.model)
    made.train()
    for weights, parameters in callback.kept:
        average = {name: 0.7 * average[name] + 0.3 * weights[name] for name in average}
        factors = {name: 0.7 * factors[name] + 0.3 * parameters[name] for name in factors}
    with made.models.source_model("privileged_student") as model:
        kept = scored_weights(model)
    for name, value in average.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            parameter.copy_(factors[name])
    wrong = merged(made.model)
    assert max(float((kept[name] - wrong[name]).abs().max()) for name in wrong) > 1e-4, "the factors' average differs"


def test_the_moving_average_of_a_whole_model_is_kept_per_optimizer_step(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, privileged_student="ema", ema_decay=0.6, max_steps=2, gradient_accumulation_steps=2,
                       per_device_train_batch_size=4)  # fmt: skip
    average = kit.parameters(made.model)
    callback = AfterEveryStep(lambda: kit.parameters(made.model))
    made.add_callback(callback)
    made.train()
    assert len(callback.kept) == 2
    for weights in callback.kept:
        average = {name: 0.6 * average[name] + 0.4 * weights[name] for name in average}
    with made.models.source_model("privileged_student") as model:
        for name, value in model.named_parameters():
            torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_on_the_output_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm_head"):
        kit.trainer(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))


# --- Activation checkpointing and precision


def test_activation_checkpointing_changes_no_loss_and_no_update(tmp_path: Path) -> None:
    runs = []
    for number, checkpointing in enumerate((False, True)):
        made = kit.trainer(
            tmp_path / str(number),
            activation_checkpointing=checkpointing,
            share_prompts=False,  # layers that are checkpointed keep no cache, and the other route rounds differently
            max_steps=2,
            generation_kwargs=kit.GREEDY,
        )
        made.train()
        assert made.model.is_activation_checkpointing == checkpointing
        runs.append((kit.records(made, "loss"), kit.parameters(made.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-6)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dopd", "vanilla"])
def test_prompts_run_once_change_neither_loss_nor_update(tmp_path: Path, method: str) -> None:
    runs = []
    for sharing in (True, False):
        made = kit.trainer(
            tmp_path / str(sharing),
            method,
            share_prompts=sharing,
            activation_checkpointing=False,
            gradient_accumulation_steps=2,
            max_steps=2,
            generation_kwargs=kit.GREEDY,
        )
        assert bool(made.models.sharing) == sharing
        made.train()
        runs.append((kit.records(made, "loss"), kit.parameters(made.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    for name, value in runs[1][1].items():
        torch.testing.assert_close(runs[0][1][name], value, rtol=1e-3, atol=1e-5)


def test_a_model_that_gives_other_numbers_from_a_cache_falls_back_with_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dopd import prefix

    original = prefix.hidden_states_sharing_prompts
    monkeypatch.setattr(prefix, "hidden_states_sharing_prompts", lambda *given: original(*given) + 0.1)
    with caplog.at_level("WARNING", logger="dopd"):
        made = kit.trainer(tmp_path)
    assert not made.models.sharing
    assert "share_prompts is off for Qwen3ForCausalLM" in caplog.text


def test_adapters_and_activation_checkpointing_together_train(tmp_path: Path) -> None:
    made = kit.lora_trainer(tmp_path, activation_checkpointing=True)
    before = kit.parameters(made.model)
    made.train()
    assert any(bool(delta.any()) for delta in kit.update(before, made.model).values())


@pytest.mark.parametrize("method", ["dopd", "vanilla"])
def test_bf16_computes_every_view_in_bf16(tmp_path: Path, method: str) -> None:
    """One view in another precision would put rounding into the gap."""
    made = kit.trainer(tmp_path, method, bf16=True, train_dataset=Dataset.from_list(kit.uneven_rows()))
    seen: dict[str, Any] = {}
    original = made.models.hidden_states

    def hidden_states(model: Any, *arguments: Any, **options: Any) -> torch.Tensor:
        hidden = original(model, *arguments, **options)
        seen["+grad" if torch.is_grad_enabled() else type(model).__name__] = hidden.dtype
        return hidden

    made.models.hidden_states = hidden_states  # type: ignore[method-assign]
    batches = kit.scored(made)
    made.train()
    (batch,) = batches
    stored = {name: value.dtype for name, value in batch.items() if name.startswith("hidden/")}
    assert len(stored) == len(made.table.target_sources) and set(stored.values()) == {torch.bfloat16}
    assert set(seen.values()) == {torch.bfloat16} and "+grad" in seen
    assert {value.dtype for value in made.model.parameters()} == {torch.float32}


def test_bf16_evaluates_in_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dopd.step import scorer

    seen = set()
    scored = scorer.view_hidden_states

    def looked_at(*arguments: Any, **options: Any) -> torch.Tensor:
        hidden = scored(*arguments, **options)
        seen.add((hidden.dtype, torch.is_autocast_enabled("cpu")))
        return hidden

    monkeypatch.setattr(scorer, "view_hidden_states", looked_at)
    rows = Dataset.from_list(kit.task_rows(4, split="test"))
    options = {"student_eval_steps": 1, "eval_dataset": rows, "verifier": lambda text, row: 0.0}
    for bf16 in (True, False):
        seen.clear()
        kit.trainer(tmp_path / str(bf16), bf16=bf16, **options).train()
        assert {autocast for _, autocast in seen} == {bf16}


def test_bf16_scores_are_those_of_float32_to_its_rounding(tmp_path: Path) -> None:
    half, single = (
        kit.trainer(tmp_path, bf16=bf16, train_dataset=Dataset.from_list(kit.uneven_rows())) for bf16 in (True, False)
    )
    batch = kit.rollout(half)
    views = {"privileged": kit.privileged_view(single, [single.train_dataset[n] for n in range(8)])}
    expected = kit.scored_again(single, views, batch)
    for source in half.table.sources:
        name = f"logprobs/{source}"
        torch.testing.assert_close(batch[name], expected[name], rtol=0.05, atol=0.05)
        assert not torch.equal(batch[name], expected[name])


def test_a_model_in_bf16_trains_and_its_targets_are_kept_in_bf16(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, model=kit.student().to(torch.bfloat16), teacher_model=kit.teacher().to(torch.bfloat16))
    batches = kit.scored(made)
    made.train()
    assert {batches[0][name].dtype for name in batches[0] if name.startswith("hidden/")} == {torch.bfloat16}
    assert math.isfinite(kit.records(made, "loss")[0])
