"""Checks of models, adapters and tasks just at what they are to notice, on both sides of it."""

import errno
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import text_kit
import torch
import trainer_kit as kit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dopd.adapters import check_change, has_adapters, tuned_layers
from dopd.checkpoints import _warn_of_other_base
from dopd.data.encode import encode_prompts
from dopd.errors import ConfigError, DataError, FileError, ModelError
from dopd.generation import prompts_together
from dopd.lengths import forget_longer_passes
from dopd.runs.build import load_model
from dopd.runs.checks import check_answering
from dopd.runs.settings import RunSettings
from dopd.runs.train import _student_options
from dopd.sampling import declared_ends
from dopd.scoring import left_padded, without_router_logits
from dopd.tasks import get_source, get_task
from dopd.tasks.base import TaskValidationError
from dopd.tasks.dag import DagTask
from dopd.tasks.program import _run
from dopd.tasks.registry import register_task
from dopd.tiny import TinySpec, build_model, build_tokenizer
from dopd.trainer import setup
from dopd.trainer.adapting import on_revision, peft_errors
from dopd.trainer.anchor import AverageAnchor
from dopd.trainer.callbacks import IdleSteps, MetricsFile
from dopd.trainer.guards import same_weights
from dopd.trainer.passes import check_self_divergence
from dopd.trainer.saving import SavingTrainer
from dopd.weights import read_weights


def _part_of_a_split(model: nn.Linear, part: torch.Tensor) -> nn.Linear:
    """As ZeRO-3 leaves a model: every weight empty, its shape and this process's part beside it."""
    shape = model.weight.shape
    model.weight = nn.Parameter(torch.empty(0))
    model.weight.ds_tensor, model.weight.ds_shape = part, shape  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(("changed", "expected"), [(None, True), (0, False), (3, False), (5, True)])
def test_weights_of_which_a_process_has_a_part_are_compared_by_that_part(changed: int | None, expected: bool) -> None:
    """Of 6 numbers the first process has 4; the others are for the next process to see."""
    plain = nn.Linear(3, 2, bias=False)
    whole = plain.weight.detach().flatten().clone()
    split = _part_of_a_split(nn.Linear(3, 2, bias=False), whole[:4].clone())
    if changed is not None:
        plain.weight.data.view(-1)[changed] += 1.0
    assert same_weights(split, plain) is expected and same_weights(plain, split) is expected
    other = _part_of_a_split(nn.Linear(3, 2, bias=False), plain.weight.detach().flatten()[:4].clone())
    assert same_weights(split, other) is expected
    assert not same_weights(split, _part_of_a_split(nn.Linear(2, 3, bias=False), whole[:4].clone()))


def test_a_long_pass_leaves_nothing_behind_in_dynamic_rotations() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    config = LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, rope_parameters=rope,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for weight in model.parameters():
        weight.data = torch.randn_like(weight)
    short, long = torch.arange(8)[None], torch.arange(20)[None]
    with torch.no_grad():
        before = model(input_ids=short).logits
        model(input_ids=long)
        model.model.rotary_emb.max_seq_len_cached = 10**6  # so that transformers does not go back by itself
        assert not torch.equal(model(input_ids=short).logits, before)
        forget_longer_passes(model, config)
        assert torch.equal(model(input_ids=short).logits, before)


@pytest.mark.parametrize("alpha", [1, 10**6])
def test_an_adapter_is_tried_against_its_merged_weights_at_every_size(
    alpha: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, lora_alpha=alpha, target_modules=["0"]))
    (layer,) = tuned_layers(model).values()
    check_change(layer)
    merged = type(layer).get_delta_weight
    monkeypatch.setattr(type(layer), "get_delta_weight", lambda *given: 1.05 * merged(*given))
    with pytest.raises(ModelError, match="its merged weights do not give what the layer gives"):
        check_change(layer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_unknown_step_after_the_head_is_seen_in_every_precision(dtype: torch.dtype) -> None:
    model = kit.student().to(dtype)
    check_self_divergence("model", model)
    model.register_forward_hook(lambda module, args, output: output.__setitem__("logits", output["logits"] * 1.1))
    with pytest.raises(ModelError, match="differ by KL"):
        check_self_divergence("model", model)


@pytest.mark.parametrize("declared", ["</s>", [1, "</s>"], True, [1, True], 1.0])
def test_an_end_of_answers_is_the_id_of_a_token(declared: Any) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=declared))
    with pytest.raises(ModelError, match="must be the id of a token, or a list of ids"):
        declared_ends(model)


