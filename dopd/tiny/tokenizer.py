"""One word-level tokenizer for the embedded text tasks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dopd.tasks import get_task
from dopd.tasks.base import EOS_WORD, PAD_WORD

SEPARATOR = ":"
# One vocabulary for these three: a student of one family can go on to the next. Another task brings another tokenizer,
# since a new word here would make every model of these anew.
TEXT_TASKS = ("dag", "graph", "program")
SPECIAL_TOKENS = (PAD_WORD, EOS_WORD, "<unk>")

# One turn is enough for the embedded tasks, but the template stays prefix-preserving for trainers that render a
# whole conversation: prompt with generation prompt + answer == conversation up to the end of sequence.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %} : {% generation %}{{ message['content'] }} <eos>{% endgeneration %}"
    "{% else %}{% if not loop.first %} {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} :{% endif %}"
)


def task_vocabulary() -> tuple[str, ...]:
    """Sorted union of the vocabularies of `TEXT_TASKS`, with the separator, without special tokens."""
    words = {SEPARATOR}
    for name in TEXT_TASKS:
        words.update(get_task(name).vocabulary())
    return tuple(sorted(words))


def build_tokenizer(words: Iterable[str] | None = None) -> PreTrainedTokenizerFast:
    """Word-level tokenizer over `words` (*optional*, defaults to `task_vocabulary()`) and `SPECIAL_TOKENS`.

    Text is words separated by single spaces; decoding joins with spaces, so encoding loses nothing. Padding is on
    the left. The chat template writes the user's text and, as generation prompt, the separator token ` :`.
    """
    vocabulary = SPECIAL_TOKENS + (task_vocabulary() if words is None else tuple(words))
    names = ["input_ids", "attention_mask"]
    return word_level(vocabulary, SPECIAL_TOKENS, model_input_names=names, chat_template=_CHAT_TEMPLATE)


def word_level(vocabulary: Sequence[str], special: Sequence[str], **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of words between single spaces, by their places in `vocabulary`, of which some are special."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True, lstrip=True, rstrip=True) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_WORD,
        eos_token=EOS_WORD,
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        **options,
    )
