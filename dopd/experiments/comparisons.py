"""Methods beside one another: learning rates, Tables 1 and 3, Figures 3, 7 and 8."""

from collections.abc import Mapping

from dopd.experiments.conditions import FIXED_RATE, condition, start, teacher_alone
from dopd.experiments.families import FAMILIES
from dopd.experiments.protocol import GRID, TUNING_SEED
from dopd.experiments.spec import SFT, Claim, Condition, Experiment

# Table 1's methods with the paper's averages, then those that it does not have.
_TABLE1: Mapping[str, float] = {
    "vanilla": 43.9,
    "opcd": 44.3,
    "exopd": 47.0,
    "uni_opd": 46.6,
    "sdft": 41.8,
    "opsd": 42.5,
    "sdpo": 42.8,
    "eopd": 46.1,
    "tip": 44.8,
    "dopd": 51.4,
}
_NAIVE = ("privileged_teacher", "privileged_student", "privileged_both")
_ANCHORED = ("dopd_frozen", "dopd_ema")
_FURTHER = (
    "vanilla_pg",
    "gkd",
    "veto",
    "fast_opd",
    "ta_opd",
    "reopold",
    "tsd_kd",
    "stopgrad_topk",
    "bridge_garden",
    "opsa",
    "cal_opd",
    "rlsd",
    "rlcsd",
    "sdpg",
    "grpo",
)
_NEEDS_P = "teacher_needs_p"
_THREE = "text/student"  # one student that knows a little of each family


def tuning() -> Experiment:
    """The learning rate of each method, on problems that no test uses."""
    main = ("vanilla", "dopd", "dopd_frozen", "dopd_ema", *_NAIVE)
    rest = (*(name for name in _TABLE1 if name not in main), *_FURTHER, SFT)
    pairs = [(name, "teacher") for name in main]
    pairs += [(name, _NEEDS_P) for name in ("vanilla", "dopd", "dopd_frozen", "privileged_teacher")]
    pairs += [(name, "teacher") for name in rest]
    return Experiment(
        name="tuning",
        title="Learning rates",
        source="none: the paper has one learning rate for all, 5e-6",
        claim="None: each method gets the rate of the grid with the highest mean of greedy and sampled accuracy.",
        protocol="Family dag, validation problems (equal to none of the test's), the first pretraining seed, one "
        "run seed "
        "that no test uses. Ties (less than 1 point) go to the lower rate. Tests read the rates from "
        "`dopd.experiments.protocol`.",
        conditions=tuple(
            condition(
                f"{method}{'' if teacher == 'teacher' else '@' + teacher}, {rate:g}",
                method,
                teacher=teacher,
                learning_rate=rate,
                split="validation",
                problems=256,
                x=rate,
                group=f"{method}{'' if teacher == 'teacher' else '@' + teacher}",
            )
            for method, teacher in pairs
            for rate in GRID
        ),
        claims=(),
        figure="lines",
        curves=("learning rate",),
        run_seeds=(TUNING_SEED,),
        first_pretraining_seed_alone=True,
    )


def figure3() -> Experiment:
    """Naive ways to use p."""
    return Experiment(
        name="figure3",
        title="Naive privileged variants over a run",
        source="Figure 3",
        claim="With p for the teacher alone, or for the student's own target alone, accuracy gains early and then "
        "falls, "
        "with collapsing entropy; with p for both and no routing the gain is small and below Vanilla OPD.",
        protocol=f"{FIXED_RATE} Early gain: accuracy of the rollouts (sampled, without p but for the variant with p "
        f"for "
        "both) in steps 21-30 less that in steps 1-10. Late change: the last steps less steps 21-30.",
        conditions=(
            start(),
            teacher_alone(),
            condition("vanilla", "vanilla"),
            condition("p for the teacher", "privileged_teacher"),
            condition("p for the student", "privileged_student"),
            condition("p for both", "privileged_both"),
            condition("DOPD", "dopd"),
        ),
        claims=(
            *(
                claim
                for label in ("p for the teacher", "p for the student")
                for claim in (
                    Claim(text=f"early gain, {label}", first=label, metrics=("early_gain",)),
                    Claim(text=f"late fall, {label}", first=label, kind="below", metrics=("late_change",)),
                    Claim(
                        text=f"lower entropy than Vanilla OPD, {label}",
                        first=label,
                        second="vanilla",
                        kind="below",
                        metrics=("entropy",),
                    ),
                )
            ),
            Claim(text="a gain with p for both", first="p for both", second="start"),
            Claim(text="below Vanilla OPD with p for both", first="p for both", second="vanilla", kind="below"),
        ),
        columns=("greedy", "sampled", "privileged", "entropy", "early_gain", "late_change", "tokens"),
        figure="curves",
        curves=("rollout/accuracy", "entropy"),
    )


