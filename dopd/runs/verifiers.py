"""Verifiers by name."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from dopd.errors import ConfigError, DataError, first_line
from dopd.evaluation.verifier import Verifier
from dopd.interrupts import Stopped
from dopd.tasks.sources import same_number_or_formula


def check_verifier_name(name: str) -> None:
    """Raise `ConfigError` for a name that is no verifier's, without importing anything."""
    module, _, function = name.partition(":")
    if name not in _VERIFIERS and not (function.isidentifier() and all(map(str.isidentifier, module.split(".")))):
        close = difflib.get_close_matches(name, _VERIFIERS, n=1)
        hint = f". Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"verifier (={name!r}) must be {', '.join(_VERIFIERS)} or package.module:function{hint}")


def load_verifier(name: str | None) -> Verifier | None:
    """`math`, `exact` or `package.module:function`: code, which is run. Modules of the working directory count.

    Raises:
        ConfigError: there is no such function, or its module cannot be imported.
    """
    if name is None:
        return None
    if name in _VERIFIERS:
        return _VERIFIERS[name]
    module, colon, function = name.partition(":")
    if os.getcwd() not in sys.path:  # a command has the folder of its script there instead
        sys.path.append(os.getcwd())
    try:
        if not colon:
            raise ImportError("no colon between module and function")
        verifier = getattr(importlib.import_module(module), function)
        if not callable(verifier):
            raise TypeError(f"{function} is {type(verifier).__name__} and no function")
    except (KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:  # whatever a module does when it is imported, leaving the program included
        raise ConfigError(
            f"verifier (={name!r}) must be {', '.join(_VERIFIERS)} or package.module:function of (completion, row): "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    return verifier


def _exact(completion: str, row: Mapping[str, Any]) -> float:
    return float(completion.strip() == str(_answer(row)).strip())


def _math(completion: str, row: Mapping[str, Any]) -> float:
    return same_number_or_formula(completion, str(_answer(row)))


def _answer(row: Mapping[str, Any]) -> Any:
    if "answer" not in row:
        raise DataError(f"the verifier needs a column 'answer'; the row has {', '.join(row)}")
    return row["answer"]


_VERIFIERS: dict[str, Callable[[str, Mapping[str, Any]], float]] = {"math": _math, "exact": _exact}
