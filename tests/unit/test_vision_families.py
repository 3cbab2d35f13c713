"""Every vision-language family: what one model computes from prompts with images.

The models are untrained, of the families' own transformers classes, with processors of their own classes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import vision_kit as kit
from compatibility import tried
from torch import Tensor
from transformers import AutoModelForImageTextToText

from dopd.data.encode import encode_prompts, encode_view
from dopd.data.views import PrivilegedTemplate, plain_prompt, privileged_prompt
from dopd.errors import ModelError
from dopd.fused import score_tokens
from dopd.heads import Head
from dopd.prefix import different_prompts, hidden_states_sharing_prompts, shares_prompts_exactly
from dopd.scoring import View, generation_inputs, view_hidden_states
from dopd.trainer.images import processor_for
from dopd.vision import load_processor
from dopd.vision.tokens import placeholder_ids, types_behind

FAMILIES = list(kit.FAMILIES)
TOLERANCE = 2e-5


class Made:
    """One family's processor and model, and a batch of prompts: one with an image, twice; two images; none."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.processor = kit.processor(name)
        self.model = kit.model(name, self.processor)
        self.prompts = [
            kit.user("how many red ?", kit.picture(0)),
            kit.user("how many red ?", kit.picture(0)),
            kit.user("what is the circle left of ?", kit.picture(1), kit.picture(2, width=64)),
            kit.user("what ?", *([kit.picture(3)] if kit.family(name).needs_image else [])),
        ]
        self.view = self.encode(self.prompts)
        self.ids = self.completion(4, 5)
        self.mask = torch.ones_like(self.ids)

    def encode(self, prompts: list[Any]) -> View:
        return encode_view(self.processor, prompts, {}, "cpu")

    def completion(self, rows: int, tokens: int) -> Tensor:
        first = self.processor.tokenizer.convert_tokens_to_ids(kit.WORDS[0])
        return torch.randint(first, len(self.processor.tokenizer), (rows, tokens))

    @torch.no_grad()
    def hidden(self, view: View, rows: slice = slice(None), **options: Any) -> Tensor:
        return view_hidden_states(self.model, view, self.ids[rows], self.mask[rows], **options)


@pytest.fixture(scope="module", params=FAMILIES)
def made(request: pytest.FixtureRequest) -> Made:
    torch.manual_seed(0)
    return Made(request.param)


