"""The privileged view of a prompt: the same prompt with p in it, for the teacher and the privileged student alone."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dopd.errors import ConfigError, DataError

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
