"""Run several `dopd` commands side by side, one core each, with a bar for each."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dopd.errors import ConfigError, DopdError
from dopd.files import make_folder
from dopd.interrupts import ENDS_WITH

_POLL_SECONDS = 0.25
_GRACE_SECONDS = 5.0  # for a step to be finished and saved


class JobError(DopdError, RuntimeError):
    """A command that one of our commands started has failed."""


@dataclass
class Job:
    """One command.

    Attributes:
        label (`str`): what the bar says.
        arguments (`list[str]`): arguments of `dopd`.
        log (`Path`): file for its output.
        progress (callable, *optional*): fraction done, in [0, 1].
    """

    label: str
    arguments: list[str]
    log: Path
    progress: Callable[[], float] | None = None
    process: Any = field(default=None, repr=False)

    def start(self) -> None:
        make_folder(self.log.parent)
        # Two threads on busy cores are many times slower than one.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment[ENDS_WITH] = str(os.getpid())
        self.log.unlink(missing_ok=True)
        with self.log.open("x") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dopd.cli.main", *self.arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
            )


def run_jobs(jobs: Sequence[Job], *, at_once: int, console: Console) -> None:
    """Run all jobs, `at_once` at a time, in order.

    Raises:
        ConfigError: `at_once` below 1.
        JobError: one failed; the others are stopped, and the message ends with the end of its log.
    """
    if at_once < 1:
        raise ConfigError(f"jobs (={at_once}) must be at least 1")
    waiting, running = list(jobs), list[Job]()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bars: dict[int, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    job = waiting.pop(0)
                    job.start()
                    running.append(job)
                    bars[id(job)] = progress.add_task(job.label, total=1.0 if job.progress else None)
                time.sleep(_POLL_SECONDS)
                for job in list(running):
                    if job.progress:
                        progress.update(bars[id(job)], completed=job.progress())
                    if job.process.poll() is None:
                        continue
                    running.remove(job)
                    _check(job)
                    progress.update(bars[id(job)], total=1.0, completed=1.0)
                    if not console.is_terminal:
                        console.print(f"done: {job.label}")
        finally:
            for job in running:
                job.process.terminate()
            end = time.monotonic() + _GRACE_SECONDS
            for job in running:
                try:
                    job.process.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    job.process.kill()
                    job.process.wait()


def _check(job: Job) -> None:
    if job.process.returncode:
        tail = "\n".join(job.log.read_text(errors="replace").splitlines()[-8:])
        raise JobError(f"{job.label} failed with exit status {job.process.returncode}; the end of {job.log}:\n{tail}")
