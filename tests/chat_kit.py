"""A server of our own making that speaks OpenAI's protocol for chats, in threads of this process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from server_kit import ModelServer


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


@contextmanager
def chatting(answer: Callable[[str], Any], **options: Any) -> Iterator[ChatServer]:
    """A server in threads of this process."""
    server = ChatServer(answer, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
