"""The rollout engines of a run, and what answers are drawn from."""

import logging
import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from transformers import GenerationConfig

from dopd.data.encode import image_sources
from dopd.data.images import open_image
from dopd.errors import ConfigError, DopdError, ScoringError, first_line
from dopd.generation import words
from dopd.guests import as_guest
from dopd.interrupts import Stopped
from dopd.lengths import crossing, shortest_switch
from dopd.ranks import Ranks
from dopd.rollout_settings import (
    asking,
    cache_implementation,
    check_named_tokens,
    off_policy_settings,
    rollout_settings,
)
from dopd.sampling import Ending, declared_stop_strings, sampling_config
from dopd.scoring import View, left_padded, random_state_kept, unpadded
from dopd.settings import as_mapping, quoted
from dopd.step import Answers, Drift, Engine, EngineSetup, Request, Rollouts, TransformersEngine
from dopd.step.engine import WholeStudent
from dopd.trainer.config import DOPDConfig
from dopd.trainer.host import HostTrainer
from dopd.trainer.images import Trial
from dopd.trainer.own_engine import load_engine
from dopd.vocabulary import unscored_ids, vocab_size_of

logger = logging.getLogger(__name__)

_ROUNDED_ABOVE_0 = 1e-3  # what half precision makes of the log-prob of a certain token
_FEW = 2  # tokens of a prompt, and of an answer, that settings of rollouts are tried with


def ending_of(host: HostTrainer) -> Ending:
    """What ends an answer of the student; texts that do are logged."""
    strings = declared_stop_strings(host.unwrapped_student, as_mapping(host.args.generation_kwargs))
    if strings:
        logger.warning(f"answers end at {', '.join(map(repr, strings))} as well as at end-of-sequence tokens")
    return Ending(host.eos_token_ids, strings, host.tokenizer)


def rollout_config(host: HostTrainer) -> GenerationConfig:
    """A complete configuration of the answers that are trained on: of the checkpoint's it has nothing but the ends.

    Raises:
        ConfigError: as `rollout_settings`.
    """
    settings = rollout_settings(host.args)
    off = off_policy_settings(host.args)
    if off:
        named = ", ".join(f"{name}={value!r}" for name, value in off.items())
        logger.warning(
            f"off_policy_rollouts: answers are drawn with {named}, and scored by the student's whole distribution "
            f"at temperature {host.temperature:g}"
        )
    suppressed = settings.pop("suppress_tokens", None) or []
    return sampling_config(
        host.ending,
        max_new_tokens=int(host.max_completion_length or 0),  # the config has checked it
        pad_token_id=host.tokenizer.pad_token_id,
        sampled=True,
        temperature=host.temperature,
        suppressed=sorted({*suppressed, *unscored_ids(host.unwrapped_student, host.scored_vocab_size)}),
        **settings,
    )


class VLLMEngine:
    """TRL's vLLM, in this process or as a server.

    Args:
        host (`HostTrainer`): owns the engine.

    Raises:
        ConfigError: `generation_kwargs` that this engine sets itself.
    """

    def __init__(self, host: HostTrainer) -> None:
        self._host = host
        engine = host.vllm_generation
        options = dict(engine.generation_kwargs or {})
        forbidden = unscored_ids(host.unwrapped_student, host.scored_vocab_size)
        if host.ending.strings:
            options |= {"stop": list(host.ending.strings), "include_stop_str_in_output": True}
        if forbidden:
            if "logit_bias" in options:
                raise ConfigError(
                    "generation_kwargs: logit_bias is set by dopd, to leave out tokens that stand for images or that "
                    "the teacher does not have; remove it"
                )
            options["logit_bias"] = dict.fromkeys(forbidden, -100.0)
        engine.generation_kwargs = options
        engine.logprobs = 0  # of the sampled tokens alone

    def generate(self, request: Request) -> list[list[int]] | Answers:
        pictures = [[open_image(source) for source in image_sources(prompt)] or None for prompt in request.prompts]
        ids = unpadded(request.view.prompt_ids, request.view.prompt_mask)
        engine = self._host.vllm_generation
        usual, engine.max_completion_length = engine.max_completion_length, request.max_new_tokens
        try:
            drawn, logprobs = self._host.answers_of_vllm(ids, pictures if any(pictures) else None)
        finally:
            engine.max_completion_length = usual
        return drawn if logprobs is None else Answers(drawn, logprobs)


