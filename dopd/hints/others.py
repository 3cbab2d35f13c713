"""Each problem with another problem's hint: the control that shows whether it matters what p says."""

import random
from collections import Counter
from collections.abc import Sequence

from dopd.errors import DataError
from dopd.hints.coverage import is_empty
from dopd.hints.text import words


def of_other_problems(questions: Sequence[str], hints: Sequence[str | None], seed: int = 0) -> list[str | None]:
    """The hints in another order: no row has its own, an equal one, or that of an equal question; rows without a hint
    keep none.

    Args:
        questions, hints (`list[str]`): of the rows.
        seed (`int`): of the order.

    Raises:
        DataError: that cannot be: more than half of the hints are equal, or of one question.
    """
    rows = [n for n, hint in enumerate(hints) if not is_empty(hint)]
    keys = [(_key(questions[row]), _key(str(hints[row]))) for row in rows]
    order = list(range(len(rows)))
    rng = random.Random(seed)
    rng.shuffle(order)
    for place in range(len(rows)):
        if not _differ(keys, place, order[place]):
            _swap(keys, order, place, rng)
    stuck = sum(not _differ(keys, place, other) for place, other in enumerate(order))
    if stuck or len(rows) < 2:
        most = max(
            Counter(part for key in keys for part in dict(zip("qh", key, strict=True)).items()).values(), default=0
        )
        raise DataError(
            f"{most} of {len(rows)} rows with a hint have one hint or one question, so some would get an equal one: "
            "other-problem needs other hints for at least half of the rows"
        )
    found: list[str | None] = [None] * len(hints)
    for place, other in enumerate(order):
        found[rows[place]] = hints[rows[other]]
    return found


def _key(text: str) -> str:
    return " ".join(words(text)) or text


def _differ(keys: Sequence[tuple[str, str]], place: int, other: int) -> bool:
    """Whether a row may have another row's hint: neither question nor hint are equal."""
    return keys[place][0] != keys[other][0] and keys[place][1] != keys[other][1]


def _swap(keys: Sequence[tuple[str, str]], order: list[int], place: int, rng: random.Random) -> None:
    """Exchange the hint of a place with that of one where both are then good; leave it where there is none."""
    start = rng.randrange(len(order))
    for other in (*range(start, len(order)), *range(start)):
        if _differ(keys, place, order[other]) and _differ(keys, other, order[place]):
            order[place], order[other] = order[other], order[place]
            return
