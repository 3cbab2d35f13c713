"""Evaluate a student on held-out prompts WITHOUT privileged context, and beside it with it.

Accuracy with privileged context is no goal: it is read because it falls first when the privileged student drifts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch

from dopd.data.encode import image_sources
from dopd.data.privileged import Prompt
from dopd.data.views import lacks_privileged, plain_prompt, privileged_prompt, with_blank_images
from dopd.generation import answers
from dopd.methods import table
from dopd.progress import progress_bar
from dopd.sampling import Ending, sampling_config
from dopd.scoring import View, evaluation_mode, random_state_kept
from dopd.sources import LIVE
from dopd.statistics import wilson_interval
from dopd.step import FixedModels, LocalScorer, PromptEncoder, Rollouts, Step
from dopd.step.verifier import Verifier, judged
from dopd.vocabulary import unscored_ids


@dataclass
class EvaluationResult:
    """Per-prompt results; results of disjoint prompts add up with `+`.

    Attributes:
        greedy, sampled, privileged (`list[float]`): scores of greedy and sampled (T = 1) answers without privileged
            context, and of greedy answers with it.
        blank (`list[float]`): of prompts with images: scores of greedy answers to grey images of the same size. What
            is right there was not read off an image.
        lengths (`list[int]`): tokens of the sampled answers.
        ended (`list[float]`): 1 where a sampled answer ended by itself.
        entropy, divergence (`list[float]`): sums over the tokens of a sampled answer: entropy of the student, and
            reverse KL to the plain teacher, nats.
    """

    greedy: list[float] = field(default_factory=list)
    sampled: list[float] = field(default_factory=list)
    privileged: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    blank: list[float] = field(default_factory=list)

    def __add__(self, other: "EvaluationResult") -> "EvaluationResult":
        return EvaluationResult(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def metrics(self) -> dict[str, float]:
        """Means: accuracies in [0, 1], length in tokens, entropy and divergence in nats per token."""
        tokens = max(sum(self.lengths), 1)
        result = {
            "accuracy_greedy": _mean(self.greedy),
            "accuracy_sampled": _mean(self.sampled),
            "accuracy_privileged": _mean(self.privileged),
            "accuracy_blank": _mean(self.blank),
            "length": _mean(self.lengths),
            "eos_ratio": _mean(self.ended),
            "entropy": sum(self.entropy) / tokens,
            "num_prompts": float(len(self.greedy)),
        }
        if self.divergence:
            result["divergence_to_teacher"] = sum(self.divergence) / tokens
        return {name: value for name, value in result.items() if value == value}

    def to_json(self) -> dict[str, Any]:
        """`metrics`, accuracies with 95% intervals, and every prompt's scores, for paired comparisons."""
        scores = {"greedy": self.greedy, "sampled": self.sampled, "privileged": self.privileged}
        if self.blank:
            scores["blank"] = self.blank
        intervals = {name: wilson_interval(sum(values), len(values)) for name, values in scores.items() if values}
        return {
            "metrics": self.metrics(),
            "intervals": {f"accuracy_{name}": asdict(interval) for name, interval in intervals.items()},
            "scores": scores,
        }


