"""Replies that were paid for: kept line by line as they come, and found again by what was asked."""

import hashlib
import json
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dopd.files import append_line, held, replace_file


@dataclass(frozen=True)
class Reply:
    """What came back for one request.

    Attributes:
        text (`str`): of the answer; empty where there is none.
        finish (`str`): why it ended: `stop`, `length`, or `refused` with the server's words as text.
        prompt_tokens, completion_tokens (`int`): as the server counts them; -1 where it does not say.
    """

    text: str
    finish: str = "stop"
    prompt_tokens: int = -1
    completion_tokens: int = -1


def key_of(request: Mapping[str, Any], draw: int = 0) -> str:
    """The same for the same request: model, messages and settings, whatever the server's address; another one for each
    of several answers that are drawn to it.
    """
    content = json.dumps(request, sort_keys=True, ensure_ascii=True) + (f" #{draw}" if draw else "")
    return hashlib.sha256(content.encode()).hexdigest()[:32]


class Journal:
    """Replies in a file beside an output; safe to use from several threads, and by one process at a time.

    Each is written whole, in one call, before it is used: a process that is killed has lost none that it had received.

    Args:
        path (`Path`): the file; it is made, or goes on.

    Raises:
        FileError: another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, Reply] = {}
        self.num_torn = 0
        self._lock = threading.Lock()
        self._guard = ExitStack()

    def __enter__(self) -> "Journal":
        self._guard.enter_context(held(self.path, "choose another --output"))
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.close()

    def _read(self) -> None:
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        lines = [line for line in content.split(b"\n") if line.strip()]
        whole = []
        for line in lines:
            try:
                record = json.loads(line)
                reply = Reply(*(record[name] for name in ("text", "finish", "prompt_tokens", "completion_tokens")))
                self.replies[str(record["key"])] = reply
                whole.append(line)
            except (ValueError, KeyError, TypeError):
                self.num_torn += 1
        if self.num_torn or (content and not content.endswith(b"\n")):
            replace_file(self.path, b"".join(line + b"\n" for line in whole))

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply."""
        line = json.dumps({"key": key, **asdict(reply)}, ensure_ascii=False) + "\n"
        with self._lock:
            append_line(self.path, line.encode())
            self.replies[key] = reply