@torch.no_grad()
def test_cached_generation_gives_the_logits_of_the_full_forward(made: Made) -> None:
    forbidden = placeholder_ids(made.model.config)
    output = made.model.generate(
        **generation_inputs(made.model, made.view),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        suppress_tokens=forbidden,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = output.sequences[:, made.view.prompt_ids.shape[1] :]
    hidden = view_hidden_states(made.model, made.view, ids, torch.ones_like(ids))
    full = made.model.get_output_embeddings()(hidden)
    torch.testing.assert_close(torch.stack(output.logits, dim=1), full, atol=TOLERANCE, rtol=1e-4)


@torch.no_grad()
def test_a_completion_token_has_the_type_that_the_family_gives_it_and_reads_nothing_behind_it(made: Made) -> None:
    prompt = made.view.prompt_ids.shape[1]
    for values in types_behind(made.model, made.view.token_types, 3).values():
        assert bool((values[:, prompt:] == kit.family(made.name).suffix_type).all())
        assert values.shape == (4, prompt + 3)
    base, ids = made.hidden(made.view), made.ids.clone()
    red, blue = made.processor.tokenizer.convert_tokens_to_ids(["red", "blue"])
    ids[:, -2:] = torch.where(ids[:, -2:] == red, blue, red)
    other = view_hidden_states(made.model, made.view, ids, made.mask)
    torch.testing.assert_close(other[:, :-1], base[:, :-1], atol=TOLERANCE, rtol=1e-4)
    assert (other[:, -1] - base[:, -1]).abs().max() > 1e-2


def test_padding_on_the_left_changes_nothing(made: Made) -> None:
    together = made.hidden(made.view)
    for row, prompt in enumerate(made.prompts):
        alone = made.hidden(made.encode([prompt]), slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, atol=TOLERANCE, rtol=1e-4)


def test_a_slice_of_a_batch_gives_the_rows_of_the_batch(made: Made) -> None:
    together = made.hidden(made.view)
    for part in (slice(0, 2), slice(1, 3), slice(2, 4), slice(3, 4)):
        sliced = made.view.rows(part.start, part.stop)
        torch.testing.assert_close(made.hidden(sliced, part), together[part], atol=TOLERANCE, rtol=1e-4)


def test_each_image_once_and_each_prompt_once_are_exact_in_value_and_gradient(made: Made) -> None:
    weights = torch.randn(*made.ids.shape, 24)

    def outcome(states: Any) -> tuple[Tensor, list[Tensor]]:
        made.model.zero_grad()
        hidden = states()
        (hidden * weights).sum().backward()
        return hidden.detach(), [p.grad.clone() for p in made.model.parameters() if p.grad is not None]

    arguments = (made.model, made.view, made.ids, made.mask)
    plain, plain_gradients = outcome(lambda: view_hidden_states(*arguments, as_features=False))
    routes = [lambda: view_hidden_states(*arguments)]
    if kit.family(made.name).shares_prompts:
        routes.append(lambda: hidden_states_sharing_prompts(*arguments))
    else:
        assert not shares_prompts_exactly(made.model, half=False)
    for states in routes:
        hidden, gradients = outcome(states)
        torch.testing.assert_close(hidden, plain, atol=TOLERANCE, rtol=1e-4)
        for mine, theirs in zip(gradients, plain_gradients, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_another_image_or_another_order_gives_other_states(made: Made) -> None:
    base = made.hidden(made.view)
    other = made.hidden(
        made.encode(
            [
                kit.user("how many red ?", kit.picture(9)),
                made.prompts[1],
                kit.user("what is the circle left of ?", kit.picture(2, width=64), kit.picture(1)),
                made.prompts[3],
            ]
        )
    )
    changed = (base - other).abs().amax((1, 2))
    assert changed[0] > 1e-2 and changed[2] > 1e-2
    assert changed[1] < TOLERANCE and changed[3] < TOLERANCE


@torch.no_grad()
def test_the_same_words_about_different_images_are_different_prompts(made: Made) -> None:
    view = made.encode([kit.user("how many red ?", kit.picture(n)) for n in (0, 5, 0, 5)])
    assert different_prompts(view)[1] in ([0, 1, 0, 1], [1, 0, 1, 0])
    if not kit.family(made.name).shares_prompts:
        return
    shared = hidden_states_sharing_prompts(made.model, view, made.ids, made.mask)
    torch.testing.assert_close(shared, made.hidden(view, as_features=False), atol=TOLERANCE, rtol=1e-4)


def test_without_p_the_privileged_view_is_the_plain_view(made: Made) -> None:
    row = {**kit.rows(1)[0], "privileged_context": " "}
    template = PrivilegedTemplate()
    plain, privileged = (made.encode([p]) for p in (plain_prompt(row), privileged_prompt(row, template)))
    assert torch.equal(plain.prompt_ids, privileged.prompt_ids)
    one = slice(0, 1)
    assert torch.equal(made.hidden(plain, one), made.hidden(privileged, one))
    with_p = made.encode([privileged_prompt(kit.rows(1)[0], template)])
    assert (made.hidden(plain, one) - made.hidden(with_p, one)).abs().max() > 1e-2


def test_placeholders_have_no_probability_and_everything_else_sums_to_one(made: Made) -> None:
    forbidden = placeholder_ids(made.model.config)
    assert forbidden
    hidden = made.hidden(made.view)
    probs = Head.of_model(made.model).logits(hidden).softmax(-1)
    assert bool((probs[..., forbidden] == 0).all())
    raw = made.model.get_output_embeddings()(hidden).detach()
    raw[..., forbidden] = -torch.inf
    torch.testing.assert_close(probs, raw.softmax(-1))
    scores = score_tokens(hidden, Head.of_model(made.model), made.ids, made.mask)
    expected = raw.log_softmax(-1).gather(-1, made.ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores.logprobs, expected, atol=TOLERANCE, rtol=1e-4)
    assert bool(torch.isfinite(scores.entropy).all())


def test_model_and_processor_come_back_from_a_folder(made: Made, tmp_path: Path) -> None:
    if not kit.family(made.name).reloads:
        pytest.skip("transformers cannot read this processor back here")
    made.model.save_pretrained(tmp_path)
    made.processor.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    view = encode_view(load_processor(str(tmp_path)), made.prompts, {}, "cpu")
    assert torch.equal(view.prompt_ids, made.view.prompt_ids)
    with torch.no_grad():
        again = view_hidden_states(model, view, made.ids, made.mask)
    torch.testing.assert_close(again, made.hidden(made.view))


def test_a_family_whose_tokens_say_which_images_they_read_is_refused_by_name() -> None:
    made = kit.processor("mllama")
    with pytest.raises(ModelError, match=r"MllamaProcessor says 'cross_attention_mask' of every token of a prompt"):
        processor_for(kit.model("mllama", made), made)
    with pytest.raises(ModelError, match=r"MllamaProcessor says 'cross_attention_mask' of every token of a prompt"):
        encode_view(made, [kit.user("how many red ?", kit.picture(0))], {}, "cpu")
    tried("image family", "mllama", "refused: its processor says of every token which images it reads")


@pytest.mark.parametrize("shape", [(1, -1), (1, 3, -1), (1, -1, 2), (-1,)])
def test_a_field_with_an_entry_for_every_token_is_refused_whatever_its_name_and_shape(shape: tuple[int, ...]) -> None:
    made = kit.processor("llava")

    class Telling(type(made)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **kwargs)
            length = output["input_ids"].shape[1]
            output["places"] = torch.zeros([length if size == -1 else size for size in shape])
            return output

    made.__class__ = Telling
    with pytest.raises(ModelError, match="Telling says 'places' of every token of a prompt"):
        encode_view(made, [kit.user("how many red ?", kit.picture(0))], {}, "cpu")


def test_a_field_of_images_that_has_the_length_of_the_prompt_by_chance_is_one_of_images() -> None:
    made = kit.processor("gemma4")
    prompt = kit.user("how many red ?", kit.picture(0))
    (tokens,) = (len(ids) for ids in encode_prompts(made, [prompt], {}))
    places = encode_view(made, [prompt], {}, "cpu").images[0].fields["image_position_ids"]
    missing = places.shape[1] - tokens
    prompt = kit.user("how many red ?" + " red" * missing, kit.picture(0))
    view = encode_view(made, [prompt], {}, "cpu")
    assert view.prompt_ids.shape[1] == view.images[0].fields["image_position_ids"].shape[1] == tokens + missing
