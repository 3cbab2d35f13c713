"""Values of flags, and flags of several commands."""

import argparse
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dopd.runs.hints import HintData

_MAX_INT = 2**31 - 1
_MAX_SEED = 2**32 - 1  # of numpy
_MAX_PROMPTS = 10_000_000  # they are held in memory


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _between(text, 1, _MAX_INT)


def prompt_count(text: str) -> int:
    """How many problems a task makes."""
    return _between(text, 1, _MAX_PROMPTS)


def seed(text: str) -> int:
    """A whole number of at least 0."""
    return _between(text, 0, _MAX_SEED)


def seconds(text: str) -> float:
    """A time above 0."""
    return _number(text, math.inf, "a number of seconds above 0")


def count(text: str) -> int:
    """A whole number of at least 0."""
    return _between(text, 0, _MAX_INT)


def above_zero(text: str) -> float:
    """A finite number above 0."""
    return _number(text, math.inf, "a number above 0")


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    return _number(text, math.nextafter(1.0, 2.0), "a number above 0 and at most 1")


def _number(text: str, below: float, allowed: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if 0.0 < number < below:
        return number
    raise argparse.ArgumentTypeError(f"{text!r} must be {allowed}")


def _between(text: str, lowest: int, highest: int) -> int:
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(highest)) else lowest - 1
    if lowest <= number <= highest:
        return number
    most = f" and at most {highest}" if text.isascii() and text.isdigit() and number != 0 else ""
    raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {lowest}{most}")


def add_asking(parser: argparse.ArgumentParser) -> None:
    """Flags that say how a model is asked, where that is not as it was trained."""
    parser.add_argument("--privileged-template", help="text with {prompt} and {privileged_context}")
    parser.add_argument("--chat-template-kwargs", help="as in training, as YAML: '{enable_thinking: false}'")
    parser.add_argument("--prompt-format", choices=["auto", "text"], help="what a text means, as in training")


def as_asked(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of these flags, as fields of `dopd.runs.circumstances.Circumstances`."""
    from dopd.runs.settings import yaml_mapping

    return {
        "privileged_template": arguments.privileged_template,
        "chat_template_kwargs": yaml_mapping("--chat-template-kwargs", arguments.chat_template_kwargs),
        "prompt_format": arguments.prompt_format,
    }


def add_server(parser: Any, variable: str) -> None:
    """Flags that say how a model on a server is asked.

    Args:
        parser: a parser, or a group of its arguments.
        variable (`str`): of the environment, where the key is looked for.
    """
    key = "variable of the environment that has the key, where the server wants one (default %(default)s)"
    parser.add_argument("--key-variable", default=variable, metavar="NAME", help=key)
    parser.add_argument("--concurrency", type=positive, default=8, help="requests at a time (default 8)")
    parser.add_argument("--timeout", type=seconds, default=300.0, help="seconds of a request (default 300)")
    parser.add_argument("--retries", type=int, default=8, help="how often a request is sent again (default 8)")
    parser.add_argument("--price-in", type=float, default=0.0, help="of a million tokens of prompts")
    parser.add_argument("--price-out", type=float, default=0.0, help="of a million tokens of replies")
    parser.add_argument("--budget", type=float, help="most that all replies for the output may cost, earlier ones too")
    parser.add_argument(
        "--request", help="what else requests say, as YAML: '{reasoning_effort: low, temperature: null}'"
    )


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Flags that name rows in the place of a task's problems, as in training."""
    parser.add_argument("--dataset-name", help="held-out rows: a hub id, folder or file (default: those of the run)")
    parser.add_argument("--dataset-config", help="configuration of that dataset")
    parser.add_argument("--dataset-test-split", help="its split, or a slice: 'test[:200]' (default: the only one)")
    parser.add_argument("--columns", help="its names of columns, as YAML: '{prompt: question, answer: solution}'")
    add_verifier(parser)


_VERIFIERS = "math, exact, choice, code, judge, package.module:name or ./file.py:name"


def add_verifier(parser: Any, whose: str = "") -> None:
    """Flags that name who scores answers; the parser may be a group of one."""
    parser.add_argument("--verifier", help=f"{whose}{_VERIFIERS}")
    parser.add_argument("--verifier-options", help="of the verifier, as YAML: '{allow_code_execution: true}'")


def rows_as_given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of these flags, as fields of `dopd.runs.circumstances.Circumstances`."""
    from dopd.runs.settings import yaml_mapping

    names = ("dataset_name", "dataset_config", "dataset_test_split", "verifier")
    found = {name: getattr(arguments, name) for name in names}
    options = {"verifier_options": yaml_mapping("--verifier-options", arguments.verifier_options)}
    return found | options | {"columns": yaml_mapping("--columns", arguments.columns)}


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", help="a file, a folder or a hub id, or task:NAME")
    parser.add_argument("--columns", help="its names of columns, as YAML: '{privileged_context: hint}'")
    parser.add_argument("--dataset-config", help="configuration of a hub dataset")
    parser.add_argument(
        "--split", help="its split, or a slice: 'train[:200]' (default: the only one; of a task: train)"
    )
    parser.add_argument("--task-options", help="of a task, as YAML: '{num_needed: 3}'")
    parser.add_argument("--rows", type=positive, help="rows at most, from the first on (of a task: default 256)")


def data_as_named(arguments: argparse.Namespace, kind: str | None = None) -> "HintData":
    """The rows that the flags of `add_data` name."""
    from dopd.runs.hints import HintData
    from dopd.runs.settings import yaml_mapping

    columns = yaml_mapping("--columns", arguments.columns) or {}
    options = yaml_mapping("--task-options", arguments.task_options) or {}
    return HintData(arguments.data, arguments.dataset_config, arguments.split, columns, kind, arguments.rows, options)
