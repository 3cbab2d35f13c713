"""From a row of a dataset to the prompts that models read: plain, and privileged; images in their places.

A prompt with images is a conversation whose image blocks hold what the dataset holds (a path, bytes, a PIL image); it
is opened where it is encoded. The privileged view of a prompt is the same prompt with p in it, for the teacher and the
privileged student alone.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dopd.data.blocks import blocks_of, check_blocks, image_in, is_image, place_images
from dopd.data.images import COLUMNS, PRIVILEGED_COLUMN, blank_like, is_array, open_image
from dopd.data.turns import as_turns
from dopd.errors import ConfigError, DataError

TOOLS_COLUMN, TEMPLATE_COLUMN = "tools", "chat_template_kwargs"
# Arguments of `apply_chat_template` that this project gives itself.
RESERVED_OPTIONS = (
    "add_generation_prompt",
    "conversation",
    "max_length",
    "padding",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
)
# A chat model answers the last user turn, so p goes below the question there, named for what it is.
DEFAULT_CHAT_TEMPLATE = (
    "{prompt}\n\nPrivileged information (not part of the question, and not available when the answer is judged):\n"
    "{privileged_context}\n\nAnswer the question above in your own words, from the beginning."
)
# A plain-text completion goes on exactly where the prompt stops, so p must come before it.
DEFAULT_TEXT_TEMPLATE = "{privileged_context}\n\n{prompt}"


class Conversation(list[dict[str, Any]]):
    """Turns of a row that tells its chat template something of its own.

    Attributes:
        options (`dict`): arguments of `apply_chat_template`, such as `tools`.
    """

    def __init__(self, turns: Iterable[dict[str, Any]], options: Mapping[str, Any]) -> None:
        super().__init__(turns)
        self.options = dict(options)

    def __eq__(self, other: object) -> bool:
        return list.__eq__(self, other) and self.options == getattr(other, "options", {})

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


def is_blank(text: str | None) -> bool:
    """Whether a text is missing or has nothing to see: spaces, control characters, marks of byte order and width."""
    return text is None or all(one.isspace() or unicodedata.category(one) in ("Cc", "Cf") for one in text)


Prompt = str | list[dict[str, Any]]  # a conversation, where it is no text


def with_turns(prompt: Prompt, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Other turns in the place of a conversation's, with the options of its chat template kept."""
    return Conversation(turns, prompt.options) if isinstance(prompt, Conversation) else turns


_FIELDS = ("prompt", "privileged_context")
_PLACES = r"\{prompt\}|\{privileged_context\}"
# A field of Python's format strings; what LaTeX has in braces (`\\boxed{answer}`, `x_{max}`) is none.
_FIELD = re.compile(r"(?<![\w}{^\\])\{([A-Za-z_]\w+|\d+)\}(?!\})")


@dataclass(frozen=True)
class PrivilegedTemplate:
    """Where p goes. Generation prompt, system turns and chat-template arguments stay those of the plain view.

    Attributes:
        template (`str`, *optional*): text with `{prompt}` and `{privileged_context}`, each exactly once. In a
            conversation `{prompt}` is the text of the last user turn. `None` takes the default for the kind of prompt.

    Raises:
        ConfigError: a field of the template is missing or doubled.
    """

    template: str | None = None

    def __post_init__(self) -> None:
        for name in _FIELDS if self.template is not None else ():
            count = str(self.template).count("{" + name + "}")
            if count != 1:
                raise ConfigError(
                    f"privileged_template (={self.template!r}) must contain {{{name}}} exactly once, it has it {count} "
                    "times. Example: '{prompt}\\n\\nHint: {privileged_context}'"
                )

        unread = [name for name in _FIELD.findall(self.template or "") if name not in _FIELDS]
        if unread:
            raise ConfigError(
                f"privileged_template (={self.template!r}): {{{unread[0]}}} is filled in by nothing; its fields are "
                "{prompt} and {privileged_context}. Braces of a text that is meant so are written with a space inside: "
                f"{{ {unread[0]} }}"
            )

    def apply(self, prompt: Prompt, privileged_context: str | None, privileged_images: Sequence[Any] = ()) -> Prompt:
        """The prompt with p in it; the prompt itself, unchanged, where p is missing or blank.

        Args:
            prompt (`str` or `list[dict]`): text, or a conversation with string or block contents.
            privileged_context (`str`, *optional*): the text of p.
            privileged_images (`list`): the images of p, which come before the text of the last user turn.

        Raises:
            DataError: a conversation without a user turn, a user turn without text, or images for a text prompt.
        """
        blank = is_blank(privileged_context)
        if blank and not privileged_images:
            return prompt
        if isinstance(prompt, str):
            if privileged_images:
                raise DataError("privileged_images need a conversation as prompt: a text has no place for images")
            return self._fill(self.template or DEFAULT_TEXT_TEMPLATE, prompt, str(privileged_context))
        messages = list(prompt)
        last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last_user is None:
            raise DataError(
                "prompt: a conversation without a user turn has no place for privileged_context; roles: "
                + ", ".join(str(message["role"]) for message in messages)
            )
        message = messages[last_user]
        content = message["content"]
        if not blank:
            content = self._fill_content(self.template or DEFAULT_CHAT_TEMPLATE, content, str(privileged_context))
        if privileged_images:
            content = _with_privileged_images(content, privileged_images)
        messages[last_user] = {**message, "content": content}
        return with_turns(prompt, messages)

    def own_texts(self, prompt: Prompt) -> list[str]:
        """The words of the template around the prompt and p."""
        template = self.template or (DEFAULT_TEXT_TEMPLATE if isinstance(prompt, str) else DEFAULT_CHAT_TEMPLATE)
        return [text for text in re.split(_PLACES, template) if text.strip()]

    def _fill_content(self, template: str, content: Any, privileged_context: str) -> Any:
        if isinstance(content, str):
            return self._fill(template, content, privileged_context)
        blocks, last = list(content), _last_text(content)
        blocks[last] = {**blocks[last], "text": self._fill(template, blocks[last]["text"], privileged_context)}
        return blocks

    @staticmethod
    def _fill(template: str, prompt: str, privileged_context: str) -> str:
        # One pass: braces inside the prompt or inside p are text, never fields.
        values = {"{prompt}": prompt, "{privileged_context}": privileged_context}
        return re.sub(_PLACES, lambda match: values[match.group()], template)


