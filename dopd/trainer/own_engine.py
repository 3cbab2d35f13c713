"""A rollout engine that a user brings: an object from Python, or a function that makes one, by name."""

from dopd.errors import ConfigError, DopdError, first_line
from dopd.guests import as_guest
from dopd.registry import is_reference, load_code, place_of
from dopd.step import Engine, EngineSetup
from dopd.trainer.config import DOPDConfig

TRIAL_TOKENS = 16  # most tokens of the answers that an engine is tried with


def check_engine(engine: Engine | str | None, args: DOPDConfig) -> None:
    """Raise `ConfigError`, without reading anybody's code, for what cannot draw the answers of a run."""
    if engine is None:
        if args.rollout_importance != "none" and not args.use_vllm:
            raise ConfigError(
                f"rollout_importance (={args.rollout_importance!r}) is for engines with weights of their own "
                "(use_vllm, or a rollout_engine that says its log-probs): transformers draws the answers with the "
                "student's own, so all factors would be 1. Leave it at 'none'"
            )
        return
    if isinstance(engine, str) and not is_reference(engine):
        raise ConfigError(
            f"rollout_engine (={engine!r}) must name a function of your own, package.module:factory or "
            "./file.py:factory; without it transformers draws the answers, or vLLM with use_vllm=true"
        )
    if args.use_vllm:
        raise ConfigError(
            f"use_vllm (=True) and rollout_engine (={_named(engine)}) are two engines for one run's answers: leave one "
            "of them out"
        )
    if not isinstance(engine, str):
        _check_made(_named(engine), engine)


def load_engine(reference: str, setup: EngineSetup) -> Engine:
    """The engine that a function of the user's makes.

    Args:
        reference (`str`): `package.module:factory` or `./file.py:factory`; it is called with `setup`.
        setup (`EngineSetup`): of the run.

    Raises:
        ConfigError: there is no such function, it raises, or it returns no engine.
    """
    factory = load_code("rollout_engine", reference)
    named = f"{reference!r}, {place_of(factory)}"
    try:
        with as_guest(f"rollout_engine (={reference!r})"):
            engine = factory(setup)
    except DopdError:
        raise
    except Exception as error:
        raise ConfigError(
            f"rollout_engine (={named}) raises {type(error).__name__}: {first_line(error)}. It is called with a "
            "dopd.step.EngineSetup, and returns an engine"
        ) from error
    return _check_made(f"{named}, which returned {type(engine).__name__}", engine)


def _check_made(named: str, engine: Engine) -> Engine:
    if not callable(getattr(engine, "generate", None)) or isinstance(engine, type):
        raise ConfigError(
            f"rollout_engine (={named}) is no engine: it must have a method generate(request) that returns a list of "
            "token ids for each prompt (dopd.step.Engine)"
        )
    return engine


def _named(engine: Engine | str) -> str:
    return repr(engine) if isinstance(engine, str) else f"{type(engine).__module__}.{type(engine).__qualname__}"
