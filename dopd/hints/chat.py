"""Requests and replies of `POST /v1/chat/completions`, as OpenAI and others speak it, and what they cost."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dopd.data.blocks import blocks_of, image_in, is_image
from dopd.data.images import open_image
from dopd.data.views import Conversation, Prompt
from dopd.errors import ConfigError, DataError, ServerError
from dopd.hints.journal import Reply
from dopd.servers import contract
from dopd.servers.client import Client, Json, PassingError

CHAT = "/v1/chat/completions"
Request = dict[str, Any]


@dataclass(frozen=True)
class Prices:
    """What tokens cost, in whatever currency, for a million of them."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


def request(model: str, text: str, images: Sequence[Any], settings: Mapping[str, Any]) -> Request:
    """A request with one user's turn; settings that are null are left out."""
    content: Any = text
    if images:
        blocks = [{"type": "image_url", "image_url": {"url": _data_uri(image)}} for image in images]
        content = [*blocks, {"type": "text", "text": text}]
    return with_settings(model, [{"role": "user", "content": content}], settings)


def with_settings(model: str, messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Request:
    """A request with a conversation; settings that are null are left out."""
    body = {"model": model, "messages": list(messages), **settings}
    return {name: value for name, value in body.items() if value is not None}


def text_in(body: Request) -> str:
    """The text of the user's turn in a request."""
    return "".join(block["text"] for block in _blocks(body) if block["type"] == "text")


def pictures_in(body: Request) -> list[str]:
    """The pictures of the user's turn in a request, as data URIs."""
    return [block["image_url"]["url"] for block in _blocks(body) if block["type"] == "image_url"]


def _blocks(body: Request) -> list[dict[str, Any]]:
    content = body["messages"][0]["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def conversation(model: str, prompt: Prompt, settings: Mapping[str, Any]) -> Request:
    """A request with the turns of a row's prompt, pictures in their places, and what the row tells its template.

    Raises:
        DataError: a prompt that is text, which a server cannot go on with here; a picture that cannot be opened.
    """
    if isinstance(prompt, str):
        raise DataError("a prompt is text, and a server is asked conversations: give turns, or leave prompt_format out")
    messages = [
        {**turn, "content": [_block(block) for block in turn["content"]]} if blocks_of(turn) else dict(turn)
        for turn in prompt
    ]
    options = dict(prompt.options) if isinstance(prompt, Conversation) else {}
    tools = {name: options.pop(name) for name in ("tools",) if options.get(name)}
    for_template = {**(settings.get("chat_template_kwargs") or {}), **options}
    own = tools | ({"chat_template_kwargs": for_template} if options else {})
    return with_settings(model, messages, {**settings, **own})


def _block(block: Mapping[str, Any]) -> dict[str, Any]:
    if is_image(block):
        return {"type": "image_url", "image_url": {"url": _data_uri(image_in(block))}}
    return dict(block)


def _data_uri(source: Any) -> str:
    """A picture as PNG, with the pixels that boxes are counted in."""
    buffer = io.BytesIO()
    open_image(source).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def read(reply: Json) -> Reply:
    """The answer in a reply.

    Raises:
        PassingError: a reply without its main part.
        ServerError: a reply with an error in it.
    """
    if isinstance(reply.get("error"), Mapping):
        raise ServerError(f"the server replies with an error: {reply['error']}")
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise PassingError("the reply has no choices")
    message = choices[0].get("message")
    if not isinstance(message, Mapping):
        raise PassingError("the reply has no message")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    refusal = message.get("refusal")
    usage = reply.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    counts = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    if refusal and not content:
        return Reply(str(refusal), "refused", *counts)
    return Reply(str(content or ""), str(choices[0].get("finish_reason") or "stop"), *counts)


def _count(value: object) -> int:
    """A number of tokens; -1 where the server does not say it."""
    return value if isinstance(value, int) and value >= 0 else -1


def most_tokens(body: Request) -> int:
    """Tokens that a prompt can have at most: a tokenizer of bytes has no token of less than one; images count 4096."""
    total = 0
    for message in body["messages"]:
        content = message["content"] or ""
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        total += 64 + sum(len(b["text"].encode()) if b["type"] == "text" else 4096 for b in blocks)
    return total


def served_model(client: Client, wanted: str | None) -> str:
    """The name of the model to ask for: the given one, or the only one that the server lists.

    Raises:
        ConfigError: it has several, or none.
        ServerError: it does not answer.
    """
    if wanted is not None:
        return wanted
    listed = client.get(client.urls[0], contract.MODELS).get("data")
    entries = listed if isinstance(listed, list) else []
    names = [str(one["id"]) for one in entries if isinstance(one, Mapping) and "id" in one]
    if len(names) != 1:
        raise ConfigError(
            f"{client.urls[0]} has {len(names)} models ({', '.join(names[:8]) or 'none'}): name one with "
            "--writer-model (of a judge: --judge-model; of dopd eval: NAME=URL)"
        )
    return names[0]
