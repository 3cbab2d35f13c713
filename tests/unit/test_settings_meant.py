"""Settings that say nothing, or say it in others' words: taken where they are harmless, told or refused where not."""

import logging
import re
import time
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from compatibility import tried
from peft import LoraConfig
from settings_kit import BASE
from trainer_kit import TOKENIZER, config, student, trainer
from transformers import GenerationConfig, HfArgumentParser
from trl import DistillationConfig, GRPOConfig, ModelConfig, RLOOConfig, ScriptArguments, SFTConfig, TrlParser
from trl.experimental.gkd import GKDConfig
from trl.experimental.gold import GOLDConfig
from trl.experimental.sdft import SDFTConfig
from trl.experimental.sdpo import SDPOConfig
from trl.experimental.server_distillation import ServerDistillationConfig

from dopd.adapters import check_adapter_config
from dopd.cli.main import main
from dopd.errors import ConfigError
from dopd.rollout_settings import check_named_tokens
from dopd.runs.settings import all_settings, load_settings, parse_flags
from dopd.runs.train import _student_options, make_config
from dopd.settings.foreign import FOREIGN
from dopd.trainer import DOPDConfig

pytestmark = pytest.mark.filterwarnings("ignore")
PARSERS = {
    HfArgumentParser: lambda flags: HfArgumentParser([DOPDConfig]).parse_args_into_dataclasses(flags),
    TrlParser: lambda flags: TrlParser([DOPDConfig]).parse_args_and_config(flags),
}


def dry(**values: Any) -> Any:
    return make_config(load_settings(None, **BASE | values), elsewhere=True)


def refused(words: str, **values: Any) -> None:
    with pytest.raises(ConfigError, match=words):
        dry(**values)


# --- Names of elsewhere


def test_a_name_of_elsewhere_is_answered_with_what_it_is_here() -> None:
    ours = all_settings()
    assert set(FOREIGN) & set(ours) == set()
    for name, said in FOREIGN.items():
        here = said.partition("here it is ")[2]
        assert not here or re.match(r"\w+", here)[0] in ours, name  # type: ignore[index]
        with pytest.raises(ConfigError, match=f"^unknown key '{name}': {re.escape(said)}"):
            load_settings(None, **BASE | {name: 1})
    asked = "group_by_length max_length torch_dtype attn_implementation model_revision overwrite_output_dir batch_size"
    assert set(f"{asked} lmbda max_new_tokens lr epochs".split()) <= set(FOREIGN)
    refused("beta .* each rule of the routing table", beta=0.5)


OF_TRL = [
    *(DistillationConfig, ServerDistillationConfig, GKDConfig, GOLDConfig, SDFTConfig, SDPOConfig),
    *(GRPOConfig, RLOOConfig, ModelConfig, ScriptArguments),
]


@pytest.mark.parametrize("other", OF_TRL, ids=lambda one: one.__name__)
def test_every_argument_of_trls_distilling_and_rewarded_trainers_is_ours_or_explained(other: Any) -> None:
    names = set(other.__dataclass_fields__) - set(all_settings()) - set(FOREIGN)
    of_sft_alone = set(SFTConfig.__dataclass_fields__) - set(GRPOConfig.__dataclass_fields__)
    assert names - of_sft_alone == set()


