"""Which tests run which line: measured once, with a context of coverage for each test."""

import json
import shutil
from dataclasses import asdict, dataclass, field
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
    """Run test files one after another and note what each test runs; goes on where an earlier call stopped.

    Args:
        tree: the copy of the checkout.
        scratch: where measurements are kept.
        files: relative to `tree`.
        file_seconds: processor time after which no further test of a file is started.
    """
    whole = Covered()
    for file in files:
        kept = scratch / "covered" / (file.replace("/", "-") + ".json")
        if not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            one = _of_one_file(tree, scratch, file, file_seconds)
            kept.write_text(json.dumps(asdict(one)), encoding="utf-8")
            print(f"{file}: {len(one.seconds)} tests, {sum(one.seconds.values()):.0f} s", flush=True)
            for test in one.failed:
                print(f"  fails without a mutant, left out: {test}", flush=True)
        part = json.loads(kept.read_text(encoding="utf-8"))
        whole.seconds.update(part["seconds"])
        whole.failed += part["failed"]
        for name, lines in part["lines"].items():
            for line, tests in lines.items():
                whole.lines.setdefault(name, {}).setdefault(int(line), []).extend(tests)
    return whole


def _of_one_file(tree: Path, scratch: Path, file: str, file_seconds: float) -> Covered:
    folder = scratch / "coverage"
    shutil.rmtree(folder, ignore_errors=True)
    outcome = run_pytest(tree, scratch, [file], processor_seconds=1800, enough=file_seconds)
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
