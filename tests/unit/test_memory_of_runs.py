"""What `dopd plan` and the dry run say of memory is what small runs take, phase by phase."""

import contextlib
import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from datasets import Dataset
from memory_kit import LiveBytes
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dopd.runs import memory
from dopd.runs.examination import row_views
from dopd.runs.sizes import ModelSize
from dopd.tiny.models import TinySpec
from dopd.trainer.step_metrics import StepClock

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 200, "num_key_value_heads": 2}
MODELS: dict[str, Any] = {
    "qwen3": lambda layers: Qwen3ForCausalLM(
        Qwen3Config(**SIZES, num_hidden_layers=layers, num_attention_heads=6, head_dim=24)
    ),
    "qwen2": lambda layers: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_hidden_layers=layers, num_attention_heads=8)),
    "llama": lambda layers: LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers, num_attention_heads=8)),
}
ROWS, LENGTH = 8, 128


def kept(model: Any, *, mixed: bool) -> float:
    """Bytes for each token that autograd keeps of a pass; copies of weights left out."""
    weights = {one.untyped_storage()._cdata for one in model.parameters()}
    shapes = {tuple(one.shape) for one in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and not {tuple(tensor.shape), tuple(tensor.shape)[::-1]} & shapes:
            held[storage._cdata] = tensor
        return tensor

    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    backbone = model.get_base_model().model if hasattr(model, "peft_config") else model.model
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one), torch.autocast("cpu", enabled=mixed):
        backbone(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(one.untyped_storage().nbytes() for one in held.values()) / ids.numel()


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("dtype", "mixed"), [("float32", False), ("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize("name", MODELS)
def test_what_a_layer_keeps_for_its_backward_pass(name: str, dtype: str, mixed: bool, adapted: bool) -> None:
    found, said = [], 0.0
    for layers in (1, 2):
        model = MODELS[name](layers).to(getattr(torch, dtype))
        if adapted:
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
            model.enable_input_require_grads()
        found.append(kept(model.train(), mixed=mixed))
        said = memory.layer_bytes(ModelSize.of(model), LENGTH, mixed=mixed)
    assert said == pytest.approx(found[1] - found[0], rel=0.05)


# --- Whole runs


def peaks_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[dict[str, float], Any]:
    """The most bytes that were alive in every phase of the second step of a run, and its trainer."""
    live, peaks, timed = LiveBytes(), dict[str, float](), StepClock.phase

    @contextlib.contextmanager
    def phase(self: StepClock, name: str) -> Iterator[None]:
        gc.collect()
        live.restart()
        with timed(self, name):
            yield
        peaks[{"rollout": "rollouts", "step": "training"}.get(name, name)] = live.peak
        live.restart()

    monkeypatch.setattr(StepClock, "phase", phase)
    words, draw = sorted(kit.TASK.vocabulary()), random.Random(0)
    texts = [" ".join(draw.choices(words, k=options.get("max_prompt_length", 0))) for _ in range(64)]
    answer = options["max_completion_length"]
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "privileged_context": words[0],
            "solution": " ".join(draw.choices(words, k=answer - 1)),
        }
        for text in texts
    ]
    with live:
        models = [make() for make in (options.pop("model"), options.pop("teacher"))]
        made = kit.trainer(
            folder,
            model=models[0],
            teacher_model=models[1],
            train_dataset=Dataset.from_list(rows),
            generation_kwargs={"min_new_tokens": answer},
            max_steps=2,
            learning_rate=1e-5,
            optim="adamw_torch",
            **options | {"max_prompt_length": None},
        )
        gc.collect()
        peaks["weights"] = live.now
        made.train()
        peaks["update"] = live.peak
    made.args.max_prompt_length = max(len(ids) for _, _, ids in row_views(made))
    return peaks, made


def wide() -> Any:
    """A student whose vocabulary is most of it."""
    model = kit.student(spec=TinySpec(num_layers=1, hidden_size=64))
    model.resize_token_embeddings(8_000, mean_resizing=False)
    return model


SMALL, LARGE = TinySpec(num_layers=4, hidden_size=128), TinySpec(num_layers=4, hidden_size=160)
LORA = LoraConfig(r=4, target_modules="all-linear")
LONG: dict[str, Any] = {"max_prompt_length": 100, "max_completion_length": 100}
CASES: dict[str, dict[str, Any]] = {
    "activations": {**LONG, "share_prompts": False},
    "shared prompts": LONG,
    "checkpointing": {**LONG, "activation_checkpointing": True},
    "a moving average": {**LONG, "privileged_student": "ema"},
    "adapters": {**LONG, "peft_config": LORA, "share_prompts": False},
    "half precision": {**LONG, "dtype": torch.bfloat16, "share_prompts": False},
    "many answers": {
        "max_prompt_length": 30,
        "max_completion_length": 60,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 8,
    },
    "weights": {
        "max_prompt_length": 8,
        "max_completion_length": 8,
        "spec": TinySpec(num_layers=2, hidden_size=512),
    },
    "two parts": {**LONG, "share_prompts": False, "method": "gkd", "method_options": {"lmbda": 0.5}},
    "logits": {"max_prompt_length": 8, "max_completion_length": 60, "wide": True, "method": "vanilla"},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peaks_of_every_phase(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(CASES[case])
    dtype, spec = options.pop("dtype", torch.float32), options.pop("spec", None)
    is_wide = options.pop("wide", False)
    student = wide if is_wide else lambda: kit.student(spec=spec or SMALL).to(dtype)
    teacher = wide if is_wide else lambda: kit.teacher(spec=spec or LARGE).to(dtype)
    found, made = peaks_of(tmp_path, monkeypatch, model=student, teacher=teacher, **options)
    sizes = [ModelSize.of(model) for model in (made.unwrapped_student, made.unwrapped_teacher)]
    room = memory.Room(gpu=False)
    said = memory.totals(memory.phases(sizes[0], sizes[1], made.args, made.table, room=room))
    assert {name: round(said[name] / found[name], 2) for name in said} == {
        name: pytest.approx(1.0, abs=0.1) for name in said
    }
