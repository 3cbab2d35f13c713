"""Takes the pictures of the report that the documentation shows, from runs, in a headless browser.

    python docs/tools/screenshots.py            # make screenshots: two short runs of the recipe tiny-dag
    python docs/tools/screenshots.py RUN ...    # of runs that are there

Needs the system's chromium and chromedriver, and selenium.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from dopd.report.page import write_report

IMAGES = Path(__file__).resolve().parents[1] / "images"
METHODS = ("vanilla", "dopd")
TRAINING = {"max_steps": 40, "student_eval_steps": 10, "trace_steps": 10, "train_prompts": 1024, "learning_rate": 1e-3}
ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
DESK, PHONE = (1100, 1000), (390, 844)
_COLOURS = 256  # of a picture: enough for text and curves, in a third of the bytes


def train(folder: Path) -> list[Path]:
    """Short runs to take pictures of, one for each of `METHODS`."""
    runs = [folder / method for method in METHODS]
    for run in runs:
        command = [sys.executable, "-m", "dopd.cli.main", "train", "tiny-dag", "--method", run.name]
        flags = [f"--{key}={value}" for key, value in TRAINING.items()]
        subprocess.run([*command, f"--output_dir={run}", *flags], check=True)
    return runs


@contextmanager
def browser() -> Iterator[Any]:
    """A headless browser that is closed again."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as profile:
        for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        try:
            yield driver
        finally:
            driver.quit()


def take(report: Path, folder: Path) -> None:
    """`report.png` (the top of the page), `tokens.png` (an answer with a token's card) and `phone.png`."""
    with browser() as page:
        _open(page, report, DESK)
        _save(page, folder / "report.png")
        page.execute_script("document.getElementById('microscope').scrollIntoView()")
        # A token that the teacher knows better says most.
        page.execute_script(
            "const first = (selector) => document.querySelector('#panes .tok' + selector);"
            "(first('.HT') || first('')).focus({preventScroll: true})"
        )
        _save(page, folder / "tokens.png")
        _open(page, report, PHONE)
        _save(page, folder / "phone.png")


def _open(page: Any, report: Path, size: tuple[int, int]) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    light = [{"name": "prefers-color-scheme", "value": "light"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": light})
    page.get(report.absolute().as_uri())


def _save(page: Any, path: Path) -> None:
    page.save_screenshot(str(path))
    with Image.open(path) as picture:
        fewer = with_fewer_colours(picture)
    fewer.save(path, optimize=True)


def with_fewer_colours(picture: Image.Image) -> Image.Image:
    """The picture with a palette in which rare colours, such as those of single curves, are near their own."""
    return picture.convert("RGB").quantize(_COLOURS, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


def main(given: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        runs = [Path(run) for run in given] or train(Path(temporary))
        take(write_report(runs, Path(temporary) / "report.html"), IMAGES)


if __name__ == "__main__":
    main(sys.argv[1:])
