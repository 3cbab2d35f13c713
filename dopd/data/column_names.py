"""What the columns that a run reads are called in other datasets: mappings, paths into columns, and likely names."""

import re
from collections.abc import Mapping, Sequence

from dopd.sources import REFERENCE_COLUMN

# A run's names -> the dataset's names of columns, or paths into them; several are put together.
Columns = Mapping[str, str | Sequence[str]]
SYSTEM = "system"  # no column of a run: its text becomes the first turn of the prompt

# Columns of whole conversations.
CONVERSATIONS = ("messages", "conversations", "conversation", "turns")
# A solution is what hints are made of where there is no hint. A teacher's prompt has the question in it once more.
_NAMES: Mapping[str, Sequence[str]] = {
    "prompt": (
        *("prompt", "prompts", "question", "problem", "query", "instruction", *CONVERSATIONS, "input", "text"),
        *("extra_info.question", "extra_info.problem"),
    ),
    "privileged_context": (
        *("hint", "hints", "privileged", "privileged_information", "plan", "steps", "key_points"),
        *("rationale", "reasoning", "explanation", "solution", "solutions", "teacher_prompt"),
        *("extra_info.hint", "extra_info.solution", "extra_info.teacher_prompt"),
    ),
    "answer": (
        *("answer", "answers", "final_answer", "reference_answer", "expected_answer", "gold_answer", "gold", "target"),
        *("ground_truth", "label", "reward_model.ground_truth", "extra_info.ground_truth", "extra_info.answer"),
        *("completion", "response", "output"),
    ),
    "privileged_images": ("teacher_images",),
    "images": (
        *("picture", "pictures", "img", "imgs", "photo", "photos", "image_path", "image_paths", "image_file"),
        *("image_files", "extra_info.images"),
    ),
}
# Columns that ask together, in this order.
_TOGETHER = (
    ("instruction", "input"),
    ("context", "question"),
    ("passage", "question"),
    ("document", "question"),
)
_SYSTEM_NAMES = ("system", "system_prompt", "system_message")
_NUMBERED = re.compile(r"image_?\d+", re.IGNORECASE)


def paths_of(theirs: str | Sequence[str]) -> list[str]:
    """What a run's name is mapped to, as a list."""
    return [theirs] if isinstance(theirs, str) else list(theirs)


def split_path(theirs: str, there: Sequence[str]) -> tuple[str | None, list[str]]:
    """The column that a path begins with, `None` if there is none, and the steps into its values.

    A column whose own name has dots in it comes first.
    """
    parts = theirs.split(".")
    for count in range(len(parts), 0, -1):
        column = ".".join(parts[:count])
        if column in there:
            return column, parts[count:]
    return None, []


def place_in_list(step: str) -> int | None:
    """The place in a list that a step of a path names; `None` for a key."""
    return int(step) if step.removeprefix("-").isascii() and step.removeprefix("-").isdigit() else None


# Texts to train on: what a run reads only where its method says so, so that nobody guesses it unasked.
_REFERENCES = (
    *("solution", "solutions", "completion", "completions", "response", "responses", "output", "outputs"),
    *("reference", "reference_solution", "demonstration", "teacher_text", "gold", "target", "answer"),
)


def likeliest_column(columns: Sequence[str], name: str) -> str | None:
    """The column, or the path into one (`reward_model.ground_truth`), that is likely to be `name` under another name.

    Args:
        columns: names and paths.
        name (`str`): a column of a run, such as `prompt` or `privileged_context`.
    """
    names = _REFERENCES if name == REFERENCE_COLUMN else _NAMES.get(name, ())
    matching = [one for one in columns if one.lower() in names]
    return min(matching, key=lambda one: names.index(one.lower()), default=None)


def guessed_columns(columns: Sequence[str]) -> dict[str, str | list[str]]:
    """A mapping, from a run's names to the dataset's, by names alone; columns that have a run's name are left out.

    Args:
        columns: names and paths.
    """
    found: dict[str, str | list[str]] = {}
    for name in _NAMES:
        theirs = likeliest_column(columns, name)
        has_pictures = name == "images" and "image" in columns
        if name not in columns and not has_pictures and theirs is not None and theirs not in found.values():
            found[name] = theirs
    lower = {column.lower(): column for column in reversed(columns)}
    together = next((pair for pair in _TOGETHER if all(name in lower for name in pair)), None)
    if together and str(found.get("prompt")).lower() in together:
        found["prompt"] = [lower[name] for name in together]
    numbered = [column for column in columns if _NUMBERED.fullmatch(column)]
    if numbered and not {"images", "image"} & {*columns, *found}:
        found["images"] = sorted(numbered, key=lambda one: int(re.sub(r"\D", "", one)))
    system = next((lower[name] for name in _SYSTEM_NAMES if name in lower), None)
    if system is not None:
        found[SYSTEM] = system
    return found
