"""What a run's answers are drawn with: its settings, of which those that scores cannot follow have to be meant."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from transformers import GenerationConfig

from dopd.errors import ConfigError, did_you_mean
from dopd.settings import as_mapping, quoted

COLDEST, HOTTEST = 1e-4, 1e3  # beyond them logits are divided into infinities or into one number
# `generation_kwargs` that leave the distribution of an answer as it is.
_NEUTRAL = (
    "cache_config",
    "cache_implementation",
    "max_cache_len",
    "prefill_chunk_size",
    "use_cache",
)
_ROUNDED_CACHE = "quantized"  # keys and values in few bits: other states than those that are scored
_ENDS = "stop_strings"  # read into `Ending`
# `generation_kwargs` that have a key of their own, or that this project sets.
_ELSEWHERE = {
    "temperature": "set the key temperature, which scores follow",
    "max_new_tokens": "set max_completion_length",
    "max_length": "set max_completion_length",
    "max_tokens": "set max_completion_length",
    "eos_token_id": "an answer ends with the tokens that the student's generation config declares: set it there",
    "pad_token_id": "it is the tokenizer's",
    "bos_token_id": "it is the tokenizer's",
    "num_return_sequences": "set num_generations",
    "n": "set num_generations",
    **dict.fromkeys(("num_beams", "num_beam_groups"), "a beam is no sample; remove it"),
    **dict.fromkeys(("compile_config", "disable_compile"), "answers are drawn without compiling; remove it"),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits"), "remove it"),
    "logit_bias": "it is set for vision-language models",
}
_OF_VLLM = {"stop": _ENDS, "stop_token_ids": "eos_token_id", "min_tokens": "min_new_tokens"}  # its names of them
# Values of `generation_kwargs` that ask for nothing: those that transformers has without them.
_ASK_NOTHING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("top_p", "top_h", "typical_p", "length_penalty", "guidance_scale"), (1.0,)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (1.0,)),
    "top_k": (0, -1),
    **dict.fromkeys(("min_p", "epsilon_cutoff", "eta_cutoff", "diversity_penalty"), (0.0,)),
    **dict.fromkeys(("min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "n"), (1,)),
    **dict.fromkeys(("remove_invalid_values", "token_healing", "early_stopping"), (False,)),
    "renormalize_logits": (False, True),  # what is drawn from is normalised in any case
    "disable_compile": (True,),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), ([],)),
    **dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits"), (False,)),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "is_assistant", "low_memory"), (False,)),
}
_NAME_TOKENS = ("bad_words_ids", "begin_suppress_tokens", "sequence_bias", "suppress_tokens")
# Settings of transformers' `GenerationConfig` for other ways to generate than drawing token after token.
_OTHER_WAYS = (
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "constraints",
    "continuous_batching_config",
    "decoder_start_token_id",
    "diversity_penalty",
    "dola_layers",
    "early_stopping",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "penalty_alpha",
    "prompt_lookup_num_tokens",
    "speculation_type",
    "target_lookbehind",
    "token_healing",
    "transformers_version",
    "use_mtp",
)


class RolloutSettings(Protocol):
    """What answers are drawn with, in the fields of `DOPDConfig`."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float | None: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def generation_kwargs(self) -> dict[str, Any] | str | None: ...
    @property
    def cache_implementation(self) -> str | None: ...
    @property
    def use_vllm(self) -> bool: ...
    @property
    def off_policy_rollouts(self) -> bool: ...


