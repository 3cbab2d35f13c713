"""What servers are asked before the first step: which model they serve, and whether token ids mean the same there."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from dopd.errors import ConfigError, ModelError, ServerError
from dopd.servers import contract
from dopd.servers.client import Client
from dopd.servers.teacher import Introduction, ServedTeacher

_TRIED = 64  # tokens of the vocabulary, spread over it
_OTHER_TOKENIZER = 0.1  # share of them that may be written otherwise: tokenizers write white space in several ways
_OTHER_WEIGHTS = 0.1  # nats, the median difference of two servers: rounding on other hardware stays far below


def introduced(client: Client, wanted: str | None) -> Introduction:
    """Ask every server which models it has; each is asked once.

    Args:
        client (`Client`): the servers.
        wanted (`str`, *optional*): the name of the model; the only one that a server has if left out.

    Raises:
        ServerError: an address that does not answer as a model server.
        ConfigError: a server that has no such model.
    """
    found = [_introduced(client, url, wanted) for url in client.urls]
    names = sorted({one.model for one in found})
    if len(names) > 1:
        raise ConfigError(
            f"teacher_server: the servers have several models ({', '.join(names)}): name the teacher with "
            "teacher_server_model"
        )
    contexts = [one.context for one in found if one.context is not None]
    return Introduction(names[0], min(contexts, default=None))


def _introduced(client: Client, url: str, wanted: str | None) -> Introduction:
    try:
        reply = client.get(url, contract.MODELS)
    except ServerError as error:
        raise ServerError(f"teacher_server (={url!r}): {error}") from error
    listed = reply.get("data")
    entries = listed if isinstance(listed, list) else []
    models = {str(one["id"]): one for one in entries if isinstance(one, Mapping) and "id" in one}
    shown = ", ".join(map(repr, models)) or "none"
    if wanted is None and len(models) != 1:
        raise ConfigError(
            f"teacher_server (={url!r}) has {len(models)} models ({shown}): name the teacher with teacher_server_model"
        )
    if wanted is not None and wanted not in models:
        raise ConfigError(f"teacher_server_model (={wanted!r}) is not served at {url}, which has {shown}")
    name = next(iter(models)) if wanted is None else wanted
    context = models[name].get("max_model_len")
    return Introduction(name, context if isinstance(context, int) and context > 0 else None)


@dataclass(frozen=True)
class Tried:
    """Tokens from all over a vocabulary, as the teacher on a server reads them.

    Attributes:
        ids (`list[int]`): the tokens.
        logprobs (`list[float]`): the teacher's, of all but the first one, nats.
        notes (`list[str]`): what could not be compared, a sentence each.
    """

    ids: list[int]
    logprobs: list[float]
    notes: list[str]


def check_tokens(teacher: ServedTeacher, tokenizer: Any) -> Tried:
    """Have every server score tokens from all over the student's vocabulary, and compare what it takes them for.

    Args:
        teacher (`ServedTeacher`): on the servers.
        tokenizer: the student's.

    Raises:
        ConfigError: a server that does not score prompts, or not as many tokens as are asked for.
        ModelError: token ids mean something else there, or two servers have different weights.
    """
    ids = _spread(tokenizer)
    found = []
    for url in teacher.client.urls:
        try:
            found.append(teacher.ask(ids, 1, url=url))
        except ServerError as error:
            asked = f" (asked for the {teacher.top_k} most probable tokens)" if teacher.top_k else ""
            raise ConfigError(
                f"teacher_server (={url!r}) cannot score a prompt{asked}: {error}. Start it with vllm serve MODEL "
                "--max-logprobs -1"
            ) from error
    for url, scored in zip(teacher.client.urls, found, strict=True):
        apart = median(abs(mine - first) for mine, first in zip(scored.logprobs, found[0].logprobs, strict=True))
        if not apart <= _OTHER_WEIGHTS:
            raise ModelError(
                f"teacher_server: {url} and {teacher.client.urls[0]} give one text log-probs that differ by "
                f"{apart:.2g} nats: they do not have the same weights"
            )
    return Tried(ids, found[0].logprobs, list(_compare(tokenizer, ids[1:], found[0].texts)))


def _compare(tokenizer: Any, ids: list[int], texts: list[str | None]) -> Iterator[str]:
    pairs = [(tokenizer.decode([token]).strip(), text.strip()) for token, text in zip(ids, texts, strict=True) if text]
    words = [(mine, theirs) for mine, theirs in pairs if mine.isascii() and mine.isalnum()]
    other = [(mine, theirs) for mine, theirs in words if mine != theirs]
    if len(other) > _OTHER_TOKENIZER * len(words):
        mine, theirs = other[0]
        raise ModelError(
            f"teacher_server: {len(other)} of {len(words)} tokens of the student's are other ones there, for example "
            f"{mine!r} is {theirs!r}: token ids do not mean the same. Serve a teacher with the student's tokenizer"
        )
    if not words:
        yield (
            "teacher_server: the server does not say what its tokens are, so its tokenizer is not compared with the "
            "student's: be sure that they are one"
        )


def _spread(tokenizer: Any) -> list[int]:
    """Ids from all over a vocabulary, the largest among them; the first of them is not scored."""
    ids = sorted(set(tokenizer.get_vocab().values()))
    steps = min(_TRIED, len(ids))
    return [ids[place * (len(ids) - 1) // max(steps - 1, 1)] for place in range(steps)]
