"""Settings of `generation_kwargs`, which transformers reads when the first answer is drawn."""

from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt, MaxLen, MinLen
from transformers import GenerationConfig, SequenceBiasLogitsProcessor
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from trl import DistillationConfig

from dopd.errors import first_line
from dopd.rollout_settings import asking
from dopd.settings import Count, Natural, Positive, Probability, Setting, Share, Text, check, quoted

_BelowOne = Annotated[float, Ge(0), Lt(1)]

# Values of transformers' `GenerationConfig`, which has no annotations. Which keys there are it says itself.
GENERATION: dict[str, Any] = {
    "do_sample": bool,
    "use_cache": bool,
    "cache_implementation": Literal[tuple(ALL_CACHE_IMPLEMENTATIONS)] | None,
    "cache_config": dict | None,
    "prefill_chunk_size": Count | None,
    "stop_strings": Text | list[Text] | None,
    "temperature": Positive | None,
    "top_k": Annotated[int, Ge(-1)] | None,
    "top_p": Share | None,
    "min_p": Probability | None,
    "top_h": Share | None,
    "typical_p": Share | None,
    "epsilon_cutoff": _BelowOne | None,
    "eta_cutoff": _BelowOne | None,
    "repetition_penalty": Positive | None,
    "encoder_repetition_penalty": Positive | None,
    "no_repeat_ngram_size": Natural | None,
    "min_length": Natural | None,
    "min_new_tokens": Natural | None,
    "max_time": Positive | None,
    "bad_words_ids": Annotated[list[Annotated[list[Natural], MinLen(1)]], MinLen(1)] | None,
    "suppress_tokens": list[Natural] | None,
    "begin_suppress_tokens": list[Natural] | None,
    "remove_invalid_values": bool | None,
    "renormalize_logits": bool | None,
    "exponential_decay_length_penalty": Annotated[list[float], MinLen(2), MaxLen(2)] | None,
    "sequence_bias": Annotated[list[list], MinLen(1)] | dict | None,
    "guidance_scale": Positive | None,
    "encoder_no_repeat_ngram_size": Natural | None,
    "watermarking_config": dict | None,
    "max_cache_len": Count | None,
}


def generation_problems(args: DistillationConfig) -> list[str]:
    """What is wrong inside `generation_kwargs`.

    Args:
        args (`DOPDConfig`): whose own fields have been checked.
    """
    if args.use_vllm:  # an engine of its own has settings of its own
        return []
    settings = {name: Setting(name, hint) for name, hint in GENERATION.items()}
    options = {name: value for name, value in asking(args.generation_kwargs).items() if name in settings}
    problems = check(options, settings, "generation_kwargs")[1]
    least, most = options.get("min_new_tokens"), args.max_completion_length
    if not problems and least is not None and most is not None and least > most:
        problems.append(
            f"generation_kwargs: min_new_tokens (={least}) is above max_completion_length (={most}), so that no answer "
            "would end"
        )
    decay = options.get("exponential_decay_length_penalty")
    if not problems and decay is not None and not (decay[0] >= 0 and decay[0] == int(decay[0]) and decay[1] > 0):
        problems.append(
            f"generation_kwargs: exponential_decay_length_penalty (={decay}) must be a number of tokens, and a factor "
            "above 0"
        )
    if not problems:
        try:
            config = GenerationConfig(**options)
            if config.sequence_bias is not None:
                SequenceBiasLogitsProcessor(config.sequence_bias)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            problems.append(f"generation_kwargs (={quoted(options)}): {first_line(error)}")
    return problems
