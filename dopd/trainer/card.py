"""The model card of a run: what was trained from what, by which method and on which data, and what it came to."""

import importlib.metadata
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

import dopd
from dopd.checkpoints import TINY
from dopd.methods import CARDS, METHODS
from dopd.report.ending import ending_of
from dopd.report.outcome import Change
from dopd.report.records import GIVEN_IN_PYTHON, RunRecord
from dopd.tables import RoutingTable
from dopd.trainer.config import BASE

_PACKAGES = ("trl", "transformers", "torch", "datasets", "tokenizers", "accelerate")
_SETTINGS = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "num_generations",
    "max_completion_length",
    "temperature",
)
_CITATION = """```bibtex
@misc{dopd2026, title={{DOPD: Dual On-policy Distillation}}, year={2026}, eprint={2606.30626}}
```"""


def card_text(
    host_card: ModelCard,
    name: str,
    run: RunRecord,
    table: RoutingTable,
    settings: Mapping[str, Any],
    changes: Sequence[Change],
    paper: Mapping[str, str],
) -> str:
    """The card as Markdown.

    Args:
        host_card (`ModelCard`): whose metadata and links to trackers are taken over.
        name (`str`): of the model.
        run (`RunRecord`): the run, with its configuration as `config.yaml` has it.
        table (`RoutingTable`): the method.
        settings (`dict`): the trainer's configuration, of which the main ones are listed.
        changes (`list[Change]`): accuracies at the start and at the end.
        paper (`dict[str, str]`): `title`, `id` and `citation` of what is to be cited.
    """
    base, ending = _model(run.config.get("model_name_or_path")), ending_of(run)
    parts = [
        f"---\n{host_card.data}\n---\n",
        f"# {name}",
        f"{base}, distilled on its own answers with dopd "
        f"([{paper['title']}](https://huggingface.co/papers/{paper['id']})).",
        _table(["", ""], [["base model", base], *_origins(run.config, table, settings)]),
        *[line for line in host_card.text.splitlines() if line.startswith("[<img")],
        "## Results",
        _results(changes),
        *([f"Training {ending.why}."] if ending is not None and ending.early else []),
        f"## Method\n\n```text\n{table.describe()}\n```",
        "## Training",
        _table(["setting", "value"], [[key, str(settings[key])] for key in _SETTINGS if _acts(key, settings)]),
        "## Versions",
        _table(["package", "version"], [["dopd", dopd.__version__], *_versions()]),
        f"## Citation\n\n```bibtex\n{paper['citation']}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _acts(key: str, settings: Mapping[str, Any]) -> bool:
    """Whether a setting is there and has an effect: steps or epochs end a run, and -1 steps leave it to the epochs."""
    by_steps = (settings.get("max_steps") or 0) > 0
    return key in settings and key != ("num_train_epochs" if by_steps else "max_steps")


def _origins(run: Mapping[str, Any], table: RoutingTable, settings: Mapping[str, Any]) -> Iterator[list[str]]:
    if table.needs_teacher and isinstance(run.get("teacher_server"), Mapping):
        for name in run["teacher_server"]:
            yield [
                f"teacher of rows with teacher_id {name}",
                f"{run.get('teacher_server_model') or 'a model'} on a server",
            ]
    elif table.needs_teacher and run.get("teacher_server"):
        yield ["teacher", f"{run.get('teacher_server_model') or 'a model'} on a server"]
    elif table.needs_teacher and run.get("teacher_models"):
        for name, model in run["teacher_models"].items():
            yield [f"teacher of rows with teacher_id {name}", _model(model)]
    elif table.needs_teacher and run.get("teacher_model_name_or_path") == BASE:
        yield ["teacher", "the model below the adapter"]
    elif table.needs_teacher:
        yield ["teacher", _model(run.get("teacher_model_name_or_path"))]
    card = None if settings.get("rules") else CARDS.get(METHODS.resolve(str(settings["method"])))
    yield ["method", f"`{table.name}`{f': {card.about}' if card is not None and card.about else ''}"]
    if run.get("task"):
        options = ", ".join(f"{key} {value}" for key, value in (run.get("task_options") or {}).items())
        yield ["data", f"generated problems of the task `{run['task']}`{f' ({options})' if options else ''}"]
    elif run.get("dataset_name"):
        split = f", split {run['dataset_train_split']}" if run.get("dataset_train_split") else ""
        yield ["data", f"{_place(run['dataset_name'])}{split}"]
    if run.get("verifier"):
        yield ["verifier", _place(run["verifier"])]


def _results(changes: Sequence[Change]) -> str:
    if not changes:
        return "The model was not evaluated: the run had no `student_eval_steps` and no `final_eval_prompts`."
    rows = []
    for change in changes:
        start = "-" if change.start is None else change.start.percent()
        counts = sorted({number for number in (change.num_start, change.num_end) if number})
        rows.append([change.words, start, change.end.percent(), " and ".join(map(str, counts))])
    note = (
        "Accuracy on held-out prompts in percent, with 95% intervals over prompts (Wilson). p is the privileged "
        "context, which the model does not have when it is used."
    )
    return f"{_table(['', 'start', 'end', 'prompts'], rows)}\n\n{note}"


def _versions() -> list[list[str]]:
    return [[name, importlib.metadata.version(name)] for name in _PACKAGES]


def _model(name: Any) -> str:
    if not isinstance(name, str) or not name:
        return "-"
    if name.startswith((GIVEN_IN_PYTHON, TINY)) or os.path.isdir(name):
        return _place(name)
    return f"[{name}](https://huggingface.co/{name})"


def _place(name_or_names: Any) -> str:
    """A name; of files and folders of this machine, the last part."""
    if isinstance(name_or_names, list):
        return ", ".join(map(_place, name_or_names))
    name = str(name_or_names).removeprefix(GIVEN_IN_PYTHON)
    return Path(name).name if os.path.exists(name) else name


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
