"""Evaluations through vLLM's own interface, of which a stand-in answers with transformers."""

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dopd.cli.main import main
from dopd.runs import evaluate
from dopd.tiny import tiny_model_path

COMMAND = ["eval", "tiny:dag/student", "--prompts", "5", "--max-new-tokens", "24", "--json"]


class Llm:
    """`vllm.LLM` as far as it is used."""

    made: ClassVar[list[dict[str, Any]]] = []
    asked: ClassVar[list[Any]] = []

    def __init__(self, model: str, dtype: str, seed: int, gpu_memory_utilization: float = 0.9) -> None:
        self.made.append({"model": model, "dtype": dtype, "seed": seed, "gpu": gpu_memory_utilization})
        self.model = AutoModelForCausalLM.from_pretrained(model).eval()
        self.eos = AutoTokenizer.from_pretrained(model).eos_token_id

    def generate(self, prompts: list[dict[str, list[int]]], params: Any) -> list[Any]:
        self.asked.append(params)
        found = []
        torch.manual_seed(getattr(params, "seed", 0))
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            sampled = {"do_sample": True, "temperature": params.temperature, "top_k": 0} if params.temperature else {}
            outputs = []
            for _ in range(getattr(params, "n", 1)):
                with torch.no_grad():
                    whole = self.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=params.max_tokens,
                        eos_token_id=params.stop_token_ids,
                        pad_token_id=self.eos,
                        **({"do_sample": False} | sampled),
                    )
                answer = whole[0, ids.shape[1] :].tolist()
                reason = "stop" if answer[-1] in params.stop_token_ids else "length"
                outputs.append(SimpleNamespace(token_ids=answer, finish_reason=reason, text=""))
            found.append(SimpleNamespace(outputs=outputs))
        return found


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[Llm]:
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = Llm, lambda **fields: SimpleNamespace(**fields)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(evaluate, "version", lambda name: "0.0" if name == "vllm" else version(name))
    Llm.made, Llm.asked = [], []
    return Llm


def test_greedy_answers_are_those_of_transformers(stand_in: type[Llm], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(COMMAND) == 0
    expected = json.loads(capsys.readouterr().out)
    flags = [
        "--engine",
        "vllm",
        "--engine-options",
        "{gpu_memory_utilization: 0.5}",
        "--samples",
        "3",
        "--top-p",
        "0.9",
    ]
    assert main([*COMMAND, *flags, "--temperature", "0.7", "--seed", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["scores"]["greedy"] == expected["scores"]["greedy"]
    assert found["scores"]["privileged"] == expected["scores"]["privileged"]
    assert [len(draws) for draws in found["draws"]] == [3] * 5 and "entropy" not in found["metrics"]
    assert found["evaluation"]["chat_template"] == expected["evaluation"]["chat_template"]
    assert found["evaluation"]["engine"] == "vllm" and found["evaluation"]["model (its weights)"]
    assert stand_in.made == [
        {"model": str(tiny_model_path("dag", "student")), "dtype": "float32", "seed": 4, "gpu": 0.5}
    ]
    drawn = next(params for params in stand_in.asked if params.temperature)
    assert (drawn.n, drawn.temperature, drawn.top_p, drawn.seed, drawn.max_tokens) == (3, 0.7, 0.9, 4, 24)


def test_options_that_vllm_does_not_take_are_named(stand_in: type[Llm], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--engine", "vllm", "--engine-options", "{gpu_memory: 1}"]) == 2
    assert "engine_options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engine", "vllm"], "pip install 'dopd[vllm]'"),
        (["--engine", "vllm", "--teacher", "tiny:dag/teacher"], "leave one out"),
        (["--engine-options", "{a: 1}"], "of --engine vllm"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    flags: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dopd.runs.evaluate.load_model", None)
    monkeypatch.setattr("dopd.runs.vllm_answers.find_spec", lambda name: None)
    assert main([*COMMAND, *flags]) == 2
    assert words in capsys.readouterr().err
