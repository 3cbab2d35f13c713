"""dopd: distil a large model into a small one on the small model's own answers, with privileged information.

Names are imported when they are first used, so that `import dopd` is instant and tasks or reports never load torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Regime": "dopd.routing",
    "route": "dopd.routing",
    "divergence": "dopd.divergences",
    "register_divergence": "dopd.divergences",
    "register_signal": "dopd.signals",
    "Rule": "dopd.rules",
    "RoutingTable": "dopd.tables",
    "table": "dopd.methods",
    "register_method": "dopd.methods",
    "Assignment": "dopd.assignment",
    "routed_loss": "dopd.loss",
    "Head": "dopd.heads",
    "fused_routed_loss": "dopd.fused",
    "register_task": "dopd.tasks",
    "DOPDConfig": "dopd.trainer",
    "DOPDTrainer": "dopd.trainer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dopd' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from dopd.assignment import Assignment as Assignment
    from dopd.divergences import divergence as divergence
    from dopd.fused import fused_routed_loss as fused_routed_loss
    from dopd.heads import Head as Head
    from dopd.kinds import register_divergence as register_divergence
    from dopd.loss import routed_loss as routed_loss
    from dopd.methods import register_method as register_method
    from dopd.methods import table as table
    from dopd.routing import Regime as Regime
    from dopd.routing import route as route
    from dopd.rules import Rule as Rule
    from dopd.signals import register_signal as register_signal
    from dopd.tables import RoutingTable as RoutingTable
    from dopd.tasks import register_task as register_task
    from dopd.trainer import DOPDConfig as DOPDConfig
    from dopd.trainer import DOPDTrainer as DOPDTrainer
