"""Verifiers and reward functions by name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dopd.data.checks import renaming
from dopd.errors import ConfigError, DataError
from dopd.registry import Registry, TimeLimit
from dopd.step.rewards import VERIFIER, RewardFunction
from dopd.step.verifier import Verifier
from dopd.tasks.gsm_symbolic import same_number_or_formula

# Called with a completion and its row.
VERIFIERS: Registry[Verifier] = Registry("verifier", lambda name, code: VERIFIERS.register(name, code, code))


REWARD_FUNCTIONS: Registry[RewardFunction] = Registry(
    "reward function", lambda name, code: REWARD_FUNCTIONS.register(name, code, code), reserved=(VERIFIER,)
)
RewardFunctions = RewardFunction | str | Sequence[RewardFunction | str | None]


def load_verifier(verifier: Verifier | str | None, seconds: float | None = None) -> Verifier | None:
    """A verifier: `math`, `exact`, a function of (completion, row) as `package.module:function` or
    `./file.py:function`, or the function itself.

    Args:
        verifier (callable or `str`, *optional*): `None` for no verifier.
        seconds (`float`, *optional*): that the import of its module may take (`verifier_timeout`); `None` for any time.

    Raises:
        ConfigError: there is no such function, or its module cannot be imported.
    """
    if verifier is None or (callable(verifier) and not isinstance(verifier, nn.Module)):
        return verifier
    return VERIFIERS.find(verifier, limit=TimeLimit(seconds, "verifier_timeout"))


def load_reward_functions(
    functions: RewardFunctions | None, seconds: float | None = None
) -> list[RewardFunction | None]:
    """Reward functions from one or several of them, or their names; `None` for the verifier's score.

    Args:
        functions: one, or a list of them.
        seconds (`float`, *optional*): that the import of a module may take (`verifier_timeout`); `None` for any time.

    Raises:
        ConfigError: there is no such function, or its module cannot be imported.
    """
    found: list[RewardFunction | None] = []
    limit = TimeLimit(seconds, "verifier_timeout")
    for one in _several(functions):
        if one is None or (callable(one) and not isinstance(one, nn.Module)):
            found.append(one)
        else:
            check_reward_name(one)
            found.append(None if one == VERIFIER else REWARD_FUNCTIONS.find(one, "reward_funcs", limit))
    return found


def check_reward_names(functions: RewardFunctions | None) -> None:
    """Raise `ConfigError`, without reading anybody's code, for a name that no reward function can have."""
    for one in _several(functions):
        check_reward_name(one)


def check_reward_name(name: Any) -> None:
    """Raise `ConfigError`, without reading anybody's code, unless a name can be that of a reward function."""
    if isinstance(name, str) and name in VERIFIERS:
        raise ConfigError(
            f"reward_funcs (={name!r}) is a verifier: set verifier={name!r}, and name {VERIFIER!r} in reward_funcs "
            "where others stand beside it"
        )
    if isinstance(name, nn.Module):
        raise ConfigError(
            f"reward_funcs (={type(name).__name__}) is a model: pass a function that asks it, f(prompts, completions, "
            "**columns) -> list of numbers"
        )
    REWARD_FUNCTIONS.check_name(name, "reward_funcs")


def _several(functions: RewardFunctions | None) -> Iterable[RewardFunction | str | None]:
    if functions is None:
        return ()
    return functions if isinstance(functions, list | tuple) else (functions,)


def _exact(completion: str, row: Mapping[str, Any]) -> float:
    return float(completion.strip() == str(_answer(row)).strip())


def _math(completion: str, row: Mapping[str, Any]) -> float:
    return same_number_or_formula(completion, str(_answer(row)))


def _answer(row: Mapping[str, Any]) -> Any:
    if "answer" not in row:
        raise DataError(
            f"the verifier needs a column 'answer'; the row has {', '.join(row)}: write {renaming('answer', 'NAME')}"
        )
    return row["answer"]


for _name, _verifier in (("math", _math), ("exact", _exact)):
    VERIFIERS.register(_name, _verifier, _verifier)
