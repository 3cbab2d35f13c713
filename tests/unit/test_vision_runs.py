"""Every vision-language family in a run: rollouts, losses, updates, resume. The models are untrained."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit
import vision_kit as kit
from compatibility import tried
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor

from dopd.data.encode import as_blocks
from dopd.data.views import plain_prompt, privileged_prompt, with_blank_images
from dopd.errors import ModelError
from dopd.loss import routed_loss
from dopd.sampling import Ending
from dopd.scoring import backbone_of, generation_inputs
from dopd.trainer.setup import answering
from dopd.vision import load_processor
from dopd.vision.tokens import placeholder_ids

# Those whose layouts of images differ stand for all where a whole run is made, and two where runs are compared.
FAMILIES = kit.LAYOUTS
PACKINGS = ["qwen3_vl", "idefics3"]


def logits_of_one_sequence(name: str, model: Any, processor: Any, prompt: Any, completion: Tensor) -> Tensor:
    """(T, V): what a model says to one completion behind one prompt, straight from its processor and its forward."""
    fields = dict(
        processor.apply_chat_template(
            [as_blocks(prompt)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )
    for unread in ("attention_mask", "labels"):
        fields.pop(unread, None)
    behind = torch.full((1, len(completion)), kit.family(name).suffix_type)
    for types in [field for field in fields if field.endswith("token_type_ids")]:
        fields[types] = torch.cat([fields[types], behind], dim=1)
    fields["input_ids"] = torch.cat([fields["input_ids"], completion.unsqueeze(0)], dim=1)
    logits = model(**fields, use_cache=False).logits[0, -len(completion) - 1 : -1]
    forbidden = torch.zeros(logits.shape[-1])
    forbidden[placeholder_ids(model.config)] = -torch.inf
    return logits + forbidden


@pytest.mark.parametrize("name", list(kit.FAMILIES))
def test_loss_and_gradient_are_the_reference_on_logits_of_single_sequences(name: str, tmp_path: Path) -> None:
    made = kit.trainer(name, tmp_path, per_device_train_batch_size=6)
    made.model.train()
    kept = kit.rows(3)
    if not kit.family(name).needs_image:
        kept[2]["images"] = []
    rows = [kept[n // 2] for n in range(6)]
    batch = trainer_kit.answered(made, rows)
    loss = trainer_kit.loss_of(made, batch)
    loss.backward()
    gradients = {key: value.grad.clone() for key, value in made.model.named_parameters() if value.grad is not None}
    made.model.zero_grad()
    ids, mask = batch["completion_ids"], batch["completion_mask"]
    made.model.eval()

    def logits(model: Any, privileged: bool) -> Tensor:
        sequences = []
        for row, completion, kept_tokens in zip(rows, ids, mask, strict=True):
            prompt = privileged_prompt(row, made.prompts.template) if privileged else plain_prompt(row)
            sequences.append(
                logits_of_one_sequence(name, model, made.processing_class, prompt, completion[kept_tokens.bool()])
            )
        return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)

    with torch.no_grad():
        targets = {
            "privileged_teacher": logits(made.unwrapped_teacher, True),
            "privileged_student": logits(made.model, True),
        }
    reference = routed_loss(logits(made.model, False), targets, ids, mask, made.table)
    assert loss.item() == pytest.approx(reference.loss.item(), abs=1e-5)
    reference.loss.backward()
    for key, gradient in gradients.items():
        torch.testing.assert_close(
            gradient,
            dict(made.model.named_parameters())[key].grad,
            atol=1e-4,
            rtol=1e-3,
            msg=lambda text, k=key: f"{k}: {text}",
        )
    tried("image family", name, "exact: losses and gradients of every view")


@contextmanager
def counted_images(model: Any) -> Iterator[list[int]]:
    """How many images (of one a prompt) each call of a model's vision tower encodes."""
    backbone = backbone_of(model)
    original, calls = backbone.get_image_features, []

    def counting(*args: Any, **fields: Any) -> Any:
        sizes = fields.get("image_grid_thw", fields["pixel_values"])
        calls.append(len(sizes))
        return original(*args, **fields)

    counting.__wrapped__ = original  # type: ignore[attr-defined]
    backbone.get_image_features = counting
    try:
        yield calls
    finally:
        del backbone.get_image_features


