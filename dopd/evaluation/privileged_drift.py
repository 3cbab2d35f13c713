"""How far the student reading p is from where it began: a divergence on answers of its own.

KL(S0(. | x, p) || S(. | x, p)) per token, estimated on answers y that the student S0 drew with p before training: the
mean over their tokens of log S0(y | x, p) - log S(y | x, p), which may be a little below 0 where nothing has moved.
They are drawn once; an evaluation scores them in one pass.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dopd.data.views import lacks_privileged, privileged_prompt
from dopd.evaluation.student import StudentEvaluator
from dopd.scoring import evaluation_mode, random_state_kept
from dopd.sources import LIVE
from dopd.step import FixedModels, LocalScorer

_PROMPTS = 32  # of the held-out ones with p, from the first on
_FILE = "privileged_start.json"


@dataclass(frozen=True)
class StartAnswer:
    """An answer from before training.

    Attributes:
        row (`int`): the place of its prompt among the held-out ones.
        ids (`list[int]`): its tokens.
        logprob (`float`): their log-prob by the student that drew them, nats.
    """

    row: int
    ids: list[int]
    logprob: float


@dataclass(frozen=True)
class PrivilegedStart:
    """What the student answered with p before training; the same on every process.

    Attributes:
        digest (`str`): of the texts of p that it read.
        answers (`tuple[StartAnswer, ...]`): one for each prompt.
    """

    digest: str
    answers: tuple[StartAnswer, ...]

    def save(self, folder: Path) -> None:
        answers = [[one.row, one.ids, one.logprob] for one in self.answers]
        (folder / _FILE).write_text(json.dumps({"digest": self.digest, "answers": answers}))

    @classmethod
    def load(cls, folder: Path) -> "PrivilegedStart | None":
        """What `save` wrote; `None` where a checkpoint has none."""
        if not (folder / _FILE).is_file():
            return None
        record = json.loads((folder / _FILE).read_text())
        return cls(record["digest"], tuple(StartAnswer(*one) for one in record["answers"]))

    def is_of(self, evaluator: StudentEvaluator) -> bool:
        """Whether it answers the prompts of an evaluator: a run that goes on may have others."""
        return bool(self.answers) and self.digest == digest_of(evaluator)


def digest_of(evaluator: StudentEvaluator) -> str:
    """Of the texts of p that are answered."""
    texts = [str(evaluator.rows[number].get("privileged_context")) for number in _numbers(evaluator)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _numbers(evaluator: StudentEvaluator) -> list[int]:
    return [number for number, row in enumerate(evaluator.rows) if not lacks_privileged(row)][:_PROMPTS]


def start_answers(evaluator: StudentEvaluator, model: Any, shard: tuple[int, int]) -> list[StartAnswer]:
    """Draw the answers of one shard (index, count) of the prompts; the random state is left as it was."""
    numbers = _numbers(evaluator)[shard[0] :: shard[1]]
    if not numbers:
        return []
    with evaluation_mode(model), random_state_kept(model), torch.no_grad():
        torch.manual_seed(evaluator.seed + shard[0])
        drawn = evaluator.answers(model, _prompts(evaluator, numbers), sampled=True)
    logprobs = _logprobs(evaluator, model, numbers, drawn)
    return [StartAnswer(*one) for one in zip(numbers, drawn, logprobs, strict=True)]


def drift(
    evaluator: StudentEvaluator, model: Any, answers: Sequence[StartAnswer], shard: tuple[int, int]
) -> tuple[float, int]:
    """Of one shard of the answers, the sum of log S0(y) - log S(y), nats, and the number of tokens."""
    mine = answers[shard[0] :: shard[1]]
    if not mine:
        return 0.0, 0
    now = _logprobs(evaluator, model, [one.row for one in mine], [one.ids for one in mine])
    fallen = sum(one.logprob - value for one, value in zip(mine, now, strict=True))
    return fallen, sum(len(one.ids) for one in mine)


def _prompts(evaluator: StudentEvaluator, numbers: Sequence[int]) -> list[Any]:
    asked = evaluator.prompts.asked([evaluator.rows[number] for number in numbers])
    return [privileged_prompt(row, evaluator.prompts.template) for row in asked]


def _logprobs(
    evaluator: StudentEvaluator, model: Any, numbers: Sequence[int], answers: Sequence[list[int]]
) -> list[float]:
    """Log-probs of whole answers, behind prompts with p, nats."""
    view = evaluator.prompts.view(_prompts(evaluator, numbers), model.device)
    ids, mask, _ = evaluator.prompts.padded([list(one) for one in answers], model.device)
    scores = LocalScorer(FixedModels(model), evaluator.batch_size).score(LIVE, view, ids, mask)
    sums: list[float] = scores.tokens.logprobs.double().sum(1).tolist()
    return sums
