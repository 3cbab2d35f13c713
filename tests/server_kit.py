"""A model server of our own making: it speaks the contract of `vllm serve`, for a tiny model in this process.

Its log-probs are the log-softmax of the model's own logits, one unpadded sequence at a time.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import torch

_Server = TypeVar("_Server", bound=ThreadingHTTPServer)
Reply = dict[str, Any]
# (number of the request from 0 on, the right reply) -> what is sent instead: a reply, or a way to fail
Fault = Callable[[int, Reply], Any]


@dataclass
class Fail:
    """A reply that is none: a status with words, a pause before the right reply, a cut-off body."""

    status: int = 200
    words: str = "out of order"
    headers: dict[str, str] = field(default_factory=dict)
    pause: float = 0.0
    cut: int | None = None


class ModelServer(ThreadingHTTPServer):
    """Serves a model under a name.

    Attributes:
        fault (`Fault`): what becomes of the right reply.
        asked (`list[dict]`): the bodies of all requests, with the headers under `"headers"`.
        introductions (`int`): how often it was asked for its models.
    """

    daemon_threads = True

    def __init__(self, model: Any, tokenizer: Any, name: str = "teacher", *, max_logprobs: int = -1) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model, self.tokenizer, self.name, self.max_logprobs = model, tokenizer, name, max_logprobs
        self.context = 512
        self.fault: Fault = lambda number, reply: reply
        self.asked: list[dict[str, Any]] = []
        self.introductions = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @torch.no_grad()
    def scores(self, ids: list[int], k: int) -> list[Any]:
        """`prompt_logprobs` of a sequence: at each position the sent token and the k most probable ones."""
        logits = self.model(torch.tensor([ids])).logits[0, :-1].double()
        log_p = logits.log_softmax(-1)
        k = log_p.shape[-1] if k == -1 else k
        found: list[Any] = [None]
        for position, token in enumerate(ids[1:]):
            order = log_p[position].argsort(descending=True, stable=True).tolist()
            listed = {t: order.index(t) + 1 for t in dict.fromkeys([token, *order[:k]])}
            found.append(
                {
                    str(t): {
                        "logprob": float(log_p[position, t].float()),
                        "rank": rank,
                        "decoded_token": self.tokenizer.decode([t]),
                    }
                    for t, rank in listed.items()
                }
            )
        return found

    def reply(self, body: dict[str, Any]) -> Any:
        k, ids = body.get("prompt_logprobs", 0), body["prompt"]
        if k > self.max_logprobs >= 0 or (k == -1 and self.max_logprobs >= 0):
            return Fail(
                400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            )
        if len(ids) + 1 > self.context or max(ids) >= self.model.config.vocab_size:
            return Fail(400, "the prompt is too long, or a token id is out of vocabulary")
        return {"model": body["model"], "choices": [{"index": 0, "text": "", "prompt_logprobs": self.scores(ids, k)}]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelServer

    def do_GET(self) -> None:
        self.server.introductions += 1
        served = {"data": [{"id": self.server.name, "max_model_len": self.server.context}]}
        self._send(served if self.path == "/v1/models" else Fail(404, "Not Found"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            number = len(server.asked)
            server.asked.append({**body, "headers": dict(self.headers)})
            right = server.reply(body) if body["model"] == server.name else Fail(404, "no such model")
        self._send(server.fault(number, right) if isinstance(right, dict) else right, right)

    def _send(self, found: Any, right: Any = None) -> None:
        failure = found if isinstance(found, Fail) else Fail()
        time.sleep(failure.pause)
        if failure.status == 200 and isinstance(found, Fail):
            found = right
        text = failure.words if failure.status != 200 else json.dumps(found)
        content = text.encode()
        self.send_response(failure.status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in failure.headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content[: failure.cut])
        except OSError:  # nobody waits any more
            return
        if failure.cut is not None:
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def in_threads(server: _Server) -> Iterator[_Server]:
    """A server in threads of this process."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def serving(model: Any, tokenizer: Any, **options: Any) -> AbstractContextManager[ModelServer]:
    """The server of a model, in threads of this process."""
    return in_threads(ModelServer(model, tokenizer, **options))
