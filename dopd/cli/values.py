"""Values of flags."""

import argparse

_MAX_INT = 2**31 - 1
_MAX_SEED = 2**32 - 1  # of numpy
_MAX_PROMPTS = 10_000_000  # they are held in memory


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _between(text, 1, _MAX_INT)


def prompt_count(text: str) -> int:
    """How many problems a task makes."""
    return _between(text, 1, _MAX_PROMPTS)


def seed(text: str) -> int:
    """A whole number of at least 0."""
    return _between(text, 0, _MAX_SEED)


def _between(text: str, lowest: int, highest: int) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(highest)) else lowest - 1
    if lowest <= number <= highest:
        return number
    most = f" and at most {highest}" if text.isascii() and text.isdigit() and number != 0 else ""
    raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {lowest}{most}")
