"""From a verifier and reward functions to the rewards of a batch of answers: the one place where answers are judged."""

import asyncio
import functools
import inspect
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTimeError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dopd.errors import ConfigError, DataError, DopdError, NotFiniteError, ScoringError, cut, first_line
from dopd.guests import as_guest
from dopd.interrupts import Stopped, TooLongError, alarm_after
from dopd.step.batch import Rollouts
from dopd.step.verifier import Verifier, judged, own_copy, prepare, quoted, shown, tried, written_code

if TYPE_CHECKING:
    from transformers import TrainerState

# f(prompts=..., completions=..., completion_ids=..., **columns), and those of `_OF_THE_RUN` that it takes -> a reward
# for each completion, or `None` where it does not apply; as a list, or awaited.
RewardFunction = Callable[..., Any]

VERIFIER = "verifier"  # in a list of reward functions: the verifier's score
_OF_THE_RUN = ("trainer_state", "log_extra", "log_metric")
_ARGUMENTS = ("prompts", "completions", "completion_ids", *_OF_THE_RUN)
_OF_TABLE = ("step", "prompt", "completion")  # TRL's table of completions
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # of a dataset, which TRL does not hand on either


def unlogged(state: "TrainerState | None" = None) -> dict[str, Any]:
    """What reward functions get of a run where nothing is logged.

    Args:
        state (`TrainerState`, *optional*): of the run; that of a first step if left out.
    """

    from transformers import TrainerState  # whose module reads all of a trainer's

    def log(name: str, value: float) -> None:
        pass

    return {"trainer_state": state or TrainerState(max_steps=1), "log_metric": log}


@dataclass(frozen=True)
class TriedFunction:
    """A reward function that has been called for each kind of row; made by `Judge.tried_on`."""

    function: RewardFunction

    def __call__(self, **arguments: Any) -> Any:
        return self.function(**arguments)


