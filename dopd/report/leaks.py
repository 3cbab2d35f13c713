"""Hints in answers: completions that repeat p word by word, or speak of a hint that the student does not see."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_COPIED_WORDS = 5  # in a row; shorter runs are common by chance
_COPIED_SIGNS = 10  # of a script that writes no spaces between words
_LEAKING = 0.05  # share of traced completions, beyond what the untrained student does by chance
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Japanese and Chinese
_SIGN = re.compile(f"[{_NO_SPACES}]")
_WORDS = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")
_SPEAKS_OF_P = re.compile(
    r"\b(hints?|privileged|answer key|(reference|official|given|provided) (solution|answer|plan|steps|reasoning)|"
    r"(as|according to) the (solution|reference|plan|notes?))\b",
    re.I,
)

Trace = Mapping[str, Any]  # a record of `trace.jsonl`


def copies_hint(record: Trace) -> bool:
    """Whether a completion repeats words of the privileged context, in a row, that its prompt does not have."""
    prompt, hint = _phrases(record["prompt"]), _phrases(str(record["privileged_context"]))
    return bool((hint - prompt) & _phrases(completion_text(record)))


def speaks_of_hint(record: Trace) -> bool:
    """Whether a completion mentions a hint, and its prompt does not."""
    return bool(_SPEAKS_OF_P.search(completion_text(record)) and not _SPEAKS_OF_P.search(record["prompt"]))


def completion_text(record: Trace) -> str:
    return "".join(token["text"] for token in record["tokens"])


def leaks(trace: Sequence[Trace]) -> list[tuple[str, str, str]]:
    """Title, text and advice of every kind of leak in the traced completions of a run.

    An untrained student that solves a problem as p does repeats some of its words, too: where completions from before
    training were traced, only what goes beyond their share is a leak.
    """
    records = [record for record in trace if record.get("privileged_context")]
    before = [record for record in records if record["step"] == 0]  # written by the untrained student
    after = [record for record in records if record["step"] > 0]
    found = []
    for title, leaking, what, advice in _KINDS:
        hits = [record for record in after if leaking(record)]
        share, by_chance = len(hits) / max(len(after), 1), sum(map(leaking, before)) / max(len(before), 1)
        if share - by_chance > _LEAKING:
            earlier = f"; {by_chance:.0%} before training" if before else ""
            text = (
                f"{len(hits)} of {len(after)} traced completions ({share:.0%}{earlier}) {what} (first at step "
                f"{hits[0]['step']})."
            )
            found.append((title, text, advice))
    return found


def _phrases(text: str) -> set[tuple[str, ...]]:
    words = _WORDS.findall(text.lower())
    found = set()
    for start in range(len(words)):
        without_spaces = any(_SIGN.match(word) for word in words[start : start + _COPIED_WORDS])
        length = _COPIED_SIGNS if without_spaces else _COPIED_WORDS
        if start + length <= len(words):
            found.add(tuple(words[start : start + length]))
    return found


_KINDS: tuple[tuple[str, Callable[[Trace], bool], str, str], ...] = (
    (
        "the hint leaks into answers",
        copies_hint,
        f"repeat {_COPIED_WORDS} or more words in a row of their privileged context that the prompt does not have",
        "Shorten p to a plan without the wording of an answer, or try a lower `learning_rate`; a `privileged_kind` "
        "without the solution where a task has one.",
    ),
    (
        "answers speak of a hint",
        speaks_of_hint,
        "mention a hint that the student does not see",
        "Say in `privileged_template` that the answer must stand without the hint, and leave words such as 'hint' out "
        "of it; then try a lower `learning_rate`.",
    ),
)
