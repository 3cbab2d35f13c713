"""Small data sets for first runs: they come with the package and are for its tiny models."""

from pathlib import Path

from dopd.errors import ConfigError, did_you_mean

_FOLDER = Path(__file__).parent


def example_file(name: str) -> str:
    """The path of a data set that comes with the package, for `datasets.load_dataset` and `dataset_name`.

    Args:
        name (`str`): `"dag.jsonl"`: 64 problems of the task `dag`, with the columns `prompt`, `solution` (it ends
            in the answer), `answer` and `privileged_context` (the plan: what to work out, in order); or
            `"dag-test.jsonl"`: 128 held-out ones.

    Raises:
        ConfigError: there is no data set of that name.
    """
    names = sorted(path.name for path in _FOLDER.glob("*.jsonl"))
    if name not in names:
        raise ConfigError(f"example {name!r} must be one of {', '.join(names)}.{did_you_mean(name, names)}")
    return str(_FOLDER / name)
