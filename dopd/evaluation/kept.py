"""The answers of an evaluation in a file, as they come: one that was interrupted goes on behind them."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dopd.errors import ConfigError, DataError
from dopd.evaluation.results import EvaluationResult, PromptResult
from dopd.files import append_line, check_plain, held, read_plain, replace_file

if TYPE_CHECKING:  # results are read without it
    import torch

_FIRST, _STATE, _LAST = "evaluation", "answered", "metrics"
_SHOWN = 80  # characters of a setting in a message
MODEL, ROWS = "model", "rows"  # of what decides an evaluation's answers: whose they are, and a digest of the rows


@dataclass(frozen=True)
class Evaluated:
    """A whole evaluation.

    Attributes:
        name (`str`): of the model.
        about (`dict`): what decided the answers, by the names of settings.
        result (`EvaluationResult`): what they came to.
        versions (`dict`): of the packages that it was made with, and the address of a server.
        bill (`dict`): of a model on a server: requests, tokens and what they cost.
    """

    name: str
    about: Mapping[str, Any]
    result: EvaluationResult
    versions: Mapping[str, str] = field(default_factory=dict)
    bill: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it but the answers, for a file of one's own."""
        named = {"model": self.name, _FIRST: dict(self.about), "versions": dict(self.versions)}
        return named | ({"bill": dict(self.bill)} if self.bill else {}) | self.result.to_json()


def read_evaluated(path: str | Path) -> Evaluated:
    """The evaluation in a file of `KeptAnswers`.

    Raises:
        ConfigError: a pipe or a folder.
        DataError: it cannot be read, is no such file, or has not all answers.
    """
    check_plain("results", path)
    try:
        lines = Path(path).read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    found = _Lines.read(lines[1:])
    try:
        first = json.loads(lines[0])
        name, about, versions = str(first[_FIRST][MODEL]), dict(first[_FIRST]), dict(first["versions"])
    except (ValueError, KeyError, TypeError, IndexError):
        raise DataError(
            f"{str(path)!r} has no results of an evaluation: name a file that dopd eval --output has written"
        ) from None
    if not found.is_whole:
        raise DataError(
            f"{str(path)!r} has the answers to {len(found.results)} prompts of an evaluation that has not ended: let "
            "the command that began it go on first"
        )
    return Evaluated(name, about, EvaluationResult.of(found.results), versions)


@dataclass(frozen=True)
class _Lines:
    """What lines behind the first one say: as many as belong to whole batches, and the state behind them."""

    results: list[PromptResult]
    state: dict[str, str]
    count: int
    is_whole: bool

    @classmethod
    def read(cls, lines: Sequence[bytes]) -> "_Lines":
        results, state, count, is_whole = list[PromptResult](), dict[str, str](), 0, False
        batch = list[PromptResult]()
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                if _STATE in record and record[_STATE] == len(results) + len(batch):
                    results += batch
                    state, count, batch = record["random_state"], number, []
                elif _LAST in record:
                    is_whole, count = True, number
                elif record["row"] == len(results) + len(batch):
                    batch.append(PromptResult.read(record))
                else:
                    break
            except (ValueError, KeyError, TypeError):
                break  # torn: the batch is answered again
        return cls(results, state, count, is_whole)


class KeptAnswers:
    """Answers of an evaluation in a file of JSON lines.

    The first line says which evaluation it is, under `"evaluation"`; each prompt has one with its number (`"row"`), its
    answers and their scores; behind a batch stands how many were answered, with the random state from which the next
    batch is drawn; a finished evaluation ends with its `"metrics"`. What stands behind the last whole batch is dropped.

    Args:
        path (`Path`): the file; it is made, or goes on.
        evaluation (`dict`): what decides the answers, by the names of settings.
        versions (`dict`): of packages; they are noted.

    Raises:
        ConfigError: the file is none of these, or has the answers of another evaluation.
        FileError: another process writes it.
    """

    def __init__(self, path: Path, evaluation: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        self.path = path
        self.results: list[PromptResult] = []
        self._evaluation = json.loads(json.dumps(evaluation, default=str))
        self._versions = dict(versions)
        self._state: dict[str, str] = {}
        self._whole = False
        self._guard = ExitStack()

    def __enter__(self) -> "KeptAnswers":
        self._guard.enter_context(held(self.path, "choose another --output"))
        try:
            self._read()
        except BaseException:
            self._guard.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guard.close()

    def _read(self) -> None:
        first = json.dumps({_FIRST: self._evaluation, "versions": self._versions}).encode() + b"\n"
        content = read_plain(self.path) if self.path.exists() or self.path.is_symlink() else b""
        lines = content.splitlines(keepends=True)
        if not content.strip():
            replace_file(self.path, first)
            return
        self._check_first(lines[0])
        found = _Lines.read(lines[1:])
        self.results, self._state, self._whole = found.results, found.state, found.is_whole
        if 1 + found.count < len(lines) or not content.endswith(b"\n"):
            replace_file(self.path, b"".join(lines[: 1 + found.count]))

    def _check_first(self, line: bytes) -> None:
        try:
            before = dict(json.loads(line)[_FIRST])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(
                f"output (={str(self.path)!r}) is no file of an evaluation's answers, and is left as it is: choose "
                "another --output"
            ) from None
        for name in sorted({*before, *self._evaluation}):
            there, here = before.get(name), self._evaluation.get(name)
            if there != here:
                raise ConfigError(
                    f"output (={str(self.path)!r}) has the answers of another evaluation: {name} is "
                    f"{_in_short(there)} there and {_in_short(here)} here. Choose another --output, or remove the file "
                    "to begin anew"
                )

    def restore(self, *devices: "torch.device") -> None:
        """Make the random states of torch those behind the answers that are there; nothing where there are none."""
        import torch

        for name, state in self._state.items():
            raw = torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8)
            if name == "cpu":
                torch.set_rng_state(raw)
            else:
                for device in devices:
                    if device.type == name:
                        torch.get_device_module(device).set_rng_state(raw, device)

    def add(self, results: Sequence[PromptResult], devices: Iterable["torch.device"]) -> None:
        """Keep the answers of a batch, and the random states behind it."""
        import torch

        start = len(self.results)
        self.results += results
        state = {"cpu": _text_of(torch.get_rng_state())}
        for device in devices:
            if device.type not in ("cpu", "meta"):
                state[device.type] = _text_of(torch.get_device_module(device).get_rng_state(device))
        records: list[dict[str, Any]] = [{"row": start + n, **asdict(one)} for n, one in enumerate(results)]
        records.append({_STATE: len(self.results), "random_state": state})
        self._write(records)

    def finish(self) -> None:
        """Write what all answers came to."""
        if not self._whole:
            result = EvaluationResult.of(self.results).to_json()
            self._write([{_LAST: result["metrics"], "intervals": result["intervals"]}])
            self._whole = True

    def _write(self, records: Iterable[Mapping[str, Any]]) -> None:
        append_line(self.path, "".join(json.dumps(record) + "\n" for record in records).encode())


def _in_short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _text_of(state: "torch.Tensor") -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()
