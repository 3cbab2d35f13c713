"""A teacher on a server: its scores, the step with them, what a table can get, and how a server can fail."""

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from server_kit import Fail, ModelServer, serving
from trainer_kit import GREEDY, TOKENIZER, close, many_ends, student, teacher, trainer, uneven_rows, update
from trainer_kit import parameters as parameters_of
from transformers import ProcessorMixin

from dopd import table
from dopd.divergences import divergence
from dopd.errors import ConfigError, ModelError, NotFiniteError, ServerError, ServerLostError
from dopd.fused import TokenScores, TopLogprobs, fused_routed_loss
from dopd.ranks import Alone
from dopd.scoring import left_padded
from dopd.servers import (
    KEY_VARIABLE,
    Client,
    Introduction,
    Patience,
    ServedScorer,
    ServedTeacher,
    ServedTeachers,
    check_tokens,
    introduced,
    served_table,
    server_urls,
)
from dopd.step import FixedModels, LocalScorer
from dopd.tables import RoutingTable
from dopd.trainer.served import check_reads_text, check_served

SERVED = {"teacher_model": None, "teacher_server_retries": 0, "teacher_server_timeout": 20.0}
BOTH_VIEWS = [
    {"name": "plain", "source": "teacher", "support": "sampled"},
    {"name": "privileged", "source": "privileged_teacher", "support": "sampled", "scale": "privilege_gap"},
    {"name": "top", "source": "teacher", "support": "target_topk", "top_k": 5, "divergence": "js"},
    {"name": "renormalised", "source": "teacher", "support": "target_topk", "top_k": 7, "tail": "renormalize"},
    {"name": "own", "source": "privileged_student", "divergence": "forward_kl"},
]


@pytest.fixture(scope="module")
def server_of_module() -> Iterator[ModelServer]:
    with serving(teacher(), TOKENIZER) as server:
        yield server


@pytest.fixture
def server(server_of_module: ModelServer) -> Iterator[ModelServer]:
    before = dict(vars(server_of_module))
    server_of_module.asked.clear()
    yield server_of_module
    vars(server_of_module).update(
        {name: before[name] for name in ("fault", "name", "context", "max_logprobs", "model")}
    )


def client(*urls: str, retries: int = 0, timeout: float = 20.0) -> Client:
    return Client(urls, Patience(timeout, retries))


def asking(server: ModelServer, *, top_k: int = 0, **patience: Any) -> ServedTeacher:
    return ServedTeacher(client(server.url, **patience), Introduction(server.name), top_k=top_k, workers=2)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dopd.servers.client._FIRST_PAUSE", 0.01)


def completions() -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Prompts and completions of different lengths, one completion without a scored token."""
    view = left_padded(
        [[11, 12, 13], [14], [15, 16, 17, 18, 19], [20, 21]], TOKENIZER.pad_token_id, torch.device("cpu")
    )
    ids = torch.tensor([[30, 31, 32, 33], [34, 35, 0, 0], [36, 37, 38, 0], [0, 0, 0, 0]])
    return view, ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])


def own_log_probs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """A model's log-probs (T, V) at the tokens of an answer, from its own logits without padding."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def test_scores_are_the_models_own(server: ModelServer) -> None:
    view, ids, mask = completions()
    served = ServedScorer(LocalScorer(FixedModels(student()), 2), asking(server, top_k=3), TOKENIZER.vocab_size)
    scores = dict(served.score_all({"teacher": view, "student": view}, ids, mask))
    assert scores.keys() == {"teacher", "student"} and scores["teacher"].hidden is None
    tokens = scores["teacher"].tokens
    assert tokens.top is not None and not tokens.logprobs[mask == 0].any()
    for row in range(3):
        prompt = view.prompt_ids[row][view.prompt_mask[row].bool()].tolist()
        answer = ids[row][mask[row].bool()].tolist()
        log_p = own_log_probs(server.model, prompt, answer)
        theirs = log_p.gather(1, torch.tensor(answer)[:, None]).squeeze(1)
        torch.testing.assert_close(tokens.logprobs[row, : len(answer)].double(), theirs, atol=1e-5, rtol=0)
        best = log_p.topk(3)
        assert tokens.top.ids[row, : len(answer)].tolist() == best.indices.tolist()
        torch.testing.assert_close(tokens.top.logprobs[row, : len(answer)].double(), best.values, atol=1e-5, rtol=0)


