"""Two gloo processes with images are one run, though one of them meets no image and never uses its vision tower."""

from pathlib import Path
from typing import Any

import launcher
import pytest
import torch
import vision_worker


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launcher.run("vision_worker.py", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3"])
def test_rank_count_changes_neither_loss_nor_update_with_images(two: dict[str, Any], name: str, tmp_path: Path) -> None:
    single, result = vision_worker.one_step(tmp_path, name, 8), two[name]
    assert (single["with_images"], result["by_rank"]) == ([4], [[4], [0]])
    largest = max(float(value.abs().max()) for value in single["update"].values())
    for key, value in single["update"].items():
        assert float((result["update"][key] - value).abs().max()) < 1e-4 * largest, key
    assert any("vis" in key and float(value.abs().max()) > 0 for key, value in result["update"].items())
    for key in ("loss", "threshold/gap", "share/LH", "entropy", "num_sequences"):
        assert result["record"][key] == pytest.approx(single["record"][key], rel=1e-4, abs=1e-6), key
    assert torch.isfinite(torch.tensor(result["record"]["loss"]))
