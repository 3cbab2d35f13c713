"""Computing each prompt once for all its rollouts changes nothing but the time: values and gradients to rounding.

Shapes: U prompts, G rollouts of each, P prompt tokens, T completion tokens.
"""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import dopd
from dopd.assignment import Assignment
from dopd.fused import TokenScores
from dopd.prefix import different_prompts, hidden_states_sharing_prompts
from dopd.random_states import random_states_kept
from dopd.scoring import View, random_state_kept, skipping_padding, view_hidden_states
from dopd.step import ScoredBatch, SourceScores

VOCAB = 40


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    # Llama's norms compute in float32 whatever the weights are, so float64 would not show more.
    return LlamaForCausalLM(config).eval()


def batch(prompts: int, rollouts: int, prompt_tokens: int, tokens: int) -> tuple[View, Tensor, Tensor]:
    ids_UP = torch.randint(3, VOCAB, (prompts, prompt_tokens))
    mask_UP = torch.ones_like(ids_UP)
    for row in range(prompts - 1):  # different lengths, padded on the left
        mask_UP[row, : min(row + 1, prompt_tokens - 1)] = 0
    order = torch.randperm(prompts * rollouts)
    rows = torch.arange(prompts).repeat_interleave(rollouts)[order]
    completion_mask = torch.ones(prompts * rollouts, tokens, dtype=torch.long)
    completion_mask[0, max(tokens // 2, 1) :] = 0
    completion_ids = torch.randint(3, VOCAB, completion_mask.shape) * completion_mask
    return View((ids_UP * mask_UP)[rows], mask_UP[rows]), completion_ids, completion_mask


@pytest.mark.parametrize(
    ("prompts", "rollouts", "prompt_tokens", "tokens"), [(3, 4, 9, 5), (1, 3, 7, 4), (4, 1, 5, 6), (2, 2, 3, 1)]
)
def test_shared_prompts_give_the_plain_values_and_gradients(
    model: PreTrainedModel, prompts: int, rollouts: int, prompt_tokens: int, tokens: int
) -> None:
    view, ids, mask = batch(prompts, rollouts, prompt_tokens, tokens)
    weights = torch.randn(*ids.shape, 32) * mask.unsqueeze(-1)
    results = []
    for forward in (view_hidden_states, hidden_states_sharing_prompts):
        model.zero_grad()
        hidden = forward(model, view, ids, mask)
        (hidden * weights).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        results.append((hidden.detach() * mask.unsqueeze(-1), gradients))
    (expected, expected_gradients), (value, gradients) = results
    assert value.shape == (*ids.shape, 32)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


def test_every_different_prompt_runs_once(model: PreTrainedModel) -> None:
    view, ids, mask = batch(3, 4, 9, 5)
    shapes = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    hidden_states_sharing_prompts(model, view, ids, mask)
    hook.remove()
    assert shapes == [(3, 9), (12, 4)]


def test_prompts_that_differ_only_in_padding_are_told_apart() -> None:
    # The padding token's id also stands in the second prompt, as a token that is read.
    view = View(torch.tensor([[0, 5], [0, 5], [0, 5]]), torch.tensor([[0, 1], [1, 1], [0, 1]]))
    first, prompt_of_row = different_prompts(view)
    assert len(first) == 2
    assert prompt_of_row[0] == prompt_of_row[2] != prompt_of_row[1]
    assert sorted(first) == [0, 1]


def test_padding_that_nobody_reads_is_not_computed(model: PreTrainedModel) -> None:
    view, ids, mask = batch(2, 2, 9, 6)
    mask[:, 4:] = 0
    wide = View(torch.nn.functional.pad(view.prompt_ids, (3, 0)), torch.nn.functional.pad(view.prompt_mask, (3, 0)))
    widths = []

    def forward(part: View, part_ids: Tensor, part_mask: Tensor) -> Tensor:
        widths.append((part.prompt_ids.shape[1], part_ids.shape[1]))
        return view_hidden_states(model, part, part_ids, part_mask)

    hidden = skipping_padding(forward, wide, ids, mask)
    longest = int(view.prompt_mask.sum(1).max())
    assert widths == [(longest, 4)]
    expected = view_hidden_states(model, wide, ids, mask)
    torch.testing.assert_close(hidden * mask.unsqueeze(-1), expected * mask.unsqueeze(-1), rtol=1e-4, atol=1e-5)


def test_a_mask_with_a_hole_in_it_reads_what_stands_behind(model: PreTrainedModel) -> None:
    view, ids, mask = batch(2, 2, 9, 6)
    mask[:] = 0
    mask[0, 0] = mask[1, 4] = 1

    def forward(part: View, part_ids: Tensor, part_mask: Tensor) -> Tensor:
        return view_hidden_states(model, part, part_ids, torch.ones_like(part_mask))

    hidden = skipping_padding(forward, view, ids, mask)
    expected = view_hidden_states(model, view, ids, torch.ones_like(mask))
    torch.testing.assert_close(hidden[:, :5], expected[:, :5], rtol=1e-4, atol=1e-5)


def test_random_states_of_the_devices_that_hold_the_model_are_kept(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, torch.device]] = []

    class Devices:
        """Stands in for the random states of accelerators."""

        @staticmethod
        def get_rng_state(device: torch.device) -> Tensor:
            asked.append(("read", device))
            return torch.zeros(1)

        @staticmethod
        def set_rng_state(state: Tensor, device: torch.device) -> None:
            asked.append(("set", device))

    monkeypatch.setattr(torch, "get_device_module", lambda device: Devices)
    before = torch.get_rng_state()
    with random_state_kept(model):
        torch.manual_seed(3)
        torch.rand(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert asked == []  # of a model on the CPU, no other device is asked
    second = torch.device("cuda", 1)
    with random_states_kept(second):
        pass
    assert asked == [("read", second), ("set", second)]


def test_groups_are_ordered_by_length_and_stay_together() -> None:
    lengths = torch.tensor([5, 1, 2, 2, 3, 9, 1, 1])
    completion_mask = (torch.arange(9) < lengths.unsqueeze(1)).long()
    view = View(torch.ones(8, 2, dtype=torch.long), torch.ones(8, 2, dtype=torch.long))
    decided = Assignment(completion_mask - 1, factors={0: lengths.unsqueeze(1) * completion_mask})
    scores = SourceScores(TokenScores(lengths.unsqueeze(1) * 1.0, lengths.unsqueeze(1) * 2.0))
    numbers = torch.arange(8)
    table = dopd.table("vanilla")
    rows = ScoredBatch(table, view, completion_mask * 3, completion_mask, {"teacher": scores}, decided, 8.0, numbers)
    (ordered,) = rows.split(1, 2)
    assert ordered.numbers.tolist() == [6, 7, 2, 3, 0, 1, 4, 5]
    assert torch.equal(ordered.mask.sum(1), lengths[ordered.numbers])
    assert rows.split(1, 3)[0].numbers.tolist() == lengths.argsort(stable=True).tolist()
    parts = rows.split(4, 2)
    assert torch.cat([part.numbers for part in parts]).tolist() == ordered.numbers.tolist()
    for part in parts:
        mine = lengths[part.numbers]
        assert torch.equal(part.completion_ids.sum(1), 3 * mine) and torch.equal(part.assignment.regimes + 1, part.mask)
        assert torch.equal(part.assignment.factors[0].amax(1), mine) and part.num_sequences == 8.0
        tokens = part.sources["teacher"].tokens
        assert torch.equal(tokens.logprobs[:, 0], mine * 1.0) and torch.equal(tokens.entropy[:, 0], mine * 2.0)