def test_a_teacher_of_another_vocabulary_answers_no_questions() -> None:
    rows = kit.task_rows(1)
    evaluator = kit.evaluator(rows, lambda *_: 1.0, 4)
    small = build_model(TinySpec(num_layers=1, hidden_size=16, num_heads=2), build_tokenizer(), 0)
    small.resize_token_embeddings(5)
    with pytest.raises(ModelError, match="vocabulary"):
        check_answering(evaluator, rows, kit.student(), small)


def test_routers_are_asked_for_no_logits_where_a_model_has_them() -> None:
    assert without_router_logits(text_kit.build("mixtral")) == {"output_router_logits": False}
    model = kit.student()
    assert without_router_logits(model) == {}
    model.config.output_router_logits = True  # a checkpoint may hold it, and its model know nothing of it
    assert without_router_logits(model) == {}


def test_the_rows_of_a_view_are_those_that_have_its_context(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path)
    rows = [
        row | {"privileged_context": text} for row, text in zip(kit.task_rows(4), ["a", None, "1", " "], strict=True)
    ]
    rollouts: Any = SimpleNamespace(
        rows=rows, view=SimpleNamespace(teachers=()), completion_ids=torch.zeros(4, 1).long(), scores=None
    )
    present = made.step.views(rollouts)[1]
    assert {name: has.tolist() for name, has in present.items()} == {"privileged": [True, False, True, False]}


def test_a_scheduler_that_waits_for_a_metric_takes_none_of_the_students_evaluation(tmp_path: Path) -> None:
    waits = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}
    kit.config(tmp_path, **waits)
    kit.config(tmp_path, metric_for_best_model="loss", **waits)
    with pytest.raises(ConfigError, match=r"\(='accuracy_greedy'\) is of the student's evaluation"):
        kit.config(tmp_path, metric_for_best_model="accuracy_greedy", **waits)


def test_an_average_that_is_read_again_is_shown_at_once(tmp_path: Path) -> None:
    """In half precision the average is held beside the weights that are shown."""
    student = kit.student().bfloat16()
    anchor, start = AverageAnchor(student, decay=0.5), float(next(student.parameters()).detach().view(-1)[0])
    next(student.parameters()).data.view(-1)[0] = 7.0
    anchor.after_step(student)
    anchor.save(tmp_path)
    fresh = kit.student().bfloat16()
    again = AverageAnchor(fresh, decay=0.5)
    again.load(tmp_path)
    with anchor.scoring_model(student) as model:
        before = float(next(model.parameters()).detach().view(-1)[0])
    with again.scoring_model(fresh) as model:
        after = float(next(model.parameters()).detach().view(-1)[0])
    assert before == after == pytest.approx((start + 7.0) / 2, rel=2**-8)


def test_prompts_and_their_answers_are_together_up_to_the_switch_of_rotations() -> None:
    view = left_padded([[5] * 10, [6] * (text_kit.SWITCH - 4)], 0, torch.device("cpu"))
    model = text_kit.build("llama dynamic")
    assert prompts_together(model, view, 4) == [[0, 1]]
    assert sorted(prompts_together(model, view, 5)) == [[0], [1]]


def test_an_adapter_is_opened_beside_its_base_and_merged_on_request(tmp_path: Path) -> None:
    kit.student().save_pretrained(tmp_path / "base")
    get_peft_model(load_model(str(tmp_path / "base")), kit.lora()).save_pretrained(tmp_path / "adapter")
    assert has_adapters(load_model(str(tmp_path / "adapter")))
    assert not has_adapters(load_model(str(tmp_path / "adapter"), merged=True))


# --- Adapters and tokenizers of a revision or a folder


def test_an_adapter_says_which_revision_of_its_base_is_meant(tmp_path: Path) -> None:
    kit.student().save_pretrained(tmp_path)
    given = kit.lora()
    meant = on_revision(given, str(tmp_path), {"revision": "v2"})
    assert meant.revision == "v2" and given.revision is None
    for model, options in ((str(tmp_path), {}), (kit.student(), {"revision": "v2"})):
        assert on_revision(given, model, options) is given


