"""Many runs on several processes, each of which imports its libraries once and then makes one run after another."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dopd.errors import DopdError
from dopd.interrupts import end_with
from lab.spec import RunSpec

Todo = Sequence[tuple[str, RunSpec]]


class PoolError(DopdError, RuntimeError):
    """A process that made runs has died; what was finished is kept."""


def execute_all(todo: Todo, keep: Callable[[dict[str, Any]], None], *, jobs: int, console: Console) -> None:
    """Make runs, `jobs` at a time, and hand each finished record to `keep` at once.

    Raises:
        PoolError: a process died (memory, a signal). Errors of a run itself are raised as they are.
    """
    if not todo:
        return
    # Two threads on busy cores are many times slower than one; processes inherit this before they import anything.
    os.environ.update({"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    progress = _Report(len(todo), console)
    waiting = list(todo)
    context = multiprocessing.get_context("spawn")
    with progress, ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(os.getpid(),)) as executor:
        running: dict[Any, RunSpec] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    key, spec = waiting.pop(0)
                    running[executor.submit(_run, key, spec)] = spec
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    spec = running.pop(future)
                    record = future.result()
                    keep(record)
                    progress.finished(record)
        except BrokenProcessPool:
            raise PoolError(
                "a process that made runs has died (out of memory, or stopped from outside). Finished runs are kept: "
                "start the command again to go on, with a lower --jobs if memory was short"
            ) from None
        except BaseException:
            # The pool would wait for the runs that are under way.
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise


def _start(parent: int) -> None:
    """What a process that makes runs does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is sent to it too; the one that started it ends it
    end_with(parent)


def _run(key: str, spec: RunSpec) -> dict[str, Any]:
    from lab.worker import execute

    return {"key": key, **execute(spec)}


class _Report:
    """A bar with the time left in a terminal; elsewhere one line for each run."""

    def __init__(self, total: int, console: Console) -> None:
        self._total, self._done, self._start, self._console = total, 0, time.perf_counter(), console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("runs", total=total)

    def __enter__(self) -> "_Report":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def finished(self, record: dict[str, Any]) -> None:
        self._done += 1
        run, metrics = record["run"], record["metrics"]
        label = f"{run['method']} {'+'.join(run['families'])} {run['pretraining_seed']}/{run['run_seed']}"
        self._bar.update(self._task, advance=1, description=label)
        if not self._console.is_terminal:
            left = (time.perf_counter() - self._start) / self._done * (self._total - self._done)
            numbers = f"greedy {100 * metrics['greedy']:.1f}, sampled {100 * metrics['sampled']:.1f}"
            self._console.print(
                f"{self._done}/{self._total} {label}, lr {run['learning_rate']:g}: {numbers}; "
                f"{record['seconds']:.0f} s, "
                f"{left:.0f} s left",
                highlight=False,
            )
