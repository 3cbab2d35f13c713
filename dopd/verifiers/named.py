"""Verifiers and reward functions by name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from dopd.errors import ConfigError, DopdError, first_line
from dopd.guests import as_guest
from dopd.interrupts import Stopped
from dopd.registry import Registry, TimeLimit, is_reference
from dopd.settings import SettingsError, check, settings_of_call
from dopd.step.rewards import VERIFIER, RewardFunction
from dopd.step.verifier import Verifier
from dopd.verifiers.answers import choice, exact, math
from dopd.verifiers.code import CodeVerifier
from dopd.verifiers.judge import JudgeVerifier

# Functions of a completion and its row; or classes, whose objects are called so, and whose arguments are options.
VERIFIERS: Registry[Verifier | type] = Registry("verifier", lambda name, code: VERIFIERS.register(name, code, code))
NAMES = "math, exact, choice, code, judge, package.module:name or ./file.py:name"  # for the help of commands


REWARD_FUNCTIONS: Registry[RewardFunction] = Registry(
    "reward function", lambda name, code: REWARD_FUNCTIONS.register(name, code, code), reserved=(VERIFIER,)
)
RewardFunctions = RewardFunction | str | Sequence[RewardFunction | str | None]


def load_verifier(
    verifier: Verifier | str | None, seconds: float | None = None, options: Mapping[str, Any] | None = None
) -> Verifier | None:
    """A verifier: a name of `VERIFIERS`, a function of (completion, row) as `package.module:function` or
    `./file.py:function`, a class of such objects, or the function itself.

    Args:
        verifier (callable or `str`, *optional*): `None` for no verifier.
        seconds (`float`, *optional*): that the import of its module may take (`verifier_timeout`); `None` for any time.
        options (`dict`, *optional*): arguments of a class (`verifier_options`).

    Raises:
        ConfigError: there is no such function, its module cannot be imported, or it does not take the options.
    """
    if verifier is None or (callable(verifier) and not isinstance(verifier, nn.Module)):
        if options:
            whose = "a task's verifier or none" if verifier is None else "a function that is given"
            raise ConfigError(f"verifier_options (={dict(options)!r}) are of a verifier by name, and this is {whose}")
        return verifier
    return _with_options(str(verifier), VERIFIERS.find(verifier, limit=TimeLimit(seconds, "verifier_timeout")), options)


def check_verifier(name: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise `ConfigError`, without reading anybody's code, for a verifier that there cannot be, or not with these
    options.
    """
    VERIFIERS.check_name(name)
    if not is_reference(name):
        _with_options(name, VERIFIERS[name], options)


def _with_options(name: str, found: Verifier | type, options: Mapping[str, Any] | None) -> Verifier:
    if not isinstance(found, type):
        if options:
            raise ConfigError(
                f"verifier_options (={dict(options)!r}) are of verifiers that are classes, and {name!r} is a function: "
                "leave them out"
            )
        return found
    read, problems = check(dict(options or {}), settings_of_call(found), f"verifier_options of {name}")
    if problems:
        raise SettingsError(problems)
    try:
        with as_guest(f"verifier {name!r}"):
            verifier: Verifier = found(**read)
            return verifier
    except (DopdError, Stopped):
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"verifier (={name!r}) raises {type(error).__name__}: {first_line(error)}") from error


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


_OURS: dict[str, Verifier | type] = {
    "math": math,
    "exact": exact,
    "choice": choice,
    "code": CodeVerifier,
    "judge": JudgeVerifier,
}
for _name, _code in _OURS.items():
    VERIFIERS.register(_name, _code, _code)