def _last_text(content: Sequence[Mapping[str, Any]]) -> int:
    texts = [i for i, block in enumerate(content) if block.get("type") == "text"]
    if not texts:
        raise DataError("prompt: the last user turn has no text block, so privileged information has no place in it")
    return texts[-1]


def _with_privileged_images(content: Any, images: Sequence[Any]) -> list[dict[str, Any]]:
    """Behind the images of the plain prompt, so that what both views share comes first."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    last = _last_text(blocks)
    return [*blocks[:last], *({"type": "image", "image": image} for image in images), *blocks[last:]]


def plain_prompt(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row with its images, if it has any, and its own template options: what the student reads.

    Raises:
        DataError: a prompt that is neither text nor turns; images without a conversation to put them in, or not as many
            as the conversation has places for; tools that cannot be read.
    """
    prompt = with_images(_without_empty_fields(row["prompt"]), images_of(row))
    options = row_options(row)
    if not options:
        return prompt
    if isinstance(prompt, str):
        raise DataError(f"column {next(iter(options))!r}: a text prompt has no chat template to read it")
    return Conversation(prompt, options)


def plain_prompts(rows: Sequence[Mapping[str, Any]]) -> list[Prompt]:
    """`plain_prompt` of every row."""
    return [plain_prompt(row) for row in rows]


def row_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row tells its chat template: the columns `tools` and `chat_template_kwargs`, in TRL's words.

    Raises:
        DataError: tools that are no list of schemas (or its JSON), or arguments that are no mapping.
    """
    options = _row_value(row, TEMPLATE_COLUMN, dict) or {}
    forbidden = sorted(set(options) & set(RESERVED_OPTIONS))
    if forbidden:
        raise DataError(f"column {TEMPLATE_COLUMN!r}: {forbidden[0]} cannot be set there")
    if "chat_template" in options:  # what would be markup is looked for in one template
        raise DataError(
            f"column {TEMPLATE_COLUMN!r}: a row has no chat_template of its own. Set one for the run "
            "(chat_template_kwargs={'chat_template': ...} in a config), which may read what rows tell it"
        )
    tools = _row_value(row, TOOLS_COLUMN, list)
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"column {TOOLS_COLUMN!r}: {str(tool)[:60]!r} is no schema of a function: expected {{'type': "
                "'function', 'function': {'name': ..., 'parameters': ...}}"
            )
    return {**options, **({"tools": tools} if tools else {})}


def _row_value(row: Mapping[str, Any], column: str, kind: type) -> Any:
    value = row.get(column)
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"column {column!r} is text that is not JSON: {error}") from None
    if value is not None and not isinstance(value, kind):
        raise DataError(f"column {column!r} must be a {kind.__name__} or its JSON, got {type(value).__name__}")
    return _without_none(value)


def _without_none(value: Any) -> Any:
    """Datasets give every row the fields of all rows, None where a row has none: its schema did not say so."""
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _without_empty_fields(prompt: Any) -> Any:
    """The prompt without what a dataset's schema added to its turns, blocks and tool calls."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise DataError(
            f"column 'prompt' (={prompt!r:.80}): expected text, or a list of messages with 'role' and 'content'"
        )
    # A turn's own content may be None, beside a tool call.
    own = [{"content": None} if turn.get("content", "") is None else {} for turn in prompt]
    turns = [{**_without_none(turn), **kept} for turn, kept in zip(prompt, own, strict=True)]
    return prompt if turns == prompt else with_turns(prompt, turns)


