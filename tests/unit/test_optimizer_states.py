"""What an optimizer is said to keep is what it keeps after a step."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from dopd.trainer.optimizer_states import kept_bytes

NAMES = ["adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"]
NAMES_OF_BITSANDBYTES = [
    "adamw_bnb_8bit", "lion_8bit", "lion_32bit", "ademamix", "ademamix_8bit", "rmsprop_bnb_8bit"
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*NAMES, *NAMES_OF_BITSANDBYTES])
def test_bytes_of_an_optimizer(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if name in NAMES_OF_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    args = TrainingArguments(str(tmp_path), use_cpu=True, optim=name, learning_rate=1e-3, report_to="none")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    weight = torch.nn.Parameter(torch.ones(256, 256, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = kind([weight], **options)
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    size = sum(value.numel() * value.element_size() for value in kept) / weight.numel()
    assert kept_bytes(name, weight.element_size()) == pytest.approx(size, rel=0.05, abs=0.1)
