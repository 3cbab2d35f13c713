"""Evaluate a student on held-out prompts WITHOUT privileged context, and beside it with it.

Accuracy with privileged context is no goal: it is read because it falls first when the privileged student drifts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dopd.data.encode import image_sources
from dopd.data.views import Prompt, lacks_privileged, plain_prompts, privileged_prompt, with_blank_images
from dopd.evaluation.kept import KeptAnswers
from dopd.evaluation.results import EvaluationResult, JudgedAnswer, PromptResult
from dopd.generation import answers
from dopd.methods import table
from dopd.progress import progress_bar
from dopd.sampling import Ending, sampling_config
from dopd.scoring import View, evaluation_mode, random_state_kept
from dopd.sources import LIVE
from dopd.step import FixedModels, LocalScorer, PromptEncoder, Rollouts, Step
from dopd.step.verifier import Verifier, judged
from dopd.vocabulary import unscored_ids


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

    def evaluate(
        self, model: Any, *, teacher: Any = None, shard: tuple[int, int] = (0, 1), kept: KeptAnswers | None = None
    ) -> EvaluationResult:
        """Evaluate the prompts of one shard (index, count); the model's mode and the random state are left as they
        were.

        Args:
            kept (`KeptAnswers`, *optional*): gets each batch of answers; what it has already is not answered again.
        """
        rows = self.rows[shard[0] :: shard[1]]
        results = [] if kept is None else [*kept.results]
        devices = {parameter.device for parameter in model.parameters()}
        with evaluation_mode(model), random_state_kept(model), torch.no_grad():
            torch.manual_seed(self.seed + shard[0])
            if kept is not None:
                kept.restore(*devices)
            with progress_bar("evaluation", len(rows), "prompt", shown=shard[0] == 0) as bar:
                bar.update(len(results))
                for start in range(len(results), len(rows), self.batch_size):
                    batch = rows[start : start + self.batch_size]
                    answered = self._evaluate_batch(model, teacher, batch)
                    results += answered
                    if kept is not None:
                        kept.add(answered, devices)
                    bar.update(len(batch))
        if kept is not None:
            kept.finish()
        return EvaluationResult.of(results)

    def _evaluate_batch(self, model: Any, teacher: Any, rows: Sequence[Mapping[str, Any]]) -> list[PromptResult]:
        asked, device = self.prompts.asked(rows), model.device
        plain = plain_prompts(asked)
        hinted = [number for number, row in enumerate(rows) if not lacks_privileged(row)]
        # The weights stay as they are, so one encoding of the prompts and of their images serves every pass.
        models = FixedModels(model, teacher)
        view = self.prompts.view(plain, device) if teacher is None else self.prompts.shared_view(plain, device)
        greedy = self._judged(self._generate(models, view, sampled=False), rows)
        privileged: dict[int, JudgedAnswer] = {}
        if hinted:
            prompts = [privileged_prompt(asked[number], self.prompts.template) for number in hinted]
            drawn = self._generate(models, self.prompts.view(prompts, device), sampled=False)
            privileged = dict(zip(hinted, self._judged(drawn, [rows[number] for number in hinted]), strict=True))
        pictured = [number for number, prompt in enumerate(plain) if image_sources(prompt)]
        blank: dict[int, JudgedAnswer] = {}
        if pictured and self.blank_control:
            grey = self.prompts.view([with_blank_images(plain[number]) for number in pictured], device)
            drawn = self._generate(models, grey, sampled=False)
            blank = dict(zip(pictured, self._judged(drawn, [rows[number] for number in pictured]), strict=True))
        ids = self._generate(models, view, sampled=True)
        sampled = self._judged(ids, rows)
        entropy, divergence = self._score_tokens(models, Rollouts(asked, view, *self.prompts.padded(ids, device)))
        return [
            PromptResult(
                greedy[number],
                sampled[number],
                len(ids[number]),
                float(self.ending.ended(ids[number])),
                entropy[number],
                divergence[number] if divergence else None,
                privileged.get(number),
                blank.get(number),
            )
            for number in range(len(rows))
        ]

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

    def _judged(self, answers: list[list[int]], rows: Sequence[Mapping[str, Any]]) -> list[JudgedAnswer]:
        found = []
        for ids, row in zip(answers, rows, strict=True):
            text = self.prompts.text(ids)
            # An answer that was cut at the length limit is not a finished answer, whatever its text says.
            found.append(JudgedAnswer(text, judged(self.verifier, text, row) if self.ending.ended(ids) else 0.0))
        return found

    def _score_tokens(self, models: FixedModels, rollouts: Rollouts) -> tuple[list[float], list[float]]:
        """Of each answer, the sums over its tokens of the student's entropy and of its divergence to the teacher."""
        scorer = LocalScorer(models, self.batch_size)
        live = scorer.score(LIVE, rollouts.view, rollouts.completion_ids, rollouts.mask)
        assert live.tokens.entropy is not None  # models of this process give it
        entropy = live.tokens.entropy.sum(1).tolist()
        if models.teacher is None or live.hidden is None:
            return entropy, []
        step = Step(table("vanilla"), self.prompts, scorer, self.ending)
        batch = step.score(rollouts)
        routed = step.loss(batch, (live.hidden, scorer.head(LIVE)), step.targets(batch))
        return entropy, routed.per_token.sum(1).tolist()
