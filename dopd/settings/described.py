"""One setting: its type with limits and choices, from which checks, flags and help are made.

Types are those of annotations; limits are written into them (`Annotated[int, Ge(1)]`), which the parsers of
transformers and TRL read past. pydantic decides what fits.
"""

import dataclasses
import functools
import inspect
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import DocInfo, Ge, Gt, Le, Lt, MinLen
from pydantic import InstanceOf, Strict, TypeAdapter, ValidationError

from dopd.errors import did_you_mean
from dopd.secrets import is_secret
from dopd.settings.problems import Problems
from dopd.settings.quoting import quoted

Count = Annotated[int, Ge(1)]
Natural = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Lt(2**32)]  # what numpy takes
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Gt(0), Le(1)]
Fraction = Annotated[float, Gt(0), Lt(1)]
Probability = Annotated[float, Ge(0), Le(1)]
Text = Annotated[str, MinLen(1)]
Steps = Count | Fraction  # a number of them, or a share of all that a run makes

REQUIRED = inspect.Parameter.empty
_PLAIN = (type(None), bool, int, float, str, list, dict)
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_LIMITS = {Ge: "of at least {0.ge}", Gt: "above {0.gt}", Le: "of at most {0.le}", Lt: "below {0.lt}"}
# pydantic's names of what is wrong with a value whose type is right.
_OF_THE_VALUE = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "literal_error", "too_short"}
_OF_THE_VALUE |= {"string_too_short", "finite_number"}
_MAX_INT = 2**63
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_WHOLE = re.compile("[-+]?[0-9]{1,18}")


@dataclass(frozen=True)
class Setting:
    """What one setting may be.

    Attributes:
        name (`str`): its key.
        hint: its type, with limits in `Annotated`.
        default: its value where it is left out; `REQUIRED` where it must be given.
        about (`str`): what it is for, in a line.
        fix (`str`): what messages add on what to do instead.
        keys (`dict[str, Setting]`, *optional*): of a mapping, where they are fixed.
    """

    name: str
    hint: Any
    default: Any = REQUIRED
    about: str = ""
    fix: str = ""
    keys: Mapping[str, "Setting"] | None = None

    def __str__(self) -> str:
        allowed = f"{self.name}: {self.words}{' or null' if self.nullable else ''}"
        return allowed + ("; must be given" if self.default is REQUIRED else f"; default {quoted(self.default)}")

    @functools.cached_property
    def parts(self) -> tuple[Any, ...]:
        """The types of a union, or the type itself."""
        return tuple(_parts(self.hint))

    @functools.cached_property
    def kinds(self) -> set[Any]:
        """The parts without limits: classes, or origins of generic types."""
        return {get_origin(_bare(part)) or _bare(part) for part in self.parts}

    @property
    def nullable(self) -> bool:
        """Whether `None` means something."""
        return bool({type(None), Any} & self.kinds)

    @property
    def is_switch(self) -> bool:
        """Whether it is true or false, so that a flag needs no value."""
        return bool in self.kinds and not {str, Literal} & self.kinds

    @property
    def is_text(self) -> bool:
        """Whether it can be text alone, so that a flag's value needs no quotes."""
        choices = all(isinstance(choice, str) for choice in self.choices)
        return self.kinds - {type(None)} <= {str, Literal} and choices

    @functools.cached_property
    def choices(self) -> tuple[Any, ...]:
        """The values of `Literal` parts."""
        return tuple(choice for part in self.parts for choice in _choices(_bare(part)))

    @functools.cached_property
    def words(self) -> str:
        """What is allowed, for messages and help."""
        return " or ".join(sorted(word for part in self.parts if part is not type(None) for word in _words(part)))

    @functools.cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(_strict(self.hint))

    def read(self, value: Any, path: str = "") -> tuple[Any, list[str]]:
        """A value as it is meant, and what is wrong with it.

        Args:
            value: from YAML, a flag, or Python.
            path (`str`): what messages call it; its name if left out.
        """
        path = path or self.name
        plain = _plain(value)
        if not isinstance(plain, _PLAIN):
            return value, [] if Any in self.kinds or self._is_object(value) else [self._wrong(path, value)]
        if plain is None and not self.nullable:
            return value, [
                f"{path} has no value, and cannot be null: it must be {self.words}. Leave the key out for its default"
            ]
        meant = self._meant(plain)
        unusable = _unusable(meant, path)
        if unusable:
            return value, [f"{unusable}: {self.words}" if isinstance(meant, int | float) else unusable]
        try:
            read = self._adapter.validate_python(meant)
        except ValidationError as error:
            kinds = {found["type"] for found in error.errors(include_url=False, include_context=False)}
            return value, [self._wrong(path, meant, of_the_value=bool(kinds & _OF_THE_VALUE))]
        if isinstance(read, bool) != isinstance(meant, bool):  # 0 equals the choice False
            return value, [self._wrong(path, meant)]
        if self.keys is not None and isinstance(read, dict):
            return check(read, self.keys, path)
        return read, []

    def _is_object(self, value: Any) -> bool:
        """Whether a value is an object of the host where one is meant, of its class or in the place of a mapping."""
        classes = tuple(kind for kind in self.kinds if isinstance(kind, type) and kind not in _PLAIN)
        as_mapping = dict in self.parts and not isinstance(value, type) and callable(getattr(value, "to_dict", None))
        return isinstance(value, classes) or as_mapping

    def _meant(self, value: Any) -> Any:
        """The value that is meant: 5e-6 as text, `no` as False, a mapping as JSON text."""
        if isinstance(value, str) and not {str, Any} & self.kinds:
            if bool in self.kinds and value.lower() in (*_TRUE, *_FALSE):
                return value.lower() in _TRUE
            # Where words stand beside numbers, parsers of command lines give text.
            if int in self.kinds and any(isinstance(one, str) for one in self.choices) and _WHOLE.fullmatch(value):
                return int(value)
            if float in self.kinds and value not in self.choices and value.isascii():
                try:
                    return self._meant(float(value))
                except ValueError:
                    return value
            if {dict, list} & self.kinds and value.lstrip()[:1] in ("{", "["):
                try:
                    return json.loads(value)
                except (ValueError, RecursionError):
                    return value
        if isinstance(value, float) and {int, float} <= self.kinds and value.is_integer():
            return int(value)  # parsers of command lines give 10.0
        if value is False and bool not in self.kinds and "no" in self.choices:
            return "no"
        return value

    def _wrong(self, path: str, value: Any, *, of_the_value: bool = False) -> str:
        shown = "<secret>" if is_secret(path.replace(":", ".").split(".")[-1].strip()) else quoted(value)
        if of_the_value and isinstance(value, str | list) and not self.choices and not all([value, *value]):
            what = "has an empty entry" if value else "is empty"
            return f"{path} (={shown}) {what}: it must be {self.words}. Leave the key out for its default"
        if isinstance(value, str) and {dict, list} & self.kinds and isinstance(self._meant(value), str):
            return f"{path} (={shown}) is not JSON: it must be {self.words}"
        message = f"{path} (={shown}) must be {self.words}"
        fits = isinstance(value, str) and (str in self.kinds or bool(self.choices))
        if not of_the_value or (self.choices and not fits and not isinstance(value, int | float)):
            message += f", got {type(value).__name__}"
        hint = did_you_mean(value, map(str, self.choices)) if fits else ""
        message += f".{hint}" if hint else ""
        if str in self.kinds and isinstance(value, bool | int | float) and not of_the_value:
            message += ": in YAML, quotes make it text"
        return message + (f"; {self.fix}" if self.fix else "")


