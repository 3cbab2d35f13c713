"""Programs of models are run where they can do no harm, and cannot talk their way to a score."""

import base64
import json
import os
import pickle
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest

from dopd.cli.main import main
from dopd.errors import ConfigError, DataError
from dopd.verifiers import sandbox
from dopd.verifiers.code_tests import read_tests, same_output, source_in
from dopd.verifiers.named import check_verifier, load_verifier
from dopd.verifiers.sandbox import Limits, Outcome, run_program, run_tests

ALLOWED = {"allow_code_execution": True}
KEY = "sk-planted-5150-key"
LIMITS = Limits(seconds=8.0, memory_mb=512)


@pytest.fixture(scope="module", autouse=True)
def locked() -> None:
    if gaps := sandbox.locks_here():
        pytest.skip(f"this machine cannot lock code in: {gaps}")


def denied(code: str, limits: Limits = LIMITS) -> Outcome:
    """Run code of which the last line must not be reached."""
    outcome = run_program(f"{code}\nprint('REACHED')", "", limits)
    assert "REACHED" not in outcome.output, outcome
    return outcome


def tried(attacks: str) -> str:
    """A program that tries each line, and says which were not refused."""
    caught = "except (OSError, ValueError): pass"
    lines = [line.strip() for line in attacks.strip().splitlines()]
    return "".join(f"try:\n    {line}\n    print('REACHED', {line!r})\n{caught}\n" for line in lines)


def test_files_outside_of_the_folder_are_neither_read_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / ".ssh" / "id_rsa"
    secret.parent.mkdir()
    secret.write_text(KEY)
    secret.chmod(0o600)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    attacks = f"""
        open({str(secret)!r}).read()
        open({str(tmp_path / "new")!r}, "w")
        os.listdir({str(tmp_path)!r})
        os.remove({str(secret)!r})
        os.truncate({str(secret)!r}, 0)
        os.chmod({str(secret)!r}, 0o777)
        os.utime({str(secret)!r}, (1, 1))
        os.rename({str(secret)!r}, "mine")
        os.symlink({str(secret)!r}, "link") or open("link").read()
        os.link({str(secret)!r}, "hard")
        os.mkdir({str(tmp_path / "folder")!r})
        open("/etc/passwd").read()
        open(f"/proc/{{os.getppid()}}/environ", "rb").read()
        open("/proc/self/environ", "rb").read()
        open(f"/proc/{{os.getppid()}}/mem", "r+b")
        os.listdir("/tmp")
        os.setxattr({str(secret)!r}, "user.x", b"1")
        os.chroot(".")
    """
    body = tried(attacks)
    outcome = run_program(
        f"import os\n{body}print(sorted(os.environ))\nopen('own', 'w').write('1')\nprint(sorted(os.listdir()))\n"
        "import fractions, decimal\nprint(os.path.expanduser('~') == os.getcwd())",
        "",
        LIMITS,
    )
    *reached, names, own, home = outcome.output.splitlines()
    assert outcome.is_well and reached == [] and own == "['link', 'own']" and home == "True", outcome
    assert "OPENAI_API_KEY" not in names and KEY not in outcome.output
    assert secret.read_text() == KEY and secret.stat().st_mode & 0o777 == 0o600 and secret.stat().st_mtime > 1e6
    assert sorted(path.name for path in tmp_path.iterdir()) == [".ssh"]


