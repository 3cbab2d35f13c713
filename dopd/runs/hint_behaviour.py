"""What a model makes of hints: what it answers from p alone, and where p makes the right answer likelier."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from dopd.data.encode import tokenizer_of
from dopd.data.unknown import Reader
from dopd.data.views import plain_prompts, privileged_prompts
from dopd.errors import ConfigError, DataError
from dopd.hints.answers import answer_text
from dopd.hints.coverage import is_empty
from dopd.runs.local_models import LocalModel
from dopd.statistics import mean_interval, wilson_interval
from dopd.step.verifier import Verifier, judged

HINT_ONLY = (
    "Here is a note about a problem that is not shown to you:\n\n{privileged_context}\n\nWhat is the final answer to "
    "the problem? If you cannot know it, give your best guess. End with the answer alone on the last line."
)
_FIELD = "{privileged_context}"


def behaviour(
    model: LocalModel,
    rows: Sequence[Mapping[str, Any]],
    verifier: Verifier,
    *,
    most: int = 200,
    template: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy from p without the question, beside that from another row's p, and the gain of the answer's likelihood.

    Args:
        model (`LocalModel`): is asked and scores.
        rows: with `prompt`, `privileged_context` and what the verifier reads.
        verifier (`Verifier`): of answers.
        most (`int`): rows that are looked at, evenly spread.
        template (`str`, *optional*): text with `{privileged_context}` that asks for the answer from p alone; p itself
            where the model does not know the words of the usual one.
        seed (`int`): which other row's p is shown.

    Returns:
        A mapping for JSON; `rows` has `row`, `correct` and `gain` (nats) of each.

    Raises:
        DataError: no row with a hint and an answer.
        ConfigError: a template without its field.
        ScoringError: the verifier gives no score.
    """
    numbers = [n for n, row in enumerate(rows) if not is_empty(row.get("privileged_context")) and _reference(row)]
    if not numbers:
        raise DataError("no row has both a hint and an answer or a solution: there is nothing to ask a model")
    numbers = [numbers[n * len(numbers) // min(most, len(numbers))] for n in range(min(most, len(numbers)))]
    asked = [rows[n] for n in numbers]
    template = _template(model, template)
    own = [template.replace(_FIELD, str(row["privileged_context"])) for row in asked]
    shift = random.Random(seed).randrange(1, len(asked)) if len(asked) > 1 else 0
    others = own[shift:] + own[:shift]
    correct = _scores(model, own, asked, verifier, "p without the question")
    control = _scores(model, others, asked, verifier, "another row's p")
    gains, on_answer, tokens, answer_tokens = _gains(model, asked)
    total, share = sum(gains), sum(part for part in on_answer if part is not None)
    split_gains = [gain for gain, part in zip(gains, on_answer, strict=True) if part is not None]
    return {
        "model": model.name,
        "num_rows": len(numbers),
        "accuracy_from_p": asdict(wilson_interval(sum(correct), len(correct))),
        "accuracy_from_other_p": asdict(wilson_interval(sum(control), len(control))) if shift else None,
        "gain": asdict(mean_interval(gains)) if len(gains) > 1 else {"mean": total, "low": None, "high": None},
        "gain_per_token": total / max(sum(tokens), 1),
        "gain_share_on_answer": share / sum(split_gains) if split_gains and abs(sum(split_gains)) > 1e-9 else None,
        "token_share_of_answer": sum(answer_tokens) / max(sum(tokens), 1),
        "rows": [
            {"row": n, "correct": score, "gain": round(gain, 4)}
            for n, score, gain in zip(numbers, correct, gains, strict=True)
        ],
    }


def _reference(row: Mapping[str, Any]) -> str | None:
    """The text whose likelihood is compared: the solution, or the answer."""
    solution = row.get("solution")
    return solution if isinstance(solution, str) and solution.strip() else answer_text(row)


def _template(model: LocalModel, wanted: str | None) -> str:
    if wanted is None:
        unknown = Reader("the tokenizer", tokenizer_of(model.prompts.processing_class)).first_in(HINT_ONLY)
        return HINT_ONLY if unknown is None else _FIELD
    if wanted.count(_FIELD) != 1:
        raise ConfigError(f"--hint-only-prompt (={wanted!r}) must contain {_FIELD} exactly once")
    return wanted


def _scores(
    model: LocalModel, texts: Sequence[str], rows: Sequence[Mapping[str, Any]], verifier: Verifier, label: str
) -> list[float]:
    answers = model.answers([model.asks(text) for text in texts], label)
    return [judged(verifier, text, row) if ended else 0.0 for (text, ended), row in zip(answers, rows, strict=True)]


def _gains(
    model: LocalModel, rows: Sequence[Mapping[str, Any]]
) -> tuple[list[float], list[float | None], list[int], list[int]]:
    """Of each row: the gain of the reference's log-prob from p (nats), the part of it on the tokens of the answer
    (`None` where the reference is the answer, or does not have it), all tokens, and those of the answer.
    """
    tokenizer = tokenizer_of(model.prompts.processing_class)
    asked = model.prompts.asked(rows)
    texts = [str(_reference(row)) for row in rows]
    encoded = [tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in texts]
    ids = [list(one["input_ids"]) for one in encoded]
    plain = model.logprobs(plain_prompts(asked), ids, "likelihood without p")
    hinted = model.logprobs(privileged_prompts(asked, model.prompts.template), ids, "likelihood with p")
    gains, parts, counts = [], list[float | None](), []
    for row, text, one, before, after in zip(rows, texts, encoded, plain, hinted, strict=True):
        per_token = [b - a for a, b in zip(before, after, strict=True)]
        answer = answer_text(row) or ""
        start = text.rfind(answer) if answer and answer != text else -1
        end = start + len(answer)
        inside = [start >= 0 and a < end and b > start for a, b in one["offset_mapping"]]
        gains.append(sum(per_token))
        parts.append(sum(gain for gain, is_in in zip(per_token, inside, strict=True) if is_in) if start >= 0 else None)
        counts.append(sum(inside))
    return gains, parts, [len(one) for one in ids], counts