def test_a_step_is_that_of_a_teacher_here(server: ModelServer, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rules": BOTH_VIEWS,
        "generation_kwargs": GREEDY,
        "train_dataset": Dataset.from_list(uneven_rows(4)),
        "num_generations": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    }
    updates = []
    for name, given in (("here", {}), ("served", {**SERVED, "teacher_server": server.url})):
        made = trainer(tmp_path / name, model=many_ends(student()), **options, **given)
        before = parameters_of(made.model)
        made.train()
        updates.append(update(before, made.model))
    assert close(updates[1], updates[0])
    assert max(float(value.abs().max()) for value in updates[0].values()) > 1e-4
    assert {body["temperature"] for body in server.asked} == {1.0} and len(server.asked) == 1 + 2 * 8


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "truncate"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js"])
def test_a_listed_target_gives_the_divergence_over_its_tokens(kind: str, tail: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head, target = (torch.randn(*size, generator=generator) for size in ((2, 3, 4), (29, 4), (2, 3, 29)))
    hidden.requires_grad_()
    ids, mask = torch.randint(29, (2, 3), generator=generator), torch.tensor([[1, 1, 1], [1, 1, 0]])
    made = RoutingTable.from_dicts(
        [{"source": "teacher", "support": "target_topk", "top_k": 6, "divergence": kind, "tail": tail}]
    )
    log_t = target.log_softmax(-1)
    top = log_t.topk(8)
    scores = TokenScores(log_t.gather(-1, ids[..., None]).squeeze(-1), None, None, TopLogprobs(top.indices, top.values))
    found = fused_routed_loss(hidden, head, {}, ids, mask, made, scores={"teacher": scores})
    logits = hidden @ head.T
    per_token = divergence(logits, target, kind=kind, support="target_topk", top_k=6, tail=tail)
    loss = ((per_token * mask).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(found.loss, loss, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found.loss, hidden)[0], torch.autograd.grad(loss, hidden)[0], atol=2e-6, rtol=1e-4
    )


def test_a_sure_teacher_costs_no_infinity() -> None:
    """All of the mass, to rounding, lies on the listed tokens: the rest counts as no more than the rounding hides."""
    hidden, head = torch.randn(1, 1, 4, requires_grad=True), torch.randn(9, 4)
    made = RoutingTable.from_dicts([{"source": "teacher", "support": "target_topk", "top_k": 2}])
    listed = TopLogprobs(torch.tensor([[[3, 5]]]), torch.tensor([[[-1e-8, -18.0]]]))
    scores = {"teacher": TokenScores(torch.tensor([[-1e-8]]), None, None, listed)}
    found = fused_routed_loss(hidden, head, {}, torch.tensor([[3]]), torch.ones(1, 1), made, scores=scores)
    found.loss.backward()
    assert 0 < float(found.loss.detach()) < 30 and bool(torch.isfinite(hidden.grad).all())


# --- What a table can get


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("vanilla", {}, r"rule 'all' takes its target over the whole vocabulary .*teacher_server_support=target_topk"),
        ("dopd", {}, r"rule 'LH' .*the student's top 128 .*rule 'HT' .*the whole vocabulary"),
        ("veto", {}, r"rule 'all' multiplies whole distributions \(source teacher\^1 \* student"),
        ("vanilla_pg", {"merge_ends": True}, "merge_ends adds up log-probs of several end tokens"),
        ("bridge_garden", {}, r"signal 'teacher_doubt' reads the measure 'teacher_confidence'"),
    ],
)
def test_what_a_server_cannot_give_is_refused_by_the_rules_name(
    method: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"method '{method}' cannot be served: .*{words}"):
        served_table(table(method, **options), "exact", 20)


def test_entropies_of_the_teacher_are_not_served() -> None:
    rule = {"source": "teacher", "support": "sampled", "scale": "teacher_entropy"}
    with pytest.raises(ConfigError, match=r"rule 'all': signal 'teacher_entropy' reads the entropy"):
        served_table(RoutingTable.from_dicts([rule]), "target_topk", 20)


