"""Evaluate a student on held-out prompts WITHOUT privileged context, and beside it with it.

Accuracy with privileged context is no goal: it is read because it falls first when the privileged student drifts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dopd.data.encode import encode_view, image_sources, tokenizer_of
from dopd.data.privileged import PrivilegedTemplate, Prompt
from dopd.data.rendering import asks_text
from dopd.data.views import as_conversation, lacks_privileged, plain_prompt, privileged_prompt, with_blank_images
from dopd.evaluation.verifier import Verifier, judged
from dopd.fused import fused_routed_loss, score_tokens
from dopd.generation import answers
from dopd.heads import Head
from dopd.methods import table
from dopd.sampling import Ending, sampling_config
from dopd.scoring import (
    View,
    evaluation_mode,
    generation_inputs,
    in_batches,
    random_state_kept,
    view_hidden_states,
)
from dopd.statistics import wilson_interval
from dopd.vision.media import FeatureCache
from dopd.vision.tokens import placeholder_ids


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
        processing_class: the tokenizer, or the processor of a vision-language model.
        eos_token_ids (`list[int]`): every token that ends a completion.
        max_new_tokens (`int`): most tokens of an answer.
        batch_size (`int`): prompts answered at a time.
        template (`PrivilegedTemplate`): where privileged context goes.
        chat_template_kwargs (`dict`): as in training.
        seed (`int`): of the sampled answers; sampling leaves the caller's random state as it was.
        blank_control (`bool`): whether prompts with images are also answered with grey images in their places.
        teacher_processing_class (*optional*): of a teacher that encodes images otherwise.
        stop_strings (`list[str]`): texts that end a completion as well.
        prompt_format (`str`): what a prompt that is text means, as in `DOPDConfig`.
    """

    rows: Sequence[Mapping[str, Any]]
    verifier: Verifier
    processing_class: Any
    eos_token_ids: list[int]
    max_new_tokens: int
    batch_size: int = 64
    template: PrivilegedTemplate = field(default_factory=PrivilegedTemplate)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    blank_control: bool = True
    teacher_processing_class: Any = None
    stop_strings: Sequence[str] = ()
    prompt_format: str = "auto"

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.processing_class)

    @property
    def ending(self) -> Ending:
        return Ending(self.eos_token_ids, self.stop_strings, self.tokenizer)

    def evaluate(self, model: Any, *, teacher: Any = None, shard: tuple[int, int] = (0, 1)) -> EvaluationResult:
        """Evaluate the prompts of one shard (index, count); the model's mode and the random state are left as they
        were.
        """
        rows = self.rows[shard[0] :: shard[1]]
        result = EvaluationResult()
        with evaluation_mode(model), random_state_kept(model), torch.no_grad():
            torch.manual_seed(self.seed + shard[0])
            for start in range(0, len(rows), self.batch_size):
                result = result + self._evaluate_batch(model, teacher, rows[start : start + self.batch_size])
        return result

    def _evaluate_batch(self, model: Any, teacher: Any, rows: Sequence[Mapping[str, Any]]) -> EvaluationResult:
        plain: list[Prompt] = [plain_prompt(row) for row in self.asked(rows)]
        hinted = [row for row in rows if not lacks_privileged(row)]
        # The weights stay as they are, so one encoding of the prompts and of their images serves every pass.
        view, cache = self.view(plain, model.device), FeatureCache()
        result = EvaluationResult(greedy=self._scores(self._generate(model, view, cache, sampled=False), rows))
        if hinted:
            prompts = self.view([privileged_prompt(row, self.template) for row in self.asked(hinted)], model.device)
            result.privileged = self._scores(self._generate(model, prompts, cache, sampled=False), hinted)
        pictured = [(row, prompt) for row, prompt in zip(rows, plain, strict=True) if image_sources(prompt)]
        if pictured and self.blank_control:
            blank = self.view([with_blank_images(prompt) for _, prompt in pictured], model.device)
            answers = self._generate(model, blank, cache, sampled=False)
            result.blank = self._scores(answers, [row for row, _ in pictured])
        sampled = self._generate(model, view, cache, sampled=True)
        result.sampled = self._scores(sampled, rows)
        result.lengths = [len(ids) for ids in sampled]
        result.ended = [float(self.ending.ended(ids)) for ids in sampled]
        self._score_tokens(model, teacher, plain, view, cache, sampled, result)
        return result

    def asked(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows with prompts that are text as a user's turn, where they are asked so."""
        turns = asks_text(self.processing_class, self.chat_template_kwargs, self.prompt_format)
        return [as_conversation(dict(row)) if turns else dict(row) for row in rows]

    def answers(self, model: Any, prompts: list[Prompt], *, sampled: bool, temperature: float = 1.0) -> list[list[int]]:
        """Token ids of one answer per prompt, up to and with its end-of-sequence token."""
        return self._generate(model, self.view(prompts, model.device), None, sampled=sampled, temperature=temperature)

    def _generate(
        self, model: Any, view: View, cache: FeatureCache | None, *, sampled: bool, temperature: float = 1.0
    ) -> list[list[int]]:
        config = sampling_config(
            self.ending,
            max_new_tokens=self.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            sampled=sampled,
            temperature=temperature,
            suppressed=placeholder_ids(model.config),
        )
        return answers(model, view, config, self.ending, inputs=partial(generation_inputs, model, cache=cache))

    def text(self, ids: list[int]) -> str:
        """A completion as text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _scores(self, answers: list[list[int]], rows: Sequence[Mapping[str, Any]]) -> list[float]:
        # An answer that was cut at the length limit is not a finished answer, whatever its text says.
        return [
            judged(self.verifier, self.text(ids), row) if self.ending.ended(ids) else 0.0
            for ids, row in zip(answers, rows, strict=True)
        ]

    def view(self, prompts: list[Prompt], device: Any, *, teacher: bool = False) -> View:
        """Prompts as the student reads them, or as the teacher does."""
        processing_class = self.teacher_processing_class if teacher else None
        return encode_view(processing_class or self.processing_class, prompts, self.chat_template_kwargs, device)

    def _score_tokens(
        self,
        model: Any,
        teacher: Any,
        prompts: list[Prompt],
        view: View,
        cache: FeatureCache,
        answers: list[list[int]],
        result: EvaluationResult,
    ) -> None:
        longest = max(map(len, answers))
        pad = self.tokenizer.pad_token_id
        ids_BT = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in answers], device=model.device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in answers], device=model.device)

        def hidden(of: nn.Module, read: View) -> Tensor:
            forward = partial(view_hidden_states, of, cache=cache)
            return in_batches(forward, read, ids_BT, mask_BT, self.batch_size)

        student_hidden, student_head = hidden(model, view), Head.of_model(model)
        result.entropy = score_tokens(student_hidden, student_head, ids_BT, mask_BT).entropy.sum(1).tolist()
        if teacher is not None:
            own = view if self.teacher_processing_class is None else self.view(prompts, model.device, teacher=True)
            targets = {"teacher": (hidden(teacher, own), Head.of_model(teacher))}
            routed = fused_routed_loss(student_hidden, student_head, targets, ids_BT, mask_BT, table("vanilla"))
            result.divergence = routed.per_token.sum(1).tolist()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
