"""Settings of the host that mean more here: resuming, the best checkpoint, trackers, the models' context."""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainer_kit as kit
from compatibility import tried
from trainer_kit import STUDENT, TEACHER, TOKENIZER, config, student, teacher, trainer
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config, Qwen3Config

from dopd.errors import ConfigError
from dopd.evaluation.results import EvaluationResult
from dopd.methods import METHODS, table
from dopd.runs.settings import load_settings
from dopd.runs.train import make_config, train
from dopd.tiny import build_model
from dopd.trainer import DOPDConfig, setup
from dopd.trainer.best import STUDENT_METRICS
from dopd.trainer.context import common_context, context_of, max_prompt_tokens
from dopd.trainer.host_settings import check_mappings

BASE = {
    "model_name_or_path": "s",
    "teacher_model_name_or_path": "t",
    "task": "dag",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
}


def made(folder: Path, *flags: str, **values: Any) -> Any:
    """The configuration that the command line makes."""
    return make_config(load_settings(None, flags, **BASE, output_dir=str(folder), **values))


# --- What is not on this machine


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel.*needs the package liger_kernel"),
        ({"use_vllm": True}, "use_vllm.*needs the package vllm"),
        ({"optim": "galore_adamw", "optim_target_modules": ["mlp"]}, "optim.*galore_torch"),
        ({"cache_implementation": "offloaded"}, "cache_implementation.*GPU.*use 'dynamic'"),
        ({"generation_kwargs": {"cache_implementation": "offloaded_static"}}, "cache_implementation.*GPU"),
        (
            {"generation_kwargs": {"cache_implementation": "quantized"}, "off_policy_rollouts": True},
            "cache_implementation.*needs the package optimum.quanto",
        ),
        (
            {"cache_implementation": "quantized", "off_policy_rollouts": True}
            | {"generation_kwargs": {"cache_config": {"backend": "hqq"}}},
            "cache_implementation.*needs the package hqq",
        ),
    ],
    ids=str,
)
def test_what_this_machine_lacks_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find = importlib.util.find_spec
    lacking = ("vllm", "liger_kernel", "galore_torch", "optimum", "hqq")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.split(".")[0] in lacking else find(name))
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, model="no/such-model", teacher_model="no/such-model", **values)
    with pytest.raises(ConfigError, match=words):
        train(load_settings(None, **BASE | values, output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    named = re.findall(r"use_\w+|optim|cache_implementation", words)[0]
    tried("setting", f"{named} that cannot work on the machine", "refused before anything is loaded")


# --- Resuming


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    return folder


@pytest.mark.parametrize("wanted", [True, "true", "True", "last", "LAST", "checkpoint-2", Path("checkpoint-3")])
def test_a_run_goes_on_from_the_checkpoint_that_is_asked_for(run: Path, wanted: Any) -> None:
    last = "checkpoint-2" if wanted == "checkpoint-2" else "checkpoint-3"
    assert config(run, resume_from_checkpoint=wanted).resume_from_checkpoint == str(run / last)
    assert made(run, f"--resume_from_checkpoint={wanted}").resume_from_checkpoint == str(run / last)
    assert made(run, "--resume_from_checkpoint").resume_from_checkpoint == str(run / "checkpoint-3")
    assert config(run, resume_from_checkpoint=str(run / last)).resume_from_checkpoint == str(run / last)


def test_the_trainer_resumes_by_its_configuration(run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run, tmp_path / "run"))
    resumed = trainer(run, max_steps=4, resume_from_checkpoint="last")
    resumed.train()
    assert resumed.state.global_step == 4
    # Three of the four steps were not made again.
    assert [record["step"] for record in resumed.state.log_history if "loss" in record] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"is at step 3, beyond max_steps \(=2\)"):
        trainer(run, max_steps=2, resume_from_checkpoint="last").train()
    ended = trainer(run, max_steps=3, resume_from_checkpoint="last")
    assert ended.train().global_step == 3  # and no step more: the weights are the checkpoint's
    kept = AutoModelForCausalLM.from_pretrained(run / "checkpoint-3").state_dict()
    assert all(torch.equal(weight, kept[name]) for name, weight in ended.unwrapped_student.state_dict().items())
    again = trainer(run, max_steps=3, resume_from_checkpoint="last")
    again.train(resume_from_checkpoint=False)
    assert len([record for record in again.state.log_history if "loss" in record]) == 3
    for wanted in ("true", "last", "path"):
        tried("setting", f"resume_from_checkpoint: {wanted}", "used; checked before models are loaded")