@dataclass(frozen=True)
class StudentEvaluator:
    """Answers held-out prompts and verifies the answers.

    Attributes:
        rows (`list[dict]`): dataset rows: `prompt`, `privileged_context` (optional), and what the verifier reads.
        verifier (`Verifier`): scores a completion.
        prompts (`PromptEncoder`): reads rows, as in training.
        ending (`Ending`): what ends an answer.
        max_new_tokens (`int`): most tokens of an answer.
        batch_size (`int`): prompts answered at a time.
        seed (`int`): of the sampled answers; sampling leaves the caller's random state as it was.
        blank_control (`bool`): whether prompts with images are also answered with grey images in their places.
    """

    rows: Sequence[Mapping[str, Any]]
    verifier: Verifier
    prompts: PromptEncoder
    ending: Ending
    max_new_tokens: int
    batch_size: int = 64
    seed: int = 0
    blank_control: bool = True

    def evaluate(self, model: Any, *, teacher: Any = None, shard: tuple[int, int] = (0, 1)) -> EvaluationResult:
        """Evaluate the prompts of one shard (index, count); the model's mode and the random state are left as they
        were.
        """
        rows = self.rows[shard[0] :: shard[1]]
        result = EvaluationResult()
        with evaluation_mode(model), random_state_kept(model), torch.no_grad():
            torch.manual_seed(self.seed + shard[0])
            with progress_bar("evaluation", len(rows), "prompt", shown=shard[0] == 0) as bar:
                for start in range(0, len(rows), self.batch_size):
                    batch = rows[start : start + self.batch_size]
                    result = result + self._evaluate_batch(model, teacher, batch)
                    bar.update(len(batch))
        return result

    def _evaluate_batch(self, model: Any, teacher: Any, rows: Sequence[Mapping[str, Any]]) -> EvaluationResult:
        asked, device = self.prompts.asked(rows), model.device
        plain = [plain_prompt(row) for row in asked]
        hinted = [number for number, row in enumerate(rows) if not lacks_privileged(row)]
        # The weights stay as they are, so one encoding of the prompts and of their images serves every pass.
        models = FixedModels(model, teacher)
        view = self.prompts.view(plain, device) if teacher is None else self.prompts.shared_view(plain, device)
        result = EvaluationResult(greedy=self._scores(self._generate(models, view, sampled=False), rows))
        if hinted:
            prompts = [privileged_prompt(asked[number], self.prompts.template) for number in hinted]
            answers = self._generate(models, self.prompts.view(prompts, device), sampled=False)
            result.privileged = self._scores(answers, [rows[number] for number in hinted])
        pictured = [(row, prompt) for row, prompt in zip(rows, plain, strict=True) if image_sources(prompt)]
        if pictured and self.blank_control:
            blank = self.prompts.view([with_blank_images(prompt) for _, prompt in pictured], device)
            result.blank = self._scores(self._generate(models, blank, sampled=False), [row for row, _ in pictured])
        sampled = self._generate(models, view, sampled=True)
        result.sampled = self._scores(sampled, rows)
        result.lengths = [len(ids) for ids in sampled]
        result.ended = [float(self.ending.ended(ids)) for ids in sampled]
        self._score_tokens(models, Rollouts(asked, view, *self.prompts.padded(sampled, device)), result)
        return result

    def answers(self, model: Any, prompts: list[Prompt], *, sampled: bool, temperature: float = 1.0) -> list[list[int]]:
        """Token ids of one answer per prompt, up to and with its end-of-sequence token."""
        view = self.prompts.view(prompts, model.device)
        return self._generate(FixedModels(model), view, sampled=sampled, temperature=temperature)

    def _generate(self, models: FixedModels, view: View, *, sampled: bool, temperature: float = 1.0) -> list[list[int]]:
        config = sampling_config(
            self.ending,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.prompts.tokenizer.pad_token_id,
            sampled=sampled,
            temperature=temperature,
            suppressed=unscored_ids(models.student, models.vocab_size),
        )
        return answers(
            models.student, view, config, self.ending, inputs=partial(models.generation_inputs, models.student)
        )

    def _scores(self, answers: list[list[int]], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        # An answer that was cut at the length limit is not a finished answer, whatever its text says.
        return [
            judged(self.verifier, self.prompts.text(ids), row) if self.ending.ended(ids) else 0.0
            for ids, row in zip(answers, rows, strict=True)
        ]

    def _score_tokens(self, models: FixedModels, rollouts: Rollouts, result: EvaluationResult) -> None:
        scorer = LocalScorer(models, self.batch_size)
        live = scorer.score(LIVE, rollouts.view, rollouts.completion_ids, rollouts.mask)
        assert live.tokens.entropy is not None  # models of this process give it
        result.entropy = live.tokens.entropy.sum(1).tolist()
        if models.teacher is not None and live.hidden is not None:
            step = Step(table("vanilla"), self.prompts, scorer, self.ending)
            batch = step.score(rollouts)
            routed = step.loss(batch, (live.hidden, scorer.head(LIVE)), step.targets(batch))
            result.divergence = routed.per_token.sum(1).tolist()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
