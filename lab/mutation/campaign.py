"""A sample of mutants and what the tests made of each."""

import ast
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from lab.mutation.covered import Covered
from lab.mutation.forked import run_pytest
from lab.mutation.operators import Mutant, mutants_of

# What draws or prints for people: its tests are looks at pictures and texts.
EXCLUDED = ("dopd/report/", "dopd/inspection/pictures.py", "dopd/cli/look.py", "dopd/cli/terminal.py")
FIRST_TESTS = 8  # alone, before the others
MAX_TESTS = 400
MAX_SECONDS = 90.0  # of processor time, as measured without a mutant


@dataclass
class Verdict:
    """What became of a mutant.

    Attributes:
        ended: "killed", "stopped" (a test ran past its limit, or the process died: noticed as well), "survived", or
            "not run" (no quick test runs its line).
        by: the first test that failed.
        tests: how many tests ran at most.
    """

    mutant: Mutant
    ended: str
    by: list[str] = field(default_factory=list)
    tests: int = 0

    @property
    def noticed(self) -> bool:
        return self.ended in ("killed", "stopped")


def sample(tree: Path, seed: int, count: int) -> list[Mutant]:
    """Mutants of `dopd` drawn at random, each as likely as the other, so that modules have them by their size."""
    everyone = []
    for path in sorted((tree / "dopd").rglob("*.py")):
        file = path.relative_to(tree).as_posix()
        if not file.startswith(EXCLUDED):
            everyone += mutants_of(file, path.read_text(encoding="utf-8"))
    return random.Random(seed).sample(everyone, count)


def judge(tree: Path, scratch: Path, covered: Covered, mutant: Mutant, number: int) -> Verdict:
    """Put one mutant into the tree, run the tests that run its line, and take it out again."""
    asked = covered.tests(mutant.file, mutant.line, mutant.end_line, mutant.function)
    tests = _affordable(covered, likely_first(tree, mutant, asked))
    if not tests:
        return Verdict(mutant, "not run")
    with _mutated(tree, mutant, number):
        for part in (tests[:FIRST_TESTS], tests[FIRST_TESTS:]):
            if part:
                limit = 30 + 4 * sum(covered.seconds[test] for test in part)
                outcome = run_pytest(tree, scratch, part, processor_seconds=int(limit))
                if outcome.ended != "passed":
                    ended = "stopped" if outcome.ended == "stopped" else "killed"
                    return Verdict(mutant, ended, outcome.failed[:1], len(tests))
        return Verdict(mutant, "survived", [], len(tests))


def judge_directed(tree: Path, scratch: Path, files: list[str], mutant: Mutant, number: int, seconds: float) -> Verdict:
    """As `judge`, without measured coverage: the tests of the likely files, for so many seconds of processor time."""
    likely = likely_files(tree, mutant, files)
    if not likely:
        return Verdict(mutant, "not run")
    with _mutated(tree, mutant, number):
        outcome = run_pytest(tree, scratch, likely, processor_seconds=int(seconds) + 45, enough=seconds)
    ended = {"passed": "survived", "failed": "killed"}.get(outcome.ended, outcome.ended)
    return Verdict(mutant, ended, outcome.failed[:1], len(outcome.seconds))


@contextmanager
def _mutated(tree: Path, mutant: Mutant, number: int) -> Iterator[None]:
    """Inside, the tree has the mutant."""
    path = tree / mutant.file
    source, times = path.read_text(encoding="utf-8"), path.stat()
    path.write_text(mutant.applied_to(source), encoding="utf-8")
    # Another second of change for each mutant: compiled files are told apart by it.
    os.utime(path, (times.st_atime, times.st_mtime + number + 1))
    try:
        yield
    finally:
        path.write_text(source, encoding="utf-8")
        os.utime(path, (times.st_atime, times.st_mtime))


def likely_files(tree: Path, mutant: Mutant, files: list[str]) -> list[str]:
    """Test files that are named after the mutant's module, import it, or name its function or a public name of it; the
    likeliest first.
    """
    path = Path(mutant.file)
    source = (tree / path).read_text(encoding="utf-8")
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    around = [one.name for one in functions if one.lineno <= mutant.line <= (one.end_lineno or one.lineno)]
    public = [one.name for one in functions if not one.name.startswith("_")]
    scores: dict[str, int] = {}
    for file in files:
        text = (tree / file).read_text(encoding="utf-8")
        scores[file] = (
            8 * any(re.search(rf"\b{name}\b", text) is not None for name in around if not name.startswith("__"))
            + 4 * (path.stem.rstrip("s") in Path(file).stem)
            + 2 * (module in text)
            + any(re.search(rf"\b{name}\b", text) is not None for name in public)
        )
    return sorted((file for file in files if scores[file]), key=lambda file: -scores[file])


def likely_first(tree: Path, mutant: Mutant, tests: list[str]) -> list[str]:
    """Tests of files that are named after the mutant's module, or import it, before the others: the fastest tests of a
    line run it on their way to something else, and see little of what it does.
    """
    path = Path(mutant.file)
    importing = f"from {'.'.join(path.with_suffix('').parts)} import"

    @cache
    def is_likely(file: str) -> bool:
        return path.stem.rstrip("s") in Path(file).stem or importing in (tree / file).read_text(encoding="utf-8")

    return sorted(tests, key=lambda test: not is_likely(test.split("::")[0]))


def _affordable(covered: Covered, tests: list[str]) -> list[str]:
    """The first tests, within the limits of number and time, but one at least."""
    chosen: list[str] = []
    spent = 0.0
    for test in tests[:MAX_TESTS]:
        spent += covered.seconds[test]
        if chosen and spent > MAX_SECONDS:
            break
        chosen.append(test)
    return chosen


def read(path: Path) -> list[Verdict]:
    """Verdicts of a file with one JSON object a line; none without the file."""
    if not path.is_file():
        return []
    verdicts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        mutant = values.pop("mutant")
        mutant["function"] = mutant["function"] and tuple(mutant["function"])
        verdicts.append(Verdict(Mutant(**mutant), **values))
    return verdicts


def append(path: Path, verdict: Verdict) -> None:
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(verdict)) + "\n")


def packages(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    """Verdicts by folder of `dopd`; files directly in it are together under `dopd`."""
    by_package: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        parts = verdict.mutant.file.split("/")
        by_package.setdefault(parts[1] if len(parts) > 2 else "dopd", []).append(verdict)
    return dict(sorted(by_package.items()))


def table(verdicts: list[Verdict]) -> str:
    """Markdown: how many of each package were noticed, then every mutant that was not."""

    def line(name: str, some: list[Verdict]) -> str:
        noticed = sum(verdict.noticed for verdict in some)
        return f"| {name} | {len(some)} | {noticed} | {noticed / len(some):.0%} |"

    lines = ["| package | mutants | killed | share |", "|---|---|---|---|"]
    lines += [line(name, some) for name, some in packages(verdicts).items()]
    lines += [line("all", verdicts), "", "| place | fault | before | after | judgement |", "|---|---|---|---|---|"]
    for verdict in sorted(verdicts, key=lambda one: (one.mutant.file, one.mutant.line)):
        if not verdict.noticed:
            mutant = verdict.mutant
            kind = mutant.kind + (" (no quick test runs it)" if verdict.ended == "not run" else "")
            lines.append(f"| {mutant.file}:{mutant.line} | {kind} | {_cell(mutant.before)} | {_cell(mutant.after)} | |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    short = " ".join(text.split())
    return "`" + (short if len(short) <= 90 else short[:87] + "...").replace("|", "\\|") + "`"
