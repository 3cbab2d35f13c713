"""What only a checkout of the repository has beside dopd: the package `lab`, with the experiments, and the recipes and
the pre-training of the tiny models. An installed wheel does without.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).parents[1]


def lab_module(name: str) -> ModuleType | None:
    """The module `lab.<name>` of the checkout that dopd is used from, or `None` where it is no checkout."""
    if not (_ROOT / "lab" / "catalogue.py").is_file():
        return None
    if str(_ROOT) not in sys.path:  # an editable installation finds dopd alone
        sys.path.insert(0, str(_ROOT))
    return importlib.import_module(f"lab.{name}")
