"""Everything that is wrong with some settings, in one error."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from dopd.errors import ConfigError, DopdError


class SettingsError(ConfigError):
    """One or several settings that cannot be used.

    Attributes:
        problems (`tuple[str, ...]`): a sentence for each, with field, value, what is allowed and the fix.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        lines = (f"\n  {problem}" for problem in self.problems)
        many = f"{len(self.problems)} settings cannot be used:{''.join(lines)}"
        super().__init__(self.problems[0] if len(self.problems) == 1 else many)

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        return type(self), (self.problems,)


class Problems:
    """Collects what checks find, so that a user mends all of it before the next start."""

    def __init__(self, found: Iterable[str] = ()) -> None:
        self.found = list(found)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Inside, an error that a user can act on is kept, and ends the block alone."""
        try:
            yield
        except SettingsError as error:
            self.add(*error.problems)
        except DopdError as error:
            self.add(str(error))

    def add(self, *problems: str) -> None:
        """Keep problems, each once."""
        self.found += [problem for problem in problems if problem not in self.found]

    def raise_any(self) -> None:
        """Raise `SettingsError` if there is any."""
        if self.found:
            raise SettingsError(self.found)
