"""One optimizer step as the host drives it: prompts answered and scored, the loss of micro-batches, and what is logged.

The path itself is `dopd.step`; what the host, TRL's trainer, asks for is here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler

from dopd.data.views import plain_prompts
from dopd.heads import Head
from dopd.loss import RoutedLoss
from dopd.scoring import Balance, skipping_padding
from dopd.step import Moment, Request, Rollouts, ScoredBatch, Step
from dopd.step.metrics import num_tokens, reference_metrics, rollout_metrics, routing_metrics
from dopd.trainer import setup
from dopd.trainer.engines import check_rollouts, checked_drift, drawn_answers, drift_of
from dopd.trainer.experts import balanced
from dopd.trainer.finite import check_loss, finite_rollouts
from dopd.trainer.monitors import answer_metrics, length_change
from dopd.trainer.recording import RecordingTrainer
from dopd.trainer.reward_logs import RewardLogs
from dopd.trainer.sampler import EpochRepeatSampler
from dopd.trainer.step_metrics import StepClock, StepSums, warn_of_collapse, warn_of_missing_ends
from dopd.trainer.trace import TraceWriter


class SteppingTrainer(RecordingTrainer):
    """Makes the steps of a run.

    Attributes:
        step (`Step`): the path of completions through views, scores, assignment and loss.
        trace (`TraceWriter`, *optional*): of the run's completions.
        reward_logs (`RewardLogs`): what reward functions log.
    """

    step: Step
    trace: TraceWriter | None
    reward_logs: RewardLogs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending: dict[int, list[ScoredBatch]] = {}
        self._sums, self._clock, self._drift = StepSums(), StepClock(), drift_of(self.args)

    # --- Batches: num_generations rollouts of each prompt

    def repeats(self) -> dict[str, int]:
        completions = setup.completions_per_step(self.args, self.accelerator.num_processes)
        return {
            "mini_repeat_count": self.args.num_generations,
            "batch_size": completions // self.args.num_generations,
            "repeat_count": self.args.gradient_accumulation_steps,
        }

    def prompt_sampler(self, dataset: Dataset) -> Sampler:
        return EpochRepeatSampler(
            data_source=dataset,
            **self.repeats(),
            shuffle=bool(self.shuffle_dataset),
            seed=self.args.seed,
            epoch=lambda: int((self.state.epoch or 0.0) + 1e-6),
        )

    def next_micro_batch(self, rows: list[dict[str, Any]]) -> list[ScoredBatch]:
        # The host shuffles a step's completions before it cuts micro-batches; here rollouts of one prompt stay
        # together, to share it, and groups of like length, to need little padding. The step's loss is the same: its
        # denominators are the whole step's.
        if not self.model.training:
            return self.scored_batch(rows)
        accumulation = self.args.gradient_accumulation_steps
        if self.micro_step % accumulation == 0 or not self._pending:
            self._pending.clear()
            parts = [part.split(accumulation, self.args.num_generations) for part in self.scored_batch(rows)]
            self._pending.update(enumerate(map(list, zip(*parts, strict=True))))
        # Each is freed with its pass, before the next rollouts: the states of targets are large.
        return self._pending.pop(self.micro_step % accumulation)

    # --- The step: rollouts, scores, loss

    def scored_batch(self, problems: list[dict[str, Any]]) -> list[ScoredBatch]:
        """Rows of the dataset answered and scored, with what each token receives, for each part of the table."""
        self.evidence.begin(problems)
        self.models.forget_features()  # the weights may have changed since
        with self._clock.phase("rollout"), finite_rollouts(self.state.global_step, self.args.learning_rate):
            rollouts = self.rollouts(problems) if self.table.needs_rollouts else self.reference_texts(problems)
        self.evidence.add_answers(rollouts)
        generations = self.args.num_generations if self.model.training else 1
        moment = Moment(self.state.global_step, self.progress, generations)
        with self._clock.phase("scoring"):
            rollouts = self.step.judged(rollouts, problems)
            parts = self.step.score(rollouts, moment)
        self.evidence.add_scores(parts)
        self._record_batch(rollouts, parts)
        if self.trace is not None and self.model.training:
            with self._clock.phase("tracing"):
                (shown,) = (part for part in parts if part.table == self.table.shown)
                self.trace.follow(rollouts, shown, moment, self.state.max_steps, first=self.micro_step == 0)
        self.models.forget_features()
        return parts

    def rollouts(self, problems: list[dict[str, Any]], limit: int | None = None) -> Rollouts:
        """The student's answers to rows of the dataset, of at most `limit` tokens or as many as a step allows."""
        rows = self.prompts.read_by_student(problems, self.table)
        prompts = plain_prompts(rows)
        view = self.prompts.shared_view(prompts, self.accelerator.device)
        limit = limit or self._answer_limit()
        request = Request(view, prompts, limit, self.state.global_step)
        answers, logprobs = drawn_answers(self.engine, request, self.unwrapped_student, self.ending)
        rollouts = Rollouts(rows, view, *self.prompts.padded(answers, self.accelerator.device, logprobs))
        check_rollouts(
            rollouts, self.unwrapped_student, self.models.vocab_size, limit, off_policy=self.args.off_policy_rollouts
        )
        return replace(rollouts, texts=self.prompts.texts(rollouts))  # decoded once for whoever reads them

    def reference_texts(self, problems: list[dict[str, Any]]) -> Rollouts:
        """The reference texts of rows in the place of answers, for a table that asks for none."""
        rows = self.prompts.read_by_student(problems, self.table)
        view = self.prompts.shared_view(plain_prompts(rows), self.accelerator.device)
        return Rollouts(rows, view, *self.step.references(rows, self.accelerator.device))

    def _answer_limit(self) -> int:
        """Most tokens of an answer at this step."""
        most = int(self.max_completion_length or 0)
        return min(most, self.table.rollout_limit(self.state.global_step) or most)

    def micro_batch_targets(self, parts: list[ScoredBatch]) -> list[dict[str, tuple[Tensor, Head]]]:
        targets = [self.step.targets(part) for part in parts]
        if not self._pending:  # the last micro-batch of the step
            self.step.scorer.forget()
        return targets

    def micro_batch_loss(
        self, student: Any, parts: list[ScoredBatch], targets: list[dict[str, tuple[Tensor, Head]]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        balance = Balance() if self.balance_coefficient else None
        losses, sums = list[Tensor](), StepSums()
        for part, of_part in zip(parts, targets, strict=True):
            routed = self._part_loss(student, part, of_part, balance)
            losses.append(routed.loss)
            sums.add(routed.sums)
        loss = torch.stack(losses).sum()
        return loss if balance is None else balanced(self, loss, balance), sums.whole

    def _part_loss(
        self, student: Any, batch: ScoredBatch, targets: Mapping[str, tuple[Tensor, Head]], balance: Balance | None
    ) -> RoutedLoss:
        def forward(view: Any, completion_ids: Tensor, mask: Tensor) -> Tensor:
            return self.models.hidden_states(student, view, completion_ids, mask, balance)

        hidden = skipping_padding(forward, batch.view, batch.completion_ids, batch.mask, batch.read)
        head = Head.of_model(student, self.temperature, self.models.vocab_size)
        batch = self._drift.weighed(batch, hidden, head, self.args.loss_chunk_tokens)
        routed = self.step.loss(batch, (hidden, head), targets)
        if batch.table.routed and hidden.requires_grad:
            self._sums.add_gradients(hidden, routed.regimes, batch.table)
        if self.trace is not None and batch.table == self.table.shown:
            self.trace.observe(batch, (hidden, head), targets, routed)
        return routed

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._clock.phase("step"):
            loss = super().training_step(*args, **kwargs)
        if self.micro_step % self.current_gradient_accumulation_steps == 0:
            self._record_step()
        return loss

    # --- What is logged

    def _record_batch(self, rollouts: Rollouts, parts: list[ScoredBatch]) -> None:
        ranks = self.step.ranks
        self.record_tokens(num_tokens(rollouts, ranks))
        needed = self.table.needs_privileged
        metrics = rollout_metrics(rollouts, self.ending, ranks, needs_privileged=needed)
        if self.args.monitors:
            texts = self.prompts.texts(rollouts)
            metrics |= answer_metrics(rollouts, texts, self.ending, ranks, needs_privileged=needed)
            metrics |= length_change(metrics, self.state.log_history)
        self.record(metrics)
        if self.accelerator.is_main_process:
            warn_of_missing_ends(metrics, self._answer_limit(), self.ending.token_ids, self.state.global_step)
        for part in parts:
            self.record(routing_metrics(part, ranks) | reference_metrics(part, ranks))
        self.record(self.reward_logs.taken())
        if self.log_completions:
            asked = self.tokenizer.batch_decode(rollouts.view.prompt_ids, skip_special_tokens=True)
            self.record_texts(asked, self.prompts.texts(rollouts), rollouts.extra)

    def record_loss(self, loss: float, sums: dict[str, Tensor]) -> None:
        check_loss(loss, step=self.state.global_step, learning_rate=self.args.learning_rate)
        if self.model.training:
            self._sums.add(sums)
        else:
            alone = StepSums()
            alone.add(sums)
            self.record(alone.reduce(self.step.ranks) | self._drift.taken(self.step.ranks) | self._seconds())

    def _record_step(self) -> None:
        stats = self._sums.reduce(self.step.ranks)
        if self.accelerator.is_main_process:
            warn_of_collapse(stats, self.table, self.state.global_step)
        self.record(stats | checked_drift(self, self._drift, self.step.ranks) | self._seconds())
        if self.trace is not None:
            self.trace.finish()
            if self.trace.dropped:
                self.record({"trace/dropped": float(self.trace.dropped)})

    def _seconds(self) -> dict[str, float]:
        """Seconds of every phase since they were last read; what a step did beside its other phases is training."""
        seconds = self._clock.read()
        if "step" in seconds:
            seconds["training"] = seconds.pop("step") - sum(seconds.values())
        return {f"seconds/{name}": value for name, value in seconds.items()}
