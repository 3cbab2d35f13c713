"""What the columns that a run reads are called in other datasets of the field, the likeliest name first."""

from collections.abc import Mapping, Sequence

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
}


def likeliest_column(columns: Sequence[str], name: str) -> str | None:
    """The column, or the path into one (`reward_model.ground_truth`), that is likely to be `name` under another name.

    Args:
        columns: names and paths.
        name (`str`): a column of a run, such as `prompt` or `privileged_context`.
    """
    names = _NAMES.get(name, ())
    matching = [one for one in columns if one.lower() in names]
    return min(matching, key=lambda one: names.index(one.lower()), default=None)


def guessed_columns(columns: Sequence[str]) -> dict[str, str]:
    """A mapping, from a run's names to the dataset's, by names alone; columns that have a run's name are left out.

    Args:
        columns: names and paths.
    """
    found: dict[str, str] = {}
    for name in _NAMES:
        theirs = likeliest_column(columns, name)
        if name not in columns and theirs is not None and theirs not in found.values():
            found[name] = theirs
    return found
