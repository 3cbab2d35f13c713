"""What a run tries of its models before the first step, with whole weights and the run's own lengths and images."""

import copy
import logging
from functools import partial
from typing import Any

import torch

from dopd.adapters import has_adapters
from dopd.data.encode import reads_images
from dopd.errors import ConfigError, DopdError, ModelError, first_line
from dopd.generation import answers, check_generation, words
from dopd.lengths import shortest_switch
from dopd.prefix import architecture, shares_prompts_exactly
from dopd.sampling import asking, cache_implementation, check_named_tokens
from dopd.scoring import View, evaluation_mode, generation_inputs, left_padded, rounding, view_hidden_states
from dopd.settings import quoted
from dopd.trainer import passes
from dopd.trainer.context import max_prompt_tokens
from dopd.trainer.guards import active_dropout
from dopd.vision import is_vision_config

logger = logging.getLogger(__name__)

_FEW = 2  # tokens of a prompt, and of an answer, that settings of rollouts are tried with
_ITS_PROCESSOR = (
    "processing_class is a tokenizer, which does not say what such a model asks of a token (PaliGemma: whether "
    "it is of the prefix, which is read both ways): pass its processor (dopd.vision.load_processor)"
)


def check_passes(trainer: Any) -> None:
    """Try the passes of student and teacher, on prompts with images if they read any; datasets are prepared before.

    Raises:
        ModelError: a model that is not causal, or whose sequences change one another.
    """
    longest = max_prompt_tokens(trainer) + (trainer.max_completion_length or 0)
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    for name, model in (("model", trainer.unwrapped_student), ("teacher_model", trainer.unwrapped_teacher)):
        if model is None:
            continue
        switch = shortest_switch(model.config)
        if sharded:
            if switch is not None and longest > switch:
                _refuse_uneven_passes(name, model, switch, longest)
            continue  # tried with the first batch, when the weights are whole
        elif switch is not None and longest > switch and model is trainer.unwrapped_student:
            _tell_of_switch(trainer, model, switch, longest)
        with evaluation_mode(model), trainer.accelerator.autocast():
            view = trainer.trial_view(teacher=model is trainer.unwrapped_teacher)
            once = architecture(model) in trainer.image_architectures
            half = trainer.accelerator.mixed_precision != "no"
            try:
                passes.check_passes(name, model, half=half, view=view, longest=longest, as_features=once)
            except ModelError as error:
                if is_vision_config(model.config) and not reads_images(trainer.processing_class):
                    raise ModelError(f"{error}. {_ITS_PROCESSOR}") from error
                raise
            if model is trainer.unwrapped_student and trainer.args.disable_dropout:
                _tell_of_noise(trainer, model)
            if model is trainer.unwrapped_student and not trainer.use_vllm:
                check_generation(name, model, view, as_features=once)
                _try_rollout(trainer, model, view, as_features=once)


def _try_rollout(trainer: Any, student: Any, view: View | None, *, as_features: bool) -> None:
    """Draw two tokens with the run's own settings, if it has any.

    Raises:
        ConfigError: transformers cannot draw with them, or a token is named that is not there.
    """
    given = asking(trainer.args.generation_kwargs)
    if cache_implementation(trainer.args) is not None:
        given["cache_implementation"] = cache_implementation(trainer.args)
    if not given:
        return
    check_named_tokens(given, student.config.get_text_config().vocab_size)
    config = copy.copy(trainer.generation_config)
    config.max_new_tokens = _FEW
    for name in ("min_new_tokens", "min_length"):  # more than are drawn here is no mistake
        setattr(config, name, min(getattr(config, name) or 0, _FEW))
    view = view or left_padded([words(student, _FEW)], trainer._tokenizer.pad_token_id, student.device)
    inputs = partial(generation_inputs, student, as_features=as_features)
    try:
        with torch.random.fork_rng():
            answers(student, view, config, trainer.ending, inputs=inputs)
    except DopdError:
        raise
    except Exception as error:  # each setting fails in its own way
        raise ConfigError(
            f"generation_kwargs (={quoted(given)}): no token can be drawn: {type(error).__name__}: {first_line(error)}"
        ) from error


def _tell_of_noise(trainer: Any, student: Any) -> None:
    if has_adapters(student) and active_dropout(student):
        return  # an adapter's own, which was asked for and told
    route = partial(view_hidden_states, as_features=architecture(student) in trainer.image_architectures)
    noise = passes.training_noise(student, trainer.trial_view(teacher=False), hidden_states=route)
    if not noise <= rounding(student, half=trainer.accelerator.mixed_precision != "no"):
        logger.warning(
            f"model: in training mode {type(student).__name__} gives other states than in evaluation mode (by "
            f"{noise:.2g} of the largest) although dropout is off: the trained view differs from those that are scored "
            "by noise of the model's own, and so do gaps and targets. Its configuration may have a setting for it"
        )


def _tell_of_switch(trainer: Any, model: Any, switch: int, longest: int) -> None:
    crosses = (
        "are scored with the frequencies of their whole length all the same (off_policy_rollouts)"
        if trainer.args.off_policy_rollouts
        else "stop the run, unless off_policy_rollouts=True"
    )
    logger.warning(
        f"model: {type(model).__name__} changes its rotation frequencies behind {switch} tokens, and sequences of this "
        f"run may have {longest} (max_prompt_length + max_completion_length). Each is scored with the frequencies of "
        f"its own length; answers that grow across the limit are drawn with others, and {crosses}"
    )
    if trainer.use_vllm:
        logger.warning(
            f"vLLM chooses one set of frequencies for all lengths, by its context: set vllm_max_model_length to at "
            f"most {switch}"
        )


def _refuse_uneven_passes(name: str, model: Any, switch: int, longest: int) -> None:
    raise ModelError(
        f"{name}: {type(model).__name__} changes its rotation frequencies behind {switch} tokens (rope type longrope "
        f"or dynamic), and sequences of this run may have {longest}. Sequences of different frequencies run apart, so "
        "processes would not run equally often, which FSDP and DeepSpeed need: set max_prompt_length and "
        f"max_completion_length to at most {switch} together"
    )


def sharing_architectures(trainer: Any) -> frozenset[type]:
    """Model classes whose prompts are run once for all their rollouts; what stands in the way of it is logged."""
    if not trainer.args.share_prompts or trainer.args.num_generations == 1:
        return frozenset()
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        logger.warning("share_prompts is off: with FSDP or DeepSpeed every rollout runs its own prompt")
        return frozenset()
    longest = max_prompt_tokens(trainer) + (trainer.max_completion_length or 0)
    able, unable = set[type](), set[type]()
    for model in (trainer.unwrapped_student, trainer.unwrapped_teacher):
        if model is not None:
            half = trainer.accelerator.mixed_precision != "no"
            trial = trainer.trial_view(teacher=model is trainer.unwrapped_teacher)
            with evaluation_mode(model), trainer.accelerator.autocast():
                exact = shares_prompts_exactly(model, half=half, longest=longest)
                if trial is not None:
                    exact = exact and shares_prompts_exactly(model, half=half, view=trial)
            (able if exact else unable).add(architecture(model))
    for kind in unable:
        logger.warning(
            f"share_prompts is off for {kind.__name__}: it gives other numbers when a rollout continues a cached "
            "prompt, "
            "so every rollout runs its own"
        )
    return frozenset(able - unable)