@dataclass(frozen=True)
class Judge:
    """Gives answers their scores and rewards.

    A verifier looks at one answer at a time and says how right it is: its scores, in [0, 1], are accuracies. Reward
    functions look at a whole batch, and may give any finite numbers; the reward of an answer is their weighted sum.
    Without reward functions it is the verifier's score.

    Attributes:
        verifier (callable, *optional*): (completion text, row) -> score.
        functions (`dict[str, RewardFunction | None]`): reward functions by name; `None` for the verifier's score.
        weights (`tuple[float, ...]`): of the functions.
        seconds (`float`, *optional*): that a reward function may take for each answer of a call.
        of_the_run (callable): gives `trainer_state` and `log_metric` of TRL's GRPO, by name; what functions give its
            `log_extra` is kept with the rollouts.
    """

    verifier: Verifier | None = None
    functions: Mapping[str, RewardFunction | None] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    seconds: float | None = None
    of_the_run: Callable[[], Mapping[str, Any]] = unlogged

    def __post_init__(self) -> None:
        if len(self.weights) != len(self.functions):
            raise ConfigError(
                f"reward_weights (={list(self.weights)}) must have a number for each of the {len(self.functions)} "
                f"reward_funcs ({', '.join(self.functions) or 'none'})"
            )
        if None in self.functions.values() and self.verifier is None:
            raise ConfigError(f"reward_funcs names {VERIFIER!r}, and there is none: set verifier, or leave it out")

    @property
    def gives_rewards(self) -> bool:
        return bool(self.functions) or self.verifier is not None

    @property
    def code(self) -> list[Callable[..., Any]]:
        """The functions that a user may have written."""
        functions = [_written(one) for one in self.functions.values() if one is not None]
        return functions if self.verifier is None else [written_code(self.verifier), *functions]

    def judged(
        self, rollouts: Rollouts, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], ended: Sequence[bool]
    ) -> Rollouts:
        """The rollouts with scores and rewards.

        Args:
            rollouts (`Rollouts`): B answers.
            rows (`list[dict]`): the rows as the dataset brought them, which is how users' code knows them.
            texts (`list[str]`), ended (`list[bool]`): the answers, and whether each ended by itself. One that was cut
                at the length limit is no finished answer: its score is 0. Reward functions see it, as in TRL.

        Raises:
            ScoringError: users' code raises, takes too long, or gives no finite number for an answer.
        """
        scores = None if self.verifier is None else self._scores(self.verifier, rows, texts, ended)
        if not self.functions:
            return replace(rollouts, scores=scores, rewards=scores)
        extra: dict[str, list[Any]] = {}
        values_by_name = self._called(rows, texts, rollouts.answers, extra)
        rewards = {name: list(scores or ()) if values is None else values for name, values in values_by_name.items()}
        sums, columns = self._sums(rewards), _columns(extra, len(texts))
        return replace(rollouts, scores=scores, rewards=sums, rewards_by_function=rewards, extra=columns)

    def _scores(
        self, verifier: Verifier, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], ended: Sequence[bool]
    ) -> list[float]:
        scores = []
        prepare(verifier, ((text, row) for row, text, done in zip(rows, texts, ended, strict=True) if done))
        for number, (row, text, done) in enumerate(zip(rows, texts, ended, strict=True)):
            try:
                scores.append(judged(verifier, text, row) if done else 0.0)
            except NotFiniteError as error:
                error.rows = (number,)
                raise
        return scores

    def _sums(self, rewards: Mapping[str, list[float]]) -> list[float]:
        """Weighted sums over the functions that apply, NaN where none does."""
        sums = []
        for place, values in enumerate(zip(*rewards.values(), strict=True)):
            terms = [w * value for w, value in zip(self.weights, values, strict=True) if not math.isnan(value)]
            total = math.fsum(terms) if terms else math.nan
            if terms and not math.isfinite(total):
                message = f"the weighted sum of the rewards {dict(zip(rewards, values, strict=True))} is not finite"
                raise NotFiniteError(message, source="reward_funcs", rows=(place,))
            sums.append(total)
        return sums

    def _called(
        self,
        rows: Sequence[Mapping[str, Any]],
        texts: Sequence[str],
        ids: Sequence[list[int]],
        extra: dict[str, list[Any]],
    ) -> dict[str, list[float] | None]:
        """What every function gives, by its name; functions that are awaited run beside the others. `extra` gets the
        columns that they log.
        """

        def log_extra(column: str, values: Sequence[Any]) -> None:
            extra.setdefault(str(column), []).extend(values)

        arguments, of_the_run = _arguments(rows, texts, ids), {**self.of_the_run(), "log_extra": log_extra}
        seconds = None if self.seconds is None else self.seconds * len(rows)
        start, outputs = time.monotonic(), dict[str, Any]()
        try:
            for name, function in self.functions.items():
                if function is None:
                    continue
                with _guarded(name, self.seconds, arguments), _in_time(name, seconds):
                    outputs[name] = function(**own_copy(arguments), **_taken(function, of_the_run))
                if inspect.isawaitable(outputs[name]):
                    outputs[name] = asyncio.run_coroutine_threadsafe(_caught(outputs[name]), _loop())
            for name, output in outputs.items():
                if isinstance(output, Future):
                    left = None if seconds is None else max(0.0, start + seconds - time.monotonic())
                    with _guarded(name, self.seconds, arguments):
                        outputs[name] = _awaited(output, left)
        finally:
            for output in outputs.values():
                if isinstance(output, Future):
                    output.cancel()
        return {name: _numbers(name, outputs[name], texts) if name in outputs else None for name in self.functions}

    def tried_on(self, datasets: Iterable[Any]) -> "Judge":
        """A judge that has judged an empty answer to the first row of each dataset, before anything expensive; what
        was tried before is not asked again.

        Args:
            datasets: those that are `None` are left out.

        Raises:
            ScoringError: as `judged`.
        """
        datasets = [dataset for dataset in datasets if dataset is not None]
        verifier = None if self.verifier is None else tried(self.verifier, self.seconds, datasets)
        untried = {name: one for name, one in self.functions.items() if not isinstance(one, TriedFunction)}
        judge = replace(self, functions=untried, weights=(1.0,) * len(untried))
        for dataset in datasets:
            try:
                row = next(iter(dataset))
            except Exception:  # what is wrong with the dataset is said elsewhere
                continue
            if not untried or "prompt" not in row:
                continue
            judge._called([row, row], ["", ""], [[0], [0]], {})  # two of them, as the rewards must be as many
        functions = {
            name: one if one is None or isinstance(one, TriedFunction) else TriedFunction(one)
            for name, one in self.functions.items()
        }
        return replace(self, verifier=verifier, functions=functions)


def judge_of(
    verifier: Verifier | None,
    functions: Sequence[RewardFunction | None] = (),
    weights: Sequence[float] | None = None,
    seconds: float | None = None,
) -> Judge:
    """A judge of a verifier and reward functions.

    Args:
        verifier (callable, *optional*): (completion text, row) -> score in [0, 1].
        functions (`list`): reward functions; `None` in it is the verifier's score.
        weights (`list[float]`, *optional*): of the functions; 1 for each if left out.
        seconds (`float`, *optional*): that they may take for an answer; `None` for any time.

    Raises:
        ConfigError: weights that are not those of the functions, or a verifier that is not there.
    """
    named: dict[str, RewardFunction | None] = {}
    for function in functions:
        name = VERIFIER if function is None else _name_of(function)
        number = 2 + sum(one.rpartition("_")[0] == name for one in named)
        named[name if name not in named else f"{name}_{number}"] = function
    weights = (1.0,) * len(named) if weights is None else tuple(map(float, weights))
    return Judge(verifier, named, weights, seconds)


