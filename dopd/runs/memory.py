"""How much memory a run will take on each device, phase by phase, from the models' sizes alone.

`docs/explanation/scaling.md` has the formulas in words. Numbers of a layer that autograd keeps are those of the decoder
layers of transformers: two norms that compute in float32, attention that keeps no scores, and a gated MLP.
"""

from dataclasses import dataclass, field

import torch

from dopd.fused.products import CPU_TILE_BYTES, GPU_TILE_BYTES
from dopd.runs.sizes import ModelSize
from dopd.runs.splits import ONE_DEVICE, Split
from dopd.sources import SOURCES
from dopd.tables import RoutingTable
from dopd.trainer.config import DOPDConfig
from dopd.trainer.optimizer_states import kept_bytes

PROMPT_TOKENS = 512  # of a prompt, where no limit says how long they are
CONTEXT = 2**30  # bytes that CUDA and its libraries keep on a GPU

Parts = dict[str, float]  # bytes by what takes them


@dataclass(frozen=True)
class Room:
    """What a run is asked to fit into.

    Attributes:
        gpu (`bool`): a GPU, rather than a machine without one.
        total (`float`): its bytes; what vLLM takes is a share of them.
    """

    gpu: bool = True
    total: float = 0.0


def prompt_tokens(config: DOPDConfig) -> int:
    """Tokens of a prompt as they are counted: those of `max_prompt_length`, or `PROMPT_TOKENS`."""
    return config.max_prompt_length or PROMPT_TOKENS


def phases(
    student: ModelSize,
    teacher: ModelSize | None,
    config: DOPDConfig,
    table: RoutingTable,
    *,
    split: Split = ONE_DEVICE,
    room: Room | None = None,
) -> dict[str, Parts]:
    """Bytes on each device at the height of each phase, by what takes them; an estimate from above.

    Args:
        student, teacher (`ModelSize`): the models; the teacher if the table reads one in this process.
        config (`DOPDConfig`): batch sizes and lengths. Every view of a prompt counts as `prompt_tokens(config)` long,
            and every answer as the longest.
        table (`RoutingTable`): the method.
        split (`Split`): what is split over devices.
        room (`Room`, *optional*): the device; that of this machine if left out.

    Returns:
        `weights`, `rollouts`, `scoring`, `training` and `update`. Each of the last four holds what stays throughout.
    """
    return _Phases(student, teacher, config, table, split, room or Room(torch.cuda.is_available())).all()


def totals(needed: dict[str, Parts]) -> dict[str, float]:
    """Bytes of each phase together."""
    return {phase: sum(parts.values()) for phase, parts in needed.items()}


