"""The shape of the package: who may import whom, how long files get, what must not be in the repository."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE, LAB = ROOT / "dopd", ROOT / "lab"

# Each layer imports from those above it only; names on one line do not import one another.
LAYERS = [
    ["errors", "statistics", "secrets", "remote_code", "watchdog", "checkout", "random_states", "launched", "wording"],
    ["interrupts", "ranks"],
    ["guests"],
    ["shown", "registry", "files", "examples"],
    ["progress"],
    ["settings"],
    ["vision", "lengths"],
    ["routing", "sources", "kinds", "vocabulary"],
    ["divergences"],
    ["signals"],
    ["rules"],
    ["tables"],
    ["quantized", "names", "layers"],
    ["adapters"],
    ["bases"],
    ["weights"],
    ["assignment", "methods", "heads"],
    ["loss"],
    ["fused"],
    ["tasks", "scoring"],
    ["data", "prefix", "sampling", "rollout_settings"],
    ["generation"],
    ["step"],  # one path of training, evaluation, inspection and traces
    ["servers"],
    ["tiny"],
    ["checkpoints"],
    ["evaluation"],  # the trainer evaluates while it trains; evaluation does not know the trainer
    ["inspection"],
    ["report"],  # the trainer writes its report; reports know no trainer
    ["hints"],  # pages of hints look like reports
    ["verifiers"],  # judges are asked as those of hints are
    ["trainer"],
    ["runs"],  # from a configuration to a run folder
    ["cli"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
WITHOUT_TORCH = {"errors", "tasks", "report", "wording"}
TENSOR_LIBRARIES = {"torch", "transformers", "trl", "accelerate", "peft"}
ONLY_IN = {"triton": "fused", "vllm": "runs"}
MAX_FILE, MAX_FUNCTION = 500, 80
# Participles that say that something happened to a value, and not what it is; and words that only we would know.
VAGUE = {"told", "said", "known", "made", "given", "Sweep", "slope", "wide", "_as"}


def modules(package: Path) -> Iterator[tuple[str, Path, ast.Module]]:
    """(layer, path, tree) of every module but the package's own `__init__`, which only names its parts."""
    for path in sorted(package.rglob("*.py")):
        layer = path.relative_to(package).parts[0].removesuffix(".py")
        if layer != "__init__":
            yield layer, path, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, at its top or inside a function; not those for type checkers alone."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            if node.module == "dopd":
                yield from (f"dopd.{alias.name}" for alias in node.names)


def import_violations(package: Path) -> list[str]:
    found = []
    for layer, path, tree in modules(package):
        where = path.relative_to(package.parent)
        if layer not in LEVEL:
            found.append(f"{where}: dopd.{layer} has no layer; place it in LAYERS")
            continue
        for name in imported(tree):
            top, _, rest = name.partition(".")
            if name.startswith("."):
                found.append(f"{where}: relative import {name}")
            elif top in ("tests", "benchmarks", "lab"):
                found.append(f"{where}: imports {name}")
            elif top in ONLY_IN and layer != ONLY_IN[top]:
                found.append(f"{where}: only dopd.{ONLY_IN[top]} imports {top}")
            elif layer in WITHOUT_TORCH and top in TENSOR_LIBRARIES:
                found.append(f"{where}: dopd.{layer} must not import {top}")
            elif top == "dopd" and rest:
                other = rest.split(".")[0]
                if other != layer and LEVEL.get(other, LEVEL[layer]) >= LEVEL[layer]:
                    found.append(f"{where}: dopd.{layer} must not import dopd.{other}")
    return found


def size_violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        where, num_lines = path.relative_to(package.parent), len(text.splitlines())
        if num_lines > MAX_FILE:
            found.append(f"{where}: {num_lines} lines, at most {MAX_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    found.append(f"{where}: {node.name} has {length} lines, at most {MAX_FUNCTION}")
    return found


def names_defined(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of all that a module gives a name to: variables, arguments, attributes, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias):
            yield 0, node.asname or node.name
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs) and node.name:
            yield node.lineno, node.name


def vague_names(package: Path) -> list[str]:
    return [
        f"{path.relative_to(package.parent)}:{line}: {name!r} does not say what it holds"
        for path in sorted(package.rglob("*.py"))
        for line, name in names_defined(ast.parse(path.read_text(encoding="utf-8")))
        if name in VAGUE or name.lstrip("_") in VAGUE
    ]