def test_network_processes_signals_and_limits_are_held() -> None:
    me = os.getpid()
    attacks = f"""
        socket.socket()
        socket.socket(socket.AF_UNIX)
        socket.socketpair()
        os.fork()
        subprocess.run(["/bin/true"])
        os.execv("/usr/bin/env", ["env"])
        os.posix_spawn("/usr/bin/sudo", ["sudo", "id"], {{}})
        os.kill({me}, signal.SIGTERM)
        os.kill(os.getppid(), 9)
        os.kill(-1, 9)
        os.killpg({os.getpgrp()}, 9)
        signal.pidfd_send_signal(os.pidfd_open({me}), 9)
        fcntl.fcntl(1, fcntl.F_SETOWN, {me})
        os.setpriority(os.PRIO_PROCESS, {me}, 19)
        os.sched_setaffinity({me}, {{0}})
        resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))
        resource.prlimit({me}, resource.RLIMIT_CPU, (1000, 1000))
        os.memfd_create("x")
        called("ptrace", 101 if x86 else 117, 16, {me}, 0, 0)
        called("io_uring_setup", 425, 8, bytes(120))
        called("shmget", 29 if x86 else 194, 0, 4096, 0o1666)
        called("keyctl", 250 if x86 else 219, 0, -3, 0)
        called("unshare", 272 if x86 else 97, 0x10000000)
        os.setuid(12345)
        os.open("/dev/tty", os.O_RDWR)
    """
    head = (
        "import ctypes, fcntl, os, platform, resource, signal, socket, subprocess, threading\n"
        "x86 = platform.machine() == 'x86_64'\n"
        "def called(name, *args):\n    if ctypes.CDLL(None, use_errno=True).syscall(*args) < 0:\n"
        "        raise OSError(ctypes.get_errno(), name)\n"
    )
    body = tried(attacks)
    outcome = run_program(f"{head}{body}threading.Thread(target=print, args=['thread']).start()", "", LIMITS)
    assert outcome.is_well and outcome.output.split() == ["thread"], outcome


def test_what_takes_too_much_is_ended_and_leaves_nothing_behind() -> None:
    short = Limits(seconds=1.0, memory_mb=256)
    begun, before = time.monotonic(), psutil.Process().children(recursive=True)
    assert denied("while True: pass", short).ended == "time"
    assert denied("import time; time.sleep(60)", short).ended == "time"
    assert "MemoryError" in denied("x = bytearray(100 * 2**30)", short).errors
    assert denied("while True: print('x' * 2**16)").ended == "output"
    full = denied("f = open('big', 'wb')\nwhile True: f.write(bytes(2**20)); f.flush()")
    assert full.status != 0 and full.ended == "itself"
    assert denied("for n in range(10**6): open(str(n), 'w').close()").ended == "files"
    threads = "import threading, time\nthreading.stack_size(32768)\n"
    threads += (
        "for _ in range(5000): threading.Thread(target=time.sleep, args=[60], daemon=True).start()\ntime.sleep(60)"
    )
    assert denied(threads).ended == "threads"
    assert denied("import os\nwhile True: os.fork()").status == 1
    quiet = run_program("import os, threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()", "", short)
    assert quiet.ended == "time"
    assert time.monotonic() - begun < 60  # of sleeps of 60 s each
    assert [one for one in psutil.Process().children(recursive=True) if one not in before] == []