@pytest.mark.parametrize("wanted", [None, False, "false", "none"])
def test_no_checkpoint_is_a_start(run: Path, wanted: Any) -> None:
    assert config(run, resume_from_checkpoint=wanted).resume_from_checkpoint is None


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_loaded(run: Path, tmp_path: Path) -> None:
    for wanted, folder, words in (
        (True, tmp_path, "there is no checkpoint in output_dir"),
        ("last", tmp_path / "none", "there is no checkpoint in output_dir"),
        ("checkpoint-9", run, "is no folder"),
        (str(run), run, r"its last checkpoint is .*checkpoint-3"),
        (str(tmp_path), run, "is not a checkpoint with a trainer_state.json"),
    ):
        with pytest.raises(ConfigError, match=words):
            made(folder, resume_from_checkpoint=wanted)
    with pytest.raises(ConfigError, match="must be bool or str, got int"):
        made(run, resume_from_checkpoint=3)


# --- The best checkpoint


BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("metric", "best"),
    [("accuracy_greedy", 2), ("eval_accuracy_greedy", 2), ("accuracy_sampled", 2), ("eval_divergence_to_teacher", 3)],
)
def test_the_best_checkpoint_is_that_of_the_students_evaluation(tmp_path: Path, metric: str, best: int) -> None:
    made = kit.with_accuracies(tmp_path, [0.9, 0.2, 0.8, 0.1, 0.5], metric_for_best_model=metric, **BEST)
    made.train()
    assert made.state.best_global_step == best
    assert made.state.best_metric == {2: 0.8, 3: 0.1}[best]
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{best}").state_dict()
    for name, weight in made.unwrapped_student.state_dict().items():
        assert torch.equal(weight.cpu(), kept[name]), name
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    assert any(not torch.equal(kept[name], other[name]) for name in kept)
    tried("setting", f"metric_for_best_model: {metric}", "selects the checkpoint that is loaded at the end")


