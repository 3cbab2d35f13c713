"""What a run would meet: `dopd doctor CONFIG` and `dopd train CONFIG --dry-run` look at the same things, here."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from dopd.checkpoints import TINY
from dopd.data.contexts import rows_for_view
from dopd.data.views import Prompt, plain_prompt, privileged_prompt
from dopd.errors import ConfigError, DopdError, ServerError
from dopd.files import leaving_no_folder, make_folder, not_written
from dopd.runs import memory
from dopd.runs.beforehand import run_problems
from dopd.runs.build import check_files
from dopd.runs.hub import unreachable
from dopd.runs.row_files import names_files
from dopd.runs.servers import compare_with_local, describe_servers
from dopd.runs.settings import RunSettings
from dopd.runs.sizes import sizes_of_run
from dopd.runs.train import check_folder, make_config, make_trainer
from dopd.settings import Problems
from dopd.shown import shown_bytes
from dopd.sources import LIVE, PLAIN, SELF, TEACHER_SOURCES
from dopd.trainer import DOPDConfig, DOPDTrainer
from dopd.trainer.folder import RunFolder
from dopd.trainer.images import where_from
from dopd.trainer.served import ask_server
from dopd.trainer.teachers import check_teachers_of, counted, field

Level = Literal["ok", "note", "here", "fail"]

_ROLES = {"model": "student", "teacher_model": "teacher"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level (`str`): `ok`; `note`, worth knowing; `here`, what this machine lacks and another may have; `fail`.
        text (`str`): in words.
    """

    level: Level
    text: str


def examine(settings: RunSettings, *, token_ids: bool = False, local_teacher: str | None = None) -> Iterator[Finding]:
    """Look at a run without training: names, memory, models, vocabularies, rows, and how row 0 is read.

    Args:
        settings (`RunSettings`): the run.
        token_ids (`bool`): also give the token ids of row 0.
        local_teacher (`str`, *optional*): a model that the one on `teacher_server` is compared with.

    Raises:
        SettingsError, ConfigError: settings that cannot work on any machine.
    """
    config = make_config(settings, elsewhere=True)
    if local_teacher is not None and (config.teacher_server is None or not config.routing_table().needs_teacher):
        raise ConfigError(
            f"--local-teacher (={local_teacher!r}) is compared with the teacher on teacher_server, which the run does "
            "not read: leave it out"
        )
    if local_teacher is not None and isinstance(config.teacher_server, Mapping):
        raise ConfigError(
            f"--local-teacher (={local_teacher!r}) is one model, and teacher_server has several teachers: leave it "
            "out, or look at one of them at a time (--teacher_server URL)"
        )
    yield Finding("ok", f"settings and table fit together: {config.routing_table().describe().splitlines()[0]}")
    absent = list(_absent(settings, config))
    yield from (Finding("here", text) for text in absent)
    lacking = _lacking(settings)
    place = list(_place(settings, config))
    yield from place
    loads = not absent and all(finding.level == "note" for finding in place)
    if not absent:
        for finding in (*_memory(settings, config), *_files(settings, config)):
            loads = loads and finding.level == "ok"
            yield finding
    if loads:
        loaded = _loaded(settings, config, token_ids=token_ids, local_teacher=local_teacher)
        yield from (finding for finding in loaded if finding.text not in lacking)
    else:  # a trainer would have asked the server
        yield from _unanswered(config)
    yield from (Finding("here", problem) for problem in lacking)


def _lacking(settings: RunSettings) -> list[str]:
    """What stands against the run on this machine alone."""
    config, problems = None, Problems()
    with problems.collected():
        config = DOPDConfig(**settings.trainer)
    if config is not None:
        problems.add(*run_problems(settings, config, elsewhere=False))
    return problems.found


