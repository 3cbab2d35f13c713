"""One training step as plain data: rollouts -> views -> scores -> assignment -> loss.

The one path of training, evaluation, inspection and traces. Read in this order: `step` (the path), `prompts` (rows to
views), `engine` (answers), `rewards` (what they are worth), `scorer` (what models say of them), `batch` (their data).
"""

from dopd.step.batch import Rollouts, ScoredBatch, SourceScores
from dopd.step.engine import Engine, EngineSetup, Request, TransformersEngine
from dopd.step.prompts import PromptEncoder
from dopd.step.scorer import FixedModels, LocalScorer, Models, Scorer
from dopd.step.step import Moment, Step

__all__ = [
    "Engine",
    "EngineSetup",
    "FixedModels",
    "LocalScorer",
    "Models",
    "Moment",
    "PromptEncoder",
    "Request",
    "Rollouts",
    "ScoredBatch",
    "Scorer",
    "SourceScores",
    "Step",
    "TransformersEngine",
]
