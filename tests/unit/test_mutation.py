"""The small faults of `lab.mutation`, which tests run for them, and the table of those that nothing notices."""

from pathlib import Path

import pytest

from lab.mutation import covered as measuring
from lab.mutation.campaign import Verdict, judge_directed, likely_files, likely_first, table
from lab.mutation.covered import Covered, measure
from lab.mutation.operators import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''\
"""A docstring."""
LIMIT = 3


def share(part: int | None, whole: int = 4, name: str = "x") -> float:
    """Another."""
    if not part:
        raise ValueError(f"part (={part + 1}) must be above 0")
    seen.add(part)
    return part / max(whole, LIMIT)
'''


def _texts(source: str) -> dict[tuple[int, str], set[str]]:
    """The lines that mutants make, by line and kind."""
    made: dict[tuple[int, str], set[str]] = {}
    for mutant in mutants_of("one.py", source):
        text = mutant.applied_to(source).splitlines()[mutant.line - 1].strip()
        made.setdefault((mutant.line, mutant.kind), set()).add(text)
    return made


def test_every_kind_of_fault_and_nothing_of_texts_and_types() -> None:
    assert _texts(SOURCE) == {
        (2, "constant"): {"LIMIT = (4)"},
        (5, "constant"): {'def share(part: int | None, whole: int = (5), name: str = "x") -> float:'},
        (5, "default"): {"def share(part: int | None, whole: int = 4, name: str = ('x_')) -> float:"},
        (7, "negation removed"): {"if (part):"},
        (8, "statement removed"): {"pass"},
        (9, "statement removed"): {"pass"},
        (10, "arithmetic"): {"return (part * max(whole, LIMIT))"},
        (10, "arguments swapped"): {"return part / (max(LIMIT, whole))"},
        (10, "returned value"): {"return (None)"},
    }


@pytest.mark.parametrize(
    ("before", "kind", "after"),
    [
        ("x = a < b", "comparison", {"x = (a <= b)", "x = (a >= b)"}),
        ("x = a is not b", "comparison", {"x = (a is b)"}),
        ("x = a and b", "boolean operator", {"x = (a or b)"}),
        ("x = -a", "negation removed", {"x = (a)"}),
        ("x = 0.5", "constant", {"x = (1.5)", "x = (0.25)"}),
        ("x = 1e300", "constant", {"x = (5e+299)"}),  # 1e300 + 1 is the same number
        ("x = True", "constant", {"x = (False)"}),
        ("x = 1 if a else 2", "condition negated", {"x = 1 if (not a) else 2"}),
        ("x = 'a' + b", "arithmetic", set()),
        ("x: list[int] = f(y)", "constant", set()),
    ],
)
def test_faults_of_one_line(before: str, kind: str, after: set[str]) -> None:
    assert _texts(before).get((1, kind), set()) == after


def test_every_fault_of_a_module_compiles_and_changes_one_place() -> None:
    source = (ROOT / "dopd" / "loss.py").read_text(encoding="utf-8")
    mutants = mutants_of("dopd/loss.py", source)
    assert len({(one.line, one.column, one.kind, one.after) for one in mutants}) == len(mutants) > 100
    for mutant in mutants:
        changed = mutant.applied_to(source)
        compile(changed, "loss.py", "exec")
        assert changed != source and mutant.before in source


def test_the_tests_of_a_line_come_fastest_first_and_an_import_has_those_of_its_function() -> None:
    lines: dict[int, list[str]] = {1: [], 4: ["slow", "fast"], 5: ["fast"], 9: ["other"]}
    covered = Covered({"slow": 2.0, "fast": 0.5, "other": 1.0}, {"a.py": lines})
    assert covered.tests("a.py", 4, 4, (3, 6)) == ["fast", "slow"]
    assert covered.tests("a.py", 3, 3, (3, 6)) == ["fast", "slow"]  # a default
    assert covered.tests("a.py", 1, 1, None) == ["fast", "other", "slow"]  # a constant of the module
    assert covered.tests("a.py", 20, 20, (20, 22)) == [] == covered.tests("b.py", 4, 4, None)


def test_the_table_counts_packages_and_lists_what_nothing_noticed() -> None:
    def verdict(file: str, ended: str) -> Verdict:
        return Verdict(Mutant(file, "boolean operator", 7, 0, 7, 6, "a or b", "(a and b)", None), ended)

    text = table(
        [verdict("dopd/loss.py", "killed"), verdict("dopd/step/a.py", "stopped"), verdict("dopd/step/b.py", "survived")]
    )
    assert "| dopd | 1 | 1 | 100% |" in text and "| step | 2 | 1 | 50% |" in text and "| all | 3 | 2 | 67% |" in text
    assert "| dopd/step/b.py:7 | boolean operator | `a or b` | `(a and b)` | |" in text and "a.py" not in text


def test_tests_named_after_a_module_or_importing_it_come_first(tmp_path: Path) -> None:
    texts = {
        "test_far.py": "import dopd\n",
        "test_near.py": "from dopd.fused.tiles import entropy\n",
        "test_tile.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    mutant = Mutant("dopd/fused/tiles.py", "constant", 3, 0, 3, 1, "1", "(2)", None)
    tests = ["test_far.py::a", "test_near.py::b", "test_far.py::c", "test_tile.py::d"]
    assert likely_first(tmp_path, mutant, tests) == [tests[1], tests[3], tests[0], tests[2]]


def test_a_file_of_tests_is_measured_again_when_it_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def of_one_file(tree: Path, scratch: Path, file: str, seconds: float) -> Covered:
        measured.append(file)
        return Covered({f"{file}::a": 1.0}, {"dopd/a.py": {1: [], 2: [f"{file}::a"], 3: [f"{file}::a"]}})

    monkeypatch.setattr(measuring, "_of_one_file", of_one_file)
    tree, files = tmp_path / "tree", ["test_one.py", "test_two.py"]
    (tree / "dopd").mkdir(parents=True)
    (tree / "dopd" / "a.py").write_text("def f():\n    x = 1\n    return x\n")
    for file in files:
        (tree / file).write_text("")
    measure(tree, tmp_path, files, 1.0)
    (tree / "dopd" / "a.py").write_text("import os\n\n\ndef f():\n    x = 1\n    return x + 1\n")
    (tree / "test_two.py").write_text("changed")
    lines = measure(tree, tmp_path, files, 1.0).lines["dopd/a.py"]
    assert measured == [*files, "test_two.py"]
    # Of the file that was not run again: the line that moved, and not the one that is another now.
    assert {line for line, tests in lines.items() if "test_one.py::a" in tests} == {5}
    assert {line for line, tests in lines.items() if "test_two.py::a" in tests} == {2, 3}


def test_the_likely_files_of_a_mutant_are_asked_for_some_seconds(tmp_path: Path) -> None:
    """A run that has had enough seconds has noticed nothing: the fault stands in what was not reached."""
    tree = tmp_path / "tree"
    texts = {
        "dopd/__init__.py": "",
        "dopd/near.py": "def share(part):\n    return part + 1\n\n\ndef other():\n    return 0\n",
        "test_far.py": "def test_far(): assert False, 'not asked'\n",
        "test_of_it.py": "import time\ndef test_share():\n    end = time.process_time() + 0.2\n"
        "    while time.process_time() < end: pass\n"
        "def test_late():\n    from dopd.near import share\n    assert share(1) == 2\n",
        "test_module.py": "import dopd.near\ndef test_other(): assert dopd.near.other() == 0\n",
    }
    for name, text in texts.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    files = ["test_far.py", "test_module.py", "test_of_it.py"]
    mutant = Mutant("dopd/near.py", "arithmetic", 2, 11, 2, 19, "part + 1", "(part - 1)", (1, 2))
    assert likely_files(tree, mutant, files) == ["test_of_it.py", "test_module.py"]
    outcomes = [judge_directed(tree, tmp_path, files, mutant, 0, seconds) for seconds in (60.0, 0.1)]
    assert [(one.ended, one.by) for one in outcomes] == [("killed", ["test_of_it.py::test_late"]), ("survived", [])]
    assert "part + 1" in (tree / "dopd" / "near.py").read_text()
    assert judge_directed(tree, tmp_path, ["test_far.py"], mutant, 0, 60.0).ended == "not run"
