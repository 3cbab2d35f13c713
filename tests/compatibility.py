"""The table in docs/reference/compatibility.md: what was tried, said by the tests that tried it.

A test calls `tried(area, what, outcome)` once its asserts have passed. The page must then have that very row, so a row
cannot stand there that no test reaches, and no test can add one without it being read. After a change:

    DOPD_WRITE_COMPATIBILITY=1 pytest -m "not slow and not weights and not gpu and not browser"
"""

import os
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "compatibility.md"
# What rows are about, in the order of the page.
AREAS = ("text family", "image family", "prompt", "dataset", "adapter", "checkpoint", "setting")
_WRITE = "DOPD_WRITE_COMPATIBILITY"
_START = "<!-- rows made by tests -->"


def tried(area: str, what: str, outcome: str) -> None:
    """Say on the page (or check that it is said) what a passed test has seen.

    Args:
        area (`str`): one of `AREAS`.
        what (`str`): the family, adapter, dataset shape or setting.
        outcome (`str`): `"exact"`, `"refused: ..."`, `"used"` and the like; without numbers that differ between
            machines.
    """
    assert area in AREAS, f"area (={area!r}) must be one of {', '.join(AREAS)}"
    row = f"| {area} | {what} | {outcome} |"
    head, _, table = PAGE.read_text(encoding="utf-8").partition(_START)
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| what it is")]
    if row in rows:
        return
    if not os.environ.get(_WRITE):
        raise AssertionError(
            f"docs/reference/compatibility.md lacks the row {row!r}: set {_WRITE}=1 and run the test once"
        )
    same = f"| {area} | {what} |"
    rows = [row, *(line for line in rows if not line.startswith(same))]
    rows.sort(key=lambda line: (AREAS.index(line.split(" | ")[0].removeprefix("| ")), line.lower()))
    body = "\n".join(["| what it is | tried | outcome |", "|---|---|---|", *rows])
    PAGE.write_text(f"{head}{_START}\n\n{body}\n", encoding="utf-8")