def weak_teacher() -> Experiment:
    """When DOPD helps: a teacher that needs p, and one that does not."""

    def row(label: str, method: str, teacher: str) -> Condition:
        name = "strong" if teacher == "teacher" else "needs p"
        return condition(f"{label}, teacher {name}", method, teacher=teacher)

    methods = {
        "vanilla": "vanilla",
        "p for the teacher": "privileged_teacher",
        "DOPD": "dopd",
        "DOPD, frozen privileged student": "dopd_frozen",
    }
    rows = [row(label, method, teacher) for teacher in (_NEEDS_P, "teacher") for label, method in methods.items()]
    return Experiment(
        name="weak_teacher",
        title="When DOPD helps: a teacher that needs p, and one that does not",
        source="no experiment of the paper; a feasibility study at this scale",
        claim="DOPD beats Vanilla OPD where the teacher needs p, and loses where the teacher is strong without it; "
        "there "
        "its live privileged student drifts (accuracy with p falls), and a frozen one does not.",
        protocol=FIXED_RATE,
        conditions=(
            start(),
            teacher_alone("teacher needs p, alone", teacher=_NEEDS_P),
            teacher_alone("teacher strong, alone"),
            *rows,
        ),
        claims=(
            Claim(
                text="DOPD wins where the teacher needs p",
                first="DOPD, teacher needs p",
                second="vanilla, teacher needs p",
            ),
            Claim(
                text="DOPD loses where the teacher is strong",
                first="DOPD, teacher strong",
                second="vanilla, teacher strong",
                kind="below",
            ),
            *(
                Claim(
                    text=f"its privileged student drifts, teacher {name}",
                    first=f"DOPD, teacher {name}",
                    second=f"DOPD, frozen privileged student, teacher {name}",
                    kind="below",
                    metrics=("privileged",),
                )
                for name in ("needs p", "strong")
            ),
        ),
        deviations=("The claim is ours, not the paper's.",),
    )


def table1_dag() -> Experiment:
    """All methods on the family that stands for reasoning."""
    return _table1("dag")


def table1_graph() -> Experiment:
    """All methods on the family that stands for general tasks."""
    return _table1("graph")


def table1_program() -> Experiment:
    """All methods on the family that stands for coding."""
    return _table1("program")


def _table1(family: str) -> Experiment:
    names = (*_TABLE1, *_ANCHORED, *_NAIVE, *(_FURTHER if family == "dag" else ()))
    rows = tuple(
        condition(name, name, families=(family,), paper={"average": _TABLE1[name]} if name in _TABLE1 else {})
        for name in names
    )
    conditions = (
        Condition(label="start", run=start(families=(family,)).run, paper={"average": 39.1}),
        Condition(label="teacher", run=teacher_alone(families=(family,)).run, paper={"average": 52.8}),
        *rows,
    )
    others = [name for name in _TABLE1 if name not in ("dopd", "vanilla")]
    return Experiment(
        name=f"table1_{family}",
        title=f"All methods on {family} (stands for {FAMILIES[family].stands_for})",
        source="Table 1",
        claim="DOPD beats Vanilla OPD and every other method, and recovers most of the gap to the teacher.",
        protocol=f"{FIXED_RATE} Rates are tuned on dag and used for all families. Methods that the paper does not "
        f"have (on dag alone), and the naive and anchored variants, are shown and not tested.",
        conditions=conditions,
        claims=(
            Claim(text="Vanilla OPD gains", first="vanilla", second="start"),
            Claim(text="DOPD gains", first="dopd", second="start"),
            Claim(text="DOPD beats Vanilla OPD", first="dopd", second="vanilla"),
            *(Claim(text=f"DOPD beats {name}", first="dopd", second=name) for name in others),
        ),
        deviations=("The paper's averages are over eight benchmarks of three kinds; here each kind is one family.",),
    )


_PAIRS: Mapping[str, tuple[str, str, float, float, float]] = {
    # pair: teacher's role, student's role, ratio of sizes, the paper's vanilla and DOPD
    "8B to 0.6B": ("teacher_large", "student_small", 13.3, 29.7, 40.3),
    "8B to 1.7B": ("teacher_large", "student", 4.7, 43.9, 51.4),
    "4B to 0.6B": ("teacher_medium", "student_small", 6.7, 30.9, 39.9),
    "4B to 1.7B": ("teacher_medium", "student", 2.4, 44.0, 50.2),
    "1.7B to 0.6B": ("teacher", "student_small", 2.8, 31.7, 38.1),
}


def table3() -> Experiment:
    """Five pairs of sizes."""
    conditions = [start("start, large student"), start("start, small student", student="dag/student_small")]
    for pair, (teacher, student, ratio, vanilla, dopd) in _PAIRS.items():
        for label, method, paper in (("vanilla", "vanilla", vanilla), ("DOPD", "dopd", dopd)):
            conditions.append(
                condition(
                    f"{pair}, {label}",
                    method,
                    teacher=teacher,
                    student=f"dag/{student}",
                    rate_teacher="teacher",
                    paper={"average": paper},
                    x=ratio,
                    group=label,
                )
            )
    return Experiment(
        name="table3",
        title="Five pairs of teacher and student",
        source="Table 3 and Figure 6",
        claim="DOPD beats Vanilla OPD for every pair; Vanilla OPD's gain shrinks as the ratio of sizes grows, "
        "DOPD's grows.",
        protocol="Rates as tuned with the teacher of the middle size. Sizes: 8B, 4B, 1.7B and 0.6B stand for tiny "
        "models of "
        "5 x 96, 4 x 80, 3 x 64 and 2 x 48 (layers x width).",
        conditions=tuple(conditions),
        claims=tuple(
            Claim(text=f"DOPD wins, {pair}", first=f"{pair}, DOPD", second=f"{pair}, vanilla") for pair in _PAIRS
        ),
        figure="lines",
        curves=("teacher's size over student's, in the paper's models",),
    )


