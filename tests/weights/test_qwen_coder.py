"""Qwen2.5-Coder 1.5B teaches 0.5B: the two steps on a CPU that the recipe qwen2.5-coder-1.5b-to-0.5b shows."""

import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from dopd.inspection.schema import read_json_lines
from dopd.runs import load_settings
from dopd.runs.recipes import recipe_path
from dopd.runs.train import train

pytestmark = pytest.mark.weights
RECIPE = recipe_path("qwen2.5-coder-1.5b-to-0.5b")


def cpu_flags() -> list[str]:
    """Flags of the recipe's second command."""
    comments = [line[1:].strip() for line in RECIPE.read_text().splitlines() if line.startswith("#")]
    found = re.findall(rf"dopd train {re.escape(RECIPE.stem)}(.*)", "\n".join(comments).replace("\\\n", " "))
    return shlex.split(found[1])


def test_two_steps_on_a_cpu(weights: Callable[[str], str], tmp_path: Path) -> None:
    settings = load_settings(
        RECIPE,
        cpu_flags(),
        model_name_or_path=weights("qwen05"),
        teacher_model_name_or_path=weights("qwen15"),
        output_dir=str(tmp_path / "run"),
    )
    folder = train(settings)
    steps = [record for record in read_json_lines(folder / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    for record in steps:
        assert math.isfinite(record["loss"]) and record["loss"] > 0 and record["grad_norm"] > 0
        assert sum(record[f"share/{regime}"] for regime in ("LH", "LL", "HT", "HS")) == pytest.approx(1.0, abs=1e-4)
        assert record["privileged/missing_ratio"] == 0
    assert (folder / "adapter_model.safetensors").is_file()
