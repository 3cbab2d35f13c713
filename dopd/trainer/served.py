"""The teacher of a run on a server: asked who it is before anything is loaded, tried before the first step."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from dopd.data.encode import reads_images
from dopd.errors import ConfigError
from dopd.ranks import Ranks
from dopd.servers import (
    Client,
    Introduction,
    Patience,
    ServedScorer,
    ServedTeacher,
    ServedTeachers,
    Tried,
    check_tokens,
    introduced,
    teacher_places,
)
from dopd.step import LocalScorer, Scorer
from dopd.step.scorer import own_logprobs
from dopd.step.team import TeamScorer
from dopd.trainer.config import DOPDConfig
from dopd.trainer.guards import named
from dopd.trainer.host import HostTrainer
from dopd.trainer.models import TrainedModels

logger = logging.getLogger(__name__)

# (addresses, name of the model) -> what was answered, inside of `asked_once`.
_ANSWERS: ContextVar[dict[tuple[str | None, ...], Introduction] | None] = ContextVar("answers", default=None)
_SAME_WEIGHTS = 0.02  # nats, mean: what half precision makes of one model; other models are whole nats apart


def ask_server(args: DOPDConfig) -> dict[str, Introduction]:
    """What the servers of each teacher say of themselves, by the teachers' names ('' for the only one); nothing where
    the run reads no teacher on a server.

    Raises:
        ServerError: an address that does not answer as a model server.
        ConfigError: no such model is served there.
    """
    if args.teacher_server is None or not args.routing_table().needs_teacher:
        return {}
    asked = _ANSWERS.get()
    answers = {} if asked is None else asked
    found = {}
    for name, urls in teacher_places("teacher_server", args.teacher_server).items():
        key = (*urls, args.teacher_server_model)
        if key not in answers:
            answers[key] = introduced(_client(args, urls), args.teacher_server_model)
        found[name] = answers[key]
    return found


@contextmanager
def asked_once() -> Iterator[None]:
    """Inside, servers are asked who they are a single time: before anything is loaded, and not by the trainer again."""
    token = _ANSWERS.set({})
    try:
        yield
    finally:
        _ANSWERS.reset(token)


def connect(args: DOPDConfig, introductions: Mapping[str, Introduction]) -> ServedTeachers | None:
    """The teachers on the servers that a run asks."""
    served = args.served_table()
    if not introductions or served is None:
        return None
    workers, places = args.teacher_server_requests, teacher_places("teacher_server", args.teacher_server)
    return ServedTeachers(
        {
            name: ServedTeacher(_client(args, places[name]), introduction, top_k=served.top_k, workers=workers)
            for name, introduction in introductions.items()
        }
    )


def _client(args: DOPDConfig, urls: list[str]) -> Client:
    patience = Patience(args.teacher_server_timeout, args.teacher_server_retries)
    return Client(urls, patience, args.teacher_server_requests)


def check_reads_text(teacher: object, processing_class: Any) -> None:
    """Raise `ConfigError` where rows may have images, which are not sent to servers."""
    if teacher is not None and reads_images(processing_class):
        raise ConfigError(
            "teacher_server: images are not sent to servers: load the teacher here (teacher_model_name_or_path), or "
            "give the student its tokenizer as processing_class, to train on text alone"
        )


def check_served(host: HostTrainer) -> None:
    """Compare what the server scores with the student's vocabulary; what is odd but not wrong is logged.

    Raises:
        ConfigError, ModelError: see `dopd.servers.check_tokens`.
    """
    teacher = host.served
    if teacher is None:
        return
    if teacher.top_k >= host.scored_vocab_size:
        raise ConfigError(
            f"teacher_server_top_k (={teacher.top_k}) must be below the {host.scored_vocab_size} tokens of the "
            "student's vocabulary"
        )
    for name, one in teacher.teachers.items():
        field = f"teacher_server[{name!r}]" if name else "teacher_server"
        with named(field if name else "teacher_model"):
            tried = check_tokens(one, host.tokenizer)
        for note in tried.notes:
            logger.warning(note)
        if not host.is_split and ("teacher" in host.table.target_sources or host.table.routed):
            _warn_of_same_weights(field, host.unwrapped_student, tried)


def _warn_of_same_weights(field: str, student: Any, tried: Tried) -> None:
    """Say that the teacher on the server reads a text as the student does: it may be the student's own checkpoint."""
    theirs = torch.tensor(tried.logprobs, dtype=torch.float64)
    apart = float((own_logprobs(student, tried.ids) - theirs).abs().mean())
    if apart < _SAME_WEIGHTS:
        logger.warning(
            f"{field}: teacher and student give a text log-probs that differ by {apart:.2g} nats in the mean: "
            "is that server's model the teacher you meant? Two models of the same weights teach nothing"
        )


def make_scorer(
    host: HostTrainer, models: TrainedModels, batch_size: int, merged_ids: Sequence[int], ranks: Ranks
) -> Scorer:
    """What scores the sources of a run: models of this process, and servers.

    Args:
        host (`HostTrainer`): the run.
        models (`TrainedModels`): of this process.
        batch_size (`int`): sequences of a forward pass.
        merged_ids (`list[int]`): tokens that count as one outcome.
        ranks (`Ranks`): the processes that score together.
    """
    local = LocalScorer(models, batch_size, host.temperature, host.args.loss_chunk_tokens, merged_ids)
    if host.parked.models:
        return TeamScorer(local, models)
    return local if host.served is None else ServedScorer(local, host.served, models.vocab_size, ranks)
