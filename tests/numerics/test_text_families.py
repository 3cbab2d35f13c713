"""Every text family is scored as its own forward pass scores one sequence without padding: in scoring, in the loss and
its gradient, with shared prompts, in rollouts, in evaluation and in inspection.
"""

from pathlib import Path
from typing import Any

import pytest
import text_kit
import torch
import trainer_kit as kit
from compatibility import tried
from datasets import Dataset
from torch import Tensor

from dopd.data.encode import encode_prompts
from dopd.data.views import PrivilegedTemplate, plain_prompt, privileged_prompt
from dopd.evaluation.student import StudentEvaluator
from dopd.generation import prompts_together
from dopd.heads import Head
from dopd.inspection.inspector import Inspector
from dopd.methods import table
from dopd.prefix import hidden_states_sharing_prompts
from dopd.scoring import View, left_padded, view_hidden_states
from dopd.step import FixedModels, LocalScorer, Step

TOLERANCE = {"atol": 1e-4, "rtol": 1e-5}  # nats; log-probs of these models are down to -30
ROWS = kit.uneven_rows(8)[1::2]
# What the trial of sharing refuses: their cache holds a state, and not keys and values of every token.
RECURRENT = {
    "recurrent gemma", "rwkv", "xlstm", "mamba", "mamba2", "falcon mamba", "jamba", "bamba", "qwen3 next", "lfm2"
}  # fmt: skip
PADS_IN_STATE = {"recurrent gemma", "rwkv", "xlstm"}  # their own generate reads padding on the left
LENGTH_DEPENDENT = {"phi3 longrope", "llama dynamic"}


@pytest.fixture(scope="module", params=text_kit.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def uneven_batch() -> tuple[View, Tensor, Tensor, list[tuple[list[int], list[int]]]]:
    """Prompts and completions of very different lengths, two prompts equal, on both sides of `text_kit.SWITCH`."""
    draw = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(3, text_kit.VOCAB, (count,), generator=draw).tolist()

    prompts = [some(count) for count in (5, 9, 1, 20, 27)]
    prompts.append(prompts[3])
    completions = [some(count) for count in (8, 3, 8, 1, 8, 6)]
    mask = torch.tensor([[1] * len(ids) + [0] * (8 - len(ids)) for ids in completions])
    ids = torch.tensor([ids + [0] * (8 - len(ids)) for ids in completions])
    return left_padded(prompts, 0, torch.device("cpu")), ids, mask, list(zip(prompts, completions, strict=True))


def assert_own_logits(model: Any, hidden: Tensor, sequences: list[tuple[list[int], list[int]]]) -> None:
    logits = Head.of_model(model).logits(hidden)
    for row, (prompt, completion) in enumerate(sequences):
        expected = text_kit.own_logits(text_kit.fresh(model), prompt, completion)
        torch.testing.assert_close(
            logits[row, : len(completion)], expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5
        )


def test_states_are_those_of_the_unpadded_sequence(family: str) -> None:
    model = text_kit.build(family)
    view, ids, mask, sequences = uneven_batch()
    with torch.no_grad():
        for _ in range(2):  # nothing that ran before changes a score
            assert_own_logits(model, view_hidden_states(model, view, ids, mask), sequences)
        if family not in RECURRENT | LENGTH_DEPENDENT:
            assert_own_logits(model, hidden_states_sharing_prompts(model, view, ids, mask), sequences)


def test_trainer_scores_and_learns_what_the_model_says(family: str, tmp_path: Path) -> None:
    """Beyond the length at which two of the families change their frequencies, and below it."""
    model, teacher = text_kit.build(family), text_kit.build(family, seed=1)
    made = kit.trainer(
        tmp_path,
        "dopd",
        model=model,
        teacher_model=teacher,
        train_dataset=Dataset.from_list(ROWS),
        num_generations=2,
        max_completion_length=5,
        router_aux_loss_coef=0.0,
        off_policy_rollouts=True,  # answers may cross the switch of a family that has one
    )
    kind = type(model)
    assert (kind in made.models.sharing) == (family not in RECURRENT), family
    batch = kit.rollout(made)
    scored: dict[str, Any] = {
        "privileged_teacher": (teacher, privileged_prompt),
        "privileged_student": (model, privileged_prompt),
    }
    for source, (scoring, prompt_of) in scored.items():
        for row, (prompt, completion) in enumerate(sequences_of(made, batch, prompt_of)):
            expected = text_kit.own_logprobs(text_kit.fresh(scoring), prompt, completion)
            given = batch[f"logprobs/{source}"][row, : len(completion)].double()
            torch.testing.assert_close(given, expected, **TOLERANCE)
    tried("text family", family, outcome(family))


def test_loss_and_gradient_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    model, teacher = text_kit.build(family, std=0.15), text_kit.build(family, seed=1, std=0.15)
    made = kit.trainer(
        tmp_path,
        "vanilla",
        model=model,
        teacher_model=teacher,
        train_dataset=Dataset.from_list(ROWS),
        num_generations=2,
        max_completion_length=5,
        router_aux_loss_coef=0.0,
        off_policy_rollouts=True,  # answers may cross the switch of a family that has one
    )
    batch = kit.rollout(made)
    loss = kit.loss_of(made, batch)
    (gradient,) = torch.autograd.grad(loss, [model.get_input_embeddings().weight])
    expected, expected_gradient = torch.zeros(()), torch.zeros_like(gradient)
    sequences = sequences_of(made, batch, lambda row, template: plain_prompt(row))
    for prompt, completion in sequences:
        own = text_kit.fresh(model)
        with torch.no_grad():
            target = text_kit.own_logits(text_kit.fresh(teacher), prompt, completion).log_softmax(-1)
        mine = text_kit.own_logits(own, prompt, completion).log_softmax(-1)
        share = (mine.exp() * (mine - target)).sum(-1).mean() / len(sequences)
        expected_gradient += torch.autograd.grad(share, [own.get_input_embeddings().weight])[0]
        expected += share.detach()
    torch.testing.assert_close(loss.detach(), expected, atol=1e-5, rtol=1e-5)
    largest = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-4 * largest, rtol=1e-3)