def test_a_flag_with_two_values_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_flags(["--seed", "1", "--seed=1"]) == {"seed": 1}
    assert main(["train", "tiny-dag", "--seed", "1", "--dry-run", "--seed=2"]) == 2
    assert "--seed is there twice, as 1 and 2" in capsys.readouterr().err
    with pytest.raises(ConfigError) as error:
        parse_flags(["--hub_token", "hf_one", "--hub-token", "hf_two"])
    assert "twice" in str(error.value) and "hf_" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"student_keep_layers": [0, 0]}, r"each layer once, from the lowest: \[0\]"),
        ({"student_keep_layers": [2, 1]}, r"from the lowest: \[1, 2\]"),
        ({"use_peft": True, "lora_target_modules": "q_proj,v_proj"}, r"write a list, \[q_proj, v_proj\]"),
        ({"lora_target_parameters": "a.b, c"}, r"write a list, \[a.b, c\]"),
        ({"use_peft": True, "lora_target_modules": "(q_proj"}, "is no regular expression"),
        ({"report_to": "wandb,tensorboard"}, r"write a list, \[wandb, tensorboard\]"),
        ({"report_to": ["none", "wandb"]}, "stand alone"),
        ({"fsdp": "x"}, "fsdp .*must be true or false, or some of full_shard"),
        ({"optim_args": "foo=1"}, "adamw_torch_fused does not read foo=1"),
        ({"optim": "sgd", "optim_args": "momentum=0.9, foo=2"}, "sgd does not read foo=2: leave"),
        ({"optim_target_modules": ["mlp"]}, "galore_.* and apollo_.* alone"),
        ({"deepspeed": {"a": 1}}, "needs the package deepspeed"),
        ({"lr_scheduler_type": "greedy"}, "set eval_strategy"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}, "learning_rate": 1e-4},
            r"rise to 0.001, above learning_rate \(=0.0001\)",
        ),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 1.5}},
            "above learning_rate",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "accuracy_greedy"}
            | {"student_eval_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
            "is of the student's evaluation: leave it out",
        ),
        ({"generation_kwargs": {"num_beams": 2}}, "a beam is no sample"),
        ({"generation_kwargs": {"num_beams": True}}, "num_beams"),
        ({"generation_kwargs": {"token_healing": True}}, "token_healing.* for other ways to generate"),
        ({"generation_kwargs": {"top_k": 5}}, "another distribution"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(values: dict[str, Any], words: str) -> None:
    refused(words, **values)


def test_what_needs_this_machine_is_refused_here_and_not_in_a_dry_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for values, words in (({"tf32": True}, "tf32.*Ampere"), ({"ddp_backend": "gloo"}, "ddp_backend.*launch")):
        dry(**values)
        with pytest.raises(ConfigError, match=words):
            make_config(load_settings(None, **BASE | values))


# --- Values that say nothing


def test_neutral_values_of_generation_are_taken_and_change_nothing(tmp_path: Path) -> None:
    neutral = {"top_k": 0, "typical_p": 1.0, "num_beams": 1, "top_p": 1, "min_new_tokens": 0, "eos_token_id": None}
    plain, made = trainer(tmp_path), trainer(tmp_path, generation_kwargs=neutral)
    assert made.engine.config.to_dict() == plain.engine.config.to_dict()
    assert made.engine.config.top_k == 0 and made.engine.config.num_beams == 1
    tried("setting", "generation_kwargs: neutral values (top_k 0, one beam, None)", "taken")


def test_what_is_neutral_is_what_generate_does_without() -> None:
    from dopd.rollout_settings import _ASK_NOTHING

    model, ids = student(), torch.tensor([[5, 6, 7]])
    known = GenerationConfig().to_dict()
    torch.manual_seed(0)
    wanted = model.generate(ids, do_sample=True, max_new_tokens=6, top_k=0)
    for name, values in _ASK_NOTHING.items():
        for value in values if name in known else ():
            if (name, value) == ("top_k", -1):  # vLLM's word for 0
                continue
            torch.manual_seed(0)
            options = {"do_sample": True, "max_new_tokens": 6, "top_k": 0, name: value}
            made = model.generate(ids, **options, tokenizer=TOKENIZER)
            assert torch.equal(made if torch.is_tensor(made) else made.sequences, wanted), (name, value)


def context() -> Any:
    return None


@pytest.mark.parametrize(
    "given",
    [
        {"report_to": None},
        {"report_to": ("none",)},
        {"debug": "underflow_overflow tpu_metrics_debug"},
        {"gradient_checkpointing_kwargs": {"context_fn": context}},
        {"generation_kwargs": {"sequence_bias": {(1, 2): 1.0}}, "off_policy_rollouts": True},
        {"model_init_kwargs": {"max_memory": {0: "1GB", "cpu": "2GB"}}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_the_host_takes_is_taken(given: dict[str, Any], tmp_path: Path) -> None:
    made = config(tmp_path, **given)
    assert made.report_to == []
    for name in ("generation_kwargs", "model_init_kwargs", "gradient_checkpointing_kwargs"):
        assert name not in given or getattr(made, name) == given[name]


def test_none_in_arguments_of_loading_is_what_it_is_without_them(tmp_path: Path) -> None:
    given = {"dtype": None, "subfolder": None, "weights_only": None, "attn_implementation": None, "pad_token_id": None}
    made = config(tmp_path, model_init_kwargs=given)
    # A dtype of None is that of the checkpoint, and other names are fields of the model's configuration.
    assert made.model_init_kwargs == {"dtype": None, "pad_token_id": None}


@pytest.mark.parametrize(
    ("function", "more", "words"),
    [(lambda: None, {}, "cannot be saved"), (context, {"use_reentrant": True}, "need use_reentrant")],
)
def test_a_context_that_cannot_work_is_refused(function: Any, more: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, gradient_checkpointing_kwargs={"context_fn": function, **more})


@pytest.mark.parametrize("parser", PARSERS)
def test_parsers_of_command_lines_give_text_for_unions(parser: Any, tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
    (made,) = PARSERS[parser]([*flags, "--pad_to_multiple_of", "8", "--fsdp", "false"])
    assert made.pad_to_multiple_of == 8 and not made.fsdp
    assert PARSERS[parser]([*flags, "--fsdp", "true"])[0].fsdp is True


# --- What nothing reads


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora_r": 8, "lora_target_modules": ["q_proj"]}, "without use_peft nothing reads lora_r (=8), lora_target"),
        ({"use_bnb_nested_quant": True}, "without load_in_4bit nothing reads use_bnb_nested_quant (=True)"),
        ({"dataset_test_split": "test"}, "without dataset_name nothing reads dataset_test_split (='test')"),
        ({"task": None, "dataset_name": "d", "train_prompts": 5}, "without task nothing reads train_prompts (=5)"),
        ({"vllm_server_port": 1}, "without use_vllm nothing reads vllm_server_port (=1)"),
        (
            {"model_name_or_path": "tiny:dag/student", "model_init_kwargs": {"revision": "x"}},
            "is for models of the hub",
        ),
        (
            {"teacher_model_name_or_path": "tests", "teacher_model_revision": "x"},
            "teacher_model_revision (='x') is for",
        ),
    ],
    ids=str,
)
def test_what_nothing_reads_is_told_by_every_command(
    values: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (BASE | values).items() if v is not None}))
    for command in (["doctor", str(path)], ["train", str(path), "--dry-run"], ["train", str(path)]):
        main(command)
        assert words in capsys.readouterr().err, command


def test_a_configuration_of_what_is_read_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    dry(use_peft=True, lora_r=8, train_prompts=5, trace_steps=1, trace_examples=2)
    dry()
    assert "nothing reads" not in caplog.text


# --- What depends on the vocabulary


BEYOND = [
    ({"bad_words_ids": [[3], [4, 10**6]]}, "bad_words_ids names token 1000000"),
    ({"sequence_bias": {(3, 10**6): 1.0}}, "sequence_bias names token 1000000"),
    ({"sequence_bias": [[[3, 10**6], 1.0]]}, "sequence_bias names token 1000000"),
    ({"suppress_tokens": [3, 10**6]}, "suppress_tokens names token 1000000"),
    ({"begin_suppress_tokens": [10**6]}, "begin_suppress_tokens names token 1000000"),
]


@pytest.mark.parametrize(("given", "words"), BEYOND, ids=str)
def test_a_token_beyond_the_vocabulary_is_refused_before_anything_is_written(
    given: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path / "python", generation_kwargs=given, off_policy_rollouts=True)
    where, run = tmp_path / "student", tmp_path / "run"
    student().save_pretrained(where)
    TOKENIZER.save_pretrained(where)
    if isinstance(given.get("sequence_bias"), dict):
        return  # with keys that YAML has not
    path = tmp_path / "config.yaml"
    values = {**BASE, "model_name_or_path": str(where), "output_dir": str(run), "generation_kwargs": given}
    path.write_text(yaml.safe_dump({**values, "off_policy_rollouts": True}))
    for command in (["train", str(path)], ["train", str(path), "--dry-run"], ["doctor", str(path)]):
        assert main(command) == 2
        said = capsys.readouterr()
        assert words in said.err + said.out
    assert not run.exists()


def test_tokens_of_the_vocabulary_are_taken() -> None:
    size = student().config.vocab_size
    for given in ({"suppress_tokens": [size - 1]}, {"sequence_bias": [[[size - 1, 0], 9999.0]]}, {"stop_strings": "x"}):
        check_named_tokens(given, size)
    with pytest.raises(ConfigError, match=f"names token {size}, .* has {size} tokens, 0 to {size - 1}"):
        check_named_tokens({"suppress_tokens": [size]}, size)


def test_settings_with_which_nothing_can_be_drawn_are_refused_before_a_step(tmp_path: Path) -> None:
    everything = list(range(student().config.vocab_size))
    with pytest.raises(ConfigError, match=r"generation_kwargs .*no token can be drawn"):
        trainer(tmp_path, generation_kwargs={"suppress_tokens": everything}, off_policy_rollouts=True)
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    trainer(tmp_path)
    first = torch.rand(1)
    torch.manual_seed(3)
    trainer(tmp_path, generation_kwargs={"suppress_tokens": [3]}, off_policy_rollouts=True)
    assert torch.equal(torch.rand(1), first)  # the trial draws, and leaves the generator as it was
    assert wanted.shape == first.shape


# --- Patterns


def test_a_pattern_without_an_end_is_refused(tmp_path: Path) -> None:
    hostile = r"((\w|\.)+)+!"
    start = time.perf_counter()
    with pytest.raises(ConfigError, match="is no regular expression that ends: it was tried for 5 seconds"):
        check_adapter_config(LoraConfig(target_modules=hostile))
    refused("that ends", use_peft=True, lora_target_modules=hostile)
    assert time.perf_counter() - start < 60
    # The names of the model itself are tried, too.
    with pytest.raises(ConfigError, match="that ends"):
        trainer(tmp_path, peft_config=LoraConfig(target_modules=r"(?!.*(layers.10|q_proj))((\w|\.)+)+!"))
    tried("setting", "lora_target_modules: a pattern that does not end", "refused after 5 seconds")


# --- Objects of Python


class Wordless:
    def __repr__(self) -> str:
        raise RuntimeError("no words")


OBJECTS = [{1}, b"x", Wordless(), int, range(3), np.array([1, 2]), torch.tensor([1, 2]), 1j, Decimal("0.5"), object()]


@pytest.mark.parametrize("value", OBJECTS, ids=lambda value: type(value).__name__)
def test_an_object_that_no_setting_means_is_refused_by_every_key(value: Any, tmp_path: Path) -> None:
    keys = [*all_settings()]
    with pytest.raises(ConfigError) as error:
        load_settings(None, **dict.fromkeys(keys, value))
    assert all(re.search(rf"^  {key} ", str(error.value), re.MULTILINE) for key in keys)
    for inside in ({"model_init_kwargs": {"subfolder": value}}, {"privileged_noise": {"a": value}}):
        refused("subfolder|privileged_noise", **inside)
    with pytest.raises(ConfigError, match="lr_scheduler_kwargs"):
        config(tmp_path, lr_scheduler_kwargs=value)


def test_objects_that_stand_for_a_value_become_it(tmp_path: Path) -> None:
    given = {"max_steps": np.int64(3), "ema_decay": np.float32(0.5), "run_name": Path("a"), "label_names": ("b",)}
    made = config(tmp_path, **given, model_init_kwargs=MappingProxyType({"subfolder": "c"}))
    assert (made.max_steps, made.ema_decay, made.run_name, made.label_names) == (3, 0.5, "a", ["b"])
    assert type(made.max_steps) is int and made.model_init_kwargs == {"subfolder": "c"}
    made.to_json_string()


@pytest.mark.parametrize("text", ["a\0b", "a\ud800"])
def test_text_that_no_file_takes_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"output_dir .*must be text without NUL"):
        load_settings(None, **BASE | {"output_dir": text})
    refused("chat_template_kwargs: a", chat_template_kwargs={"a": text})


