"""Which tests run which line: measured once for each test file, with a context of coverage for each test."""

import difflib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import coverage

from lab.mutation.forked import run_pytest


@dataclass
class Covered:
    """Lines of `dopd` and the tests that run them.

    Attributes:
        seconds: {test id: processor seconds}, of tests that passed.
        lines: {file, relative to the checkout: {line: ids of tests}}; what runs while a file is imported has no test.
        failed: tests that fail without any mutant; they are not used.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def tests(self, file: str, first: int, last: int, function: tuple[int, int] | None) -> list[str]:
        """Tests that run a piece of a file, the fastest first.

        Args:
            first, last: lines of the piece.
            function: lines of the function around it. A piece that only runs while the file is imported (a default, a
                constant) is answered for by the tests of its function, and outside of functions by those of its file.
        """
        lines = self.lines.get(file, {})
        wholes = [range(first, last + 1)]
        if function is not None:
            wholes.append(range(function[0], function[1] + 1))
        elif any(line in lines for line in wholes[0]):
            wholes.append(range(1, 10**6))
        for whole in wholes:
            found = {test for line, tests in lines.items() if line in whole for test in tests if test in self.seconds}
            if found:
                return sorted(found, key=lambda test: (self.seconds[test], test))
        return []


def measure(tree: Path, scratch: Path, files: list[str], file_seconds: float) -> Covered:
    """Run test files one after another and note what each test runs.

    A file that was measured before and has the same text is not run again: where `dopd` was changed since, its lines
    are found in the sources of now.

    Args:
        tree: the copy of the checkout.
        scratch: where measurements are kept.
        files: relative to `tree`.
        file_seconds: processor time after which no further test of a file is started.
    """
    whole = Covered()
    sources = {
        path.relative_to(tree).as_posix(): path.read_text(encoding="utf-8") for path in (tree / "dopd").rglob("*.py")
    }
    now = _keep(scratch, sources)
    for file in files:
        kept = scratch / "covered" / (file.replace("/", "-") + ".json")
        digest = _digest((tree / file).read_text(encoding="utf-8"))
        if not kept.is_file() or json.loads(kept.read_text(encoding="utf-8")).get("digest") != digest:
            kept.parent.mkdir(parents=True, exist_ok=True)
            one = _of_one_file(tree, scratch, file, file_seconds)
            kept.write_text(json.dumps(asdict(one) | {"digest": digest, "sources": now}), encoding="utf-8")
            print(f"{file}: {len(one.seconds)} tests, {sum(one.seconds.values()):.0f} s", flush=True)
            for test in one.failed:
                print(f"  fails without a mutant, left out: {test}", flush=True)
        part = json.loads(kept.read_text(encoding="utf-8"))
        whole.seconds.update(part["seconds"])
        whole.failed += part["failed"]
        before = sources if part["sources"] == now else _kept(scratch, part["sources"])
        for name, lines in part["lines"].items():
            places = moved_lines(before.get(name, ""), sources.get(name, ""))
            for line, tests in lines.items():
                if int(line) in places:
                    whole.lines.setdefault(name, {}).setdefault(places[int(line)], []).extend(tests)
    return whole


@cache
def moved_lines(before: str, after: str) -> dict[int, int]:
    """Line number in one text -> that of the same line in another; lines that were changed are left out."""
    if before == after:
        return {line: line for line in range(1, before.count("\n") + 2)}
    matcher = difflib.SequenceMatcher(None, before.splitlines(), after.splitlines(), autojunk=False)
    return {
        first + offset + 1: second + offset + 1
        for first, second, length in matcher.get_matching_blocks()
        for offset in range(length)
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _keep(scratch: Path, sources: Mapping[str, str]) -> str:
    """Keep the sources that lines are measured in, by the name that is returned."""
    text = json.dumps(sources, sort_keys=True)
    path = scratch / "sources" / f"{_digest(text)[:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path.stem


@cache
def _kept(scratch: Path, name: str) -> dict[str, str]:
    sources: dict[str, str] = json.loads((scratch / "sources" / f"{name}.json").read_text(encoding="utf-8"))
    return sources


def _of_one_file(tree: Path, scratch: Path, file: str, file_seconds: float) -> Covered:
    folder = scratch / "coverage"
    shutil.rmtree(folder, ignore_errors=True)
    outcome = run_pytest(tree, scratch, [file], processor_seconds=1800, enough=file_seconds, covering=True)
    if outcome.ended == "stopped":
        return Covered(failed=[file])
    combined = coverage.CoverageData(basename=str(folder / "combined"))
    for path in sorted(folder.glob("data.*")):
        part = coverage.CoverageData(basename=str(path))
        part.read()
        combined.update(part)
    lines: dict[str, dict[int, list[str]]] = {}
    for measured in combined.measured_files():
        name = Path(measured).relative_to(tree).as_posix()
        lines[name] = {
            line: sorted(filter(None, contexts)) for line, contexts in combined.contexts_by_lineno(measured).items()
        }
    seconds = {test: spent for test, spent in outcome.seconds.items() if test not in outcome.failed}
    return Covered(seconds, lines, outcome.failed)
