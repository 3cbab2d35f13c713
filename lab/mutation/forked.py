"""Runs of pytest in forked processes, which find torch and the libraries on top of it imported already."""

import contextlib
import importlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import coverage
import pytest

QUICK = "not slow and not weights and not gpu and not browser and not wheel"
PRELOADED = (
    "torch", "torch._dynamo", "transformers", "trl", "trl.trainer.grpo_trainer", "peft", "datasets", "accelerate",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3", "numpy", "PIL.Image",
    "hypothesis", "pydantic", "rich.console", "matplotlib",
)  # fmt: skip
CONTEXT = "DOPD_MUTATION_TEST"  # the variable that names the running test, for coverage in its subprocesses
COVERAGE_SETTINGS = """\
[run]
data_file = {data_file}
parallel = true
include = {package}/*
context = ${{{variable}}}
"""


@dataclass
class Outcome:
    """What one run of pytest came to.

    Attributes:
        ended: "passed", "failed", or "stopped" at a limit.
        failed: ids of tests that failed; with `-x` the first.
        seconds: {test id: processor seconds of its setup, call and teardown}.
    """

    ended: str
    failed: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Recorder:
    """A plugin of pytest: times tests, notes failures and, if coverage is measured, names the running test to it."""

    def __init__(self, measured: coverage.Coverage | None = None, enough: float = math.inf) -> None:
        self.measured, self.enough = measured, enough
        self.failed: list[str] = []
        self.seconds: dict[str, float] = {}
        self.is_done = False  # enough seconds were spent

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        os.environ[CONTEXT] = item.nodeid
        if self.measured is not None:
            self.measured.switch_context(item.nodeid)
        before = time.process_time() + sum(os.times()[2:4])
        yield
        self.seconds[item.nodeid] = time.process_time() + sum(os.times()[2:4]) - before
        if sum(self.seconds.values()) > self.enough:
            item.session.shouldstop, self.is_done = "enough seconds", True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def preload() -> None:
    """Import what every test file would import first, with the settings that `tests/conftest.py` makes."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)


def run_pytest(
    tree: Path,
    scratch: Path,
    tests: list[str],
    *,
    processor_seconds: int,
    enough: float = math.inf,
    covering: bool = False,
) -> Outcome:
    """Run tests of `tree` in a fork of this process, which must not have imported `dopd`.

    Args:
        tree: the copy of the checkout.
        scratch: a folder for the tests' temporary files, for output and for coverage data.
        tests: files or test ids, relative to `tree`.
        processor_seconds: limit of the processor time; ten times as long by the clock.
        enough: start no test after so many seconds of processor time.
        covering: measure coverage, one context for each test, into `scratch/coverage`, and go on after a failure.
    """
    result = scratch / "result.json"
    result.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CPU, (processor_seconds, processor_seconds + 5))
            _in_child(tree, scratch, tests, result, enough=enough, covering=covering)
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            os._exit(0)
    _wait(child, time.monotonic() + 10 * processor_seconds)
    shutil.rmtree(scratch / "tmp", ignore_errors=True)
    if not result.is_file():
        return Outcome("stopped")
    return Outcome(**json.loads(result.read_text(encoding="utf-8")))


def _wait(child: int, deadline: float) -> None:
    while not os.waitpid(child, os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # what a test left running


def _in_child(tree: Path, scratch: Path, tests: list[str], result: Path, *, enough: float, covering: bool) -> None:
    os.chdir(tree)
    sys.dont_write_bytecode = True
    hook = scratch / "hook"
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", PYTHONPATH=f"{tree}:{hook}:{os.environ.get('PYTHONPATH', '')}")
    sys.path[:] = [str(tree), *(one for one in sys.path if one not in ("", os.fspath(Path.cwd())))]
    for name in [name for name in sys.modules if name.split(".")[0] in ("dopd", "lab")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    log = os.open(scratch / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    measured = _measured(tree, scratch, hook) if covering else None
    recorder = Recorder(measured, enough)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
        "--basetemp",
        str(scratch / "tmp"),
        "-m",
        QUICK,
        *([] if covering else ["-x"]),
    ]
    status = pytest.main([*options, *tests], plugins=[recorder])
    if measured is not None:
        measured.stop()
        measured.save()
    # A run that has had enough seconds is interrupted for pytest, whatever its tests came to.
    ended = "passed" if status in (0, 5) or (status == 2 and recorder.is_done and not recorder.failed) else "failed"
    partial = result.with_suffix(".part")
    partial.write_text(json.dumps({"ended": ended, "failed": recorder.failed, "seconds": recorder.seconds}))
    partial.replace(result)


def _measured(tree: Path, scratch: Path, hook: Path) -> coverage.Coverage:
    """Coverage of this process, and settings from which subprocesses start their own."""
    (scratch / "coverage").mkdir(parents=True, exist_ok=True)
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text("import coverage\ncoverage.process_startup()\n")
    settings = scratch / "coverage.ini"
    settings.write_text(
        COVERAGE_SETTINGS.format(data_file=scratch / "coverage" / "data", package=tree / "dopd", variable=CONTEXT)
    )
    os.environ[CONTEXT] = ""
    os.environ["COVERAGE_PROCESS_START"] = str(settings)
    measured = coverage.Coverage(config_file=str(settings))
    measured.start()
    return measured
