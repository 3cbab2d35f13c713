"""A teacher on a server as a source of scores, beside the models of this process and at the same time as they.

Shapes: B completions, T completion tokens, K listed tokens.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from dopd.errors import DopdError, ScoringError, ServerError, ServerLostError
from dopd.fused import TokenScores, TopLogprobs
from dopd.heads import Head
from dopd.ranks import Alone, Ranks
from dopd.scoring import View, unpadded
from dopd.servers import contract
from dopd.servers.client import Client
from dopd.servers.contract import Scored
from dopd.sources import TEACHER_SOURCES
from dopd.step.batch import SourceScores
from dopd.step.scorer import Scorer

SERVED_SUPPORTS = frozenset({"sampled", "target_topk"})


@dataclass(frozen=True)
class Introduction:
    """What servers say of the model that they serve.

    Attributes:
        model (`str`): its name, for requests.
        context (`int`, *optional*): most tokens of a sequence and of the one that is generated behind it.
    """

    model: str
    context: int | None = None


class ServedTeacher:
    """The log-probs that a model on a server gives to sequences of tokens.

    Args:
        client (`Client`): the servers.
        introduction (`Introduction`): the model there.
        top_k (`int`): most probable tokens that are asked for beside each sampled one; 0 for none.
        workers (`int`): requests at a time, one sequence each.
    """

    def __init__(self, client: Client, introduction: Introduction, *, top_k: int = 0, workers: int = 16) -> None:
        self.client, self.top_k = client, top_k
        self.model = introduction.model
        # A server generates one token behind what it scores.
        self.context = None if introduction.context is None else introduction.context - 1
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="teacher_server")

    def ask(self, ids: list[int], start: int, *, url: str | None = None, k: int | None = None) -> Scored:
        """What the server says of `ids[start:]`; `k` listed tokens in place of the usual number.

        Raises:
            ServerError, ServerLostError: see `Client.post` and `contract.read`.
        """
        k = self.top_k if k is None else k
        body = contract.request(self.model, ids, k)
        return self.client.post(
            contract.COMPLETIONS, body, lambda reply: contract.read(reply, self.model, ids, start, k), url=url
        )

    def begin(self, view: View, completion_ids: Tensor, mask: Tensor) -> "list[Future[Scored] | None]":
        """Send the completions (B, T) behind the prompts of a view; `None` for a row without a scored token."""
        if any(images is not None for images in view.images):
            raise ScoringError("teacher_server: a prompt has images, which are not sent to servers")
        view = view.for_teacher or view
        prompts = unpadded(view.prompt_ids, view.prompt_mask)
        answers = unpadded(completion_ids, mask)
        if mask.ne(0).int().diff(dim=1).gt(0).any():
            raise ScoringError("teacher_server: a completion has tokens that are not scored between others")
        return [
            self._pool.submit(self.ask, prompt + answer, len(prompt)) if answer else None
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


class ServedTeachers:
    """Teachers on servers, of which each row is read by one.

    Args:
        teachers (`dict[str, ServedTeacher]`): by the names that rows have for them; one that reads every row, by ''.
    """

    def __init__(self, teachers: Mapping[str, ServedTeacher]) -> None:
        self.teachers = dict(teachers)
        first, *_ = self.teachers.values()
        self.top_k = first.top_k
        contexts = [one.context for one in self.teachers.values() if one.context is not None]
        self.context = min(contexts, default=None)

    @property
    def names(self) -> list[str]:
        """Those that rows have for them; none where one teacher reads every row."""
        return [name for name in self.teachers if name]

    @property
    def model(self) -> str:
        """What is served, in a text."""
        return ", ".join(f"{name}: {one.model}" if name else one.model for name, one in self.teachers.items())

    def begin(self, view: View, completion_ids: Tensor, mask: Tensor) -> "list[Future[Scored] | None]":
        """As `ServedTeacher.begin`, each row at its own teacher."""
        futures: list[Future[Scored] | None] = [None] * len(mask)
        for name, teacher in self.teachers.items():
            rows = [row for row in range(len(mask)) if not view.teachers or view.teachers[row] == name]
            if rows:
                numbers = torch.tensor(rows, device=mask.device)
                sent = teacher.begin(view.at(rows), completion_ids[numbers], mask[numbers])
                for row, future in zip(rows, sent, strict=True):
                    futures[row] = future
        return futures


class ServedScorer:
    """Scores of a teacher on a server, and of all other sources by another scorer; implements `Scorer`.

    Args:
        local (`Scorer`): of the sources that are no teacher's.
        teacher (`ServedTeachers`): of those that are.
        vocab_size (`int`): outcomes of the student's distributions.
        ranks (`Ranks`): the processes that score together: one that lost its server stops all of them.
    """

    def __init__(
        self, local: Scorer, teacher: "ServedTeacher | ServedTeachers", vocab_size: int, ranks: Ranks | None = None
    ) -> None:
        self._local, self._teacher, self._vocab_size = local, teacher, vocab_size
        self._ranks = Alone() if ranks is None else ranks

    def supports(self, source: str) -> frozenset[str]:
        return SERVED_SUPPORTS if source in TEACHER_SOURCES else self._local.supports(source)

    def head(self, source: str) -> Head:
        return self._local.head(source)

    def forget(self) -> None:
        self._local.forget()

    def target(self, source: str, hidden: Tensor, view: View) -> tuple[Tensor, Head]:
        return self._local.target(source, hidden, view)

    def score(self, source: str, view: View, completion_ids: Tensor, mask: Tensor) -> SourceScores:
        return dict(self.score_all({source: view}, completion_ids, mask))[source]

    def score_all(
        self, views: Mapping[str, View], completion_ids: Tensor, mask: Tensor
    ) -> Iterator[tuple[str, SourceScores]]:
        served = sorted(views.keys() & TEACHER_SOURCES)
        under_way = {source: self._teacher.begin(views[source], completion_ids, mask) for source in served}
        sent = [future for futures in under_way.values() for future in futures if future is not None]
        try:
            others = {source: view for source, view in views.items() if source not in TEACHER_SOURCES}
            yield from self._local.score_all(others, completion_ids, mask)
            rows = self._replies(under_way, sent, mask.device)
        finally:
            for future in sent:
                future.cancel()
        for source, of_source in rows.items():
            yield source, SourceScores(_token_scores(of_source, mask, self._teacher.top_k), None, self._vocab_size)

    def _replies(
        self, under_way: "Mapping[str, list[Future[Scored] | None]]", sent: "list[Future[Scored]]", device: torch.device
    ) -> dict[str, list[Scored]]:
        """All replies, by source; what fails on one process is raised on all of them, so that none waits for it."""
        failed: BaseException | None = None
        rows: dict[str, list[Scored]] = {}
        wait(sent, return_when=FIRST_EXCEPTION)
        try:
            for future in filter(Future.done, sent):
                future.result()
            for source, futures in under_way.items():
                rows[source] = [Scored([], [], []) if future is None else future.result() for future in futures]
                contract.check_finite(source, rows[source])
        except DopdError as error:
            failed = error
        found = [isinstance(failed, ServerLostError), failed is not None]
        lost, wrong = self._ranks.total(torch.tensor(found, dtype=torch.long, device=device)).tolist()
        if failed is not None:
            raise failed
        if wrong:
            kind = ServerLostError if lost else ServerError
            raise kind("another process of this run has lost its teacher server, or got a wrong reply: see its output")
        return rows


def _token_scores(rows: list[Scored], mask: Tensor, top_k: int) -> TokenScores:
    """The scores of B answers as tensors on the device of their mask (B, T); 0 where nothing is scored."""
    keep_BT, size = (mask != 0).cpu(), (*mask.shape, top_k)
    logprobs_BT = torch.zeros(mask.shape)
    logprobs_BT[keep_BT] = torch.tensor([value for row in rows for value in row.logprobs])
    top = None
    if top_k:
        ids_BTK, listed_BTK = torch.zeros(size, dtype=torch.long), torch.zeros(size)
        ids_BTK[keep_BT] = torch.tensor([[token for token, _ in listed] for row in rows for listed in row.top])
        listed_BTK[keep_BT] = torch.tensor([[value for _, value in listed] for row in rows for listed in row.top])
        top = TopLogprobs(ids_BTK.to(mask.device), listed_BTK.to(mask.device))
    return TokenScores(logprobs_BT.to(mask.device), None, None, top)
