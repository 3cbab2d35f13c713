"""The paper's ablations of DOPD, all on the family `dag` with the strong teacher: Tables 4, 6, 7, 8, Figures 4, 10."""

from collections.abc import Mapping
from typing import Any

from lab.conditions import FIXED_RATE, TOP_K, condition, start
from lab.spec import Claim, Condition, Experiment

_ABLATION_RATE = "All conditions take DOPD's tuned learning rate; the paper has one rate for all, too."


def figure4() -> Experiment:
    """Vanilla OPD without the fifth of tokens that has the largest, random or smallest gaps."""

    def without(label: str, drop: str, paper: float) -> Condition:
        return condition(
            label,
            "vanilla_drop",
            options={"drop": drop, "fraction": 0.2},
            rate_of="vanilla",
            paper={"gain kept (%)": paper},
        )

    margin = 0.03
    return Experiment(
        name="figure4",
        title="Which tokens carry Vanilla OPD: dropping a fifth of them",
        source="Figure 4",
        claim="Without the 20% of tokens with the largest privilege advantage gap, Vanilla OPD keeps about half of its "
        "gain; without a random 20%, or the 20% with the smallest gaps, it keeps nearly all.",
        protocol="All take Vanilla OPD's tuned learning rate. The gap is taken with the plan as p, in both policies. "
        f"'Nearly all' means: within {100 * margin:g} points.",
        conditions=(
            start(),
            condition("vanilla", "vanilla", paper={"gain kept (%)": 100}),
            without("without the top 20%", "top", 50),
            without("without a random 20%", "random", 100),
            without("without the bottom 20%", "bottom", 100),
        ),
        claims=(
            Claim(text="Vanilla OPD gains", first="vanilla", second="start"),
            Claim(text="top-gap tokens matter", first="without the top 20%", second="vanilla", kind="below"),
            Claim(
                text="they matter more than random ones",
                first="without the top 20%",
                second="without a random 20%",
                kind="below",
            ),
            Claim(
                text="random ones cost nearly nothing",
                first="without a random 20%",
                second="vanilla",
                kind="near",
                margin=margin,
            ),
            Claim(
                text="those with the smallest gaps cost nearly nothing",
                first="without the bottom 20%",
                second="vanilla",
                kind="near",
                margin=margin,
            ),
        ),
        deviations=("The paper's 'nearly all' is read off a figure.",),
    )


def table4() -> Experiment:
    """Kinds of p."""
    kinds: Mapping[str, tuple[str, float, float]] = {
        "final answer": ("final_answer", 59.5, 36.7),
        "hints with execution": ("hints_with_execution", 63.1, 38.9),
        "hints without execution": ("hints_without_execution", 71.3, 49.8),
        "summarised hints": ("summarised_hint", 65.8, 43.6),
        "none": ("none", 63.0, 39.4),
    }
    conditions = tuple(
        condition(label, "dopd", privileged_kind=kind, paper={"C-Eval": first, "LiveBench": second})
        for label, (kind, first, second) in kinds.items()
    )
    best = "hints without execution"
    return Experiment(
        name="table4",
        title="What the privileged information is",
        source="Table 4",
        claim="DOPD is best with hints that name the steps without executing them; the final answer as p is worse than "
        "no p at all.",
        protocol=f"{_ABLATION_RATE} Accuracy with p is measured with each condition's own kind of p.",
        conditions=(start(), *conditions),
        claims=(
            *(Claim(text=f"better than {label}", first=best, second=label) for label in kinds if label != best),
            Claim(text="the final answer is worse than nothing", first="final answer", second="none", kind="below"),
        ),
        deviations=("Hints come from the generator of the problems, not from a language model.",),
    )


_SOURCES = {
    "LH": "privileged_teacher",
    "LL": "privileged_student",
    "HT": "privileged_teacher",
    "HS": "privileged_student",
}


def _rows(divergence: str, support: str, weights: Mapping[str, float] | None = None) -> tuple[Mapping[str, Any], ...]:
    """DOPD's regimes and targets with one divergence, one support and equal weights, or `weights` by regime."""
    return tuple(
        {
            "regime": regime,
            "source": source,
            "divergence": divergence,
            "support": support,
            "top_k": TOP_K,
            "weight": 1.0 if weights is None else weights[regime],
        }
        for regime, source in _SOURCES.items()
    )