def _place(settings: RunSettings, config: DOPDConfig) -> Iterator[Finding]:
    """What stands against the folder of the run: what is in it, or that it cannot be made here."""
    folder = RunFolder(settings.output_dir)
    try:
        with leaving_no_folder(folder.path):
            check_folder(folder, settings, config, overwrite=settings.overwrite)
            make_folder(folder.path)
    except DopdError as error:
        yield Finding("note", str(error))
    except OSError as error:
        yield Finding("here", str(not_written(error, folder.path, choose="another output_dir") or error))


def _absent(settings: RunSettings, config: DOPDConfig) -> Iterator[str]:
    """Models and data of a hub that cannot be reached from here."""
    teacher = config.teacher_model_name_or_path if config.loads_teacher else None
    models = {"model_name_or_path": settings.model_name_or_path, "teacher_model_name_or_path": teacher}
    models |= {field(name): model for name, model in config.several_teachers.items()}
    for key, name in models.items():
        reason = None if name is None or name.startswith(TINY) else unreachable(name, "model")
        if reason:
            yield f"{key} (={name!r}) cannot be looked at: {reason}"
    for key, data in (("dataset_name", settings.dataset_name), ("dataset_eval_name", settings.dataset_eval_name)):
        reason = None if data is None or names_files(data) else unreachable(str(data), "dataset")
        if reason:
            yield f"{key} (={data!r}) cannot be looked at: {reason}"


def _unanswered(config: DOPDConfig) -> Iterator[Finding]:
    """A teacher's server that does not answer."""
    try:
        ask_server(config)
    except ServerError as error:
        yield Finding("here", str(error))


def _files(settings: RunSettings, config: DOPDConfig) -> Iterator[Finding]:
    """The tensors of models in folders beside their classes; no weight is read for it."""
    teacher = config.teacher_model_name_or_path if config.loads_teacher else None
    several = ((name, True) for name in config.several_teachers.values())
    models = ((settings.model_name_or_path, False), (teacher, True), *several)
    problems = Problems()
    for name, is_teacher in models:
        if name is not None:
            with problems.collected():
                check_files(name, **where_from(config, teacher=is_teacher))
    yield from (Finding("fail", problem) for problem in problems.found)


def _memory(settings: RunSettings, config: DOPDConfig) -> Iterator[Finding]:
    """The memory of each phase beside what is there; nothing is loaded for it."""
    try:
        student, teacher = sizes_of_run(settings, config)
    except DopdError as error:
        yield Finding("fail", str(error))
        return
    except Exception:  # readers of configurations fail in many ways, and the loader says what is wrong with a model
        return
    needed = memory.totals(memory.phases(student, teacher, config, config.routing_table()))
    where, there = memory.available()
    shown = ", ".join(f"{phase} {shown_bytes(count)}" for phase, count in needed.items())
    enough = max(needed.values()) <= there
    advice = "" if enough else ". Lower batch sizes or lengths, or set gradient_checkpointing, use_peft, load_in_4bit"
    yield Finding(
        "ok" if enough else "here",
        f"memory of each process, about: {shown}; {where} {shown_bytes(there)} (prompts of "
        f"{memory.prompt_tokens(config)} tokens, answers of {config.max_completion_length})"
        f"{advice}",
    )


def _loaded(
    settings: RunSettings, config: DOPDConfig, *, token_ids: bool, local_teacher: str | None
) -> Iterator[Finding]:
    try:
        with leaving_no_folder(settings.output_dir):  # the host makes it
            trainer = make_trainer(settings, config)
    except ServerError as error:
        yield Finding("here", str(error))
        return
    except DopdError as error:
        yield Finding("fail", str(error))
        return
    yield Finding("ok", f"models, vocabularies, data and table fit together ({len(trainer.train_dataset)} prompts)")
    for name, model in trainer.named_models():
        count = sum(parameter.numel() for parameter in model.parameters())
        about = f"{type(model).__name__}, {count / 1e6:.1f} M parameters, {model.dtype}"
        yield Finding("ok", f"{_ROLES.get(name, name)}: {about}")
    if trainer.teacher_names:
        counts = check_teachers_of(trainer.train_dataset, trainer.teacher_names)
        yield from (Finding("ok" if all(counts.values()) else "note", text) for text in counted(counts))
    yield from _served(config, trainer, local_teacher)
    yield Finding("ok", plan(trainer))
    for name, readers, ids in row_views(trainer):
        text = f"row 0, {name} view ({', '.join(readers)}), {len(ids)} tokens:\n{trainer.tokenizer.decode(ids)}"
        yield Finding("ok", f"{text}\n{ids}" if token_ids else text)


