"""Questions about a scene, and the evidence and the answer that follow from it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from dopd.tasks.drawing import COLORS, SHAPES, Thing, place_things

QUESTIONS: tuple[str, ...] = ("count", "nearest", "relation", "compare")
SCAN = "scan"  # lists the whole scene: no question of the benchmark, but what grounding is learnt from
QUESTION_WORDS: frozenset[str] = frozenset(
    word
    for phrase in (
        "how many ?",
        "which color is nearest to ?",
        "further left or ?",
        "further right or ?",
        "more or ?",
        "what is here ?",
        "none answer",
    )
    for word in phrase.split()
)
MAX_COUNT = 4  # most things of a colour that is counted or compared

_MARGIN = 2  # least difference of two colours that are compared
_MAX_DRAWS = 1000

Labels = list[tuple[str, str]]


def ask(rng: random.Random, kind: str, num_things: int, max_count: int = MAX_COUNT) -> tuple[str, list[Thing]]:
    """A question of a kind and a scene that it has one answer in.

    Args:
        kind: One of `QUESTIONS`, or `SCAN`.
        num_things: Things in the scene; more if the question needs more.
        max_count: Most things of a colour that is counted.
    """
    for _ in range(_MAX_DRAWS):
        if kind == "count":
            question, labels = _count(rng, num_things, max_count)
        elif kind == "compare":
            question, labels = _compare(rng, num_things, max_count)
        else:
            question, labels = "", _labels(rng, num_things)
        rng.shuffle(labels)
        things = place_things(rng, labels)
        if kind == SCAN:
            return "what is here ?", things
        question = question or _about_places(rng, kind, things)
        if question:
            return question, things
    raise AssertionError(f"no scene with {num_things} things for a question of kind {kind!r}")


def reason(question: str, things: Sequence[Thing]) -> tuple[list[Thing], str]:
    """The evidence for a question, in the order of the gold solution, and its answer.

    Raises:
        ValueError: the question is none of ours, or the scene does not answer it.
    """
    words = question.split()
    if words[:2] == ["how", "many"]:
        evidence = [thing for thing in things if thing.color == words[2]]
        return evidence, str(len(evidence))
    if words[0] == "more":
        first, second = ([thing for thing in things if thing.color == color] for color in (words[1], words[3]))
        return [*first, *second], words[1] if len(first) > len(second) else words[3]
    if words[0] == "which":
        anchor = _only(things, words[-3], words[-2])
        nearest = _nearest(anchor, things)
        if nearest is None:
            raise ValueError(f"{question!r}: two things are equally near")
        return [anchor, nearest], nearest.color
    if words[0] == "further":
        pair = _only(things, words[2], words[3]), _only(things, words[5], words[6])
        left, right = sorted(pair, key=lambda thing: thing.column)
        return [left, right], left.color if words[1] == "left" else right.color
    if words[0] == "what":
        return list(things), str(len(things))
    raise ValueError(f"unknown question {question!r}")


def _labels(rng: random.Random, count: int, without: Sequence[str] = ()) -> Labels:
    # Few colours in a scene, so that things share colours and a colour alone does not say which thing is meant.
    free = [color for color in COLORS if color not in without]
    palette = rng.sample(free, rng.randint(2, 4))
    return [(rng.choice(palette), rng.choice(SHAPES)) for _ in range(count)]


def _of_color(rng: random.Random, color: str, count: int) -> Labels:
    return [(color, rng.choice(SHAPES)) for _ in range(count)]


def _count(rng: random.Random, num_things: int, max_count: int) -> tuple[str, Labels]:
    color, count = rng.choice(list(COLORS)), rng.randint(0, min(max_count, num_things))
    labels = _of_color(rng, color, count) + _labels(rng, num_things - count, without=[color])
    return f"how many {color} ?", labels


def _compare(rng: random.Random, num_things: int, max_count: int) -> tuple[str, Labels]:
    more = rng.randint(_MARGIN + 1, max_count)
    fewer = rng.randint(1, more - _MARGIN)
    many, few = rng.sample(list(COLORS), 2)
    others = max(0, num_things - more - fewer)
    labels = _of_color(rng, many, more) + _of_color(rng, few, fewer) + _labels(rng, others, without=[many, few])
    first, second = rng.sample([many, few], 2)
    return f"more {first} or {second} ?", labels


def _about_places(rng: random.Random, kind: str, things: Sequence[Thing]) -> str:
    """A question on where things are, or nothing if this scene has no clear one."""
    labels = [thing.label for thing in things]
    named = [thing for thing in things if labels.count(thing.label) == 1]
    if kind == "nearest":
        anchors = [thing for thing in named if _nearest(thing, things) is not None]
        return f"which color is nearest to {rng.choice(anchors).label} ?" if anchors else ""
    if len(named) < 2:
        return ""
    first, second = rng.sample(named, 2)
    if first.column == second.column or first.color == second.color:
        return ""
    return f"further {rng.choice(['left', 'right'])} {first.label} or {second.label} ?"


def _only(things: Sequence[Thing], color: str, shape: str) -> Thing:
    found = [thing for thing in things if (thing.color, thing.shape) == (color, shape)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} things are called {color} {shape}")
    return found[0]


def _nearest(anchor: Thing, things: Sequence[Thing]) -> Thing | None:
    """The nearest other thing if it is so both by steps on the grid and as the crow flies, else nothing."""
    others = [thing for thing in things if thing is not anchor]
    if not others:
        return None

    def apart(thing: Thing) -> tuple[int, int]:
        down, across = abs(thing.row - anchor.row), abs(thing.column - anchor.column)
        return down + across, down**2 + across**2

    nearest = min(others, key=apart)
    steps, squared = apart(nearest)
    clear = all(apart(other)[0] > steps and apart(other)[1] > squared for other in others if other is not nearest)
    return nearest if clear else None
