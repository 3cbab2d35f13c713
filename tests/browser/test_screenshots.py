"""The pictures in the documentation are taken from a report as it is."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tests.report_kit as kit
from dopd.report.page import write_report
from dopd.report.palette import METHOD_COLOURS

pytestmark = pytest.mark.browser
pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
    pytest.skip("no chromium or chromedriver: apt install chromium chromium-driver", allow_module_level=True)

TOOL = Path(__file__).resolve().parents[2] / "docs" / "tools" / "screenshots.py"


def load_tool() -> Any:
    spec = importlib.util.spec_from_file_location("screenshots", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_rare_colours_stay_what_they_mean() -> None:
    """A line of two pixels in a picture of a thousand shades."""
    ramp = np.linspace(0, 255, 1000)
    shades = np.stack([ramp, ramp[::-1], np.full(1000, 128.0)], axis=-1)
    pixels = np.repeat(shades[None], 400, axis=0).astype(np.uint8)
    colours = [int(colour[place : place + 2], 16) for colour in METHOD_COLOURS for place in (1, 3, 5)]
    pixels[0, : 2 * len(METHOD_COLOURS)] = np.repeat(np.array(colours, np.uint8).reshape(-1, 3), 2, axis=0)
    fewer = np.asarray(load_tool().with_fewer_colours(Image.fromarray(pixels)).convert("RGB")).astype(int)
    assert np.abs(fewer - pixels)[0, : 2 * len(METHOD_COLOURS)].max() <= 8


def test_pictures_show_the_page_a_card_and_a_phone(tmp_path: Path) -> None:
    tool = load_tool()
    for method in ("vanilla", "dopd"):
        kit.run_folder(tmp_path / "runs" / method, method, 0)
    tool.take(write_report([tmp_path / "runs"]), tmp_path)
    sizes = {"report": (1100, 1000), "tokens": (1100, 1000), "phone": (390, 844)}
    for name, size in sizes.items():
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == size
            assert len(picture.convert("RGB").getcolors(2**24)) > 20, f"{name} is blank"
    committed = {path.stem for path in (TOOL.parents[1] / "images").glob("*.png")}
    assert set(sizes) <= committed


def test_every_picture_of_the_documentation_is_shown_somewhere() -> None:
    docs = TOOL.parents[1]
    text = "".join(path.read_text(encoding="utf-8") for path in [docs.parent / "README.md", *docs.rglob("*.md")])
    assert [path.name for path in (docs / "images").iterdir() if f"images/{path.name}" not in text] == []
