"""`DOPDConfig`: TRL's `DistillationConfig` and what dual on-policy distillation adds to it."""

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Gt, Lt
from trl import DistillationConfig

from dopd.data.views import RESERVED_OPTIONS, PrivilegedTemplate
from dopd.errors import ConfigError, DopdError, first_line
from dopd.fused.api import Backend
from dopd.methods import table
from dopd.rollout_settings import rollout_settings
from dopd.secrets import is_secret, without_secrets
from dopd.servers import ServedTable, ServerSupport, served_table, teacher_places
from dopd.settings import Count, Natural, NotNegative, Positive, Problems, Text, check_attributes
from dopd.settings.documented import document_fields
from dopd.settings.places import at_home, left_open
from dopd.sources import Anchor
from dopd.tables import RoutingTable
from dopd.trainer.arguments import known_arguments_only
from dopd.trainer.best import check_choice_of_checkpoint, read_early_stop, student_metric
from dopd.trainer.host_settings import check_mappings, trainer_settings
from dopd.trainer.monitors import read_limits
from dopd.trainer.resuming import checkpoint_to_resume

Overlong = Literal["error", "drop"]
PromptFormat = Literal["auto", "text"]
Importance = Literal["none", "truncated"]
_TRL_BETA_DEFAULT = 1.0


_OWN_PLACES = ("deepspeed", "method", "output_dir", "resume_from_checkpoint", "teacher_model_name_or_path")
BASE = "base"  # as teacher: what is below the student's adapter


