"""Models whose parts are on several devices: the head apart from the embedding, and the last layers apart from both."""

import multiprocessing
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from compatibility import tried

from dopd.fused import fused_routed_loss, score_tokens
from dopd.heads import Head
from dopd.methods import table
from lab import pretend_device

pytestmark = pytest.mark.slow  # a process of its own
SIZES = (2, 5, 16, 11)  # sequences, tokens, hidden size, vocabulary


def _losses(place: str, backend: str) -> list[list[float]]:
    """Loss and gradients of heads that are on the second device, or on the CPU."""
    count, steps, size, vocabulary = SIZES
    torch.manual_seed(0)
    states = {name: torch.randn(count, steps, size) for name in ("student", "teacher")}
    weights = {name: torch.randn(vocabulary, size) for name in states}
    bias = torch.randn(vocabulary).to(place)
    ids, mask = torch.randint(vocabulary, (count, steps)), torch.ones(count, steps)
    hidden, weight = states["student"].requires_grad_(), weights["student"].to(place).requires_grad_()
    head, targets = Head(weight, bias), {"teacher": (states["teacher"], Head(weights["teacher"].to(place), bias))}
    routed = fused_routed_loss(hidden, head, targets, ids, mask, table("vanilla"), backend=backend)
    gradients = torch.autograd.grad(routed.loss, [hidden, weight])
    scores = score_tokens(hidden, head, ids, mask)
    assert gradients[1].device == weight.device
    return [one.detach().cpu().flatten().tolist() for one in (routed.loss, *gradients, scores.logprobs)]


def _share_of_first(completion: str, row: dict[str, Any]) -> float:
    return completion.count(completion[:1]) / max(len(completion), 1)


def _trained(folder: Path, method: str, cut: str) -> list[list[float]]:
    """Weights after a step of a student and a teacher that are cut in front of their head, or of their last norm."""
    models = {"student": kit.student(), "teacher": kit.teacher()}
    for model in models.values():
        if cut == "head":
            pretend_device.cut_before(model.lm_head, back=True)
        elif cut == "norm":
            pretend_device.cut_before(model.model.norm, back=False)
            pretend_device.cut_before(model.lm_head, back=True)
        if cut != "nowhere":
            model.hf_device_map = {"": "cpu", "lm_head": "pretend"}  # so nobody puts it into one place
    options = {"model": models["student"], "teacher_model": models["teacher"], "max_steps": 1, "learning_rate": 0.01}
    options |= {
        "trace_steps": 1,
        "trace_probes": 1,
        "student_eval_steps": 1,
        "eval_dataset": kit.Dataset.from_list(kit.task_rows(2)),
    }
    run = kit.trainer(folder, method, verifier=_share_of_first, generation_kwargs=kit.GREEDY, **options)
    run.train()
    return [weight.detach().cpu().flatten().tolist() for weight in run.model.parameters()]


BACKENDS = ("reference", "chunked")
CUTS = (("dopd_ema", "head"), ("dopd", "norm"), ("ta_opd", "norm"))


def _apart(connection: Any, folder: Path) -> None:
    """Send what each check comes to with a second device, and which operations had tensors of both."""
    pretend_device.register()
    checks: dict[str, Callable[[], Any]] = {one: partial(_losses, "pretend", one) for one in BACKENDS}
    checks |= {f"{method}, {cut}": partial(_trained, folder / f"{method}-{cut}", method, cut) for method, cut in CUTS}
    for name, check in checks.items():
        pretend_device.mixed.clear()
        try:
            with pretend_device.Pretended():
                outcome = check()
            connection.send((name, outcome, dict(pretend_device.mixed)))
        except BaseException:
            connection.send((name, None, {traceback.format_exc(): 1}))


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, int]]]:
    """Of each check: its outcome, and operations that a real second device would have refused.

    One process has all of them: a device cannot be taken out of torch again, and a fork has no gradients.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_apart, args=(there, tmp_path_factory.mktemp("apart")))
    process.start()
    there.close()
    found = {}
    for _ in range(len(BACKENDS) + len(CUTS)):
        name, outcome, mixed = here.recv()
        found[name] = (outcome, mixed)
    process.join()
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_on_another_device_than_its_states(apart: dict[str, tuple[Any, dict[str, int]]], backend: str) -> None:
    outcome, mixed = apart[backend]
    assert mixed == {} and outcome == _losses("cpu", backend)


@pytest.mark.parametrize(("method", "cut"), CUTS)
def test_a_step_with_the_head_on_another_device_is_that_with_it_on_one(
    apart: dict[str, tuple[Any, dict[str, int]]], tmp_path: Path, method: str, cut: str
) -> None:
    outcome, mixed = apart[f"{method}, {cut}"]
    assert mixed == {} and outcome == _trained(tmp_path / "together", method, "nowhere")
    tried(
        "setting", f"device_map: {'the head' if cut == 'head' else 'last norm and head'} on another device", "trained"
    )
