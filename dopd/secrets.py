"""Values that are secret by name, here or in the environment: they are used, and written nowhere."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

_WORDS = ("api_key", "apikey", "access_key", "private_key", "password", "passwd", "passphrase", "secret", "credential")
_ENDS = re.compile(r"(.*[_-])?(token|auth|oauth|webhook|webhook_url)|.+[_-](pat|pwd)")
_ENDS_IN_ENVIRONMENT = ("_pass", "_key")  # a setting may be called `second_pass`
# Of an address: what stands between `//` and `@`, with a colon in it, is a name and a password.
_IN_ADDRESS = re.compile(r"(?<=://)[^\s/@:'\"]*:([^\s/'\"]+)@")
# Hosts of code and packages take a token in the place of the name, without a colon.
_NAME_IN_ADDRESS = re.compile(r"(https?://)([^\s/@:'\"]+)@", re.IGNORECASE)
_LIKE_A_TOKEN = re.compile(r"(?=.*\d)(?=.*[A-Za-z]).{16,}")  # a name of the environment that is shorter is a word
_SHORTEST = 8  # characters of a value of the environment; a shorter one would be found in ordinary text
_TOKENS_OF_TEXT = ("eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "video", "audio")


def is_secret(name: str) -> bool:
    """Whether a key names something that must not be written down, such as `hub_token`; tokens of text are none."""
    lowered = name.lower()
    if lowered.endswith("_token") and lowered.startswith(_TOKENS_OF_TEXT):
        return False
    return _ENDS.fullmatch(lowered) is not None or any(word in lowered for word in _WORDS)


def is_secret_variable(name: str) -> bool:
    """Whether a variable of the environment of that name has a value that is kept out of what is written."""
    return is_secret(name) or name.lower().endswith(_ENDS_IN_ENVIRONMENT)


def without_secrets(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with `None` in the place of every secret at any depth, and texts `without_tokens`."""
    return {
        name: (None if value is not None and not isinstance(value, bool) and is_secret(str(name)) else _inside(value))
        for name, value in values.items()
    }


def _inside(value: Any) -> Any:
    if isinstance(value, Mapping):
        return without_secrets(value)
    if isinstance(value, str):
        return without_tokens(value)
    return [_inside(entry) for entry in value] if isinstance(value, list) else value


def without_tokens(text: str) -> str:
    """Text with `<NAME>` in the place of every value of the environment that is secret by name, or is a password in an
    address there, and `<user>@` in that of the name and the password, or the token, of an address.
    """
    for value, name in _in_environment():
        text = text.replace(value, f"<{name}>")
    return _NAME_IN_ADDRESS.sub(r"\1<user>@", _IN_ADDRESS.sub("<user>@", text))


def content_without_tokens(content: bytes) -> bytes:
    """A file's content with `<NAME>` as in `without_tokens`, also where a value is written as JSON has it."""
    for value, name in _in_environment():
        for written in {value, json.dumps(value)[1:-1]}:
            content = content.replace(written.encode(errors="surrogateescape"), f"<{name}>".encode())
    return content


def _in_environment() -> Iterator[tuple[str, str]]:
    """Secret values and the names of their variables, longer ones first: one may be a part of another."""
    found: dict[str, str] = {}
    for name, value in os.environ.items():
        label = re.sub(r"\W", "_", name)
        for password in _IN_ADDRESS.findall(value):
            found |= {password: label, unquote(password): label}
        for _, token in _NAME_IN_ADDRESS.findall(value):
            found |= {token: label, unquote(token): label} if _LIKE_A_TOKEN.fullmatch(token) else {}
        if is_secret_variable(name) and not os.path.exists(value):
            found[value] = label
    yield from sorted(((v, n) for v, n in found.items() if len(v) >= _SHORTEST), key=lambda pair: -len(pair[0]))
