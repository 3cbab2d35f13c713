"""What a run saves, resumes from and writes."""

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from datasets import Dataset
from resume_kit import comparable, resumable
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

import dopd
from dopd.errors import ConfigError, ModelError
from dopd.inspection.schema import read_json_lines
from dopd.tiny.models import TinySpec
from dopd.trainer import DOPDTrainer
from dopd.trainer.sampler import EpochRepeatSampler
from dopd.trainer.trace import read_trace

REGIMES = [regime.name for regime in dopd.Regime]


# --- Save and resume


@pytest.mark.parametrize(
    "options",
    [{"privileged_student": "ema"}, {"privileged_student": "frozen"}, {"gradient_accumulation_steps": 2}],
    ids=lambda options: str(next(iter(options.values()))),
)
def test_a_resumed_run_is_the_unbroken_run_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    """Weights, optimizer, random state, order of prompts beyond the first epoch, moving average, metrics."""
    unbroken = resumable(tmp_path / "unbroken", steps=6, **options)
    unbroken.train()
    broken = resumable(tmp_path / "broken", steps=6, **options)
    broken.add_callback(StopAfter(5))  # one step after the checkpoint at 4: its records must go
    broken.train()
    resumed = resumable(tmp_path / "broken", steps=6, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    expected = kit.parameters(unbroken.model)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.named_parameters())
    if options.get("privileged_student"):
        with (
            unbroken.models.source_model("privileged_student") as a,
            resumed.models.source_model("privileged_student") as b,
        ):
            for value, other in zip(a.parameters(), b.parameters(), strict=True):
                assert torch.equal(value, other)
    assert comparable(tmp_path / "broken") == comparable(tmp_path / "unbroken")
    assert read_trace(tmp_path / "broken" / "trace.jsonl") == read_trace(tmp_path / "unbroken" / "trace.jsonl")


