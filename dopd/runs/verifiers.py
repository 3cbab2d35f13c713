"""Verifiers by name."""

from collections.abc import Mapping
from typing import Any

from dopd.data.checks import renaming
from dopd.errors import DataError
from dopd.registry import Registry, TimeLimit
from dopd.step.verifier import Verifier
from dopd.tasks.gsm_symbolic import same_number_or_formula

# Called with a completion and its row.
VERIFIERS: Registry[Verifier] = Registry("verifier", lambda name, code: VERIFIERS.register(name, code, code))


def load_verifier(name: str | None, seconds: float | None = None) -> Verifier | None:
    """`math`, `exact`, or a function of (completion, row) as `package.module:function` or `./file.py:function`.

    Args:
        name (`str`, *optional*): `None` for no verifier.
        seconds (`float`, *optional*): that the import of its module may take (`verifier_timeout`); `None` for any time.

    Raises:
        ConfigError: there is no such function, or its module cannot be imported.
    """
    return None if name is None else VERIFIERS.find(name, limit=TimeLimit(seconds, "verifier_timeout"))


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
