"""What is found in rows and refuses none of them: counted, with one warning each."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Findings:
    """Rows in which something was found, by its name.

    Attributes:
        what (`str`): was found, in messages.
        counts (`dict[str, int]`): rows, for each name.
    """

    what: str = field(init=False, default="found")
    counts: dict[str, int] = field(init=False, default_factory=dict)
    _first: dict[str, str] = field(init=False, default_factory=dict)

    def add(self, found: Mapping[str, str]) -> list[str]:
        """Count one row in which something was found: by its name, what a message says of it. The names."""
        for name, sentence in found.items():
            self.counts[name] = self.counts.get(name, 0) + 1
            self._first.setdefault(name, sentence)
        return list(found)

    def sentences(self, num_rows: int, of: str) -> list[str]:
        """What was found in so many rows of a dataset, one sentence for each name."""
        return [self.sentence(name, f"{count} of {num_rows} rows of {of}") for name, count in self.counts.items()]

    def sentence(self, name: str, rows: str) -> str:
        """What was found under a name, in rows as they are counted here."""
        return f"{name}: {self.what} in {rows}, the first {self._first[name]}"
