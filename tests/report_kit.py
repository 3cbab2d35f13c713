"""Run folders made by hand, for tests of the report: no model, the numbers are what the test says."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from dopd.inspection.schema import SCHEMA_VERSION, prompt_key
from dopd.report.groups import find_runs, group_runs

REGIMES = ("LH", "LL", "HT", "HS")
EVIL = "<img src=x onerror=\"document.title='owned'\"></script><script>window.owned=1</script>&amp;"
RULES = {
    "LH": {"source": "privileged_teacher", "divergence": "reverse_kl", "support": "student_topk 8", "weight": 0.6},
    "LL": {"source": "privileged_student", "divergence": "reverse_kl", "support": "student_topk 8", "weight": 0.3},
    "HT": {"source": "privileged_teacher", "divergence": "js", "support": "full", "weight": 1.0},
    "HS": {"source": "privileged_student", "divergence": "reverse_kl", "support": "student_topk 8", "weight": 0.6},
}
PLAIN_RULES = {"all": {"source": "teacher", "divergence": "reverse_kl", "support": "full", "weight": 1.0}}
WORDS = ("B", " 4", " 5", " =", " 9", " so", " J", " is", " seven", "teen", ".", "\n", " I", " get", " 7")
THRESHOLDS = {"gap": 0.5, "confidence": 0.9}


def token(text: str, number: int, regime: str | None, rng: random.Random) -> dict[str, Any]:
    high = regime in ("HT", "HS")
    gap = rng.uniform(0.5, 4.0) if high else rng.uniform(0.0, 0.5)
    lower = -gap - rng.uniform(0.0, 1.0)
    teacher, student = (lower + gap, lower) if regime in ("HT", "LH", None) else (lower, lower + gap)
    rule = PLAIN_RULES["all"] if regime is None else RULES[regime]
    top = [[text, 0.61234], [" other", 0.2], ["\n", 0.1], [EVIL, 0.05], ["", 0.01]]
    return {
        "id": number,
        "text": text,
        "regime": regime,
        "gap": None if regime is None else round(teacher - student if teacher > student else student - teacher, 6),
        "logprob_teacher": round(teacher, 6),
        "logprob_student": None if regime is None else round(student, 6),
        "logprob_plain": round(rng.uniform(-3.0, 0.0), 6),
        "entropy": round(rng.uniform(0.0, 2.0), 6),
        "weight": rule["weight"],
        "loss": round(rng.uniform(0.0, 1.0), 6),
        "top_target": top,
        "top_student": top[::-1],
    }


def record(
    step: int, row: int, *, method: str = "dopd", prompt: str = "J b 1 ? J", texts: Any = WORDS, **options: Any
) -> dict[str, Any]:
    rng = random.Random(f"{step} {row} {method}")
    routed = method != "vanilla"
    tokens = [token(text, n, rng.choice(REGIMES) if routed else None, rng) for n, text in enumerate(texts)]
    privileged = options.pop("privileged_context", "plan B J")
    return {
        "schema": SCHEMA_VERSION,
        "kind": "batch",
        "step": step,
        "row": row,
        "method": method,
        "prompt_key": prompt_key(prompt, privileged),
        "rollout": row % 2,
        "prompt": prompt,
        "privileged_context": privileged,
        "score": float(row % 2),
        "num_tokens": len(tokens),
        "teacher_view": "privileged" if routed else "plain",
        "thresholds": THRESHOLDS if routed else None,
        "rules": RULES if routed else PLAIN_RULES,
        "tokens": tokens,
        **options,
    }


def metrics(steps: int, method: str = "dopd", **series: Any) -> list[dict[str, Any]]:
    """Records of every step, with an evaluation every two steps; `series` are functions of the fraction done."""
    named = {
        "greedy": lambda t: 0.4 + 0.2 * t,
        "privileged": lambda t: 0.8,
        "entropy": lambda t: 1.0 - 0.3 * t,
    } | series
    records: list[dict[str, Any]] = []
    for step in range(steps + 1):
        t = step / steps
        if step:
            line = {
                "step": step,
                "loss": 1.0 / step,
                "entropy": named["entropy"](t),
                "completions/mean_length": 20.0 + t,
            }
            line |= {
                "seconds/rollout": 0.5,
                "seconds/scoring": 0.2,
                "seconds/training": 0.3,
                "rollout/accuracy": 0.5 + t / 5,
            }
            line |= {"completions/clipped_ratio": 0.0, "privileged/missing_ratio": 0.0}
            if method != "vanilla":
                shares = named.get("shares", lambda t: (0.4, 0.1, 0.3, 0.2))(t)
                for label, share in zip(REGIMES, shares, strict=True):
                    line |= {
                        f"share/{label}": share,
                        f"loss/{label}": 0.2,
                        f"gradient/{label}": 0.25,
                        f"gap/{label}": 0.4,
                    }
                line |= {"gap_bin/0.1": 0.2, "gap_bin/1": 0.5, "gap_bin/inf": 0.3, "threshold/gap": 0.5}
                line |= {"threshold/confidence": 0.9}
            records.append(line)
        if step % 2 == 0:
            values = {"accuracy_greedy": named["greedy"](t), "accuracy_sampled": 0.4, "entropy": named["entropy"](t)}
            values |= {"accuracy_privileged": named["privileged"](t), "length": 20.0, "num_prompts": 256.0}
            values |= {"divergence_to_teacher": 0.3 - 0.1 * t}
            records.append({"step": step, **{f"eval_{name}": value for name, value in values.items()}})
    return records


def run_folder(
    folder: Path,
    method: str = "dopd",
    seed: int = 0,
    *,
    trace: Any = None,
    steps: int = 6,
    config: Any = None,
    **series: Any,
) -> Path:
    folder.mkdir(parents=True)
    settings = {"method": method, "seed": seed, "task": "dag", "model_name_or_path": "tiny:dag/student"}
    settings |= {"teacher_model_name_or_path": "tiny:dag/teacher", "output_dir": str(folder), "learning_rate": 1e-3}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | (config or {})))
    if trace is None:
        prompts = ("J b 1 ? J", f"second {EVIL}")
        trace = [
            record(step, row, method=method, prompt=prompts[row // 2], texts=(*WORDS, EVIL) if row == 3 else WORDS)
            for step in (0, 2, 5)
            for row in range(4)
        ]
    write_lines(folder / "metrics.jsonl", metrics(steps, method, **series))
    write_lines(folder / "trace.jsonl", trace)
    return folder


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in records))


def shown(value: float, digits: int = 3) -> str:
    """How the page writes a number."""
    if value != 0 and abs(value) < 0.5 * 10**-digits:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.{digits}f}"


def probability(logprob: float) -> str:
    return shown(math.exp(logprob))


def four_runs(folder: Path) -> Path:
    """A folder with runs of two methods, two seeds each."""
    for method in ("vanilla", "dopd"):
        for seed in (0, 1):
            run_folder(folder / f"{method}-seed{seed}", method, seed, greedy=lambda t, s=seed: 0.4 + 0.1 * s * t)
    return folder


def groups_of(*folders: Path) -> Any:
    """The runs in some folders, as the report groups them."""
    return group_runs(find_runs(folders))
