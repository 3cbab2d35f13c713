"""What a vision-language run checks and prepares before the first step: processors, datasets, trial passes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Audio, Dataset, Image, IterableDataset, LargeList, List, Video
from PIL import Image as Picture

from dopd.checkpoints import config_of, files_of, where_of
from dopd.data.encode import PromptLengths, encode_prompts, encode_view, image_sources, reads_images
from dopd.data.images import COLUMNS, PRIVILEGED_COLUMN, BrokenImageError, unread_columns
from dopd.data.rendering import template_of
from dopd.data.views import images_of, plain_prompt
from dopd.errors import ConfigError, DataError, ModelError, first_line
from dopd.generation import words
from dopd.prefix import architecture
from dopd.scoring import View, evaluation_mode, view_hidden_states
from dopd.settings import as_mapping
from dopd.trainer.config import DOPDConfig
from dopd.trainer.host import HostTrainer
from dopd.vision.processors import is_vision_config, load_processor

logger = logging.getLogger(__name__)

_READ = ("prompt", *COLUMNS, PRIVILEGED_COLUMN)
_TRIAL_ROWS = 64  # of the dataset, looked through for images to try
_TRIAL_SIDE = 448
_TRIAL_TOKENS = 3
# Two routes to the same states differ by rounding alone, relative to the largest state.
_TOLERANCE, _TOLERANCE_HALF = 1e-4, 5e-2


def where_from(args: DOPDConfig, *, teacher: bool = False) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say which files of the student's (or the teacher's) checkpoint are meant."""
    arguments = as_mapping(args.teacher_model_init_kwargs if teacher else args.model_init_kwargs)
    revision = args.teacher_model_revision if teacher else None
    meant = {"revision": revision, "trust_remote_code": args.trust_remote_code, **where_of(arguments)}
    return {name: value for name, value in meant.items() if value}


def processor_for(model: Any, processing_class: Any, **where: Any) -> Any:
    """The processor of a vision-language model that came without one; other models keep what they came with.

    The host would ask transformers for it, which needs torchvision for many families.

    Args:
        model: a transformers model, or a name or folder of one.
        processing_class: what came with it, if anything.
        where: of `where_from`.

    Raises:
        ModelError: it cannot be made here; the message says what is missing.
    """
    config = _config_of(model, where) if isinstance(model, str) else model.config
    if config is None or not is_vision_config(config):
        return processing_class
    if processing_class is None:
        path, where = files_of(model, **where) if isinstance(model, str) else (config._name_or_path, where)
        processing_class = load_processor(path, padding_side="left", **where)
    if not reads_images(processing_class):
        logger.warning(
            f"{type(config).__name__} is a vision-language model, but processing_class is a tokenizer: only text can "
            "be read. Pass its processor (dopd.vision.load_processor) to train with images"
        )
    else:
        _check_family(processing_class)
    return processing_class


def _check_family(processor: Any) -> None:
    """Refuse a processor whose images cannot be read before a model is loaded; other faults are errors of rows."""
    try:
        encode_prompts(processor, _noise_prompts(1), {})
    except ModelError:
        raise
    except Exception:  # no template, tokens that are missing, ...: with rows at hand it is said better
        return


def _config_of(path: str, where: Mapping[str, Any]) -> Any:
    try:
        return config_of(path, **where)
    except Exception:
        return None  # the reader of the model says what is wrong


def undecoded(dataset: Any) -> Any:
    """The dataset with its images, videos and sound as files and bytes: pictures are opened where they are read, where
    errors name the row, and what nothing reads is not opened.
    """
    for column, kind in _features(dataset).items():
        asleep = _undecoded(kind)
        if asleep != kind:
            dataset = dataset.cast_column(column, asleep)
    return dataset


def _undecoded(kind: Any) -> Any:
    """The feature with everything in it left as it is stored; blocks of a conversation hold pictures deep inside."""
    if isinstance(kind, Image | Video | Audio):
        return replace(kind, decode=False)
    if isinstance(kind, List | LargeList):
        return replace(kind, feature=_undecoded(kind.feature))
    if isinstance(kind, dict):
        return {name: _undecoded(inner) for name, inner in kind.items()}
    return kind


def _features(dataset: Any) -> Mapping[str, Any]:
    """The types of columns; a stream may not know its own."""
    return (dataset.features if isinstance(dataset, Dataset | IterableDataset) else None) or {}


