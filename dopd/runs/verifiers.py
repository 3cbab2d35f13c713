"""Verifiers by name."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from dopd.errors import ConfigError, DataError
from dopd.evaluation.student import Verifier
from dopd.tasks.sources import same_number_or_formula


def load_verifier(name: str | None) -> Verifier | None:
    """`math`, `exact` or `package.module:function`."""
    if name is None:
        return None
    if name in _VERIFIERS:
        return _VERIFIERS[name]
    module, colon, function = name.partition(":")
    try:
        if not colon:
            raise ImportError("no colon between module and function")
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"verifier (={name!r}) must be {', '.join(_VERIFIERS)} or package.module:function: {error}"
        ) from None


def _exact(completion: str, row: Mapping[str, Any]) -> float:
    return float(completion.strip() == str(_answer(row)).strip())


def _math(completion: str, row: Mapping[str, Any]) -> float:
    return same_number_or_formula(completion, str(_answer(row)))


def _answer(row: Mapping[str, Any]) -> Any:
    if "answer" not in row:
        raise DataError(f"the verifier needs a column 'answer'; the row has {', '.join(row)}")
    return row["answer"]


_VERIFIERS: dict[str, Callable[[str, Mapping[str, Any]], float]] = {"math": _math, "exact": _exact}
