"""What an experiment is made of: runs as plain data, conditions that repeat them over seeds, claims, an experiment."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dopd.errors import ConfigError
from lab.families import get_family

# Raise it when the meaning of a run changes (training, evaluation, budget): finished runs are then made anew.
RUN_VERSION = 2
RESULTS_FILE = "results.json"  # in the folder of an experiment
UNTRAINED = ("start", "teacher")  # conditions that only evaluate: the student before training, the plain teacher
SFT = "sft"  # supervised fine-tuning on gold solutions, no distillation
Split = Literal["test", "validation"]
# Methods whose table has become another one since the experiments were run, and the options that select the table
# which was measured then. The experiments ask for these, and their runs keep their keys.
MEASURED_TABLES: Mapping[str, Mapping[str, Any]] = {
    "sdft": {"divergence": "reverse_kl"},
    "opsd": {"divergence": "forward_kl", "clamp": 0.05},
    "cal_opd": {"skip": False},
    "rlcsd": {"drop": False, "apart": False, "siblings": "first"},
}


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """One run: everything that decides its numbers.

    Attributes:
        method (`str`): a name that `dopd methods` lists, `"sft"`, or one of `UNTRAINED`.
        options (`Mapping`): `method_options`.
        rules (`tuple`, *optional*): rows in place of a named method; `method` then only names them.
        families (`tuple[str]`): the family of each stage; one stage but for continual learning.
        student (`str`, *optional*): `TASK/ROLE` of the tiny student; the first family's `student` if left out.
        teacher (`str`): role of the tiny teacher, of each stage's family.
        privileged_kind (`str`): what p is.
        privileged_noise (`Mapping`): how p is corrupted in training (`dopd.runs.noise`).
        learning_rate (`float`): peak rate.
        steps (`int`): steps' worth of gold-length answers that each stage may see; see `token_budget`.
        pretraining_seed, run_seed (`int`): of the tiny models; of data, order and sampling.
        split (`str`): problems of the final evaluation, `"validation"` only for tuning.
        problems (`int`): how many.
        others (`tuple[str]`): further evaluations, `FAMILY:SPLIT`.
        evaluate_every (`int`, *optional*): also evaluate every so many steps.
        settings (`Mapping`): further keys of the run's configuration.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Mapping[str, Any], ...] | None = None
    families: tuple[str, ...] = ("dag",)
    student: str | None = None
    teacher: str = "teacher"
    privileged_kind: str = "hints_without_execution"
    privileged_noise: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 5e-4
    steps: int = 80
    pretraining_seed: int = 0
    run_seed: int = 0
    split: Split = "test"
    problems: int = 512
    others: tuple[str, ...] = ()
    evaluate_every: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.families:
            raise ConfigError("families: a run needs at least one stage")
        for name in (*self.families, *(other.partition(":")[0] for other in self.others)):
            get_family(name)
        if any(other.partition(":")[2] not in ("test", "ood") for other in self.others):
            raise ConfigError(f"others (={self.others!r}) must be FAMILY:test or FAMILY:ood")
        for name in ("steps", "problems"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} (={getattr(self, name)}) must be at least 1")

    @property
    def trained(self) -> bool:
        return self.method not in UNTRAINED

    @property
    def student_model(self) -> str:
        """Reference of the student that the run starts from."""
        return f"tiny:{self.student or f'{self.families[0]}/student'}?seed={self.pretraining_seed}"

    def teacher_model(self, family: str) -> str:
        """Reference of a stage's teacher."""
        return f"tiny:{family}/{self.teacher}?seed={self.pretraining_seed}"

    @property
    def models(self) -> tuple[str, ...]:
        """References of all tiny models that the run reads."""
        teachers = () if self.method in ("start", SFT) else tuple(map(self.teacher_model, self.families))
        return tuple(dict.fromkeys((self.student_model, *teachers)))

    def token_budget(self, family: str, completions: int) -> int:
        """Completion tokens after which a stage ends: `steps` steps of gold-length answers.

        All methods of an experiment see equally many of their own tokens, however long their answers get.
        """
        return self.steps * completions * get_family(family).gold_tokens

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON has them, rows and tuples as lists."""
        return json.loads(json.dumps(dataclasses.asdict(self), sort_keys=True))

    def key(self, models: Mapping[str, str]) -> str:
        """Sixteen hex digits that change with anything that decides the run's numbers.

        Args:
            models (`Mapping`): what identifies the weights of each of `self.models`.
        """
        run = self.to_json()
        parts = {"version": RUN_VERSION, "run": run, "models": {name: models[name] for name in self.models}}
        measured = MEASURED_TABLES.get(self.method, {})
        if measured and self.rules is None:
            if all(self.options.get(name) == value for name, value in measured.items()):
                run["options"] = {name: value for name, value in self.options.items() if name not in measured}
            else:
                parts["table"] = "of today"
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A run that is repeated over seeds, under the name that tables and figures give it.

    Attributes:
        label (`str`): unique within its experiment.
        run (`RunSpec`): its seeds are replaced.
        paper (`Mapping`): the paper's numbers for it, by column.
        x (`float`, *optional*): place on the horizontal axis of a figure of lines.
        group (`str`): line or panel that it belongs to.
        tuned (`bool`): whether its learning rate was chosen; else it is the default one, and the README says so.
    """

    label: str
    run: RunSpec
    paper: Mapping[str, float] = field(default_factory=dict)
    x: float | None = None
    group: str = ""
    tuned: bool = True


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One testable sentence of the paper.

    Attributes:
        text (`str`): the sentence.
        first, second (`str`): labels of conditions; `second=""` compares with 0.
        kind (`str`): `"above"` or `"below"`: where the first is; `"near"`: the two differ by less than `margin`.
        metrics (`tuple[str]`): what is compared; see `lab.analysis` for how several are judged together.
        margin (`float`): of `"near"`, in the metrics' unit.
    """

    text: str
    first: str
    second: str = ""
    kind: Literal["above", "below", "near"] = "above"
    metrics: tuple[str, ...] = ("greedy", "sampled")
    margin: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "near" and not self.margin > 0:
            raise ConfigError(f"margin (={self.margin}) of the claim {self.text!r} must be above 0")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure of the paper, as runs and claims.

    Attributes:
        name, title (`str`): of the command; of the README.
        source (`str`): the paper's table or figure.
        claim (`str`): what the paper says, in one or two sentences.
        protocol (`str`): what is particular to it; the rest is in experiments/PROTOCOL.md.
        conditions, claims: the runs and the tests.
        columns (`tuple[str]`): metrics of its table.
        figure (`str`): `"points"`, `"lines"`, `"grid"` or `"curves"`.
        shown (`tuple[str]`): metrics of a figure of points, a panel each.
        curves (`tuple[str]`): of a figure of curves.
        deviations (`tuple[str]`): where it departs from the paper.
        run_seeds (`tuple[int]`, *optional*): in place of the protocol's.
        first_pretraining_seed_alone (`bool`): only the first of the protocol's pretraining seeds.

    Raises:
        ConfigError: two conditions with one label, or a claim about a label that there is not.
    """

    name: str
    title: str
    source: str
    claim: str
    protocol: str
    conditions: tuple[Condition, ...]
    claims: tuple[Claim, ...]
    columns: tuple[str, ...] = ("greedy", "sampled", "privileged", "entropy", "length")
    figure: Literal["points", "lines", "grid", "curves"] = "points"
    shown: tuple[str, ...] = ("greedy", "sampled")
    curves: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    run_seeds: tuple[int, ...] | None = None
    first_pretraining_seed_alone: bool = False

    def __post_init__(self) -> None:
        labels = [condition.label for condition in self.conditions]
        if len(set(labels)) != len(labels):
            raise ConfigError(f"experiment {self.name!r}: conditions must have different labels, got {labels}")
        for claim in self.claims:
            for label in (claim.first, claim.second):
                if label and label not in labels:
                    raise ConfigError(
                        f"experiment {self.name!r}: claim {claim.text!r} names {label!r}, not a condition"
                    )

    def runs(self, pretraining_seeds: tuple[int, ...], run_seeds: tuple[int, ...]) -> list[tuple[Condition, RunSpec]]:
        """Every run of the experiment, seeds outermost, so that an interrupted experiment has whole rounds."""
        run_seeds = run_seeds if self.run_seeds is None else self.run_seeds
        pretraining_seeds = pretraining_seeds[:1] if self.first_pretraining_seed_alone else pretraining_seeds
        return [
            (condition, dataclasses.replace(condition.run, pretraining_seed=pretraining, run_seed=seed))
            for seed in run_seeds
            for pretraining in pretraining_seeds
            for condition in self.conditions
        ]
