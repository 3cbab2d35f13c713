"""What a student can do without privileged information: accuracies with intervals, lengths, entropy, divergence."""

from dopd.evaluation.statistics import Interval, mean_interval, wilson_interval
from dopd.evaluation.student import EvaluationResult, StudentEvaluator

__all__ = ["EvaluationResult", "Interval", "StudentEvaluator", "mean_interval", "wilson_interval"]
