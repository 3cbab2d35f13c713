"""What is compared before a run starts: models that cannot be compared token by token are refused; you get
warnings of oddities.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoTokenizer

from dopd.adapters import EffectiveWeight, effective_weights
from dopd.checkpoints import files_of
from dopd.data.encode import tokenizer_of
from dopd.errors import ConfigError, ModelError
from dopd.quantized import is_quantized, rounded_alike
from dopd.tables import RoutingTable
from dopd.vocabulary import check_has_words

logger = logging.getLogger(__name__)

# Share of a quantised weight that may lie between two codes, so that rounding again gives the other one.
_OTHER_CODES = 1e-3
# attention_dropout, resid_pdrop, layerdrop, drop_path, ... Jitter of routers is none: PhiMoE scores with it too.
_DROPOUT = re.compile("drop")


@contextmanager
def named(teacher: str) -> Iterator[None]:
    """Inside, errors say which of several teachers they are about."""
    try:
        yield
    except (ConfigError, ModelError) as error:
        if teacher == "teacher_model":
            raise
        raise type(error)(f"{teacher}: {error}") from error


def check_models(student: Any, teacher: Any, table: RoutingTable) -> None:
    """Refuse pairs of models that cannot work with a table.

    Raises:
        ConfigError: the table needs a teacher and there is none; teacher and student are one object, or hold the same
            weights where the table compares them in the same context.
    """
    if not table.needs_teacher:
        return
    if teacher is None:
        raise ConfigError(
            f"method {table.name!r} needs a teacher ({', '.join(sorted(table.sources))}): pass teacher_model, or "
            "teacher_model_name_or_path in the config"
        )
    if teacher is student:
        raise ConfigError(
            "teacher_model and model are the same object, so the teacher would move with the student. For "
            "self-distillation choose method='privileged_student', or load the teacher separately"
        )
    if not ("teacher" in table.target_sources or table.routed) or not same_weights(student, teacher):
        return
    if table.routed or _any_quantized(student) == _any_quantized(teacher):
        raise ConfigError(
            f"teacher and student hold the same weights, and method {table.name!r} compares them in the same "
            "context: every gap and every target would be the student's own, or the rounding of one of them. Is "
            "teacher_model_name_or_path the checkpoint you meant? For self-distillation choose "
            "method='privileged_student'"
        )
    logger.warning(
        "teacher and student are one checkpoint, quantised in one of them alone: what the student learns is to make up "
        "for that rounding"
    )


def check_vocab_sizes(
    student_config: Any, teacher_config: Any, shared_tokenizer: Callable[[], int | None]
) -> list[str]:
    """Compare the sizes of two vocabularies. Matrices of one tokenizer may be padded to different sizes with rows that
    no token has; then the ids that both models have are scored.

    Args:
        shared_tokenizer (callable): () -> how many ids the tokenizer that both models have needs, or `None`.

    Returns:
        What is left out, in a sentence.

    Raises:
        ModelError: the models do not have one tokenizer, as far as can be found.
    """
    mine, theirs = (config.get_text_config().vocab_size for config in (student_config, teacher_config))
    if mine == theirs:
        return []
    needed = shared_tokenizer()
    if needed is not None and needed <= min(mine, theirs):
        larger = "student" if mine > theirs else "teacher"
        return [
            f"the student's vocabulary is padded to {mine} tokens and the teacher's to {theirs}, for one tokenizer of "
            f"{needed}: ids from {min(mine, theirs)} on, which only the {larger} has, are neither sampled nor scored"
        ]
    raise ModelError(
        f"the student's vocabulary has {mine} tokens, the teacher's {theirs}, and they are not known to have one "
        "tokenizer. Token-level distillation needs one vocabulary: use a teacher with the student's tokenizer. If it "
        "has that, save it beside the teacher's weights, or pass it as teacher_processing_class"
    )


def shared_tokenizer(
    model: Any, teacher_model: Any, processing_class: Any = None, teacher_processing_class: Any = None
) -> int | None:
    """How many ids the tokenizer that both models have needs; `None` if they have different ones, or none that can be
    found.

    Args:
        model, teacher_model: loaded models, or their names.
        processing_class, teacher_processing_class (*optional*): read from beside the models if left out.
    """
    try:
        mine, theirs = (
            _tokenizer(source) if processor is None else tokenizer_of(processor)
            for source, processor in ((model, processing_class), (teacher_model, teacher_processing_class))
        )
    except Exception:  # a model without a tokenizer beside it, for whatever reason
        return None
    ids = mine.get_vocab()
    return max(ids.values()) + 1 if ids == theirs.get_vocab() else None


def _tokenizer(source: Any) -> Any:
    place, where = files_of(source if isinstance(source, str) else source.config._name_or_path)
    return AutoTokenizer.from_pretrained(place, **where)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have the same weights, whatever they are stored as.

    An adapter counts with what it does to its base weight (at first nothing: a student with a fresh adapter on the
    teacher's checkpoint is the teacher). Of a weight that one side holds in half precision, or quantised, the other's
    is compared as that would hold it. Weights of which every rank has a part are the same where every part is.
    """
    mine, theirs = effective_weights(first), effective_weights(second)
    same = mine.keys() == theirs.keys()
    try:
        same = same and all(_same_weight(weight, theirs[name]) for name, weight in mine.items())
    except ModelError:  # nobody can say what an adapter or a packed weight amounts to
        same = False
    return all(gather_object([same]))