ADD = "def add(a, b):\n    return a + b\n"
WRONG = "def add(a, b):\n    return 0\n"
TESTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]
FORGED = {
    "leaves before the tests": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "leaves when called": "def add(a, b):\n    import os; os._exit(0)",
    "raises what tests may catch": "def add(a, b):\n    raise SystemExit(0)",
    "writes a verdict": WRONG + "import os\nfor fd in range(3, 64):\n    try: os.write(fd, "
    'b\'{"passed": 2, "of": 2, "reason": ""}\\n\')\n    except OSError: pass',
    "prints one": WRONG + "print('OK', '2 passed')",
    "is equal to all": "class Any:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "def add(a, b): return Any()",
    "a number that is equal to all": "class Any(int):\n    def __eq__(self, other): return True\n"
    "    __hash__ = int.__hash__\ndef add(a, b): return Any(0)",
    "patches builtins": WRONG + "import builtins\nbuiltins.AssertionError = ValueError\n"
    "builtins.compile = builtins.exec = lambda *a, **k: None",
    "takes the names of the tests": WRONG + "def abs(x): return 0\ndef isinstance(*a): return True\n",
    "reads the tests": "import gc, sys\ndef add(a, b):\n"
    "    wanted = [o for o in gc.get_objects() if isinstance(o, str) and 'assert add' in o]\n    return len(wanted)",
    "answers for the tests": WRONG + "import os, json\nfor fd in range(3, 64):\n    try:\n"
    '        for _ in range(9): os.write(fd, b\'{"value": 3, "changed": []}\\n\')\n    except OSError: pass',
    "sends a bomb": WRONG + "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[' * 60000 + b'\\n')\n"
    "    except OSError: pass",
    "hangs": "def add(a, b):\n    while True: pass",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_wrong_answer_cannot_talk_its_way_to_a_score(name: str) -> None:
    verdict = run_tests(FORGED[name], TESTS, Limits(2.0, 512))
    assert verdict.passed < 2 and verdict.reason, verdict
    helper = "def check(f):\n    assert abs(f(1, 2) - 3) < 1e-6\n    assert isinstance(f(1, 2), int)\ncheck(add)"
    if name == "takes the names of the tests":
        assert run_tests(FORGED[name], [helper], LIMITS).passed == 0
        assert run_tests(ADD, [helper], LIMITS).passed == 1


def test_what_right_answers_give_comes_back_as_python_has_it() -> None:
    source = """
from collections import Counter, deque, namedtuple
class Node:
    def __init__(self, value): self.value, self.next = value, None
    def double(self): return 2 * self.value
def length(node):
    n = 0
    while node is not None: n, node = n + 1, node.next
    return n
def same(x): return x
def reverse(xs): xs.reverse()
def raises(): raise KeyError('gone')
def squares(): return (n * n for n in range(4))
Point = namedtuple('Point', 'x y')
def point(): return Point(1, 2)
def counted(text): return Counter(text)
LIMIT = 7
"""
    tests = [
        "for x in [None, True, 1.5, float('inf'), 10**5000, 'a\\n\\ud800', (1, [2, {'k': (3,)}]), {1, 2},"
        " frozenset({3}), b'x', 2 + 1j, {(1, 2): 'v', 3: None}, []]:\n"
        "    assert same(x) == x and type(same(x)) is type(x), x",
        "import math\nassert math.isnan(same(float('nan')))",
        "xs = [1, 2, 3]\nassert reverse(xs) is None and xs == [3, 2, 1]",
        "try: raises()\nexcept KeyError as error: assert 'gone' in str(error)\nelse: assert False",
        "assert list(squares()) == [0, 1, 4, 9] and point() == (1, 2) and counted('aab') == {'a': 2, 'b': 1}",
        "a, b = Node(1), Node(2)\na.next = b\nassert length(a) == 2 and b.double() == 4 and a.value == 1",
        "assert LIMIT == 7",
    ]
    verdict = run_tests(source, tests, LIMITS)
    assert verdict.passed == len(tests), verdict
    assert run_tests(source, [f"{test}\nassert False" for test in tests], LIMITS).passed == 0


LIVE = {"public_test_cases": json.dumps([{"input": "[1, 5]\n2", "output": "12", "testtype": "functional"}]),
        "metadata": json.dumps({"func_name": "f"})}  # fmt: skip
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "MBPP": (
        {"test_list": TESTS, "test_setup_code": "import math"},
        f"Here it is:\n```python\n{ADD}```",
        f"```python\n{WRONG}```",
    ),
    "HumanEval, whole": (
        {"prompt": "from typing import List\ndef two(): return 2\n\ndef g(x: List[int]) -> int:\n    '''Twice.'''\n",
         "entry_point": "g", "test": "def check(candidate):\n    assert candidate([3]) == 6\n"},
        "```python\ndef g(x: List[int]) -> int:\n    return two() * x[0]\n```",
        "```python\ndef g(x: List[int]) -> int:\n    return x[0]\n```",
    ),
    "HumanEval, gone on": (
        {"prompt": "def g(x):\n    '''Twice.'''\n", "entry_point": "g",
         "test": "def check(candidate):\n    assert candidate(3) == 6\n"},
        "    return 2 * x\n",
        "    return x\n",
    ),
    "LiveCodeBench, a method": (
        LIVE,
        "<think>```python\nx\n```</think>\n```python\nclass Solution:\n    def f(self, a: List[int], n) -> int:\n"
        "        return n * sum(a)\n```",
        "```python\nclass Solution:\n    def f(self, a, n): return 13\n```",
    ),
    "APPS, input and output": (
        {"input_output": json.dumps({"inputs": ["2\n3\n", ["5", "6"]], "outputs": ["5.0\n", ["11"]]})},
        "```python\nprint(int(input()) + int(input()))\n```",
        "```python\nprint(5)\n```",
    ),
    "APPS, a function": (
        {"input_output": {"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}}, ADD, WRONG,
    ),
    "Skywork, assertions as JSON": ({"answer": json.dumps(TESTS)}, ADD, WRONG),
}  # fmt: skip


def packed(cases: list[dict[str, str]]) -> str:
    """As LiveCodeBench has them."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


def test_tests_are_read_from_the_columns_of_the_field() -> None:
    verifier = load_verifier("code", None, ALLOWED)
    assert verifier is not None
    programs = [{"input": "4\n", "output": "8\n", "testtype": "stdin"}, {"input": "5", "output": "10"}]
    ROWS["LiveCodeBench, hidden"] = (
        {"public_test_cases": "[]", "private_test_cases": packed(programs)},
        "```py\nprint(2 * int(input()))\n```",
        "```py\nprint(8)\n```",
    )
    for name, (row, right, wrong) in ROWS.items():
        assert verifier(right, row) == 1.0, name
        assert verifier(wrong, row) == 0.0, name
        assert verifier("", row) == 0.0, name
    half = load_verifier("code", None, {**ALLOWED, "partial": True})
    assert half is not None
    assert half("```py\nprint(8)\n```", ROWS["LiveCodeBench, hidden"][0]) == 0.5
    assert half("def add(a, b): return 3", {"test_list": TESTS}) == 0.5


def test_rows_without_tests_and_pickles_that_would_run_something_are_refused() -> None:
    evil = base64.b64encode(zlib.compress(pickle.dumps(os.getcwd))).decode()
    for row, words in (
        ({"prompt": "x", "answer": None}, "finds no tests.*test_list.*columns"),
        ({"private_test_cases": evil}, "cannot be read.*posix.getcwd.*text alone"),
        ({"answer": "[1, 2"}, "cannot be read"),
        ({"answer": '{"inputs": ["1"], "outputs": []}'}, "cannot be read"),
    ):
        with pytest.raises(DataError, match=words):
            read_tests(row)


def test_outputs_are_compared_line_by_line_and_numbers_by_value() -> None:
    assert same_output("1 2 \n3\n\n", "1 2\n3") and same_output("0.5000000000001", "0.5") and same_output("", "\n")
    assert not same_output("1\n2", "1 2") and not same_output("1.0", "1") and not same_output("nan", "0.5")
    assert source_in("no code", read_tests({"test_list": TESTS})) == "no code"


def test_code_is_run_only_where_it_is_asked_for_and_can_be_locked_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="allow_code_execution: true in verifier_options"):
        check_verifier("code")
    with pytest.raises(ConfigError, match=r"isolation.*'half'.*full.*limits"):
        load_verifier("code", None, {**ALLOWED, "isolation": "half"})
    with pytest.raises(ConfigError, match=r"verifier_options.*'math' is a function"):
        check_verifier("math", ALLOWED)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "Add.", "test_list": TESTS}) + "\n")
    asked = ["eval", "tiny:dag/student", "--dataset-name", str(rows), "--verifier", "code"]
    assert main(asked) == 2
    assert "--verifier-options '{allow_code_execution: true}'" in capsys.readouterr().err.replace("\n", " ")
    monkeypatch.setattr(sandbox, "locks_here", lambda: {"files": "the kernel has no Landlock"})
    with pytest.raises(ConfigError, match=r"not held, the kernel has no Landlock.*isolation: limits"):
        load_verifier("code", None, ALLOWED)
    loose = load_verifier("code", None, {**ALLOWED, "isolation": "limits"})
    assert loose is not None and "NOT HELD: no file outside" in loose.described  # type: ignore[attr-defined]


def test_a_lock_that_does_not_close_ends_the_process_before_the_answer_runs() -> None:
    setup = {"role": "program", "source": "print('REACHED')", "folder": None, "needs": ["files"], "limits": {"X": 1},
             "readable": [], "path": [], "pipe": None}  # fmt: skip
    for needs, status in ((["limits"], sandbox.confined.LOCK_FAILED), ([], 0)):
        read, write = os.pipe()
        os.write(write, json.dumps(setup | {"needs": needs}).encode())
        os.close(write)
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(sandbox.confined.__file__), str(read)],
            pass_fds=[read], capture_output=True, text=True,
        )  # fmt: skip
        os.close(read)
        assert done.returncode == status and ("REACHED" in done.stdout) == (status == 0), done
