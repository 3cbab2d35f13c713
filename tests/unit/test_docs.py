"""Documents that cannot go stale unseen: names resolve, links lead somewhere, tests that are named exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in PAGES}
DOTTED = re.compile(r"`((?:dopd|lab)(?:\.[A-Za-z_]\w*)+)[`(]")
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)\s]+)\)")
NAMED_TEST = re.compile(r"\b((?:unit|numerics|distributed|golden|e2e)/test_\w+\.py)::(test_\w+)")
VERDICTS = ("trainer", "data", "evaluation", "not applicable: ")


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute (a dataclass field included) that some module leads to."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if part in getattr(found, "__dataclass_fields__", {}):
                return part == parts[-1]
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def named_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def pitfall_rows() -> list[tuple[str, str]]:
    lines = (ROOT / "tests" / "PITFALLS.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [(row[0], row[-1]) for row in cells if row[0] not in ("mistake", "") and not set(row[0]) <= {"-", " "}]


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_dotted_name_resolves(page: str) -> None:
    names = sorted(set(DOTTED.findall(DOCUMENTS[page].read_text(encoding="utf-8"))))
    assert [name for name in names if not resolves(name)] == []


@pytest.mark.parametrize("page", DOCUMENTS)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: str) -> None:
    path = DOCUMENTS[page]
    wrong = []
    for link in LINK.findall(without_code(path.read_text(encoding="utf-8"))):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def without_code(text: str) -> str:
    """Markdown without blocks and spans of code, in which brackets are no links."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def anchors(path: Path) -> set[str]:
    """Names of a page's headings in links: lower case, without punctuation, hyphens for spaces."""
    found: list[str] = []
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for heading in re.findall(r"^#+ (.+?)\s*$", text, re.M):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        found.append(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    return {name if (n := found[:i].count(name)) == 0 else f"{name}-{n}" for i, name in enumerate(found)}


def test_a_link_to_a_heading_that_is_not_there_would_be_caught(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# What `top_k` is: a limit\n## Twice\n## Twice\n```\n# no heading\n```\n", encoding="utf-8")
    assert anchors(page) == {"what-top_k-is-a-limit", "twice", "twice-1"}
    assert LINK.findall(without_code("[a](b.md#c) `[d](e)` [f](https://g) [h](#i)")) == ["b.md#c", "#i"]


def test_name_that_does_not_exist_would_be_caught() -> None:
    assert resolves("dopd.routing.gap_thresholds") and resolves("dopd.Rule.weight") and resolves("dopd.tasks")
    for name in ("dopd.routing.gap_threshold", "dopd.router", "dopd.Rule.wieght", "dopd.Rule.weight.real_"):
        assert not resolves(name), name
    assert DOTTED.findall('`dopd.route` and `dopd.table("x")` but not `import dopd` or dopd.bare') == [
        "dopd.route",
        "dopd.table",
    ]


def test_algorithm_names_every_function_of_the_core() -> None:
    """A new divergence or statistic without a line in the document is noticed here."""
    text = (ROOT / "docs" / "explanation" / "algorithm.md").read_text(encoding="utf-8")
    named = set(DOTTED.findall(text))
    core = {
        f"dopd.{module}.{name}"
        for module, names in {
            "routing": ("privilege_gap", "gap_thresholds", "classify"),
            "divergences": ("on_support", "sampled_terms", "surrogate", "divergence_function"),
            "assignment": ("assign",),
            "loss": ("rule_divergence", "product_logits", "sequence_mean", "routing_sums", "stats_of"),
        }.items()
        for name in names
    }
    divergences = importlib.import_module("dopd.divergences")
    core |= {f"dopd.divergences.{function.__name__}" for function in divergences.DIVERGENCES.values()}
    assert core - named == set()
    assert "(Eq. 1)" in text and "(Eq. 11)" in text and "DEPARTURE" in text


def test_every_test_named_in_the_pitfalls_exists() -> None:
    named = {match for _, verdict in pitfall_rows() for match in NAMED_TEST.findall(verdict)}
    assert len(named) > 20
    existing = {
        file: named_in(ROOT / "tests" / file) if (ROOT / "tests" / file).exists() else set() for file, _ in named
    }
    assert [f"{file}::{name}" for file, name in sorted(named) if name not in existing[file]] == []


def test_every_pitfall_has_a_test_or_a_reason() -> None:
    rows = pitfall_rows()
    assert len(rows) > 30
    assert [
        mistake for mistake, verdict in rows if not (NAMED_TEST.search(verdict) or verdict.startswith(VERDICTS))
    ] == []


def test_pages_that_the_code_names_exist() -> None:
    """Messages, comments and recipes send their readers to pages of the documentation."""
    named = re.compile(r"\bdocs/[\w/-]+\.\w+")
    sources = [path for folder in ("dopd", "lab", "benchmarks") for path in (ROOT / folder).rglob("*")]
    found = {
        (str(path.relative_to(ROOT)), page)
        for path in sources
        if path.suffix in (".py", ".yaml", ".js", ".html")
        for page in named.findall(path.read_text(encoding="utf-8"))
    }
    assert len(found) > 10
    assert sorted((path, page) for path, page in found if not (ROOT / page).exists()) == []
