"""How long a step takes: floating-point operations and bytes by phase, over what devices do in a second.

`docs/explanation/scaling.md` has the formulas in words.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dopd.runs.memory import prompt_tokens
from dopd.runs.sizes import ModelSize
from dopd.runs.splits import Split
from dopd.sources import SOURCES
from dopd.tables import RoutingTable
from dopd.trainer.config import DOPDConfig

_LOSS_PRODUCTS = 4  # of all tokens' states and the head, at most: student, target, and two for gradients
_OF_ONE_MACHINE = 8  # devices


@dataclass(frozen=True)
class Device:
    """What makers publish of a device.

    Attributes:
        memory (`float`): GB.
        half, full (`float`): TFLOP/s without sparsity, in bfloat16 and in float32.
        bandwidth (`float`): GB/s of its memory.
        link (`float`): GB/s in one direction to the other devices of its machine.
        network (`float`): GB/s in one direction to other machines, for each device.
    """

    memory: float
    half: float
    full: float
    bandwidth: float
    link: float
    network: float = 50.0


DEVICES = {
    "a100": Device(80, 312, 19.5, 2039, 300, 25),
    "h100": Device(80, 989, 67, 3350, 450),
    "h200": Device(141, 989, 67, 4800, 450),
    "l40s": Device(48, 362, 91, 864, 32, 25),
    "rtx4090": Device(24, 165, 83, 1008, 32, 3),
}


@dataclass(frozen=True)
class Efficiency:
    """Shares of what makers publish that runs reach, and the time of a step of `generate`.

    Attributes:
        compute (`float`): of the floating-point operations, in passes over many tokens.
        bandwidth (`float`): of the memory's and the links' bandwidth.
        layer_milliseconds (`float`): that `generate` takes for a layer of every token, whatever its size: kernels are
            started one by one. vLLM, which replays them, takes a tenth.
    """

    compute: float = 0.4
    bandwidth: float = 0.6
    layer_milliseconds: float = 0.8


@dataclass(frozen=True)
class Effort:
    """What a phase of a step takes on each device.

    Attributes:
        flop (`float`): floating-point operations.
        seconds (`float`): of computing, or of reading memory where that takes longer.
        communication (`float`): seconds in which weights or gradients are sent.
    """

    flop: float = 0.0
    seconds: float = 0.0
    communication: float = 0.0


@dataclass(frozen=True)
class Clock:
    """Turns operations and bytes of a run into seconds.

    Attributes:
        config (`DOPDConfig`), split (`Split`): of the run.
        device (`Device`), efficiency (`Efficiency`): of the machine.
        answer (`int`): mean tokens of an answer.
    """

    config: DOPDConfig
    split: Split
    device: Device
    efficiency: Efficiency
    answer: int

    @property
    def rows(self) -> int:
        """Completions of a step on each device."""
        return self.config.per_device_train_batch_size * self.config.gradient_accumulation_steps

    @property
    def prompt(self) -> int:
        return prompt_tokens(self.config)

    def phases(self, student: ModelSize, teacher: ModelSize | None, table: RoutingTable) -> dict[str, Effort]:
        """Effort of `rollouts`, `scoring` and `training` of one step.

        Args:
            student, teacher (`ModelSize`): the models; the teacher if it is in this process.
            table (`RoutingTable`): the method.
        """
        return {
            "rollouts": self._rollouts(student) if table.needs_rollouts else Effort(),
            "scoring": self._scoring(student, teacher, table),
            "training": self._training(student, len(table.parts)),
        }

    def pass_flop(self, size: ModelSize, *, shared: bool) -> float:
        """Operations of a forward pass over a step's completions behind their prompts, without the head."""
        prompts = self.rows / self.config.num_generations if shared else self.rows
        tokens = prompts * self.prompt + self.rows * self.answer
        # Each token looks at those before it: half of a prompt, and all of it from an answer.
        pairs = prompts * self.prompt**2 / 2 + self.rows * self.answer * (self.prompt + self.answer / 2)
        return 2.0 * size.active * tokens + 4.0 * size.queries * size.layers * pairs

    def head_flop(self, size: ModelSize) -> float:
        """Operations of one product of the head with the states of every completion token."""
        return 2.0 * size.vocabulary * size.hidden * self.rows * self.answer

    def _seconds(self, flop: float, size: ModelSize) -> float:
        half = self.config.bf16 or self.config.fp16 or size.element == 2
        peak = self.device.half if half else self.device.full
        return flop / (1e12 * peak * self.efficiency.compute)

    def _sent(self, count: float) -> float:
        """Seconds in which bytes reach a device."""
        link = self.device.link if self.split.devices <= _OF_ONE_MACHINE else self.device.network
        return count / (1e9 * link * self.efficiency.bandwidth)

    def _rollouts(self, student: ModelSize) -> Effort:
        flop = self.pass_flop(student, shared=False) + self.head_flop(student)
        element = 2 if self.config.bf16 or self.config.fp16 else student.element
        weights = (student.active + student.vocabulary * student.hidden) * element
        cache = self.rows * (self.prompt + self.answer / 2) * student.cached * element
        bytes_of_step = (weights + cache) / (1e9 * self.device.bandwidth * self.efficiency.bandwidth)
        kernels = student.layers * self.efficiency.layer_milliseconds / 1e3 * (0.1 if self.config.use_vllm else 1.0)
        seconds = max(self._seconds(flop, student), self.answer * max(bytes_of_step, kernels))
        gathers = (
            0 if self.split.weights == 1 else 1 if self.split.gathers_whole or self.config.use_vllm else self.answer
        )
        return Effort(flop, seconds, gathers * self._sent(student.weights))

    def _scoring(self, student: ModelSize, teacher: ModelSize | None, table: RoutingTable) -> Effort:
        flop = seconds = communication = 0.0
        scored = self.config.per_device_scoring_batch_size or 4 * self.config.per_device_train_batch_size
        passes = -(-self.rows // scored)
        for size, parts in self._scored(student, teacher, table):
            shared = self.config.share_prompts and self.split.weights == 1
            own = self.pass_flop(size, shared=shared) + self.head_flop(size)
            flop, seconds = flop + own, seconds + self._seconds(own, size)
            communication += self._sent(passes * size.weights) if parts > 1 else 0.0
        return Effort(flop, seconds, communication)

    def _scored(
        self, student: ModelSize, teacher: ModelSize | None, table: RoutingTable
    ) -> Iterator[tuple[ModelSize, int]]:
        for source in (source for part in table.parts for source in sorted(part.sources)):
            if SOURCES[source].model != "teacher" or self.config.teacher_is_base:
                yield student, self.split.weights
            elif teacher is not None:
                yield teacher, self.split.teacher

    def _training(self, student: ModelSize, parts: int) -> Effort:
        """Of so many parts of a table, each with a forward and a backward pass of its own."""
        config = self.config
        checkpointing = bool(config.gradient_checkpointing or getattr(config, "activation_checkpointing", False))
        shared = config.share_prompts and not checkpointing and self.split.weights == 1
        # A backward pass is two products for each of the forward's, one where the weight is frozen.
        passes = (2 if student.adapted else 3) + int(checkpointing)
        products = _LOSS_PRODUCTS - int(not student.head_trains)
        flop = parts * (passes * self.pass_flop(student, shared=shared) + products * self.head_flop(student))
        communication = 0.0
        if self.split.weights > 1:
            gathers = config.gradient_accumulation_steps * (2 + int(checkpointing))
            communication = self._sent(gathers * student.weights + config.gradient_accumulation_steps * student.trained)
        elif self.split.devices > 1:
            communication = self._sent(2.0 * student.trained)
        return Effort(flop, self._seconds(flop, student), communication)
