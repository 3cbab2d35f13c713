"""Embedded tasks: the verifiers prove themselves, splits are disjoint, problems do not drift."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import pytest

from dopd.errors import ConfigError
from dopd.tasks import (
    PRIVILEGED_KINDS,
    SPLITS,
    TASKS,
    AbstractTask,
    DagTask,
    GraphTask,
    ProgramTask,
    TaskValidationError,
    TextTask,
    get_task,
)

EMBEDDED = {name: kind for name, kind in TASKS.items() if issubclass(kind, AbstractTask)}
TEXT_TASKS = {name: kind for name, kind in TASKS.items() if issubclass(kind, TextTask)}

KNOBS = [
    ("dag", {}),
    ("dag", {"num_needed": 1, "num_variables": 1}),
    ("dag", {"num_needed": 3, "num_variables": 5, "seed": 4}),
    ("graph", {}),
    ("graph", {"path_length": 2, "num_forks": 1}),
    ("graph", {"path_length": 5, "num_forks": 3, "dead_end_depth": 2, "seed": 4}),
    ("program", {}),
    ("program", {"num_ops": 1}),
    ("program", {"num_ops": 4, "seed": 4}),
    ("program", {"num_ops": 2, "operations": ["rev", "rotl", "swap"]}),
    ("scenes", {}),
    ("scenes", {"questions": ["scan"]}),
    ("scenes", {"min_things": 2, "max_things": 9, "questions": ["nearest", "relation"], "seed": 4}),
]


@pytest.mark.parametrize(("name", "knobs"), KNOBS)
def test_validate(name, knobs):
    checked = get_task(name, **knobs).validate(count=48)
    assert checked["gold"] == 48 * len(SPLITS)
    assert checked["near_misses"] > 15 * checked["gold"]


def test_every_task_is_validated_above():
    assert {name for name, _ in KNOBS} == set(EMBEDDED)


def _digest(name, seed):
    rows = [get_task(name, seed=seed).row("train", i, kind) for i in range(100) for kind in PRIVILEGED_KINDS]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("name", "seed", "digest"),
    [
        ("dag", 0, "3c96af3e925c5c2d"),
        ("dag", 1, "409c8c8693eb39ad"),
        ("graph", 0, "05892f866a5462cf"),
        ("graph", 1, "6e43a6221743e7d6"),
        ("program", 0, "1b8e76cca1d2da33"),
        ("program", 1, "41c59a73041e8a53"),
    ],
)
def test_first_hundred_problems_are_pinned(name, seed, digest):
    assert _digest(name, seed) == digest


@pytest.mark.parametrize("name", EMBEDDED)
def test_rows(name):
    task = get_task(name)
    columns = ["prompt", "privileged_context", "answer", "solution", "task", "metadata"]
    for kind in task.privileged_kinds:
        rows = task.rows("test", 3, kind, start=5)
        assert rows == [task.row("test", index, kind) for index in (5, 6, 7)]
        for row in rows:
            assert list(row)[: len(columns)] == columns
            assert name not in TEXT_TASKS or len(row) == len(columns)
            assert [message["role"] for message in row["prompt"]] == ["user"]
            assert (row["privileged_context"] is None) == (kind == "none")
            assert json.loads(row["metadata"])
    assert task.rows("train", 0) == []
    assert task.rows("train", 1) == task.rows("train", 1, task.default_kind)


@pytest.mark.parametrize("name", EMBEDDED)
def test_problems_depend_on_seed_split_and_index_only(name):
    task = get_task(name)
    assert task.example("train", 3) == get_task(name).example("train", 3)
    problems = {
        task._problem(task.example("train", 3)),
        task._problem(task.example("train", 4)),
        task._problem(task.example("test", 3)),
        task._problem(task.example("ood", 3)),
        task._problem(get_task(name, seed=1).example("train", 3)),
    }
    assert len(problems) == 5


@pytest.mark.parametrize("name", EMBEDDED)
def test_train_of_any_seed_is_disjoint_from_test_of_any_other(name):
    first, second = get_task(name, seed=0), get_task(name, seed=7)
    train = {first._problem(first.example("train", i)) for i in range(300)}
    assert not train & {second._problem(second.example("test", i)) for i in range(100)}


def test_verify_reads_special_tokens_and_plain_prompts():
    row = {"prompt": "D 1 3 H d d ? H", "answer": "8"}
    gold = "D 1 3 1 3 4 H d d 4 4 8"
    task = get_task("dag")
    assert task.verify(gold, row) == 1.0
    assert task.verify(f"{gold} <eos> <pad> <pad>", row) == 1.0
    assert task.verify(f"{gold} <pad>", row) == 0.0
    assert task.verify(gold, row, finished=False) == 0.0
    assert task.verify("D 1 3 1 3 4 D 1 3 1 3 4 H d d 4 4 8", row) == 1.0  # a needless true step is no error
    assert task.verify("H d d 4 4 8", row) == 0.0


def test_dag_split_ignores_names_order_and_distractors():
    task = get_task("dag")
    assert task._canonical("D 1 3 H d d ? H") == task._canonical("A b b C 9 9 B 3 1 ? A")
    assert task._canonical("D 1 3 H d d ? H") != task._canonical("D 1 4 H d d ? H")


def _broken(task_class, **methods):
    return type("Broken", (task_class,), methods)()


@pytest.mark.parametrize("task_class", TEXT_TASKS.values())
def test_validate_fails_for_a_broken_task(task_class):
    def last_word_only(self, words, prompt, answer):
        return words[-1] == answer

    def leak(self, rng, split):
        example = task_class._draw(self, rng, split)
        plan = f"{example.privileged['hints_without_execution']} {example.answer}"
        return dataclasses.replace(example, privileged={**example.privileged, "hints_without_execution": plan})

    def no_answer(self, rng, split):
        example = task_class._draw(self, rng, split)
        return dataclasses.replace(example, privileged={**example.privileged, "final_answer": "answer"})

    breakages = {
        "does not score 0.0": {"_is_correct": last_word_only},
        "does not score 1.0": {"_is_correct": lambda self, words, prompt, answer: False},
        "reveals": {"_draw": leak},
        "does not contain the answer": {"_draw": no_answer},
        "outside vocabulary": {"vocabulary": lambda self: ("?",)},
        "longer than completion_words": {"completion_words": lambda self, split="test": 1},
    }
    for message, methods in breakages.items():
        with pytest.raises(TaskValidationError, match=message):
            _broken(task_class, **methods).validate(count=8)


def test_validate_notices_shared_problems():
    # The split is decided on a form that tells two orders apart, while the proof sees them as one problem.
    def problem(self, example):
        return example.prompt if sys._getframe(1).f_code.co_name == "example" else "one problem"

    with pytest.raises(TaskValidationError, match="train and test share 1 problems"):
        _broken(DagTask, _problem=problem).validate(count=4)


def test_unknown_names_and_values_are_explained():
    with pytest.raises(ConfigError, match=r"task \(='dagg'\) must be one of dag, .*Did you mean 'dag'"):
        get_task("dagg")
    with pytest.raises(ConfigError, match=r"'num_need'.*Did you mean 'num_needed'"):
        get_task("dag", num_need=2)
    with pytest.raises(ConfigError, match=r"num_needed: got 0, allowed: an integer from 1 to 8"):
        DagTask(num_needed=0)
    with pytest.raises(ConfigError, match=r"num_variables: got 2"):
        DagTask(num_needed=3, num_variables=2)
    with pytest.raises(ConfigError, match=r"num_forks: got 4"):
        GraphTask(path_length=4, num_forks=4)
    with pytest.raises(ConfigError, match=r"nodes"):
        GraphTask(path_length=7, num_forks=6, dead_end_depth=2)
    with pytest.raises(ConfigError, match=r"num_ops: got 5"):
        ProgramTask(num_ops=5)
    with pytest.raises(ConfigError, match=r"operations: got 'flip', allowed: 'rev'"):
        ProgramTask(operations=["flip"])
    with pytest.raises(ConfigError, match=r"operations: got 0"):
        ProgramTask(operations=[])
    with pytest.raises(ConfigError, match=r"operations: got swap, of which no shortest program of 2"):
        ProgramTask(num_ops=1, operations=["swap"])
    with pytest.raises(ConfigError, match=r"split: got 'dev', allowed: 'train', 'test', 'ood'"):
        DagTask().example("dev", 0)
    with pytest.raises(ConfigError, match=r"privileged_kind: got 'plan'"):
        DagTask().rows("train", 1, "plan")
    with pytest.raises(ConfigError, match="holds no problem"):
        _broken(DagTask, _canonical=lambda self, prompt: "always the same").example("test", 0)


def test_programs_are_made_of_the_named_operations_and_solved_by_any():
    known = ProgramTask(num_ops=2, operations=["rev", "swap"])
    rows = known.rows("train", 20, "hints_without_execution")
    assert {word for row in rows for word in row["privileged_context"].split()[1:]} == {"rev", "swap"}
    everything = ProgramTask(num_ops=2)
    assert all(everything.verify(row["solution"], row, finished=True) for row in rows)
    others = [row for row in everything.rows("train", 60) if "tail" in row["solution"].split()]
    assert others and all(known.verify(row["solution"], row, finished=True) for row in others)


def test_tasks_do_not_import_torch():
    code = "import sys, dopd.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
