"""The outcomes of a step: which tokens of a model can be sampled and scored beside another model.

Checkpoints of one tokenizer may have matrices of different sizes: Qwen2.5 models of 0.5B to 3B parameters have 151,936
rows, those of 7B to 72B have 152,064, for 151,665 tokens. The rows behind the last token are padding. Both models are
then read over the ids that both have, and what lies beyond carries no probability on either side.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dopd.errors import ModelError
from dopd.vision.tokens import placeholder_ids


def check_has_words(tokenizer: Any) -> None:
    """Raise `ModelError` for the tokenizer that transformers makes of a folder without one: it knows special tokens
    alone.
    """
    words = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
    if len(words - set(tokenizer.all_special_tokens)) <= 1:  # T5's has the mark of a new word
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path!r} knows no word: there are no files of one, and transformers "
            "makes an empty one in their place. Save it beside the model (tokenizer.save_pretrained), or name a folder "
            "that has it"
        )


def vocab_size_of(model: Any) -> int:
    """Rows of a model's output embedding, as its configuration declares them."""
    size: int = model.config.get_text_config().vocab_size
    return size


def shared_vocab_size(models: Iterable[Any]) -> int:
    """How many ids, from 0 on, every one of some models has."""
    return min(map(vocab_size_of, models))


def unscored_ids(model: Any, vocab_size: int | None = None) -> list[int]:
    """Tokens of a model that are neither sampled nor scored: those that stand for a piece of an image, and ids that the
    other model does not have.

    Args:
        vocab_size (`int`, *optional*): ids that both models have.
    """
    own = vocab_size_of(model)
    return sorted({*placeholder_ids(model.config), *range(own if vocab_size is None else vocab_size, own)})


@contextmanager
def declares(model: Any, vocab_size: int | None) -> Iterator[None]:
    """Inside, a model's configuration declares another size than it has, for a host that compares declared sizes.

    Args:
        vocab_size (`int`, *optional*): `None` leaves it as it is.
    """
    if model is None or vocab_size is None:
        yield
        return
    config = model.config.get_text_config()
    own, config.vocab_size = config.vocab_size, vocab_size
    try:
        yield
    finally:
        config.vocab_size = own