def test_save_strategy_best_saves_where_the_student_got_better(tmp_path: Path) -> None:
    values = [0.0, 0.5, 0.25, 0.75]
    made = kit.with_accuracies(tmp_path, values, metric_for_best_model="accuracy_greedy", save_strategy="best")
    made.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-3"]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.75
    tried("setting", "save_strategy: best", "saves where the student's metric is the best so far")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"student_eval_steps": None}, "set student_eval_steps"),
        ({"save_strategy": "no"}, r"save_strategy \(='no'\)"),
        ({"metric_for_best_model": "eval_acuracy_greedy"}, "Did you mean 'accuracy_greedy'"),
        ({"metric_for_best_model": "entropy"}, "set greater_is_better"),
        ({"eval_steps": 4}, r"eval_steps \(=4\) is not student_eval_steps \(=2\)"),
        ({"eval_steps": 4, "save_strategy": "best"}, r"eval_steps \(=4\) is not student_eval_steps \(=2\)"),
        ({"metric_for_best_model": "loss", "save_strategy": "best"}, "would save nothing: set eval_strategy"),
        ({"metric_for_best_model": None, "load_best_model_at_end": False, "eval_steps": 4}, "does nothing without"),
        ({"metric_for_best_model": "eval_divergence_to_teacher", "method": "one without a teacher"}, "needs a teacher"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_by_name(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    if "method" in values:
        values = values | {"method": next(name for name in METHODS if not table(name).needs_teacher)}
    good = {"metric_for_best_model": "accuracy_greedy", "student_eval_steps": 2, **BEST, "save_steps": 4}
    assert made(tmp_path, **good).greater_is_better is True
    with pytest.raises(ConfigError, match=words):
        made(tmp_path, **good | values)


def test_metrics_to_choose_by_are_those_that_are_measured() -> None:
    everything = EvaluationResult([1], [[1]], [1], [1], [1], [1], [1], [1])
    assert set(STUDENT_METRICS) == set(everything.metrics()) - {"num_prompts"}


# --- Trackers


def test_a_tracker_that_is_not_here_is_told_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "get_available_reporting_integrations", lambda: ["trackio"])
    with pytest.raises(ConfigError, match=r"report_to \(='wandb'\) is not installed"):
        make_config(load_settings(None, **BASE | {"report_to": "wandb"}, output_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        make_config(load_settings(None, **BASE | {"report_to": ["wandbb"]}, output_dir=str(tmp_path)))
    for fine in ("none", "trackio", ["trackio"], "all"):
        make_config(load_settings(None, **BASE | {"report_to": fine}, output_dir=str(tmp_path)))
    with pytest.raises(ConfigError, match="not installed"):
        trainer(tmp_path, report_to="mlflow")
    tried("setting", "report_to: a tracker that is not installed", "refused before models are loaded")


# --- The context


def rope(kind: str, factor: float | None = 4.0, original: int | None = None, **more: Any) -> dict[str, Any]:
    values = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original, "rope_theta": 1e4}
    return {key: value for key, value in values.items() if value is not None} | more


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
HALF = [1.0] * 8  # factors of longrope for heads of 16 channels
CONTEXTS = {
    "no scaling": (Qwen3Config(max_position_embeddings=40960), 40960),
    # Qwen's model cards: 32,768 and a factor of 4 are 131,072 tokens; DeepSeek and gpt-oss write the product.
    "yarn, as Qwen writes it": (
        Qwen3Config(max_position_embeddings=32768, rope_parameters=rope("yarn", original=32768)),
        131072,
    ),
    "yarn, as DeepSeek writes it": (
        LlamaConfig(max_position_embeddings=163840, rope_parameters=rope("yarn", 40.0, 4096)),
        163840,
    ),
    "yarn without the original length": (
        LlamaConfig(max_position_embeddings=2048, rope_parameters=rope("yarn")),
        8192,
    ),
    "linear": (LlamaConfig(max_position_embeddings=4096, rope_parameters=rope("linear")), 16384),
    "dynamic": (LlamaConfig(max_position_embeddings=4096, rope_parameters=rope("dynamic", 2.0)), 8192),
    "llama3": (
        LlamaConfig(max_position_embeddings=131072, rope_parameters=rope("llama3", 8.0, 8192, **LLAMA3)),
        131072,
    ),
    "longrope": (
        Phi3Config(
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_parameters=rope("longrope", None, 4096, short_factor=HALF, long_factor=HALF),
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=4,
        ),
        131072,
    ),
    "linear, one kind of layers (Gemma 3)": (
        Gemma3TextConfig(
            max_position_embeddings=131072,
            rope_parameters={"full_attention": rope("linear", 8.0), "sliding_attention": rope("default", None)},
        ),
        131072,
    ),
    "learned positions": (GPT2Config(n_positions=1024), 1024),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", CONTEXTS)
def test_the_context_is_that_of_the_scaled_positions(name: str) -> None:
    model_config, tokens = CONTEXTS[name]
    assert context_of(model_config) == tokens
    tried("checkpoint", f"context: {name}", "the scaled one")


def test_models_without_a_limit_have_none_and_learned_positions_have_no_way_around() -> None:
    free = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    assert context_of(free.config) is None
    assert common_context([free], None) > 10**9
    short = SimpleNamespace(config=GPT2Config(n_positions=64))
    long = SimpleNamespace(config=CONTEXTS["linear"][0])
    assert common_context([short, long], None) == 64 and common_context([long], 99999) == 99999
    with pytest.raises(ConfigError, match="has learned positions for 64 tokens"):
        common_context([short, long], 65)


def test_max_context_is_the_way_around_a_configuration_that_says_too_little(tmp_path: Path) -> None:
    models = {"model": student(), "teacher_model": teacher()}
    for model in models.values():
        model.config.max_position_embeddings = 24
    with pytest.raises(ConfigError, match=r"leaves no room.*set max_context"):
        trainer(tmp_path, max_completion_length=24, **models)
    made = trainer(tmp_path, max_completion_length=24, max_context=128, **models)
    assert max_prompt_tokens(made) == 104
    with pytest.raises(ConfigError, match=r"max_context \(=0\)"):
        config(tmp_path, max_context=0)
    tried("setting", "max_context", "replaces the context that configurations say")


# --- Values of the wrong kind


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"task_options": 5}, r"task_options \(=5\) must be mapping"),
        ({"student_keep_layers": 3}, r"student_keep_layers \(=3\) must be list of int"),
        ({"student_keep_layers": ["a"]}, "must be list of int"),
        ({"privileged_noise": "wrong"}, "must be mapping"),
        ({"lora_target_modules": 5}, "must be list of str or str"),
        ({"loss_backend": "fast"}, "must be 'auto' or 'chunked' or 'reference' or 'triton'"),
        ({"method_options": [1]}, "must be mapping, got list"),
        ({"chat_template_kwargs": [1]}, "must be mapping, got list"),
        ({"report_to": 5}, "must be list of str or str"),
        ({"dataset_name": 5, "task": None}, "must be list of str or str"),
        ({"seed": [1]}, "must be int"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load_settings(None, **BASE | values, output_dir=str(tmp_path))


def test_sizes_of_the_kit_are_what_these_tests_take_them_for() -> None:
    assert build_model(STUDENT, TOKENIZER, 0).config.max_position_embeddings > 32
    assert build_model(TEACHER, TOKENIZER, 0).config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize(
    "given",
    [
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-2, "lr_scheduler_kwargs": {"lr_end": 5e-3}},
        {"model_init_kwargs": {"dtype": torch.bfloat16}, "teacher_model_init_kwargs": {"torch_dtype": torch.float32}},
        {"activation_checkpointing_kwargs": {"every_n_layers": 2, "offload": True}},
        {"fsdp": True},
        {"fsdp": "full_shard auto_wrap"},
    ],
)
def test_what_the_host_takes_from_python_is_taken(given: dict[str, Any], tmp_path: Path) -> None:
    made = DOPDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **given)
    for name, value in given.items():
        if name != "fsdp":
            assert getattr(made, name) == value
    dataclasses.replace(made)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, r"learning_rate \(=1e-08\)"),
        (
            {
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-5},
                "learning_rate": 0.0,
            },
            r"lr_scheduler_type \(='cosine_with_min_lr'\) cannot work",
        ),
        (
            {
                "lr_scheduler_type": "reduce_lr_on_plateau",
                "lr_scheduler_kwargs": {"factor": 1.5},
                "eval_strategy": "steps",
                "eval_steps": 1,
            },
            "Factor should be < 1.0",
        ),
    ],
)
def test_a_scheduler_is_tried_at_the_rate_that_is_set(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        DOPDConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **given)


def test_settings_that_only_newer_hosts_have_may_be_absent(tmp_path: Path) -> None:
    """What transformers' TrainingArguments have gained since the oldest version that dopd accepts, 5.4."""
    made = config(tmp_path)
    newer = {
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "dataloader_in_order",
        "dataloader_multiprocessing_context",
        "ddp_static_graph",
        "trackio_bucket_id",
        "trackio_static_space_id",
    }
    present = newer & set(vars(made))
    assert len(present) > 2, "the newest version has them"
    older = SimpleNamespace(**{name: value for name, value in vars(made).items() if name not in newer})
    older.use_vllm, older.chosen = made.use_vllm, made.chosen
    assert check_mappings(older) == []  # type: ignore[arg-type]