def warn_of_unread_columns(columns: Sequence[str], dataset: Any) -> None:
    """Say which columns hold pictures, by their types or their names, where nothing looks for any."""
    kinds = _features(dataset)
    seen = [name for name, kind in kinds.items() if _holds_media(kind) and name not in _READ]
    unread = list(dict.fromkeys([*seen, *unread_columns(columns)]))
    if unread:
        logger.warning(
            f"column(s) {', '.join(map(repr, unread))} hold pictures or sound by type or name, and nothing reads them. "
            f"Pictures belong into {', '.join(map(repr, COLUMNS))} or {PRIVILEGED_COLUMN!r}"
        )


def _holds_media(kind: Any) -> bool:
    if isinstance(kind, List | LargeList):
        return _holds_media(kind.feature)
    return isinstance(kind, Image | Video | Audio) or (isinstance(kind, dict) and any(map(_holds_media, kind.values())))


def check_readable(row: dict[str, Any], processing_class: Any) -> None:
    """Raise `DataError` for a row with images that the model cannot read."""
    if not reads_images(processing_class) and (
        image_sources(plain_prompt(row)) or images_of(row, (PRIVILEGED_COLUMN,))
    ):
        raise DataError(
            "it has images, but the model reads text only: choose a vision-language model (and its processor), or "
            "remove the image columns"
        )


def teacher_candidate(host: HostTrainer, sources: Mapping[str, Any], passed: Any) -> Any:
    """What the teacher's prompts are encoded with, where that may differ from the student's; else `None`.

    It is the teacher's own processor if that has other settings, or the student's if its template is told otherwise.

    Args:
        sources (`dict`): what the trainer was given as its teachers, by their names in messages; a name or folder is
            asked for its processor.
        passed: a processor passed for the teacher, if any.
    """
    mine = host.processing_class
    if host.parked.models:
        _check_one_processor(host, sources, passed)
    elif host.teacher_model is None and host.served is None and not host.args.teacher_is_base:
        return None
    teacher_source = sources.get("teacher_model")
    unlike = None if host.prompts.teacher_chat_template_kwargs is None else mine
    if not reads_images(mine):
        return unlike
    processor = None if host.parked.models else passed
    if processor is None and isinstance(teacher_source, str):
        path, where = files_of(teacher_source, **where_from(host.args, teacher=True))
        processor = load_processor(path, padding_side="left", **where)
    if processor is None or (
        processor.to_dict() == mine.to_dict()
        and processor.chat_template == mine.chat_template
        and processor.tokenizer.get_vocab() == mine.tokenizer.get_vocab()
    ):
        return unlike
    return processor


def _check_one_processor(host: HostTrainer, sources: Any, passed: Any) -> None:
    """Raise `ConfigError` where one of several teachers reads images otherwise than the student."""
    if not reads_images(host.processing_class):
        return
    mine = host.processing_class.to_dict()
    for name, source in sources.items():
        theirs = passed
        if theirs is None and isinstance(source, str):
            path, where = files_of(source, **where_from(host.args, teacher=True))
            theirs = load_processor(path, padding_side="left", **where)
        if theirs is not None and theirs.to_dict() != mine:
            raise ConfigError(
                f"{name}: its processor has other settings than the student's, and several teachers read images "
                "through the student's: train with one teacher_model, or with teachers of the student's processor"
            )


def prompt_lengths(host: HostTrainer, vocab_size: int) -> Callable[[list[Any]], list[int]]:
    """What counts the tokens of prompts: the most that student or teacher read, each through its own processor."""
    mine = PromptLengths(host.processing_class, host.chat_template_kwargs, vocab_size)
    if host.teacher_candidate is None:
        return mine
    theirs = PromptLengths(host.teacher_candidate, host.prompts.teacher_options, vocab_size)

    def longer(prompts: list[Any]) -> list[int]:
        lengths = mine(prompts)
        try:
            return list(map(max, lengths, theirs(prompts)))
        except BrokenImageError as error:
            raise BrokenImageError(f"the teacher's own processor: {error}") from error

    return longer


@dataclass(frozen=True)
class Trial:
    """Three prompts with images to try models with, two of them equal.

    Attributes:
        student, teacher (`View`): as each reads them.
        teacher_processing_class: the teacher's own processor, where it encodes them otherwise than the student's.
    """

    student: View
    teacher: View
    teacher_processing_class: Any = None

    def of(self, host: HostTrainer, model: Any) -> View:
        """The prompts as student or teacher reads them."""
        return self.teacher if host.is_teacher(model) else self.student