@contextmanager
def counted_tokens(model: Any) -> Iterator[list[int]]:
    """How many image tokens stand in the first row of each batch of prompts that a backbone reads."""
    backbone, seen = backbone_of(model), []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs.get("mm_encoder_outputs"):
            seen.append(int((kwargs["input_ids"][0] == module.config.image_token_id).sum()))

    handle = backbone.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", ["dopd", "vanilla"])
def test_two_steps_of_training(name: str, method: str, tmp_path: Path) -> None:
    made = kit.trainer(name, tmp_path, method)
    before = {key: value.clone() for key, value in made.model.state_dict().items()}
    made.train()
    losses = [record["loss"] for record in made.state.log_history if "loss" in record]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    moved = [key for key, value in made.model.state_dict().items() if not torch.equal(value, before[key])]
    assert any("vis" in key for key in moved) and any("lm_head" in key or "embed" in key for key in moved)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_gets_a_gradient_through_the_loss(name: str, tmp_path: Path) -> None:
    made = kit.trainer(name, tmp_path)
    made.model.train()
    (batch,) = made.next_micro_batch([made.train_dataset[n // 2] for n in range(4)])
    trainer_kit.loss_of(made, batch).backward()
    lacking = [
        key
        for key, value in made.model.named_parameters()
        if (value.grad is None or not bool(value.grad.abs().max() > 0))
        and not any(part in key for part in kit.family(name).unused)
    ]
    # The keys' bias of an attention adds the same to every score of a query: its gradient is 0 to rounding.
    assert [key for key in lacking if "k_proj.bias" not in key] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_encoded_once_for_all_rollouts_and_once_for_both_views_of_the_student(
    name: str, tmp_path: Path
) -> None:
    made = kit.trainer(name, tmp_path)
    assert made.models.sharing and made.models.encoding_once
    made.model.train()
    rows = [made.train_dataset[n // 2] for n in range(4)]  # two prompts, two rollouts each
    with counted_images(made.model) as student, counted_images(made.teacher_model) as teacher:
        (batch,) = made.next_micro_batch(rows)
        # Rollouts and the privileged student read the same images with the same weights.
        assert (student, teacher) == ([2], [2])
        trainer_kit.loss_of(made, batch)
    assert student == [2, 2]  # the pass with gradient


@pytest.mark.parametrize("name", FAMILIES)
def test_placeholders_are_sampled_neither_in_rollouts_nor_in_evaluation(name: str, tmp_path: Path) -> None:
    processor = kit.processor(name)
    model = kit.model(name, processor)
    forbidden = placeholder_ids(model.config)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    bias = torch.zeros(head.weight.shape[0])
    bias[forbidden] = 50.0  # left to itself, the model says nothing else
    head.bias = torch.nn.Parameter(bias)
    made = kit.trainer(
        name,
        tmp_path,
        "vanilla",
        model=model,
        processing_class=processor,
        eval_dataset=Dataset.from_list(kit.rows()),
        verifier=lambda completion, row: 0.0,
        student_eval_steps=1,
    )
    evaluator = next(c for c in made.callback_handler.callbacks if hasattr(c, "_evaluator"))._evaluator
    with torch.no_grad():
        free = model.generate(
            **generation_inputs(model, evaluator.prompts.view([kit.user("?")], "cpu")), max_new_tokens=3
        )
    assert bool(torch.isin(free[:, -1], torch.tensor(forbidden)).all())
    prompts = [plain_prompt(row) for row in kit.rows()]
    answers = evaluator.answers(model, prompts, sampled=False) + evaluator.answers(model, prompts, sampled=True)
    batch = trainer_kit.answered(made, [made.train_dataset[n] for n in range(4)])
    said = {token for answer in answers for token in answer} | set(batch["completion_ids"].flatten().tolist())
    assert said and not said & set(forbidden)


def test_a_library_that_loses_positions_while_it_samples_is_refused(tmp_path: Path) -> None:
    processor = kit.processor("qwen3_vl")
    model = kit.model("qwen3_vl", processor)
    whole = model.generate

    def forgetful(**inputs: Any) -> Any:
        inputs.pop("mm_token_type_ids")  # without them positions are those of a line of text, and nothing is raised
        return whole(**inputs)

    model.generate = forgetful
    with pytest.raises(ModelError, match=r"draws tokens from another distribution.* and images, of which generate"):
        kit.trainer("qwen3_vl", tmp_path, model=model, processing_class=processor)


def test_a_model_that_takes_no_features_draws_from_the_pixels_that_it_is_scored_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = kit.processor("llava")
    student, teacher = (kit.model("llava", processor, seed=seed) for seed in (0, 1))
    # Of two models of one class one is enough to leave the features out.
    monkeypatch.setattr("dopd.trainer.images.encodes_images_once", lambda model, *_, **__: model is teacher)
    generate, read = student.generate, list[set[str]]()

    def watched(**inputs: Any) -> Any:
        read.append(inputs.keys() & {"pixel_values", "mm_encoder_outputs"})
        return generate(**inputs)

    student.generate = watched
    made = kit.trainer("llava", tmp_path, model=student, teacher_model=teacher, processing_class=processor)
    assert not made.models.encoding_once
    trainer_kit.answered(made, [made.train_dataset[n] for n in range(4)])
    assert [names for names in read if names] == [{"pixel_values"}] * 4  # three prompts of the trial, and the batch


@pytest.mark.parametrize("name", PACKINGS)
def test_gradient_accumulation_changes_neither_loss_nor_update(name: str, tmp_path: Path) -> None:
    outcomes = []
    # From long to short, so that groups change places; one row without an image.
    rows = [kit.rows(3)[2], kit.rows(2)[1], {**kit.rows(4)[3], "images": []}, kit.rows(1)[0]]
    for size, accumulation in ((8, 1), (4, 2), (2, 4)):
        torch.manual_seed(0)
        made = kit.trainer(
            name,
            tmp_path / str(size),
            train_dataset=Dataset.from_list(rows),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            generation_kwargs={"do_sample": False},
            off_policy_rollouts=True,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
        )
        made.train()
        loss = next(record["loss"] for record in made.state.log_history if "loss" in record)
        outcomes.append((loss, {key: value.clone() for key, value in made.model.state_dict().items()}))
    for loss, weights in outcomes[1:]:
        assert loss == pytest.approx(outcomes[0][0], abs=1e-5)
        for key, value in weights.items():
            torch.testing.assert_close(value, outcomes[0][1][key], atol=1e-6, rtol=1e-4)


def test_images_keep_to_their_rows_where_a_batch_is_put_in_order_and_cut(tmp_path: Path) -> None:
    made = kit.trainer("qwen3_vl", tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    made.model.train()
    rows = [{**row, "prompt": kit.user("red " * (4 - n) + "?")} for n, row in enumerate(kit.rows())]
    for row in rows:
        row["prompt"][0]["content"].insert(0, {"type": "image"})
    expected = {
        tuple(made.prompts.encode([plain_prompt(row)])[0]): trainer_kit.view_of(made, [plain_prompt(row)]).images[0]
        for row in rows
    }
    inputs = [rows[n // 2] for n in range(8)]  # from long to short: every group changes its place
    lengths = []
    for step in range(4):
        made._step = step
        view = made.next_micro_batch(inputs)[0].view
        for ids, mask, images in zip(view.prompt_ids, view.prompt_mask, view.images, strict=True):
            prompt = tuple(ids[mask.bool()].tolist())
            lengths.append(len(prompt))
            assert images.key == expected[prompt].key
    assert lengths == sorted(lengths) and len(set(lengths)) == 4


@pytest.mark.parametrize("name", PACKINGS)
def test_neither_sharing_nor_checkpointing_nor_the_backend_changes_the_losses(name: str, tmp_path: Path) -> None:
    def losses(label: str, **options: Any) -> list[float]:
        made = kit.trainer(name, tmp_path / label, **options)
        made.train()
        return [record["loss"] for record in made.state.log_history if "loss" in record]

    base = losses("base")
    assert losses("alone", share_prompts=False) == pytest.approx(base, abs=1e-5)
    assert losses("checkpointed", gradient_checkpointing=True) == pytest.approx(base, abs=1e-5)
    assert losses("reference", loss_backend="reference") == pytest.approx(base, abs=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"bf16": True}, {"privileged_student": "ema"}, {"privileged_student": "frozen"}, {"lora": True}, {"stream": True}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("name", PACKINGS)
def test_half_precision_anchors_adapters_and_streams(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    options = dict(options)
    if options.pop("lora", False):
        options["peft_config"] = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    if options.pop("stream", False):
        options["train_dataset"] = Dataset.from_list(kit.rows(8)).to_iterable_dataset()
    made = kit.trainer(name, tmp_path, **options)
    made.train()
    losses = [record["loss"] for record in made.state.log_history if "loss" in record]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


def test_the_blank_control_is_reported_beside_the_accuracy_of_prompts_with_images(tmp_path: Path) -> None:
    rows = [*kit.rows(3), {**kit.rows(4)[3], "images": []}]
    made = kit.trainer("qwen3_vl", tmp_path, "vanilla")
    evaluator = answering(made, rows, lambda completion, row: 1.0)
    every = Ending(list(range(len(made.tokenizer))))  # the first token ends an answer
    evaluator = replace(evaluator, ending=every)
    result = evaluator.evaluate(made.model)
    assert (len(result.greedy), len(result.blank)) == (4, 3)
    assert result.metrics()["accuracy_blank"] == 1.0 and "accuracy_blank" in result.to_json()["intervals"]
    assert replace(evaluator, measures=("greedy",)).evaluate(made.model).blank == []
    grey = evaluator.prompts.view([with_blank_images(plain_prompt(row)) for row in rows[:3]], "cpu")
    pixels = grey.images[0].fields["pixel_values"]
    assert float(pixels.std()) == 0.0


@pytest.mark.parametrize("name", PACKINGS)
def test_a_resumed_run_is_the_unbroken_run(name: str, tmp_path: Path) -> None:
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    unbroken = kit.trainer(name, tmp_path, **saving)
    unbroken.train()
    resumed = kit.trainer(name, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for key, value in unbroken.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key
    # A checkpoint holds the processor too.
    assert type(load_processor(str(tmp_path / "checkpoint-4"))) is type(unbroken.processing_class)


@pytest.mark.parametrize("name", FAMILIES)
def test_privileged_images_are_seen_by_the_privileged_views_alone(name: str, tmp_path: Path) -> None:
    rows = [{**row, "privileged_images": [kit.picture(40 + n)]} for n, row in enumerate(kit.rows())]
    made = kit.trainer(name, tmp_path, train_dataset=Dataset.from_list(rows))
    given = [made.train_dataset[n] for n in range(2)]
    plain, privileged = (
        trainer_kit.view_of(made, [plain_prompt(row) for row in given]),
        trainer_kit.privileged_view(made, given),
    )
    image = made.model.config.image_token_id
    per_image = int((plain.prompt_ids[0] == image).sum())
    assert int((privileged.prompt_ids[0] == image).sum()) == 2 * per_image > 0
    without = trainer_kit.privileged_view(made, [{**row, "privileged_images": None} for row in given])
    ids = torch.full((2, 3), made.processing_class.tokenizer.convert_tokens_to_ids("red"))
    with torch.no_grad():
        states = [
            made.models.hidden_states(made.model, view, ids, torch.ones_like(ids)) for view in (privileged, without)
        ]
    assert (states[0] - states[1]).abs().max() > 1e-2
    made.train()
    assert made.state.global_step == 2


def test_a_teacher_that_encodes_images_otherwise_reads_them_through_its_own_processor(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    finer = kit.processor("qwen3_vl")
    finer.image_processor.size = {"shortest_edge": 48 * 48, "longest_edge": 64 * 64}
    finer.save_pretrained(folder)
    kit.model("qwen3_vl", finer, hidden=36, seed=1).save_pretrained(folder)
    made = kit.trainer("qwen3_vl", tmp_path / "run", teacher_model=str(folder))
    view = trainer_kit.view_of(made, [plain_prompt(made.train_dataset[0])])
    image = made.model.config.image_token_id
    tokens = [int((one.prompt_ids == image).sum()) for one in (view, view.for_teacher)]
    assert tokens[0] == 4 < tokens[1]
    with counted_images(made.unwrapped_teacher) as calls:
        made.train()
    assert calls and made.state.global_step == 2
    # Its plain view is its own too.
    vanilla = kit.trainer("qwen3_vl", tmp_path / "vanilla", "vanilla", teacher_model=str(folder))
    with counted_tokens(vanilla.unwrapped_teacher) as tokens_read:
        vanilla.train()
    assert set(tokens_read) == {tokens[1]}
    same = kit.trainer("qwen3_vl", tmp_path / "same", teacher_processing_class=kit.processor("qwen3_vl"))
    assert same.prompts.teacher_processing_class is None
