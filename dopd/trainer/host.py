"""TRL's `DistillationTrainer` behind public, typed names: the one module that reads the host's private ones.

A test fails by name when a release of TRL changes one of them.
"""

import math
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from trl import DistillationTrainer
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import repeat_iterable_dataset

from dopd.evaluation.privileged_drift import PrivilegedStart
from dopd.heads import Head
from dopd.sampling import Ending
from dopd.servers import ServedTeachers
from dopd.settings import as_mapping
from dopd.step import Engine, PromptEncoder, ScoredBatch
from dopd.step.rewards import Judge
from dopd.tables import RoutingTable
from dopd.trainer.anchor import AbstractAnchor
from dopd.trainer.config import DOPDConfig
from dopd.trainer.sharded_teacher import can_be_split, reshard, split
from dopd.trainer.teachers import ParkedTeachers, field
from dopd.vocabulary import shared_vocab_size

if TYPE_CHECKING:
    from dopd.trainer.models import TrainedModels

_OF_LAYERS = ("every_n_layers", "offload")  # of checkpointing: what is transformers' own beside torch's arguments
# Methods of the host that this package overrides or calls.
HOST_HOOKS = (
    "get_train_dataloader",
    "_get_train_sampler",
    "_get_dataloader",
    "_prepare_inputs",
    "compute_loss",
    "log",
    "training_step",
    "train",
    "_determine_best_metric",
    "save_model",
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_best_model",
    "_load_optimizer_and_scheduler",
    "_push_from_checkpoint",
    "_get_output_dir",
)


def _add_columns(table: Path, columns: Mapping[str, Iterable[Any]]) -> None:
    """Add columns to a table of completions, which the host writes without any; one of several types is text."""
    import pandas

    frame = pandas.read_parquet(table)
    for name, values in columns.items():
        column = list(values)
        kinds = {type(value) for value in column if value is not None}
        mixed = len(kinds) > 1 and not kinds <= {int, float}
        frame[name] = [None if value is None else str(value) for value in column] if mixed else column
    frame.to_parquet(table)


