"""How often a training step waits for the device, counted on a pretended one."""

from collections import Counter
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from dopd.step import Request
from dopd.tasks import get_task
from dopd.tiny.models import TinySpec, build_model
from dopd.tiny.tokenizer import build_tokenizer
from dopd.trainer import DOPDConfig, DOPDTrainer
from lab import pretend_device

ANSWERS = 8  # of a step, four to each prompt


class FixedAnswers:
    """An engine that answers with the same tokens whatever it is asked."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def generate(self, request: Request) -> list[list[int]]:
        return [
            [5 + (place + n) % 7 for n in range(min(self.tokens, request.max_new_tokens))]
            for place in range(len(request.prompts))
        ]


class SecondStep(TrainerCallback):
    """Counts the waits of the second step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            pretend_device.waits.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.waits = Counter(pretend_device.waits)


def waits_of(
    folder: str,
    method: str,
    *,
    tokens: int = 16,
    layers: int = 2,
    micro_batches: int = 2,
    lora: bool = False,
    **more: Any,
) -> Counter[str]:
    """Waits of the second optimizer step of a method, by operation and line; `pretend_device.register()` comes first.

    Args:
        folder (`str`): of the run.
        method (`str`): of the run.
        tokens (`int`): of every answer.
        layers (`int`): of student and teacher.
        micro_batches (`int`): of a step.
        lora (`bool`): whether an adapter is trained.
        more: further settings of `DOPDConfig`.
    """
    tokenizer = build_tokenizer()
    sizes = enumerate((32, 48))
    models = [build_model(TinySpec(num_layers=layers, hidden_size=size), tokenizer, seed) for seed, size in sizes]
    for model in models:
        pretend_device.move(model)
    counting = SecondStep()
    options: dict[str, Any] = {
        "output_dir": folder,
        "bf16": False,
        "per_device_train_batch_size": ANSWERS // micro_batches,
        "gradient_accumulation_steps": micro_batches,
        "num_generations": 4,
        "max_completion_length": tokens,
        "max_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 10,
        "activation_checkpointing": False,
        "off_policy_rollouts": True,
    }
    config = DOPDConfig(**options, method=method, **more)
    # What the libraries find out of the machine when a config is made.
    PartialState._shared_state["device"] = vars(config)["_setup_devices"] = pretend_device.device()
    with pretend_device.Pretended():
        trainer = DOPDTrainer(
            model=models[0],
            teacher_model=models[1],
            args=config,
            train_dataset=Dataset.from_list(get_task("dag").rows("train", 32, "hints_without_execution")),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if lora else None,
            rollout_engine=FixedAnswers(tokens),
            callbacks=[counting],
        )
        trainer.train()
    return counting.waits