def make_engine(
    host: HostTrainer, student: WholeStudent, trial: Trial | None, own: Engine | str | None = None
) -> Engine:
    """The engine of a run.

    Args:
        host (`HostTrainer`): the run.
        student (`WholeStudent`): whose answers are drawn.
        trial (`Trial`, *optional*): prompts with images.
        own (`Engine` or `str`, *optional*): the user's, or the name of a function that makes it; by the configuration
            transformers' or vLLM's if left out.

    Raises:
        ConfigError: no token can be drawn with its settings, or the function makes no engine.
    """
    config = rollout_config(host)
    if isinstance(own, str):
        return load_engine(own, EngineSetup(student, config, host.ending, host.processing_class, host.is_split))
    if own is not None:
        return own
    if host.use_vllm:
        return VLLMEngine(host)
    engine = TransformersEngine(student, config, host.ending, alone=host.is_split)
    if not host.is_split:
        _try_settings(host, engine, None if trial is None else trial.student)
    return engine


def _try_settings(host: HostTrainer, engine: TransformersEngine, view: View | None) -> None:
    """Draw two tokens with the run's own settings, if it has any.

    Raises:
        ConfigError: transformers cannot draw with them, or a token is named that is not there.
    """
    student = host.unwrapped_student
    options = asking(host.args.generation_kwargs)
    if cache_implementation(host.args) is not None:
        options["cache_implementation"] = cache_implementation(host.args)
    if not options:
        return
    check_named_tokens(options, vocab_size_of(student))
    view = view or left_padded([words(student, _FEW)], host.tokenizer.pad_token_id, student.device)
    try:
        with random_state_kept(student):
            engine.generate(Request(view, [], _FEW, 0))
    except DopdError:
        raise
    except Exception as error:  # each setting fails in its own way
        raise ConfigError(
            f"generation_kwargs (={quoted(options)}): no token can be drawn: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error


def drawn_answers(
    engine: Engine, request: Request, student: Any, ending: Ending
) -> tuple[list[list[int]], list[list[float]] | None]:
    """One answer of an engine to each prompt, with nothing behind what ends it, and where the engine says them the
    log-probs of its tokens.

    Args:
        student: the unwrapped student.

    Raises:
        ScoringError: what the engine gave is no answer of the student's to each prompt.
    """
    found: Any
    if isinstance(engine, TransformersEngine | VLLMEngine):
        found = engine.generate(request)
    else:
        found = _drawn_by_guest(engine, request)
    found, logprobs = (found.token_ids, found.logprobs) if isinstance(found, Answers) else (found, None)
    asked, size = len(request.prompts), vocab_size_of(student)
    expected = f"and was asked for a list of {asked} lists of token ids below {size}"
    if not isinstance(found, list | tuple) or len(found) != asked:
        count = f" of {len(found)}" if isinstance(found, list | tuple) else ""
        raise ScoringError(f"the rollout engine gave a {type(found).__name__}{count}, {expected}")
    answers = []
    for place, answer in enumerate(found):
        ids = answer.tolist() if isinstance(answer, torch.Tensor) else answer
        if not isinstance(ids, list | tuple) or not _are_ids(ids, size):
            raise ScoringError(f"the rollout engine gave {quoted(ids)} as answer {place}, {expected}")
        answers.append(list(map(int, ids)))
    cut = ending.cut_all(answers)
    if logprobs is None:
        return cut, None
    checked = _checked_logprobs(logprobs, answers)
    return cut, [values[: len(ids)] for values, ids in zip(checked, cut, strict=True)]


def _checked_logprobs(logprobs: Any, answers: list[list[int]]) -> list[list[float]]:
    """What an engine says of its tokens, as numbers; `ScoringError` where they are no log-probs of them."""
    if len(logprobs) != len(answers):
        raise ScoringError(
            f"the rollout engine gave log-probs of {len(logprobs)} answers beside {len(answers)} answers"
        )
    checked = []
    for place, (numbers, ids) in enumerate(zip(logprobs, answers, strict=True)):
        values = numbers.tolist() if isinstance(numbers, torch.Tensor) else list(numbers)
        if len(values) != len(ids):
            raise ScoringError(
                f"the rollout engine gave {len(values)} log-probs for the {len(ids)} tokens of answer {place}: it "
                "must give one for each"
            )
        values = [math.nan if value is None else float(value) for value in values]
        wrong = [value for value in values if not -math.inf < value <= _ROUNDED_ABOVE_0]
        if wrong:
            raise ScoringError(
                f"the rollout engine gave {wrong[0]:g} as the log-prob of a token of answer {place}: a token that was "
                "drawn has a finite one, at most 0"
            )
        checked.append(values)
    return checked


def _drawn_by_guest(engine: Engine, request: Request) -> list[list[int]] | Answers:
    try:
        with as_guest("the rollout engine"):
            return engine.generate(request)
    except (DopdError, KeyboardInterrupt, Stopped):
        raise
    except BaseException as error:  # SystemExit, too: it would end a run as if it were done
        raise ScoringError(f"the rollout engine raised {type(error).__name__}: {first_line(error)}") from error


def _are_ids(values: Sequence[Any], size: int) -> bool:
    """Whether all are whole numbers below `size`: by their kinds and extremes, as answers are long."""
    whole = all(issubclass(kind, Integral) and kind is not bool for kind in set(map(type, values)))
    return whole and (not values or (min(values) >= 0 and max(values) < size))


def drift_of(args: DOPDConfig) -> Drift:
    """What watches how far the engine of a run is from the student."""
    return Drift(
        args.rollout_drift_limit, args.rollout_importance_cap if args.rollout_importance == "truncated" else None
    )


def checked_drift(host: HostTrainer, drift: Drift, ranks: Ranks) -> dict[str, float]:
    """Metrics of a step's drift, which is warned of where it is large.

    Raises:
        ScoringError: the engine cannot be the student's; answers that may come from another distribution have leave.
    """
    metrics = drift.taken(ranks)
    found = None if host.args.off_policy_rollouts else drift.check(metrics)
    if found and host.accelerator.is_main_process:
        logger.warning(f"step {host.state.global_step}: {found}")
    return metrics


def check_rollouts(rollouts: Rollouts, student: Any, vocab_size: int, max_new_tokens: int, *, off_policy: bool) -> None:
    """Raise `ScoringError` for answers that are not scored as they were drawn.

    Args:
        rollouts (`Rollouts`): of an engine.
        student: the unwrapped student.
        vocab_size (`int`): ids from 0 on that student and teacher both have.
        max_new_tokens (`int`): most tokens of an answer, as the engine was asked.
        off_policy (`bool`): whether answers may come from another distribution.
    """
    forbidden = set(unscored_ids(student, vocab_size))
    for ids in rollouts.answers:
        if not ids or len(ids) > max_new_tokens:
            raise ScoringError(
                f"the rollout engine gave an answer of {len(ids)} tokens, and was asked for 1 to {max_new_tokens} "
                "(max_completion_length, or less by the table's rollout_growth): it must obey request.max_new_tokens"
            )
        if forbidden & set(ids):
            raise ScoringError(
                f"a completion holds token {min(forbidden & set(ids))}, which stands for an image or is none of the "
                f"{vocab_size} tokens that student and teacher share, and cannot be scored: the engine that sampled it "
                "ignores the list of forbidden tokens. Use use_vllm=False, or an engine that knows logit_bias"
            )
    if not off_policy:
        _check_frequencies(rollouts, student)


def _check_frequencies(rollouts: Rollouts, student: Any) -> None:
    # The first tokens of an answer that crossed the length at which the student changes its rotation frequencies were
    # drawn with other frequencies than the sequence has as a whole, which is how it is scored.
    starts = list(rollouts.view.lengths)
    ends = [start + len(ids) for start, ids in zip(starts, rollouts.answers, strict=True)]
    crossed = crossing(student.config, starts, ends)
    if crossed:
        raise ScoringError(
            f"{crossed} of {len(starts)} answers grew across {shortest_switch(student.config)} tokens, where "
            f"{type(student).__name__} changes its rotation frequencies (rope type longrope or dynamic): they were "
            "drawn from another distribution than is scored. Lower max_completion_length or max_prompt_length, or "
            "allow it with off_policy_rollouts=True"
        )