def sequences_of(made: Any, batch: dict[str, Any], prompt_of: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids of every rollout behind the prompts that `prompt_of` makes of its row."""
    prompts = made.prompts.encode([prompt_of(row, made.prompts.template) for row in ROWS])
    rows = zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    return [(prompt, ids[mask.bool()].tolist()) for prompt, (ids, mask) in zip(prompts, rows, strict=True)]


class Recording(StudentEvaluator):
    """Keeps the token ids of every answer."""

    def _generate(self, models: Any, view: View, *, sampled: bool) -> list[list[int]]:
        answers = super()._generate(models, view, sampled=sampled)
        SEEN.append(answers)
        return answers


SEEN: list[list[list[int]]] = []


def evaluator(**options: Any) -> Recording:
    made = kit.evaluator(ROWS, lambda completion, row: 1.0, 5, template="{prompt} {privileged_context}", **options)
    return Recording(**vars(made))


def test_evaluation_answers_and_scores_each_prompt_as_alone(family: str) -> None:
    model, teacher = text_kit.build(family), text_kit.build(family, seed=1)
    SEEN.clear()
    result = evaluator().evaluate(model, teacher=teacher)
    greedy, _, sampled = SEEN
    prompts = encode_prompts(kit.TOKENIZER, [plain_prompt(row) for row in ROWS], {})
    for row, prompt in enumerate(prompts):
        if family != "llama dynamic" or len(prompt) + 5 <= text_kit.SWITCH:
            # Its cache keeps keys of the frequencies that a shorter prefix had.
            assert greedy[row] == own_greedy(model, prompt, len(greedy[row])), (family, row)
        mine = text_kit.own_logits(text_kit.fresh(model), prompt, sampled[row]).detach().double().log_softmax(-1)
        theirs = text_kit.own_logits(text_kit.fresh(teacher), prompt, sampled[row]).detach().double().log_softmax(-1)
        assert result.entropy[row] == pytest.approx(float(-(mine.exp() * mine).sum()), abs=1e-3)
        assert result.divergence[row] == pytest.approx(float((mine.exp() * (mine - theirs)).sum()), abs=1e-3)


def own_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, each by the model's own pass over everything before it."""
    ids: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            logits = text_kit.fresh(model)(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
    return ids


def test_prompts_are_answered_apart_only_where_they_must(family: str) -> None:
    view = uneven_batch()[0]
    short = view.at([0, 1, 2])  # far below the switch of the families that have one
    together = prompts_together(text_kit.build(family), short, 8)
    assert (len(together) == 1) == (family not in PADS_IN_STATE)
    every = prompts_together(text_kit.build(family), view, 8)
    assert (len(every) == 1) == (family not in PADS_IN_STATE | LENGTH_DEPENDENT)
    assert sorted(row for rows in every for row in rows) == list(range(6))
    if len(every) > 1:
        assert [3, 5] in every  # equal lengths


def test_inspection_shows_what_the_models_say(family: str) -> None:
    model, teacher = text_kit.build(family), text_kit.build(family, seed=1)
    models, asked = FixedModels(model, teacher), evaluator()
    inspector = Inspector(Step(table("dopd"), asked.prompts, LocalScorer(models, 8), asked.ending), asked, models)
    answers = [[5 + row, 9, 12, 7][: 1 + row % 4] for row in range(len(ROWS))]
    records = inspector.records(ROWS, answers=answers)
    template = PrivilegedTemplate("{prompt} {privileged_context}")
    plain = encode_prompts(kit.TOKENIZER, [plain_prompt(row) for row in ROWS], {})
    hinted = encode_prompts(kit.TOKENIZER, [privileged_prompt(row, template) for row in ROWS], {})
    for row, record in enumerate(records):
        for name, scoring, prompts in (
            ("logprob_plain", model, plain),
            ("logprob_student", model, hinted),
            ("logprob_teacher", teacher, hinted),
        ):
            expected = text_kit.own_logprobs(text_kit.fresh(scoring), prompts[row], answers[row])
            given = [token[name] for token in record["tokens"]]
            torch.testing.assert_close(torch.tensor(given).double(), expected, **TOLERANCE)


def outcome(family: str) -> str:
    notes = ["exact: scores, losses, gradients, evaluation, inspection"]
    if family in RECURRENT:
        notes.append("no shared prompts")
    if family in PADS_IN_STATE:
        notes.append("prompts answered in groups of equal length")
    if family in LENGTH_DEPENDENT:
        notes.append("sequences of different frequencies run apart")
    return "; ".join(notes)
