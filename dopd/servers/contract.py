"""Requests and replies of `POST /v1/completions` with `prompt_logprobs`, as vLLM speaks it, and their checks.

Shapes: L tokens of a sequence, T completion tokens at its end, K listed tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dopd.errors import NotFiniteError, ServerError
from dopd.servers.client import Json, PassingError

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
WHOLE = -1  # as many listed tokens as there are
_ABOVE_ONE = 1e-3  # nats: a log-prob above 0 by more is none
_IMPOSSIBLE = -9000.0  # vLLM writes -9999 for the logarithm of 0, which JSON does not have


@dataclass(frozen=True)
class Scored:
    """What a server says of the tokens at the end of a sequence.

    Attributes:
        logprobs (`list[float]`): of the T tokens, nats.
        top (`list[list[tuple[int, float]]]`): at each of them the K most probable tokens, likeliest first: id
            and log-prob.
        texts (`list[str | None]`): each token as the server's tokenizer writes it, where it says so.
    """

    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    texts: list[str | None]


def request(model: str, ids: Sequence[int], k: int) -> dict[str, object]:
    """A request for the log-probs of a sequence at temperature 1, and of the `k` most probable tokens beside each."""
    body: dict[str, object] = {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 1.0}
    return body | {"prompt_logprobs": k}


def read(reply: Json, model: str, ids: Sequence[int], start: int, k: int) -> Scored:
    """The scores of `ids[start:]` in a reply to `request(model, ids, k)`.

    Raises:
        PassingError: a reply without its main part.
        ServerError: a reply of another model or about other tokens, or numbers that are no log-probs.
        NotFiniteError: a token with NaN or with probability 0.
    """
    if reply.get("model") != model:
        raise ServerError(f"the server answered as the model {reply.get('model')!r} and was asked for {model!r}")
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise PassingError(f"the reply has no single choice but {type(choices).__name__}")
    positions = choices[0].get("prompt_logprobs")
    if not isinstance(positions, list):
        raise ServerError(
            "the reply has no prompt_logprobs: the server is none that scores prompts (vLLM does; its caches and "
            "speculative decoding may switch it off)"
        )
    if len(positions) != len(ids):
        raise ServerError(
            f"the reply scores {len(positions)} tokens and {len(ids)} were sent: it is of another request, or the "
            "server adds or cuts tokens"
        )
    entries = [_entries(positions[place], ids[place], place) for place in range(start, len(ids))]
    logprobs = [found[token][0] for found, token in zip(entries, ids[start:], strict=True)]
    texts = [found[token][2] for found, token in zip(entries, ids[start:], strict=True)]
    return Scored(logprobs, [_top(found, k, start + n) for n, found in enumerate(entries)] if k else [], texts)


# (log-prob, rank, text) of a token
_Entry = tuple[float, int, str | None]


def _entries(position: object, token: int, place: int) -> dict[int, _Entry]:
    """The tokens that a reply lists at a position, of which the sent one must be one."""
    if not isinstance(position, Mapping) or str(token) not in position:
        listed = ", ".join(map(str, list(position)[:3])) if isinstance(position, Mapping) else type(position).__name__
        raise ServerError(
            f"the reply does not score token {token} at position {place}, which was sent there (it has {listed}): it "
            "is of another request"
        )
    return {int(name): _entry(value, int(name), place) for name, value in position.items()}


def _entry(value: object, token: int, place: int) -> _Entry:
    number = value.get("logprob") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or isinstance(number, bool) or not isinstance(number, int | float):
        raise ServerError(f"the reply has no log-prob of token {token} at position {place} but {number!r}")
    if number > _ABOVE_ONE:
        raise ServerError(f"the reply gives token {token} at position {place} the log-prob {number:g}, above 0")
    rank, text = value.get("rank"), value.get("decoded_token")
    return float(number), rank if isinstance(rank, int) else 0, text if isinstance(text, str) else None


def _top(found: Mapping[int, _Entry], k: int, place: int) -> list[tuple[int, float]]:
    """The most probable tokens, without the sent one where it is none of them."""
    ranked = sorted(((token, entry[0]) for token, entry in found.items()), key=lambda pair: -pair[1])
    asked = len(found) if k == WHOLE else k
    if len(ranked) < asked:
        raise ServerError(f"the reply lists {len(ranked)} tokens at position {place} and {asked} were asked for")
    return ranked[:asked]


def check_finite(source: str, rows: Sequence[Scored]) -> None:
    """Raise `NotFiniteError` for a sampled token that a source gives no probability."""
    bad = [row for row, scored in enumerate(rows) if not all(map(_possible, scored.logprobs)) or _any_nan(scored.top)]
    if bad:
        raise NotFiniteError(
            f"{source}: the server's log-probs of {len(bad)} answers are not finite (NaN, or a sampled token that it "
            "gives no probability): check its checkpoint and precision, and that it forbids no tokens",
            source=source,
            rows=tuple(bad),
        )


def _possible(logprob: float) -> bool:
    return math.isfinite(logprob) and logprob > _IMPOSSIBLE


def _any_nan(top: Sequence[Sequence[tuple[int, float]]]) -> bool:
    return any(math.isnan(logprob) for listed in top for _, logprob in listed)
