"""A model behind an endpoint that speaks OpenAI's protocol: it answers conversations, and its replies are kept."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopd.data.views import PrivilegedTemplate, Prompt, as_conversations
from dopd.errors import DataError, IncompleteError
from dopd.evaluation.elsewhere import Answer
from dopd.evaluation.results import Sampling
from dopd.hints import chat
from dopd.hints.journal import Reply
from dopd.runs.asking import AskerSettings, Bill, ask_all

logger = logging.getLogger(__name__)


def served_name(model: str) -> tuple[str | None, str] | None:
    """The model and the address in `NAME=URL`, or in `URL` alone, whose server lists one model; `None` where it is a
    model of this machine.
    """
    name, separator, url = model.partition("=")
    if separator and _is_address(url) and not _is_address(name):
        return name, url
    return (None, model) if _is_address(model) else None


def _is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


class ServedPrompts:
    """How conversations are made for a server, which has its own chat template."""

    def __init__(self, template: PrivilegedTemplate) -> None:
        self.template = template

    def asked(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows with prompts that are text as a user's turn."""
        return as_conversations(rows)


class ServedAnswers:
    """Answers as `dopd.runs.local_models.LocalModel` gives them, and as `dopd.evaluation.elsewhere.Answerer`.

    Args:
        settings (`AskerSettings`): how the server is reached.
        journal (`Path`): where its replies are kept.
        template (`PrivilegedTemplate`): where p goes.
        field (`str`): what names the address, for messages.

    Attributes:
        bill (`Bill`): of all answers.
    """

    def __init__(
        self, settings: AskerSettings, journal: Path, template: PrivilegedTemplate, field: str = "--teacher"
    ) -> None:
        self.prompts = ServedPrompts(template)
        self.bill = Bill()
        self._settings, self._journal, self._field = settings, journal, field
        self._name = settings.model

    @property
    def template(self) -> PrivilegedTemplate:
        return self.prompts.template

    def asked(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows with prompts that are text as a user's turn."""
        return self.prompts.asked(rows)

    def model(self) -> str:
        """The name that the server knows the model by.

        Raises:
            ConfigError: it lists several, or none, and no name was given.
            ServerError: it does not answer.
        """
        if self._name is None:
            self._name = self._settings.asker(self._field, "").model()
        return self._name

    def answers(self, prompts: Sequence[Prompt], label: str, *, sampled: bool = False) -> list[tuple[str, bool]]:
        """An answer to each prompt: its text, and whether it ended by itself; equal prompts get several.

        Raises:
            DataError: a budget that does not allow all answers, of which pairs are made.
        """
        times: Counter[str] = Counter()
        draws = []
        for prompt in prompts:
            draws.append(times[str(prompt)] if sampled else 0)
            times[str(prompt)] += 1
        replies = self._replies(prompts, label, draws, {"temperature": 1.0} if sampled else {}, seeded=sampled)
        if self.bill.num_left:
            raise DataError(
                f"the budget leaves {self.bill.num_left} answers of the teacher out, and gains need all of them: the "
                "same command with a larger --budget goes on"
            )
        return [("", False) if reply is None else (reply.text, reply.finish == "stop") for reply in replies]

    def answered(self, prompts: Sequence[Prompt], label: str, sampling: Sampling | None) -> list[list[Answer]]:
        """Answers to each prompt: as many as are drawn, or the likeliest one without `sampling`.

        Raises:
            IncompleteError: the budget does not allow all of them; those that were paid for are kept.
        """
        count = 1 if sampling is None else sampling.samples
        settings = {"temperature": 0.0} if sampling is None else _narrowed(sampling)
        every = [prompt for prompt in prompts for _ in range(count)]
        draws = [*range(count)] * len(prompts)
        replies = self._replies(every, label, draws, settings, seeded=sampling is not None)
        if self.bill.num_left:
            raise IncompleteError(
                f"the budget leaves {self.bill.num_left} answers out: the same command with a larger --budget goes on "
                f"(the {self.bill.num_asked + self.bill.num_kept} that are paid for are in {str(self._journal)!r})"
            )
        refused = [reply.text for reply in replies if reply is not None and reply.finish == "refused"]
        if refused:
            logger.warning(
                f"{label}: the server refused {len(refused)} of {len(replies)} requests, which count as wrong answers: "
                f"{refused[0][:200]}"
            )
        answers = [_answer(reply) for reply in replies]
        return [answers[start : start + count] for start in range(0, len(answers), count)]

    def _replies(
        self, prompts: Sequence[Prompt], label: str, draws: Sequence[int], own: Mapping[str, Any], *, seeded: bool
    ) -> list[Reply | None]:
        """Replies to prompts; `own` are settings of requests, which the user's `--request` goes before."""
        asker, name = self._settings.asker(self._field, label), self.model()
        requests, numbers = [], []
        for prompt, draw in zip(prompts, draws, strict=True):
            seed = {"seed": self._settings.seed + draw} if seeded else {}
            settings = {**self._settings.settings, **own, **seed, **self._settings.request}
            requests.append(chat.conversation(name, prompt, settings))
            numbers.append(0 if "seed" in requests[-1] else draw)  # by which requests differ, unless --request takes it
        replies, _ = ask_all(asker, requests, self._journal, self._settings.prices, self.bill, numbers)
        return replies


def _narrowed(sampling: Sampling) -> dict[str, Any]:
    """Settings of a request for drawn answers; servers draw from everything unless they are told otherwise."""
    own: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    return own | ({"top_k": sampling.top_k} if sampling.top_k else {})


def _answer(reply: Reply | None) -> Answer:
    assert reply is not None  # the budget allowed it
    length = reply.completion_tokens if reply.completion_tokens >= 0 else None
    if reply.finish == "refused":
        return Answer("", None, ended=False, refused=True)
    return Answer(reply.text, length, reply.finish != "length")
