"""How requests travel to servers: spread over them, again after what passes, with a key that is written nowhere."""

import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2

from dopd.errors import ConfigError, ServerError, ServerLostError, cut, first_line
from dopd.secrets import without_tokens

KEY_VARIABLE = "DOPD_TEACHER_API_KEY"
Json = Mapping[str, object]
Result = TypeVar("Result")

# Replies that say "later": too slow, too many, or a server (or a proxy in front of it) that is not well.
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds
_CONNECT = 15.0  # seconds for a connection, after which a machine counts as away
_REPLY_SHOWN = 200  # characters


class PassingError(Exception):
    """What went wrong with a request may go right the next time."""


class RefusedError(ServerError):
    """A server that says no; `status` is what it says in HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Patience:
    """How long servers are waited for.

    Attributes:
        timeout (`float`): seconds that one request may take.
        retries (`int`): how often a request is sent again.
    """

    timeout: float = 300.0
    retries: int = 8


def server_urls(field: str, value: object, key_variable: str = KEY_VARIABLE) -> list[str]:
    """The addresses that a setting names, without a slash or `/v1` at their ends.

    Args:
        field (`str`): the setting's name.
        value: a URL or a list of them.
        key_variable (`str`): the variable of the environment in which a key belongs.

    Raises:
        ConfigError: what is no address of a server, with the reason.
    """
    addresses = [value] if isinstance(value, str) else value
    if not isinstance(addresses, list | tuple) or not addresses:
        raise ConfigError(f"{field} (={value!r}) must be a URL such as http://localhost:8000, or a list of URLs")
    urls = [_url(field, one, key_variable) for one in addresses]
    if len(set(urls)) < len(urls):
        raise ConfigError(f"{field} names one address twice: {', '.join(urls)}")
    return urls


def teacher_places(field: str, value: object) -> dict[str, list[str]]:
    """The addresses of each teacher, by the names that rows have for them; of one that reads every row, by ''.

    Args:
        field (`str`): the setting's name.
        value: a URL, a list of them, or a mapping from names to either.

    Raises:
        ConfigError: see `server_urls`.
    """
    if not isinstance(value, Mapping):
        return {"": server_urls(field, value)}
    if not value:
        raise ConfigError(f"{field} (={{}}) must have a server, or be left out")
    return {str(name): server_urls(f"{field}[{str(name)!r}]", urls) for name, urls in value.items()}


def _url(field: str, value: object, key_variable: str) -> str:
    text = value.strip() if isinstance(value, str) else ""
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        is_url = False
    if not is_url:
        shown = without_tokens(str(value))
        raise ConfigError(f"{field} (={shown!r}) must be a URL with http:// or https://, such as http://localhost:8000")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"{field} has a name or a password in the address of {parts.hostname}, which would be written down: put "
            f"the key into the environment variable {key_variable}"
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"{field}: the address of {parts.hostname} must end before ? and #")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


class Client:
    """Servers of one model; safe to use from several threads.

    Args:
        urls (`list[str]`): their addresses.
        patience (`Patience`): how long they are waited for.
        connections (`int`): most requests at a time.
        key_variable (`str`): the variable of the environment that has the key, where the servers want one.

    Raises:
        ConfigError: a key that cannot be sent.
    """

    def __init__(
        self, urls: Sequence[str], patience: Patience, connections: int = 16, *, key_variable: str = KEY_VARIABLE
    ) -> None:
        self.urls = list(urls)
        self._patience = patience
        self._key_variable = key_variable
        self._key = _key(key_variable)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections)
        # A redirected request would carry the key elsewhere: redirects are not followed, and are refusals.
        timeout = httpx2.Timeout(patience.timeout, connect=min(patience.timeout, _CONNECT), pool=None)
        self._http = httpx2.Client(headers=headers, timeout=timeout, limits=limits, follow_redirects=False)
        weakref.finalize(self, self._http.close)
        self._busy = dict.fromkeys(self.urls, 0)
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Send no request again from now on; those under way end as they do."""
        self._stopped.set()

    def get(self, url: str, path: str) -> Json:
        """The reply of one server, asked once.

        Raises:
            ServerError: it refuses, or does not answer.
        """
        try:
            return self._ask("GET", url, path, None)
        except PassingError as error:
            raise ServerError(f"{url} does not answer: {error}") from error

    def post(self, path: str, body: Json, read: Callable[[Json], Result], *, url: str | None = None) -> Result:
        """What `read` makes of a server's reply; asked again where that may help, of the next server if there is one.

        Args:
            path (`str`): behind the address.
            body (`dict`): what is sent, as JSON.
            read (callable): checks a reply; may raise `PassingError` for one that is worth asking for again.
            url (`str`, *optional*): the only server to ask; the least busy one if left out.

        Raises:
            ServerError: a refusal, or what `read` raises.
            ServerLostError: no server answered.
        """
        begun, failed, last = time.monotonic(), "", PassingError("not asked")
        for attempt in range(self._patience.retries + 1):
            if attempt and self._stopped.wait(_pause(attempt, last)):
                break
            chosen = self._take(failed) if url is None else url
            try:
                return read(self._ask("POST", chosen, path, body))
            except PassingError as error:
                failed, last = chosen, error
            finally:
                if url is None:
                    self._give_back(chosen)
        tries = attempt if self._stopped.is_set() else attempt + 1
        raise ServerLostError(
            f"{' and '.join(self.urls) if url is None else url}: no answer after {tries} attempts in "
            f"{time.monotonic() - begun:.0f} s (the last one: {last})"
        ) from last

    def _take(self, failed: str) -> str:
        """The server with the fewest requests under way; the one that failed last if there is no other."""
        with self._lock:
            url = min(self.urls, key=lambda one: (one == failed, self._busy[one]))
            self._busy[url] += 1
        return url

    def _give_back(self, url: str) -> None:
        with self._lock:
            self._busy[url] -= 1

    def _ask(self, how: str, url: str, path: str, body: Json | None) -> Json:
        try:
            reply = self._http.request(how, f"{url}{path}", json=body)
        except httpx2.TimeoutException as error:
            raise PassingError(f"{url}{path} took more than {self._patience.timeout:g} s") from error
        except httpx2.HTTPError as error:  # connections that are refused or end, replies that are cut off
            raise PassingError(
                f"{url}{path}: {type(error).__name__}: {self._without_key(first_line(error))}"
            ) from error
        text = self._without_key(" ".join(reply.text.split()))
        if reply.status_code in _PASSING:
            raise _Later(f"{url}{path}: HTTP {reply.status_code}: {text}", reply.headers.get("retry-after"))
        if reply.status_code != 200:
            advice = _help(reply.status_code, self._key_variable)
            raise RefusedError(f"{url}{path} refuses with HTTP {reply.status_code}: {text}{advice}", reply.status_code)
        try:
            found = reply.json()
        except ValueError as error:
            raise PassingError(f"{url}{path}: the reply is cut off or no JSON: {text}") from error
        if not isinstance(found, dict):
            raise ServerError(f"{url}{path}: the reply is no JSON object: {text}")
        return found

    def _without_key(self, text: str) -> str:
        """A server's words without the key, whatever it repeats."""
        hidden = text.replace(self._key, f"<{self._key_variable}>") if self._key else text
        return cut(without_tokens(hidden), _REPLY_SHOWN) or "nothing"


def _key(variable: str) -> str:
    """The key of the environment; `""` without one.

    Raises:
        ConfigError: what no header can have, of which libraries' errors would quote the whole.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{variable} (an environment variable) has characters that no key has, or line breaks")
    return key


class _Later(PassingError):
    """A server that says how long it wants to be left alone."""

    def __init__(self, message: str, retry_after: str | None) -> None:
        super().__init__(message)
        pause = retry_after or ""
        self.seconds = min(float(pause), _LONGEST_PAUSE) if pause.isdecimal() else 0.0


def _pause(attempt: int, last: Exception) -> float:
    """Seconds before an attempt: twice as long each time, spread so that many requests do not come back as one."""
    longest = min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE)
    return max(random.uniform(0.5, 1.0) * longest, getattr(last, "seconds", 0.0))


def _help(status: int, key_variable: str) -> str:
    if status in (401, 403):
        return f". The server wants a key: put it into the environment variable {key_variable}"
    if status == 404:
        return ". Is this the address of a model server, without a path behind it?"
    return ""
