"""The verifier `judge`: a model on a server says whether an answer is right."""

import json
import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt

from dopd.errors import ConfigError, ScoringError, ServerError, ServerLostError
from dopd.files import check_plain
from dopd.hints import chat
from dopd.hints.journal import Journal, Reply, key_of
from dopd.hints.replies import without_wrapping
from dopd.hints.templates import reference
from dopd.inspection.schema import prompt_text
from dopd.secrets import is_secret_variable
from dopd.servers import Client, Patience, server_urls
from dopd.servers.client import RefusedError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "DOPD_JUDGE_API_KEY"
_FIELD = re.compile(r"\{(question|reference|answer)\}")
_MARKS = re.compile(r"</?\s*answer\s*>", re.I)
_WORDS = {"true": 1.0, "yes": 1.0, "correct": 1.0, "false": 0.0, "no": 0.0, "incorrect": 0.0}
_FATAL = (401, 403, 404, 405)
_FEW = 10  # judgements before a share of failures says anything


class JudgeVerifier:
    """Asks a model behind an endpoint that speaks OpenAI's protocol (`POST /v1/chat/completions`).

    A judgement that fails (a refusal, a reply that is no verdict or was cut off) scores 0, is counted in `num_failed`
    and warned of; too many of them end the run. An empty answer is wrong without being asked about.

    Args:
        server (`str` or `list[str]`): its address, or those of several servers of the model.
        model (`str`, *optional*): the name that it is served by; the only one if left out.
        prompt_file (`str`, *optional*): a text with `{question}`, `{answer}` and `{reference}` in the place of ours.
        journal (`str`, *optional*): a file that keeps replies: what is there is not asked again.
        max_new_tokens (`int`), temperature (`float`): of a judgement.
        request (`dict`): what else a request says; null leaves something out.
        concurrency (`int`): requests at a time.
        timeout (`float`), retries (`int`): seconds for a request, and how often one is sent again.
        most_failed (`float`): share of judgements that may fail.
        key_variable (`str`): the variable of the environment that has the server's key, if it wants one.

    Raises:
        ConfigError: what is no address, no file, or no secret variable.
    """

    def __init__(
        self,
        *,
        server: str | list[str],
        model: str | None = None,
        prompt_file: str | None = None,
        journal: str | None = None,
        max_new_tokens: Annotated[int, Gt(0)] = 1024,
        temperature: Annotated[float, Ge(0)] = 0.0,
        request: dict[str, Any] | None = None,
        concurrency: Annotated[int, Gt(0)] = 8,
        timeout: Annotated[float, Gt(0)] = 50.0,
        retries: Annotated[int, Ge(0)] = 4,
        most_failed: Annotated[float, Ge(0)] = 0.2,
        key_variable: str = KEY_VARIABLE,
    ) -> None:
        if not is_secret_variable(key_variable):
            raise ConfigError(
                f"key_variable (={key_variable!r}) of the judge must be a name that says that it is secret, such as "
                "MY_API_KEY: values of such variables are kept out of every file and message"
            )
        urls = server_urls("server of the judge", server, key_variable)
        self.template = _template(prompt_file)
        self._client = Client(urls, Patience(timeout, retries), concurrency, key_variable=key_variable)
        self._model, self._concurrency, self._most_failed = model, concurrency, most_failed
        self._settings = {"max_tokens": max_new_tokens, "temperature": temperature, **(request or {})}
        self._replies: dict[str, Reply] = {}
        self._guard, self._lock = ExitStack(), threading.Lock()
        self._journal: Journal | None = None
        if journal is not None:
            check_plain("journal of the judge", journal)
            self._journal = self._guard.enter_context(Journal(Path(journal)))
            self._replies = self._journal.replies
        self.num_judged = self.num_failed = 0

    def __call__(self, completion: str, row: Mapping[str, Any]) -> float:
        """The score of an answer.

        Raises:
            ServerError, ServerLostError: the server refuses everything, or no longer answers.
            ScoringError: too many judgements fail.
        """
        if not completion.strip():
            self._name()
            return 0.0
        reply = self._reply(self._request(completion, row))
        self.num_judged += 1
        score = score_of_reply(reply)
        return self._failed(reply) if score is None else score

    def prepare(self, answers: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Ask about several answers at a time; what is replied waits for the calls that follow."""
        requests = {key_of(one): one for one in (self._request(*pair) for pair in answers if pair[0].strip())}
        waiting = [one for key, one in requests.items() if key not in self._replies]
        if len(waiting) > 1:
            with ThreadPoolExecutor(min(self._concurrency, len(waiting)), thread_name_prefix="judge") as pool:
                list(pool.map(self._reply, waiting))

    def _failed(self, reply: Reply) -> float:
        self.num_failed += 1
        why = {"refused": "it refused", "length": "its reply was cut off"}.get(reply.finish, "its reply is no verdict")
        message = f"the judge gave no verdict for {self.num_failed} of {self.num_judged} answers"
        last = f"the last time {why}: {' '.join(reply.text.split())[-160:]!r}"
        if self.num_judged >= _FEW and self.num_failed > self._most_failed * self.num_judged:
            raise ScoringError(
                f"{message}, more than most_failed (={self._most_failed:g}) allows; {last}. Raise max_new_tokens, or "
                "give a prompt_file that asks this model more plainly"
            )
        logger.warning(f"{message}, which score 0; {last}")
        return 0.0

    def _name(self) -> str:
        with self._lock:
            if self._model is None:
                try:
                    self._model = chat.served_model(self._client, None)
                except ConfigError as error:
                    words = str(error).partition(": name one")[0]
                    raise ConfigError(f"{words}: name one as model in verifier_options") from None
            return self._model

    def _request(self, completion: str, row: Mapping[str, Any]) -> chat.Request:
        values = {
            "question": prompt_text(row.get("prompt") or "").strip(),
            "reference": reference(row),
            "answer": _MARKS.sub("", completion).strip(),
        }
        text = _FIELD.sub(lambda found: values[found[1]], self.template)
        return chat.request(self._name(), text, (), self._settings)

    def _reply(self, body: chat.Request) -> Reply:
        key = key_of(body)
        if key not in self._replies:
            try:
                reply = self._client.post(chat.CHAT, body, chat.read)
            except ServerLostError:
                raise
            except ServerError as error:  # of this answer alone, such as one that is too long or that a filter refuses
                if isinstance(error, RefusedError) and error.status in _FATAL:
                    raise
                reply = Reply(str(error)[:300], "refused", 0, 0)
            if self._journal is not None:
                self._journal.add(key, reply)
            else:
                self._replies[key] = reply
        return self._replies[key]


def _template(path: str | None) -> str:
    if path is None:
        return (files("dopd.verifiers") / "judge.txt").read_text(encoding="utf-8")
    check_plain("prompt_file of the judge", path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt_file (={path!r}) of the judge cannot be read: {error}") from None
    if "{answer}" not in text:
        raise ConfigError(
            f"prompt_file (={path!r}) of the judge must contain {{answer}}; {{question}} and {{reference}} may be there"
        )
    return text


def score_of_reply(reply: Reply) -> float | None:
    """The score in a reply: of its last JSON object with `correct` (true or false) or `score` (0 to 1); `None` where
    there is none.
    """
    if reply.finish in ("refused", "length"):
        return None
    scores = [_score(one) for one in _objects(without_wrapping(reply.text))]
    return next((one for one in reversed(scores) if one is not None), None)


def _score(verdict: Mapping[str, Any]) -> float | None:
    value = verdict.get("correct", verdict.get("score"))
    if isinstance(value, str):
        value = _WORDS.get(value.strip().lower())
    return float(value) if isinstance(value, bool | int | float) and 0 <= value <= 1 else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text; what stands inside of one is a part of it."""
    decoder, place = json.JSONDecoder(), text.find("{")
    while place >= 0:
        try:
            found, place = decoder.raw_decode(text, place)
            yield found
        except (ValueError, RecursionError):
            place += 1
        place = text.find("{", place)