def trial_of(host: HostTrainer) -> Trial | None:
    """Prompts to try, as student and teacher read them; `None` where the models read text. Datasets are prepared
    before.
    """
    # Without a template no prompt can hold an image.
    if not reads_images(host.processing_class) or not template_of(host.processing_class, host.chat_template_kwargs):
        return None
    prompts, device = _trial_prompts(host), host.accelerator.device
    view = host.prompts.view(prompts, device)
    if host.teacher_candidate is None:
        return Trial(view, view)
    own = encode_view(host.teacher_candidate, prompts, host.prompts.teacher_options, device)
    # Prompts show how processors encode, and not what templates would make of other prompts.
    if host.prompts.teacher_chat_template_kwargs is None:
        if same_encoding(view, own):
            return Trial(view, view)
        logger.warning(
            "student and teacher encode prompts with images differently: each reads them through its own processor. "
            "Their completions are the same tokens"
        )
    return Trial(view, own, host.teacher_candidate)


def same_encoding(first: View, second: View) -> bool:
    """Whether two processors gave the same tokens and the same pixels."""
    if first.prompt_ids.shape != second.prompt_ids.shape or not torch.equal(first.prompt_ids, second.prompt_ids):
        return False
    for mine, theirs in zip(first.images, second.images, strict=True):
        if mine is None or theirs is None or mine.fields.keys() != theirs.fields.keys():
            return mine is theirs
        for name, value in mine.fields.items():
            other = theirs.fields[name]
            if value.shape != other.shape or not torch.allclose(value.double(), other.double(), atol=1e-5):
                return False
    return True


def _trial_prompts(host: HostTrainer) -> list[Any]:
    """Three prompts with images, two of them equal: of the dataset if its first rows have images, else noise."""
    found: list[Any] = []
    dataset = host.train_dataset
    if dataset is not None and not isinstance(dataset, IterableDataset):
        rows = (dataset[n] for n in range(min(_TRIAL_ROWS, len(dataset))))
        prompts = (plain_prompt(row) for row in map(host.prompts.asked_row, rows))
        found = list(islice((prompt for prompt in prompts if image_sources(prompt)), 2))
    found = found or _noise_prompts(2)
    return [found[0], found[0], found[-1]]


def _noise_prompts(count: int) -> list[Any]:
    noise = np.random.default_rng(0).integers(0, 256, (count, _TRIAL_SIDE, _TRIAL_SIDE, 3), dtype=np.uint8)
    return [
        [{"role": "user", "content": [{"type": "image", "image": Picture.fromarray(pixels)}, _WORDS]}]
        for pixels in noise
    ]


_WORDS = {"type": "text", "text": "?"}


@torch.no_grad()
def encodes_images_once(model: Any, view: View, *, half: bool) -> bool:
    """Whether a model gives the same states when features made once are handed to every row that shows an image.

    Raises:
        ModelError: it cannot read the images at all.
    """
    ids = torch.full((len(view.prompt_ids), _TRIAL_TOKENS), words(model, 1)[0], device=view.prompt_ids.device)
    mask = torch.ones_like(ids)
    with evaluation_mode(model):
        try:
            plain = view_hidden_states(model, view, ids, mask, as_features=False)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ModelError(
                f"{type(model).__name__} cannot read a prompt with an image as its processor encodes it: "
                f"{type(error).__name__}: {first_line(error)}. Does the processor belong to this model?"
            ) from error
        try:
            once = view_hidden_states(model, view, ids, mask)
        except (ValueError, RuntimeError, TypeError, AttributeError, KeyError):
            return False
    limit = _TOLERANCE_HALF if half or plain.dtype in (torch.bfloat16, torch.float16) else _TOLERANCE
    return bool((plain - once).abs().max() <= limit * plain.abs().max())


def encoding_once(host: HostTrainer, trial: Trial | None) -> frozenset[type]:
    """Model classes that take the features of each image, made once; where that is not exact it is logged."""
    if host.is_split:
        # No rank has whole weights to try it with outside of a step.
        return frozenset(map(architecture, host.loaded_models))
    if trial is None:
        return frozenset()
    able, unable = set[type](), set[type]()
    for _, model in host.named_models():
        with host.accelerator.autocast():
            exact = encodes_images_once(model, trial.of(host, model), half=host.is_half)
        (able if exact else unable).add(architecture(model))
    for kind in unable:
        logger.warning(
            f"{kind.__name__} does not take the features of an image made beforehand: every rollout encodes its images"
        )
    return frozenset(able - unable)
