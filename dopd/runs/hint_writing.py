"""Hints for the rows of a dataset: written by a model, found by a rule, or those of other problems."""

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from dopd.errors import ConfigError, DataError, DopdError, first_line
from dopd.files import replace_file
from dopd.guests import as_guest
from dopd.hints import chat
from dopd.hints.answers import answer_text
from dopd.hints.audit import HINT_KIND, audit_rows
from dopd.hints.boxes import pictures_of, sizes_of
from dopd.hints.journal import Reply
from dopd.hints.kinds import FOUND
from dopd.hints.others import of_other_problems
from dopd.hints.replies import WrittenHint, hint_of_reply
from dopd.hints.templates import filled, prompt_of
from dopd.inspection.schema import prompt_text
from dopd.interrupts import Stopped
from dopd.progress import tracked
from dopd.registry import is_reference, load_code
from dopd.runs.asking import AskerSettings, Bill, ask_all
from dopd.runs.hints import HintData, list_of, rows_of
from dopd.runs.rows import located_in
from dopd.step.verifier import own_copy
from dopd.tasks import get_source
from dopd.tasks.gsm_symbolic import privileged_text

RULES = "rules"
_SUFFIXES = (".jsonl", ".parquet")
# Kind of hint -> kinds of p of tasks, the first that a task has.
_OF_TASKS = {
    "steps": ("hints_without_execution",),
    "steps-with-execution": ("hints_with_execution",),
    "summary": ("summarised_hint",),
    "answer": ("final_answer",),
    "boxes": ("box_label", "box_caption"),
    "caption": ("caption",),
}
_OF_SOLUTIONS = ("steps", "steps-with-execution", "summary")


@dataclass
class Written:
    """What was written.

    Attributes:
        num_rows, num_hints, num_leaks (`int`): rows, those with a hint, and hints that leak.
        reasons (`dict[int, str]`): why a row has none.
        bill (`Bill`): of the writer.
        output (`Path`), left_out (`Path`): the rows with their hints, and those without one with the reason.
    """

    num_rows: int
    num_hints: int
    num_leaks: int
    reasons: dict[int, str]
    bill: Bill
    output: Path
    left_out: Path = field(default_factory=Path)

    @property
    def counted(self) -> Counter[str]:
        """Rows without a hint, by the reason without its particulars."""
        return Counter(reason.partition(":")[0] for reason in self.reasons.values())


def write_hints(
    data: HintData, kind: str, writer: AskerSettings, output: str, *, prompt_file: str | None = None, seed: int = 0
) -> Written:
    """Write the rows of a dataset with hints of a kind as `privileged_context`.

    Args:
        data (`HintData`): the rows.
        kind (`str`): one of `dopd.hints.kinds.KINDS`.
        writer (`AskerSettings`): `where` is an address, a model of this machine, `"rules"`, or a function of your own
            as `package.module:function` or `./file.py:function`, which is called with each row and gives text or
            `None`.
        output (`str`): a `.jsonl` or `.parquet` file. Replies are kept beside it, in `OUTPUT.journal.jsonl`: what was
            asked is not asked again. Rows without a hint are in `OUTPUT.left_out.jsonl`, with the reason.
        prompt_file (`str`, *optional*): what the writer is asked, in the place of the package's text.
        seed (`int`): of `other-problem`.

    Raises:
        ConfigError, DataError: what cannot work, and the fix.
        ServerError, ServerLostError: the writer refuses, or does not answer; the journal keeps what was received.
    """
    path = output_path(output, "--output", data)
    own_rule = is_reference(writer.where)
    is_asked = kind not in FOUND and writer.where != RULES and not own_rule
    template = prompt_of(kind, prompt_file) if is_asked else ""
    if prompt_file is not None and not is_asked:
        raise ConfigError(f"--prompt-file (={prompt_file!r}) is for models: kind {kind} by {writer.where} asks none")
    rows = rows_of(data, needs=("prompt", *(["privileged_context"] if kind == "other-problem" else [])))
    bill = Bill()
    if kind == "other-problem":
        hints = _of_others(rows, seed)
    elif own_rule:
        hints = _by_own_rule(rows, kind, writer.where)
    elif writer.where == RULES or kind == "answer":
        hints = _by_rule(data, rows, kind)
    else:
        try:
            hints, bill = _by_model(rows, kind, writer, template, journal_of(path))
        except DataError as error:
            raise (error if data.task is not None else located_in(error, data.origin)) from error
    return _finished(rows, hints, kind, bill, path)


def journal_of(path: Path) -> Path:
    """Where replies for an output are kept."""
    return path.with_name(f"{path.name}.journal.jsonl")


def output_path(output: str, flag: str, data: HintData) -> Path:
    """The file of an output.

    Raises:
        ConfigError: another ending than that of JSON lines or Parquet; the file that the rows are read from.
    """
    path = Path(output).expanduser()
    if path.exists() and path.resolve() == Path(data.name).expanduser().resolve():
        raise ConfigError(f"{flag} (={output!r}) is DATA itself, which would be written over: choose another file")
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{flag} (={output!r}) must end in {' or '.join(_SUFFIXES)}")
    return path


def _of_others(rows: Dataset, seed: int) -> list[WrittenHint]:
    questions = [prompt_text(prompt) for prompt in rows["prompt"]]
    found = of_other_problems(questions, list(rows["privileged_context"]), seed)
    return [WrittenHint(hint, reason="" if hint is not None else "the row has no hint") for hint in found]


