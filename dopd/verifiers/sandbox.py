"""Code that nobody has read, run where it can do no harm: see `dopd.verifiers.confined` for the locks.

What is held is measured on this machine before anything is run (`locks_here`), since kernels and containers differ.
"""

import json
import os
import platform
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dopd.errors import ConfigError, ScoringError
from dopd.verifiers import confined

_POLL = 0.02  # seconds between looks at what no resource limit bounds
_MOST_OUTPUT, _MOST_ERRORS = 8 * 2**20, 64 * 2**10  # bytes
_MOST_ON_DISK, _MOST_FILES, _MOST_THREADS = 64 * 2**20, 256, 64
_LOOK_SECONDS = 30.0
_FULL = ("limits", "privileges", "files", "calls")
_TAKEN_OVER = ("LD_LIBRARY_PATH", "SYSTEMROOT")  # of the environment: where the interpreter finds its libraries
# What a lock holds, and what is not held without it.
_HELD = {
    "limits": "CPU time, memory, size and number of open files",
    "privileges": "no capabilities, none from programs such as sudo",
    "files": "no file outside of an empty temporary folder is read or written, but Python's own library is read",
    "calls": "no sockets, no other processes, no signals to others, no changes of files' owners, modes and times",
}
NEVER_HELD = "whether a file is there, with its size and times, can be seen; cores and disk are shared while it runs"


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds (`float`): of the clock, and of CPU time, rounded up.
        memory_mb (`int`): of address space, in MiB.
    """

    seconds: float = 10.0
    memory_mb: int = 1024


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        ended (`str`): `"itself"`; or why it was ended: `"time"`, `"output"` (too much), `"files"` (too many or too
            large), `"threads"` (too many).
        status (`int`): of the process, negative for a signal.
        output, errors (`str`): what it wrote, as far as that was read.
    """

    ended: str
    status: int
    output: str
    errors: str

    @property
    def is_well(self) -> bool:
        """Whether it ended by itself, without an error."""
        return self.ended == "itself" and self.status == 0


@cache
def locks_here() -> dict[str, str]:
    """The locks that do not close on this machine, with the reason; empty where all do."""
    if not sys.platform.startswith("linux"):
        return dict.fromkeys(_FULL, f"they are of Linux, and this is {platform.system()}")
    with tempfile.TemporaryDirectory() as folder:
        found = _run([_setup("look", folder, Limits(_LOOK_SECONDS), needs=())], "", folder, _LOOK_SECONDS)
    try:
        return dict(json.loads(found.output)["open"])
    except (ValueError, KeyError):
        raise ScoringError(
            f"a sandbox for code cannot be started with {sys.executable}: status {found.status}, {found.errors[-300:]}"
        ) from None


def described(isolation: str = "full") -> str:
    """What is held on this machine and what is not, in a line."""
    gaps = locks_here()
    held = [text for name, text in _HELD.items() if name not in gaps]
    lacking = [f"NOT HELD: {_HELD[name]} ({reason})" for name, reason in gaps.items()]
    return "; ".join([*held, *(lacking if isolation != "full" else []), f"not held: {NEVER_HELD}"])


def check_locks(isolation: str) -> None:
    """Raise `ConfigError` where code would run with less than `isolation` says."""
    gaps = locks_here()
    if isolation == "full" and gaps:
        raise ConfigError(
            "code of models cannot be locked in on this machine: "
            + "; ".join(f"{_HELD[name]}: not held, {reason}" for name, reason in gaps.items())
            + ". Run it on a Linux machine with Landlock and seccomp, or, where nothing on this machine is worth "
            "protecting (a container of its own), set isolation: limits in verifier_options"
        )


def run_program(source: str, given_input: str, limits: Limits, isolation: str = "full") -> Outcome:
    """Run a program of one file.

    Args:
        source (`str`): Python.
        given_input (`str`): its standard input.
        limits (`Limits`): what it may use.
        isolation (`str`): `"full"`, or `"limits"` for whatever locks close.
    """
    with _folder() as folder:
        setup = _setup("program", folder, limits, needs=_needs(isolation)) | {"source": source}
        return _run([setup], given_input, folder, limits.seconds)


@dataclass(frozen=True)
class TestVerdict:
    """How many tests hold, and why the first one that does not, does not."""

    __test__ = False  # for pytest, which would collect it

    passed: int
    of: int
    reason: str


def run_tests(source: str, tests: Sequence[str], limits: Limits, isolation: str = "full") -> TestVerdict:
    """Run tests against the functions and classes of a source; the two are processes of their own.

    Args:
        source (`str`): Python.
        tests: Python; each holds where it raises nothing.
        limits (`Limits`): of each of the processes; `seconds` are of all tests together.
        isolation (`str`): as in `run_program`.
    """
    with _folder() as folder, ExitStack() as pipes:
        to_candidate, to_tests, verdict = os.pipe(), os.pipe(), os.pipe()
        for end in (*to_candidate, *to_tests, *verdict):
            pipes.callback(_close, end)
        common = {"needs": _needs(isolation)}
        candidate = _setup("candidate", folder, limits, **common) | {"source": source}
        candidate["pipe"] = [to_candidate[0], to_tests[1]]
        tester = _setup("tests", None, limits, **common) | {"tests": list(tests), "verdict": verdict[1]}
        tester["pipe"] = [to_tests[0], to_candidate[1]]
        ends = (to_candidate[0], to_tests[1], to_tests[0], to_candidate[1], verdict[1])
        outcome = _run([tester, candidate], "", folder, limits.seconds, lambda: _close(*ends))
        content = _what_is_there(verdict[0])
    try:
        found = json.loads(content)
        return TestVerdict(int(found["passed"]), int(found["of"]), str(found["reason"]))
    except (ValueError, KeyError, TypeError):
        last = (outcome.errors.strip().splitlines() or [f"status {outcome.status}"])[-1]
        reason = last if outcome.ended == "itself" else f"it was ended: {outcome.ended}"
        return TestVerdict(0, len(tests), reason)