def test_what_peft_refuses_is_an_error_of_its_configuration_and_nothing_else_is() -> None:
    given = LoraConfig(target_modules=["no_such_module"])
    with pytest.raises(ConfigError, match="no_such_module"), peft_errors(kit.student(), given):
        get_peft_model(kit.student(), given)
    with pytest.raises(KeyError), peft_errors(kit.student(), given):
        raise KeyError("of another library")


def test_a_run_writes_that_revision_into_its_adapter(tmp_path: Path) -> None:
    kit.student().save_pretrained(tmp_path / "base")
    made = kit.trainer(
        tmp_path / "run",
        "vanilla",
        model=str(tmp_path / "base"),
        peft_config=kit.lora(),
        model_init_kwargs={"revision": "v2", "dtype": "float32"},
    )
    assert made.unwrapped_student.peft_config["default"].revision == "v2"


def test_prompts_are_drawn_in_another_order_than_they_stand_in(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, "vanilla")
    drawn = list(dict.fromkeys(made._get_train_sampler()))
    assert sorted(drawn) == list(range(len(made.train_dataset))) and drawn != sorted(drawn)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["default", "other"])
def test_weights_of_an_adapter_are_those_of_its_own_folder(name: str, inside: bool, tmp_path: Path) -> None:
    """PEFT writes the adapter "default" into the folder itself and every other into a folder of its name."""
    model = get_peft_model(kit.student(), kit.lora(), adapter_name=name)
    for value, folder in enumerate((tmp_path / name, tmp_path) if inside else (tmp_path,)):
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.fill_(value + 1.0)
        model.save_pretrained(tmp_path / "saved")
        source = tmp_path / "saved" / ("" if name == "default" else name)
        shutil.copytree(source, folder, dirs_exist_ok=True)
    read_weights(str(tmp_path), model)
    expected = 1.0 if not inside or name != "default" else 2.0
    assert {weight.unique().item() for weight in model.parameters() if weight.requires_grad} == {expected}


def test_a_checkpoint_that_cannot_be_written_says_where_else(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(run_folder=tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "checkpoint-1"))
    said = SavingTrainer._not_written(trainer, full)
    assert isinstance(said, FileError) and "another output_dir" in str(said) and str(tmp_path) in str(said)
    other = KeyError("weights")
    assert SavingTrainer._not_written(trainer, other) is other


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_a_student_is_loaded_with_its_quantisation_and_its_other_options(bits: str, tmp_path: Path) -> None:
    settings = RunSettings(model_name_or_path="tiny:dag/student", task="dag", use_peft=True, **{bits: True})
    config = kit.config(tmp_path, model_init_kwargs={"attn_implementation": "eager"})
    options = _student_options(settings, config)
    assert options["attn_implementation"] == "eager" and getattr(options["quantization_config"], bits) is True


def test_the_tokenizer_of_a_teacher_is_read_from_where_its_model_is(tmp_path: Path) -> None:
    kit.TOKENIZER.save_pretrained(tmp_path / "inner")
    args = kit.config(tmp_path / "run", teacher_model_init_kwargs={"subfolder": "inner"})
    assert setup._tokenizer("teacher", str(tmp_path), args).get_vocab() == kit.TOKENIZER.get_vocab()


def test_an_adapter_on_another_folder_than_its_runs_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    pairs = {(one, other): True, (one, one): False, (one, ""): False}
    of_the_hub = {("someone/base", one): False, (one, "someone/base"): False}
    for (base, trained), told in {**pairs, **of_the_hub}.items():
        caplog.clear()
        _warn_of_other_base("adapter", base, {"model_name_or_path": trained})
        assert bool(caplog.records) is told


# --- What is logged


def test_nothing_learned_is_told_at_the_first_step_with_a_gradient_of_zero(caplog: pytest.LogCaptureFixture) -> None:
    callback = IdleSteps(is_judged=True)
    with caplog.at_level(logging.WARNING):
        for step, logs in enumerate(({"grad_norm": 0.5}, {"grad_norm": 1.0}, {"loss": 0.0}, {"grad_norm": 0.0})):
            state = SimpleNamespace(is_world_process_zero=True, global_step=step)
            callback.on_log(None, state, None, dict(logs))
    assert [record.getMessage()[:29] for record in caplog.records] == ["step 3: the gradient is 0, not"[:29]]


