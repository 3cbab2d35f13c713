"""What `dopd doctor` asks the servers of a teacher, beside what a run asks before its first step."""

from collections.abc import Iterator

import torch

from dopd.errors import ModelError, ServerError, ServerLostError
from dopd.runs.build import load_model
from dopd.servers import ServedTeacher
from dopd.step.scorer import own_logprobs
from dopd.trainer.passes import check_kind

_MOST_LISTED = 2**18  # more tokens than any vocabulary has
_APART = 0.1  # nats, mean: half precision stays below
_TOKENS = 512  # of the first row


def describe_servers(teacher: ServedTeacher) -> Iterator[str]:
    """Each server with its model, its context, its vocabulary where it lists that, and the most tokens that it lists.

    Raises:
        ServerError: a server that does not answer.
    """
    context = "a context that it does not say" if teacher.context is None else f"a context of {teacher.context + 1}"
    for url in teacher.client.urls:
        size = _listed(teacher, url, -1)
        listed = (
            f"lists its whole vocabulary of {size} tokens"
            if size
            else f"lists at most {_largest(teacher, url)} tokens (--max-logprobs)"
        )
        yield f"teacher on a server: {teacher.model} at {url}, {context} tokens; {listed}"


def _listed(teacher: ServedTeacher, url: str, k: int) -> int:
    """How many tokens a server lists when it is asked for `k`; 0 where it refuses."""
    try:
        return len(teacher.ask([0, 0], 1, url=url, k=k).top[0])
    except ServerLostError:
        raise
    except ServerError:
        return 0


def _largest(teacher: ServedTeacher, url: str) -> int:
    """The largest k that a server gives, by halving."""
    fits, refused = 0, _MOST_LISTED
    while refused - fits > 1:
        middle = (fits + refused) // 2
        fits, refused = (middle, refused) if _listed(teacher, url, middle) else (fits, middle)
    return fits


def compare_with_local(teacher: ServedTeacher, name: str, ids: list[int]) -> str:
    """Compare a server's log-probs with those of a model that is loaded here.

    Args:
        teacher (`ServedTeacher`): on the servers.
        name (`str`): of the model, as `teacher_model_name_or_path`.
        ids (`list[int]`): a text of two tokens or more.

    Returns:
        How far they are apart.

    Raises:
        ModelError: they are not one model.
    """
    model = load_model(name, dtype="auto").eval()
    check_kind(name, model.config)
    ids = ids[:_TOKENS]
    there = torch.tensor(teacher.ask(ids, 1).logprobs, dtype=torch.float64)
    apart = (own_logprobs(model, ids) - there).abs()
    sentence = (
        f"{len(apart)} log-probs of {name} here and of {teacher.model} there are {float(apart.mean()):.2g} nats apart"
    )
    if not float(apart.mean()) <= _APART:
        raise ModelError(f"teacher_server: {sentence}: they are not one model, or one of them computes wrongly")
    return f"{sentence} in the mean, {float(apart.max()):.2g} at most"
