"""The names of the datasets in `dopd/layouts`, for help: nothing else is read for it."""

from pathlib import Path

FOLDER = Path(__file__).parents[1] / "layouts"


def layout_names() -> list[str]:
    """In alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
