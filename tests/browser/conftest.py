"""One browser and one report for all tests of the page."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tests.report_kit as kit
from dopd.inspection.schema import read_trace
from dopd.report.page import write_report
from tests.browser_kit import DESK, opened

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no chromium or chromedriver: apt install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (*ARGUMENTS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(chromedriver))
    yield started
    started.quit()


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("runs")
    for method in ("vanilla", "dopd"):
        for seed in (0, 1):
            kit.run_folder(folder / f"{method}-seed{seed}", method, seed)
    boxes = [{"image": 0, "label": kit.EVIL, "xyxy": [0.25, 0.5, 0.75, 1.0]}]
    for run in ("dopd-seed1", "vanilla-seed1"):  # the first has lost its picture
        path = folder / run / "trace.jsonl"
        seen = kit.record(9, 0, method=run[:-6], prompt="what is this?", images=["seen.png"], boxes=boxes)
        kit.write_lines(path, [*read_trace(path), seen])
    Image.new("RGB", (400, 200), "navy").save(folder / "vanilla-seed1" / "seen.png")
    return write_report([folder])


@pytest.fixture
def page(driver: Any, report: Path) -> Any:
    return opened(driver, report, DESK)