class HostTrainer(DistillationTrainer):
    """The host, and what the parts of a run read of the trainer that is built on it.

    Attributes:
        table (`RoutingTable`): the method.
        prompts (`PromptEncoder`): reads rows as views.
        models (`TrainedModels`): student, teacher and the student's other weights.
        ending (`Ending`): of the answers.
        judge (`Judge`): gives answers scores and rewards.
        engine (`Engine`): draws the answers.
        teacher_candidate: the teacher's own processor, if it has other settings than the student's; it is used if it
            encodes prompts otherwise.
        balance_coefficient (`float`): of the load-balancing loss of experts; 0 without.
        anchor, initial (`AbstractAnchor`): the weights of the privileged student, and the student's first ones.
        served (`ServedTeachers`, *optional*): the teachers, where they are on servers.
        parked (`ParkedTeachers`): the teachers, where there are several.
        privileged_start (`PrivilegedStart`, *optional*): what the student answered with p before training.
        first_weights, teacher_weights (`str`): digests of the models as they were before a process split them.
    """

    # The host declares these more widely than they are here.
    args: DOPDConfig
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    train_dataset: Any
    eval_dataset: Any
    processing_class: Any
    chat_template_kwargs: dict[str, Any]
    eos_token_ids: list[int]

    table: RoutingTable
    prompts: PromptEncoder
    models: "TrainedModels"
    ending: Ending
    engine: Engine
    judge: Judge
    teacher_candidate: Any
    balance_coefficient: float
    anchor: AbstractAnchor
    initial: AbstractAnchor
    served: ServedTeachers | None
    parked: ParkedTeachers
    first_weights: str
    teacher_weights: str
    privileged_start: PrivilegedStart | None = None

    _extra: dict[str, deque[Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._extra = {}
        # TRL asks models by a name that later transformers warn of at every user's first step.
        warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
        # The host would put a whole copy on the device of every process.
        teacher = kwargs.get("teacher_model")
        self.splits_teacher = can_be_split(teacher, kwargs["args"])
        super().__init__(*args, **(kwargs | {"teacher_model": None} if self.splits_teacher else kwargs))
        if self.splits_teacher:
            self.teacher_model = teacher

    def split_teacher(self) -> None:
        """Split a teacher that is whole until it has been looked at, where the student will be split so."""
        if self.splits_teacher:
            self.teacher_model = split(self.accelerator, self.teacher_model)

    # --- What the host knows

    @property
    def run_folder(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def unwrapped_student(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def unwrapped_teacher(self) -> Any:
        """The teacher, or `None` where the table reads none."""
        return None if self.teacher_model is None else self.accelerator.unwrap_model(self.teacher_model)

    @property
    def loaded_models(self) -> list[Any]:
        """Student and teacher, unwrapped; of teachers as many as there are."""
        models = [self.unwrapped_student, self.unwrapped_teacher, *self.parked.models.values()]
        return [model for model in models if model is not None]

    def named_models(self) -> Iterator[tuple[str, Any]]:
        """Student and teachers, unwrapped, on their device while they are looked at, by their names in messages."""
        yield "model", self.unwrapped_student
        if self.unwrapped_teacher is not None:
            yield "teacher_model", self.unwrapped_teacher
        for name in self.parked.models:
            with self.parked.in_place(name) as model:
                yield field(name), model

    @property
    def teacher_names(self) -> list[str]:
        """Those that rows have for several teachers; none where one reads every row."""
        return [*self.parked.models] if self.served is None else self.served.names

    def is_teacher(self, model: object) -> bool:
        """Whether an unwrapped model is a teacher of this process."""
        return model is not None and (model is self.unwrapped_teacher or self.parked.has(model))

    @property
    def scored_vocab_size(self) -> int:
        """Ids from 0 on that student and teacher both have."""
        return shared_vocab_size(self.loaded_models)

    @property
    def is_split(self) -> bool:
        """Whether weights may be split over processes, which then must run equally often."""
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    @property
    def is_half(self) -> bool:
        """Whether passes compute in half precision although weights may be wider."""
        return self.accelerator.mixed_precision != "no"

    @property
    def progress(self) -> float:
        """The share of the training that is over, in [0, 1]."""
        return self.state.global_step / max(self.state.max_steps, 1)

    @property
    def micro_step(self) -> int:
        """Micro-batches trained on so far."""
        return self._step

    # --- Models behind their wrappers

    def through_wrapper(self, wrapped: nn.Module, method: Any, *arguments: Any) -> Any:
        """`method(unwrapped model, *arguments)`, run as the forward pass of what distributes the model."""
        unwrapped = self.accelerator.unwrap_model(wrapped)
        return self._forward_redirection(wrapped, unwrapped, method, unwrapped, *arguments)

    def through_teacher(self, teacher: Any, method: Any, *arguments: Any) -> Any:
        """As `through_wrapper`, from the unwrapped teacher; one that nothing distributes is called itself."""
        wrapped = teacher if self.teacher_model is None else self.teacher_model
        try:
            return self.through_wrapper(wrapped, method, *arguments)
        finally:
            if self.splits_teacher:
                reshard(wrapped)

    @contextmanager
    def whole_student(self) -> Iterator[Any]:
        """The student with whole parameters, ready for `generate`."""
        options = as_mapping(self.args.gradient_checkpointing_kwargs)
        of_layers = {name: options.pop(name) for name in _OF_LAYERS if name in options}
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=options or None,  # without any, the host has its own
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield model
        if of_layers and self.args.gradient_checkpointing:  # the host has switched it on for every layer
            model.gradient_checkpointing_disable()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None, **of_layers)

    def answers_of_vllm(
        self, prompt_ids: list[list[int]], pictures: list[Any] | None
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Answers of the host's vLLM, whose weights are brought up to date first, and the log-probs of their tokens."""
        if self.state.global_step != self._last_loaded_step:
            self.vllm_generation.sync_weights()
            self._last_loaded_step = self.state.global_step
        asked: dict[str, Any] = {"prompts": prompt_ids, "images": pictures, "num_generations": 1}
        _, drawn, logprobs, among = self.vllm_generation.generate(**asked)
        if logprobs is None or among is None:
            return drawn, None
        # Of a token the likeliest others may be there too.
        values = [
            [dict(zip(ids, numbers, strict=True)).get(token, math.nan) for token, ids, numbers in zip(*of, strict=True)]
            for of in zip(drawn, among, logprobs, strict=True)
        ]
        return drawn, values

    # --- What is logged

    @property
    def host_metrics(self) -> dict[str, list[float]]:
        return self._metrics["train" if self.model.training else "eval"]

    def record(self, metrics: Mapping[str, float]) -> None:
        """Hand metrics to the host, which averages them until it logs."""
        logged = self.host_metrics
        for name, value in metrics.items():
            logged[name].append(value)

    def record_tokens(self, count: int) -> None:
        """Add the tokens of a step, of all processes, to those that the run has seen."""
        if self.model.training:
            self.state.num_input_tokens_seen += count
        self.host_metrics["num_tokens"] = [self.state.num_input_tokens_seen]

    def record_texts(
        self, prompts: Sequence[str], completions: Sequence[str], extra: Mapping[str, Sequence[Any]]
    ) -> None:
        """Hand over texts for the host's table of completions (`log_completions`), and further columns of it."""
        texts = {"prompt": list(prompts), "completion": list(completions)}
        before = len(self._logs["prompt"])
        for name, values in texts.items():
            self._logs[name].extend(gather_object(values))
        for name in sorted({*gather_object(list(extra)), *self._extra}):  # the same order on all processes
            column = self._extra.setdefault(name, deque([None] * before, self._logs["prompt"].maxlen))
            column.extend(gather_object(list(extra.get(name, [None] * len(prompts)))))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The host writes its table of completions at every log, also where there are none yet.
        asked, self.log_completions = self.log_completions, self.log_completions and bool(self._logs["prompt"])
        try:
            super().log(logs, start_time)
            if self.log_completions and self._extra and self.accelerator.is_main_process:
                name = f"completions_{self.state.global_step:05d}.parquet"
                _add_columns(self.run_folder / "completions" / name, self._extra)
        finally:
            self.log_completions = asked

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Whether metrics are the best so far, by `metric_for_best_model`; the host remembers them."""
        return self._determine_best_metric(metrics, None)

    # --- Hooks of the host, and what takes their place

    @abstractmethod
    def next_micro_batch(self, rows: list[dict[str, Any]]) -> list[ScoredBatch]:
        """The texts to learn from next, for each part of the table; `rows` are those of a whole step, and are answered
        once."""

    @abstractmethod
    def micro_batch_targets(self, parts: list[ScoredBatch]) -> list[dict[str, tuple[Tensor, Head]]]:
        """Hidden states and heads of the sources whose whole distributions the loss of a micro-batch reads."""

    @abstractmethod
    def micro_batch_loss(
        self, student: Any, parts: list[ScoredBatch], targets: list[dict[str, tuple[Tensor, Head]]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The share of a micro-batch in the loss of its step, and sums for its statistics; `student` is unwrapped."""

    @abstractmethod
    def record_loss(self, loss: float, sums: dict[str, Tensor]) -> None:
        """Called after the pass of a micro-batch, outside of the wrapper's forward: processes may talk here."""

    @abstractmethod
    def prompt_sampler(self, dataset: Dataset) -> Sampler:
        """The order of the prompts, each as often as it is answered."""

    @abstractmethod
    def repeats(self) -> dict[str, int]:
        """How a step repeats its prompts, in the words of the host's samplers."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        return self.next_micro_batch(generation_batch)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Outside of the student's forward pass: other weights may stand in its place meanwhile.
        targets = self.micro_batch_targets(inputs)
        loss, sums = self.through_wrapper(model, self.micro_batch_loss, inputs, targets)
        self.record_loss(loss.item(), sums)
        return (loss, None) if return_outputs else loss

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return self.prompt_sampler(self.train_dataset if dataset is None else dataset)

    def get_train_dataloader(self) -> DataLoader:
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset):
            if self.shuffle_dataset:
                dataset = dataset.shuffle(seed=self.args.seed)
            dataset = repeat_iterable_dataset(dataset, **self.repeats())
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.gradient_accumulation_steps,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )
