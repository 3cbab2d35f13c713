"""The named tiny models of each embedded task, as data.

Per task there is a `teacher` (strong with and without hints) and a `student` (good with the plan, weaker without); some
have a `teacher_needs_p` (strong with the plan, weak without). All are one architecture and size unless their recipes
say another; they differ in the number of steps, and in how often and which problems they see without a hint. The card
of each trained model records its accuracies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dopd.tiny.models import TinySpec
from dopd.tiny.sight import SightSpec
from lab.tiny.recipe import HintedRecipe, MixedRecipe, Recipe, SightRecipe

# The teacher sees most problems without a hint; the other two see the plan more often than nothing, so that they
# learn to carry a plan out well before they learn to make one.
_PLANS_ITSELF = {
    "none": 5.0,
    "hints_without_execution": 2.0,
    "hints_with_execution": 1.0,
    "final_answer": 1.0,
    "summarised_hint": 1.0,
}


def _follows_plans(none: float = 1.5) -> Mapping[str, float]:
    return {
        "none": none,
        "hints_without_execution": 7.0 - none,
        "hints_with_execution": 1.0,
        "final_answer": 0.5,
        "summarised_hint": 0.5,
    }


_DAG_KNOBS = {"num_needed": 3, "num_variables": 5}
_DAG_LEVELS: tuple[Mapping[str, int], ...] = (
    {"num_needed": 1, "num_variables": 2},
    {"num_needed": 2, "num_variables": 3},
    *({},) * 2,
    *({"num_needed": 4},) * 2,
)
_GRAPH_KNOBS = {"path_length": 4, "num_forks": 2, "dead_end_depth": 3}
_GRAPH_LEVELS: tuple[Mapping[str, int], ...] = (
    {"path_length": 2, "num_forks": 1, "dead_end_depth": 1},
    {"path_length": 3, "num_forks": 1, "dead_end_depth": 2},
    *({},) * 2,
)


_PROGRAM_KNOBS = {"num_ops": 2}
_PROGRAM_LEVELS: tuple[Mapping[str, Any], ...] = ({"num_ops": 1}, {})
# Finding operations is learnt all at once or not at all. What the student lacks are therefore whole operations: it
# carries out all five, but was asked to find these four alone. A last letter or a first operation as a hint would make
# it find the fifth too, so it is shown neither.
_FINDS = {"operations": ("rev", "rotl", "rotr", "swap")}


def _dag(steps: int, kinds: Mapping[str, float], spec: TinySpec | None = None) -> Recipe:
    spec = spec or TinySpec()
    return Recipe(task="dag", knobs=_DAG_KNOBS, levels=_DAG_LEVELS, kinds=kinds, steps=steps, spec=spec)


def _graph(steps: int, kinds: Mapping[str, float]) -> Recipe:
    return Recipe(task="graph", knobs=_GRAPH_KNOBS, levels=_GRAPH_LEVELS, kinds=kinds, steps=steps)


def _program(steps: int, kinds: Mapping[str, float]) -> Recipe:
    return Recipe(task="program", knobs=_PROGRAM_KNOBS, levels=_PROGRAM_LEVELS, kinds=kinds, steps=steps)


def _program_student(steps: int) -> Recipe:
    return HintedRecipe(
        task="program",
        knobs=_PROGRAM_KNOBS,
        levels=tuple({**level, **_FINDS} for level in _PROGRAM_LEVELS),
        hinted_levels=_PROGRAM_LEVELS,
        kinds={"none": 3.4, "hints_without_execution": 4.6, "hints_with_execution": 1.0},
        steps=steps,
    )


_MIXED_STEPS = 4400  # of three tasks together
_SCAN = {"questions": ("scan",)}
# The student sees well and reads boxes; without them it was seldom asked what is nearest and what there is more of.
_TWO_OF_FOUR: tuple[Mapping[str, Any], ...] = (*({"questions": ("count", "relation")},) * 3, {})
_SCENES_KNOBS = {"min_things": 3, "max_things": 6}


def _scenes(steps: int, spec: SightSpec, levels: tuple[Mapping[str, Any], ...], **stages: Any) -> Recipe:
    return SightRecipe(
        task="scenes",
        knobs=_SCENES_KNOBS,
        levels=(_SCAN, *levels),
        grounding=_SCAN,
        kinds=_SEES,
        spec=spec,
        steps=steps,
        **stages,
    )


_SEES = {"none": 5.0, "box_label": 4.0, "box_caption": 1.0, "caption": 1.0, "final_answer": 1.0}


RECIPES: Mapping[str, Mapping[str, Recipe]] = {
    "dag": {
        "teacher": _dag(2200, _PLANS_ITSELF),
        "teacher_needs_p": _dag(1600, _follows_plans(none=0.6)),
        "student": _dag(1500, _follows_plans(none=0.8)),
        # Other sizes, for pairs of teacher and student. The heads of the lower two have 16 channels, as the teacher's:
        # with 20 and 12 their seed 0 never learnt to look earlier results up by name.
        "teacher_large": _dag(2200, _PLANS_ITSELF, TinySpec(num_layers=5, hidden_size=96)),
        "teacher_medium": _dag(2200, _PLANS_ITSELF, TinySpec(num_layers=4, hidden_size=80, num_heads=5)),
        "student_small": _dag(2500, _follows_plans(none=0.65), TinySpec(num_layers=2, hidden_size=48, num_heads=3)),
    },
    "graph": {
        "teacher": _graph(1600, _PLANS_ITSELF),
        "teacher_needs_p": _graph(550, _follows_plans(none=0.75)),
        "student": _graph(425, _follows_plans()),
    },
    "program": {
        "teacher": _program(800, _PLANS_ITSELF),
        "student": _program_student(1000),
    },
    # One student that knows a little of each text task, for continual learning.
    "text": {
        "student": MixedRecipe(
            task="dag",
            knobs=_DAG_KNOBS,
            levels=_DAG_LEVELS,
            others=(_graph(_MIXED_STEPS, _follows_plans(none=0.8)), _program_student(_MIXED_STEPS)),
            shares=(0.55, 0.2, 0.25),
            kinds=_follows_plans(none=1.2),
            spec=TinySpec(num_layers=4, hidden_size=80),
            steps=_MIXED_STEPS,
        ),
    },
    "scenes": {
        "teacher": _scenes(2100, SightSpec(hidden_size=96), ({},) * 3, grounding_steps=300),
        "student": _scenes(1800, SightSpec(), _TWO_OF_FOUR, grounding_steps=250, plain_steps=900, hinted_levels=({},)),
    },
}