_TOP_GAPS_ALONE = {"LH": 0.0, "LL": 0.0, "HT": 1.0, "HS": 0.0}


def table6() -> Experiment:
    """Which kinds of tokens are distilled."""

    def row(label: str, paper: tuple[float, float, float], **more: Any) -> Condition:
        return condition(label, paper=dict(zip(("step 40", "step 80", "step 160"), paper, strict=True)), **more)

    return Experiment(
        name="table6",
        title="Which kinds of tokens are distilled",
        source="Table 6",
        claim="The HT tokens alone do better than all four kinds with equal weights, and all four with DOPD's adaptive "
        "rows do best, early and late.",
        protocol=f"{_ABLATION_RATE} Equal weights: top-K JS for every regime. HT alone: the same, other weights 0.",
        conditions=(
            start(),
            row("all four, equal", (38.4, 40.9, 41.3), method="dopd_equal"),
            row(
                "HT alone",
                (41.0, 43.7, 45.3),
                method="top_teacher_js",
                rules=_rows("js", "student_topk", _TOP_GAPS_ALONE),
                rate_of="dopd",
            ),
            row("all four, adaptive (DOPD)", (45.7, 48.4, 49.8), method="dopd"),
        ),
        claims=(
            Claim(text="HT alone beats all four", first="HT alone", second="all four, equal"),
            Claim(text="adaptive beats HT alone", first="all four, adaptive (DOPD)", second="HT alone"),
            Claim(text="adaptive beats equal", first="all four, adaptive (DOPD)", second="all four, equal"),
        ),
        figure="curves",
        curves=("rollout/accuracy", "entropy"),
    )


def table7() -> Experiment:
    """One divergence and one support for every token."""
    paper = {
        ("forward_kl", "student_topk"): (38.5, 40.2, 41.3),
        ("forward_kl", "full"): (38.0, 40.1, 41.5),
        ("reverse_kl", "sampled"): (37.0, 38.4, 40.6),
        ("reverse_kl", "student_topk"): (37.8, 39.0, 40.8),
        ("reverse_kl", "full"): (38.5, 40.6, 41.9),
        ("js", "student_topk"): (38.4, 40.9, 41.3),
        ("js", "full"): (39.2, 41.6, 42.5),
    }
    names = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "js": "JS"}
    supports = {"sampled": "sampled", "student_topk": "top-K", "full": "full"}

    def row(divergence: str, support: str) -> Condition:
        label = f"{names[divergence]}, {supports[support]}"
        theirs = dict(zip(("step 40", "step 80", "step 160"), paper[divergence, support], strict=True))
        if (divergence, support) == ("js", "student_topk"):
            return condition(label, "dopd_equal", paper=theirs)
        rules = _rows(divergence, support)
        return condition(label, f"equal_{divergence}_{support}", rules=rules, rate_of="dopd", paper=theirs)

    uniform = tuple(row(*key) for key in paper)
    adaptive = {"step 40": 45.7, "step 80": 48.4, "step 160": 49.8}
    return Experiment(
        name="table7",
        title="One divergence for every token",
        source="Table 7",
        claim="No single divergence on a single support, for all tokens with equal weights, comes near DOPD's adaptive "
        "choice; JS on the full vocabulary is the best of them.",
        protocol=f"{_ABLATION_RATE} Regimes and targets are DOPD's in every row.",
        conditions=(start(), *uniform, condition("adaptive (DOPD)", "dopd", paper=adaptive)),
        claims=tuple(
            Claim(text=f"adaptive beats {row.label}", first="adaptive (DOPD)", second=row.label) for row in uniform
        ),
        deviations=(
            "Forward KL and JS on sampled tokens are left out: a sampled token estimates the reverse KL alone, and "
            "`dopd` refuses the other two.",
        ),
    )


