"""What a student can do without privileged information: accuracies with intervals, lengths, entropy, divergence."""

from dopd.evaluation.results import EvaluationResult
from dopd.evaluation.student import StudentEvaluator
from dopd.statistics import Interval, mean_interval, wilson_interval

__all__ = ["EvaluationResult", "Interval", "StudentEvaluator", "mean_interval", "wilson_interval"]
