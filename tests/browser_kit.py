"""Looking at a page in a headless browser, for tests."""

from pathlib import Path
from typing import Any

PHONE, PHONE_390, DESK = (360, 740), (390, 844), (1280, 900)


def opened(driver: Any, report: Path, size: tuple[int, int], scheme: str = "light") -> Any:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(report.as_uri())
    return driver


def show_first(page: Any) -> list[Any]:
    page.execute_script("choose({run: 0, step: 0}); choose({rollout: 0})")
    return find(page, "#panes .tok")


def find(page: Any, selector: str) -> list[Any]:
    return page.find_elements("css selector", selector)


def text(page: Any, selector: str) -> str:
    return page.find_element("css selector", selector).text