def table8() -> Experiment:
    """DOPD without one of its parts."""
    parts = {
        "without privileged input": ("dopd_no_privilege", 63.6, 38.3),
        "without student targets": ("dopd_no_student_targets", 70.4, 47.9),
        "without teacher targets": ("dopd_no_teacher_targets", 65.9, 41.2),
        "without routing": ("dopd_unrouted", 67.6, 41.3),
        "without adaptive objectives": ("dopd_one_divergence", 70.0, 46.7),
        "without adaptive supports": ("dopd_one_support", 70.8, 46.1),
    }
    rows = tuple(
        condition(label, method, paper={"C-Eval": first, "LiveBench": second})
        for label, (method, first, second) in parts.items()
    )
    return Experiment(
        name="table8",
        title="DOPD without one of its parts",
        source="Table 8",
        claim="Each part helps: privileged input and teacher targets most, then routing; student targets, adaptive "
        "objectives and adaptive supports a little.",
        protocol=_ABLATION_RATE,
        conditions=(start(), *rows, condition("DOPD", "dopd", paper={"C-Eval": 71.3, "LiveBench": 49.8})),
        claims=tuple(Claim(text=f"worse {row.label}", first=row.label, second="DOPD", kind="below") for row in rows),
    )


def figure10() -> Experiment:
    """Sensitivity to the two weights."""

    def row(name: str, option: str, value: float) -> Condition:
        return condition(
            f"{name} = {value:g}",
            "dopd",
            options={} if value == _PAPERS[option] else {option: value},
            x=value,
            group=f"{name} varies",
        )

    light = tuple(row("b_l", "light_weight", value) for value in (0.2, 0.4, 0.6, 0.8, 1.0))
    weak = tuple(row("b_w", "weak_weight", value) for value in (0.0, 0.1, 0.3, 0.6, 1.0))
    return Experiment(
        name="figure10",
        title="Sensitivity to the weights b_l and b_w",
        source="Figure 10",
        claim="DOPD is best at b_w = 0.3 and b_l = 0.6; smaller and larger weights are worse.",
        protocol=f"{_ABLATION_RATE} One weight varies, the other keeps the paper's value.",
        conditions=(*light, *weak),
        claims=tuple(
            Claim(text=f"worse at {other}", first=other, second=f"{other[:3]} = {best:g}", kind="below")
            for other, best in (("b_l = 0.2", 0.6), ("b_l = 1", 0.6), ("b_w = 0", 0.3), ("b_w = 1", 0.3))
        ),
        figure="lines",
        curves=("weight",),
    )


_PAPERS = {"light_weight": 0.6, "weak_weight": 0.3}


def robustness() -> Experiment:
    """DOPD and the privileged teacher on every token, with corrupted p."""
    noises: Mapping[str, Mapping[str, Any]] = {
        "clean": {},
        "half dropped": {"kind": "dropped", "share": 0.5},
        "all shuffled": {"kind": "shuffled", "share": 1.0},
        "all noisy": {"kind": "noisy", "share": 1.0, "strength": 0.3},
        "half wrong": {"kind": "wrong", "share": 0.5},
        "all wrong": {"kind": "wrong", "share": 1.0},
    }
    methods = {"DOPD": "dopd", "privileged teacher": "privileged_teacher"}
    conditions = tuple(
        condition(f"{name}, {label}", method, privileged_noise=noise)
        for name, method in methods.items()
        for label, noise in noises.items()
    )
    corrupted = ("all shuffled", "all noisy", "half wrong", "all wrong")
    return Experiment(
        name="robustness",
        title="Wrong, shuffled, noisy and missing privileged information",
        source="no experiment of the paper; its Section 6 names the cost and quality of p as a limit",
        claim="Routing protects from bad p: where p is corrupted, DOPD does better than the privileged teacher on "
        "every "
        "token, and half of p missing costs it little.",
        protocol=f"{FIXED_RATE} p is corrupted in training rows alone; accuracy with p is measured with clean p.",
        conditions=(start(), condition("vanilla (no p)", "vanilla"), *conditions),
        claims=(
            *(
                Claim(text=f"DOPD is better: {label}", first=f"DOPD, {label}", second=f"privileged teacher, {label}")
                for label in corrupted
            ),
            Claim(
                text="half of p missing costs little",
                first="DOPD, half dropped",
                second="DOPD, clean",
                kind="near",
                margin=0.03,
            ),
        ),
        deviations=("The claim is ours, not the paper's.",),
    )