def rollout_settings(args: RolloutSettings) -> dict[str, Any]:
    """Settings of a run's rollouts beside temperature and length, as fields of `GenerationConfig`.

    Args:
        args (`DOPDConfig`): of the run.

    Raises:
        ConfigError: a setting of `generation_kwargs` that is unknown or belongs elsewhere; a temperature out of
            its limits; or one that makes rollouts come from another distribution than the scored one, unless
            `off_policy_rollouts` allows it.
    """
    asked = asking(args.generation_kwargs)
    if not isinstance(args.temperature, int | float) or not COLDEST <= args.temperature <= HOTTEST:
        raise ConfigError(
            f"temperature (={args.temperature!r}) must be a number from {COLDEST} to {HOTTEST:g}; for the "
            "likeliest tokens set generation_kwargs={'do_sample': False} and off_policy_rollouts=True"
        )
    for name in asked:
        _check_name(name, asked[name], uses_vllm=args.use_vllm)
    kept = {name: asked[name] for name in _NEUTRAL if name in asked}
    if cache_implementation(args) is not None:
        kept["cache_implementation"] = cache_implementation(args)
    off = off_policy_settings(args)
    if off and not args.off_policy_rollouts:
        named = ", ".join(f"{name}={value!r}" for name, value in off.items())
        raise ConfigError(
            f"{named}: rollouts would be drawn from another distribution than the one that is scored, and the "
            "estimate of the divergence assumes that it is one. Remove it, or set off_policy_rollouts=True to have it "
            "so (temperature alone is followed by the scores)"
        )
    return kept | off


def asking(generation_kwargs: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """`generation_kwargs` without values that ask for nothing, such as `None`, a `top_k` of 0 or one beam."""
    declared = {*GenerationConfig().to_dict(), *_ELSEWHERE}
    return {
        name: value
        for name, value in as_mapping(generation_kwargs).items()
        if not (
            (value is None and name in declared)
            or any(
                value == one and isinstance(value, bool) == isinstance(one, bool) for one in _ASK_NOTHING.get(name, ())
            )
        )
    }


def check_named_tokens(generation_kwargs: Mapping[str, Any] | None, vocab_size: int) -> None:
    """Raise `ConfigError` for a token of `generation_kwargs` that a vocabulary of so many tokens does not have."""
    for name in _NAME_TOKENS:
        beyond = [token for token in _tokens_in((generation_kwargs or {}).get(name)) if token >= vocab_size]
        if beyond:
            raise ConfigError(
                f"generation_kwargs: {name} names token {beyond[0]}, and the student's vocabulary has {vocab_size} "
                f"tokens, 0 to {vocab_size - 1}: name a token by its id in the student's tokenizer"
            )


def _tokens_in(value: Any) -> Iterator[int]:
    """Token ids in lists of them, or in biases: by sequence, or as pairs of a sequence and a number."""
    if isinstance(value, int):
        yield value
    for entry in value if isinstance(value, Mapping | list | tuple) else ():
        pair = isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], list | tuple)
        yield from _tokens_in(entry[0] if pair else entry)


def cache_implementation(args: RolloutSettings) -> str | None:
    """The kind of key-value cache that a run's rollouts ask for: of `generation_kwargs`, or the host's own key."""
    asked = asking(args.generation_kwargs).get("cache_implementation", args.cache_implementation)
    return None if asked is None else str(asked)


def off_policy_settings(args: RolloutSettings) -> dict[str, Any]:
    """Settings that make rollouts come from another distribution than the student's at the run's temperature."""
    neutral = {"top_p": (1.0, None), "top_k": (0, -1, None), "min_p": (0.0, None), "repetition_penalty": (1.0, None)}
    own = {name: getattr(args, name) for name, values in neutral.items() if getattr(args, name) not in values}
    asked = asking(args.generation_kwargs)
    if asked.get("do_sample") is True:
        asked.pop("do_sample")
    if cache_implementation(args) == _ROUNDED_CACHE:
        own["cache_implementation"] = _ROUNDED_CACHE
    return own | {name: value for name, value in asked.items() if name not in (*_NEUTRAL, _ENDS)}


def _check_name(name: str, value: Any, *, uses_vllm: bool) -> None:
    if name in _ELSEWHERE:
        raise ConfigError(f"generation_kwargs: {name} (={value!r}) cannot be set there: {_ELSEWHERE[name]}")
    if name in _OTHER_WAYS and not uses_vllm:
        raise ConfigError(
            f"generation_kwargs: {name} (={quoted(value)}) is for other ways to generate than drawing one token after "
            "another: remove it"
        )
    allowed = set(GenerationConfig().to_dict())
    # An engine of its own has settings of its own.
    if not uses_vllm and name not in allowed:
        hint = f" Did you mean {_OF_VLLM[name]!r}?" if name in _OF_VLLM else did_you_mean(name, allowed)
        raise ConfigError(f"generation_kwargs: {name!r} is no setting of transformers' GenerationConfig.{hint}")