def tracked_text_files() -> Iterator[tuple[str, str]]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a picture or an archive


def test_each_layer_imports_only_from_those_above_it() -> None:
    assert import_violations(PACKAGE) == []


def test_the_lab_imports_dopd_and_dopd_finds_the_lab_in_one_place() -> None:
    names = {name.split(".")[0] for _, _, tree in modules(LAB) for name in imported(tree)}
    assert "dopd" in names and not names & {"", "tests", "benchmarks"}
    users = [path.relative_to(PACKAGE).as_posix() for _, path, tree in modules(PACKAGE)
             if "dopd.checkout" in imported(tree)]  # fmt: skip
    assert users == ["cli/main.py", "tiny/shipped.py"]
    code = (
        "import sys; from dopd.cli import main; import dopd.tiny, dopd.trainer, dopd.runs.train; main.build_parser(); "
        "print([name for name in sys.modules if name.split('.')[0] == 'lab'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [PACKAGE, LAB], ids=["dopd", "lab"])
def test_files_and_functions_stay_short(package: Path) -> None:
    assert size_violations(package) == []


@pytest.mark.parametrize(
    "package", [PACKAGE, LAB, ROOT / "benchmarks", ROOT / "experiments"], ids=lambda path: path.name
)
def test_names_say_what_they_hold(package: Path) -> None:
    assert vague_names(package) == []


@pytest.mark.parametrize("package", [PACKAGE, LAB], ids=["dopd", "lab"])
def test_source_is_ascii(package: Path) -> None:
    assert [str(path) for path in package.rglob("*.py") if not path.read_text(encoding="utf-8").isascii()] == []


def test_no_absolute_path_of_one_machine_is_tracked() -> None:
    places = re.compile("|".join(f"(?<![\\w.~])/{folder}/\\w" for folder in ("work", "home", "root", "Users", "mnt")))
    lines = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in tracked_text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if places.search(line)
    ]
    assert lines == []


@pytest.mark.parametrize(
    ("module", "text", "words"),
    [
        ("routing.py", "from dopd.loss import routed_loss", "dopd.routing must not import dopd.loss"),
        ("routing.py", "def f():\n    import dopd.rules", "dopd.routing must not import dopd.rules"),
        ("heads.py", "from dopd import methods", "dopd.heads must not import dopd.methods"),
        ("loss.py", "from .rules import Rule", "relative import"),
        ("tasks/dag.py", "import torch", "dopd.tasks must not import torch"),
        ("report/html.py", "from transformers import AutoTokenizer", "dopd.report must not import transformers"),
        ("loss.py", "import triton", "only dopd.fused imports triton"),
        ("cli/main.py", "from tests.independent import kl", "imports tests"),
        ("runs/train.py", "def f():\n    from lab.catalogue import EXPERIMENTS", "imports lab"),
        ("novelty.py", "", "has no layer"),
    ],
)
def test_planted_import_is_caught(tmp_path: Path, module: str, text: str, words: str) -> None:
    path = tmp_path / "dopd" / module
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (found,) = import_violations(tmp_path / "dopd")
    assert words in found


def test_planted_clean_modules_and_long_ones(tmp_path: Path) -> None:
    package = tmp_path / "dopd"
    package.mkdir()
    (package / "loss.py").write_text("from dopd.rules import Rule\nimport math\n")
    (package / "tiny.py").write_text("if TYPE_CHECKING:\n    from dopd.cli import main\n")
    assert import_violations(package) == [] and size_violations(package) == []
    (package / "long.py").write_text("def f():\n" + "    pass\n" * MAX_FILE)
    assert len(size_violations(package)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "made = 1",
        "for given in ():\n    pass",
        "def f(*, known): ...",
        "def told(): ...",
        "class Sweep: ...",
        "import numpy as wide",
        "from math import exp as _as",
        "self.said = 1",
        "class A:\n    _slope: int = 1",
        "with open('x') as made: ...",
        "(given := 1)",
        "x = lambda known: 1",
        "try: ...\nexcept OSError as told: ...",
    ],
)
def test_planted_vague_names_are_caught(tmp_path: Path, text: str) -> None:
    (tmp_path / "loss.py").write_text(f"{text}\nnum_given = known_words = call(made=1)\n")
    assert len(vague_names(tmp_path)) == 1