def test_the_main_process_alone_drops_records_behind_the_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for is_main, expected in ((False, 2), (True, 1)):
        path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n')
        state = SimpleNamespace(is_world_process_zero=is_main, global_step=1)
        MetricsFile(tmp_path).on_train_begin(None, state, None)
        assert len(path.read_text().splitlines()) == expected


# --- Tasks


def _wrong_alike(words: Sequence[str], gold: Sequence[str]) -> dict[str, bool]:
    """Whether an answer is wrong in one way, by the name that a task's proof has for it."""
    changed = [place for place, (one, other) in enumerate(zip(words, gold, strict=False)) if one != other]
    as_long = len(words) == len(gold)
    return {
        "last word cut": list(words) == list(gold[:-1]),
        "second half only": list(words) == list(gold[len(gold) // 2 + 1 :]),
        "trailing word": list(words) == [*gold, *gold[:1]],
        "unknown last word": as_long and changed == [len(gold) - 1] and words[-1] == "<unk>",
        # A step of `dag`: variable, two arguments, two values, and the result as the sixth word.
        "first step has a wrong result": as_long and changed == [5],
        # A step of `graph`: from where to where.
        "stopped one step early": list(words) == list(gold[:-2]),
        "first step missing": list(words) == list(gold[2:]),
        "last step twice": list(words) == [*gold, *gold[-2:]],
    }


@pytest.mark.parametrize("name", _wrong_alike(["<unk>"], ["<unk>"]))
def test_a_verifier_that_lets_one_kind_of_wrong_answer_through_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_of_dag = name not in ("stopped one step early", "first step missing", "last step twice")
    task = DagTask(num_needed=3, num_variables=4) if is_of_dag else get_task("graph", path_length=4)
    strict = type(task)._solves

    def lenient(task: Any, words: Sequence[str], row: Mapping[str, Any]) -> bool:
        return strict(task, words, row) or _wrong_alike(words, row["solution"].split())[name]

    monkeypatch.setattr(type(task), "_solves", lenient)
    with pytest.raises(TaskValidationError, match=f"near miss '{name}' does not score 0.0"):
        task.validate(2)


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("final_answer", "nothing", "final_answer does not contain the answer"),
        ("hints_without_execution", "{answer}", "hints_without_execution reveals"),
        ("summarised_hint", "{hint} longer", "summarised_hint is longer than hints_without_execution"),
    ],
)
def test_privileged_text_that_breaks_its_promise_is_found(kind: str, text: str, words: str) -> None:
    task = DagTask()
    example = task.example("test", 0)
    hints = {name: hint.split() for name, hint in example.privileged.items()}
    task._check_privileged(example, hints)
    hint = example.privileged["hints_without_execution"]
    with pytest.raises(TaskValidationError, match=words):
        task._check_privileged(example, hints | {kind: text.format(answer=example.answer, hint=hint).split()})


def test_programs_do_what_their_names_say() -> None:
    items = list("abcde")
    meant = {
        "rev": items[::-1],
        "rotl": [*items[1:], items[0]],
        "rotr": [items[-1], *items[:-1]],
        "swap": [items[1], items[0], *items[2:]],
        "tail": [*items[:3], items[4], items[3]],
    }
    assert {name: _run([name], items) for name in meant} == meant


class _Source:
    """A task of a user's that is none of ours, and whose making fails."""

    privileged_kinds = ("none",)
    default_kind = "none"
    name: Any = "raises_at_once"

    def __init__(self) -> None:
        raise ZeroDivisionError("by hand")

    def rows(self, split: str, count: int, privileged_kind: str | None = None) -> list[dict[str, Any]]:
        return []

    def verify(self, completion: str, row: Mapping[str, Any]) -> float:
        return 0.0


def test_a_task_of_a_users_needs_a_name_and_says_what_its_code_raises(registries: None) -> None:
    with pytest.raises(ConfigError, match="has no name: write name = 'my_task'"):
        register_task(type("Unnamed", (_Source,), {"name": None}))
    register_task(_Source)
    with pytest.raises(ConfigError, match=r"task \(='raises_at_once'\).* raises ZeroDivisionError: by hand"):
        get_source("raises_at_once")


def test_two_beginnings_of_a_prompt_are_refused() -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    ((first, *_),) = encode_prompts(tokenizer, ["<bos> A"], {})
    assert first == tokenizer.bos_token_id
    with pytest.raises(DataError, match="begins with two '<bos>' tokens"):
        encode_prompts(tokenizer, ["<bos> <bos> A"], {})
