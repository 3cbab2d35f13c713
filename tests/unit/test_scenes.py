"""The visual task: what is drawn is what is asked about, boxes are pixels, answers follow from the scene alone."""

import dataclasses
import hashlib
import json
import random

import pytest
from datasets import Dataset

from dopd.errors import ConfigError
from dopd.tasks import PRIVILEGED_KINDS, SPLITS, ScenesTask, TaskValidationError
from dopd.tasks.drawing import CELL, COLORS, IMAGE_SIZE, Thing, draw_scene, place_things
from dopd.tasks.scene_questions import MAX_COUNT, QUESTIONS, ask, reason

TASK = ScenesTask()
EXAMPLES = [TASK.example(split, index) for split in SPLITS for index in range(60)]

#   1        2        3        4
# a red o             red #
# b          blue ^
# c                            red o
# d                   cyan o
SCENE = [
    Thing("red", "circle", 0, 0),
    Thing("red", "square", 0, 2),
    Thing("blue", "triangle", 1, 1),
    Thing("red", "circle", 2, 3),
    Thing("cyan", "circle", 3, 2),
]


@pytest.mark.parametrize(
    ("question", "evidence", "answer"),
    [
        ("how many red ?", [0, 1, 3], "3"),
        ("how many green ?", [], "0"),
        ("which color is nearest to cyan circle ?", [4, 3], "red"),
        ("further left blue triangle or red square ?", [2, 1], "blue"),
        ("further right blue triangle or red square ?", [2, 1], "red"),
        ("further left red square or blue triangle ?", [2, 1], "blue"),
        ("more red or cyan ?", [0, 1, 3, 4], "red"),
        ("more cyan or red ?", [4, 0, 1, 3], "red"),
        ("what is here ?", [0, 1, 2, 3, 4], "5"),
    ],
)
def test_answers_by_hand(question, evidence, answer):
    assert reason(question, SCENE) == ([SCENE[index] for index in evidence], answer)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("which color is nearest to blue triangle ?", "equally near"),  # a1 and a3 are two steps away
        ("further left red circle or cyan circle ?", "2 things are called red circle"),
        ("further left green circle or cyan circle ?", "0 things"),
        ("where ?", "unknown question"),
    ],
)
def test_questions_without_one_answer_are_refused(question, words):
    with pytest.raises(ValueError, match=words):
        reason(question, SCENE)


@pytest.mark.parametrize("kind", QUESTIONS)
@pytest.mark.parametrize("num_things", [2, 3, 6, 12])
def test_every_question_has_an_answer_in_its_scene(kind, num_things):
    rng = random.Random(0)
    for _ in range(50):
        question, things = ask(rng, kind, num_things)
        evidence, answer = reason(question, things)
        assert len(things) >= num_things and len({(thing.row, thing.column) for thing in things}) == len(things)
        if kind == "compare":
            counts = sorted(sum(thing.color == color for thing in things) for color in question.split()[1:4:2])
            assert counts[1] - counts[0] >= 2 and counts[1] <= MAX_COUNT
            assert answer in question
        if kind == "count":
            assert int(answer) == len(evidence) <= MAX_COUNT


def test_answers_are_not_guessed_by_the_commonest():
    answers = {kind: [e.answer for e in map(_train, range(400)) if e.metadata["kind"] == kind] for kind in QUESTIONS}
    for kind, most in {"count": 0.4, "nearest": 0.35, "relation": 0.35, "compare": 0.35}.items():
        assert len(answers[kind]) > 60
        assert max(answers[kind].count(answer) for answer in answers[kind]) < most * len(answers[kind]), kind


def _train(index):
    return TASK.example("train", index)


def _near(pixel, color):
    return all(abs(have - want) <= 15 for have, want in zip(pixel, COLORS[color], strict=True))


@pytest.mark.parametrize("example", EXAMPLES[::10], ids=lambda example: example.prompt)
def test_boxes_hold_every_pixel_of_their_things_and_touch_it_on_all_sides(example):
    (image,) = example.images
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE) and image.mode == "RGB"
    drawn = {(x, y) for x in range(IMAGE_SIZE) for y in range(IMAGE_SIZE) if image.getpixel((x, y)) != _corner(image)}
    boxed = set()
    for color, _, row, column, (left, top, right, bottom) in example.metadata["things"]:
        inside = {(x, y) for x, y in drawn if left <= x <= right and top <= y <= bottom}
        assert all(_near(image.getpixel(place), color) for place in inside)
        assert {x for x, _ in inside} == set(range(left, right + 1))
        assert {y for _, y in inside} == set(range(top, bottom + 1))
        assert {(x // CELL, y // CELL) for x, y in inside} == {(column, row)}
        boxed |= inside
    assert boxed == drawn


def _corner(image):
    counts = image.getcolors(IMAGE_SIZE**2)
    return max(counts)[1]


@pytest.mark.parametrize("example", EXAMPLES[::10], ids=lambda example: example.prompt)
def test_box_column_is_what_privileged_text_says(example):
    said = " ".join(f"{box['label']} [ {' '.join(map(str, box['xyxy']))} ]" for box in example.boxes)
    assert example.privileged["box_label"] == f"boxes {said}"
    assert {box["image"] for box in example.boxes} <= {0}
    drawn = {tuple(thing[4]) for thing in example.metadata["things"]}
    assert {tuple(box["xyxy"]) for box in example.boxes} <= drawn


def test_privileged_boxes_are_the_evidence_in_order_and_then_unmarked_distractors():
    with_distractors = 0
    for example in EXAMPLES:
        things = [Thing(*thing[:4], box=tuple(thing[4])) for thing in example.metadata["things"]]
        wanted = [thing.box for thing in reason(example.prompt, things)[0]]
        shown = [tuple(box["xyxy"]) for box in example.boxes]
        assert shown[: len(wanted)] == wanted
        assert len(shown) - len(wanted) == min(2, len(things) - len(wanted))
        with_distractors += len(shown) > len(wanted)
    assert with_distractors > 0.7 * len(EXAMPLES)


def test_verifier_takes_the_evidence_in_any_order_and_no_other():
    row = {
        "prompt": [{"role": "user", "content": "how many red ?"}],
        "answer": "3",
        "metadata": json.dumps({"things": [dataclasses.astuple(thing) for thing in SCENE]}),
    }
    assert TASK.verify("red circle a 1 red square a 3 red circle c 4 answer 3", row) == 1.0
    assert TASK.verify("red circle c 4 red circle a 1 red square a 3 answer 3 <eos>", row) == 1.0
    for wrong in (
        "answer 3",
        "red circle a 1 red square a 3 answer 3",
        "red circle a 1 red square a 3 red circle c 4 answer 2",
        "red circle a 1 red square a 3 red circle c 3 answer 3",
        "red circle a 1 red square a 3 red circle c 4 red circle c 4 answer 3",
        "red circle a 1 red square a 3 red circle c 4 blue triangle b 2 answer 3",
        "red circle a 1 red square a 3 red circle c 4 3",
    ):
        assert TASK.verify(wrong, row) == 0.0, wrong
    none = {**row, "prompt": "how many green ?", "answer": "0"}
    assert TASK.verify("none answer 0", none) == 1.0
    assert TASK.verify("answer 0", none) == 0.0


def test_ood_scenes_are_larger():
    sizes = {split: {len(TASK.example(split, i).metadata["things"]) for i in range(60)} for split in SPLITS}
    assert max(sizes["train"] | sizes["test"]) <= 6 < min(sizes["ood"])


def test_rows_survive_a_dataset():
    rows = TASK.rows("test", 4)
    back = Dataset.from_list(rows)
    for before, after in zip(rows, back, strict=True):
        assert after["images"][0].tobytes() == before["images"][0].tobytes()
        assert after["boxes"] == before["boxes"]
        assert TASK.verify(before["solution"], after) == 1.0


def test_drawing_depends_on_its_generator_alone():
    things = place_things(random.Random(1), [("red", "circle"), ("blue", "square")])
    first, again, other = (draw_scene(random.Random(seed), things) for seed in (2, 2, 3))
    assert first == again and first != other


def test_first_hundred_scenes_are_pinned_but_for_their_pixels():
    # Pixels depend on the version of Pillow; they are checked against the boxes above.
    facts = [TASK.facts(TASK.example("train", index))[:2] for index in range(100)]
    assert hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16] == "65b03a43e91830f5"


def _broken(**methods):
    return type("Broken", (ScenesTask,), methods)()


def test_validate_fails_for_a_broken_task():
    def answer_only(self, words, row):
        return list(words[-1:]) == [row["answer"]]

    def replace(change):
        def draw(self, rng, split):
            example = ScenesTask._draw(self, rng, split)
            return dataclasses.replace(example, privileged={**example.privileged, **change(example)})

        return draw

    breakages = {
        "does not score 0.0": {"_solves": answer_only},
        "does not score 1.0": {"_solves": lambda self, words, row: False},
        "box_label reveals": {"_draw": replace(lambda e: {"box_label": f"{e.privileged['box_label']} answer 1"})},
        "box_label does not show": {"_draw": replace(lambda e: {"box_label": "boxes"})},
        "caption does not show": {"_draw": replace(lambda e: {"caption": "caption"})},
        "final_answer does not contain": {"_draw": replace(lambda e: {"final_answer": "answer"})},
    }
    for message, methods in breakages.items():
        with pytest.raises(TaskValidationError, match=message):
            _broken(**methods).validate(count=8)


def test_its_kinds_are_its_own():
    assert ScenesTask.privileged_kinds != PRIVILEGED_KINDS
    with pytest.raises(ConfigError, match=r"'hints_without_execution', allowed: 'none', 'final_answer', 'box_caption'"):
        TASK.rows("train", 1, "hints_without_execution")
    with pytest.raises(ConfigError, match=r"questions: got 'how', allowed: 'count'"):
        ScenesTask(questions=["how"])
    with pytest.raises(ConfigError, match=r"max_things: got 2"):
        ScenesTask(max_things=2)
