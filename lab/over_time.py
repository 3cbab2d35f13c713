"""What happens over a run, and over several in a row: Figures 3, 7 and 8."""

from lab.conditions import FIXED_RATE, condition, start, teacher_alone
from lab.spec import SFT, Claim, Condition, Experiment

_THREE = "text/student"  # one student that knows a little of each family
_LARGER = "The student of three families has twice the parameters of each family's teacher."


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
        shown=("learned", "kept"),
        deviations=(_LARGER,),
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
        shown=("greedy", "dag:test/greedy", "program:test/greedy"),
        deviations=(_LARGER,),
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
