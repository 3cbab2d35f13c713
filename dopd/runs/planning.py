"""What a run will need before anything is there for it: memory, time and money, and what to change where it does not
fit.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dopd.errors import ConfigError, DopdError, first_line
from dopd.runs import memory
from dopd.runs.effort import Clock, Device, Efficiency, Effort
from dopd.runs.settings import RunSettings
from dopd.runs.sizes import ModelSize, sizes_of_run, unloaded
from dopd.runs.splits import Split
from dopd.sources import SOURCES
from dopd.tables import RoutingTable
from dopd.trainer import DOPDConfig

_LEFT = 0.9  # of a server's memory, that is weights: the rest is for its cache


@dataclass(frozen=True)
class Machine:
    """Where a run is to be.

    Attributes:
        device (`Device`): each of its devices.
        split (`Split`): how the run is split over them.
        efficiency (`Efficiency`): what of the published figures is reached.
        answer (`int`, *optional*): mean tokens of an answer; the longest if left out.
        server (`str`, *optional*): the model on `teacher_server`: a hub id or a folder with its `config.json`.
        server_devices (`int`, *optional*): devices of that server; as few as hold its weights if left out.
    """

    device: Device
    split: Split
    efficiency: Efficiency = field(default_factory=Efficiency)
    answer: int | None = None
    server: str | None = None
    server_devices: int | None = None


@dataclass(frozen=True)
class Change:
    """Something that makes a run smaller.

    Attributes:
        text (`str`): what to write, and what it costs.
        peak (`float`): bytes on each device with it.
    """

    text: str
    peak: float


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        config (`DOPDConfig`), machine (`Machine`): of the run, and where it is to be.
        answers, prompt, answer (`int`): completions of a step, and tokens of a prompt and of an answer, on average.
        memory (`dict`): phase -> bytes on each device by what takes them.
        effort (`dict[str, Effort]`): phase -> what it takes; `teacher on a server` among them.
        server_devices (`int`): devices that the teacher's server needs, as far as is known.
        changes (`list[Change]`): where it does not fit.
        waiting (`int`): bytes of the CPU's memory that several teachers take for each device.
    """

    config: DOPDConfig
    machine: Machine
    answers: int
    prompt: int
    answer: int
    memory: dict[str, memory.Parts]
    effort: dict[str, Effort]
    server_devices: int
    changes: list[Change]
    waiting: int = 0

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes of every phase together."""
        return memory.totals(self.memory)

    @property
    def peak(self) -> float:
        return max(self.peaks.values())

    @property
    def room(self) -> float:
        """Bytes of a device; what its maker's GB leave to its GiB is for what the allocator cannot use."""
        return 1e9 * self.machine.device.memory

    @property
    def fits(self) -> bool:
        return self.peak <= self.room

    @property
    def seconds(self) -> float:
        """Of a step; the phases follow one another, and sending does not overlap with computing."""
        return sum(one.seconds + one.communication for one in self.effort.values())

    @property
    def gpu_hours(self) -> float:
        """Of 1,000 steps, those of the teacher's server included."""
        return self.seconds * 1000 / 3600 * (self.machine.split.devices + self.server_devices)


@dataclass(frozen=True)
class _Run:
    """A run of which parts are changed to see what that does."""

    settings: RunSettings
    config: DOPDConfig
    split: Split
    student: ModelSize
    teacher: ModelSize | None
    table: RoutingTable

    def phases(self, room: float) -> dict[str, memory.Parts]:
        return memory.phases(
            self.student, self.teacher, self.config, self.table, split=self.split, room=memory.Room(True, room)
        )

    def peak(self, room: float) -> float:
        return max(memory.totals(self.phases(room)).values())

    def with_config(self, **changed: Any) -> "_Run":
        config = copy.copy(self.config)
        for name, value in changed.items():
            setattr(config, name, value)
        return replace(self, config=config)


def make_plan(settings: RunSettings, config: DOPDConfig, machine: Machine) -> Plan:
    """What a run needs on a machine, from configurations alone: no weight and no row is read.

    Raises:
        ConfigError: a model whose configuration cannot be read from here, or batches that do not hold whole groups of
            rollouts.
    """
    rows, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    answers = rows * accumulation * machine.split.devices
    if answers % config.num_generations:
        raise ConfigError(
            f"per_device_train_batch_size (={rows}) x GPUs (={machine.split.devices}) x gradient_accumulation_steps "
            f"(={accumulation}) = {answers} completions a step must be a multiple of num_generations "
            f"(={config.num_generations}), the rollouts of each prompt"
        )
    student, teacher = _sizes(settings, config)
    run = _Run(settings, config, machine.split, student, teacher, config.routing_table())
    longest = int(config.max_completion_length or 0)
    clock = Clock(config, machine.split, machine.device, machine.efficiency, machine.answer or longest)
    effort = clock.phases(student, teacher, run.table)
    served, devices = _served(config, machine, clock)
    room = 1e9 * machine.device.memory
    changes = [] if run.peak(room) <= room else list(_changes(run, room))
    effort |= {} if served is None else {"teacher on a server": served}
    phases = run.phases(room)
    waiting = 0 if teacher is None else teacher.waiting
    return Plan(config, machine, answers, clock.prompt, clock.answer, phases, effort, devices, changes, waiting)


