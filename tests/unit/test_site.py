"""The site has every page of the documentation, and all that they lead to, in Markdown that it reads."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("site_of_docs", ROOT / "docs" / "tools" / "site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_there_and_in_the_navigation(tool: Any, tmp_path: Path) -> None:
    gathered = {str(path) for path in tool.gather(tmp_path / "pages")}
    pages = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")}
    assert {*pages, "README.md", "CITATION.cff", "experiments/figure8/figure.png", "experiments/README.md"} <= gathered
    assert all((tmp_path / "pages" / path).is_file() for path in gathered)
    navigation = set(re.findall(r"[\w/-]+\.md", yaml.dump(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])))
    assert pages <= navigation <= gathered
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert pages - {f"docs/{link}" for link in re.findall(r"\]\(([\w/-]+\.md)\)", index)} == {"docs/index.md"}


def test_what_the_sites_markdown_does_not_take_is_written_otherwise(tool: Any) -> None:
    text = (
        "Found:\n- one\n  more\n- two\nText\n| a | b |\n|---|---|\n```\ncode\n- no list\n```\n[all](../experiments)\n"
    )
    assert tool._for_site(text) == (
        "Found:\n\n- one\n  more\n- two\nText\n\n| a | b |\n|---|---|\n```\ncode\n- no list\n```\n"
        "[all](../experiments/README.md)\n"
    )
