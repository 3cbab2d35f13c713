"""Answers to the prompts of a view, with prompts side by side only where they do not change one another's answers.

`generate` pads prompts on the left. Models with a recurrent state read that padding, and where frequencies depend on
the length of the longest row a row beside a longer one is answered by another model. Their prompts are answered in
groups of equal length.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from dopd.adapters import without_adapters
from dopd.errors import DopdError, ModelError, first_line
from dopd.heads import Head
from dopd.lengths import forget_longer_passes, is_first_regime
from dopd.sampling import Ending, drawn, nothing_of_the_checkpoint
from dopd.scoring import (
    View,
    backbone_of,
    evaluation_mode,
    generation_inputs,
    left_padded,
    rounding,
    view_hidden_states,
)
from dopd.vision.tokens import placeholder_ids
from dopd.vocabulary import vocab_size_of

_SHORT, _LONG, _STEPS = 4, 20, 3  # tokens of the trial: two prompts, and how many are generated
_takes_padding: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def answers(
    model: Any,
    view: View,
    config: GenerationConfig,
    ending: Ending,
    *,
    inputs: Callable[[View], Mapping[str, Any]],
    alone: bool = False,
) -> list[list[int]]:
    """Token ids of one answer to each prompt, up to and with what ends it.

    Args:
        model: an unwrapped transformers model with whole parameters.
        view (`View`): B prompts.
        config (`GenerationConfig`): of `sampling_config`.
        ending (`Ending`): of the answers.
        inputs (callable): prompts -> arguments of `generate`.
        alone (`bool`): whether a model that cannot take padding answers one prompt at a time, so that every process
            runs equally often.
    """
    generated: list[list[int]] = [[] for _ in view.prompt_ids]
    for rows in prompts_together(model, view, config.max_new_tokens, alone=alone):
        part = view.at(rows)
        forget_longer_passes(backbone_of(model), model.config)
        for row, ids in zip(rows, drawn(model, inputs(part), config, ending), strict=True):
            generated[row] = ids
    return generated


def prompts_together(model: Any, view: View, max_new_tokens: int, *, alone: bool = False) -> list[list[int]]:
    """Rows whose prompts `generate` may answer side by side, as lists of row numbers."""
    lengths = list(view.lengths)
    equal = len(set(lengths)) == 1
    if equal or (is_first_regime(model.config, max(lengths) + max_new_tokens) and takes_left_padding(model)):
        return [list(range(len(lengths)))]
    if alone:
        return [[row] for row in range(len(lengths))]
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(length, []).append(row)
    return list(groups.values())


def takes_left_padding(model: Any) -> bool:
    """Whether `generate` answers a short prompt beside a long one as it answers it alone; tried once for each model."""
    whole = without_adapters(model)
    if whole not in _takes_padding:
        with evaluation_mode(model), torch.no_grad():
            _takes_padding[whole] = _same_beside_a_longer_one(model)
    return _takes_padding[whole]


def _same_beside_a_longer_one(model: Any) -> bool:
    short, long = (words(model, count) for count in (_SHORT, _LONG))
    try:
        ids, alone = _greedy(model, left_padded([short], 0, model.device))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return True  # reads more than text; `generate` says of the real prompts what is wrong
    try:
        ids_beside, beside = _greedy(model, left_padded([short, long], 0, model.device))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    # Behind two different tokens nothing can be compared; ties are rare, and the first step tells enough.
    same = int((ids[0] == ids_beside[0]).long().cumprod(0).sum())
    steps = min(same + 1, _STEPS)
    return _close(beside[0, :steps], alone[0, :steps], model)


@torch.no_grad()
def check_generation(name: str, model: Any, view: View | None = None, *, as_features: bool = True) -> None:
    """Raise `ModelError` unless the first tokens behind each prompt are drawn from the distribution that is scored.

    Args:
        name (`str`): of the model, for the message.
        model: an unwrapped transformers model with whole parameters.
        view (`View`, *optional*): prompts to try, with their images; a few words if left out.
        as_features (`bool`): as in `view_hidden_states`.
    """
    view = view or left_padded([words(model, _SHORT)], 0, model.device)
    for row in range(len(view.prompt_ids)):
        prompt = view.at([row])
        with runs(name, model), evaluation_mode(model):
            ids, drawn_from = _greedy(model, prompt, as_features=as_features)
            hidden = view_hidden_states(model, prompt, ids, torch.ones_like(ids), as_features=as_features)
            scored = Head.of_model(model).logits(hidden)
        if not _close(without_placeholders(drawn_from, model), without_placeholders(scored, model), model):
            raise ModelError(
                f"{name}: {type(model).__name__} draws tokens from another distribution than it is scored by: its "
                "generate and its forward pass give different logits behind the same tokens"
                + (" and images, of which generate loses something, for example positions" if view.images else "")
                + ". Update transformers, or use another model"
            )


@contextmanager
def runs(name: str, model: Any) -> Iterator[None]:
    """Name the model and what its own code said where it cannot run a few tokens."""
    try:
        yield
    except DopdError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        raise ModelError(
            f"{name}: {type(model).__name__} cannot run a few tokens in {model.dtype}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def words(model: Any, count: int) -> list[int]:
    """Ids of a few different tokens of a model's vocabulary, none of which stands for an image."""
    vocab_size = vocab_size_of(model)
    forbidden = set(placeholder_ids(model.config))
    ids = torch.linspace(0, vocab_size - 1, count + 2).long().tolist()[1:-1]
    word = next(token for token in range(vocab_size) if token not in forbidden)
    return [word if token in forbidden else token for token in ids]


def _greedy(model: Any, view: View, *, as_features: bool = True) -> tuple[Tensor, Tensor]:
    """The likeliest tokens (B, steps) behind prompts, and the logits (B, steps, V) that they were read off."""
    config = GenerationConfig(
        max_new_tokens=_STEPS,
        do_sample=False,
        pad_token_id=0,
        suppress_tokens=placeholder_ids(model.config) or None,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
    )
    forget_longer_passes(backbone_of(model), model.config)
    with nothing_of_the_checkpoint(model):
        output = model.generate(**generation_inputs(model, view, as_features=as_features), generation_config=config)
    return output.sequences[:, view.prompt_ids.shape[1] :], torch.stack(output.logits, dim=1).float()


def without_placeholders(logits: Tensor, model: Any) -> Tensor:
    """Logits (..., V) without those of tokens that stand for an image, which are neither drawn nor scored."""
    allowed_V = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
    allowed_V[placeholder_ids(model.config)] = False
    return logits[..., allowed_V]


def _close(first: Tensor, second: Tensor, model: Any) -> bool:
    return bool((first - second).abs().max() <= rounding(model) * second.abs().max())
