"""Which method a page is about, and what the others are compared with."""

from collections.abc import Sequence

_BASELINE = "vanilla"
_OF_INTEREST = "dopd"


def of_interest(labels: Sequence[str]) -> str:
    """The method that a page is about: the first of the DOPD family, else the last."""
    return next((label for label in labels if label.startswith(_OF_INTEREST)), labels[-1])


def reference_of(labels: Sequence[str]) -> str | None:
    """What the others are compared with: Vanilla OPD, else the first that is not of interest; `None` without others."""
    others = [label for label in labels if label != of_interest(labels)]
    return next((label for label in labels if label.startswith(_BASELINE)), others[0]) if others else None


def places(labels: Sequence[str]) -> list[int]:
    """The number of each method in the palette: 0, which is drawn solid, for the one of interest."""
    if not labels:
        return []
    others = [label for label in labels if label != of_interest(labels)]
    return [0 if label == of_interest(labels) else 1 + others.index(label) for label in labels]