def test_what_is_taken_in_place_of_the_methods_own_is_said() -> None:
    served = served_table(table("dopd", top_k=64), "target_topk", 9)
    by_label = {rule.label: (rule.support, rule.top_k, rule.tail) for rule in served.table.rules}
    assert by_label == {
        "LH": ("target_topk", 9, "bucket"),
        "HT": ("target_topk", 9, "bucket"),
        "LL": ("student_topk", 64, "bucket"),
        "HS": ("student_topk", 64, "bucket"),
    }
    assert served.top_k == 9 and len(served.notes) == 3 and served.table.name == "dopd_served"
    assert (
        "rule 'LH': the teacher's 9 most probable tokens, and one outcome for all others, in place of"
        in (served.notes[1])
    )


def test_one_outcome_for_all_others_is_corrected_by_the_sampled_tokens_where_that_is_asked_for() -> None:
    served = served_table(table("dopd", top_k=64), "target_topk_sampled", 9)
    by_label = {rule.label: (rule.support, rule.top_k, rule.tail) for rule in served.table.rules}
    assert by_label["LH"] == by_label["HT"] == ("target_topk", 9, "sampled")
    assert by_label["LL"] == ("student_topk", 64, "bucket")  # of the student, which is here
    assert "the sampled tokens among these, in place of" in served.notes[1]
    assert "teacher_server_support=target_topk_sampled" in served.notes[1]
    exact = served_table(table("res_opd"), "exact", 20)
    assert exact.table == table("res_opd") and exact.top_k == 20
    with pytest.raises(ConfigError, match=r"bounded by clamp or cap\) is not estimated from sampled tokens"):
        served_table(table("diffgate"), "target_topk_sampled", 20)
    with pytest.raises(ConfigError, match=r"'list_mle'\) is not estimated from sampled tokens"):
        served_table(
            RoutingTable.from_dicts([{"source": "teacher", "divergence": "list_mle", "support": "student_topk"}]),
            "target_topk_sampled",
            20,
        )


def test_sampled_tables_are_served_as_they_are() -> None:
    for method in ("vanilla_pg", "exopd", "fast_opd"):
        served = served_table(table(method), "exact", 20)
        assert served.table == table(method) and served.top_k == 0
        assert served.notes == ["rule 'all': log-probs of the sampled tokens, exactly"]