def _written(function: RewardFunction) -> RewardFunction:
    """A reward function as the user wrote it."""
    return function.function if isinstance(function, TriedFunction) else function


def _name_of(function: RewardFunction) -> str:
    """As TRL names it in what is logged."""
    function = _written(function)
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _arguments(
    rows: Sequence[Mapping[str, Any]], texts: Sequence[str], ids: Sequence[list[int]]
) -> dict[str, list[Any]]:
    """What TRL calls reward functions with: completions are conversations where prompts are."""
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _NOT_COLUMNS]
    taken = [name for name in columns if name in _ARGUMENTS]
    if taken:
        raise DataError(f"column {taken[0]!r} has the name of an argument of reward functions: rename it")
    prompts = [row["prompt"] for row in rows]
    completions = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    of_rows = {name: [row.get(name) for row in rows] for name in columns}
    return {"prompts": prompts, "completions": completions, "completion_ids": list(ids), **of_rows}


def _taken(function: RewardFunction, offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that a function has a place for."""
    try:
        parameters = inspect.signature(_written(function)).parameters
    except (TypeError, ValueError):  # code without a signature
        return dict(offered)
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in offered.items() if takes_all or name in parameters}


def _in_time(name: str, seconds: float | None) -> AbstractContextManager[None]:
    return nullcontext() if seconds is None else alarm_after(seconds, f"reward function {name!r}")


@contextmanager
def _guarded(name: str, seconds: float | None, arguments: Mapping[str, list[Any]]) -> Iterator[None]:
    """Inside, a reward function is called; whatever it does is told with its name."""
    count = len(arguments["prompts"])
    try:
        with as_guest(f"reward function {name!r}"):
            yield
    except (DopdError, KeyboardInterrupt, Stopped):
        raise
    except TooLongError:
        raise ScoringError(
            f"reward function {name!r} took more than verifier_timeout (={seconds:g}) seconds for each of {count} "
            "answers: make it faster, or raise verifier_timeout"
        ) from None
    except BaseException as error:  # SystemExit, too: it would end a run as if it were done
        raise ScoringError(
            f"reward function {name!r} raised {type(error).__name__}: {first_line(error)}. It is called with lists "
            f"({', '.join(f'{argument}=' for argument in arguments)}), and gives a list with a number, or None, for "
            "each completion"
        ) from error


async def _caught(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """What is awaited, or what it raised: an exit would end the loop, and its time is over for us alone."""
    try:
        return await awaitable, None
    except BaseException as error:
        return None, error


def _awaited(future: "Future[tuple[Any, BaseException | None]]", seconds: float | None) -> Any:
    try:
        value, error = future.result(seconds)
    except NotInTimeError:
        raise TooLongError from None
    if error is not None:
        raise error
    return value


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One loop for all calls, in a thread of its own: clients that functions keep belong to it, and notebooks have a
    loop in the main thread already.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


def _columns(extra: Mapping[str, list[Any]], count: int) -> dict[str, list[Any]]:
    """What `log_extra` got, as plain values.

    Raises:
        ScoringError: not one value for each completion, or a name that the table of completions has.
    """
    for column, values in extra.items():
        if len(values) != count:
            raise ScoringError(
                f"log_extra({column!r}, ...) got {len(values)} values for {count} completions: give it one for each"
            )
        if column in _OF_TABLE:
            raise ScoringError(f"log_extra({column!r}, ...): the table of completions has a {column!r}: rename it")
    return {column: [_plain(value) for value in values] for column, values in extra.items()}


def _plain(value: Any) -> Any:
    """A value as JSON and tables have them; tensors and arrays of one number are that number."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _numbers(name: str, values: Any, texts: Sequence[str]) -> list[float]:
    """Rewards as numbers, NaN where a function does not apply."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or len(values) != len(texts):
        count = f" of {len(values)}" if isinstance(values, list | tuple) else ""
        raise ScoringError(
            f"reward function {name!r} gave a {type(values).__name__}{count}: it must give a list of {len(texts)}, one "
            "number (or None) for each completion"
        )
    return [_number(name, value, place, texts[place]) for place, value in enumerate(values)]


def _number(name: str, value: Any, place: int, text: str) -> float:
    if value is None:
        return math.nan
    try:
        number = None if isinstance(value, str) else float(value)
    except Exception:  # of whatever object it is
        number = None
    if number is not None and math.isfinite(number):
        return number
    sentence = (
        f"reward function {name!r} gave {cut(shown(value))} for {quoted(text)}: a reward must be a finite "
        "number, or None where the function does not apply"
    )
    raise ScoringError(sentence) if number is None else NotFiniteError(sentence, source="reward_funcs", rows=(place,))
