"""Whole runs: adapters, anchors, checkpointing, precision, resume, and everything that a run writes."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

import dopd
from dopd.errors import ConfigError, ModelError
from dopd.tiny.models import TinySpec
from dopd.trainer import DOPDTrainer
from dopd.trainer.anchor import effective_weights, plain_copy
from dopd.trainer.batch_scorer import make_scorer
from dopd.trainer.callbacks import read_metrics
from dopd.trainer.sampler import EpochRepeatSampler
from dopd.trainer.trace import read_trace

REGIMES = [regime.name for regime in dopd.Regime]


def lora(rank: int = 2) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


def lora_trainer(folder: Path, **options: Any) -> DOPDTrainer:
    return kit.trainer(folder, peft_config=lora(), **({"learning_rate": 0.1} | options))


def merged(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in plain_copy(model).named_parameters()}


class AfterEveryStep(TrainerCallback):
    def __init__(self, keep: Any) -> None:
        self._keep = keep
        self.kept: list[Any] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept.append(self._keep())


# --- Adapters and anchors


@pytest.mark.parametrize("anchor", ["current", "frozen", "ema"])
def test_adapters_train_and_the_base_and_the_initial_weights_stay(tmp_path: Path, anchor: str) -> None:
    made = lora_trainer(tmp_path, privileged_student=anchor, max_steps=2)
    before = kit.parameters(made.model)
    initial = merged(made.model)
    made.train()
    changed = {name for name, delta in kit.update(before, made.model).items() if bool(delta.any())}
    assert changed and all("lora_" in name for name in changed)
    with made.source_model("privileged_student") as model:
        kept = dict(model.named_parameters())
    if anchor == "current":
        assert model is made.model_wrapped
    elif anchor == "frozen":
        assert all(torch.equal(kept[name], initial[name]) for name in initial)
        assert not any(value.requires_grad for value in kept.values())
    else:
        assert any(not torch.equal(kept[name], initial[name]) for name in initial)
    assert made.table.name == ("dopd" if anchor == "current" else f"dopd_{anchor}")


def test_a_frozen_anchor_is_what_is_scored_after_the_student_has_moved(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, privileged_student="frozen", max_steps=2, learning_rate=1.0)
    before = kit.rollout(made)
    made.train()
    rows = [made.train_dataset[n] for n in range(8)]
    completion = (before["completion_ids"], before["completion_mask"])
    again, _ = made._scorer.score({"privileged": made._privileged_view(rows)}, *completion)
    assert torch.equal(again["logprobs/privileged_student"], before["logprobs/privileged_student"])


def test_the_moving_average_of_an_adapter_is_of_the_product_and_not_of_its_factors(tmp_path: Path) -> None:
    made = lora_trainer(
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
    with made.source_model("privileged_student") as model:
        kept = dict(model.named_parameters())
    for name, value in average.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            parameter.copy_(factors[name])
    wrong = merged(made.model)
    assert max(float((kept[name] - wrong[name]).abs().max()) for name in wrong) > 1e-4, "the factors' average differs"


def test_effective_weights_of_an_adapter_are_its_merged_weights(tmp_path: Path) -> None:
    made = lora_trainer(tmp_path, max_steps=2)
    made.train()
    effective, expected = dict(effective_weights(made.model)), merged(made.model)
    assert effective.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(effective[name], value, rtol=1e-5, atol=1e-6)


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
    with made.source_model("privileged_student") as model:
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
        assert bool(made.sharing_architectures) == sharing
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
    assert not made.sharing_architectures
    assert "share_prompts is off for Qwen3ForCausalLM" in caplog.text


def test_adapters_and_activation_checkpointing_together_train(tmp_path: Path) -> None:
    made = lora_trainer(tmp_path, activation_checkpointing=True)
    before = kit.parameters(made.model)
    made.train()
    assert any(bool(delta.any()) for delta in kit.update(before, made.model).values())


@pytest.mark.parametrize("method", ["dopd", "vanilla"])
def test_bf16_computes_every_view_in_bf16(tmp_path: Path, method: str) -> None:
    """One view in another precision would put rounding into the gap."""
    made = kit.trainer(tmp_path, method, bf16=True, train_dataset=Dataset.from_list(kit.uneven_rows()))
    seen: dict[str, Any] = {}
    original = made.view_hidden_states

    def hidden_states(model: Any, *arguments: Any) -> torch.Tensor:
        hidden = original(model, *arguments)
        seen["+grad" if torch.is_grad_enabled() else type(model).__name__] = hidden.dtype
        return hidden

    made.view_hidden_states = hidden_states  # type: ignore[method-assign]
    made._scorer = make_scorer(made)
    batches = kit.scored(made)
    made.train()
    (batch,) = batches
    stored = {name: value.dtype for name, value in batch.items() if name.startswith("hidden/")}
    assert len(stored) == len(made.table.target_sources) and set(stored.values()) == {torch.bfloat16}
    assert set(seen.values()) == {torch.bfloat16} and "+grad" in seen
    assert {value.dtype for value in made.model.parameters()} == {torch.float32}


def test_bf16_scores_are_those_of_float32_to_its_rounding(tmp_path: Path) -> None:
    half, single = (
        kit.trainer(tmp_path, bf16=bf16, train_dataset=Dataset.from_list(kit.uneven_rows())) for bf16 in (True, False)
    )
    batch = kit.rollout(half)
    views = {"privileged": single._privileged_view([single.train_dataset[n] for n in range(8)])}
    expected, _ = single._scorer.score(views, batch["completion_ids"], batch["completion_mask"])
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


# --- Save and resume


def resumable(folder: Path, *, steps: int, **options: Any) -> DOPDTrainer:
    return kit.trainer(
        folder,
        max_steps=steps,
        optim="adamw_torch",
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        trace_steps=1,
        trace_examples=2,
        num_generations=2,
        per_device_train_batch_size=4,
        verifier=kit.TASK.verify,
        eval_dataset=Dataset.from_list(kit.task_rows(4, split="test")),
        student_eval_steps=2,
        train_dataset=Dataset.from_list(kit.task_rows(6)),
        **options,
    )


NOT_REPEATED = ("seconds/", "step_time", "train_", "eval_runtime", "eval_samples", "eval_steps")


def comparable(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if not key.startswith(NOT_REPEATED)}
        for record in read_metrics(folder / "metrics.jsonl")
        if "train_runtime" not in record
    ]


@pytest.mark.parametrize(
    "options",
    [{"privileged_student": "ema"}, {"privileged_student": "frozen"}, {"gradient_accumulation_steps": 2}],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_a_resumed_run_is_the_unbroken_run_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    """Weights, optimizer, random state, order of prompts beyond the first epoch, moving average, metrics."""
    unbroken = resumable(tmp_path / "unbroken", steps=6, **options)
    unbroken.train()
    broken = resumable(tmp_path / "broken", steps=6, **options)
    broken.add_callback(StopAfter(5))  # one step after the checkpoint at 4: its records must go
    broken.train()
    resumed = resumable(tmp_path / "broken", steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    expected = kit.parameters(unbroken.model)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.named_parameters())
    if options.get("privileged_student"):
        with unbroken.source_model("privileged_student") as a, resumed.source_model("privileged_student") as b:
            for value, other in zip(a.parameters(), b.parameters(), strict=True):
                assert torch.equal(value, other)
    assert comparable(tmp_path / "broken") == comparable(tmp_path / "unbroken")
    assert read_trace(tmp_path / "broken" / "trace.jsonl") == read_trace(tmp_path / "unbroken" / "trace.jsonl")


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


def test_files_of_a_resumed_run_have_no_step_twice(tmp_path: Path) -> None:
    resumable(tmp_path, steps=3).train()
    resumable(tmp_path, steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert Counter(record["step"] for record in records if "loss" in record) == {1: 1, 2: 1, 3: 1, 4: 1}
    assert Counter(record["step"] for record in records if "eval_entropy" in record) == {0: 1, 2: 1, 4: 1}
    assert Counter((r["step"], r["row"]) for r in read_trace(tmp_path / "trace.jsonl")).most_common(1)[0][1] == 1


def test_a_new_run_in_an_old_folder_starts_its_files_anew(tmp_path: Path) -> None:
    for _ in range(2):
        resumable(tmp_path, steps=1).train()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl") if "loss" in record] == [1]
    assert len(read_trace(tmp_path / "trace.jsonl")) == 2


def test_a_checkpoint_without_its_moving_average_is_refused(tmp_path: Path) -> None:
    resumable(tmp_path, steps=2).train()
    with pytest.raises(ModelError, match="not saved by a run whose privileged student is 'ema'"):
        resumable(tmp_path, steps=4, privileged_student="ema").train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


# --- What a run writes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> DOPDTrainer:
    folder = tmp_path_factory.mktemp("finished")
    made = kit.trainer(
        folder,
        max_steps=2,
        model=kit.many_ends(kit.student()),
        train_dataset=Dataset.from_list(kit.task_rows(8)),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        verifier=kit.TASK.verify,
        trace_steps=1,
        trace_examples=3,
        save_strategy="steps",
        save_steps=2,
        callbacks=[Reported()],
    )
    made.train()
    return made


class Reported(TrainerCallback):
    """What a tracker in `report_to` is told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_every_metric_of_a_step_exists_and_is_sane(finished: DOPDTrainer) -> None:
    records = kit.train_records(finished)
    assert len(records) == 2
    weights = {rule.label: rule.weight for rule in finished.table.rules}
    for record in records:
        assert sum(record[f"share/{name}"] for name in REGIMES) == pytest.approx(1)
        for name in REGIMES:
            present = record[f"share/{name}"] > 0
            assert record[f"weight/{name}"] == pytest.approx(weights[name] if present else 0)
            assert record[f"gap/{name}"] >= 0 and record[f"loss/{name}"] >= 0
            if present:
                high = name in ("HT", "HS")
                assert (record[f"gap/{name}"] >= record["threshold/gap"]) == high
        assert 0 < record["entropy"] <= math.log(len(kit.TOKENIZER))
        assert 0 < record["prob/privileged_teacher"] < 1 and 0 < record["prob/privileged_student"] < 1
        assert record["threshold/confidence"] == pytest.approx(
            record["prob/privileged_teacher"] + record["prob/privileged_student"]
        )
        assert record["num_sequences"] == 8 and record["privileged/missing_ratio"] == 0
        assert record["completions/eos_ratio"] + record["completions/clipped_ratio"] == pytest.approx(1)
        assert 1 <= record["completions/mean_length"] <= 8 and 0 <= record["rollout/accuracy"] <= 1
        for phase in ("rollout", "scoring", "training"):
            assert 0 < record[f"seconds/{phase}"] < 60
        assert record["loss"] > 0 and record["grad_norm"] > 0