@dataclass
class DOPDConfig(DistillationConfig):
    r"""
    Configuration of [`DOPDTrainer`]: these fields, and every field of TRL's `DistillationConfig` and
    `transformers.TrainingArguments`.

    Parameters:
        > Parameters that control the method

        method (`str`, *optional*, defaults to `"dopd"`):
            Name of a routing table, such as `"dopd"` or `"vanilla"` (`dopd.methods.METHODS`); a function of your own
            that returns one, as `"package.module:function"` or `"./file.py:function"`; or a name for `rules`.
        rules (`list[dict]`, *optional*):
            Rows of a routing table of one's own, in place of the named one: mappings with the fields of `dopd.Rule`.
        method_options (`dict`, *optional*):
            What to change in the named table, for example `{"top_k": 64, "tail": "renormalize", "weak_weight": 0.2}`.
        privileged_student (`str`, *optional*):
            Weights of the privileged student: `"current"` (the paper's), `"frozen"` (initial), `"ema"` or `"snapshot"`
            (a copy that is renewed). `None` keeps what the table says.
        ema_decay (`float`, *optional*, defaults to `0.98`):
            Decay per optimizer step of the moving average of `"ema"`, where the method has none of its own.
        snapshot_steps (`int`, *optional*, defaults to `10`):
            Optimizer steps after which the copy of `"snapshot"` is renewed, where the method has none of its own.

        reward_weights (`list[float]`, *optional*):
            Weights of the trainer's `reward_funcs`, as in TRL's GRPO; 1 for each if left out.

        > Parameters that control several teachers

        teacher_models (`dict[str, str]`, *optional*):
            Several teachers, in place of `teacher_model_name_or_path`: names or folders by the names that the column
            `teacher_id` of the dataset has for them. Each row is read by one. They wait in the memory of the CPU, and
            come to the device one after the other, once for each step's answers.

        > Parameters that control a teacher on a server

        teacher_server (`str`, `list[str]` or `dict[str, str]`, *optional*):
            Address of a vLLM server that has the teacher, or several between which requests are spread, in place of
            `teacher_model_name_or_path`; of several teachers a mapping, by the names that the column `teacher_id` of
            the dataset has for them. A key is read from the environment variable `DOPD_TEACHER_API_KEY`.
        teacher_server_model (`str`, *optional*):
            The teacher's name there; needed where a server has several models.
        teacher_server_support (`str`, *optional*, defaults to `"exact"`):
            `"exact"` trains with what a server can give exactly, and refuses other methods; `"target_topk"` reads rules
            over the whole vocabulary, or over the student's top k, over the teacher's most probable tokens, with one
            outcome for all others; `"target_topk_sampled"` corrects that outcome by the sampled tokens, so that the
            mean over samples is the divergence over the whole vocabulary.
        teacher_server_top_k (`int`, *optional*, defaults to `20`):
            The teacher's most probable tokens that such rules read (`vllm serve` gives 20 unless `--max-logprobs` says
            otherwise).
        teacher_server_requests (`int`, *optional*, defaults to `16`):
            Sequences that each process has scored at a time.
        teacher_server_timeout (`float`, *optional*, defaults to `300`):
            Seconds that a request may take.
        teacher_server_retries (`int`, *optional*, defaults to `8`):
            How often a request that failed is sent again, with pauses from 0.5 to 30 seconds. Then the run saves a
            checkpoint and ends with status 75.

        > Parameters that control the data

        num_generations (`int`, *optional*, defaults to `4`):
            Rollouts per prompt. The batch sizes count completions, as in TRL's GRPO: one step has
            `per_device_train_batch_size * processes * gradient_accumulation_steps / num_generations` prompts.
        off_policy_rollouts (`bool`, *optional*, defaults to `False`):
            Allow settings (`top_p`, `top_k`, `min_p`, penalties, `generation_kwargs`) with which answers are drawn from
            another distribution than the one that is scored. `temperature` needs no leave: scores follow it.
        rollout_importance (`str`, *optional*, defaults to `"none"`):
            `"truncated"` multiplies what each token is taught with min(S(y) / E(y), cap): the student's probability of
            the token over that of the engine that drew it. For engines that say their log-probs (vLLM, or your own).
        rollout_importance_cap (`float`, *optional*, defaults to `2.0`):
            Largest of these factors.
        rollout_drift_limit (`float`, *optional*, defaults to `0.1`):
            Mean difference of log-probs between engine and student, nats, above which a run warns; above it and ten
            times the first step's, and anyway above 1 nat, it stops.
        privileged_template (`str`, *optional*):
            Text with `{prompt}` and `{privileged_context}`; `None` takes a default for chat or for plain text.
        teacher_chat_template_kwargs (`dict`, *optional*):
            In the place of `chat_template_kwargs` for what the teacher reads, both of its views. What stands between
            question and answer must be the same text for both. `None`: as the student.
        prompt_format (`str`, *optional*, defaults to `"auto"`):
            What a `prompt` that is text means: `"auto"` asks it as a user's turn where the tokenizer has a chat
            template; `"text"` gives it to the model as it stands (base models, prompts that are rendered already).
        max_prompt_length (`int`, *optional*):
            Most tokens of any view of a prompt; `None` is what the models' contexts leave beside the completion.
        max_context (`int`, *optional*):
            Most tokens of prompt and completion together; `None` is what the models' configurations say, a scaling of
            their rotary positions included.
        overlong_prompts (`str`, *optional*, defaults to `"error"`):
            `"error"`, or `"drop"` to leave such rows out and count them. Nothing is ever truncated.
        skip_broken_images (`bool`, *optional*, defaults to `False`):
            Leave rows with an image that cannot be read out, and count them, instead of stopping.

        > Parameters that control scoring and the loss

        per_device_scoring_batch_size (`int`, *optional*):
            Sequences per forward pass without gradient; defaults to four times `per_device_train_batch_size`.
        share_prompts (`bool`, *optional*, defaults to `True`):
            Run each prompt once for all its rollouts, in scoring and (without gradient checkpointing) in training.
            Exact to rounding; a model that cannot falls back with a message.
        loss_backend (`str`, *optional*, defaults to `"auto"`):
            `"auto"`, `"chunked"`, `"triton"` or `"reference"`.
        router_aux_loss_coef (`float`, *optional*):
            What the load-balancing loss of a student with experts is multiplied with before it is added. If left out:
            the model's own `router_aux_loss_coef` where its configuration asks for `output_router_logits`, else 0.
        loss_chunk_tokens (`int`, *optional*):
            Tokens whose logits exist at a time; `None` chooses.

        > Parameters that control what is seen of a run

        student_eval_steps (`int`, *optional*):
            Evaluate the student WITHOUT privileged context before the first step, every so many optimizer steps, and
            after the last. Needs `eval_dataset` and `verifier` on the trainer. `None`: never.
        student_eval_prompts (`int`, *optional*, defaults to `128`):
            Prompts of `eval_dataset`, from its start, that each evaluation answers.
        student_eval_batch_size (`int`, *optional*, defaults to `64`):
            Prompts answered at a time on each device.
        early_stop (`dict`, *optional*):
            End the run once the evaluations of the student no longer get better, for example
            `{"metric": "accuracy_greedy", "patience": 3, "min_delta": 0.01}`: after `patience` (3) evaluations in a row
            of which none was better by more than `min_delta` (0). The best checkpoint is kept, and its weights are the
            run's (`load_best_model_at_end`). Needs `student_eval_steps`.
        monitors (`bool`, *optional*, defaults to `True`):
            Log of each step's answers how many repeat their p or speak of a hint (`leak/`), and how many end in a loop
            (`repetition/`), and of each evaluation how far the student with p is from its start (`eval_privileged_kl`);
            warn once where these, or the lengths of answers, move away from the first steps.
        monitor_limits (`dict`, *optional*):
            How far is too far, for example `{"leak/copies_hint": 0.1, "completions/mean_length": null}`: a rise of a
            share from the first three logs to the last three, or a factor for the length; `null` warns of nothing.
        verifier_timeout (`float`, *optional*, defaults to 60):
            Seconds that the verifier, or a reward function for each answer of a call, may take before the run stops,
            and the import of their modules; `None` for any time.
        trace_steps (`int`, *optional*):
            Write some completions with their tokens' regimes to `trace.jsonl` every so many steps. `None`: never.
        trace_examples (`int`, *optional*, defaults to `4`):
            Completions written each time.
        trace_probes (`int`, *optional*, defaults to `0`):
            Prompts, from the start of `train_dataset`, that are answered again for every trace, so that one prompt can
            be followed through the run. They are not trained on. Not with FSDP or DeepSpeed.
        trace_max_bytes (`int`, *optional*, defaults to 64 MiB):
            Largest size of `trace.jsonl`; completions that do not fit are counted and left out.

        > Parameters of the host with more to choose from, or another default

        learning_rate (`float`, *optional*, defaults to `5e-6`):
            Initial learning rate of AdamW (the paper's).
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            Learning-rate schedule (the paper's).
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Switch dropout off in the student, in every view: dropout in one view of shared weights and not in another
            is noise in the gap.
        resume_from_checkpoint (`bool` or `str`, *optional*):
            `True`, `"true"` or `"last"` (the last whole checkpoint in `output_dir`), or the folder of a checkpoint.
        resume_with_changes (`list[str]` or `str`, *optional*):
            Names of what is meant to differ from the run that saved the checkpoint, such as `learning_rate,seed`.
            Anything else that decides the steps and differs is refused by name.
        teacher_model_name_or_path (`str`, *optional*):
            Also `"base"`: the base below the student's adapter, which is read with the adapter off. No second model is
            loaded.
        metric_for_best_model (`str`, *optional*):
            Also a metric of the student's evaluation, such as `"accuracy_greedy"`, with or without `eval_`.
    """

    learning_rate: float = 5e-6
    lr_scheduler_type: str = "cosine"
    # `True` too; the parsers of transformers and TRL cannot read a union with `bool` in it.
    resume_from_checkpoint: str | None = None
    resume_with_changes: list[str] | str | None = None
    disable_dropout: bool = True

    method: str = "dopd"
    # `str` in second place is what the parsers of transformers and TRL read a command line as.
    rules: list[dict[str, Any]] | str | None = None
    method_options: dict[str, Any] | str | None = None
    privileged_student: Anchor | None = None
    ema_decay: Annotated[float, Gt(0), Lt(1)] = 0.98
    snapshot_steps: Count = 10

    reward_weights: list[float] | None = None

    # `str` in second place is what the parsers of transformers and TRL read a command line as.
    teacher_models: dict[str, Any] | str | None = None

    teacher_server: dict[str, Any] | str | list[str] | None = None  # text second: parsers of command lines give it
    teacher_server_model: Text | None = None
    teacher_server_support: ServerSupport = "exact"
    teacher_server_top_k: Count = 20
    teacher_server_requests: Count = 16
    teacher_server_timeout: Positive = 300.0
    teacher_server_retries: Natural = 8

    num_generations: Count = 4
    off_policy_rollouts: bool = False
    rollout_importance: Importance = "none"
    rollout_importance_cap: Positive = 2.0
    rollout_drift_limit: Positive = 0.1
    privileged_template: Text | None = None
    teacher_chat_template_kwargs: dict[str, Any] | None = None
    prompt_format: PromptFormat = "auto"
    max_prompt_length: Count | None = None
    max_context: Count | None = None
    overlong_prompts: Overlong = "error"
    skip_broken_images: bool = False

    per_device_scoring_batch_size: Count | None = None
    share_prompts: bool = True
    loss_backend: Backend = "auto"
    router_aux_loss_coef: NotNegative | None = None
    loss_chunk_tokens: Count | None = None

    student_eval_steps: Count | None = None
    student_eval_prompts: Count = 128
    early_stop: dict[str, Any] | str | None = None
    monitors: bool = True
    monitor_limits: dict[str, Any] | str | None = None
    verifier_timeout: Positive | None = 60.0
    student_eval_batch_size: Count = 64
    trace_steps: Count | None = None
    trace_examples: Count = 4
    trace_probes: Natural = 0
    trace_max_bytes: Count = 2**26

    _OWN_MAPPINGS = ("method_options", "early_stop", "monitor_limits", "teacher_models")
    _VALID_DICT_FIELDS = [*DistillationConfig._VALID_DICT_FIELDS, *_OWN_MAPPINGS]  # noqa: RUF012 - the host declares it so

    def __post_init__(self) -> None:
        own: type = type(self)
        chosen = set(_changed(self))
        for key in _OWN_PLACES:
            setattr(self, key, at_home(getattr(self, key)))
        if isinstance(self.teacher_models, Mapping):
            self.teacher_models = {name: at_home(place) for name, place in self.teacher_models.items()}
        check_attributes(self, trainer_settings(own))
        self._check_together()
        # The host would have its own evaluation at every saved step; ours has been checked.
        load_best = self.load_best_model_at_end
        self.load_best_model_at_end = load_best and student_metric(self) is None
        self._name_checkpointing()
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError, OSError) as error:  # with which the host checks its own fields
            raise error if isinstance(error, DopdError) else ConfigError(first_line(error)) from error
        self.load_best_model_at_end = load_best
        if self.process_index:  # of several processes the main one warns
            logging.getLogger("dopd").setLevel(logging.ERROR)
        self.resume_from_checkpoint = checkpoint_to_resume(self.resume_from_checkpoint, self.output_dir)
        self._unchosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in chosen}

    def _name_checkpointing(self) -> None:
        """Later hosts warn of the old names, which TRL itself gives, unless the new ones have the same values."""
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}", False) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))

    def chosen(self) -> dict[str, Any]:
        """The settings that are not left at their defaults, as plain values; without tokens."""
        plain = {name: _plain(value) for name, value in self.to_dict().items()}
        left = {name for name, value in self._unchosen.items() if getattr(self, name) == value}
        return {name: value for name, value in plain.items() if name not in left and not is_secret(name)}

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, without secrets: the host writes settings beside weights, and sends them to hubs."""
        return without_secrets(vars(self))

    def to_dict(self) -> dict[str, Any]:
        """As the host's, which trackers are sent, without secrets."""
        return without_secrets(super().to_dict())

    def __copy__(self) -> "DOPDConfig":
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "DOPDConfig":
        copied = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _check_together(self) -> None:
        """Check what types do not say: the insides of mappings, and settings beside one another."""
        problems = Problems(read_early_stop(self))  # what it means for the host's settings is checked with them
        problems.add(*read_limits(self), *check_mappings(self))
        for key in _OWN_PLACES:
            for problem in left_open(key, getattr(self, key)):
                problems.add(problem)
        if self.beta != _TRL_BETA_DEFAULT:
            problems.add(
                f"beta (={self.beta}) selects the divergence of TRL's own trainer; here each rule of the routing table "
                "names its divergence. Remove beta, and use method_options or rules"
            )
        for name in ("chat_template_kwargs", "teacher_chat_template_kwargs"):
            reserved = sorted(set(getattr(self, name) or {}) & set(RESERVED_OPTIONS))
            if reserved:
                problems.add(f"{name}: {reserved[0]} cannot be set there; dopd gives it itself")
        if self.remove_unused_columns:
            problems.add(
                f"remove_unused_columns (={self.remove_unused_columns}) would drop privileged_context and what the "
                "verifier reads: leave it at False. Columns that nothing reads do no harm"
            )
        if self.label_smoothing_factor:
            problems.add(
                f"label_smoothing_factor (={self.label_smoothing_factor}) smooths the labels of a cross-entropy, and "
                "no method here has labels: remove it"
            )
        if self.train_sampling_strategy != "random":
            problems.add(
                f"train_sampling_strategy (={self.train_sampling_strategy!r}) is not read: set shuffle_dataset=False "
                "for the order of the dataset; within a step, rollouts of like length run together as it is"
            )
        with problems.collected():
            rollout_settings(self)
        with problems.collected():
            PrivilegedTemplate(self.privileged_template)
        with problems.collected():
            self.routing_table()
            check_choice_of_checkpoint(self)
        with problems.collected():
            self.check_teachers()
        if self.teacher_server is not None:
            self._check_server(problems)
        problems.raise_any()

    def check_teachers(self) -> None:
        """Raise `ConfigError` for several teachers that cannot be."""
        teachers: Any = self.teacher_models
        if teachers is None:
            return
        others = [name for name in ("teacher_model_name_or_path", "teacher_server") if getattr(self, name) is not None]
        if others:
            raise ConfigError(
                f"teacher_models and {others[0]} (={getattr(self, others[0])!r}) both bring the teacher: leave one of "
                "them out"
            )
        for name, model in teachers.items():
            if not str(name).strip() or not isinstance(model, str) or not model.strip() or model == BASE:
                raise ConfigError(
                    f"teacher_models[{name!r}] (={model!r}) must be the name or the folder of a model, under the name "
                    "that column 'teacher_id' has for it: {math: Qwen/Qwen2.5-Math-7B-Instruct}"
                )
        if not teachers:
            raise ConfigError("teacher_models (={}) must have a teacher, or be left out")

    def _check_server(self, problems: Problems) -> None:
        with problems.collected():
            teacher_places("teacher_server", self.teacher_server)
        if self.teacher_model_name_or_path is not None:
            problems.add(
                f"teacher_server and teacher_model_name_or_path (={self.teacher_model_name_or_path!r}) both name the "
                "teacher: leave one of them out"
            )
        if self.temperature != 1.0:
            problems.add(
                f"temperature (={self.temperature:g}) must be 1 with teacher_server: servers give the log-probs of "
                "prompts at temperature 1, whatever they are asked for"
            )
        if self.loss_backend == "reference":
            problems.add(
                "loss_backend (='reference') makes whole distributions of the teacher, which teacher_server does not "
                "give: leave it at 'auto'"
            )

    def routing_table(self) -> RoutingTable:
        """The routing table that `method`, `rules`, `method_options` and `privileged_student` describe, as a teacher on
        a server can give it if there is one.
        """
        served = self.served_table()
        return self._own_table() if served is None else served.table

    def served_table(self) -> ServedTable | None:
        """What the routing table gets from a teacher on a server; `None` without one.

        Raises:
            ConfigError: a rule that cannot be served.
        """
        if self.teacher_server is None:
            return None
        return served_table(self._own_table(), self.teacher_server_support, self.teacher_server_top_k)

    @property
    def loads_teacher(self) -> bool:
        """Whether the run needs a second model in this process, for all rows."""
        elsewhere = self.teacher_server is not None or self.teacher_models is not None or self.teacher_is_base
        return not elsewhere and self.routing_table().needs_teacher

    @property
    def several_teachers(self) -> dict[str, str]:
        """Models of this process of which each row is read by one, by the names that rows have for them; empty where
        there is one teacher, or none is read.
        """
        teachers: Any = self.teacher_models
        return {str(name): str(model) for name, model in (teachers or {}).items() if self.routing_table().needs_teacher}

    @property
    def teacher_is_base(self) -> bool:
        """Whether the teacher is the student's base, which the run reads with the student's adapter off."""
        named = self.teacher_server is None and self.teacher_model_name_or_path == BASE
        return named and self.routing_table().needs_teacher

    def _own_table(self) -> RoutingTable:
        anchor = {} if self.privileged_student is None else {"anchor": self.privileged_student}
        if self.rules is not None:
            if self.method_options:
                raise ConfigError(
                    "method_options change a named table; with rules of your own, write them into the rules"
                )
            rules: Any = self.rules
            return RoutingTable.from_dicts(rules, name="custom" if self.method == "dopd" else self.method, **anchor)
        options: Any = self.method_options or {}
        return table(self.method, **options, **anchor)


document_fields(DOPDConfig)
known_arguments_only(DOPDConfig)


def _plain(value: Any) -> Any:
    """A value as YAML and JSON have them: mappings with keys of text, lists, text, numbers, truth values and null."""
    if value is None or isinstance(value, bool | int | float | str):
        return getattr(value, "value", value)  # some enumerations are text
    if isinstance(value, Mapping):
        return {str(key): _plain(inside) for key, inside in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(inside) for inside in value]
    return _plain(getattr(value, "value", None)) if hasattr(value, "value") else str(value)


def _changed(config: DOPDConfig) -> Iterator[str]:
    """Names of the fields that have another value than their default."""
    for one in fields(config):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        value = getattr(config, one.name)
        # Of another type is another value; some, such as arrays, cannot be compared.
        if value is not default and (type(value) is not type(default) or value != default):
            yield one.name
