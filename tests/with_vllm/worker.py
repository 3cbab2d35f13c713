"""Trains a tiny pair with vLLM in this process, on a CPU, and writes what was seen: `python worker.py CASE FOLDER`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, as TRL's colocate mode brings it up to date
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": os.environ.get("MASTER_PORT", "29571"),
}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import trainer_kit as kit
import trl.generation.vllm_generation as host_engine
import vllm._custom_ops
import vllm.model_executor.layers.utils
from transformers import TrainerCallback

from dopd.errors import ScoringError
from dopd.step import Answers, Request
from dopd.tiny.models import TinySpec

SPEC = TinySpec(num_layers=2, hidden_size=128)  # heads of 32 channels: vLLM has no kernel for smaller ones on a CPU
STALE_FROM = 3


class Heard:
    """Passes requests on to the run's engine, and compares what it says with the student's own unpadded logits."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.engine = trainer, trainer.engine
        self.worst: dict[int, float] = {}  # by step

    def generate(self, request: Request) -> Answers:
        answers = self.engine.generate(request)
        model = self.trainer.unwrapped_student
        pairs = zip(request.view.prompt_ids, request.view.prompt_mask, strict=True)
        prompts = [ids[kept != 0].tolist() for ids, kept in pairs]
        for prompt, ids, logprobs in zip(prompts, answers.token_ids, answers.logprobs, strict=True):
            with torch.no_grad():
                log_p = model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
            own = log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
            far = float((own - torch.tensor(logprobs).double()).abs().max())
            self.worst[request.step] = max(self.worst.get(request.step, 0.0), far)
        return answers


class StopsSyncing(TrainerCallback):
    """From a step on the engine keeps the weights that it has."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STALE_FROM:
            self.trainer.vllm_generation.sync_weights = lambda: None


def keep_weights_as_they_are() -> None:
    """Have vLLM keep a layer's weights: on a CPU it packs them, and packed ones cannot be brought up to date."""
    vllm._custom_ops._supports_onednn = False
    vllm.model_executor.layers.utils.check_cpu_sgl_kernel = lambda *shape: False


def in_float32() -> None:
    """Have vLLM compute in float32; left alone it takes half precision for a model in float32."""
    made = host_engine.LLM
    host_engine.LLM = lambda *args, **kwargs: made(*args, **kwargs, dtype="float32")


def main(case: str, folder: Path) -> None:
    keep_weights_as_they_are()
    in_float32()
    for name, seed in (("student", 0), ("teacher", 1)):
        kit.student(seed, SPEC).save_pretrained(folder / name)
        kit.TOKENIZER.save_pretrained(folder / name)
    options: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}
    options |= {"max_steps": 6, "learning_rate": 2.0, "rollout_drift_limit": 0.01}
    options |= {"peft_config": kit.lora(8), "learning_rate": 20.0} if case == "lora" else {}
    options |= {"rollout_importance": "truncated"} if case == "importance" else {}
    made = kit.trainer(folder / "run", model=str(folder / "student"), teacher_model=str(folder / "teacher"), **options)
    heard = made.engine = Heard(made)
    made.add_callback(StopsSyncing(made))
    ended = ""
    try:
        made.train()
    except ScoringError as error:
        ended = str(error)
    logged = [{k: v for k, v in entry.items() if k.startswith("rollout/")} for entry in made.state.log_history]
    result = {"logged": logged, "ended": ended, "step": made.state.global_step, "worst": heard.worst}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