class StopAfter(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self._step


def test_files_of_a_resumed_run_have_no_step_twice(tmp_path: Path) -> None:
    resumable(tmp_path, steps=3).train()
    resumable(tmp_path, steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    records = read_json_lines(tmp_path / "metrics.jsonl")
    assert Counter(record["step"] for record in records if "loss" in record) == {1: 1, 2: 1, 3: 1, 4: 1}
    assert Counter(record["step"] for record in records if "eval_entropy" in record) == {0: 1, 2: 1, 4: 1}
    assert Counter((r["step"], r["row"]) for r in read_trace(tmp_path / "trace.jsonl")).most_common(1)[0][1] == 1


def test_a_new_run_in_an_old_folder_starts_its_files_anew(tmp_path: Path) -> None:
    for _ in range(2):
        resumable(tmp_path, steps=1).train()
    assert [record["step"] for record in read_json_lines(tmp_path / "metrics.jsonl") if "loss" in record] == [1]
    assert len(read_trace(tmp_path / "trace.jsonl")) == 2


def test_a_checkpoint_without_its_moving_average_is_refused(tmp_path: Path) -> None:
    resumable(tmp_path, steps=2).train()
    wanted = str(tmp_path / "checkpoint-2")
    with pytest.raises(ConfigError, match="privileged_student is null there and ema here"):
        resumable(tmp_path, steps=4, privileged_student="ema").train(resume_from_checkpoint=wanted)
    meant = resumable(tmp_path, steps=4, privileged_student="ema", resume_with_changes=["privileged_student"])
    with pytest.raises(ModelError, match="not saved by a run whose privileged student is 'ema'"):
        meant.train(resume_from_checkpoint=wanted)


# --- What a run writes


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> DOPDTrainer:
    folder = tmp_path_factory.mktemp("finished")
    made = kit.trainer(
        folder,
        max_steps=2,
        model=kit.many_ends(kit.student()),
        train_dataset=Dataset.from_list(kit.task_rows(8)),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        verifier=kit.TASK.verify,
        trace_steps=1,
        trace_examples=3,
        save_strategy="steps",
        save_steps=2,
        callbacks=[Reported()],
    )
    made.train()
    return made


class Reported(TrainerCallback):
    """What a tracker in `report_to` is told."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_every_metric_of_a_step_exists_and_is_sane(finished: DOPDTrainer) -> None:
    records = kit.train_records(finished)
    assert len(records) == 2
    weights = {rule.label: rule.weight for rule in finished.table.rules}
    for record in records:
        assert sum(record[f"share/{name}"] for name in REGIMES) == pytest.approx(1)
        for name in REGIMES:
            present = record[f"share/{name}"] > 0
            assert record[f"weight/{name}"] == pytest.approx(weights[name] if present else 0)
            assert record[f"gap/{name}"] >= 0 and record[f"loss/{name}"] >= 0
            if present:
                high = name in ("HT", "HS")
                assert (record[f"gap/{name}"] >= record["threshold/gap"]) == high
        assert 0 < record["entropy"] <= math.log(len(kit.TOKENIZER))
        assert 0 < record["prob/privileged_teacher"] < 1 and 0 < record["prob/privileged_student"] < 1
        assert record["threshold/confidence"] == pytest.approx(
            record["prob/privileged_teacher"] + record["prob/privileged_student"]
        )
        assert record["num_sequences"] == 8 and record["privileged/missing_ratio"] == 0
        assert record["completions/eos_ratio"] + record["completions/clipped_ratio"] == pytest.approx(1)
        assert 1 <= record["completions/mean_length"] <= 8 and 0 <= record["rollout/accuracy"] <= 1
        for phase in ("rollout", "scoring", "training"):
            assert 0 < record[f"seconds/{phase}"] < 60
        assert record["loss"] > 0 and record["grad_norm"] > 0


def test_the_logged_loss_is_the_shares_times_losses_where_all_answers_are_equally_long(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, generation_kwargs={"min_new_tokens": 8})
    made.train()
    (record,) = kit.train_records(made)
    assert record["completions/min_length"] == record["completions/max_length"]
    assert record["loss"] == pytest.approx(sum(record[f"share/{n}"] * record[f"loss/{n}"] for n in REGIMES), rel=1e-5)


def test_trackers_are_told_the_routing_metrics(finished: DOPDTrainer) -> None:
    (callback,) = [c for c in finished.callback_handler.callbacks if isinstance(c, Reported)]
    logged = callback.logs[0]
    assert {f"share/{name}" for name in REGIMES} | {"entropy", "seconds/rollout", "loss", "rollout/accuracy"} <= set(
        logged
    )
    assert all(isinstance(value, int | float) for value in logged.values())


def test_the_metrics_file_holds_what_was_logged(finished: DOPDTrainer) -> None:
    records = read_json_lines(Path(finished.args.output_dir) / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == [1, 2]
    assert records[0]["share/LH"] == kit.train_records(finished)[0]["share/LH"]


def test_the_trace_tells_every_token_its_regime(finished: DOPDTrainer) -> None:
    records = read_trace(Path(finished.args.output_dir) / "trace.jsonl")
    assert [(record["step"], record["row"]) for record in records] == [(s, r) for s in range(2) for r in range(3)]
    for record in records:
        assert record["method"] == "dopd" and record["privileged_context"] and record["score"] in (0.0, 1.0)
        for token in record["tokens"]:
            assert token["regime"] in REGIMES and token["text"]
            assert token["gap"] == pytest.approx(abs(token["logprob_teacher"] - token["logprob_student"]), abs=1e-5)


def test_the_trace_of_an_unrouted_method_says_null(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, "vanilla", trace_steps=1)
    made.train()
    token = read_trace(tmp_path / "trace.jsonl")[0]["tokens"][0]
    assert (token["regime"], token["gap"], token["logprob_student"]) == (None, None, None)


def test_a_checkpoint_has_a_model_card_that_cites_the_paper_and_loads(finished: DOPDTrainer) -> None:
    folder = Path(finished.args.output_dir)
    finished.create_model_card(model_name="x")
    card = (folder / "README.md").read_text()
    assert "DOPD: Dual On-policy Distillation" in card and "2606.30626" in card and "dopd" in card
    assert (folder / "checkpoint-2" / "model.safetensors").exists()
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_weights_may_be_read_by_whoever_may_read_the_rest(finished: DOPDTrainer, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    before = os.umask(0o027)
    try:
        finished.save_model(str(folder))
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes.pop("dopd_run.json") == 0o640 and modes["model.safetensors"] == 0o640
    assert set(modes.values()) == {0o640}
    new = tmp_path / "new"
    new.touch()
    weights = Path(finished.args.output_dir) / "checkpoint-2" / "model.safetensors"
    assert weights.stat().st_mode == new.stat().st_mode


def test_an_adapters_checkpoint_holds_the_adapter_alone(tmp_path: Path) -> None:
    made = kit.lora_trainer(tmp_path, save_strategy="steps", save_steps=1, privileged_student="ema")
    made.train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"adapter_model.safetensors", "privileged_student.pt"} <= names and "model.safetensors" not in names


def test_sharded_weights_refuse_anchors_that_copy_the_student() -> None:
    from dopd.trainer.anchors import Sharding, make_anchor

    with pytest.raises(ConfigError, match="FSDP 1 and ZeRO-3"):
        make_anchor("ema", kit.student(spec=TinySpec(num_layers=1)), decay=0.9, sharding=Sharding("other"))


def test_the_order_of_every_epoch_is_that_of_trls_sampler_whenever_it_is_asked_for() -> None:
    options: dict[str, Any] = {"mini_repeat_count": 2, "batch_size": 2, "repeat_count": 2, "shuffle": True, "seed": 3}
    unbroken = RepeatSampler(range(6), **options)
    orders = [list(unbroken) for _ in range(3)]
    assert orders[0] != orders[1] != orders[2]
    for epoch in (2, 0, 1):
        assert list(EpochRepeatSampler(range(6), **options, epoch=lambda epoch=epoch: epoch)) == orders[epoch]