def test_a_path_of_any_length_is_a_path(tmp_path: Path) -> None:
    long = "z" * 5000
    for key in ("model_name_or_path", "resume_from_checkpoint", "accelerator_config", "teacher_model_name_or_path"):
        try:
            dry(**{key: long})
        except ConfigError as error:
            assert key in str(error) and len(str(error)) < 6000


# --- What only a run would show


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optim": "sgd", "optim_args": "momentum=abc"}, "could not convert"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "Invalid momentum value: -1.0"),
        ({"generation_kwargs": {"disable_compile": False}}, "drawn without compiling"),
        ({"generation_kwargs": {"length_penalty": 2.0}}, r"length_penalty .* for other ways"),
        (
            {"generation_kwargs": {"min_new_tokens": 9}, "max_completion_length": 6},
            r"above max_completion_length \(=6\)",
        ),
        ({"generation_kwargs": {"exponential_decay_length_penalty": [2.5, 1.1]}}, "a number of tokens, and a factor"),
    ],
    ids=str,
)
def test_what_a_run_would_end_with_is_refused_before(values: dict[str, Any], words: str) -> None:
    refused(words, **values, off_policy_rollouts=True)


def test_what_the_host_would_give_twice_is_taken(tmp_path: Path) -> None:
    given = {"disable_compile": True, "renormalize_logits": True, "suppress_tokens": []}
    made = trainer(tmp_path, generation_kwargs=given)
    assert made.engine.config.to_dict() == trainer(tmp_path).engine.config.to_dict()


