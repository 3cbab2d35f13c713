"""What an evaluation measures: of each prompt, and over all of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dopd.errors import ConfigError
from dopd.statistics import Interval, pass_at, prompts_interval

# What a prompt is asked for: the likeliest answer, drawn ones, the likeliest with p, and to grey images.
MEASURES = ("greedy", "sampled", "privileged", "blank")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        samples (`int`): answers to each prompt.
        temperature, top_p (`float`), top_k (`int`): of the distribution that they are drawn from; the defaults leave it
            as the model has it.

    Raises:
        ConfigError: a value that is not allowed.
    """

    samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("samples", self.samples >= 1, "at least 1"),
            ("temperature", 0 < self.temperature < math.inf, "above 0; greedy answers are measured beside"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0, which is all tokens"),
        ):
            if not fits:
                raise ConfigError(f"{name} (={getattr(self, name)}) must be {allowed}")


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer and its score.

    Attributes:
        text (`str`): without special tokens.
        score (`float`): in [0, 1]; 0 for an answer that was cut at the length limit.
        length (`int`, *optional*): its tokens; `None` where a server does not say them.
        ended (`bool`): whether it ended by itself.
        refused (`bool`): whether a server refused the request, so that there is no answer; it counts as a wrong one.
    """

    text: str
    score: float
    length: int | None = None
    ended: bool = True
    refused: bool = False


@dataclass(frozen=True)
class PromptResult:
    """What one prompt came to.

    Attributes:
        greedy (`JudgedAnswer`, *optional*): without privileged context, the likeliest answer.
        samples (`tuple[JudgedAnswer, ...]`): without privileged context, drawn ones.
        entropy, divergence (`float`, *optional*): sums over the tokens of all drawn answers: entropy of the student,
            and reverse KL to the plain teacher, nats.
        privileged (`JudgedAnswer`, *optional*): greedy, with privileged context.
        blank (`JudgedAnswer`, *optional*): greedy, to grey images in the place of the prompt's.
    """

    greedy: JudgedAnswer | None = None
    samples: tuple[JudgedAnswer, ...] = ()
    entropy: float | None = None
    divergence: float | None = None
    privileged: JudgedAnswer | None = None
    blank: JudgedAnswer | None = None

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> "PromptResult":
        """Of `asdict`, as JSON gives it back.

        Raises:
            TypeError, KeyError: it is none.
        """
        single: dict[str, Any] = {
            name: JudgedAnswer(**record[name])
            for name in ("greedy", "privileged", "blank")
            if record.get(name) is not None
        }
        samples = tuple(JudgedAnswer(**one) for one in record["samples"])
        return cls(samples=samples, entropy=record["entropy"], divergence=record["divergence"], **single)


@dataclass
class EvaluationResult:
    """Per-prompt results; results of disjoint prompts add up with `+`.

    Attributes:
        greedy, privileged (`list[float]`): scores of greedy answers without privileged context, and with it.
        draws (`list[list[float]]`): of each prompt, the scores of its sampled answers without privileged context.
        blank (`list[float]`): of prompts with images: scores of greedy answers to grey images of the same size. What
            is right there was not read off an image.
        lengths (`list[int]`): tokens of the sampled answers, one after the other.
        ended (`list[float]`): 1 where a sampled answer ended by itself; nothing for a request that was refused.
        refused (`list[float]`): 1 where a request was refused, of all that was asked.
        entropy, divergence (`list[float]`): sums over the tokens of a prompt's sampled answers: entropy of the student,
            and reverse KL to the plain teacher, nats.
    """

    greedy: list[float] = field(default_factory=list)
    draws: list[list[float]] = field(default_factory=list)
    privileged: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    blank: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, prompts: Iterable[PromptResult]) -> "EvaluationResult":
        """The results of prompts, in their order."""
        prompts = list(prompts)
        drawn = [answer for prompt in prompts for answer in prompt.samples]
        single = [
            one for prompt in prompts for one in (prompt.greedy, prompt.privileged, prompt.blank) if one is not None
        ]
        return cls(
            greedy=[prompt.greedy.score for prompt in prompts if prompt.greedy is not None],
            draws=[[answer.score for answer in prompt.samples] for prompt in prompts if prompt.samples],
            privileged=[prompt.privileged.score for prompt in prompts if prompt.privileged is not None],
            lengths=[answer.length for answer in drawn if answer.length is not None],
            ended=[float(answer.ended) for answer in drawn if not answer.refused],
            entropy=[prompt.entropy for prompt in prompts if prompt.entropy is not None],
            divergence=[prompt.divergence for prompt in prompts if prompt.divergence is not None],
            blank=[prompt.blank.score for prompt in prompts if prompt.blank is not None],
            refused=[float(answer.refused) for answer in (*single, *drawn)],
        )

    def __add__(self, other: "EvaluationResult") -> "EvaluationResult":
        return EvaluationResult(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def sampled(self) -> list[float]:
        """Of each prompt, the mean score of its sampled answers: their mean is avg@k."""
        return [_mean(scores) for scores in self.draws]

    @property
    def num_samples(self) -> int:
        """Sampled answers to each prompt."""
        return min(map(len, self.draws), default=0)

    @property
    def num_prompts(self) -> int:
        """Prompts that were answered, whatever was asked of them."""
        return max(len(self.greedy), len(self.draws), len(self.privileged), len(self.blank))

    def passes(self) -> dict[int, list[float]]:
        """Of each prompt, pass@k without bias (`dopd.statistics.pass_at`): for k = 2, 4, 8, ... and all samples."""
        count = self.num_samples
        powers = [2**power for power in range(1, count.bit_length()) if 2**power < count]
        return {k: [pass_at(k, scores) for scores in self.draws] for k in [*powers, *[count][: count > 1]]}

    def metrics(self) -> dict[str, float]:
        """Means: accuracies in [0, 1], length in tokens, entropy and divergence in nats per token; with several samples
        `pass@k`, and how many there were.
        """
        tokens = max(sum(self.lengths), 1)
        result = {
            "accuracy_greedy": _mean(self.greedy),
            "accuracy_sampled": _mean(self.sampled),
            "accuracy_privileged": _mean(self.privileged),
            "accuracy_blank": _mean(self.blank),
            "length": _mean(self.lengths),
            "eos_ratio": _mean(self.ended),
            "num_prompts": float(self.num_prompts),
        }
        if any(self.refused):
            result["refused_ratio"] = _mean(self.refused)
        if self.entropy:
            result["entropy"] = sum(self.entropy) / tokens
        if self.divergence:
            result["divergence_to_teacher"] = sum(self.divergence) / tokens
        if self.num_samples > 1:
            result |= {f"pass@{k}": _mean(values) for k, values in self.passes().items()}
            result["num_samples"] = float(self.num_samples)
        return {name: value for name, value in result.items() if value == value}

    def scores(self) -> dict[str, list[float]]:
        """Of each prompt, its scores by what was asked of it; those of sampled answers are means."""
        every = {"greedy": self.greedy, "sampled": self.sampled, "privileged": self.privileged, "blank": self.blank}
        return {name: values for name, values in every.items() if values or name != "blank"}

    def intervals(self) -> dict[str, Interval]:
        """Of accuracies and of pass@k, their 95% intervals over prompts."""
        found = {
            f"accuracy_{name}": prompts_interval(values, self.num_samples if name == "sampled" else 1)
            for name, values in self.scores().items()
            if values
        }
        passes = self.passes()
        return found | {f"pass@{k}": prompts_interval(values, self.num_samples // k) for k, values in passes.items()}

    def to_json(self) -> dict[str, Any]:
        """`metrics`, accuracies with 95% intervals, and every prompt's scores, for paired comparisons."""
        intervals = {name: asdict(interval) for name, interval in self.intervals().items()}
        record = {"metrics": self.metrics(), "intervals": intervals, "scores": self.scores()}
        return record if self.num_samples < 2 else record | {"draws": self.draws}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