def _sizes(settings: RunSettings, config: DOPDConfig) -> tuple[ModelSize, ModelSize | None]:
    try:
        return sizes_of_run(settings, config)
    except DopdError:
        raise
    except Exception as error:  # readers of configurations fail in many ways
        teacher = config.teacher_model_name_or_path if config.loads_teacher else None
        names = [settings.model_name_or_path, teacher, *config.several_teachers.values()]
        raise ConfigError(
            f"the configuration of {' or '.join(repr(name) for name in names if name)} cannot be read: "
            f"{first_line(error)}. A folder that holds its config.json alone will do"
        ) from error


def _served(config: DOPDConfig, machine: Machine, clock: Clock) -> tuple[Effort | None, int]:
    """What the teacher's server does in a step, and its devices."""
    if config.teacher_server is None or machine.server is None:
        return None, 0
    try:
        size = ModelSize.of(unloaded(machine.server, "bfloat16", {}))
    except DopdError:
        raise
    except Exception as error:
        raise ConfigError(
            f"--server-model (={machine.server!r}): its configuration cannot be read: {first_line(error)}. A folder "
            "that holds its config.json alone will do"
        ) from error
    devices = machine.server_devices or -(-size.weights // int(_LEFT * 1e9 * machine.device.memory))
    views = sum(SOURCES[source].model == "teacher" for source in config.routing_table().sources)
    everywhere = replace(clock, split=Split())
    flop = views * machine.split.devices * (everywhere.pass_flop(size, shared=False) + everywhere.head_flop(size))
    seconds = flop / (devices * 1e12 * machine.device.half * machine.efficiency.compute)
    return Effort(flop / devices, seconds), devices


# --- What to change


def _changes(run: _Run, room: float) -> Iterator[Change]:
    """Changes that make a run smaller, each alone; and where none is enough, the first ones that are together."""
    alone = [Change(text, changed.peak(room)) for text, changed in _candidates(run)]
    smaller = [change for change in alone if change.peak < run.peak(room)]
    yield from smaller
    if any(change.peak <= room for change in smaller):
        return
    together, texts = run, list[str]()
    while together.peak(room) > room:
        best = min(_candidates(together), key=lambda one: one[1].peak(room), default=None)
        if best is None or best[1].peak(room) >= together.peak(room):
            return
        together = best[1]
        texts.append(best[0].split(" (")[0])
        if together.peak(room) <= room:
            yield Change(f"together: {'; '.join(texts)}", together.peak(room))


def _candidates(run: _Run) -> Iterator[tuple[str, _Run]]:
    config, rows = run.config, run.config.per_device_train_batch_size
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing: true (a second forward pass)", run.with_config(gradient_checkpointing=True)
    if rows > 1 and rows % 2 == 0:
        half, twice = rows // 2, 2 * config.gradient_accumulation_steps
        changed = run.with_config(per_device_train_batch_size=half, gradient_accumulation_steps=twice)
        yield f"per_device_train_batch_size: {half}, gradient_accumulation_steps: {twice} (time)", changed
    scored = config.per_device_scoring_batch_size or 4 * rows
    if scored > 1:
        changed = run.with_config(per_device_scoring_batch_size=scored // 2)
        yield f"per_device_scoring_batch_size: {scored // 2} (time)", changed
    if config.share_prompts and run.split.weights == 1:
        yield "share_prompts: false (time)", run.with_config(share_prompts=False)
    if config.use_vllm and config.vllm_mode == "colocate" and not config.vllm_enable_sleep_mode:
        changed = run.with_config(vllm_enable_sleep_mode=True)
        yield "vllm_enable_sleep_mode: true (its weights are read again in every step)", changed
    chunk = (config.loss_chunk_tokens or memory.GPU_TILE_BYTES // (8 * run.student.vocabulary)) // 2
    if chunk >= 64:
        yield f"loss_chunk_tokens: {chunk} (a little time)", run.with_config(loss_chunk_tokens=chunk)
    if run.split.devices > 1 and run.split.weights == 1:
        for name in ("zero2", "fsdp2", "zero3"):
            yield (
                f"--accelerate_config {name} (weights or gradients are sent)",
                replace(run, split=Split.named(name, run.split.devices)),
            )
    if run.teacher is not None and run.teacher.element == 4:
        size = run.teacher
        weights, waiting, heads = (count // 2 for count in (size.weights, size.waiting, size.heads))
        halved = replace(size, element=2, weights=weights, waiting=waiting, heads=heads)
        yield "teacher_model_init_kwargs: {dtype: bfloat16} (rounding)", replace(run, teacher=halved)
    if run.teacher is not None:
        yield "teacher_server: URL (the teacher on other GPUs)", replace(run, teacher=None)
    if not run.settings.use_peft and not run.student.adapted:
        with_adapters = replace(run.settings, use_peft=True, lora_target_modules="all-linear", dtype="bfloat16")
        try:
            student, _ = sizes_of_run(with_adapters, run.config)
        except DopdError:  # PEFT is not here, or cannot adapt this model
            return
        text = f"use_peft: true, lora_r: {run.settings.lora_r}, lora_target_modules: all-linear, dtype: bfloat16"
        yield f"{text} (adapters alone train)", replace(run, settings=with_adapters, student=student)
