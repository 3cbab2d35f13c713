"""Evaluate a student on held-out prompts WITHOUT privileged context, and beside it with it.

Accuracy with privileged context is no goal: it is read because it falls first when the privileged student drifts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dopd.data.encode import image_sources
from dopd.data.views import (
    PrivilegedTemplate,
    Prompt,
    lacks_privileged,
    plain_prompts,
    privileged_prompt,
    with_blank_images,
)
from dopd.evaluation.kept import KeptAnswers
from dopd.evaluation.results import MEASURES, EvaluationResult, JudgedAnswer, PromptResult, Sampling
from dopd.generation import answers
from dopd.methods import table
from dopd.progress import progress_bar
from dopd.sampling import Ending, sampling_config
from dopd.scoring import View, evaluation_mode, random_state_kept
from dopd.sources import LIVE
from dopd.step import FixedModels, LocalScorer, PromptEncoder, Rollouts, Step
from dopd.step.verifier import Verifier, judged, prepare
from dopd.vocabulary import unscored_ids


def questions(
    rows: Sequence[Mapping[str, Any]], template: PrivilegedTemplate, measures: Sequence[str]
) -> dict[str, dict[int, Prompt]]:
    """What is asked, by measure (`dopd.evaluation.results.MEASURES`): prompts by the numbers of their rows.

    Args:
        rows (`list[dict]`): as they are asked. One without p has no privileged question, one without images no blank
            one.
        template (`PrivilegedTemplate`): where p goes.
        measures: which are wanted; the others have no questions.
    """
    found: dict[str, dict[int, Prompt]] = {name: {} for name in MEASURES}
    for number, (row, plain) in enumerate(zip(rows, plain_prompts(rows), strict=True)):
        found["greedy"][number] = found["sampled"][number] = plain
        if "privileged" in measures and not lacks_privileged(row):
            found["privileged"][number] = privileged_prompt(row, template)
        if "blank" in measures and image_sources(plain):
            found["blank"][number] = with_blank_images(plain)
    return {name: prompts if name in measures else {} for name, prompts in found.items()}


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
        measures (`tuple[str, ...]`): which answers are asked for, of `dopd.evaluation.results.MEASURES`: as far as
            rows have what they need.
        sampling (`Sampling`): how answers are drawn.
    """

    rows: Sequence[Mapping[str, Any]]
    verifier: Verifier
    prompts: PromptEncoder
    ending: Ending
    max_new_tokens: int
    batch_size: int = 64
    seed: int = 0
    measures: Sequence[str] = MEASURES
    sampling: Sampling = field(default_factory=Sampling)

    def evaluate(
        self,
        model: Any,
        *,
        teacher: Any = None,
        shard: tuple[int, int] = (0, 1),
        kept: KeptAnswers | None = None,
        through: Callable[..., Any] | None = None,
    ) -> EvaluationResult:
        """Evaluate the prompts of one shard (index, count); the model's mode and the random state are left as they
        were.

        Args:
            kept (`KeptAnswers`, *optional*): gets each batch of answers; what it has already is not answered again.
            through (callable, *optional*): of `FixedModels`.
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
                    answered = self._evaluate_batch(FixedModels(model, teacher, through=through), batch)
                    results += answered
                    if kept is not None:
                        kept.add(answered, devices)
                    bar.update(len(batch))
        if kept is not None:
            kept.finish()
        return EvaluationResult.of(results)

    def _evaluate_batch(self, models: FixedModels, rows: Sequence[Mapping[str, Any]]) -> list[PromptResult]:
        model, teacher = models.student, models.teacher
        asked, device = self.prompts.asked(rows), model.device
        # The weights stay as they are, so one encoding of the prompts and of their images serves every pass.
        wanted = questions(asked, self.prompts.template, self.measures)
        plain = list((wanted["greedy"] or wanted["sampled"]).values())
        view = None
        if plain:
            view = self.prompts.view(plain, device) if teacher is None else self.prompts.shared_view(plain, device)
        greedy: dict[str, dict[int, JudgedAnswer]] = {}
        for name in ("greedy", "privileged", "blank"):
            prompts = wanted[name]
            if prompts:
                seen = view if name == "greedy" and view is not None else self.prompts.view([*prompts.values()], device)
                answers = self._generate(models, seen, sampled=False)
                judged = self._judged(answers, [rows[number] for number in prompts])
                greedy[name] = dict(zip(prompts, judged, strict=True))
        samples: list[list[JudgedAnswer]] = [[] for _ in rows]
        entropy, divergence = [0.0] * len(rows), [0.0] * len(rows)
        for _ in range(self.sampling.samples if wanted["sampled"] else 0):
            assert view is not None  # of the plain prompts
            ids = self._generate(models, view, sampled=True)
            drawn = self._score_tokens(models, Rollouts(asked, view, *self.prompts.padded(ids, device)))
            for number, answer in enumerate(self._judged(ids, rows)):
                samples[number].append(answer)
                entropy[number] += drawn[0][number]
                divergence[number] += drawn[1][number] if drawn[1] else 0.0
        return [
            PromptResult(
                greedy=greedy.get("greedy", {}).get(number),
                samples=tuple(samples[number]),
                entropy=entropy[number] if samples[number] else None,
                divergence=divergence[number] if samples[number] and teacher is not None else None,
                privileged=greedy.get("privileged", {}).get(number),
                blank=greedy.get("blank", {}).get(number),
            )
            for number in range(len(rows))
        ]

    def answers(self, model: Any, prompts: list[Prompt], *, sampled: bool) -> list[list[int]]:
        """Token ids of one answer per prompt, up to and with its end-of-sequence token."""
        view = self.prompts.view(prompts, model.device)
        return self._generate(FixedModels(model), view, sampled=sampled)

    def _generate(self, models: FixedModels, view: View, *, sampled: bool) -> list[list[int]]:
        narrowed = {"top_p": self.sampling.top_p, "top_k": self.sampling.top_k} if sampled else {}
        config = sampling_config(
            self.ending,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.prompts.tokenizer.pad_token_id,
            sampled=sampled,
            temperature=self.sampling.temperature,
            suppressed=unscored_ids(models.student, models.vocab_size),
            **narrowed,
        )
        return answers(
            models.student, view, config, self.ending, inputs=partial(models.generation_inputs, models.student)
        )

    def _judged(self, answers: list[list[int]], rows: Sequence[Mapping[str, Any]]) -> list[JudgedAnswer]:
        found = []
        texts = [(self.prompts.text(ids), self.ending.ended(ids)) for ids in answers]
        prepare(self.verifier, ((text, row) for (text, ended), row in zip(texts, rows, strict=True) if ended))
        for (text, ended), ids, row in zip(texts, answers, rows, strict=True):
            # An answer that was cut at the length limit is not a finished answer, whatever its text says.
            score = judged(self.verifier, text, row) if ended else 0.0
            found.append(JudgedAnswer(text, score, len(ids), ended))
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
        (batch,) = step.score(rollouts)
        routed = step.loss(batch, (live.hidden, scorer.head(LIVE)), step.targets(batch))
        return entropy, routed.per_token.sum(1).tolist()