def _by_rule(data: HintData, rows: Dataset, kind: str) -> list[WrittenHint]:
    """Hints that need no model: of a task, or of worked solutions with equations."""
    if data.task is not None:
        kinds = get_source(data.task, **data.task_options).privileged_kinds
        of_task = next((one for one in _OF_TASKS[kind] if one in kinds), None)
        if of_task is None:
            raise ConfigError(f"task {data.task!r} has no hints of kind {kind}: it has {', '.join(kinds)}")
        again = rows_of(replace(data, kind=of_task))
        return [WrittenHint(text) for text in again["privileged_context"]]
    if kind == "answer":
        answers = [answer_text(row) for row in list_of(rows)]
        missing = "the row names no answer"
        return [WrittenHint(one and f"The final answer is {one}.", reason="" if one else missing) for one in answers]
    if kind not in _OF_SOLUTIONS or "solution" not in rows.column_names:
        raise ConfigError(
            f"--writer rules makes {kind} of a task (DATA task:NAME){_needs(kind, rows)}: name a model or an address"
        )
    return [_of_solution(row, kind) for row in list_of(rows)]


def _needs(kind: str, rows: Dataset) -> str:
    if kind not in _OF_SOLUTIONS:
        return ""
    return f", or of a column 'solution'; the rows have {', '.join(rows.column_names)}"


def _of_solution(row: Mapping[str, Any], kind: str) -> WrittenHint:
    solution, answer = row.get("solution"), answer_text(row)
    lines = solution.strip().splitlines() if isinstance(solution, str) else []
    steps = [line.strip() for line in lines if line.strip() and not line.strip().startswith("####")]
    if answer is None or not any("=" in step for step in steps):
        return WrittenHint(None, reason="its solution has no equation that a rule could leave open")
    of_task = _OF_TASKS[kind][0]
    text = privileged_text(prompt_text(row["prompt"]), steps, answer, of_task)
    return WrittenHint(text)


def _by_own_rule(rows: Dataset, kind: str, name: str) -> list[WrittenHint]:
    """What a function of the user's makes of each row: text, or `None` where it makes nothing of it."""
    rule = load_code("--writer", name)
    hints = []
    for number, row in enumerate(tracked("writing hints", "row", list_of(rows))):
        try:
            with as_guest("the writer"):
                text = rule(own_copy(row))
        except (DopdError, KeyboardInterrupt, Stopped):
            raise
        except BaseException as error:
            raise ConfigError(
                f"--writer (={name!r}) raised {type(error).__name__}: {first_line(error)}, for row {number}. It is "
                f"called with a row ({', '.join(row)}), and gives its hint as text, or None"
            ) from error
        if text is not None and not isinstance(text, str):
            raise ConfigError(f"--writer (={name!r}) gave {type(text).__name__}, row {number}: expected text or None")
        found = WrittenHint(None, reason="the rule gives none")
        hints.append(found if text is None else hint_of_reply(Reply(text, "stop", 0, 0), kind, sizes_of(row)))
    return hints


def _by_model(
    rows: Dataset, kind: str, writer: AskerSettings, template: str, journal: Path
) -> tuple[list[WrittenHint], Bill]:
    asker = writer.asker("--writer", "writing hints")
    name, settings = asker.model(), writer.settings
    requests, sizes = [], []
    for number, row in enumerate(list_of(rows)):
        pictures = pictures_of(row)
        if kind in ("boxes", "caption") and not pictures:
            raise DataError(f"row {number}: it has no image, and hints of kind {kind} are about images")
        sizes.append(sizes_of(row))
        try:
            requests.append(chat.request(name, filled(template, row, kind=kind, sizes=sizes[-1]), pictures, settings))
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
    replies, bill = ask_all(asker, requests, journal, writer.prices)
    return [_hint(reply, kind, size) for reply, size in zip(replies, sizes, strict=True)], bill


def _hint(reply: Reply | None, kind: str, sizes: Sequence[tuple[int, int]]) -> WrittenHint:
    return WrittenHint(None, reason="the budget was used up") if reply is None else hint_of_reply(reply, kind, sizes)


def _finished(rows: Dataset, hints: Sequence[WrittenHint], kind: str, bill: Bill, path: Path) -> Written:
    columns: dict[str, list[Any]] = {"privileged_context": [one.text for one in hints], HINT_KIND: [kind] * len(rows)}
    if any(one.boxes is not None for one in hints):
        columns["boxes"] = [one.boxes for one in hints]
    done = with_new_columns(rows, columns)
    write_rows(done, path)
    reasons = {n: one.reason for n, one in enumerate(hints) if one.text is None}
    left_out = path.with_name(f"{path.name}.left_out.jsonl")
    write_reasons(left_out, [{"row": n, "reason": reason} for n, reason in reasons.items()])
    looked_at = audit_rows(list_of(done))
    return Written(len(rows), len(rows) - len(reasons), len(looked_at.leaks), reasons, bill, path, left_out)


def with_new_columns(rows: Dataset, columns: Mapping[str, Sequence[Any]]) -> Dataset:
    """The rows with columns in the place of those of the same names."""
    rows = rows.remove_columns([name for name in columns if name in rows.column_names])
    for name, values in columns.items():
        rows = rows.add_column(name, list(values))
    return rows


def write_rows(rows: Dataset, path: Path) -> None:
    """Write rows as JSON lines or Parquet, in one piece.

    Raises:
        DataError: pictures as bytes, which JSON cannot hold.
    """
    buffer = io.BytesIO()
    if path.suffix == ".parquet":
        rows.to_parquet(buffer)
    else:
        try:
            lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in list_of(rows)]
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{str(path)!r}: a column holds what JSON cannot ({error}): give --output the ending .parquet"
            ) from error
        buffer.write("".join(f"{line}\n" for line in lines).encode())
    replace_file(path, buffer.getvalue())


def write_reasons(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the side file of an output; none is left from an earlier call where there is nothing to say."""
    if records:
        lines = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
        replace_file(path, lines.encode())
    else:
        path.unlink(missing_ok=True)
