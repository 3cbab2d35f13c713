"""The worked example: from raw problems to a judged model, command by command, each printed before it runs.

Files and commands are in `dopd/examples/walkthrough`; a page of the documentation shows the same ones.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape

import dopd.examples
from dopd.errors import ConfigError
from dopd.files import checksum, make_folder, replace_file
from dopd.inspection.schema import prompt_text
from dopd.interrupts import ENDS_WITH
from dopd.runs.jobs import JobError
from dopd.shown import visible
from dopd.tasks import get_source, rows_of_task

_SOURCE = Path(dopd.examples.__file__).parent / "walkthrough"
_COMMANDS, _FILES = "commands.sh", ("rule.py", "judge.py", "hints.yaml")
_DONE = "done.json"  # what each command was run on
_PROBLEMS, _TEST = "problems.jsonl", "test.jsonl"
_NUM_PROBLEMS, _NUM_TEST = 640, 256
_KNOBS = {"num_needed": 3, "num_variables": 5}  # as the tiny models were trained
_OUTPUTS = ("--output", "--output_dir", "--html", "--write")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        about (`str`): what it is for; `""` where it belongs to the one before.
        line (`str`): as it is typed.
    """

    about: str
    line: str

    @property
    def words(self) -> list[str]:
        """The arguments of `dopd`."""
        return shlex.split(self.line)[1:]

    @property
    def outputs(self) -> list[str]:
        """What it writes."""
        return [value for flag, value in zip(self.words, self.words[1:], strict=False) if flag in _OUTPUTS]

    def digest(self, folder: Path) -> dict[str, str]:
        """The line and the content of the files that it reads."""
        named = [word.rpartition(":")[0] if ".py:" in word else word for word in self.words]
        read = {name: folder / name for name in named if name not in self.outputs}
        return {"command": self.line} | {name: checksum(path) for name, path in read.items() if path.is_file()}


def steps() -> list[Step]:
    """The commands, in order."""
    found, about = list[Step](), ""
    for line in (_SOURCE / _COMMANDS).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            about = line.removeprefix("# ")
        else:
            found.append(Step(about, line))
            about = ""
    return found


def example(folder: str, *, dry_run: bool = False) -> None:
    """Write raw problems and a configuration to a folder, and run the commands there that were not run on the same
    files already.

    Args:
        folder (`str`): a new one, or that of an earlier call; files of it that were edited are left as they are.
        dry_run (`bool`): write the files, print the commands, and run none.

    Raises:
        ConfigError: the folder has files of other origin.
        JobError: a command failed; the same call goes on with it.
    """
    target, console, started = Path(folder), Console(), time.perf_counter()
    _write_files(target)
    every = steps()
    done = json.loads((target / _DONE).read_text(encoding="utf-8"))
    ran = 0
    for number, step in enumerate(every, 1):
        if step.about:
            console.print(f"\n[bold]{escape(step.about)}[/bold]", highlight=False)
        console.print(f"$ {escape(visible(step.line))}", style="cyan", soft_wrap=True, highlight=False)
        if dry_run:
            continue
        if not ran and done.get(str(number)) == step.digest(target) and all(_there(target, step)):
            console.print("done before", style="dim")
            continue
        _run(step, number, len(every), target, anew=ran > 0)
        ran += 1
        done = {key: value for key, value in done.items() if int(key) < number} | {str(number): step.digest(target)}
        replace_file(target / _DONE, json.dumps(done, indent=1).encode())
    where = f"cd {shlex.quote(str(target))}" if dry_run else f"{target / every[-1].outputs[0]}: open it in a browser"
    seconds = "" if dry_run else f"; {ran} of {len(every)} commands were run, in {time.perf_counter() - started:.0f} s"
    console.print(f"\n{escape(visible(where))}{seconds}", highlight=False, soft_wrap=True)


def _there(folder: Path, step: Step) -> Iterator[bool]:
    return ((folder / name).exists() for name in step.outputs)


def _run(step: Step, number: int, count: int, folder: Path, *, anew: bool) -> None:
    """Run a command in the folder; what an earlier call has written goes, where it was written from other files."""
    for name in step.outputs if anew else ():
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    environment = {**os.environ, ENDS_WITH: str(os.getpid())}
    sys.stdout.flush()
    status = subprocess.run(
        [sys.executable, "-m", "dopd.cli.main", *step.words], cwd=folder, env=environment, stdin=subprocess.DEVNULL
    ).returncode
    if status:
        raise JobError(
            f"command {number} of {count} ended with status {status}: {step.line}\nWhat is wrong stands above; dopd "
            f"example --output-dir {shlex.quote(str(folder))} goes on with it"
        )


def _write_files(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / _DONE).is_file())):
        raise ConfigError(f"--output-dir (={str(folder)!r}) has something else in it: choose another folder")
    make_folder(folder)
    if not (folder / _DONE).exists():
        replace_file(folder / _DONE, b"{}")
    for name in _FILES:
        if not (folder / name).exists():
            replace_file(folder / name, (_SOURCE / name).read_bytes())
    for name, rows in ((_PROBLEMS, _raw_problems()), (_TEST, _raw_rows("test", _NUM_TEST))):
        if not (folder / name).exists():
            replace_file(folder / name, "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def _raw_problems() -> Sequence[dict[str, str | None]]:
    """Problems as one finds them: some are there twice, and some have no answer."""
    rows = _raw_rows("train", _NUM_PROBLEMS)
    return [*rows, *rows[:12], *({**row, "answer": None} for row in rows[12:16])]


def _raw_rows(split: str, count: int) -> list[dict[str, str | None]]:
    problems = rows_of_task(get_source("dag", **_KNOBS), split, count, None)
    return [
        {"question": prompt_text(row["prompt"]), "solution": row["solution"], "answer": row["answer"]}
        for row in problems
    ]