def _what_is_there(end: int) -> bytes:
    os.set_blocking(end, False)
    with suppress(BlockingIOError):
        return os.read(end, 2**16)
    return b""


def _needs(isolation: str) -> tuple[str, ...]:
    return _FULL if isolation == "full" else ()


def _setup(role: str, folder: str | None, limits: Limits, needs: Sequence[str]) -> dict[str, Any]:
    """What the process reads first."""
    cpu, size = int(limits.seconds) + 1, limits.memory_mb * 2**20
    bounds = {"CPU": cpu, "AS": size, "FSIZE": min(size, 16 * 2**20), "NOFILE": 64, "CORE": 0}
    return {
        "role": role,
        "folder": folder,
        "needs": list(needs),
        "limits": bounds,
        "readable": _library(),
        "path": [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")],
        "pipe": None,
    }


@cache
def _library() -> list[str]:
    """Folders with Python's library and what it links to."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, "/usr", "/usr/local", "/"}
    paths |= {str(Path(prefix, name)) for prefix in prefixes for name in ("lib", "lib64", "lib32")}
    paths |= {"/etc/ld.so.cache", "/usr/share/zoneinfo"}
    return sorted(path for path in paths if path and os.path.exists(path))


@contextmanager
def _folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dopd-answer-", ignore_cleanup_errors=True) as folder:
        yield folder


def _close(*ends: int) -> None:
    for end in ends:
        with suppress(OSError):
            os.close(end)


def _environment(folder: str) -> dict[str, str]:
    """Without anything of ours, keys first of all."""
    own = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
    return own | {"OPENBLAS_NUM_THREADS": "1"} | {n: os.environ[n] for n in _TAKEN_OVER if n in os.environ}


def _run(
    setups: Sequence[Mapping[str, Any]], given_input: str, folder: str, seconds: float, started: Any = lambda: None
) -> Outcome:
    """Start processes, and wait for the first of them; all have ended when this returns."""
    processes: list[subprocess.Popen[bytes]] = []
    with ExitStack() as files:
        source = files.enter_context(tempfile.TemporaryFile())
        source.write(given_input.encode(errors="replace"))
        source.seek(0)
        try:
            for setup in setups:
                file = files.enter_context(tempfile.TemporaryFile())
                file.write(json.dumps(setup).encode())
                file.seek(0)
                passed = [file.fileno(), *(setup["pipe"] or ()), *([setup["verdict"]] if "verdict" in setup else ())]
                first = setup is setups[0]
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(confined.__file__), str(file.fileno())],
                        stdin=source if first else subprocess.DEVNULL,
                        stdout=subprocess.PIPE if first else subprocess.DEVNULL,
                        stderr=subprocess.PIPE if first else subprocess.DEVNULL,
                        cwd=folder,
                        env=_environment(folder),
                        pass_fds=passed,
                        start_new_session=True,
                    )
                )
            started()
            ended, output, errors = _watch(processes, folder, time.monotonic() + seconds)
        finally:
            for process in processes:
                with suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                for stream in (process.stdout, process.stderr):
                    if stream is not None:
                        stream.close()
    status = processes[0].returncode
    text = errors.decode(errors="replace")
    if status == confined.LOCK_FAILED and confined.EXPLAIN in text:
        raise ScoringError(f"the sandbox for code does not close any more: {text.strip()}")
    return Outcome(ended, status, output.decode(errors="replace"), text)


def _watch(processes: Sequence["subprocess.Popen[bytes]"], folder: str, until: float) -> tuple[str, bytes, bytes]:
    """Read what the first process writes until it has ended, or something is beyond its bounds."""
    first = processes[0]
    assert first.stdout is not None and first.stderr is not None
    found = {first.stdout: bytearray(), first.stderr: bytearray()}
    most = {first.stdout: _MOST_OUTPUT, first.stderr: _MOST_ERRORS}
    ended = ""
    with selectors.DefaultSelector() as selector:
        for one in found:
            os.set_blocking(one.fileno(), False)
            selector.register(one, selectors.EVENT_READ)
        while not ended:
            ready = selector.select(_POLL)
            for key, _ in ready:
                stream: Any = key.fileobj
                content = stream.read(2**16)
                if content:
                    found[stream] += content
                    if len(found[stream]) > most[stream]:
                        ended = "output" if stream is first.stdout else ended
                        del found[stream][: -most[stream]]
                elif content == b"":
                    selector.unregister(stream)
            if not ended:
                ended = _beyond(processes, folder, until)
            if not ended and not selector.get_map():
                with suppress(subprocess.TimeoutExpired):
                    first.wait(max(0.0, min(_POLL, until - time.monotonic())))
                    ended = "itself"
    return ended, bytes(found[first.stdout]), bytes(found[first.stderr])


def _beyond(processes: Sequence["subprocess.Popen[bytes]"], folder: str, until: float) -> str:
    """Which of the bounds that no resource limit holds is passed, or `""`."""
    if time.monotonic() > until:
        return "time"
    for process in processes:
        with suppress(OSError):
            if len(os.listdir(f"/proc/{process.pid}/task")) > _MOST_THREADS:
                return "threads"
    size = count = 0
    for place, _, names in os.walk(folder):
        for name in names:
            count += 1
            with suppress(OSError):
                size += os.lstat(os.path.join(place, name)).st_size
        if count > _MOST_FILES or size > _MOST_ON_DISK:
            return "files"
    return ""