@pytest.mark.parametrize("name", ["trainable", "merged", "name", "path", "self", "output_loading_info", "", "a b"])
def test_what_is_no_setting_of_a_model_is_refused_by_name(name: str) -> None:
    for key in ("model_init_kwargs", "teacher_model_init_kwargs"):
        refused(f"{key}: '{name}' cannot be set there", **{key: {name: 1}})


def test_layers_that_are_left_out_of_checkpointing_stay_out_after_a_rollout(tmp_path: Path) -> None:
    given = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}}
    made = trainer(tmp_path, max_steps=2, **given)
    made.train()
    layers = made.unwrapped_student.model.layers
    assert len(layers) > 1
    assert [layer.gradient_checkpointing for layer in layers] == [index % 2 == 0 for index in range(len(layers))]


def test_what_needs_a_gpu_is_told_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    offload = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}}
    for values, words in (({"loss_backend": "triton"}, "loss_backend"), (offload, "offload .*moves states off a GPU")):
        with pytest.raises(ConfigError, match=words):
            make_config(load_settings(None, **BASE | values))


def test_a_dtype_of_none_is_that_of_the_run(tmp_path: Path) -> None:
    where = tmp_path / "student"
    student().save_pretrained(where)
    made = load_settings(None, **BASE | {"model_name_or_path": str(where), "model_init_kwargs": {"dtype": None}})
    assert _student_options(made, make_config(made))["dtype"] == "float32"