@torch.no_grad()
def _same_weight(first: EffectiveWeight, second: EffectiveWeight) -> bool:
    mine, theirs = first.make(), second.make()
    if hasattr(mine, "ds_tensor") or hasattr(theirs, "ds_tensor"):
        return _same_part(mine, theirs)
    mine, theirs = (value.full_tensor() if isinstance(value, DTensor) else value for value in (mine, theirs))
    if mine.shape != theirs.shape:
        return False
    mine, theirs = mine.detach().cpu(), theirs.detach().cpu()
    if first.module is not None and second.module is None:
        theirs = rounded_alike(first.module, theirs).cpu()
    if second.module is not None and first.module is None:
        mine = rounded_alike(second.module, mine).cpu()
    narrow = min(mine.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    mine, theirs = mine.to(narrow).float(), theirs.to(narrow).float()
    if not (first.tuned or second.tuned or first.module or second.module):
        return torch.equal(mine, theirs)
    # An adapter that does nothing is nothing to rounding; a weight between two codes may take either.
    rounding = 1e-5 * float(theirs.abs().max())
    return float(((mine - theirs).abs() > rounding).float().mean()) < _OTHER_CODES


def _same_part(first: Any, second: Any) -> bool:
    """Whether this rank's part of two weights that ZeRO-3 has split, one of them at least, is the same."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if getattr(first, "ds_shape", first.shape) != getattr(second, "ds_shape", second.shape):
        return False
    size = (first if hasattr(first, "ds_tensor") else second).ds_tensor.numel()
    parts = [
        weight.ds_tensor.flatten()
        if hasattr(weight, "ds_tensor")
        else weight.flatten()[rank * size : (rank + 1) * size]
        for weight in (first, second)
    ]
    count = min(map(len, parts))  # the last part is filled up
    return torch.equal(parts[0][:count].cpu().float(), parts[1][:count].cpu().float())


def _any_quantized(model: nn.Module) -> bool:
    return any(map(is_quantized, model.modules()))


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
        ModelError: one token id means two different things, or one of them knows no word.
    """
    for tokenizer in (student, teacher):
        check_has_words(tokenizer)
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


def check_one_vocabulary(student: Any, teacher: Any, processing_class: Any) -> list[str]:
    """Raise `ModelError` unless a token id means the same to two loaded models, as far as their files say.

    Args:
        processing_class: the student's tokenizer or processor.

    Returns:
        What is left out of the comparison, in a sentence.
    """
    tokenizer = partial(shared_tokenizer, student, teacher, processing_class)
    notes = check_vocab_sizes(student.config, teacher.config, tokenizer)
    try:
        theirs = _tokenizer(teacher)
    except Exception:  # a model without a tokenizer beside it, for whatever reason
        return notes
    compare_tokenizers(tokenizer_of(processing_class), theirs)
    return notes


def active_dropout(model: nn.Module) -> list[str]:
    """Names of modules with dropout that does something in training mode, numbers that modules keep included."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, _DropoutNd) and module.p > 0)
        or any(vars(module)[n] > 0 for n in _dropout_numbers(module))
    ]


def disable_dropout_numbers(model: nn.Module) -> None:
    """Switch off dropout (of attention weights, of residuals, of whole layers) that modules keep as a number and hand
    to a function: the host switches dropout modules off alone.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in _dropout_numbers(module):
            vars(module)[name] = 0.0


def _dropout_numbers(module: nn.Module) -> list[str]:
    """Attributes of a module that say how much of something is left out in training mode."""
    return [name for name, value in vars(module).items() if isinstance(value, float) and _DROPOUT.search(name)]
