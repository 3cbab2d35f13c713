"""`DOPDTrainer`: rollouts from the plain student, scores from every view that the table reads, one routed loss.

The host, TRL's `DistillationTrainer`, does what is not the method: models, rollouts, distribution, saving. This class
overrides the hooks listed in `dopd.trainer.host`; a test fails clearly when a TRL release changes one of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel
from trl.trainer.utils import repeat_iterable_dataset, split_tensor_dict

from dopd.assignment import Assignment
from dopd.data.given import as_rows, held_out_as_rows
from dopd.data.privileged import PrivilegedTemplate
from dopd.errors import ConfigError
from dopd.evaluation.verifier import Verifier, limited
from dopd.fused import fused_routed_loss
from dopd.heads import Head
from dopd.loss import RoutedLoss
from dopd.scoring import Balance, skipping_padding
from dopd.sources import SOURCES
from dopd.tables import RoutingTable
from dopd.trainer import adapting, images, preflight, setup, trials
from dopd.trainer.anchor import CurrentAnchor, anchors_of
from dopd.trainer.batch_scorer import make_scorer, scores_of
from dopd.trainer.callbacks import AnchorUpdate, IdleSteps, MetricsFile, StudentEvaluation
from dopd.trainer.config import DOPDConfig
from dopd.trainer.evidence import Evidence
from dopd.trainer.experts import balance_coefficient, balanced
from dopd.trainer.finite import FiniteGradients, check_loss
from dopd.trainer.probes import make_trace
from dopd.trainer.rollouts import answers_of_at_most, finite_rollouts, grouped_by_length, rollout_metrics, verify
from dopd.trainer.sampler import EpochRepeatSampler
from dopd.trainer.saving import OneRun, StopWhereAsked
from dopd.trainer.step_metrics import StepClock, StepSums, warn_of_collapse
from dopd.trainer.viewing import ViewingTrainer
from dopd.trainer.views import as_the_student_reads, batch_views


class DOPDTrainer(ViewingTrainer):
    """Distil a teacher into a student on the student's own answers, routing each token by a table.

    A TRL user changes the import and adds one column:

    ```python
    from dopd import DOPDConfig, DOPDTrainer

    trainer = DOPDTrainer(
        model="Qwen/Qwen3-1.7B",
        teacher_model="Qwen/Qwen3-8B",
        args=DOPDConfig("qwen3-dopd"),
        train_dataset=dataset,  # columns: prompt, privileged_context
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*): the frozen teacher; may be left out
            when no row of the table reads it.
        args ([`DOPDConfig`], *optional*): configuration.
        train_dataset, eval_dataset: rows with `prompt` (text or conversation), `privileged_context` (text or None,
            where the method reads it) and whatever the verifier reads.
        processing_class: as in TRL: a tokenizer, or the processor of a vision-language model.
        verifier (callable, *optional*): (completion text, row) -> score in [0, 1]. With it, accuracies are logged.
        teacher_processing_class (*optional*): processor of a teacher that encodes images otherwise than the student;
            read from `teacher_model` if that is a name or a folder.
        host_options: `callbacks`, `optimizers`, `quantization_config`, `peft_config`, as in TRL.

    Raises:
        ConfigError, DataError, ModelError: before anything is trained, naming what cannot work and the fix.
        ScoringError: while training, when numbers cannot be right (a NaN loss, a dead teacher).
    """

    # The host declares these more widely than they are here.
    args: DOPDConfig
    model: Any
    train_dataset: Any
    _buffered_inputs: Any

    _tag_names = ["trl", "distillation", "dopd"]  # noqa: RUF012 - the host declares it so
    _name = "DOPD"
    _paper = {  # noqa: RUF012
        "title": "DOPD: Dual On-policy Distillation",
        "id": "2606.30626",
        "citation": "@misc{dopd2026, title={{DOPD: Dual On-policy Distillation}}, year={2026}, eprint={2606.30626}}",
    }

    def __init__(
        self,
        model: "str | PreTrainedModel",
        teacher_model: "str | PreTrainedModel | None" = None,
        args: DOPDConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        verifier: Verifier | None = None,
        teacher_processing_class: Any = None,
        **host_options: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or "student"
            args = DOPDConfig(f"{Path(name).name}-DOPD")
        if teacher_model is None:
            teacher_model = args.teacher_model_name_or_path
        self.table: RoutingTable = args.routing_table()
        self.template = PrivilegedTemplate(args.privileged_template)
        self.verifier = None if verifier is None else limited(verifier, args.verifier_timeout)
        if host_options.get("tools"):
            raise ConfigError("tools: privileged views of a conversation with tools are not supported")
        setup.check_batch_sizes(args)
        setup.check_rewards(self.table, verifier)
        train_dataset, eval_dataset = as_rows("train_dataset", train_dataset), held_out_as_rows(eval_dataset)
        setup.try_on_rows(self.verifier, train_dataset, eval_dataset)
        given = {"processing_class": processing_class, "peft_config": host_options.get("peft_config")}
        setup.check_before_loading(model, teacher_model, self.table, args, **given)
        given["processing_class"] = images.processor_for(model, processing_class, **images.where_from(args))
        teacher_source = teacher_model if self.table.needs_teacher else None
        peft_config = adapting.on_revision(given["peft_config"], model, images.where_from(args))
        host_options |= {} if peft_config is None else {"peft_config": peft_config}
        given["quantization_config"] = host_options.get("quantization_config")
        model, teacher_model, args, processing_class = adapting.read(model, teacher_source, args, **given)
        with adapting.peft_errors(model, peft_config):
            super().__init__(
                model=model,
                teacher_model=teacher_model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **host_options,
            )
        if self.teacher_model is not None:
            self.teacher_model.eval()
        setup.check_loaded(self, teacher_source, peft_config)
        self._prepare_sampling()
        sharded = self.is_fsdp_enabled or setup.is_zero3(self)
        self.anchor, self.initial = anchors_of(self.table, args, self.unwrapped_student, sharded=sharded)
        self.teacher_candidate = images.teacher_candidate(self, teacher_source, teacher_processing_class)
        preflight.prepare_datasets(self)
        self._prepare_viewing()
        trials.check_passes(self)
        self.sharing_architectures = trials.sharing_architectures(self)
        self.balance_coefficient = balance_coefficient(self)
        self._scorer = make_scorer(self)
        self._sums, self._clock = StepSums(), StepClock()
        self.evidence = Evidence(Path(str(args.output_dir)), self._tokenizer, self.accelerator.process_index)
        self._routed: RoutedLoss | None = None
        self.add_callback(OneRun())
        self.add_callback(FiniteGradients(self))
        self.add_callback(AnchorUpdate(self))
        self.add_callback(IdleSteps(self.table.needs_rewards))
        self.add_callback(MetricsFile(str(args.output_dir)))
        self.trace = make_trace(self)
        if args.student_eval_steps is not None:
            evaluator = setup.make_evaluator(self)
            self.add_callback(StudentEvaluation(self, evaluator, args.student_eval_steps))
        self.add_callback(StopWhereAsked(self))

    # --- Models

    @contextmanager
    def source_model(self, source: str) -> Iterator[nn.Module]:
        """The (wrapped) model of a source."""
        origin = SOURCES[source].model
        if origin == "teacher":
            yield self.teacher_model
        elif origin == "student":
            yield self.model_wrapped
        else:
            anchor = self.initial if origin == "initial" else self.anchor
            apart = nullcontext() if isinstance(anchor, CurrentAnchor) else self.other_weights()
            with apart, anchor.scoring_model(self.model_wrapped) as model:
                yield model

    # --- Batches: num_generations rollouts of each prompt

    def _repeats(self) -> dict[str, int]:
        """How a step repeats its prompts, in the words of the host's samplers."""
        completions = setup.completions_per_step(self.args, self.accelerator.num_processes)
        return {
            "mini_repeat_count": self.args.num_generations,
            "batch_size": completions // self.args.num_generations,
            "repeat_count": self.args.gradient_accumulation_steps,
        }

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        return EpochRepeatSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            **self._repeats(),
            shuffle=bool(self.shuffle_dataset),
            seed=self.args.seed,
            epoch=lambda: int((self.state.epoch or 0.0) + 1e-6),
        )

    def get_train_dataloader(self) -> DataLoader:
        dataset = self.train_dataset
        if isinstance(dataset, IterableDataset):
            if self.shuffle_dataset:
                dataset = dataset.shuffle(seed=self.args.seed)
            dataset = repeat_iterable_dataset(dataset, **self._repeats())
        return self._get_dataloader(
            dataset=dataset,
            description="Training",
            batch_size=self._train_batch_size * self.args.gradient_accumulation_steps,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        # The host shuffles a step's completions before it cuts micro-batches; here rollouts of one prompt stay
        # together, to share it, and groups of like length, to need little padding. The step's loss is the same: its
        # denominators are the whole step's.
        if not self.model.training:
            return self._generate_and_score_completions(generation_batch)
        accumulation = self.args.gradient_accumulation_steps
        if self._step % accumulation == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            batch = grouped_by_length(batch, self.args.num_generations)
            self._buffered_inputs = split_tensor_dict(batch, accumulation)
        return self._buffered_inputs[self._step % accumulation]

    # --- Rollout and scoring

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        problems = inputs  # as the verifier knows them
        self.evidence.begin(problems)
        inputs = as_the_student_reads([self.asked(row) for row in problems], self.table, self.template)
        limit = self.table.rollout_limit(self.state.global_step)
        with (
            self._clock.phase("rollout"),
            finite_rollouts(self.state.global_step, self.args.learning_rate),
            answers_of_at_most(limit, self),
        ):
            batch = super()._generate_and_score_completions(inputs)
        self.evidence.add(batch)
        with self._clock.phase("scoring"):
            scores = verify(self.verifier, problems, batch, self._tokenizer, self.ending)
            views, known = batch_views(self, inputs, batch, scores)
            scored, metrics = self._scorer.score(views, batch["completion_ids"], batch["completion_mask"], known)
            batch |= scored
        self.evidence.add(scored)
        metrics |= rollout_metrics(
            inputs,
            batch,
            scores,
            ending=self.ending,
            needs_privileged=self.table.needs_privileged,
            accelerator=self.accelerator,
        )
        # The host takes a sampled padding token at the length limit for an end; an answer without an end was cut.
        self._host_metrics["completions/clipped_ratio"].pop()
        self._record(metrics)
        if self.trace is not None and self.model.training:
            if self.state.global_step == 0 or self._step == 0:
                self.trace.start(self.state.global_step)
            if self.trace.wants(self.state.global_step, self.state.max_steps):
                with self._clock.phase("tracing"):
                    self.trace.begin(self.state.global_step, inputs, scores, batch, metrics)
        self.features.clear()
        return batch

    # --- Loss

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Tensor], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The host's denominator counts tokens; Eq. 11 takes the mean over a sequence first, then over sequences.
        completion_ids, mask = inputs["completion_ids"], inputs["completion_mask"]
        view = self.plain_view(inputs)
        balance = Balance() if self.balance_coefficient else None
        forward = partial(self.view_hidden_states, unwrapped_student, balance=balance)
        hidden = skipping_padding(forward, view, completion_ids, mask)
        targets = {}
        for source in self._scorer.kept_sources:
            with self.source_model(source) as model:
                head = Head.of_model(self.accelerator.unwrap_model(model), self.temperature)
            targets[source] = (inputs[f"hidden/{source}"], head)
        head = Head.of_model(unwrapped_student, self.temperature)
        self._routed = fused_routed_loss(
            hidden,
            head,
            targets,
            completion_ids,
            mask,
            self.table,
            backend=self.args.loss_backend,
            chunk_tokens=self.args.loss_chunk_tokens,
            assignment=Assignment.of_tensors(inputs),
            # Data parallelism averages gradients over ranks; the mean over sequences is over all of them.
            num_sequences=inputs["num_sequences"] / self.accelerator.num_processes,
            scores={source: scores_of(inputs, source) for source in self._scorer.kept_sources},
            merged_ids=self._scorer.merged_ids,
        )
        if self.table.routed and hidden.requires_grad:
            self._sums.add_gradients(hidden, self._routed.regimes, self.table)
        if self.trace is not None:
            self.trace.observe(inputs, (hidden, head), targets, self._routed)
        loss = self._routed.loss if balance is None else balanced(self, self._routed.loss, balance)
        return loss, self._routed.sums["entropy"], self._routed.sums["tokens"]

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, routed = (result[0] if return_outputs else result), self._routed
        assert routed is not None
        self._routed = None
        # The host's entropy is a mean over this micro-batch: the mean of such means would depend on how a step is cut.
        self._host_metrics["entropy"].pop()
        check_loss(loss.item(), step=self.state.global_step, learning_rate=self.args.learning_rate)
        sums = self._sums if self.model.training else StepSums()
        sums.add(routed.sums)
        if not self.model.training:
            stats = sums.reduce(self.accelerator)
            self._record(stats | {f"seconds/{name}": value for name, value in self._clock.read().items()})
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._clock.phase("step"):
            loss = super().training_step(*args, **kwargs)
        if self._step % self.current_gradient_accumulation_steps == 0:
            self._record_step()
        return loss

    # --- What is logged

    @property
    def _host_metrics(self) -> dict[str, list[float]]:
        return self._metrics["train" if self.model.training else "eval"]

    def _record(self, metrics: dict[str, float]) -> None:
        """Hand metrics to the host, which averages them until it logs."""
        for name, value in metrics.items():
            self._host_metrics[name].append(value)

    def _record_step(self) -> None:
        stats = self._sums.reduce(self.accelerator)
        if self.accelerator.is_main_process:
            warn_of_collapse(stats, self.table, self.state.global_step)
        seconds = self._clock.read()
        training = seconds.pop("step", 0.0) - sum(seconds.values())
        self._record(stats | {f"seconds/{name}": value for name, value in {**seconds, "training": training}.items()})
        if self.trace is not None:
            self.trace.finish()
            if self.trace.dropped:
                self._record({"trace/dropped": float(self.trace.dropped)})
