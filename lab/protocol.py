"""What all experiments of the tiny scale share: seeds, the grid of learning rates, and which rate each method got.

experiments/PROTOCOL.md says it in words. The rates are results of the experiments `tuning`, `tuning_graph` and
`tuning_program`; a test compares them.
"""

from collections.abc import Mapping

from lab.spec import Experiment

# The first two seeds whose tiny dag student passes the gate of PROTOCOL.md (good with p, middling without).
PRETRAINING_SEEDS = (0, 3)
RUN_SEEDS = (0, 1, 2)
TUNING_SEED = 100  # a run seed that no test uses
GRID = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)
GRIDS: Mapping[str, tuple[float, ...]] = {"graph": (1e-4, *GRID)}  # of families whose best rates lie at an end of it
TIE = 0.01  # of the mean of two accuracies on 256 problems, whose standard error is about 0.02
DEFAULT_RATE = 5e-4  # of a method that has not been tuned

# By family and method, with the strong teacher unless its role is named: method or method@role. A family that is not
# here takes dag's, and so does a student that knows several.
_DAG_RATES: Mapping[str, float] = {
    "vanilla": 1e-3,
    "dopd": 5e-4,
    "dopd_frozen": 2e-3,
    "dopd_ema": 1e-3,
    "privileged_teacher": 2e-3,
    "privileged_student": 1e-3,
    "privileged_both": 2e-4,
    "opcd": 1e-3,
    "exopd": 2e-3,
    "uni_opd": 2e-3,
    "sdft": 1e-3,
    "opsd": 2e-4,
    "sdpo": 2e-4,
    "eopd": 1e-3,
    "tip": 1e-3,
    "sft": 4e-3,
    "grpo": 1e-3,
    "vanilla_pg": 1e-3,
    "gkd": 2e-3,
    "veto": 4e-3,
    "fast_opd": 1e-3,
    "ta_opd": 1e-3,
    "reopold": 2e-3,
    "tsd_kd": 1e-3,
    "stopgrad_topk": 2e-3,
    "bridge_garden": 4e-3,
    "opsa": 2e-4,
    "cal_opd": 2e-4,
    "rlsd": 5e-4,
    "rlcsd": 5e-4,
    "sdpg": 5e-4,
    "vanilla@teacher_needs_p": 5e-4,
    "dopd@teacher_needs_p": 2e-4,
    "dopd_frozen@teacher_needs_p": 2e-3,
    "privileged_teacher@teacher_needs_p": 1e-3,
}
_GRAPH_RATES: Mapping[str, float] = {
    "vanilla": 5e-4,
    "dopd": 2e-4,
    "dopd_frozen": 5e-4,
    "dopd_ema": 2e-4,
    "privileged_teacher": 2e-4,
    "privileged_student": 2e-4,
    "privileged_both": 2e-4,
    "opcd": 2e-4,
    "exopd": 1e-3,
    "uni_opd": 2e-4,
    "sdft": 2e-4,
    "opsd": 1e-4,
    "sdpo": 1e-4,
    "eopd": 1e-4,
    "tip": 5e-4,
}
_PROGRAM_RATES: Mapping[str, float] = {
    "vanilla": 2e-3,
    "dopd": 2e-4,
    "dopd_frozen": 2e-3,
    "dopd_ema": 4e-3,
    "privileged_teacher": 4e-3,
    "privileged_student": 2e-4,
    "privileged_both": 2e-4,
    "opcd": 2e-3,
    "exopd": 2e-3,
    "uni_opd": 5e-4,
    "sdft": 4e-3,
    "opsd": 2e-4,
    "sdpo": 2e-4,
    "eopd": 5e-4,
    "tip": 1e-3,
}
TUNED_RATES: Mapping[str, Mapping[str, float]] = {"dag": _DAG_RATES, "graph": _GRAPH_RATES, "program": _PROGRAM_RATES}


def best_rate(scores: Mapping[float, float]) -> float:
    """The lowest rate whose score is less than `TIE` below the highest."""
    best = max(scores.values())
    return min(rate for rate, score in scores.items() if score > best - TIE)


def rate_name(method: str, teacher: str) -> str:
    """What `TUNED_RATES` and the tuning experiments call a method with a teacher: the strong one is not named."""
    return method if teacher == "teacher" else f"{method}@{teacher}"


def tuned_rate(method: str, teacher: str = "teacher", family: str = "dag") -> float | None:
    """The tuned rate of a method with a teacher; ablations of DOPD take DOPD's, as in the paper. None: not tuned."""
    rates = TUNED_RATES.get(family, _DAG_RATES)
    name = rate_name(method, teacher)
    if method.startswith("dopd_") and name not in rates:
        name = rate_name("dopd", teacher)
    return rates.get(name)


def untuned(experiment: Experiment) -> list[str]:
    """Conditions that train at the default rate because their method has not been tuned; tuning itself has none."""
    return [condition.label for condition in experiment.conditions if not condition.tuned]
