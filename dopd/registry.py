"""Registries that users add to, and users' own code by name: `package.module:function` or `./file.py:function`."""

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from dopd.errors import ConfigError, DopdError, did_you_mean, first_line
from dopd.guests import as_guest
from dopd.interrupts import Stopped, TooLongError, alarm_after

Entry = TypeVar("Entry")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")


@dataclass(frozen=True)
class TimeLimit:
    """How long the import of a module may take.

    Attributes:
        seconds (`float`, *optional*): `None` for any time.
        setting (`str`): that says so; none if empty.
    """

    seconds: float | None = 120.0
    setting: str = ""

    def __str__(self) -> str:
        return f"{self.setting} (={self.seconds:g}) seconds" if self.setting else f"{self.seconds:g} seconds"


class Registry(dict[str, Entry], Generic[Entry]):
    """Entries by name. A name has one meaning: other code under it is refused.

    Args:
        what (`str`): what an entry is, for messages.
        adopt (callable, *optional*): registers code that is named as `package.module:function` and that no decorator
            has registered; such code is refused if left out.
        reserved (`tuple[str, ...]`): names that mean something without an entry.
    """

    def __init__(
        self, what: str, adopt: Callable[[str, Any], object] | None = None, reserved: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.what, self.reserved = what, reserved
        self.code: dict[str, Any] = {}
        self.aliases: dict[str, str] = {}
        self._renamed: dict[str, tuple[str, str]] = {}
        self._adopt = adopt

    def register(self, name: str, entry: Entry, code: Any) -> None:
        """Add an entry, made of a function or class that the user wrote.

        Raises:
            ConfigError: a name that cannot be one, or that of other code.
        """
        if not isinstance(name, str) or not (_NAME.fullmatch(name) or is_reference(name)):
            raise ConfigError(
                f"the name of a {self.what} (={name!r}), for {place_of(code)}, must begin with a letter and have "
                "letters, digits, '_', '.' and '-' alone"
            )
        if name in self.reserved or (name in self and not _is_same(self.code[name], code)):
            by = f" by {place_of(self.code[name])}" if name in self else ""
            raise ConfigError(
                f"{self.what} {name!r} is taken{by}: register {place_of(code)} under another name (or, if it is a "
                "newer version of the same code, start Python again)"
            )
        self[name], self.code[name] = entry, code

    def rename(self, former: str, name: str, why: str) -> None:
        """Refuse a former name with its new one: other code may take it, and would be meant by old configurations.

        Args:
            former, name (`str`): the names.
            why (`str`): what the new name says better.
        """
        self._renamed[former] = name, why

    def check_name(self, name: object, field: str = "") -> None:
        """Raise `ConfigError`, without reading anybody's code, unless `name` is known or names code.

        Args:
            name: what a setting says.
            field (`str`): the setting, for the message; what an entry is if left out.
        """
        names = [*self, *self.reserved]
        if isinstance(name, str) and (name in names or is_reference(name)):
            return
        if isinstance(name, str) and name in self._renamed:
            current, why = self._renamed[name]
            raise ConfigError(f"{field or self.what} (={name!r}) is called {current!r} now: {why}")
        names = [one for one in names if not is_reference(one)]
        raise ConfigError(
            f"{field or self.what} (={name!r}) must be one of {', '.join(names)}, or your own: package.module:name or "
            f"./file.py:name.{did_you_mean(name, names, 2)}"
        )

    def resolve(self, name: object, field: str = "", limit: TimeLimit = TimeLimit()) -> str:
        """The name under which an entry is registered; users' code is read, and run, the first time it is named.

        Raises:
            ConfigError: see `check_name`; code that cannot be read, or is no such thing.
        """
        self.check_name(name, field)
        assert isinstance(name, str)
        if name in self or name in self.reserved:
            return name
        if name not in self.aliases:
            field = field or self.what
            code = load_code(field, name, limit)
            registered = [entry for entry, one in self.code.items() if _is_same(one, code)]
            if not registered:
                if self._adopt is None:
                    raise ConfigError(
                        f"{field} (={name!r}) is not registered: decorate it with dopd.register_{self.what}"
                    )
                self._adopt(name, code)
            self.aliases[name] = (registered or [name])[0]
        return self.aliases[name]

    def find(self, name: object, field: str = "", limit: TimeLimit = TimeLimit()) -> Entry:
        """The entry of a name; see `resolve`."""
        return self[self.resolve(name, field, limit)]


def is_reference(text: str) -> bool:
    """Whether a text names code: `package.module:name` or `path/to/file.py:name`."""
    place, colon, name = text.rpartition(":")
    return (
        bool(colon) and name.isidentifier() and (place.endswith(".py") or all(map(str.isidentifier, place.split("."))))
    )


def load_code(field: str, reference: str, limit: TimeLimit = TimeLimit()) -> Any:
    """What `package.module:name` or `./file.py:name` names: code, which is run. Modules of the working directory count.

    Args:
        field (`str`): the setting that names it, for messages.
        reference (`str`): the name.
        limit (`TimeLimit`): of the import.

    Raises:
        ConfigError: there is no such function or class, or its module cannot be imported.
    """
    place, _, name = reference.rpartition(":")
    _search(os.getcwd())  # a command has the folder of its script there instead
    try:
        task = f"{field} (={reference!r}): the import of {place}"
        with nullcontext() if limit.seconds is None else alarm_after(limit.seconds, task), as_guest(task):
            module = _module_of_file(place) if place.endswith(".py") else importlib.import_module(place)
        code = getattr(module, name, None)
        if code is None:
            functions = [one for one, value in vars(module).items() if callable(value) and not one.startswith("_")]
            hint = did_you_mean(name, functions).strip()
            raise ConfigError(f"it has no {name!r}{f' ({hint[0].lower()}{hint[1:]})' if hint else ''}")
        if not callable(code):
            raise TypeError(f"{name} is {type(code).__name__} and no function")
    except (KeyboardInterrupt, Stopped):
        raise
    except TooLongError:
        way = f", or raise {limit.setting}" if limit.setting else ""
        raise ConfigError(
            f"{field} (={reference!r}) cannot be read: importing {place} took more than {limit}. Leave work to the "
            f"function, not to its module{way}"
        ) from None
    except BaseException as error:  # whatever a module does when it is imported, leaving the program included
        reason = str(error) if isinstance(error, DopdError) else f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(
            f"{field} (={reference!r}) cannot be read: {reason}. It names your own code as package.module:name or "
            "./file.py:name, which are looked for from the working directory too"
        ) from error
    return code


def place_of(code: Any) -> str:
    """Where a function or class is written, for messages."""
    name = f"{getattr(code, '__module__', '')}.{getattr(code, '__qualname__', type(code).__name__)}"
    try:
        return f"{name} ({inspect.getsourcefile(code)}, line {inspect.getsourcelines(code)[1]})"
    except (OSError, TypeError):
        return name


def files_of(codes: Iterable[Any]) -> str:
    """The files of users' functions and classes, each with a checksum; `"none"` where all are dopd's own."""
    found = set()
    for code in codes:
        if str(getattr(code, "__module__", "")).partition(".")[0] == "dopd":
            continue
        try:
            file = Path(str(inspect.getsourcefile(code)))
            found.add(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}")
        except (OSError, TypeError):  # typed in, and in no file
            found.add(getattr(code, "__qualname__", type(code).__name__))
    return ", ".join(sorted(found)) or "none"


def _module_of_file(path: str) -> ModuleType:
    file = Path(path).expanduser().resolve()
    main = sys.modules.get("__main__")
    if main is not None and getattr(main, "__file__", None) and Path(str(main.__file__)).resolve() == file:
        return main  # the script that runs
    name = f"_dopd_code_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _search(str(file.parent))  # what it imports may lie beside it, as for a script
    sys.modules[name] = module  # where dataclasses and pickle look for the module of what it defines
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _search(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two functions or classes are one, or one piece of code that was read twice."""
    marks = None if one is other else _marks(one)
    return one is other or (marks is not None and marks == _marks(other))


def _marks(code: Any) -> tuple[Any, ...] | None:
    """What is equal for one piece of code that was read twice; `None` where nobody can tell."""
    if inspect.isfunction(code):
        if code.__closure__:
            return None
        return (
            os.path.abspath(code.__code__.co_filename),
            code.__code__,
            repr(code.__defaults__),
            repr(code.__kwdefaults__),
        )
    try:
        return inspect.getsourcefile(code), code.__qualname__, inspect.getsource(code)
    except (OSError, TypeError, AttributeError):
        return None
