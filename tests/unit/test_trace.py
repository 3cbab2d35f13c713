"""Traces: the documented format, the numbers against full logits, bounds, whole lines."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import dopd
import tests.trainer_kit as kit
from dopd.errors import DataError
from dopd.inspection import schema
from dopd.signals import SignalBatch
from dopd.trainer.trace import TraceWriter, read_trace

ROOT = Path(__file__).resolve().parents[2]


def traced(folder: Path, method: str = "dopd", **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    options = {"trace_steps": 1, "trace_examples": 4, "num_generations": 2, "verifier": kit.TASK.verify} | options
    made = kit.trainer(folder, method, **options)
    made.train()
    return made, read_trace(folder / "trace.jsonl")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict[str, Any]]]:
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 0.0}
    return traced(tmp_path_factory.mktemp("traced"), model=kit.many_ends(kit.student()), **options)


@pytest.mark.parametrize("method", ["dopd", "vanilla", "privileged_student"])
def test_records_follow_the_schema(tmp_path: Path, method: str) -> None:
    _, records = traced(tmp_path, method)
    assert len(records) == 4
    assert [schema.problems(record) for record in records] == [[]] * 4


def test_the_schema_notices_what_is_wrong(run: Any) -> None:
    record = run[1][0]
    token = record["tokens"][0]
    assert schema.problems({**record, "step": "1"}) == ["record.step is a str"]
    assert schema.problems({**record, "colour": 1}) == ["record has an unknown field colour"]
    assert schema.problems({**record, "tokens": [{**token, "loss": math.nan}]}) == ["tokens[0].loss is nan"]
    assert "lacks prompt_key" in schema.problems({k: v for k, v in record.items() if k != "prompt_key"})[0]
    assert schema.problems({**record, "schema": 2, "kind": "x"}) == [
        "schema (=2) is not 1",
        "kind (='x') is not one of batch, probe, inspect",
    ]


def test_the_documentation_names_every_field() -> None:
    text = (ROOT / "docs" / "reference" / "trace.md").read_text()
    rows = {line.split("|")[1].strip().strip("`") for line in text.splitlines() if line.startswith("| `")}
    assert rows == {*schema.RECORD_FIELDS, *schema.OPTIONAL_FIELDS, *schema.TOKEN_FIELDS}


def test_numbers_are_those_of_full_logits(run: Any) -> None:
    """Learning rate 0: the models after the run are those that the trace describes."""
    made, records = run
    for record in records:
        ids = [token["id"] for token in record["tokens"]]
        plain = logits(made, made.unwrapped_student, record, ids, privileged=False)
        teacher = logits(made, made.unwrapped_teacher, record, ids, privileged=True)
        student = logits(made, made.unwrapped_student, record, ids, privileged=True)
        for n, token in enumerate(record["tokens"]):
            assert token["logprob_plain"] == pytest.approx(float(plain[n, ids[n]]), abs=2e-5)
            assert token["logprob_teacher"] == pytest.approx(float(teacher[n, ids[n]]), abs=2e-5)
            assert token["logprob_student"] == pytest.approx(float(student[n, ids[n]]), abs=2e-5)
            assert token["entropy"] == pytest.approx(-float((plain[n].exp() * plain[n]).sum()), abs=2e-5)
            target = teacher if token["regime"] in ("LH", "HT") else student
            for name, expected in (("top_student", plain), ("top_target", target)):
                values = expected[n].exp().topk(schema.NUM_TOP)
                assert [p for _, p in token[name]] == pytest.approx(values.values.tolist(), abs=2e-5)
                assert token[name][0][0] == made.tokenizer.decode([int(values.indices[0])])
            assert token["weight"] == record["rules"][token["regime"]]["weight"]
            high = token["regime"] in ("HT", "HS")
            assert (token["gap"] >= record["thresholds"]["gap"] - 1e-5) if high else True
            assert high or token["gap"] <= record["thresholds"]["gap"] + 1e-5


def logits(made: Any, model: Any, record: dict[str, Any], ids: list[int], *, privileged: bool) -> torch.Tensor:
    prompt: Any = [{"role": "user", "content": record["prompt"]}]
    if privileged:
        prompt = made.prompts.template.apply(prompt, record["privileged_context"])
    (prefix,) = made.prompts.encode([prompt])
    inputs = torch.tensor([prefix + ids])
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=inputs).logits[0, len(prefix) - 1 : -1].double(), dim=-1)


def test_traced_losses_are_those_of_training(tmp_path: Path) -> None:
    made, records = traced(tmp_path, trace_examples=8, generation_kwargs={"min_new_tokens": 8})
    losses = [token["loss"] for record in records for token in record["tokens"]]
    assert len(records) == 8 and sum(losses) / len(losses) == pytest.approx(kit.records(made, "loss")[0], rel=1e-4)


def test_prompts_and_rollouts_are_told_apart(run: Any) -> None:
    keys = [record["prompt_key"] for record in run[1]]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert [record["rollout"] for record in run[1]] == [0, 1, 0, 1]


def test_the_same_prompt_has_the_same_key_in_another_run(tmp_path: Path, run: Any) -> None:
    _, others = traced(tmp_path, "vanilla")
    assert {record["prompt_key"] for record in others} & {record["prompt_key"] for record in run[1]}
    assert schema.prompt_key("a", "b") != schema.prompt_key("a", None) == schema.prompt_key("a", "")


def test_the_file_is_bounded_and_drops_are_counted(tmp_path: Path) -> None:
    made, _ = traced(tmp_path / "free", max_steps=3)
    size = (tmp_path / "free" / "trace.jsonl").stat().st_size
    made, records = traced(tmp_path / "bound", max_steps=3, trace_max_bytes=size // 2)
    assert (tmp_path / "bound" / "trace.jsonl").stat().st_size <= size // 2
    assert made.trace.dropped == 12 - len(records) > 0
    assert kit.train_records(made)[-1]["trace/dropped"] == made.trace.dropped


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"st')
    assert schema.read_json_lines(path) == [{"step": 0}, {"step": 1}]
    path.write_text('{"step": 0}\n{"st\n{"step": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        schema.read_json_lines(path)
    assert schema.read_json_lines(tmp_path / "absent") == []


def test_a_resumed_trace_keeps_earlier_steps_once(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"step": 0, "row": 0}, {"step": 0, "row": 0}, {"step": 2, "row": 0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"half')
    writer = TraceWriter(tmp_path, kit.trainer(tmp_path / "a").step, every=1, examples=1)
    writer.start(2)
    assert read_trace(path) == [{"step": 0, "row": 0}]


def test_texts_of_tokens_add_up_to_the_completion() -> None:
    ids = kit.TOKENIZER("a b c answer 7")["input_ids"]
    assert "".join(schema.token_texts(kit.TOKENIZER, ids)) == kit.TOKENIZER.decode(ids)


def test_gradient_shares_and_the_gap_histogram_add_up(run: Any) -> None:
    (record,) = kit.train_records(run[0])
    for prefix in ("gradient/", "gap_bin/"):
        values = [value for name, value in record.items() if name.startswith(prefix)]
        assert sum(values) == pytest.approx(1) and min(values) >= 0
    gaps = [token["gap"] for line in run[1] for token in line["tokens"]]
    assert record["gap_bin/0.01"] <= 1 and len(gaps) > 0


def test_the_gap_histogram_counts_every_token(tmp_path: Path) -> None:
    made, records = traced(tmp_path, trace_examples=8)
    gaps = [token["gap"] for line in records for token in line["tokens"]]
    (record,) = kit.train_records(made)
    below = 0.0
    for edge in ("0.01", "0.03", "0.1", "0.3", "1", "2", "3", "5", "10"):
        below += record[f"gap_bin/{edge}"]
        assert below == pytest.approx(sum(gap < float(edge) for gap in gaps) / len(gaps), abs=1e-6)


def test_gradient_shares_do_not_depend_on_how_a_batch_is_cut(tmp_path: Path) -> None:
    shares = []
    for name, size, cuts in (("whole", 8, 1), ("cut", 4, 2)):
        rows = Dataset.from_list(kit.task_rows(8))
        made = kit.trainer(
            tmp_path / name,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=cuts,
            train_dataset=rows,
            generation_kwargs=kit.GREEDY,
            shuffle_dataset=False,
        )
        made.train()
        (record,) = kit.train_records(made)
        shares.append([record[f"gradient/{label}"] for label in ("LH", "LL", "HT", "HS")])
    assert shares[0] == pytest.approx(shares[1], rel=1e-3)


def test_probes_answer_the_same_prompts_at_every_traced_step_and_change_nothing(tmp_path: Path) -> None:
    drawn = {"name": "drawn", "source": "teacher", "select": {"signal": "random", "top": 0.5}}
    options: dict[str, Any] = {
        "max_steps": 2,
        "rules": [*dopd.table("dopd").to_dicts(), drawn],
        "verifier": lambda text, row: random.random(),  # users' code may draw numbers as well
    }
    with_probes, records = traced(tmp_path / "with", trace_probes=2, model=kit.many_ends(kit.student()), **options)
    without, _ = traced(tmp_path / "without", model=kit.many_ends(kit.student()), **options)
    assert kit.records(with_probes, "rollout/accuracy") == kit.records(without, "rollout/accuracy") != []
    probes = [record for record in records if record["kind"] == "probe"]
    assert [record["step"] for record in probes] == [0, 0, 1, 1]
    assert len({record["prompt_key"] for record in probes}) == 2
    assert [schema.problems(record) for record in probes] == [[]] * 4
    batch = next(record for record in records if record["kind"] == "batch" and record["step"] == 1)
    assert probes[2]["thresholds"] == batch["thresholds"]
    expected = kit.parameters(without.model)
    assert all(torch.equal(value, expected[name]) for name, value in with_probes.model.named_parameters())


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("method", ["tip", "opsa"])
def test_a_probe_is_weighed_among_the_tokens_of_the_batch(tmp_path: Path, method: str) -> None:
    """From full logits of the completions that were trained on, and the published equations."""

    @dopd.register_signal("rollouts_of_a_prompt")
    def rollouts(batch: SignalBatch) -> torch.Tensor:
        return torch.full(batch.mask.shape, batch.num_generations - 1.0)  # reads groups, and no rewards

    rule = {**dopd.table(method).to_dicts()[0], "scale": "rollouts_of_a_prompt"}
    model = kit.many_ends(kit.student())
    options = {"trace_examples": 8, "trace_probes": 2, "learning_rate": 0.0, "verifier": None}
    made, records = traced(tmp_path, rules=[rule], model=model, **options)
    scores = [token_scores(made, record) for record in records]
    h_N, d_N, logp_N = (torch.cat(columns) for columns in zip(*scores, strict=True))
    size = sum(len(record["tokens"]) for record in records[:8])  # of the batch; the probes come behind it
    low, high = (torch.stack([v[:size].min(), v[:size].max()]) for v in (h_N, d_N))
    h_N, e_N = (((v - v_low) / (v_high - v_low)).clamp(0, 1) for v, (v_low, v_high) in ((h_N, low), (d_N, high)))
    values_N, share = (h_N + e_N - h_N * e_N, 0.5) if method == "tip" else (-logp_N, 0.2)
    chosen_N = values_N >= values_N[:size].topk(round(share * size)).values[-1]
    weight, loss_N = (2.0, d_N) if method == "tip" else (1.0, 0.5 + 0.5 * h_N)  # -A: a surrogate has its value
    tokens = [token for record in records for token in record["tokens"]]
    assert [record["kind"] for record in records] == ["batch"] * 8 + ["probe"] * 2 and len(tokens) - size > 4
    assert [token["weight"] for token in tokens] == (weight * chosen_N).tolist()
    assert [token["loss"] for token in tokens] == pytest.approx((weight * chosen_N * loss_N).tolist(), abs=2e-5)


def token_scores(made: Any, record: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Student entropy, KL(student || teacher) and log-prob of the token, of each token of a record."""
    ids = [token["id"] for token in record["tokens"]]
    models = (made.unwrapped_student, made.unwrapped_teacher or made.unwrapped_student)
    log_s_NV, log_t_NV = (logits(made, model, record, ids, privileged=False) for model in models)
    log_ratio_NV = log_s_NV - log_t_NV
    kl_N, entropy_N = ((log_s_NV.exp() * values).sum(-1) for values in (log_ratio_NV, -log_s_NV))
    return entropy_N, kl_N, log_s_NV[range(len(ids)), ids]


def test_a_probe_says_what_the_trace_of_a_batch_says(tmp_path: Path) -> None:
    """Two routes to the same numbers: the training batch, and the inspector."""
    made, records = traced(tmp_path, trace_examples=8, trace_probes=1, learning_rate=0.0)
    record = records[0]
    rows = [{**record, "prompt": [{"role": "user", "content": record["prompt"]}]}]
    ids = [token["id"] for token in record["tokens"]]
    inspector = made.trace._probe.inspector
    (again,) = inspector.records(rows, answers=[ids], thresholds=record["thresholds"], kind="batch")
    for token, other in zip(record["tokens"], again["tokens"], strict=True):
        assert token["regime"] == other["regime"] and token["text"] == other["text"]
        for name in ("gap", "logprob_teacher", "logprob_student", "logprob_plain", "entropy", "loss"):
            assert token[name] == pytest.approx(other[name], abs=1e-4)