def test_the_logged_loss_is_the_shares_times_losses_where_all_answers_are_equally_long(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, generation_kwargs={"min_new_tokens": 8})
    made.train()
    (record,) = kit.train_records(made)
    assert record["completions/min_length"] == record["completions/max_length"]
    assert record["loss"] == pytest.approx(sum(record[f"share/{n}"] * record[f"loss/{n}"] for n in REGIMES), rel=1e-5)


def test_trackers_are_told_the_routing_metrics(finished: DOPDTrainer) -> None:
    (callback,) = [c for c in finished.callback_handler.callbacks if isinstance(c, Reported)]
    logged = callback.logs[0]
    assert {f"share/{name}" for name in REGIMES} | {"entropy", "seconds/rollout", "loss", "rollout/accuracy"} <= set(
        logged
    )
    assert all(isinstance(value, int | float) for value in logged.values())


def test_the_metrics_file_holds_what_was_logged(finished: DOPDTrainer) -> None:
    records = read_metrics(Path(finished.args.output_dir) / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert records[0]["share/LH"] == kit.train_records(finished)[0]["share/LH"]


def test_the_trace_tells_every_token_its_regime(finished: DOPDTrainer) -> None:
    records = read_trace(Path(finished.args.output_dir) / "trace.jsonl")
    assert [(record["step"], record["row"]) for record in records] == [(s, r) for s in range(2) for r in range(3)]
    for record in records:
        assert record["method"] == "dopd" and record["privileged_context"] and record["score"] in (0.0, 1.0)
        for token in record["tokens"]:
            assert token["regime"] in REGIMES and token["text"]
            assert token["gap"] == pytest.approx(abs(token["logprob_teacher"] - token["logprob_student"]), abs=1e-5)


def test_the_trace_of_an_unrouted_method_says_null(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, "vanilla", trace_steps=1)
    made.train()
    token = read_trace(tmp_path / "trace.jsonl")[0]["tokens"][0]
    assert (token["regime"], token["gap"], token["logprob_student"]) == (None, None, None)


def test_a_checkpoint_has_a_model_card_that_cites_the_paper_and_loads(finished: DOPDTrainer) -> None:
    folder = Path(finished.args.output_dir)
    finished.create_model_card(model_name="x")
    card = (folder / "README.md").read_text()
    assert "DOPD: Dual On-policy Distillation" in card and "2606.30626" in card and "dopd" in card
    assert (folder / "checkpoint-2" / "model.safetensors").exists()
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_an_adapters_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    made = lora_trainer(tmp_path, save_strategy="steps", save_steps=1, privileged_student="ema")
    made.train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"adapter_model.safetensors", "privileged_student.pt"} <= names and "model.safetensors" not in names


def test_sharded_weights_refuse_anchors_that_copy_the_student() -> None:
    from dopd.trainer.anchor import make_anchor

    with pytest.raises(ConfigError, match="FSDP and ZeRO-3"):
        make_anchor("ema", kit.student(spec=TinySpec(num_layers=1)), decay=0.9, sharded=True)


def test_the_order_of_every_epoch_is_that_of_trls_sampler_whenever_it_is_asked_for() -> None:
    options: dict[str, Any] = {"mini_repeat_count": 2, "batch_size": 2, "repeat_count": 2, "shuffle": True, "seed": 3}
    unbroken = RepeatSampler(range(6), **options)
    orders = [list(unbroken) for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]
    for epoch in (2, 0, 1):
        assert list(EpochRepeatSampler(range(6), **options, epoch=lambda epoch=epoch: epoch)) == orders[epoch]