def check(
    values: Mapping[str, Any], settings: Mapping[str, Setting], path: str = ""
) -> tuple[dict[str, Any], list[str]]:
    """Values as they are meant, and everything that is wrong with them.

    Args:
        values (`dict`): by key.
        settings (`dict[str, Setting]`): the keys that there are.
        path (`str`): of the mapping, for messages; the top level if left out.
    """
    read, problems = {}, []
    for key, value in values.items():
        if key not in settings:
            problems.append(unknown_key(key, settings, path))
            continue
        read[key], found = settings[key].read(value, f"{path}: {key}" if path else key)
        problems += found
    return read, problems


def unknown_key(key: Any, allowed: Iterable[str], path: str = "") -> str:
    """The message about a key that does not exist."""
    names = [*allowed]
    hint = did_you_mean(key, names)
    if path:
        ending = f".{hint}" if hint else f"; its keys are {', '.join(names) or 'none'}"
        return f"{path}: unknown key {quoted(key)}{ending}"
    return f"unknown key {quoted(key)}.{hint or ' `dopd config` lists them all.'}"


def check_attributes(owner: Any, settings: Mapping[str, Setting]) -> None:
    """Check the fields of an object, and give those the value that is meant where it was written in other words.

    Raises:
        SettingsError: naming every field that cannot be used.
    """
    problems = Problems()
    for name, setting in settings.items():
        value = getattr(owner, name, REQUIRED)
        if value is REQUIRED or value is setting.default:
            continue
        read, found = setting.read(value)
        problems.add(*found)
        # The host knows its own enumerations, which are text.
        if not found and type(read) is not type(value) and not (isinstance(value, Enum) and isinstance(value, str)):
            object.__setattr__(owner, name, read)
    problems.raise_any()


