"""A server of our own making that speaks OpenAI's protocol for chats, in threads of this process."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from server_kit import ModelServer, in_threads


def text_of(body: dict[str, Any]) -> str:
    """What a request asks."""
    content = body["messages"][0]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class ChatServer(ModelServer):
    """Answers each request with `answer(text)`; tokens are words.

    Attributes:
        answer (callable): text that is asked -> text of the reply, or the whole reply.
    """

    def __init__(self, answer: Callable[[str], Any], name: str = "writer") -> None:
        super().__init__(None, None, name)
        self.answer = answer

    def reply(self, body: dict[str, Any]) -> Any:
        asked = text_of(body)
        said = self.answer(asked)
        if not isinstance(said, str):
            return said
        usage = {"prompt_tokens": len(asked.split()), "completion_tokens": len(said.split())}
        choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        return {"model": body["model"], "choices": [choice], "usage": usage}

    @property
    def questions(self) -> list[str]:
        return [text_of(body) for body in self.asked]


def chatting(answer: Callable[[str], Any], **options: Any) -> AbstractContextManager[ChatServer]:
    """The server of a model that chats, in threads of this process."""
    return in_threads(ChatServer(answer, **options))


def killed_behind(replies: int, arguments: Sequence[str], journal: Path) -> int:
    """Run `dopd` with these arguments, kill it (SIGKILL) once so many replies are in its journal, and count them."""
    script = "import sys; from dopd.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", script, *arguments])
    until = time.monotonic() + 120
    while (not journal.exists() or journal.read_bytes().count(b"\n") < replies) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    paid = len(journal.read_text(encoding="utf-8").splitlines())
    time.sleep(0.5)  # what was under way reaches the server
    return paid
