"""An experiment at full scale: the same conditions as launch configs for real models. Nothing is run here."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dopd.errors import ConfigError
from dopd.files import replace_file
from dopd.runs.recipes import recipe_path
from dopd.runs.settings import load_settings
from dopd.trainer.folder import claim
from lab.catalogue import get_experiment
from lab.spec import SFT, Condition, Experiment
from lab.writing import check_writable

RECIPE = recipe_path("qwen3-8b-to-1.7b")
SCRIPT_FILE = "launch.sh"
PROCESSES = 8

# The tiny roles' counterparts among the paper's models (Table 3).
TEACHERS: Mapping[str, str] = {
    "teacher": "Qwen/Qwen3-8B",
    "teacher_needs_p": "Qwen/Qwen3-8B",
    "teacher_large": "Qwen/Qwen3-8B",
    "teacher_medium": "Qwen/Qwen3-4B",
    "teacher_small": "Qwen/Qwen3-1.7B",
}
STUDENTS: Mapping[str, str] = {"student": "Qwen/Qwen3-1.7B", "student_small": "Qwen/Qwen3-0.6B"}
_TINY_TOP_K = 8  # of a vocabulary of some 80 words; real vocabularies take each method's own default


def write_launch(name: str, folder: str | Path, *, seeds: int = 1) -> list[Path]:
    """Write one YAML config for each condition, seed and stage, and a script that launches them in order.

    Returns:
        The configs and, last, the script.

    Raises:
        ConfigError: `seeds` below 1, or files in the folder that are somebody else's.
    """
    experiment = get_experiment(name)
    if seeds < 1:
        raise ConfigError(f"seeds (={seeds}) must be at least 1")
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    target = Path(folder) / experiment.name / "full"
    texts, lines = dict[str, str](), _header(experiment)
    for seed in range(seeds):
        for condition in experiment.conditions:
            if not condition.run.trained or condition.run.method == SFT:
                continue
            for values in full_settings(experiment, condition, seed, recipe):
                name = f"{Path(values['output_dir']).name}.yaml"
                load_settings(None, **values)
                texts[name] = yaml.safe_dump(values, sort_keys=False)
                command = ["accelerate", "launch", "--num_processes", str(PROCESSES), "-m", "dopd.cli.main", "train"]
                lines.append(shlex.join([*command, name]))
    texts[SCRIPT_FILE] = "\n".join(lines) + "\n"
    check_writable(target)
    claim(target, [*texts])
    for name, text in texts.items():
        replace_file(target / name, text.encode())
    return [target / name for name in texts]


def full_settings(
    experiment: Experiment, condition: Condition, seed: int, recipe: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The recipe with what the condition changes, one for each stage; learning rate and length stay the recipe's."""
    run = condition.run
    stages: list[dict[str, Any]] = []
    for number, family in enumerate(run.families, 1):
        label = condition.label.replace("/", "-").replace(" ", "-").replace(",", "").replace("%", "")
        stage = f"-stage{number}" if len(run.families) > 1 else ""
        role = (run.student or "dag/student").rpartition("/")[2]
        values = {
            **recipe,
            "model_name_or_path": stages[-1]["output_dir"]
            if stages
            else STUDENTS.get(role, recipe["model_name_or_path"]),
            "teacher_model_name_or_path": TEACHERS[run.teacher],
            # One configuration of the dataset for each kind of p and each family: they are yours to provide.
            "dataset_config": f"{family}-{run.privileged_kind}",
            "method": run.method,
            "seed": seed,
            "output_dir": f"runs/{experiment.name}/{label}{stage}-seed{seed}",
        }
        options = {k: v for k, v in run.options.items() if not (k == "top_k" and v == _TINY_TOP_K)}
        if options:
            values["method_options"] = options
        if run.rules is not None:
            values["rules"] = [_real_row(row) for row in run.rules]
        if run.privileged_noise:
            values["privileged_noise"] = {**run.privileged_noise, "seed": seed}
        stages.append(values)
    return stages


def _real_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not (key == "top_k" and value == _TINY_TOP_K)}


def _header(experiment: Experiment) -> list[str]:
    skipped = [c.label for c in experiment.conditions if not c.run.trained or c.run.method == SFT]
    return [
        "#!/bin/sh",
        f"# {experiment.title} ({experiment.source}) with real models: one run after another, 8 processes each.",
        "# First set dataset_name in the configs, or give --dataset_name here: rows with prompt and "
        "privileged_context.",
        f"# Not launched from here: {', '.join(skipped) or 'nothing'} (they only evaluate, or are no distillation).",
        "set -e",
        'cd "$(dirname "$0")"',
    ]
