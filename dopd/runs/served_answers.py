"""A teacher behind an endpoint that speaks OpenAI's protocol: it answers conversations, and its replies are kept."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dopd.data.views import PrivilegedTemplate, Prompt, as_conversation
from dopd.errors import DataError
from dopd.hints import chat
from dopd.runs.asking import AskerSettings, Bill, ask_all


class ServedPrompts:
    """How conversations are made for a server, which has its own chat template."""

    def __init__(self, template: PrivilegedTemplate) -> None:
        self.template = template

    def asked(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows with prompts that are text as a user's turn."""
        return [as_conversation(dict(row)) for row in rows]


class ServedAnswers:
    """Answers as `dopd.runs.local_models.LocalModel` gives them.

    Args:
        settings (`AskerSettings`): how the server is reached.
        journal (`Path`): where its replies are kept.
        template (`PrivilegedTemplate`): where p goes.

    Attributes:
        bill (`Bill`): of all answers.
    """

    def __init__(self, settings: AskerSettings, journal: Path, template: PrivilegedTemplate) -> None:
        self.prompts = ServedPrompts(template)
        self.bill = Bill()
        self._settings, self._journal = settings, journal

    def answers(self, prompts: Sequence[Prompt], label: str, *, sampled: bool = False) -> list[tuple[str, bool]]:
        """An answer to each prompt: its text, and whether it ended by itself; equal prompts get several.

        Raises:
            DataError: a prompt with pictures; a budget that does not allow all answers, of which pairs are made.
        """
        asker = self._settings.asker("--teacher", label)
        name = asker.model()
        settings = {**self._settings.settings, **({"temperature": 1.0} if sampled else {})}
        times: Counter[str] = Counter()
        requests = []
        for prompt in prompts:
            turns = [turn for turn in prompt if isinstance(turn, Mapping)]
            messages = [{"role": turn["role"], "content": _text(turn["content"])} for turn in turns]
            times[str(messages)] += 1
            seed = {"seed": self._settings.seed + times[str(messages)] - 1} if sampled else {}
            requests.append(chat.with_settings(name, messages, {**settings, **seed}))
        replies, bill = ask_all(asker, requests, self._journal, self._settings.prices, self.bill)
        if bill.num_left:
            raise DataError(
                f"the budget leaves {bill.num_left} answers of the teacher out, and gains need all of them: the same "
                "command with a larger --budget goes on"
            )
        return [("", False) if reply is None else (reply.text, reply.finish == "stop") for reply in replies]


def _text(content: Any) -> str:
    if not isinstance(content, str):
        raise DataError("a prompt has blocks or pictures, and a teacher on a server is asked text alone here")
    return content