# --- Addresses, keys, models


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("localhost:8000", "must be a URL with http"),
        ("", "must be a URL"),
        ([], "must be a URL"),
        ("http://", "must be a URL"),
        ("http://user:hidden@host:8000", "a name or a password in the address of host.*DOPD_TEACHER_API_KEY"),
        ("http://host:8000/?a=b", "must end before"),
        (["http://host:8000", "http://host:8000/v1/"], "names one address twice"),
    ],
)
def test_addresses_that_are_none(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        server_urls("teacher_server", given)
    assert "hidden" not in str(caught.value)
    assert server_urls("teacher_server", "https://host/some/path/v1/") == ["https://host/some/path"]


def test_a_server_without_the_model(server: ModelServer) -> None:
    assert introduced(client(server.url), None) == Introduction("teacher", 512)
    with pytest.raises(ConfigError, match=r"teacher_server_model \(='other'\) is not served .*'teacher'"):
        introduced(client(server.url), "other")
    with pytest.raises(ServerError, match=r"teacher_server .*does not answer: .*ConnectError"):
        introduced(client("http://127.0.0.1:1"), None)


def test_the_key_is_sent_and_written_nowhere(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "abc")  # shorter than what is searched for in texts
    server.fault = lambda number, reply: Fail(401, "unknown key abc")
    with pytest.raises(ServerError, match=f"HTTP 401: unknown key <{KEY_VARIABLE}>. The server wants a key") as caught:
        asking(server).ask([11, 12], 1)
    assert server.asked[0]["headers"]["Authorization"] == "Bearer abc" and "abc" not in str(caught.value)


@pytest.mark.parametrize("key", ["two\nlines-of-a-key", "k\u00e9y"])
def test_a_key_that_cannot_be_sent_is_not_quoted(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    with pytest.raises(ConfigError, match=f"{KEY_VARIABLE} .* has characters that no key has") as caught:
        client("http://127.0.0.1:1")
    assert key.split()[0] not in str(caught.value)


def test_token_ids_must_mean_the_same(server: ModelServer) -> None:
    tried = check_tokens(asking(server), TOKENIZER)
    assert tried.notes == [] and len(tried.logprobs) == len(tried.ids) - 1 == 62

    class Shifted:
        def get_vocab(self) -> dict[str, int]:
            vocabulary: dict[str, int] = TOKENIZER.get_vocab()
            return vocabulary

        def decode(self, ids: list[int]) -> str:
            text: str = TOKENIZER.decode([(ids[0] + 1) % TOKENIZER.vocab_size])
            return text

    with pytest.raises(ModelError, match="tokens of the student's are other ones there"):
        check_tokens(asking(server), Shifted())
    server.max_logprobs = 5
    with pytest.raises(ConfigError, match=r"asked for the 6 most probable tokens.*greater than max.*--max-logprobs -1"):
        check_tokens(asking(server, top_k=6), TOKENIZER)


def test_servers_with_other_weights_are_no_pair(server: ModelServer) -> None:
    with serving(teacher(7), TOKENIZER) as other:
        pair = ServedTeacher(client(server.url, other.url), Introduction("teacher"))
        with pytest.raises(ModelError, match=r"differ by .* nats: they do not have the same weights"):
            check_tokens(pair, TOKENIZER)


def run_with(server: ModelServer, own: Any, *, top_k: int = 0) -> Any:
    """What is read of a run before its first step."""
    return SimpleNamespace(
        served=ServedTeachers({"": asking(server, top_k=top_k)}),
        tokenizer=TOKENIZER,
        scored_vocab_size=TOKENIZER.vocab_size,
        is_split=False,
        table=table("vanilla_pg"),
        unwrapped_student=own,
    )


def test_a_server_with_the_students_own_weights_is_told(server: ModelServer, caplog: pytest.LogCaptureFixture) -> None:
    check_served(run_with(server, student()))
    assert not caplog.text
    check_served(run_with(server, teacher()))
    assert "is that server's model the teacher you meant?" in caplog.text
    with pytest.raises(ConfigError, match=f"must be below the {TOKENIZER.vocab_size} tokens of the student's"):
        check_served(run_with(server, student(), top_k=TOKENIZER.vocab_size))


def test_images_are_refused_by_name(server: ModelServer) -> None:
    with pytest.raises(ConfigError, match="teacher_server: images are not sent to servers"):
        check_reads_text(asking(server), object.__new__(ProcessorMixin))


# --- Faults


def changed(reply: dict[str, Any], place: int, token: str, logprob: float) -> dict[str, Any]:
    reply["choices"][0]["prompt_logprobs"][place][token]["logprob"] = logprob
    return reply


FAULTS: dict[str, tuple[Any, str]] = {
    "another model": (lambda n, r: r | {"model": "other"}, "answered as the model 'other' and was asked for 'teacher'"),
    "a token too few": (lambda n, r: _cut(r), "scores 3 tokens and 4 were sent"),
    "no scores": (lambda n, r: {"model": "teacher", "choices": [{}]}, "has no prompt_logprobs"),
    "above 0": (lambda n, r: changed(r, 2, "13", 0.5), "the log-prob 0.5, above 0"),
    "no number": (lambda n, r: changed(r, 2, "13", None), "no log-prob of token 13 at position 2"),  # type: ignore[arg-type]
    "a refusal": (lambda n, r: Fail(400, "bad prompt"), "refuses with HTTP 400: bad prompt"),
}


def _cut(reply: dict[str, Any]) -> dict[str, Any]:
    reply["choices"][0]["prompt_logprobs"].pop()
    return reply


@pytest.mark.parametrize("name", FAULTS)
def test_a_reply_that_cannot_be_right_is_not_asked_for_again(server: ModelServer, name: str) -> None:
    server.fault, words = FAULTS[name]
    with pytest.raises(ServerError, match=words) as caught:
        asking(server, retries=3).ask([11, 12, 13, 14], 1)
    assert not isinstance(caught.value, ServerLostError) and len(server.asked) == 1


def test_a_reply_to_an_earlier_request_is_found(server: ModelServer) -> None:
    kept: list[dict[str, Any]] = []

    def stale(number: int, reply: dict[str, Any]) -> dict[str, Any]:
        kept.append(reply)
        return kept[0]

    server.fault = stale
    asked = asking(server)
    asked.ask([11, 12, 13], 1)
    with pytest.raises(ServerError, match=r"does not score token 15 at position 2, .* of another request"):
        asked.ask([11, 12, 15], 1)


PASSING: dict[str, Fail] = {
    "429": Fail(429, headers={"Retry-After": "0"}),
    "500": Fail(500),
    "slow": Fail(pause=0.5),
    "cut off": Fail(cut=40),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_asked_for_again(server: ModelServer, name: str) -> None:
    server.fault = lambda number, reply: PASSING[name] if number < 2 else reply
    scored = asking(server, retries=2, timeout=0.25).ask([11, 12, 13], 1)
    expected = own_log_probs(server.model, [11], [12, 13])
    assert scored.logprobs == pytest.approx([float(expected[0, 12]), float(expected[1, 13])], abs=1e-5)
    assert len(server.asked) == 3


@pytest.mark.parametrize("name", ["500", "slow", "cut off"])
def test_a_server_that_stays_away_is_lost(server: ModelServer, name: str) -> None:
    server.fault = lambda number, reply: PASSING[name]
    with pytest.raises(ServerLostError, match=r"no answer after 2 attempts in .* \(the last one: "):
        asking(server, retries=1, timeout=0.25).ask([11, 12, 13], 1)


def test_the_load_is_spread_and_goes_on_without_a_server_that_is_gone(server: ModelServer) -> None:
    view, ids, mask = completions()
    with serving(server.model, TOKENIZER) as other:
        pair = client(server.url, other.url, retries=3)
        teacher_of_both = ServedTeacher(pair, Introduction("teacher"), workers=4)
        server.fault = other.fault = lambda number, reply: Fail(pause=0.1)
        scorer = ServedScorer(LocalScorer(FixedModels(student()), 2), teacher_of_both, TOKENIZER.vocab_size)
        both = scorer.score("teacher", view, ids, mask).tokens.logprobs
        assert server.asked and other.asked
    server.fault = lambda number, reply: reply
    assert torch.equal(scorer.score("teacher", view, ids, mask).tokens.logprobs, both)


def test_the_server_is_asked_while_the_models_here_score(server: ModelServer) -> None:
    view, ids, mask = completions()
    began = threading.Event()

    class Local(LocalScorer):
        def score(self, *args: Any) -> Any:
            began.set()
            return super().score(*args)

    server.fault = lambda number, reply: reply if began.wait(5) else Fail(400, "nothing was scored meanwhile")
    scorer = ServedScorer(Local(FixedModels(student()), 2), asking(server), TOKENIZER.vocab_size)
    assert len(dict(scorer.score_all({"teacher": view, "student": view}, ids, mask))) == 2


def test_a_server_that_one_process_lost_stops_the_others(server: ModelServer) -> None:
    view, ids, mask = completions()

    class AnotherLost(Alone):
        def total(self, values: torch.Tensor) -> torch.Tensor:
            return values + torch.tensor([1, 1])

    local = LocalScorer(FixedModels(student()), 2)
    scorer = ServedScorer(local, asking(server), TOKENIZER.vocab_size, AnotherLost())
    with pytest.raises(ServerLostError, match="another process of this run has lost its teacher server"):
        scorer.score("teacher", view, ids, mask)


@pytest.mark.parametrize("value", [float("nan"), -9999.0])
def test_numbers_that_are_none_name_their_rows(server: ModelServer, value: float) -> None:
    view, ids, mask = completions()
    server.fault = lambda number, reply: changed(reply, 2, "35", value) if len(_positions(reply)) == 3 else reply
    scorer = ServedScorer(LocalScorer(FixedModels(student()), 2), asking(server), TOKENIZER.vocab_size)
    with pytest.raises(NotFiniteError, match="teacher: the server's log-probs of 1 answers are not finite") as caught:
        scorer.score("teacher", view, ids, mask)
    assert caught.value.rows == (1,)


def _positions(reply: dict[str, Any]) -> list[Any]:
    positions: list[Any] = reply["choices"][0]["prompt_logprobs"]
    return positions
