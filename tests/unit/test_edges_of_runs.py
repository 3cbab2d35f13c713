"""Parts of a run that quick tests reach in no other way: several processes, vLLM, optimizers, what a host raises."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trainer_kit as kit
from torch import Tensor

from dopd.errors import ConfigError
from dopd.ranks import AcceleratorRanks
from dopd.runs import quickstart, train
from dopd.runs.settings import load_settings
from dopd.trainer import host_optimizer
from dopd.trainer.engines import VLLMEngine


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
