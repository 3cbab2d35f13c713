"""Questions about drawn scenes, whose answers must be grounded in the image."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from PIL.Image import Image

from dopd.tasks.base import AbstractTask, Example, check_choice, check_range
from dopd.tasks.drawing import COLORS, COLUMNS, GRID, IMAGE_SIZE, ROWS, SHAPES, Thing, draw_scene
from dopd.tasks.registry import register_task
from dopd.tasks.scene_questions import MAX_COUNT, QUESTION_WORDS, QUESTIONS, SCAN, ask, reason
from dopd.tasks.text import prompt_text

_STEP = 4  # words per solution step: colour shape row column
_MARKS = ("boxes", "regions", "caption", "[", "]", "upper", "lower")
_DISTRACTOR_BOXES = 2
_OOD_EXTRA = 3  # most things that `ood` adds
_WITHHELD = frozenset({"answer", "none"})  # words that no kind but the final answer has


@dataclass(frozen=True)
class SceneExample(Example):
    """An `Example` with its image and the boxes that p speaks of.

    Args:
        images: One RGB image.
        boxes: `image` (0), `label` and `xyxy` (left, top, right, bottom in pixels), in the order in which p names them.
    """

    images: tuple[Image, ...] = ()
    boxes: tuple[Mapping[str, Any], ...] = ()


@register_task
@final
@dataclass(frozen=True)
class ScenesTask(AbstractTask):
    """Count, nearest, relation and compare over coloured shapes in an image of 64 x 64 pixels.

    Prompt: a question, for example `further left red circle or blue square ?`. Solution: `colour shape row column` for
    each thing that the answer rests on, then the answer: `blue square c 1 red circle b 3 answer blue`. Rows `a` to
    `d` go down, columns `1` to `4` go right. A completion is right if it names exactly the things that count, where
    they are, and the answer: a guess of the answer alone is not.

    Privileged text is about the things that count, in the order of the solution, and then up to two distractors:
    `box_label` names each with its box in pixels (`boxes red circle [ 35 18 45 28 ] ...`), `caption` with the quarter
    of the image it is in (`caption red circle upper right ...`), `box_caption` says both, box first; `final_answer` is
    the answer alone. None of them is the chain: distractors must be left out, pixels become cells, and the answer
    follows. But whoever reads boxes and labels well needs no image.

    `ood`: one to three things more than the knobs say, and counts up to five.

    Args:
        seed: Chooses the stream of problems.
        min_things, max_things: Things in a scene (2 to 9); a comparison has at least four.
        questions: Kinds of questions, drawn with equal chance: `count`, `nearest`, `relation`, `compare`; `scan` lists
            the whole scene (for pretraining).
    """

    min_things: int = 3
    max_things: int = 6
    questions: Sequence[str] = QUESTIONS

    name: ClassVar[str] = "scenes"
    description: ClassVar[str] = "questions about drawn scenes; the hint is boxes in pixels (vision-language)"
    privileged_kinds: ClassVar[tuple[str, ...]] = ("none", "final_answer", "box_caption", "box_label", "caption")
    default_kind: ClassVar[str] = "box_label"

    def __post_init__(self) -> None:
        limit = GRID**2 - 4 - _OOD_EXTRA
        check_range("min_things", self.min_things, 2, limit, "Two things are the least that a question is about.")
        check_range("max_things", self.max_things, self.min_things, limit, "It must not be less than min_things.")
        object.__setattr__(self, "questions", tuple(self.questions))
        for kind in self.questions:
            check_choice("questions", kind, (*QUESTIONS, SCAN))
        check_range("questions", len(self.questions), 1, 100, "Name at least one kind of question.")

    def vocabulary(self) -> tuple[str, ...]:
        numbers = [str(number) for number in range(IMAGE_SIZE)]
        return tuple(sorted({*numbers, *COLORS, *SHAPES, *ROWS, *COLUMNS, *QUESTION_WORDS, *_MARKS}))

    def completion_words(self, split: str = "test") -> int:
        extra = split == "ood"
        most = {
            "count": MAX_COUNT + extra,
            "nearest": 2,
            "relation": 2,
            "compare": 2 * (MAX_COUNT + extra) - 2,
            SCAN: self.max_things + _OOD_EXTRA * extra,
        }
        return _STEP * max(most[kind] for kind in self.questions) + 2

    def _draw(self, rng: random.Random, split: str) -> SceneExample:
        kind = rng.choice(self.questions)
        if split == "ood":
            question, things = ask(rng, kind, self.max_things + rng.randint(1, _OOD_EXTRA), MAX_COUNT + 1)
        else:
            question, things = ask(rng, kind, rng.randint(self.min_things, self.max_things), MAX_COUNT)
        evidence, answer = reason(question, things)
        others = [thing for thing in things if thing not in evidence]
        shown = evidence + rng.sample(others, min(_DISTRACTOR_BOXES, len(others)))
        return SceneExample(
            prompt=question,
            solution=" ".join([*(thing.step for thing in evidence), *([] if evidence else ["none"]), "answer", answer]),
            answer=answer,
            privileged={
                "final_answer": f"answer {answer}",
                "box_caption": " ".join(["regions", *(f"{_box(t)} {t.label} {t.place}" for t in shown)]),
                "box_label": " ".join(["boxes", *(f"{t.label} {_box(t)}" for t in shown)]),
                "caption": " ".join(["caption", *(f"{t.label} {t.place}" for t in shown)]),
            },
            metadata={"kind": kind, "things": [dataclasses.astuple(thing) for thing in things]},
            images=(draw_scene(rng, things),),
            boxes=tuple({"image": 0, "label": thing.label, "xyxy": list(thing.box)} for thing in shown),
        )

    def _problem(self, example: Example) -> str:
        # Neither sizes, tints nor places within a cell make another problem.
        cells = sorted(thing.step for thing in _things(example.metadata))
        return f"{example.prompt} {', '.join(cells)}"

    def _columns(self, example: Example) -> dict[str, Any]:
        assert isinstance(example, SceneExample)
        return {"images": list(example.images), "boxes": [dict(box) for box in example.boxes]}

    def facts(self, example: Example) -> Any:
        assert isinstance(example, SceneExample)
        plain = {field.name: getattr(example, field.name) for field in dataclasses.fields(Example)}
        pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in example.images]
        return [plain, list(example.boxes), pixels]

    def _solves(self, words: Sequence[str], row: Mapping[str, Any]) -> bool:
        """The things named are the evidence, in any order and none twice, and the answer is theirs."""
        evidence, answer = reason(prompt_text(row), _things(json.loads(str(row["metadata"]))))
        if len(words) < 2 or list(words[-2:]) != ["answer", answer] or answer != str(row["answer"]):
            return False
        steps = list(words[:-2])
        if not evidence:
            return steps == ["none"]
        named = [" ".join(steps[start : start + _STEP]) for start in range(0, len(steps), _STEP)]
        return sorted(named) == sorted(thing.step for thing in evidence)

    def _near_misses(self, example: Example) -> dict[str, str]:
        *steps, mark, answer = example.solution.split()
        wrong = {"wrong answer": [*steps, mark, "red" if answer != "red" else "blue"], "no answer": steps}
        if len(steps) >= _STEP:
            column = COLUMNS[COLUMNS.index(steps[3]) - 1]
            color = next(word for word in COLORS if word != steps[0])
            wrong["right answer, wrong column"] = [*steps[:3], column, *steps[4:], mark, answer]
            wrong["right answer, wrong colour"] = [color, *steps[1:], mark, answer]
            wrong["right answer, last thing missing"] = [*steps[:-_STEP], mark, answer]
            wrong["right answer, a thing twice"] = [*steps, *steps[:_STEP], mark, answer]
            wrong["right answer, nothing seen"] = ["none", mark, answer]
            wrong["last word of a step missing"] = [*steps[:-1], mark, answer]
        return {name: " ".join(text) for name, text in wrong.items()}

    def _check_privileged(self, example: Example, hints: Mapping[str, Sequence[str]]) -> None:
        if example.answer not in hints["final_answer"]:
            self.fail(f"final_answer does not contain the answer {example.answer!r}", example)
        evidence, _ = reason(example.prompt, _things(example.metadata))
        for kind in ("box_caption", "box_label", "caption"):
            text = " ".join(hints[kind])
            if leaked := _WITHHELD & set(hints[kind]):
                self.fail(f"{kind} reveals {sorted(leaked)}", example)
            for thing in evidence:
                if thing.label not in text or ("box" in kind and _box(thing) not in text):
                    self.fail(f"{kind} does not show {thing.step}", example)


def _box(thing: Thing) -> str:
    return f"[ {' '.join(map(str, thing.box))} ]"


def _things(metadata: Mapping[str, Any]) -> list[Thing]:
    return [Thing(color, shape, row, column, tuple(box)) for color, shape, row, column, box in metadata["things"]]