def as_conversation(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a text prompt as a user's turn."""
    return {**row, "prompt": as_turns(row["prompt"])} if isinstance(row["prompt"], str) else row


def as_conversations(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`as_conversation` of every row."""
    return [as_conversation(dict(row)) for row in rows]


def privileged_prompt(row: Mapping[str, Any], template: PrivilegedTemplate) -> Prompt:
    """The plain prompt with p in it: its text, its images, or both. The plain prompt where p is missing."""
    return template.apply(plain_prompt(row), row.get("privileged_context"), images_of(row, (PRIVILEGED_COLUMN,)))


def privileged_prompts(rows: Sequence[Mapping[str, Any]], template: PrivilegedTemplate) -> list[Prompt]:
    """`privileged_prompt` of every row."""
    return [privileged_prompt(row, template) for row in rows]


def without_question(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row without what is asked, its images included: of a conversation the system's turns and an empty last turn
    of the user's are left, in which its privileged context has its place.
    """
    prompt = row["prompt"]
    emptied: Prompt = ""
    if not isinstance(prompt, str):
        system = [turn for turn in prompt if turn["role"] == "system"]
        emptied = with_turns(prompt, [*system, {"role": "user", "content": ""}])
    return {**row, **dict.fromkeys(COLUMNS), "prompt": emptied}


def lacks_privileged(row: Mapping[str, Any]) -> bool:
    """Whether a row has neither privileged text nor privileged images."""
    return is_blank(row.get("privileged_context")) and not images_of(row, (PRIVILEGED_COLUMN,))


def lacking_privileged(rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    """`lacks_privileged` of every row."""
    return [lacks_privileged(row) for row in rows]


def with_images(prompt: Prompt, images: Sequence[Any]) -> Prompt:
    """A conversation with images in its places: its `{"type": "image"}` blocks, or before the first user turn's text.

    Raises:
        DataError: the prompt is text, or has places for another number of images.
    """
    if isinstance(prompt, str):
        if images:
            raise DataError("images need a conversation as prompt: [{'role': 'user', 'content': ...}]")
        return prompt
    if not images and all(isinstance(message.get("content"), str) for message in prompt):
        return prompt
    check_blocks(prompt)
    pictures = [block for message in prompt for block in blocks_of(message) if is_image(block)]
    places = [block for block in pictures if image_in(block) is None]
    if not images and not pictures:
        return prompt
    if images and pictures and not places:
        raise DataError(
            f"the row has {len(images)} images and its conversation holds its own: leave the image column out, or "
            "the images in the conversation"
        )
    if not pictures:
        return _images_first(prompt, images)
    rest = place_images(places, images)
    return _map_blocks(prompt, lambda block: _filled(block, rest) if is_image(block) else block)


def with_blank_images(prompt: Prompt) -> Prompt:
    """The prompt with grey images of the same sizes in place of its own: the control that reads off no image."""
    if isinstance(prompt, str):
        return prompt
    return _map_blocks(
        prompt,
        lambda block: {"type": "image", "image": blank_like(open_image(image_in(block)))} if is_image(block) else block,
    )


def _filled(block: Mapping[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    own = image_in(block)
    return {"type": "image", "image": next(images) if own is None else own}


def _map_blocks(prompt: list[dict[str, Any]], change: Callable[[Any], Any]) -> list[dict[str, Any]]:
    turns = [
        {**message, "content": [change(block) for block in message["content"]]} if blocks_of(message) else message
        for message in prompt
    ]
    return with_turns(prompt, turns)


def _images_first(prompt: list[dict[str, Any]], images: Sequence[Any]) -> list[dict[str, Any]]:
    messages = list(prompt)
    first = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise DataError("prompt: a conversation without a user turn has no place for images")
    content = messages[first]["content"]
    text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    places = [{"type": "image", "image": image} for image in images]
    messages[first] = {**messages[first], "content": [*places, *text]}
    return with_turns(prompt, messages)


def images_of(row: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> list[Any]:
    """What a row has in its image columns, one entry per image, not opened; empty for a row without images.

    Raises:
        DataError: two of the columns hold something, of which only one could be read.
    """
    filled = {}
    for column in columns:
        value = row.get(column)
        entries = value if isinstance(value, list | tuple) and not is_array(value) else [value]
        found = [entry for entry in entries if entry is not None and not _is_blank(entry)]
        if found:
            filled[column] = found
    if len(filled) > 1:
        raise DataError(
            f"columns {' and '.join(map(repr, filled))} both hold pictures, and only one of them can be read: put all "
            "pictures of a row into one column (remove_columns takes the other away)"
        )
    return next(iter(filled.values()), [])


def _is_blank(entry: Any) -> bool:
    """Whether a text says that there is no picture, as a CSV file does."""
    return isinstance(entry, str) and not entry.strip()
