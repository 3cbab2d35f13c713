"""One optimizer step of the trainer: the same whatever the cut, equal to the reference, no pass too many."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from datasets import Dataset
from torch import Tensor

import dopd
from dopd.heads import Head
from dopd.scoring import View
from dopd.step import LocalScorer
from dopd.tiny.models import TinySpec
from dopd.trainer import DOPDTrainer

CUTS = [(8, 1), (4, 2), (2, 4)]
RULES_WITH_A_ZERO = [
    {"regime": "LH", "source": "privileged_teacher", "weight": 0.6},
    {"regime": "LL", "source": "privileged_student", "weight": 0.0},
    {"regime": "HT", "source": "privileged_teacher", "divergence": "js"},
    {"regime": "HS", "source": "privileged_student", "weight": 0.0},
]


@pytest.mark.parametrize("method", ["dopd", "vanilla"])
def test_gradient_accumulation_changes_neither_routing_nor_loss_nor_update(tmp_path: Path, method: str) -> None:
    whole, batch, update = kit.one_step(tmp_path / "a", method, *CUTS[0])
    lengths = batch["completion_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1, "completions of one length cannot show a wrong normalisation"
    largest = max(float(value.abs().max()) for value in update.values())
    assert largest > 1e-3
    for number, cut in enumerate(CUTS[1:]):
        other, other_batch, other_update = kit.one_step(tmp_path / f"b{number}", method, *cut)
        if method == "dopd":
            assert kit.by_completion(other_batch, "regimes") == kit.by_completion(batch, "regimes")
        assert kit.records(other, "loss")[0] == pytest.approx(kit.records(whole, "loss")[0], rel=1e-6)
        assert kit.close(other_update, update)
        for key, value in kit.train_records(whole)[0].items():
            if key.startswith(("share/", "gap/", "loss/", "weight/", "entropy", "threshold/", "num_sequences")):
                assert kit.train_records(other)[0][key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def full_logits(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Logits that predict the completion, from one unpadded sequence: no mask, no batch, no hidden state."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : len(prompt) - 1 + len(completion)]


def rendered(row: dict[str, Any], privileged: bool) -> list[int]:
    text = row["prompt"][0]["content"] + (" " + row["privileged_context"] if privileged else "")
    return kit.TOKENIZER(text + " :")["input_ids"]


def reference(made: DOPDTrainer, rows: list[dict[str, Any]], batch: dict[str, Tensor]) -> dopd.Head:
    """`dopd.routed_loss` on logits that are made here from prompts that are written out here."""
    made.model.eval()
    models = {"teacher": made.teacher_model, "privileged_teacher": made.teacher_model, "privileged_student": made.model}
    answers = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    longest = max(map(len, answers))

    def padded(pieces: list[Tensor]) -> Tensor:
        return torch.stack([torch.nn.functional.pad(p, (0, 0, 0, longest - p.shape[0])) for p in pieces])

    student = padded([full_logits(made.model, rendered(r, False), a) for r, a in zip(rows, answers, strict=True)])
    targets = {}
    with torch.no_grad():
        for source in made.table.sources:
            prompts = [rendered(row, source != "teacher") for row in rows]
            pieces = [full_logits(models[source], p, a) for p, a in zip(prompts, answers, strict=True)]
            targets[source] = padded(pieces)
    ids = torch.tensor([answer + [0] * (longest - len(answer)) for answer in answers])
    mask = torch.tensor([[1] * len(answer) + [0] * (longest - len(answer)) for answer in answers])
    return dopd.routed_loss(student, targets, ids, mask, made.table)  # type: ignore[return-value]


@pytest.mark.parametrize("method", ["dopd", "vanilla", "privileged_teacher", "privileged_student"])
@pytest.mark.parametrize("scoring_batch", [1, 3, 8])
def test_loss_and_gradient_are_the_reference_on_full_logits_of_hand_built_views(
    tmp_path: Path, method: str, scoring_batch: int
) -> None:
    """Off by one, a prompt length common to both views, padding that is attended to: each would show here."""
    rows = kit.uneven_rows()
    model = kit.many_ends(kit.student())
    made = kit.trainer(
        tmp_path,
        method,
        model=model,
        train_dataset=Dataset.from_list(rows),
        per_device_scoring_batch_size=scoring_batch,
    )
    batch = kit.rollout(made)
    loss = kit.loss_of(made, batch)
    gradients = torch.autograd.grad(loss, list(made.model.parameters()))
    expected: Any = reference(made, rows, batch)
    expected_gradients = torch.autograd.grad(expected.loss, list(made.model.parameters()))
    assert loss.item() == pytest.approx(expected.loss.item(), rel=2e-6)
    largest = max(float(g.abs().max()) for g in expected_gradients)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        assert float((got - wanted).abs().max()) < 1e-5 * largest
    assert len(set(batch["completion_mask"].sum(1).tolist())) > 1
    if made.table.routed:
        assert torch.equal(batch["regimes"], expected.regimes)


def test_scores_do_not_depend_on_the_scoring_batch_size(tmp_path: Path) -> None:
    rows = kit.uneven_rows()
    values = []
    for size in (1, 8):
        made = kit.trainer(
            tmp_path,
            train_dataset=Dataset.from_list(rows),
            per_device_scoring_batch_size=size,
            generation_kwargs=kit.GREEDY,
        )
        batch = kit.rollout(made)
        values.append({name: batch[name] for name in batch if "/" in name and not name.startswith("hidden")})
    for name, value in values[0].items():
        torch.testing.assert_close(values[1][name], value, rtol=1e-5, atol=1e-5)


# --- Passes


class Passes:
    """Counts forward passes of backbones, by model and by whether they carry a gradient."""

    def __init__(self, **models: Any) -> None:
        self.counts: Counter[str] = Counter()
        for name, model in models.items():
            model.base_model.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.counts[name + ("+grad" if torch.is_grad_enabled() else "")] += 1

        return hook


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("vanilla", {}, {"teacher": 1, "student+grad": 1}),
        ("privileged_teacher", {}, {"teacher": 1, "student+grad": 1}),
        ("privileged_student", {}, {"student": 1, "student+grad": 1}),
        ("dopd", {}, {"teacher": 1, "student": 1, "student+grad": 1}),
        ("zero", {"rules": RULES_WITH_A_ZERO}, {"teacher": 1, "student": 1, "student+grad": 1}),
    ],
)
def test_no_pass_is_made_that_the_table_does_not_need(
    tmp_path: Path, method: str, options: dict[str, Any], expected: dict[str, int]
) -> None:
    made = kit.trainer(tmp_path, method, share_prompts=False, **options)  # one pass for each view, to count
    rows = [made.train_dataset[n] for n in range(8)]
    rollouts = made.rollouts(rows)
    passes = Passes(student=made.model, **({} if made.teacher_model is None else {"teacher": made.teacher_model}))
    made.rollouts = lambda problems: rollouts  # they run the backbone too
    batch = kit.answered(made, rows)
    kit.loss_of(made, batch).backward()
    assert dict(passes.counts) == expected
    stored = {name.removeprefix("hidden/") for name in batch if name.startswith("hidden/")}
    assert stored == made.table.target_sources


def test_a_row_of_weight_zero_is_routed_but_its_target_is_neither_kept_nor_learned(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, "zero", rules=RULES_WITH_A_ZERO)
    batch = kit.rollout(made)
    assert "hidden/privileged_student" not in batch and "logprobs/privileged_student" in batch
    regimes = torch.where(batch["completion_mask"].bool(), int(dopd.Regime.LL), -1)
    loss = kit.loss_of(made, replace(batch.batch, assignment=replace(batch.batch.assignment, regimes=regimes)))
    assert loss.item() == 0.0
    gradients = torch.autograd.grad(loss, list(made.model.parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


def test_self_distillation_neither_needs_nor_keeps_a_teacher(tmp_path: Path) -> None:
    for teacher in (None, kit.teacher()):
        made = kit.trainer(tmp_path, "privileged_student", teacher_model=teacher)
        assert made.teacher_model is None and made.unwrapped_teacher is None
        made.train()
        assert kit.records(made, "loss")[0] > 0


def test_the_teacher_gets_no_gradient_and_no_optimizer(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path)
    before = kit.parameters(made.teacher_model)
    made.train()
    assert all(parameter.grad is None for parameter in made.teacher_model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in made.teacher_model.named_parameters())
    owned = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert not owned & {id(p) for p in made.teacher_model.parameters()}


@pytest.mark.parametrize("options", [{}, {"method_options": {"divergence": "forward_kl"}}])
def test_gradient_is_zero_for_a_student_equal_to_its_target(tmp_path: Path, options: dict[str, Any]) -> None:
    made = kit.trainer(tmp_path, "vanilla", teacher_model=kit.teacher(spec=kit.STUDENT), **options)
    made.teacher_model.load_state_dict(made.model.state_dict())
    loss = kit.loss_of(made, kit.rollout(made))
    gradients = torch.autograd.grad(loss, list(made.model.parameters()))
    assert abs(loss.item()) < 1e-6
    assert max(float(gradient.abs().max()) for gradient in gradients) < 1e-6


# --- Modes


def modes(model: torch.nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_scoring_leaves_every_submodule_in_the_mode_it_was_in(tmp_path: Path) -> None:
    """`.eval()` or `.train()` on weights that two views share would switch the other view over."""
    made = kit.trainer(tmp_path)
    made.model.train()
    made.model.model.layers[1].mlp.eval()  # a module that a user froze
    before = modes(made.model)
    rows = [made.train_dataset[n] for n in range(4)]
    kit.answered(made, rows)
    assert modes(made.model) == before
    assert not any(modes(made.teacher_model).values())


def test_dropout_of_the_student_does_not_reach_the_privileged_scores(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, disable_dropout=False, generation_kwargs=kit.GREEDY)
    made.model.model.layers[0].mlp.down_proj = torch.nn.Sequential(
        made.model.model.layers[0].mlp.down_proj, torch.nn.Dropout(0.5)
    )
    batch = kit.rollout(made)
    rows = [made.train_dataset[n] for n in range(8)]
    views = {"privileged": kit.privileged_view(made, rows)}
    again = kit.scored_again(made, views, batch)
    assert torch.equal(again["logprobs/privileged_student"], batch["logprobs/privileged_student"])
    assert kit.loss_of(made, batch).item() != kit.loss_of(made, batch).item(), "dropout is on in the trained view"


def test_temperature_is_applied_to_rollouts_and_to_both_sides_of_the_loss(tmp_path: Path) -> None:
    rows = kit.uneven_rows()
    made = kit.trainer(tmp_path, "vanilla", train_dataset=Dataset.from_list(rows), temperature=1.7)
    assert made.engine.config.temperature == 1.7
    batch = kit.rollout(made)
    student, teacher = [], []
    for row, ids, mask in zip(rows, batch["completion_ids"], batch["completion_mask"], strict=True):
        answer = ids[mask.bool()].tolist()
        for model, out in ((made.model, student), (made.teacher_model, teacher)):
            with torch.no_grad():
                logits = full_logits(model, rendered(row, False), answer)
            out.append(logits.double().div(1.7).log_softmax(-1))
    expected = sum(float((s.exp() * (s - t)).sum(-1).mean()) for s, t in zip(student, teacher, strict=True)) / len(rows)
    assert kit.loss_of(made, batch).item() == pytest.approx(expected, rel=1e-5)


def test_chunked_loss_and_reference_backend_agree_inside_the_trainer(tmp_path: Path) -> None:
    losses = []
    for backend in ("reference", "chunked"):
        made = kit.trainer(
            tmp_path, loss_backend=backend, loss_chunk_tokens=None if backend == "reference" else 3,
            generation_kwargs=kit.GREEDY, model=kit.student(spec=TinySpec(num_layers=1, hidden_size=32)),
        )  # fmt: skip
        losses.append(kit.loss_of(made, kit.rollout(made)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rollouts_come_from_the_distribution_that_is_scored(tmp_path: Path) -> None:
    """Cached generation and the training forward must agree by far more than the signal that they are compared for."""
    made = kit.trainer(tmp_path, generation_kwargs=kit.GREEDY)
    batch = kit.answered(made, [made.train_dataset[n] for n in range(8)])
    view = View(batch["prompt_ids"], batch["prompt_mask"])
    ids, mask = batch["completion_ids"], batch["completion_mask"].bool()
    with torch.no_grad():
        hidden = made.models.hidden_states(made.model, view, ids, mask)
        best = Head.of_model(made.model).logits(hidden).argmax(-1)
    assert torch.equal(best[mask], ids[mask])


def test_heads_are_collected_once_for_all_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And let go of behind the last one: a collected head is as large as the vocabulary."""
    collected: list[str] = []
    whole_head = LocalScorer.whole_head

    def counted(self: LocalScorer, source: str) -> Any:
        collected.append(source)
        return whole_head(self, source)

    monkeypatch.setattr(LocalScorer, "whole_head", counted)
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    made = kit.trainer(tmp_path, "dopd", **options)
    made.train()
    assert sorted(collected) == sorted([*made.table.target_sources] * 2)
    assert not made.step.scorer._heads