@dataclass
class _Phases:
    student: ModelSize
    teacher: ModelSize | None
    config: DOPDConfig
    table: RoutingTable
    split: Split
    room: Room
    stays: Parts = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.config
        self.prompt = prompt_tokens(config)
        self.answer = int(config.max_completion_length or 0)
        self.length = self.prompt + self.answer
        self.rows = config.per_device_train_batch_size
        self.answers = self.rows * config.gradient_accumulation_steps
        self.mixed = bool(config.bf16 or config.fp16)
        self.element = 2 if self.mixed else self.student.element
        self.checkpointing = bool(config.gradient_checkpointing or getattr(config, "activation_checkpointing", False))
        self.sharing = config.share_prompts and self.split.weights == 1

    def all(self) -> dict[str, Parts]:
        weights: Parts = {"student": self.student.weights / self.split.weights}
        weights |= {} if self.teacher is None else {"teacher": self._teacher_that_stays(self.teacher)}
        weights |= {"anchors": self._anchors()}
        weights |= {"CUDA": float(CONTEXT)} if self.room.gpu else {}
        # From the first step on the optimizer's states are there in every phase.
        self.stays = weights | {"optimizer": self._optimizer()}
        if self.split.devices > 1 and self.split.gradients == 1 and self.split.optimizer == 1:
            self.stays["DDP's buckets"] = float(self.student.trained)  # gradients are sent from copies
        engine = self._engine()
        rollouts = self.stays | engine | self._rollouts()
        self.stays |= {} if self.config.vllm_enable_sleep_mode else engine
        return {
            "weights": weights,
            "rollouts": rollouts,
            "scoring": self.stays | self._scoring(),
            "training": self.stays | self._training(),
            "update": self.stays | {"gradients": self._gradients()} | self._update(),
        }

    # --- What stays

    def _teacher_that_stays(self, teacher: ModelSize) -> float:
        """A teacher's weights; of several that wait on the CPU the heads, and all of them where that is the device."""
        if teacher.waiting:
            return float(teacher.heads if self.room.gpu else teacher.waiting)
        return teacher.weights / self.split.teacher

    def _anchors(self) -> float:
        """Copies of what trains; a moving average under adapters is a matrix for each layer that they change."""
        student, table = self.student, self.table
        copies = int(any(SOURCES[source].model == "initial" for source in table.sources))
        if table.anchor == "ema" and student.adapted:
            return float(copies * student.trained + 4 * student.matrices) / self.split.weights
        copies += int(table.anchor != "current")
        in_float32 = 4 * student.trainable if table.anchor == "ema" and student.element < 4 else 0
        return (copies * student.trained + in_float32) / self.split.weights

    def _optimizer(self) -> float:
        name = str(getattr(self.config.optim, "value", self.config.optim))
        element = self.student.trained // max(self.student.trainable, 1)
        return self.student.trainable * kept_bytes(name, element) / self.split.optimizer

    def _gradients(self) -> float:
        return self.student.trained / self.split.gradients

    def _engine(self) -> Parts:
        if not self.config.use_vllm or self.config.vllm_mode != "colocate":
            return {}
        return {"vLLM": self.config.vllm_gpu_memory_utilization * self.room.total}

    def _gathered(self, size: ModelSize, parts: int) -> float:
        """Of a split model: the layer that runs, the next one, and its embeddings."""
        if parts == 1:
            return 0.0
        layers = size.matrices * size.element / max(size.layers, 1)
        return 2 * layers + max(size.weights - size.matrices * size.element, 0)

    def _casts(self, size: ModelSize, *, trained: bool = False) -> float:
        """Half-precision copies that autocast makes of wider matrices, and keeps through a pass where they train."""
        if not self.mixed or size.element == 2:
            return 0.0
        layers = 2.0 * size.matrices if trained and not size.adapted else 2.0 * size.matrices / max(size.layers, 1)
        return layers + 2.0 * size.vocabulary * size.hidden

    # --- Phases

    def _rollouts(self) -> Parts:
        if self.config.use_vllm or self.answer == 0:
            return {}
        student = self.student
        token = student.cached * self.element
        # Every step puts a layer's cache, with a new token, in a new place, and samples from logits in float32.
        layer = self.answers * self.length * token / student.layers
        step = {"keys and values": self.answers * self.length * token,
                "of a pass": layer + 3 * 4 * self.answers * student.vocabulary}  # fmt: skip
        begin = {"keys and values": self.answers * self.prompt * token,
                 "of a pass": self.answers * self.prompt * self._of_a_pass(student, self.prompt)}  # fmt: skip
        whole = float(student.weights) if self.split.gathers_whole else None
        return _higher(step, begin) | {
            "gathered": self._gathered(student, self.split.weights) if whole is None else whole,
            "in half precision": self._casts(student, trained=True),
        }

    def _of_a_pass(self, size: ModelSize, length: int) -> float:
        """Bytes for a token in a layer that keeps nothing: the wider of its MLP and its attention, beside the states
        that the model, the layer and its parts hold.
        """
        inside = max(3 * size.inner, 5 * size.queries + 2 * size.keys + length)
        return float(inside * self._element_of(size) + 4 * size.hidden * size.element + length)

    def _scoring(self) -> Parts:
        scored = min(self.config.per_device_scoring_batch_size or 4 * self.rows, self.answers)
        models = {"student": self.student} | ({} if self.teacher is None else {"teacher": self.teacher})
        highest: Parts = {}
        for name in sorted({self._reads(source) for source in self.table.sources} & set(models)):
            size = models[name]
            parts = self.split.weights if name == "student" else self.split.teacher
            # The states of all answers stand beside those of the batches that they are put together from.
            states = self.answers * self.answer * size.hidden * self._element_of(size)
            beside = {
                "in half precision": self._casts(size, trained=name == "student"),
                "gathered": self._gathered(size, parts),
            }
            walked = self._walked(size, scored) | {"states": float(states)} | beside
            highest = _higher(highest, walked, {"logits": self._logits(1), "states": 2.0 * states} | beside)
        in_turn = self.teacher is not None and self.teacher.waiting and self.room.gpu
        turn = {"teacher in its turn": float(self.teacher.weights)} if self.teacher is not None and in_turn else {}
        return highest | {"targets": self._targets()} | turn

    def _walked(self, size: ModelSize, rows: int) -> Parts:
        """A pass over `rows` sequences that keeps nothing, their prompts together or once each."""
        if not self.sharing:
            return {"of a pass": rows * self.length * self._of_a_pass(size, self.length)}
        prompts, token = self._prompts(rows), size.cached * self._element_of(size)
        first = {"of a pass": prompts * self.prompt * self._of_a_pass(size, self.prompt),
                 "keys and values": float(prompts * self.prompt * token)}  # fmt: skip
        second = {"of a pass": rows * self.answer * self._of_a_pass(size, self.length),
                  "keys and values": float(rows * self.length * token)}  # fmt: skip
        return _higher(first, second)

    def _prompts(self, rows: int) -> int:
        """Different prompts of some completions that stand side by side."""
        return -(-rows // self.config.num_generations)

    def _reads(self, source: str) -> str:
        own = SOURCES[source].model != "teacher" or self.config.teacher_is_base
        return "student" if own else "teacher"

    def _element_of(self, size: ModelSize) -> int:
        return 2 if self.mixed else size.element

    def _targets(self) -> float:
        """Last hidden states of all answers that the loss takes its targets from."""
        widths = [
            size.hidden * self._element_of(size)
            for part in self.table.parts
            for source in sorted(part.target_sources)
            for size in [self.teacher if self._reads(source) == "teacher" else self.student]
            if size is not None
        ]
        return float(self.answers * self.answer * sum(widths))

    def _logits(self, tiles: int) -> float:
        """A chunk of logits."""
        budget = GPU_TILE_BYTES if self.room.gpu else CPU_TILE_BYTES
        if self.config.loss_chunk_tokens:
            budget = 4 * tiles * self.config.loss_chunk_tokens * self.student.vocabulary
        tokens = self.answers if tiles == 1 else self.rows
        return float(min(budget, 4 * tiles * tokens * self.answer * self.student.vocabulary))

    def _training(self) -> Parts:
        student, accumulates = self.student, self.config.gradient_accumulation_steps > 1
        gathered = self._gathered(student, self.split.weights)
        casts = self._casts(student, trained=not self.checkpointing)
        kept, layer = self._kept()
        states = self.rows * self.length * student.hidden * student.element
        # The head's gradient is summed up in float32, and then stands beside the states' gradients.
        head = student.vocabulary * student.hidden if student.head_trains else 0
        loss = self._logits(2) + head * (4 + student.element)
        # As the backward pass goes down the layers, gradients take the place of what was kept for them.
        kept *= len(self.table.parts)  # of each part a pass, and one backward for all
        begin = {"activations": kept, "loss, or states of the backward pass": max(loss, 2 * states + 4.0 * head)}
        begin |= {"gradients": self._gradients()} if accumulates else {}
        end = {"activations": layer, "loss, or states of the backward pass": 2.0 * states}
        end |= {"gradients": self._gradients()}
        beside = {"targets": self._targets(), "gathered": gathered, "in half precision": casts}
        return _higher(begin, end) | beside

    def _kept(self) -> tuple[float, float]:
        """Bytes that autograd keeps of a micro-batch, and of one layer of it."""
        student, tokens = self.student, self.rows * self.length
        layer = tokens * layer_bytes(student, self.length, mixed=self.mixed)
        if self.checkpointing:
            return layer + tokens * student.layers * student.hidden * student.element, layer
        if self.sharing:
            prompts = self._prompts(self.rows)
            layer = prompts * self.prompt * layer_bytes(student, self.prompt, mixed=self.mixed)
            layer += self.rows * self.answer * layer_bytes(student, self.length, mixed=self.mixed)
            # Answers read the keys and values of their whole prompt, repeated for each of them.
            layer += self.rows * self.prompt * 2 * student.queries * self.element
        return layer * student.layers, layer

    def _update(self) -> Parts:
        """What AdamW computes with: on a GPU a copy for all weights, elsewhere some of the largest one."""
        name = str(getattr(self.config.optim, "value", self.config.optim))
        copies = self.student.trained if self.room.gpu else 3 * self.student.largest
        return {"of the optimizer": 0.0 if "fused" in name else copies / self.split.optimizer}


def _higher(*parts: Parts) -> Parts:
    """Of several moments of a phase, the one that takes most."""
    return max(parts, key=lambda one: sum(one.values()))


def layer_bytes(size: ModelSize, length: int, *, mixed: bool) -> float:
    """Bytes for each token that autograd keeps of one decoder layer.

    Args:
        size (`ModelSize`): the model.
        length (`int`): tokens of a sequence: each keeps a row of the attention mask.
        mixed (`bool`): passes run under autocast to half precision.
    """
    h, q, k, f = size.hidden, size.queries, size.keys, size.inner
    element = 2 if mixed else size.element
    casts = mixed and size.element != 2
    if not size.adapted:
        norms = 2 * h * (4 + size.element)
        inputs = (5 if casts else 2) * h * element
        heads = (q + k) * (4 + element) if size.normed else 0
        return float(norms + inputs + heads + (4 * q + 4 * f + length) * element)
    # Frozen matrices keep no inputs; adapters do, each in its own precision.
    own = element if mixed else size.adapters or element
    apart = mixed or own != size.element
    norms, inputs = 2 * h * 4, (5 if apart else 2) * h * own
    heads = (q + k) * 4 if size.normed else 0
    attention = 4 * q * element + (q * own if apart else 0)
    return float(norms + inputs + heads + attention + 3 * f * element + f * own + length * element)


def available() -> tuple[str, int]:
    """Where models will be, and the bytes that are there: of the GPU, or of the machine that has none."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"a {properties.name} has", int(properties.total_memory)
    import psutil

    return "this machine, without a GPU, has", int(psutil.virtual_memory().available)
