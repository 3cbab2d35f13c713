"""What answers are drawn from: a complete configuration, of which nothing is a checkpoint's own; and what ends them.

`generate` fills every setting that it is not given from the checkpoint's `generation_config.json` (`top_p`, `top_k`, a
repetition penalty, ...). An answer drawn that way comes from another distribution than the one that is scored.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from dopd.adapters import has_adapters
from dopd.errors import ConfigError, ModelError
from dopd.vocabulary import vocab_size_of

_ENDS = "stop_strings"  # read into `Ending`


@dataclass(frozen=True)
class Ending:
    """What ends an answer.

    Attributes:
        token_ids (`list[int]`): end-of-sequence tokens; the first one belongs to the answer, nothing behind it does.
        strings (`tuple[str, ...]`): texts that end it as well; the token that completes one is the answer's last.
        tokenizer: reads tokens as text, where there are `strings`.
    """

    token_ids: Sequence[int]
    strings: Sequence[str] = ()
    tokenizer: Any = None

    def cut(self, ids: list[int]) -> list[int]:
        """An answer up to and with what ends it; the whole of it where nothing does."""
        places = [place for place, token in enumerate(ids) if token in self.token_ids]
        ids = ids[: places[0] + 1] if places else ids
        counts = range(1, len(ids) + 1) if self.strings else ()
        return next((ids[:count] for count in counts if self.stops_behind(ids[:count])), ids)

    def cut_all(self, answers: Iterable[list[int]]) -> list[list[int]]:
        """`cut` of every answer."""
        return [self.cut(ids) for ids in answers]

    def ended(self, ids: Sequence[int]) -> bool:
        """Whether an answer that was cut here ended by itself, and not at the length limit."""
        return bool(ids) and (ids[-1] in self.token_ids or self.stops_behind(ids))

    def ends_of(self, answers: Iterable[Sequence[int]]) -> list[bool]:
        """`ended` of every answer."""
        return [self.ended(ids) for ids in answers]

    def stops_behind(self, ids: Sequence[int]) -> bool:
        """Whether the last token completes one of the texts that end an answer."""
        if not self.strings:
            return False
        # A character takes at most four tokens, so the rest cannot belong to the text that the last token completes.
        window = ids[-4 * max(map(len, self.strings)) :]
        return any(string in self.tokenizer.decode(list(window)) for string in self.strings)


def declared_ends(model: Any) -> list[int]:
    """The tokens that end an answer by a model's generation config.

    Raises:
        ModelError: it names something else than token ids.
    """
    declared = model.generation_config.eos_token_id
    ids = [] if declared is None else list(declared) if isinstance(declared, list | tuple) else [declared]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ModelError(
            f"eos_token_id (={declared!r}) in the generation config of {type(model).__name__} must be the id of a "
            "token, or a list of ids: correct it in generation_config.json, or in config.json if there is none"
        )
    return ids


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, and those of the model's generation config. A tokenizer without
    a padding token gets the first of them as one.

    Raises:
        ModelError: neither names any, the model names something else than token ids, or one of them, or the padding
            token, which is in every batch, is not in the model's vocabulary.
    """
    ids = declared_ends(model)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids = [tokenizer.eos_token_id, *ids]
    if not ids:
        raise ModelError(
            f"no token ends an answer: neither the tokenizer nor the generation config of {type(model).__name__} names "
            "an end-of-sequence token. Set tokenizer.eos_token, and save the tokenizer with the model"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(ids[0])
    size = vocab_size_of(model)
    outside = [f"end-of-sequence token (id {number})" for number in ids if not 0 <= number < size]
    if tokenizer.pad_token_id is None or not 0 <= tokenizer.pad_token_id < size:
        outside.append(f"pad_token (id {tokenizer.pad_token_id})")
    if outside:
        raise ModelError(
            f"{outside[0]} is outside of the model's vocabulary of {size} tokens. Set those of the "
            "tokenizer (tokenizer_config.json), and eos_token_id in generation_config.json to tokens that it has, or "
            "call model.resize_token_embeddings(len(tokenizer)) for student and teacher and save them"
        )
    return ids


def mend_generation_config(model: Any) -> str | None:
    """Make a model's generation config one that transformers saves. It loads contradictory ones (a `temperature`
    without `do_sample`, as Llama 2's), and refuses to write them when a run has been trained.

    Returns:
        What was changed, in a sentence; `None` where nothing had to be.
    """
    declared = model.generation_config
    ends = {name: getattr(declared, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id", _ENDS)}
    sampling = GenerationConfig.from_dict({**declared.to_dict(), "do_sample": True})
    for config, change in (
        (declared, None),
        (sampling, "do_sample=True, without which it contradicts itself"),
        (GenerationConfig(**ends), "nothing but its special tokens and stop strings, for it contradicts itself"),
    ):
        try:
            config.validate(strict=True)
        except ValueError:
            continue
        model.generation_config = config
        return change and f"the student's generation_config.json will be saved with {change}"
    return None


class _StopAtText(StoppingCriteria):
    # transformers' own criterion cannot read word-level vocabularies, and would have to agree with `Ending.cut`.
    def __init__(self, ending: Ending, prompt_width: int) -> None:
        self._ending, self._start = ending, prompt_width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        rows = input_ids[:, self._start :].tolist()
        return torch.tensor([self._ending.stops_behind(ids) for ids in rows], device=input_ids.device)


def declared_stop_strings(model: Any, generation_kwargs: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Texts that end an answer: those of `generation_kwargs`, or those that the checkpoint declares."""
    return stop_strings_in(generation_kwargs or {}) or stop_strings_in(vars(model.generation_config))


def stop_strings_in(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Texts that end an answer, by the fields of a `GenerationConfig`."""
    value = settings.get(_ENDS)
    if value is None:
        return ()
    strings = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(string, str) and string for string in strings):
        raise ConfigError(f"stop_strings (={value!r}) must be texts that are not empty")
    return strings


def sampling_config(
    ending: Ending,
    *,
    max_new_tokens: int,
    pad_token_id: int,
    sampled: bool,
    temperature: float = 1.0,
    suppressed: Sequence[int] = (),
    **more: Any,
) -> GenerationConfig:
    """A configuration of `generate` for plain samples, or for the likeliest tokens.

    Args:
        ending (`Ending`): of the answers.
        max_new_tokens (`int`): most tokens of an answer.
        sampled (`bool`): draw tokens at `temperature`; else take the likeliest.
        suppressed (`list[int]`): tokens that are never drawn.
        more: further fields of transformers' `GenerationConfig`.
    """
    fields: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": sampled,
        "num_beams": 1,
        "pad_token_id": pad_token_id,
        "eos_token_id": list(ending.token_ids),
        "suppress_tokens": list(suppressed) or None,
        "disable_compile": True,
    }
    if sampled:
        fields |= {"temperature": temperature, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}
    return GenerationConfig(**fields | more)


@contextmanager
def nothing_of_the_checkpoint(model: Any) -> Iterator[None]:
    """Inside, `generate` finds a generation config without settings on the model, and can fill in none of them."""
    owners = [model, model.get_base_model()] if has_adapters(model) else [model]
    owned = [(owner, vars(owner)["generation_config"]) for owner in owners if "generation_config" in vars(owner)]
    for owner, _ in owned:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in owned:
            owner.generation_config = config


@torch.no_grad()
def drawn(model: Any, inputs: Mapping[str, Any], config: GenerationConfig, ending: Ending) -> list[list[int]]:
    """Token ids of one answer for each row of `inputs`, up to and with what ends it.

    Args:
        model: an unwrapped transformers model with whole parameters, in evaluation mode.
        inputs (`dict`): arguments of `generate`; `input_ids` (B, P) padded on the left.
        config (`GenerationConfig`): of `sampling_config`.

    Raises:
        ModelError: a prompt holds a token that the model has no embedding for.
    """
    check_ids(inputs["input_ids"], model)
    width = inputs["input_ids"].shape[1]
    criteria = StoppingCriteriaList([_StopAtText(ending, width)] if ending.strings else [])
    with nothing_of_the_checkpoint(model):
        sequences = model.generate(**inputs, generation_config=config, stopping_criteria=criteria)
    return ending.cut_all(sequences[:, width:].tolist())


def check_ids(ids: Tensor, model: Any) -> None:
    """Raise `ModelError` for a token id outside of a model's vocabulary: a GPU would say so with a device assert."""
    size = vocab_size_of(model)
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= size:
        raise ModelError(
            f"token {largest} is outside of the vocabulary of {type(model).__name__}, which has {size} tokens: tokens "
            "were added to the tokenizer and the model was not resized. Call "
            "model.resize_token_embeddings(len(tokenizer)) for student and teacher, and save them"
        )
