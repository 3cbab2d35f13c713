"""The paper's tables and figures as experiments: settings as data, many runs, one verdict by rules fixed in advance."""

from dopd.experiments.catalogue import EXPERIMENTS, get_experiment
from dopd.experiments.spec import Condition, Experiment, RunSpec

__all__ = ["EXPERIMENTS", "Condition", "Experiment", "RunSpec", "get_experiment"]
