"""The generated pages of the reference say what the code says now."""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl

from dopd.runs.settings import all_settings, load_settings
from dopd.settings.foreign import FOREIGN

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "reference"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "tools" / "reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's about its experimental configurations
        spec.loader.exec_module(module)
    return module


def of_these_versions(page: str) -> bool:
    return f"Of transformers {transformers.__version__} and TRL {trl.__version__}." in page


@pytest.mark.parametrize("name", ["keys.md", "names.md", "commands.md", "python.md"])
def test_generated_pages_are_fresh(name: str, tool: Any) -> None:
    page, made = (FOLDER / name).read_text(encoding="utf-8"), tool.PAGES[name]()
    if name == "keys.md" and not of_these_versions(page):  # texts of transformers' keys differ between its versions
        page, made = (one.partition("## TRL")[0].partition("## dopd")[2] for one in (page, made))
    assert page == made, f"docs/reference/{name} is not what the code says: run `make docs-reference` and commit it"


def test_every_key_has_a_line_with_type_default_and_library() -> None:
    page = (FOLDER / "keys.md").read_text(encoding="utf-8")
    rows = {row[1]: row for row in re.finditer(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.*?) \|$", page, re.M)}
    if of_these_versions(page):
        assert set(rows) == set(all_settings())
    kind, default, about = rows["num_generations"].groups()[1:]
    assert (kind, default) == ("int of at least 1", "`4`") and about.startswith("Rollouts per prompt.")
    assert rows["learning_rate"][3] == "`5e-06` (TRL: `1e-06`)"
    sections = {name: page.index(f"\n## {name}\n") for name in ("dopd", "TRL", "transformers")}
    assert sections["dopd"] < page.index("| `method` |") < sections["TRL"] < page.index("| `lora_r` |")
    assert sections["transformers"] < page.index("| `seed` |")


@pytest.mark.parametrize("name", ["batch_size", "lmbda", "max_new_tokens", "teacher_update_rate"])
def test_errors_and_the_page_of_names_agree(name: str) -> None:
    page = (FOLDER / "names.md").read_text(encoding="utf-8")
    with pytest.raises(Exception, match=re.escape(f"unknown key '{name}': {FOREIGN[name]}")):
        load_settings(None, output_dir="x", model_name_or_path="x", dataset_name="x", **{name: 1})
    (row,) = re.findall(rf"^\| `{name}` \|.*\|$", page, re.M)
    assert row.endswith(f"| {FOREIGN[name]} |")


def test_every_command_and_public_name_has_a_heading() -> None:
    import dopd

    commands = (FOLDER / "commands.md").read_text(encoding="utf-8")
    names = {"train", "eval", "tasks", "methods", "config", "quickstart", "doctor", "report", "inspect", "experiment"}
    assert names <= set(re.findall(r"^## dopd (\w+)$", commands, re.M))
    assert set(dopd.__all__) <= set(re.findall(r"^## (\w+)$", (FOLDER / "python.md").read_text(encoding="utf-8"), re.M))
