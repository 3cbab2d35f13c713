"""What an evaluation measures: of each prompt, and over all of them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dopd.statistics import wilson_interval


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer and its score in [0, 1]."""

    text: str
    score: float


@dataclass(frozen=True)
class PromptResult:
    """What one prompt came to.

    Attributes:
        greedy, sampled (`JudgedAnswer`): without privileged context, the likeliest answer and one drawn at T = 1.
        length (`int`): tokens of the sampled answer.
        ended (`float`): 1 where it ended by itself.
        entropy (`float`), divergence (`float`, *optional*): sums over its tokens: entropy of the student, and reverse
            KL to the plain teacher, nats.
        privileged (`JudgedAnswer`, *optional*): greedy, with privileged context.
        blank (`JudgedAnswer`, *optional*): greedy, to grey images in the place of the prompt's.
    """

    greedy: JudgedAnswer
    sampled: JudgedAnswer
    length: int
    ended: float
    entropy: float
    divergence: float | None = None
    privileged: JudgedAnswer | None = None
    blank: JudgedAnswer | None = None

    @classmethod
    def read(cls, record: dict[str, Any]) -> "PromptResult":
        """Of `asdict`, as JSON gives it back.

        Raises:
            TypeError, KeyError: it is none.
        """
        judged: dict[str, Any] = {
            name: JudgedAnswer(**record[name])
            for name in ("greedy", "sampled", "privileged", "blank")
            if record.get(name) is not None
        }
        numbers = {name: record[name] for name in ("length", "ended", "entropy", "divergence")}
        return cls(**judged, **numbers)


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

    @classmethod
    def of(cls, prompts: Iterable[PromptResult]) -> "EvaluationResult":
        """The results of prompts, in their order."""
        prompts = list(prompts)
        return cls(
            greedy=[prompt.greedy.score for prompt in prompts],
            sampled=[prompt.sampled.score for prompt in prompts],
            privileged=[prompt.privileged.score for prompt in prompts if prompt.privileged is not None],
            lengths=[prompt.length for prompt in prompts],
            ended=[prompt.ended for prompt in prompts],
            entropy=[prompt.entropy for prompt in prompts],
            divergence=[prompt.divergence for prompt in prompts if prompt.divergence is not None],
            blank=[prompt.blank.score for prompt in prompts if prompt.blank is not None],
        )

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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