def figure7a() -> Experiment:
    """Three stages of continual learning."""
    families = ("graph", "dag", "program")

    def row(label: str, method: str) -> Condition:
        return condition(label, method, families=families, student=_THREE)

    return Experiment(
        name="figure7a",
        title="Continual learning in three stages, and forgetting",
        source="Figure 7a",
        claim="Learning general, reasoning and coding tasks one after another, DOPD learns the new skills and "
        "forgets next "
        "to nothing of the earlier ones.",
        protocol=f"{FIXED_RATE} Stages: {', '.join(families)}, each with its own teacher and a whole budget. "
        f"Learned: mean "
        "over stages of the greedy accuracy right after. Kept: greedy accuracy at the end less that right after its "
        "stage, mean over earlier families.",
        conditions=(
            row("vanilla", "vanilla"),
            row("DOPD", "dopd"),
            row("SFT on gold solutions", SFT),
            row("policy gradient", "grpo"),
        ),
        claims=(
            Claim(text="DOPD learns more than Vanilla OPD", first="DOPD", second="vanilla", metrics=("learned",)),
            Claim(text="DOPD keeps more than SFT", first="DOPD", second="SFT on gold solutions", metrics=("kept",)),
            Claim(text="DOPD forgets next to nothing", first="DOPD", kind="near", margin=0.03, metrics=("kept",)),
        ),
        columns=("learned", "kept", "stage1/greedy", "stage2/greedy", "stage3/greedy"),
    )


def figure7b() -> Experiment:
    """Out of distribution."""
    rows = []
    for trained, tested in (("program", "dag"), ("dag", "program")):
        rows.append(start(f"start, {trained}", families=(trained,), student=_THREE, others=(f"{tested}:test",)))
        for label, method in (("vanilla", "vanilla"), ("DOPD", "dopd"), ("SFT", SFT)):
            rows.append(
                condition(
                    f"{label}, trained on {trained}",
                    method,
                    families=(trained,),
                    student=_THREE,
                    others=(f"{tested}:test", f"{trained}:ood"),
                )
            )
    return Experiment(
        name="figure7b",
        title="Out of distribution: another family, and larger problems",
        source="Figure 7b",
        claim="Trained on coding and tested on reasoning, or the reverse, DOPD is ahead of the second best by 3 to 4 "
        "points.",
        protocol=f"{FIXED_RATE} The student knows a little of each family. Beside the paper's test: larger problems "
        f"of the "
        "trained family (`ood`).",
        conditions=tuple(rows),
        claims=(
            Claim(
                text="DOPD transfers better, coding to reasoning",
                first="DOPD, trained on program",
                second="vanilla, trained on program",
                metrics=("dag:test/greedy", "dag:test/sampled"),
            ),
            Claim(
                text="DOPD transfers better, reasoning to coding",
                first="DOPD, trained on dag",
                second="vanilla, trained on dag",
                metrics=("program:test/greedy", "program:test/sampled"),
            ),
        ),
        columns=("greedy", "sampled", "dag:test/greedy", "program:test/greedy", "dag:ood/greedy", "program:ood/greedy"),
    )


def figure8() -> Experiment:
    """Stability of a longer run."""

    def row(label: str, method: str) -> Condition:
        return condition(label, method, steps=200, evaluate_every=25)

    return Experiment(
        name="figure8",
        title="Stability of longer runs",
        source="Figure 8",
        claim="DOPD stays stable and ahead to the end; its entropy settles; the self-distillation baseline "
        "collapses half way.",
        protocol=f"{FIXED_RATE} Budget: 200 steps' worth of tokens. Late change: rollouts of the last steps less "
        f"steps 21-30.",
        conditions=(
            start(),
            row("vanilla", "vanilla"),
            row("self-distillation (p for the student)", "privileged_student"),
            row("DOPD", "dopd"),
            row("DOPD, frozen privileged student", "dopd_frozen"),
            row("DOPD, moving-average privileged student", "dopd_ema"),
        ),
        claims=(
            Claim(text="DOPD ends above Vanilla OPD", first="DOPD", second="vanilla"),
            Claim(text="DOPD does not fall after its early gain", first="DOPD", metrics=("late_change",)),
            Claim(
                text="self-distillation collapses",
                first="self-distillation (p for the student)",
                kind="below",
                metrics=("late_change",),
            ),
        ),
        columns=("greedy", "sampled", "privileged", "entropy", "early_gain", "late_change"),
        figure="curves",
        curves=("eval/greedy", "eval/sampled", "eval/privileged", "eval/entropy"),
    )
