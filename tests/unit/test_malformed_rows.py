"""Every kind of value in every place of a row: used with the user's words in it, or refused with row and column."""

import datetime
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from compatibility import tried
from trainer_kit import STUDENT, TASK, TEACHER, trainer

from dopd.data import beside
from dopd.errors import DataError
from dopd.tiny.models import build_model
from dopd.tiny.tokenizer import build_tokenizer, task_vocabulary
from dopd.trainer import preflight

USER = {"role": "user", "content": "B"}
VALUES: dict[str, Any] = {
    "None": None,
    "empty text": "",
    "blank text": " \n",
    "text": "B",
    "text with a null character": "B\0B",
    "half of a surrogate pair": "B \ud800",
    "text that begins like JSON": "{",
    "JSON of a conversation": '[{"role": "user", "content": "B"}]',
    "Python of a conversation": "[{'role': 'user', 'content': 'B'}]",
    "JSON of schemas": '[{"type": "function", "function": {"name": "f"}}]',
    "JSON of a mapping": '{"enable_thinking": false}',
    "bytes": b"B",
    "int": 7,
    "float": 1.5,
    "bool": True,
    "not a number": float("nan"),
    "decimal": Decimal("1.5"),
    "date": datetime.date(2024, 1, 1),
    "time": datetime.datetime(2024, 1, 1),
    "set": {"B"},
    "tuple": ("B",),
    "empty list": [],
    "list of None": [None],
    "list of int": [7],
    "list of lists": [[]],
    "list of text": ["B"],
    "list of empty mappings": [{}],
    "empty mapping": {},
    "mapping": {"a": 1},
    "turn": USER,
    "conversation": [USER],
    "block": [{"type": "text", "text": "B"}],
    "blank block": [{"type": "text", "text": " "}],
    "block without type": [{"text": "B"}],
    "block without text": [{"type": "text"}],
    "block whose text is None": [{"type": "text", "text": None}],
    "block whose text is int": [{"type": "text", "text": 7}],
    "block of half a pair": [{"type": "text", "text": "\udfff"}],
    "block of video": [{"type": "video", "video": "x.mp4"}],
    "block of an unknown type": [{"type": "thought", "text": "B"}],
    "block whose type is int": [{"type": 7, "text": "B"}],
    "schemas": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "schema without a name": [{"type": "function", "function": {}}],
}
SOME_TEXT = {"text", "text with a null character", "text that begins like JSON"}
WRITTEN = {"JSON of a conversation", "Python of a conversation", "JSON of schemas", "JSON of a mapping"}
ANY_TEXT = SOME_TEXT | WRITTEN | {"half of a surrogate pair"}
NOTHING = {"None", "empty text", "blank text"}
# Where a value stands, the column that a message must name, and the values that can be used there. The template here
# writes no tools and no names of roles.
PLACES: dict[str, tuple[Callable[[Any], dict[str, Any]], str, set[str]]] = {
    "prompt": (
        lambda value: {"prompt": value},
        "prompt",
        SOME_TEXT | {"JSON of schemas", "JSON of a mapping", "conversation"},
    ),
    "first turn": (lambda value: {"prompt": [value, USER]}, "prompt", {"turn"}),
    "only turn": (lambda value: {"prompt": [value]}, "prompt", {"turn"}),
    "role": (lambda value: {"prompt": [{"role": value, "content": "B"}, USER]}, "prompt", ANY_TEXT),
    "only role": (lambda value: {"prompt": [{"role": value, "content": "B"}]}, "prompt", set()),
    "content of the user": (
        lambda value: {"prompt": [{"role": "user", "content": value}]},
        "prompt",
        SOME_TEXT | WRITTEN | {"block"},
    ),
    "content of the system": (
        lambda value: {"prompt": [{"role": "system", "content": value}, USER]},
        "prompt",
        SOME_TEXT | WRITTEN | {"empty text", "blank text", "block", "blank block", "empty list"},
    ),
    "content of the assistant": (
        lambda value: {"prompt": [USER, {"role": "assistant", "content": value}, USER]},
        "prompt",
        SOME_TEXT | WRITTEN | {"empty text", "blank text", "block", "blank block", "empty list"},
    ),
    "privileged_context": (
        lambda value: {"privileged_context": value},
        "privileged_context",
        SOME_TEXT | WRITTEN | NOTHING,
    ),
    "tools": (lambda value: {"tools": value}, "tools", NOTHING | {"empty list"}),
    "chat_template_kwargs": (
        lambda value: {"chat_template_kwargs": value},
        "chat_template_kwargs",
        NOTHING | {"empty mapping", "mapping", "turn", "JSON of a mapping"},
    ),
    "images": (lambda value: {"images": value}, "images", NOTHING | {"empty list", "list of None"}),
    "image": (lambda value: {"image": value}, "image", NOTHING | {"empty list", "list of None"}),
    "privileged_images": (
        lambda value: {"privileged_images": value},
        "privileged_images",
        NOTHING | {"empty list", "list of None"},
    ),
}


class Rows:
    """A dataset that keeps values as they are: tables of `datasets` would change or refuse some of them."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # Words that are not in the vocabulary are another matter: here it has those of every value.
    more = {word for value in VALUES.values() if isinstance(value, str) for word in value.split() if word.isascii()}
    words = build_tokenizer(sorted({*task_vocabulary(), *more}))
    models = {"model": build_model(STUDENT, words, 0), "teacher_model": build_model(TEACHER, words, 1)}
    return trainer(tmp_path_factory.mktemp("run"), processing_class=words, **models)


@pytest.mark.parametrize("place", PLACES)
def test_a_value_is_used_or_refused_with_row_and_column(place: str, made: Any) -> None:
    build, column, usable = PLACES[place]
    good = TASK.rows("train", 1, "hints_without_execution")[0]
    wrong = []
    for name, value in VALUES.items():
        row = {"prompt": [USER], "privileged_context": "B"} | build(value)
        before = good | {key: None for key in row if key not in good}
        if isinstance(row["prompt"], str):
            before["prompt"] = "B"
        try:
            preflight._prepared(made, Rows([before, row]))
        except DataError as error:
            message = str(error)
            told = "row 1" in message and repr(column) in message and "\n" not in message
            if name in usable or not told or len(message) > 500:
                wrong.append(f"{name}: {message}")
        else:
            if name not in usable:
                wrong.append(f"{name}: used")
    assert not wrong, "\n".join(wrong)
    tried("dataset", f"{len(VALUES)} kinds of values as {place}", "used or refused, row and column named")


def test_paths_of_pictures_are_looked_for_in_whatever_stands_in_a_prompt(tmp_path: Path) -> None:
    for value in VALUES.values():
        for prompt in (value, [value], [[value]], [{"role": "user", "content": value}], [{"content": [[value]]}]):
            assert beside._turns(prompt, [tmp_path]) == prompt or value is VALUES["not a number"]
