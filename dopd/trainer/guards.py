"""What is compared before a run starts: models that cannot be compared token by token are refused, oddities are
told.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dopd.errors import ConfigError, ModelError
from dopd.tables import RoutingTable
from dopd.trainer.anchor import effective_weights

logger = logging.getLogger(__name__)


def check_models(student: Any, teacher: Any, table: RoutingTable) -> None:
    """Refuse pairs of models that cannot work with a table.

    Raises:
        ConfigError: the table needs a teacher and there is none; teacher and student are one object, or hold the same
            weights where the table compares them in the same context.
        ModelError: vocabularies of different sizes.
    """
    if not table.needs_teacher:
        return
    if teacher is None:
        raise ConfigError(
            f"method {table.name!r} needs a teacher ({', '.join(sorted(table.sources))}): pass teacher_model, or "
            "teacher_model_name_or_path in the config"
        )
    check_vocab_sizes(student.config, teacher.config)
    if teacher is student:
        raise ConfigError(
            "teacher_model and model are the same object, so the teacher would move with the student. For "
            "self-distillation choose method='privileged_student', or load the teacher separately"
        )
    if ("teacher" in table.target_sources or table.routed) and same_weights(student, teacher):
        raise ConfigError(
            f"teacher and student hold the same weights, and method {table.name!r} compares them in the same "
            "context: every gap and every target would be the student's own. Is teacher_model_name_or_path the "
            "checkpoint you meant? For self-distillation choose method='privileged_student'"
        )


def check_vocab_sizes(student_config: Any, teacher_config: Any) -> None:
    """Raise `ModelError` unless both configs declare one vocabulary size."""
    mine, theirs = (config.get_text_config().vocab_size for config in (student_config, teacher_config))
    if mine != theirs:
        raise ModelError(
            f"the student's vocabulary has {mine} tokens, the teacher's {theirs}. Token-level distillation needs one "
            "vocabulary: use a teacher of the same family (nothing is padded, for a padded token would get real "
            "probability)"
        )


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have the same parameter names, shapes and values.

    An adapter counts with what it adds to its base weight (at first nothing: a student with a fresh adapter on the
    teacher's checkpoint is the teacher), and a value that one side holds in half precision is compared in it.
    """
    shapes, others = ({name: weight.shape for name, weight in effective_weights(model)} for model in (first, second))
    if shapes != others:
        return False
    theirs = dict(effective_weights(second))
    return all(_same_values(weight, theirs[name]) for name, weight in effective_weights(first))


@torch.no_grad()
def _same_values(first: Tensor, second: Tensor) -> bool:
    mine, theirs = (value.full_tensor() if isinstance(value, DTensor) else value for value in (first, second))
    narrow = min(mine.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(mine.cpu().to(narrow), theirs.cpu().to(narrow))


def compare_generation(student: Any, teacher: Any, eos_token_ids: list[int]) -> list[str]:
    """What differs between student and teacher without making the run impossible, one sentence each."""
    notes = []
    teacher_eos = teacher.generation_config.eos_token_id if teacher.generation_config is not None else None
    teacher_ids = set([] if teacher_eos is None else [teacher_eos] if isinstance(teacher_eos, int) else teacher_eos)
    if teacher_ids and teacher_ids != set(eos_token_ids):
        notes.append(
            f"end-of-sequence tokens differ: the student stops at {sorted(eos_token_ids)}, the teacher at "
            f"{sorted(teacher_ids)}. A teacher that never ends a turn with the student's token teaches it not to stop"
        )
    if student.dtype != teacher.dtype:
        notes.append(f"precision differs: student {student.dtype}, teacher {teacher.dtype}; gaps include the rounding")
    return notes


def compare_tokenizers(student: Any, teacher: Any) -> list[str]:
    """Differences between two tokenizers.

    Returns:
        Sentences for differences that a run survives (chat templates: the student's is used in every view).

    Raises:
        ModelError: one token id means two different things.
    """
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        differing = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
        # Added special tokens that one side lacks are harmless; a token with two ids is not.
        clashing = [token for token in differing if token in mine and token in theirs]
        if clashing or len(differing) > 0.01 * len(mine):
            raise ModelError(
                f"the tokenizers of student and teacher differ in {len(differing)} tokens, for example "
                f"{(clashing or differing)[:3]}: token ids do not mean the same. Use a teacher with the student's "
                "tokenizer"
            )
    if student.chat_template != teacher.chat_template:
        return ["chat templates differ: both models read prompts rendered with the student's template"]
    return []


def active_dropout(model: nn.Module) -> list[str]:
    """Names of modules with dropout that does something in training mode, attention that drops its weights included."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Dropout) and module.p > 0) or _attention_dropout(module)
    ]


def disable_attention_dropout(model: nn.Module) -> None:
    """Switch off the dropout of attention weights, which is a number and no module, so that the host leaves it on."""
    for module in model.modules():
        if _attention_dropout(module):
            vars(module)["attention_dropout"] = 0.0


def _attention_dropout(module: nn.Module) -> float:
    value = getattr(module, "attention_dropout", 0.0)
    return value if isinstance(value, float) else 0.0
