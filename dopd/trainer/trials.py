"""What a run tries of its models before the first step, with whole weights and the run's own lengths and images."""

import logging
from functools import partial
from typing import Any

from dopd.adapters import has_adapters
from dopd.data.encode import reads_images
from dopd.errors import ModelError
from dopd.generation import check_generation
from dopd.lengths import shortest_switch
from dopd.prefix import architecture, shares_prompts_exactly
from dopd.scoring import View, evaluation_mode, rounding, view_hidden_states
from dopd.trainer import passes
from dopd.trainer.context import max_prompt_tokens
from dopd.trainer.guards import active_dropout
from dopd.trainer.host import HostTrainer
from dopd.trainer.images import Trial
from dopd.vision import is_vision_config

logger = logging.getLogger(__name__)

_ITS_PROCESSOR = (
    "processing_class is a tokenizer, which does not say what such a model asks of a token (PaliGemma: whether "
    "it is of the prefix, which is read both ways): pass its processor (dopd.vision.load_processor)"
)


def check_passes(host: HostTrainer, trial: Trial | None, encoding_once: frozenset[type]) -> None:
    """Try the passes of student and teacher, on prompts with images if they read any; datasets are prepared before.

    Args:
        trial (`Trial`, *optional*): prompts with images.
        encoding_once (`frozenset[type]`): model classes that take the features of each image, made once.

    Raises:
        ModelError: a model that is not causal, or whose sequences change one another.
    """
    longest = max_prompt_tokens(host) + (host.max_completion_length or 0)
    for name, model in host.named_models():
        is_student = model is host.unwrapped_student
        switch = shortest_switch(model.config)
        if host.is_split:
            if switch is not None and longest > switch:
                _refuse_uneven_passes(name, model, switch, longest)
            continue  # tried with the first batch, when the weights are whole
        elif switch is not None and longest > switch and is_student:
            _warn_of_switch(host, model, switch, longest)
        with evaluation_mode(model), host.accelerator.autocast():
            view = None if trial is None else trial.of(host, model)
            once = architecture(model) in encoding_once
            try:
                passes.check_passes(name, model, half=host.is_half, view=view, longest=longest, as_features=once)
            except ModelError as error:
                if is_vision_config(model.config) and not reads_images(host.processing_class):
                    raise ModelError(f"{error}. {_ITS_PROCESSOR}") from error
                raise
            if is_student and host.args.disable_dropout:
                _warn_of_noise(host, model, view, as_features=once)
            if is_student and not host.use_vllm:
                check_generation(name, model, view, as_features=once)


def _warn_of_noise(host: HostTrainer, student: Any, view: View | None, *, as_features: bool) -> None:
    if has_adapters(student) and active_dropout(student):
        return  # an adapter's own, which was asked for, with its own warning
    route = partial(view_hidden_states, as_features=as_features)
    noise = passes.training_noise(student, view, hidden_states=route)
    if not noise <= rounding(student, half=host.is_half):
        logger.warning(
            f"model: in training mode {type(student).__name__} gives other states than in evaluation mode (by "
            f"{noise:.2g} of the largest) although dropout is off: the trained view differs from those that are scored "
            "by noise of the model's own, and so do gaps and targets. Its configuration may have a setting for it"
        )


def _warn_of_switch(host: HostTrainer, model: Any, switch: int, longest: int) -> None:
    crosses = (
        "are scored with the frequencies of their whole length all the same (off_policy_rollouts)"
        if host.args.off_policy_rollouts
        else "stop the run, unless off_policy_rollouts=True"
    )
    logger.warning(
        f"model: {type(model).__name__} changes its rotation frequencies behind {switch} tokens, and sequences of this "
        f"run may have {longest} (max_prompt_length + max_completion_length). Each is scored with the frequencies of "
        f"its own length; answers that grow across the limit are drawn with others, and {crosses}"
    )
    if host.use_vllm:
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


def sharing(host: HostTrainer, trial: Trial | None) -> frozenset[type]:
    """Model classes whose prompts are run once for all their rollouts; what stands in the way of it is logged."""
    if not host.args.share_prompts or host.args.num_generations == 1:
        return frozenset()
    if host.is_split:
        logger.warning("share_prompts is off: with FSDP or DeepSpeed every rollout runs its own prompt")
        return frozenset()
    longest = max_prompt_tokens(host) + (host.max_completion_length or 0)
    able, unable = set[type](), set[type]()
    for _, model in host.named_models():
        with evaluation_mode(model), host.accelerator.autocast():
            exact = shares_prompts_exactly(model, half=host.is_half, longest=longest)
            if trial is not None:
                exact = exact and shares_prompts_exactly(model, half=host.is_half, view=trial.of(host, model))
        (able if exact else unable).add(architecture(model))
    for kind in unable:
        logger.warning(
            f"share_prompts is off for {kind.__name__}: it gives other numbers when a rollout continues a cached "
            "prompt, so every rollout runs its own"
        )
    return frozenset(able - unable)
