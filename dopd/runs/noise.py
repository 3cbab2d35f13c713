"""Corrupted privileged context, to see how much a method trusts it. Only training rows are corrupted."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dopd.data.views import is_blank
from dopd.errors import ConfigError, DataError, check_choice
from dopd.settings import quoted

if TYPE_CHECKING:
    from datasets import Dataset

NoiseKind = Literal["shuffled", "wrong", "noisy", "dropped"]
_FIELDS = ("kind", "share", "seed", "strength")
_COLUMN = "privileged_context"


@dataclass(frozen=True, kw_only=True)
class PrivilegedNoise:
    """How p is corrupted.

    Attributes:
        kind (`str`): `"shuffled"` (the words of p in another order), `"wrong"` (the p of another row), `"noisy"` (words
            replaced by words of other rows' p), or `"dropped"` (no p).
        share (`float`): share of the rows whose p is corrupted, in (0, 1].
        strength (`float`): of `"noisy"`: chance that a word is replaced, in (0, 1].
        seed (`int`): chooses rows and words.

    Raises:
        ConfigError: a value that is not allowed.
    """

    kind: NoiseKind
    share: float = 1.0
    strength: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("privileged_noise.kind", self.kind, NoiseKind)
        for name in ("share", "strength"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value <= 1.0:
                raise ConfigError(f"privileged_noise.{name} (={value!r}) must be a number above 0 and at most 1")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"privileged_noise.seed (={self.seed!r}) must be a whole number")

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "PrivilegedNoise":
        """From a config's mapping.

        Raises:
            ConfigError: an unknown key, no `kind`, or a value that is not allowed.
        """
        unknown = sorted(set(mapping) - set(_FIELDS))
        if unknown or "kind" not in mapping:
            wrong = f"unknown key {', '.join(unknown)}" if unknown else "kind is missing"
            raise ConfigError(
                f"privileged_noise (={quoted(dict(mapping))}): {wrong}; its keys are {', '.join(_FIELDS)}, for example "
                "{kind: wrong, share: 0.5}"
            )
        return cls(**mapping)


def corrupt(rows: "Dataset", noise: PrivilegedNoise) -> tuple["Dataset", int]:
    """The rows with the p of a share of them corrupted, and how many rows that are. Rows without p stay as they are.

    Raises:
        DataError: no row has p, or one row alone does where p is to come from another.
    """
    column = list(rows[_COLUMN]) if _COLUMN in rows.column_names else []
    filled = [index for index, text in enumerate(column) if not is_blank(text)]
    if not filled:
        raise DataError(f"privileged_noise: no row has {_COLUMN}, so there is nothing to corrupt")
    if len(filled) == 1 and noise.kind in ("wrong", "noisy"):
        raise DataError(f"privileged_noise.kind (={noise.kind!r}) takes p from other rows, and one row alone has p")
    rng = random.Random(f"privileged_noise/{noise.seed}")
    chosen = sorted(rng.sample(filled, max(1, round(noise.share * len(filled)))))
    changed = list(column)
    for index in chosen:
        changed[index] = _corrupted(column, index, filled, noise, rng)
    return rows.remove_columns(_COLUMN).add_column(_COLUMN, changed), len(chosen)


def _corrupted(
    column: list[Any], index: int, filled: list[int], noise: PrivilegedNoise, rng: random.Random
) -> str | None:
    if noise.kind == "dropped":
        return None
    words = column[index].split()
    if noise.kind == "shuffled":
        return " ".join(rng.sample(words, len(words)))
    if noise.kind == "wrong":
        return column[_another(index, filled, rng)]
    return " ".join(
        rng.choice(column[_another(index, filled, rng)].split()) if rng.random() < noise.strength else word
        for word in words
    )


def _another(index: int, filled: list[int], rng: random.Random) -> int:
    place = rng.randrange(len(filled) - 1)
    return filled[place] if filled[place] != index else filled[-1]
