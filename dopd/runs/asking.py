"""Many questions to a model, on a server or of this machine: paid once, kept as they come, within a budget."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dopd.data.encode import reads_images
from dopd.errors import ConfigError, ServerError, ServerLostError
from dopd.hints import chat
from dopd.hints.chat import Prices, Request
from dopd.hints.journal import Journal, Reply, key_of
from dopd.progress import progress_bar
from dopd.runs.build import load_processing_class
from dopd.runs.circumstances import LOOKED_AT_FIELDS, circumstances
from dopd.runs.local_models import LocalModel
from dopd.secrets import is_secret_variable
from dopd.servers import Client, Patience, server_urls
from dopd.servers.client import RefusedError

_FATAL = (401, 403, 404, 405)  # what no other request would get round
_REFUSED_AT_FIRST = 3  # requests after which a server that has answered none is not asked any more


@dataclass
class Bill:
    """What was asked and what it cost.

    Attributes:
        num_asked (`int`): requests of this call that were answered.
        num_kept (`int`): that an earlier call had paid for.
        prompt_tokens, completion_tokens (`int`): of all replies, earlier ones too, as the server counts them.
        num_uncounted (`int`): replies whose tokens the server does not say; they count as many as they can have.
        cost (`float`): of all replies.
        num_left (`int`): requests that the budget did not allow.
    """

    num_asked: int = 0
    num_kept: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_uncounted: int = 0
    cost: float = 0.0
    num_left: int = 0

    def add(self, reply: Reply, prices: Prices, most: tuple[int, int]) -> None:
        prompt = reply.prompt_tokens if reply.prompt_tokens >= 0 else most[0]
        completion = reply.completion_tokens if reply.completion_tokens >= 0 else most[1]
        self.num_uncounted += reply.prompt_tokens < 0 or reply.completion_tokens < 0
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.cost += prices.of(prompt, completion)


class Asker(Protocol):
    """Somebody who answers requests of `dopd.hints.chat.request`."""

    def model(self) -> str:
        """The name of the model, for requests."""

    def ask(self, requests: Mapping[str, Request], journal: Journal, bill: Bill) -> None:
        """Have the replies to requests, by their keys, in the journal.

        Raises:
            ServerError, ServerLostError: nothing that was received is lost; the journal has it.
        """


def ask_all(
    asker: Asker,
    requests: Sequence[Request | None],
    journal: Path,
    prices: Prices,
    bill: Bill | None = None,
    draws: Sequence[int] | None = None,
) -> tuple[list[Reply | None], Bill]:
    """The replies to requests, of which equal ones are asked once, and what they cost.

    Args:
        asker (`Asker`): answers.
        requests: `None` where there is nothing to ask.
        journal (`Path`): where replies are kept; what is there is not asked again.
        prices (`Prices`): of tokens.
        bill (`Bill`, *optional*): of earlier requests, which goes on.
        draws (`list[int]`, *optional*): which of several answers to an equal request each one is for; 0 if left out.

    Returns:
        A reply to each request; `None` without one, and where the budget was used up. And the bill.
    """
    bill = Bill() if bill is None else bill
    numbers = [0] * len(requests) if draws is None else draws
    keys = [None if one is None else key_of(one, number) for one, number in zip(requests, numbers, strict=True)]
    wanted = {key: one for key, one in zip(keys, requests, strict=True) if key is not None and one is not None}
    with Journal(journal) as kept:
        for key, one in wanted.items():
            if key in kept.replies:
                bill.num_kept += 1
                bill.add(kept.replies[key], prices, (chat.most_tokens(one), _most_written(one)))
        asker.ask({key: one for key, one in wanted.items() if key not in kept.replies}, kept, bill)
        return [None if key is None else kept.replies.get(key) for key in keys], bill


def _most_written(body: Request) -> int:
    return int(body.get("max_tokens") or body.get("max_completion_tokens") or 0)


@dataclass
class ServedAsker:
    """A model behind an endpoint that speaks OpenAI's protocol.

    Attributes:
        client (`Client`): asks again after what passes.
        name (`str`, *optional*): of the model; the only one that the server lists if left out.
        concurrency (`int`): requests at a time.
        prices (`Prices`), budget (`float`, *optional*): no request is sent whose cost could go beyond it.
        label (`str`): of the progress bar.
    """

    client: Client
    name: str | None
    concurrency: int = 8
    prices: Prices = field(default_factory=Prices)
    budget: float | None = None
    label: str = "asking"

    def model(self) -> str:
        self.name = chat.served_model(self.client, self.name)
        return self.name

    def ask(self, requests: Mapping[str, Request], journal: Journal, bill: Bill) -> None:
        waiting = list(requests.items())[::-1]  # the first one is the next
        state = _State(bill, self.prices, self.budget)
        under_way: set[Future[None]] = set()
        # Threads keep their replies themselves: whoever stops waits for what is under way, and loses nothing of it.
        with (
            ThreadPoolExecutor(self.concurrency, thread_name_prefix="hints") as pool,
            progress_bar(self.label, len(requests), "request") as bar,
        ):
            try:
                while waiting or under_way:
                    while waiting and len(under_way) < self.concurrency and state.reserves(waiting[-1][1]):
                        key, body = waiting.pop()
                        under_way.add(pool.submit(self._one, key, body, journal, state))
                    if not under_way:
                        break  # the budget allows no further one
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    for future in done:
                        future.result()
                        bar.update()
            except BaseException:
                self.client.stop()
                raise
            finally:
                for future in under_way:
                    future.cancel()
        bill.num_left = len(waiting)
        state.check_refused()

    def _one(self, key: str, body: Request, journal: Journal, state: "_State") -> None:
        reply: Reply | None = None
        try:
            reply = self.client.post(chat.CHAT, body, chat.read)
            journal.add(key, reply)
        except ServerLostError:
            raise
        except ServerError as error:
            # A prompt that is too long, or that a filter refuses, is that row's own fault.
            if isinstance(error, RefusedError) and error.status in _FATAL:
                raise
            state.refuses(key, error, journal)
        finally:
            state.settles(body, reply, journal)


class _State:
    """What is spent and what may be, of requests under way; and refusals, as long as nothing was answered."""

    def __init__(self, bill: Bill, prices: Prices, budget: float | None) -> None:
        self.bill, self._prices, self._budget = bill, prices, budget
        self._reserved = 0.0
        self._refused: list[tuple[str, ServerError]] = []
        self._lock = threading.Lock()

    def _most(self, body: Request) -> float:
        return self._prices.of(chat.most_tokens(body), _most_written(body))

    def reserves(self, body: Request) -> bool:
        """Put the most that a request can cost aside; `False` where the budget does not allow it now."""
        with self._lock:
            most = self._most(body)
            if self._budget is not None and self.bill.cost + self._reserved + most > self._budget:
                return False
            self._reserved += most
            return True

    def settles(self, body: Request, reply: Reply | None, journal: Journal) -> None:
        """A request is over, with its reply or without."""
        with self._lock:
            self._reserved -= self._most(body)
            if reply is not None:
                self.bill.num_asked += 1
                self.bill.add(reply, self._prices, (chat.most_tokens(body), _most_written(body)))
                self._keep_refused(journal)

    def refuses(self, key: str, error: ServerError, journal: Journal) -> None:
        """A request was refused: its row's own fault, unless the server refuses whatever it is asked.

        Raises:
            ServerError: it has refused several and answered none.
        """
        with self._lock:
            self._refused.append((key, error))
            if self.bill.num_asked:
                self._keep_refused(journal)
            elif len(self._refused) >= _REFUSED_AT_FIRST:
                raise error

    def _keep_refused(self, journal: Journal) -> None:
        for key, error in self._refused:
            journal.add(key, Reply(str(error)[:300], "refused", 0, 0))
        self._refused.clear()

    def check_refused(self) -> None:
        """Raise the `ServerError` of a refusal where nothing at all was answered."""
        if self._refused:
            raise self._refused[-1][1]


@dataclass
class LocalAsker:
    """A transformers model of this machine; of pictures, where its processor reads these.

    Attributes:
        name (`str`): a hub id, a folder or `tiny:TASK/ROLE`.
        load (callable): gives the model when it is needed.
        label (`str`): of the progress bar.
        field_name (`str`): the flag that names it, for messages.
    """

    name: str
    load: Callable[[], LocalModel]
    label: str = "asking"
    field_name: str = "--writer"

    def model(self) -> str:
        return self.name

    def ask(self, requests: Mapping[str, Request], journal: Journal, bill: Bill) -> None:
        waiting = list(requests.items())
        if not waiting:
            return
        if any(chat.pictures_in(body) for _, body in waiting) and not reads_images(load_processing_class(self.name)):
            raise ConfigError(
                f"{self.field_name} (={self.name!r}) reads text alone, and rows have pictures: name a vision-language "
                "model, here or on a server (its address)"
            )
        model = self.load()
        size = model.asking.batch_size
        with progress_bar(self.label, len(waiting), "request") as bar:
            for start in range(0, len(waiting), size):
                part = waiting[start : start + size]
                prompts = [model.asks(chat.text_in(body), chat.pictures_in(body)) for _, body in part]
                sampled = bool(part[0][1].get("temperature"))
                answers = model.answers(prompts, self.label, sampled=sampled)
                for (key, _), (answer, ended) in zip(part, answers, strict=True):
                    reply = Reply(answer, "stop" if ended else "length", 0, 0)
                    journal.add(key, reply)
                    bill.num_asked += 1
                bar.update(len(part))


@dataclass(frozen=True)
class AskerSettings:
    """How a model is reached and asked.

    Attributes:
        where (`str`): an address, or a model of this machine.
        model (`str`, *optional*): the name that a server knows it by.
        key_variable (`str`): the variable of the environment that has the key, if there is one.
        concurrency, timeout, retries: of requests to a server.
        price_in, price_out (`float`): for a million tokens.
        budget (`float`, *optional*): most that all replies may cost.
        max_new_tokens (`int`), temperature (`float`): of an answer.
        request (`dict`): what else a request says; null leaves something out.
        dtype, batch_size, seed: of a model of this machine.
    """

    where: str
    model: str | None = None
    key_variable: str = "DOPD_WRITER_API_KEY"
    concurrency: int = 8
    timeout: float = 300.0
    retries: int = 8
    price_in: float = 0.0
    price_out: float = 0.0
    budget: float | None = None
    max_new_tokens: int = 1024
    temperature: float = 0.0
    request: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    batch_size: int = 16
    seed: int = 0

    @property
    def is_served(self) -> bool:
        return self.where.startswith(("http://", "https://"))

    @property
    def prices(self) -> Prices:
        return Prices(self.price_in, self.price_out)

    @property
    def settings(self) -> dict[str, Any]:
        """What every request says beside its messages."""
        return {"max_tokens": self.max_new_tokens, "temperature": self.temperature, **self.request}

    def asker(self, field_name: str, label: str) -> Asker:
        """Who answers.

        Args:
            field_name (`str`): of `where`, for messages.
            label (`str`): of the progress bar.

        Raises:
            ConfigError: what is no address; a variable whose name does not say that it is secret; a budget without
                prices.
        """
        if not self.is_served:
            asked, _ = circumstances(self.where, only=LOOKED_AT_FIELDS, max_new_tokens=self.max_new_tokens)
            options: dict[str, Any] = {"dtype": self.dtype, "batch_size": self.batch_size, "seed": self.seed}
            return LocalAsker(self.where, lambda: LocalModel.load(self.where, asked, **options), label, field_name)
        if not is_secret_variable(self.key_variable):
            raise ConfigError(
                f"--key-variable (={self.key_variable!r}) must be a name that says that it is secret, such as "
                "MY_API_KEY: values of such variables are kept out of every file and message"
            )
        if self.budget is not None and not (self.price_in or self.price_out):
            raise ConfigError(
                f"--budget (={self.budget:g}) needs prices: --price-in and --price-out, per million tokens"
            )
        urls = server_urls(field_name, self.where, self.key_variable)
        client = Client(urls, Patience(self.timeout, self.retries), self.concurrency, key_variable=self.key_variable)
        return ServedAsker(client, self.model, self.concurrency, self.prices, self.budget, label)
