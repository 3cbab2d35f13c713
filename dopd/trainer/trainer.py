"""`DOPDTrainer`: rollouts from the plain student, scores from every view that the table reads, one routed loss.

The host, TRL's `DistillationTrainer`, does what is not the method: loading, distribution, the loop, saving. What is
here checks a run and puts it together; `dopd.trainer.stepping` makes its steps, on the path of `dopd.step`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK, PrinterCallback

from dopd.checkpoints import resolve_model
from dopd.data.datasets import as_rows, held_out_as_rows
from dopd.data.views import PrivilegedTemplate
from dopd.ranks import AcceleratorRanks
from dopd.scoring import random_state_kept
from dopd.step import Engine, PromptEncoder, Step
from dopd.step.rewards import judge_of
from dopd.step.scorer import check_scorer
from dopd.step.verifier import Verifier
from dopd.tables import RoutingTable
from dopd.trainer import adapting, base_teacher, images, preflight, served, setup, teachers, trials
from dopd.trainer.anchors import anchors_of
from dopd.trainer.arguments import as_name, check_arguments
from dopd.trainer.callbacks import (
    AnchorUpdate,
    ClampedTokens,
    EndedStream,
    GuestNumbers,
    IdleSteps,
    MetricsFile,
    StudentEvaluation,
)
from dopd.trainer.config import DOPDConfig
from dopd.trainer.context import room_for_prompts
from dopd.trainer.continuing import OneRun
from dopd.trainer.description import describe_run
from dopd.trainer.engines import ending_of, make_engine
from dopd.trainer.evidence import Evidence
from dopd.trainer.experts import balance_coefficient
from dopd.trainer.finite import FiniteGradients
from dopd.trainer.models import TrainedModels
from dopd.trainer.monitors import MonitorWarnings
from dopd.trainer.own_engine import TRIAL_TOKENS, check_engine
from dopd.trainer.probes import make_trace
from dopd.trainer.progress import RunProgress
from dopd.trainer.recording import KeptRun
from dopd.trainer.reward_logs import RewardLogs
from dopd.trainer.stepping import SteppingTrainer
from dopd.trainer.stopping import KeepStart, StopWhereAsked
from dopd.verifiers.named import RewardFunctions, load_reward_functions, load_verifier
from dopd.vocabulary import declares


class DOPDTrainer(SteppingTrainer):
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
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]): the student; a text is a hub id, a
            folder, or `tiny:TASK/ROLE`.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*): the frozen teacher; may be left out
            when no rule of the table reads it.
        args ([`DOPDConfig`], *optional*): configuration.
        train_dataset, eval_dataset: rows with `prompt` (text or conversation), `privileged_context` (text or None,
            where the method reads it) and whatever the verifier reads.
        processing_class: as in TRL: a tokenizer, or the processor of a vision-language model.
        verifier (callable or `str`, *optional*): (completion text, row) -> score in [0, 1], or a name, as in a config.
            With it, accuracies are logged.
        reward_funcs (callable, `str`, or a list of them, *optional*): as in TRL's `GRPOTrainer`, with
            `args.reward_weights`: f(prompts=..., completions=..., completion_ids=..., **columns), with `trainer_state`,
            `log_metric` and `log_extra` if it takes them -> a reward, or None, for each completion. What methods with
            rewards learn from, in place of the verifier's score; `"verifier"` in the list is that score.
        teacher_processing_class (*optional*): processor of a teacher that encodes images otherwise than the student;
            read from `teacher_model` if that is a name or a folder.
        rollout_engine ([`~dopd.step.Engine`] or `str`, *optional*): draws the answers, in place of transformers'
            `generate` or vLLM; a text names a function that makes it of a [`~dopd.step.EngineSetup`], as
            `package.module:factory` or `./file.py:factory`.
        teacher_models (`dict[str, str` or `PreTrainedModel]`, *optional*): several teachers, in place of
            `teacher_model`, by the names that the column `teacher_id` has for them; as in the config.
        host_options: `callbacks`, `optimizers`, `quantization_config`, `peft_config`, as in TRL.

    Raises:
        ConfigError, DataError, ModelError: before anything is trained, naming what cannot work and the fix.
        ScoringError: while training, when numbers cannot be right (a NaN loss, a dead teacher).
    """

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
        verifier: Verifier | str | None = None,
        reward_funcs: RewardFunctions | None = None,
        teacher_processing_class: Any = None,
        rollout_engine: Engine | str | None = None,
        teacher_models: "Mapping[str, str | PreTrainedModel] | None" = None,
        **host_options: Any,
    ) -> None:
        check_arguments(args, DOPDConfig, host_options, DOPDTrainer.__init__.__annotations__)
        model, teacher_model = as_name(model), as_name(teacher_model)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path or "student"
            args = DOPDConfig(f"{Path(name).name}-DOPD")
        teacher_model, args = base_teacher.as_configured(teacher_model, args)
        several, args = teachers.as_configured(teacher_models, teacher_model, args)
        self.table: RoutingTable = args.routing_table()
        self.configuration = describe_run(
            args,
            model=model,
            teacher_model=teacher_model,
            teacher_models=several,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            verifier=verifier,
            reward_funcs=reward_funcs,
            rollout_engine=rollout_engine,
            peft_config=host_options.get("peft_config"),
        )
        model = resolve_model(model) if isinstance(model, str) else model
        setup.check_processes(args)
        check_engine(rollout_engine, args)
        train_dataset, eval_dataset = as_rows("train_dataset", train_dataset), held_out_as_rows(eval_dataset)
        functions = load_reward_functions(reward_funcs, args.verifier_timeout)
        verifier = load_verifier(verifier, args.verifier_timeout)
        judge = judge_of(verifier, functions, args.reward_weights, args.verifier_timeout)
        self.judge = setup.tried_judge(judge, self.table, train_dataset, eval_dataset)
        options = {"processing_class": processing_class, "peft_config": host_options.get("peft_config")}
        sources = setup.teacher_sources(teacher_model, several, args)
        setup.check_before_loading(
            model, sources, self.table, args, **options, teacher_processing_class=teacher_processing_class
        )
        self.served = served.connect(args, served.ask_server(args))
        options["processing_class"] = images.processor_for(model, processing_class, **images.where_from(args))
        served.check_reads_text(self.served, options["processing_class"])
        peft_config = adapting.on_revision(options["peft_config"], model, images.where_from(args))
        host_options |= {} if peft_config is None else {"peft_config": peft_config}
        options["quantization_config"] = host_options.get("quantization_config")
        self.parked = adapting.parked({name: sources[teachers.field(name)] for name in several}, args)
        source = sources.get("teacher_model")
        model, teacher_model, args, processing_class = adapting.read(model, source, args, **options)
        # The host refuses sizes that differ; `check_before_loading` has found them to be of one tokenizer.
        size = setup.declared_vocab_size(model, args) if teacher_model is not None else None
        with adapting.peft_errors(model, peft_config), declares(teacher_model, size):
            super().__init__(
                model=model,
                teacher_model=teacher_model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                **host_options,
            )
        setup.check_loaded(self, sources, peft_config, teacher_processing_class)
        self.ending = ending_of(self)
        trial = self._prepare_models(sources, teacher_processing_class)
        self.step = self._make_step()
        self.engine = make_engine(self, self.models, trial, rollout_engine)
        if rollout_engine is not None:
            self._try_engine()
        self.evidence = Evidence(self.run_folder, self.tokenizer, self.accelerator.process_index)
        self.trace = make_trace(self, self.step)
        self._add_callbacks()

    def _try_engine(self) -> None:
        """Have a user's engine answer the first prompt in a few tokens, where weights are whole outside of a step."""
        if self.train_dataset is not None and not self.is_split:
            row = next(iter(self.train_dataset))
            with random_state_kept(self.unwrapped_student):
                self.rollouts([row, row], min(TRIAL_TOKENS, self._answer_limit()))

    def _prepare_models(self, sources: Mapping[str, Any], teacher_processing_class: Any) -> images.Trial | None:
        """Settle how prompts are read, check the datasets, and try the passes of the models; with what is returned."""
        self.split_teacher()
        sharding = setup.sharding_of(self)
        self.anchor, self.initial = anchors_of(self.table, self.args, self.unwrapped_student, sharding)
        self.prompts = PromptEncoder(
            self.processing_class,
            PrivilegedTemplate(self.args.privileged_template),
            self.chat_template_kwargs,
            self.args.prompt_format,
            teacher_chat_template_kwargs=setup.teachers_options(self.args),
            pad_to_multiple_of=None if self.pad_to_multiple_of is None else int(self.pad_to_multiple_of),
        )
        self.teacher_candidate = images.teacher_candidate(self, sources, teacher_processing_class)
        if self.prompts.teacher_chat_template_kwargs is not None:
            self.prompts = replace(self.prompts, teacher_processing_class=self.teacher_candidate)
        preflight.prepare_datasets(self)
        trial = images.trial_of(self)
        if trial is not None:
            self.prompts = replace(self.prompts, teacher_processing_class=trial.teacher_processing_class)
        encoding_once = images.encoding_once(self, trial)
        trials.check_passes(self, trial, encoding_once)
        sharing = trials.sharing(self, trial)
        self.models = TrainedModels(self, self.anchor, self.initial, sharing=sharing, encoding_once=encoding_once)
        self.balance_coefficient = balance_coefficient(self)
        return trial

    def _make_step(self) -> Step:
        args = self.args
        # All tokens that end an answer, if the table scores them as one outcome.
        merged_ids = sorted(self.eos_token_ids) if self.table.merge_ends else ()
        batch_size = args.per_device_scoring_batch_size or 4 * args.per_device_train_batch_size
        ranks = AcceleratorRanks(self.accelerator)
        scorer = served.make_scorer(self, self.models, batch_size, merged_ids, ranks)
        check_scorer(self.table, scorer)
        self.reward_logs = RewardLogs(self)
        self.judge = replace(self.judge, of_the_run=self.reward_logs)
        return Step(
            self.table,
            self.prompts,
            scorer,
            self.ending,
            self.judge,
            ranks=ranks,
            max_prompt_tokens=room_for_prompts(self),
            backend=args.loss_backend,
            chunk_tokens=args.loss_chunk_tokens,
            merged_ids=merged_ids,
            several_teachers=bool(self.teacher_names),
        )

    def _add_callbacks(self) -> None:
        args = self.args
        for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(OneRun(self))
        self.add_callback(KeptRun(self))
        self.add_callback(FiniteGradients(self))
        self.add_callback(AnchorUpdate(self))
        self.add_callback(GuestNumbers())
        self.add_callback(ClampedTokens())
        if isinstance(self.train_dataset, IterableDataset):
            self.add_callback(EndedStream(self.repeats()["batch_size"]))
        self.add_callback(IdleSteps(self.table.is_judged))
        self.add_callback(MetricsFile(self.run_folder))
        if args.monitors:
            self.add_callback(MonitorWarnings(args))
        self.add_callback(RunProgress(self.table.name, bar="disable_tqdm" not in args.chosen()))
        if args.student_eval_steps is not None:
            evaluator = setup.make_evaluator(self)
            self.add_callback(StudentEvaluation(self, evaluator, args.student_eval_steps))
        if self.served is not None:
            self.add_callback(KeepStart(self))
        self.add_callback(StopWhereAsked(self))
