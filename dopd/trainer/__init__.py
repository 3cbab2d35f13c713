"""`DOPDTrainer`: TRL's `DistillationTrainer` with four views of a completion, a routing table and a routed loss."""

from dopd.trainer.config import DOPDConfig
from dopd.trainer.trainer import DOPDTrainer

__all__ = ["DOPDConfig", "DOPDTrainer"]
