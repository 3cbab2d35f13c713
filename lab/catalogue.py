"""Every experiment by name. A new one is a function that returns an `Experiment`, and a line here."""

from collections.abc import Callable, Mapping

from dopd.errors import ConfigError, did_you_mean
from dopd.runs.build import TINY
from lab.ablations import figure4, figure10, robustness, table4, table6, table7, table8
from lab.comparisons import (
    further,
    table1_dag,
    table1_graph,
    table1_program,
    table3,
    tuning,
    tuning_graph,
    tuning_program,
    weak_teacher,
)
from lab.decisions import tail
from lab.over_time import figure3, figure7a, figure7b, figure8
from lab.spec import Experiment
from lab.tiny import RECIPES

_MAKERS: tuple[Callable[[], Experiment], ...] = (
    tuning,
    tuning_graph,
    tuning_program,
    figure3,
    weak_teacher,
    figure4,
    table4,
    table8,
    table6,
    table7,
    figure10,
    robustness,
    tail,
    figure8,
    table1_dag,
    table1_graph,
    table1_program,
    further,
    table3,
    figure7a,
    figure7b,
)
EXPERIMENTS: Mapping[str, Callable[[], Experiment]] = {maker.__name__: maker for maker in _MAKERS}


def get_experiment(name: str) -> Experiment:
    """The experiment called `name`.

    Raises:
        ConfigError: there is none of that name (with the closest one).
    """
    if name not in EXPERIMENTS:
        hint = did_you_mean(name, EXPERIMENTS)
        raise ConfigError(f"experiment (={name!r}) must be one of {', '.join(EXPERIMENTS)}.{hint}")
    return EXPERIMENTS[name]()


def models_without_recipe(experiment: Experiment) -> list[str]:
    """The tiny models, as TASK/ROLE, that the experiment needs and no recipe makes."""
    wanted = {
        model.removeprefix(TINY).partition("?")[0]
        for condition in experiment.conditions
        for model in condition.run.models
    }
    shipped = {f"{task}/{role}" for task, roles in RECIPES.items() for role in roles}
    return sorted(wanted - shipped)