@functools.cache
def settings_of(cls: type) -> dict[str, Setting]:
    """The settings that are the fields of a dataclass, in their order; choices and help are of its metadata."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        if field.init:
            choices = field.metadata.get("choices")
            hint = Literal[tuple(choices)] if choices else hints[field.name]
            help_text = " ".join(str(field.metadata.get("help", "")).split())
            found[field.name] = Setting(field.name, hint, _default(field), help_text)
    return found


@functools.cache
def settings_of_call(function: Callable[..., Any]) -> dict[str, Setting]:
    """The settings that are the named parameters of a function."""
    hints = typing.get_type_hints(function, include_extras=True)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        name: Setting(name, hints.get(name, _hint(one)), one.default)
        for name, one in inspect.signature(function).parameters.items()
        if one.kind in named
    }


def _hint(parameter: inspect.Parameter) -> Any:
    """The type of a parameter: as annotated, or that of its default."""
    if parameter.annotation is not parameter.empty and not isinstance(parameter.annotation, str):
        return parameter.annotation
    return type(parameter.default) if isinstance(parameter.default, bool | int | float | str) else Any


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return REQUIRED if field.default is MISSING else field.default


def _plain(value: Any) -> Any:
    """A value of Python in YAML's types, where it has one."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    return value


def _unusable(value: Any, path: str) -> str:
    """The message about a number that is not finite or too large, or text that no file takes, at any depth; `""` where
    there is none.
    """
    for inner, number in _scalars(value, path):
        if isinstance(number, str) and _NO_TEXT.search(number):
            return f"{inner} (={quoted(number)}) must be text without NUL and halves of characters"
        if isinstance(number, int) and not -_MAX_INT <= number < _MAX_INT:
            return f"{inner} (={quoted(number)}) must be a whole number of at most 64 bits"
        if isinstance(number, float) and not math.isfinite(number):
            return f"{inner} (={number}) must be a finite number"
    return ""


def _scalars(value: Any, path: str) -> Iterator[tuple[str, int | float | str]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _scalars(entry, f"{path}: {quoted(key) if not isinstance(key, str) else key}")
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from _scalars(entry, f"{path}[{index}]")
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield path, value


def _parts(hint: Any) -> Iterator[Any]:
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        # Where an enumeration stands beside text, the host reads the text as one of its members.
        enums = any(isinstance(part, type) and issubclass(part, Enum) for part in get_args(hint))
        yield from (inner for part in get_args(hint) if not (enums and part is str) for inner in _parts(part))
    elif isinstance(hint, type) and issubclass(hint, Enum):
        yield Literal[tuple(member.value for member in hint)]
    else:
        yield hint


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def _words(hint: Any) -> list[str]:
    if get_origin(hint) is Annotated:
        base, *limits = get_args(hint)
        described = [limit.documentation for limit in limits if isinstance(limit, DocInfo)]
        if described:
            return described
        bounds = [_LIMITS[type(limit)].format(limit) for limit in limits if type(limit) in _LIMITS]
        return [" ".join([_words(base)[0], " and ".join(bounds)]).strip()]
    if get_origin(hint) is Literal:
        return [repr(choice) for choice in get_args(hint)]
    if get_origin(hint) in (list, Sequence) or hint is list:
        inner = Setting("", (get_args(hint) or (Any,))[0]).words
        return [f"list of {inner}" if inner else "list"]
    if hint is Any:
        return []
    kind = get_origin(hint) or hint
    return ["mapping" if kind is dict else getattr(kind, "__name__", str(kind))]


def _strict(hint: Any) -> Any:
    """A type for pydantic in which nothing is converted but whole numbers to numbers."""
    parts = tuple(_parts(hint))
    if len(parts) > 1:
        return Union[tuple(_strict(part) for part in parts)]  # noqa: UP007 - made at run time
    (part,) = parts
    origin, arguments = get_origin(part), get_args(part)
    if origin is Annotated:
        return Annotated[(_strict(arguments[0]), *arguments[1:])]
    if origin in (list, Sequence):
        return Annotated[list[_strict(arguments[0])], Strict()]  # type: ignore[misc]
    if part is dict:  # with keys of any kind: devices by number, sequences of tokens
        return Annotated[dict[Any, Any], Strict()]
    if origin is dict:
        return Annotated[dict[str, _strict(arguments[1])], Strict()]  # type: ignore[misc]
    if part in (int, float, bool, str, list):
        return Annotated[part, Strict()]
    if part in (Any, type(None)) or origin is Literal:
        return part
    return InstanceOf[origin or part]  # type: ignore[misc]
