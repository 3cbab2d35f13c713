"""Rollout engines: what draws the student's answers."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from transformers import GenerationConfig

from dopd.data.views import Prompt
from dopd.generation import answers
from dopd.sampling import Ending
from dopd.scoring import View, evaluation_mode


@dataclass(frozen=True)
class Request:
    """What an engine is asked for: one answer to each prompt.

    Attributes:
        view (`View`): B prompts as the student's processor encodes them; an answer follows these token ids.
        prompts (`list`): the same prompts before they were encoded (conversations or texts), with their images.
        max_new_tokens (`int`): most tokens of an answer.
        step (`int`): optimizer steps so far: an engine with weights of its own brings them up to date.
    """

    view: View
    prompts: list[Prompt]
    max_new_tokens: int
    step: int


@dataclass(frozen=True)
class Answers:
    """Answers of an engine that also says how likely it took their tokens to be.

    Attributes:
        token_ids (`list[list[int]]`): of one answer to each prompt, up to and with what ends it.
        logprobs (`list[list[float]]`): log-probs of these tokens in the distribution that they were drawn from, nats.
    """

    token_ids: Sequence[Sequence[int]]
    logprobs: Sequence[Sequence[float]]


class Engine(Protocol):
    """Draws answers from the student's distribution at the run's temperature, and from no other.

    Weights may be this process's own (`TransformersEngine`) or a server's; temperature, settings and what ends an
    answer are given to the engine when it is made.
    """

    def generate(self, request: Request) -> list[list[int]] | Answers:
        """Token ids of one answer to each prompt of this process, at most `max_new_tokens`, up to and with what ends
        it; with `Answers`, what the engine says of them is held against the student's own scores.
        """


class WholeStudent(Protocol):
    """Gives the student with whole parameters, and reads its prompts' images."""

    def whole_student(self) -> AbstractContextManager[Any]:
        """The unwrapped student, ready for `generate`."""

    def generation_inputs(self, model: Any, view: View) -> Mapping[str, Any]:
        """Arguments of `generate` for the prompts of a view."""


@dataclass(frozen=True)
class EngineSetup:
    """What an engine of one's own is made with.

    Attributes:
        student (`WholeStudent`): gives the weights to draw with, at each request as they then are.
        config (`GenerationConfig`): temperature, settings, ends and forbidden tokens of the answers, complete: what an
            engine has no equal for it must refuse.
        ending (`Ending`): of the answers; texts that end one are beside the ids there.
        processing_class: the student's tokenizer or processor.
        alone (`bool`): whether every process must run equally often, as with sharded weights.
    """

    student: WholeStudent
    config: GenerationConfig
    ending: Ending
    processing_class: Any
    alone: bool = False


@dataclass(frozen=True)
class TransformersEngine:
    """transformers' `generate`, in this process.

    Attributes:
        student (`WholeStudent`): whose answers are drawn.
        config (`GenerationConfig`): of `dopd.sampling.sampling_config`.
        ending (`Ending`): of the answers.
        alone (`bool`): whether every process must run equally often, as with sharded weights.
    """

    student: WholeStudent
    config: GenerationConfig
    ending: Ending
    alone: bool = False

    def generate(self, request: Request) -> list[list[int]]:
        config = copy.copy(self.config)
        config.max_new_tokens = request.max_new_tokens
        for name in ("min_new_tokens", "min_length"):  # the shorter limit counts
            if getattr(config, name, None):
                setattr(config, name, min(getattr(config, name), request.max_new_tokens))
        # Dropout would make the student another model at every token.
        with self.student.whole_student() as model, evaluation_mode(model), torch.no_grad():
            inputs = partial(self.student.generation_inputs, model)
            return answers(model, request.view, config, self.ending, inputs=inputs, alone=self.alone)
