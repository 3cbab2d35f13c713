"""How much memory a run will take on each device, phase by phase, from the models' configurations alone."""

from dataclasses import dataclass
from typing import Any

import torch

from dopd.tables import RoutingTable
from dopd.trainer.config import DOPDConfig
from dopd.trainer.optimizer_states import kept_bytes

PROMPT_TOKENS = 512  # of a prompt, where no limit says how long they are
# Bytes of activations that a layer keeps for its backward pass, for each token and hidden unit, in two bytes each and
# with attention that keeps no scores (Korthikanti et al. 2022, section 4.1).
_KEPT = 34


@dataclass(frozen=True)
class ModelSize:
    """What the memory of a model's passes depends on.

    Attributes:
        weights (`int`): bytes.
        trainable, trained (`int`): weights with a gradient, in numbers and in bytes.
        element (`int`): bytes of a number of its activations.
        layers, hidden, vocabulary (`int`): numbers.
        cached (`int`): numbers that the cache of keys and values holds for each token.
    """

    weights: int
    trainable: int
    trained: int
    element: int
    layers: int
    hidden: int
    vocabulary: int
    cached: int

    @classmethod
    def of(cls, model: Any) -> "ModelSize":
        """That of a transformers model, with adapters or without; it may be on the device `meta`."""
        text: Any = model.config.get_text_config()
        heads = text.num_attention_heads
        per_head = getattr(text, "head_dim", None) or text.hidden_size // heads
        keys = getattr(text, "num_key_value_heads", None) or heads
        parameters = list(model.parameters())
        return cls(
            weights=sum(one.numel() * one.element_size() for one in parameters),
            trainable=sum(one.numel() for one in parameters if one.requires_grad),
            trained=sum(one.numel() * one.element_size() for one in parameters if one.requires_grad),
            element=max((one.element_size() for one in parameters if one.is_floating_point()), default=4),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            vocabulary=text.vocab_size,
            cached=2 * text.num_hidden_layers * keys * per_head,
        )


def phases(student: ModelSize, teacher: ModelSize | None, config: DOPDConfig, table: RoutingTable) -> dict[str, float]:
    """Bytes on each device at the height of each phase; an estimate, of models that are not split over devices.

    Args:
        student, teacher (`ModelSize`): the models; the teacher if the table reads one.
        config (`DOPDConfig`): batch sizes and lengths. Prompts have `max_prompt_length` tokens, or `PROMPT_TOKENS`.
        table (`RoutingTable`): of which it is read whether the student is held twice.

    Returns:
        `weights`, `rollouts`, `scoring` and `training`; the last three contain the first.
    """
    copies = int(table.anchor != "current") + int("reference" in table.sources)
    weights = student.weights * (1 + copies) + (0 if teacher is None else teacher.weights)
    tokens = (config.max_prompt_length or PROMPT_TOKENS) + int(config.max_completion_length or 0)
    element = 2 if config.bf16 or config.fp16 else student.element
    answers = config.per_device_train_batch_size * config.gradient_accumulation_steps
    scored = config.per_device_scoring_batch_size or 4 * config.per_device_train_batch_size
    largest = max([student, *([] if teacher is None else [teacher])], key=lambda one: one.hidden)
    layer = _KEPT / 2 * element * tokens
    trained = layer * config.per_device_train_batch_size * student.hidden
    if config.gradient_checkpointing or getattr(config, "activation_checkpointing", False):
        kept = trained + student.layers * config.per_device_train_batch_size * tokens * student.hidden * element
    else:
        kept = student.layers * trained
    return {
        "weights": float(weights),
        "rollouts": float(weights + answers * tokens * student.cached * element),
        "scoring": weights + scored * layer * largest.hidden,
        "training": weights + _of_optimizer(student, config) + kept,
    }


def _of_optimizer(student: ModelSize, config: DOPDConfig) -> int:
    """Bytes of gradients and of what the optimizer keeps."""
    name = str(getattr(config.optim, "value", config.optim))
    element = student.trained // max(student.trainable, 1)
    return student.trained + int(student.trainable * kept_bytes(name, element))


def available() -> tuple[str, int]:
    """Where models will be, and the bytes that are there: of the GPU, or of the machine that has none."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"a {properties.name} has", int(properties.total_memory)
    import psutil

    return "this machine, without a GPU, has", int(psutil.virtual_memory().available)