def _served(config: DOPDConfig, trainer: DOPDTrainer, local_teacher: str | None) -> Iterator[Finding]:
    """The teacher on a server: what it is, and what each rule gets of it."""
    served = config.served_table()
    if trainer.served is None or served is None:
        return
    try:
        for name, teacher in trainer.served.teachers.items():
            of_rows = f"rows with teacher_id {name}: " if name else ""
            yield from (Finding("ok", of_rows + text) for text in describe_servers(teacher))
        if local_teacher is not None:
            *_, (_, _, ids) = row_views(trainer)
            yield Finding("ok", compare_with_local(trainer.served.teachers[""], local_teacher, ids))
    except DopdError as error:
        yield Finding("fail", str(error))
    level: Level = "ok" if config.teacher_server_support == "exact" else "note"
    yield from (Finding(level, f"from the server: {note}") for note in served.notes)


def plan(trainer: DOPDTrainer) -> str:
    """Steps, prompts and tokens of a run."""
    args, rows = trainer.args, len(trainer.train_dataset)
    repeats = trainer.repeats()
    prompts = repeats["batch_size"]
    an_epoch = max(len(trainer.get_train_dataloader()) // args.gradient_accumulation_steps, 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)
    answers = prompts * repeats["mini_repeat_count"]
    tokens = steps * answers * int(args.max_completion_length or 0)
    return (
        f"{steps} steps of {prompts} prompts x {repeats['mini_repeat_count']} answers: {steps * prompts} prompts of "
        f"{rows} rows ({steps / an_epoch:.2g} epochs), {steps * answers} answers of at most "
        f"{args.max_completion_length} tokens, {tokens} tokens at most"
    )


def row_views(trainer: DOPDTrainer) -> Iterator[tuple[str, list[str], list[int]]]:
    """The first row as each view reads it: the view's name, who reads it, and the token ids. A teacher that reads it
    otherwise than the student is apart.
    """
    for name, readers, prompt in _prompts_of_views(trainer):
        view = trainer.prompts.shared_view([prompt], "cpu")
        ids = view.prompt_ids[0].tolist()
        teachers = ids if view.for_teacher is None else view.for_teacher.prompt_ids[0].tolist()
        own = [reader for reader in readers if reader in TEACHER_SOURCES] if teachers != ids else []
        for names, read in (([reader for reader in readers if reader not in own], ids), (own, teachers)):
            if names:
                yield name, names, read


def _prompts_of_views(trainer: DOPDTrainer) -> Iterator[tuple[str, list[str], Prompt]]:
    table, row = trainer.table, trainer.train_dataset[0]
    (own,) = trainer.prompts.read_by_student([row], table)
    readers = {
        view: sorted({name for part in table.parts for name in {*part.sources, LIVE} if part.view_of(name) == view})
        for view in table.views
    }
    student = ["student", *(name for name in readers.get(table.student_view, []) if name != "student")]
    yield table.student_view, student, plain_prompt(own)
    origins = {"privileged": table.context, "contrast": table.contrast}
    for view in sorted(table.views - {table.student_view}):
        asked = trainer.prompts.asked_row(row)
        if view == PLAIN:
            yield view, readers[view], plain_prompt(asked)
        elif view != SELF and origins.get(view) != "sibling":  # those are answers, which there are none of yet
            (view_row,) = rows_for_view(view, table, [asked])
            yield view, readers[view], privileged_prompt(view_row, trainer.prompts.template)
