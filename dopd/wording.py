"""What the wording of an answer shows: words of a hint that it cannot know, talk of a hint, and loops.

One definition for training, reports and the audit of hints. Texts are those of models: any text is taken.
"""

import functools
import math
import re
from collections.abc import Sequence

COPIED_WORDS = 5  # in a row; shorter runs are common by chance
_SIGNS_PER_WORD = 2  # of a script that writes no spaces between words
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Japanese and Chinese
_SIGN = re.compile(f"[{_NO_SPACES}]")
_WORDS = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")
_OF_REFERENCE = "(?:solution|answer|plan|steps|reasoning|explanation|derivation|outline)\\b(?! (?:choice|option)s)"
_SAYS = "(?:says?|suggests?|shows?|states?|indicates?|explains?|describes?|gives?|notes?|points?|tells?|mentions?|does)"
_SOURCE = "(?:the|this|your|that) (?:solution|reference|plan|notes?|guidance|explanation)"
# Each begins with letters, which are found fast; of texts in small letters.
_SPEAKS_OF_P = tuple(
    re.compile(pattern)
    for pattern in (
        r"hints?\b(?!\s+(?:at|that|toward\w*)\b)",
        r"privileged (?:context|info\w*|hint|text|knowledge)",
        r"answer key\b",
        *(f"{word} {_OF_REFERENCE}" for word in ("reference", "official", "given", "provided", "model", "sample")),
        *(f"{word} {_OF_REFERENCE}" for word in ("expert", "ground truth", "ground-truth")),
        rf"according to {_SOURCE}\b",
        rf"\bas {_SOURCE} {_SAYS}\b",
        *(rf"{word} the reference\b" for word in ("given", "consulting", "checking", "from", "per")),
        r"hinweise?n?\b",
        "musterl(?:\u00f6|o\u0308)sung",
        "solution de r\u00e9f\u00e9rence",
        "selon l'indice",
        "soluci\u00f3n de referencia",
        "seg\u00fan la pista",
        "\u043f\u043e\u0434\u0441\u043a\u0430\u0437\u043a",
        "\u63d0\u793a",
        "\u53c2\u8003(?:\u7b54\u6848|\u89e3)",
        "\u6807\u51c6\u7b54\u6848",
        "\u30d2\u30f3\u30c8",
        "\u6a21\u7bc4\u89e3\u7b54",
        "\ud78c\ud2b8",
    )
)
# A loop: a block of tokens, written this often at the end of an answer, over so many tokens.
_LONGEST_BLOCK, _TIMES, _LOOP_TOKENS = 256, 4, 16


def runs(text: str, num_words: int = COPIED_WORDS) -> set[tuple[str, ...]]:
    """All runs of so many words in a text, without case; of scripts that write no spaces, of twice as many signs."""
    words = _words(text)
    found = (_run_at(words, start, num_words) for start in range(len(words)))
    return {run for run in found if run}


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _run_at(words: Sequence[str], start: int, num_words: int) -> tuple[str, ...]:
    """The run that begins at a word; empty where too few follow."""
    run = words[start : start + num_words]
    if any(_SIGN.match(word) for word in run):
        num_words *= _SIGNS_PER_WORD
        run = words[start : start + num_words]
    return tuple(run) if len(run) == num_words else ()


@functools.lru_cache(maxsize=256)  # several answers to one prompt
def _of_hint_alone(hint: str, prompt: str) -> tuple[frozenset[tuple[str, ...]], frozenset[str]]:
    """Runs of a hint that its prompt does not have, and the words that they begin with."""
    of_hint = frozenset(runs(hint) - runs(prompt))
    return of_hint, frozenset(run[0] for run in of_hint)


def copies_hint(answer: str, hint: str, prompt: str) -> bool:
    """Whether an answer has five words in a row of a hint (of Japanese and Chinese: ten signs) that its prompt does
    not have.
    """
    of_hint, first = _of_hint_alone(hint, prompt)
    if not of_hint:
        return False
    words = _words(answer)
    return any(word in first and _run_at(words, at, COPIED_WORDS) in of_hint for at, word in enumerate(words))


def speaks_of_hint(answer: str, prompt: str) -> bool:
    """Whether an answer mentions a hint or a reference solution, and its prompt does not."""
    return _speaks(answer) and not _speaks(prompt)


def _speaks(text: str) -> bool:
    small = " ".join(text.lower().split())
    return any(pattern.search(small) for pattern in _SPEAKS_OF_P)


def loops(tokens: Sequence[int]) -> bool:
    """Whether an answer ends in a loop: one block of at most 256 tokens, written four times or more in a row, over 16
    tokens or more; the last time it may be cut.

    Args:
        tokens (`list[int]`): ids, without the token that ended the answer.
    """
    end = len(tokens)
    for size in range(1, min(_LONGEST_BLOCK, end // _TIMES) + 1):
        needed = max(_TIMES * size, _LOOP_TOKENS)
        if needed <= end and all(tokens[end - 1 - n] == tokens[end - 1 - n - size] for n in range(needed - size)):
            return True
    return False


def distinct(tokens: Sequence[int], size: int = 3) -> float:
    """Share of different ones among the n-grams of an answer (distinct-n of Li et al., 2016); NaN where it has none."""
    count = len(tokens) - size + 1
    return len(set(zip(*(tokens[n:] for n in range(size)), strict=False))) / count if count > 0 else math.nan
