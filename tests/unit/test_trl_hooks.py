"""TRL's private hooks that the trainer stands on: a changed one fails here, by name, and not in a training run."""

import inspect
from pathlib import Path

import pytest
import trainer_kit as kit
import trl
from trl import DistillationTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.models.utils import _ForwardRedirection, unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler, repeat_iterable_dataset

from dopd.trainer.host import HOST_HOOKS

LOOK = "Read trl/trainer/distillation_trainer.py, follow the change in dopd/trainer/host.py, then update this table."

# As in TRL 1.16: names of the parameters, in order; "=" marks a default.
METHODS = {
    "get_train_dataloader": ("self",),
    "_get_train_sampler": ("self", "dataset="),
    "_get_dataloader": (
        "self",
        "dataset",
        "description",
        "batch_size",
        "sampler_fn=",
        "is_training=",
        "dataloader_key=",
    ),
    "_prepare_inputs": ("self", "generation_batch"),
    "compute_loss": ("self", "model", "inputs", "return_outputs=", "num_items_in_batch="),
    "log": ("self", "logs", "start_time="),
    "training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "train": ("self", "resume_from_checkpoint=", "trial=", "ignore_keys_for_eval="),
    "_determine_best_metric": ("self", "metrics", "trial"),
    "save_model": ("self", "output_dir=", "_internal_call="),
    "_save_checkpoint": ("self", "model", "trial"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model="),
    "_load_best_model": ("self",),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_get_output_dir": ("self", "trial"),
}
FUNCTIONS = {
    VLLMGeneration.generate: ("self", "prompts", "images", "num_generations", "profiler="),
    VLLMGeneration.sync_weights: ("self",),
    RepeatSampler: ("data_source", "mini_repeat_count", "batch_size=", "repeat_count=", "shuffle=", "seed="),
    repeat_iterable_dataset: ("dataset", "mini_repeat_count", "batch_size=", "repeat_count="),
    unwrap_model_for_generation: (
        "model",
        "accelerator",
        "gather_deepspeed3_params=",
        "generation_kwargs=",
        "gradient_checkpointing_kwargs=",
    ),
    _ForwardRedirection.__call__: ("self", "wrapper_module", "original_module", "method", "args", "kwargs"),
}
# What the trainer reads of the host after its __init__.
ATTRIBUTES = (
    "_dist",
    "_forward_redirection",
    "_logs",
    "_metrics",
    "_step",
    "_tokenizer",
    "chat_template_kwargs",
    "current_gradient_accumulation_steps",
    "eos_token_ids",
    "log_completions",
    "max_completion_length",
    "model_wrapped",
    "pad_to_multiple_of",
    "shuffle_dataset",
    "teacher_model",
    "temperature",
    "use_vllm",
)


def signature(function: object) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return tuple(p.name + ("" if p.default is inspect.Parameter.empty else "=") for p in parameters)


def test_trl_minor_version_is_the_one_the_hooks_were_read_in() -> None:
    assert trl.__version__.split(".")[:2] == ["1", "16"], f"TRL {trl.__version__} instead of 1.16. {LOOK}"


def test_every_hook_has_its_signature_in_this_table() -> None:
    assert set(HOST_HOOKS) == set(METHODS)


@pytest.mark.parametrize("name", HOST_HOOKS)
def test_hook_has_the_signature_that_the_trainer_calls(name: str) -> None:
    method = getattr(DistillationTrainer, name, None)
    assert method is not None, f"TRL {trl.__version__}: DistillationTrainer.{name} is gone. {LOOK}"
    assert signature(method) == METHODS[name], f"TRL {trl.__version__}: {name}{inspect.signature(method)}. {LOOK}"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_function_has_the_signature_that_the_trainer_calls(function: object) -> None:
    assert signature(function) == FUNCTIONS[function], f"{function}: {inspect.signature(function)}. {LOOK}"  # type: ignore[arg-type, index]


def test_host_keeps_the_step_at_which_it_brought_its_engine_up_to_date() -> None:
    assert "self._last_loaded_step = -1" in inspect.getsource(DistillationTrainer.__init__), LOOK


def test_host_has_the_attributes_that_the_trainer_reads(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path)
    for name in ATTRIBUTES:
        if name != "current_gradient_accumulation_steps":  # set by the training loop of transformers
            assert hasattr(made, name), f"{name} is gone. {LOOK}"
    assert {"prompt", "completion"} <= set(made._logs), LOOK
    made.train()
    assert made.current_gradient_accumulation_steps == 1, LOOK
