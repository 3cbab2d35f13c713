"""One training step as plain data: rollouts -> views -> scores -> assignment -> loss.

The one path of training, evaluation, inspection and traces. Read in this order: `step` (the path), `prompts` (rows to
views), `engine` (answers), `drift` (whether they are the student's), `rewards` (what they are worth), `scorer` (what
models say of them), `batch` (their data).
"""

from dopd.step.batch import Rollouts, ScoredBatch, SourceScores
from dopd.step.drift import Drift
from dopd.step.engine import Answers, Engine, EngineSetup, Request, TransformersEngine
from dopd.step.prompts import PromptEncoder
from dopd.step.scorer import FixedModels, LocalScorer, Models, Scorer
from dopd.step.step import Moment, Step

__all__ = [
    "Answers",
    "Drift",
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
