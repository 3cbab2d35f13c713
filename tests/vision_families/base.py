"""What the families share: a tokenizer of a few words, and sizes of untrained models."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIDE, PATCH = 32, 8  # pixels; merged two by two, an image is four tokens
COLOURS, SHAPES = ["red", "green", "blue"], ["circle", "square"]
WORDS = ["what", "how", "many", "is", "the", *COLOURS, *SHAPES, "left", "right", "of", "answer", "box", *"0123456789"]
PAD, EOS = "<pad>", "<eos>"
PIXELS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@dataclass(frozen=True)
class Family:
    """How to make one family's models.

    Attributes:
        special (`tuple`): its special tokens; the first stands for a piece of an image.
        image_turn (`str`): what its chat template writes for an image.
        processor (callable): tokenizer -> processor.
        model (callable): (tokenizer, hidden size) -> untrained model.
        named (`dict`): the names under which its processor asks the tokenizer for special tokens.
        suffix_type (`int`): what the family's documentation says of the type of a completion token.
        unused (`tuple`): parts of names of weights that no completion depends on.
        needs_image (`bool`): whether its processor refuses prompts without one.
        shares_prompts (`bool`): whether its cache can be handed to several rollouts.
        reloads (`bool`): whether transformers reads its processor back as it was saved, without torchvision and with
            a tokenizer of words.
    """

    special: tuple[str, ...]
    image_turn: str
    processor: Callable[[Any], Any]
    model: Callable[[Any, int], Any]
    named: Mapping[str, str] = field(default_factory=dict)
    suffix_type: int = 0
    unused: tuple[str, ...] = ()
    needs_image: bool = False
    shares_prompts: bool = True
    reloads: bool = True


def tokenizer_of(family: Family) -> Any:
    special = [PAD, EOS, "<unk>", "<bos>", *family.special]
    vocabulary = {word: number for number, word in enumerate([*special, *WORDS, ":"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(word, special=True, lstrip=True, rstrip=True) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token="<unk>",
        bos_token="<bos>",
        extra_special_tokens=dict(family.named),
        padding_side="left",
        model_max_length=2048,
        chat_template=_TEMPLATE.replace("IMAGE", family.image_turn),
    )


_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def text(tokenizer: Any, hidden: int, *leave_out: str, **more: Any) -> dict[str, Any]:
    """Sizes of a language model."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": hidden // 2,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        **more,
    }
    return {name: value for name, value in sizes.items() if name not in leave_out}


def vision(**more: Any) -> dict[str, Any]:
    """Sizes of a vision tower."""
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        **more,
    }


def token_id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))
