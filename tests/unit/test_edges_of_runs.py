"""Parts of a run that quick tests reach in no other way: several processes, vLLM, optimizers, what a host raises."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainer_kit as kit
from torch import Tensor
from transformers import LlamaConfig

from dopd.errors import ConfigError, ScoringError
from dopd.lengths import crossing, is_first_regime, regime
from dopd.ranks import AcceleratorRanks
from dopd.runs import quickstart, train
from dopd.runs.settings import load_settings
from dopd.scoring import left_padded
from dopd.step import Rollouts
from dopd.trainer import engines, host_optimizer
from dopd.trainer.engines import VLLMEngine, check_rollouts


class Processes:
    """What an accelerator does with two processes, which are threads here."""

    def __init__(self) -> None:
        self.barrier, self.held = threading.Barrier(2, timeout=10), [torch.empty(0)] * 2

    def of(self, rank: int) -> Any:
        def gather(values: Tensor) -> Tensor:
            self.held[rank] = values
            self.barrier.wait()
            gathered = torch.cat(self.held)
            self.barrier.wait()
            return gathered

        def pad(values: Tensor, dim: int, pad_index: float) -> Tensor:
            if dim:  # these have no such dimension, or one of the same size everywhere
                return values
            longest = int(gather(torch.tensor([len(values)])).max())
            padded = torch.full((longest, *values.shape[1:]), pad_index)
            padded[: len(values)] = values
            return padded

        return SimpleNamespace(num_processes=2, gather=gather, pad_across_processes=pad)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_numbers_of_the_tokens_of_two_processes_are_those_of_both(shape: tuple[int, ...]) -> None:
    mine = [torch.arange(3.0), torch.arange(10.0, 15.0)]
    mine = [values.view(-1, *[1] * len(shape)).expand(-1, *shape) for values in mine]
    processes, found = Processes(), [torch.empty(0)] * 2

    def run(rank: int) -> None:
        found[rank] = AcceleratorRanks(processes.of(rank)).gathered(mine[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(values, torch.cat(mine)) for values in found)


@pytest.mark.parametrize("given", [None, {"seed": 1}])
def test_vllm_leaves_out_what_cannot_be_scored_and_stops_at_texts(given: dict[str, Any] | None) -> None:

    engine = SimpleNamespace(generation_kwargs=given, logprobs=None)
    host: Any = SimpleNamespace(
        vllm_generation=engine,
        unwrapped_student=kit.student(),
        scored_vocab_size=kit.student().config.vocab_size - 2,
        ending=SimpleNamespace(strings=("END",)),
    )
    VLLMEngine(host)
    size = host.scored_vocab_size
    expected = {"stop": ["END"], "include_stop_str_in_output": True, "logit_bias": {size: -100.0, size + 1: -100.0}}
    assert engine.generation_kwargs == expected | (given or {})
    engine.generation_kwargs = {"logit_bias": {}}
    with pytest.raises(ConfigError, match="logit_bias is set by dopd"):
        VLLMEngine(host)


def test_an_optimizer_that_is_no_class_of_torch_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("made")

    args = kit.config(Path("unused"), "vanilla")
    for kind in (Foreign, lambda *_, **__: None):
        monkeypatch.setattr(host_optimizer, "_optimizer", lambda args, options, kind=kind: (kind, {}))
        assert host_optimizer.optimizer_problems(args) == []


def test_what_a_host_finds_wrong_is_an_error_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise ValueError("two settings cannot stand together\nmore")

    monkeypatch.setattr(train, "DOPDTrainer", refuse)
    flags = ["--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--bf16", "false", "--use_cpu", "true"]
    settings = load_settings("tiny-dag", flags)
    with pytest.raises(ConfigError, match=r"^two settings cannot stand together$"):
        train.make_trainer(settings, train.make_config(settings))


def test_both_models_compute_with_the_weights_that_they_store(tmp_path: Path) -> None:
    models = {"model": kit.student(), "teacher_model": kit.teacher()}
    for model in models.values():
        model.lm_head.support_avx512bf16_for_cpu = True
        model.lm_head.weight.quant_state = SimpleNamespace()
    kit.trainer(tmp_path, "vanilla", **models)
    assert [model.lm_head.support_avx512bf16_for_cpu for model in models.values()] == [False, False]


def test_the_quickstarts_table_is_written_into_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    for label in ("start", "teacher"):
        (tmp_path / "logs" / f"{label}.json").write_text('{"accuracy": 0.5}\n')
    monkeypatch.setattr(quickstart, "draw_comparison", lambda runs, path: path.write_bytes(b""))
    monkeypatch.setattr(quickstart, "summary_table", lambda summary: f"of {summary['task']}")
    settings: Any = SimpleNamespace(task="dag", model_name_or_path="s", trainer={"teacher_model_name_or_path": "t"})
    quickstart._write_report(tmp_path, settings, {})
    assert (tmp_path / quickstart._TABLE_FILE).read_text() == "of dag"
    assert (tmp_path / quickstart.CURVES_FILE).is_file()


def test_answers_that_cross_a_change_of_rotations_are_refused_unless_they_may_be_anothers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = kit.student()
    view = left_padded([[5, 6, 7]], 0, torch.device("cpu"))
    rollouts = Rollouts([{"prompt": "a"}], view, torch.tensor([[5, 6]]), torch.ones(1, 2))
    size = student.config.vocab_size
    monkeypatch.setattr(engines, "crossing", lambda config, starts, ends: int((starts, ends) == ([3], [5])))
    check_rollouts(rollouts, student, size, 2, off_policy=True)
    with pytest.raises(ScoringError, match="1 of 1 answers grew across"):
        check_rollouts(rollouts, student, size, 2, off_policy=False)


def test_frequencies_change_behind_the_length_that_they_are_for() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(max_position_embeddings=16, rope_parameters=rope)
    assert [regime(config, length) for length in (15, 16, 17, 20)] == [(0,), (0,), (17,), (20,)]
    assert is_first_regime(config, 16) and not is_first_regime(config, 17)
    assert crossing(config, [10, 10, 17], [16, 17, 18]) == 2
