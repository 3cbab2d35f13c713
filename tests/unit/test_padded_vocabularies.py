"""Models of one tokenizer whose matrices are padded to different sizes are the models cut to the ids that both have."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from compatibility import tried
from datasets import Dataset

from dopd.errors import ModelError, ScoringError
from dopd.runs.inspection import inspect_prompt
from dopd.vocabulary import unscored_ids

SHARED = len(kit.TOKENIZER)
PADDED = SHARED + 17
# Times, and what drawn answers show: a draw takes one random number for each row of the head, padded ones as well.
LEFT_OUT = (
    "second",
    "time",
    "sampled",
    "eval_length",
    "eval_eos",
    "eval_entropy",
    "eval_divergence",
    "eval_privileged_kl",
)
METHODS = ["dopd", "vanilla", "gkd", "privileged_teacher"]


def padded(model: Any) -> Any:
    """The same model with more rows than tokens, each of which it finds much likelier than any token."""
    model.resize_token_embeddings(PADDED, mean_resizing=False)
    output = model.get_output_embeddings()
    assert output.weight.shape[0] == PADDED
    with torch.no_grad():
        # Far along the states that it gives: nothing but leaving them out keeps them from being drawn.
        hidden = model(torch.arange(SHARED)[None], output_hidden_states=True).hidden_states[-1][0]
        output.weight[SHARED:] = 50 * hidden.mean(0)
    return model


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    kit.TOKENIZER.save_pretrained(folder)
    return str(folder)


def trained(folder: Path, method: str, **models: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """One step of plain gradient descent: how the first rows of every weight moved, and what was logged."""
    rows = Dataset.from_list(kit.task_rows(4))
    judged = {"student_eval_steps": 1, "verifier": lambda text, row: 0.5, "eval_dataset": rows}
    made = kit.trainer(folder, method, generation_kwargs=kit.GREEDY, **judged, **models)
    before = kit.parameters(made.model)
    made.train()
    moved = {name: change[:SHARED] for name, change in kit.update(before, made.model).items()}
    numbers = {name: value for record in made.state.log_history for name, value in record.items()}
    return moved, {name: value for name, value in numbers.items() if not any(word in name for word in LEFT_OUT)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_a_padded_model_trains_as_the_model_that_is_cut(
    method: str, larger: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small = {"model": kit.many_ends(kit.student()), "teacher_model": saved(kit.teacher(), tmp_path / "cut")}
    large = dict(small, model=kit.many_ends(kit.student()))
    if larger == "teacher":
        large["teacher_model"] = saved(padded(kit.teacher()), tmp_path / "padded")
    else:
        large["model"] = padded(large["model"])
    torch.manual_seed(0)
    expected, numbers = trained(tmp_path / "one", method, **small)
    torch.manual_seed(0)
    found, same_numbers = trained(tmp_path / "two", method, **large)
    assert same_numbers == pytest.approx(numbers, rel=1e-4, abs=1e-6, nan_ok=True)
    assert any(change.abs().max() > 0 for change in expected.values())
    for name, change in expected.items():
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-6)
    assert f"which only the {larger} has, are neither sampled nor scored" in caplog.text
    if larger == "teacher":
        tried("checkpoint", f"matrices padded to two sizes for one tokenizer ({method})", "exact: shared ids alone")


def test_the_padded_rows_of_a_student_are_never_drawn_and_never_taught(tmp_path: Path) -> None:
    student = padded(kit.student())
    teacher = saved(kit.teacher(), tmp_path / "teacher")
    made = kit.trainer(tmp_path / "run", model=student, teacher_model=teacher)
    assert made.engine.config.suppress_tokens == list(range(SHARED, PADDED)) == unscored_ids(student, SHARED)
    batch = kit.rollout(made)
    assert int(batch["completion_ids"].max()) < SHARED
    before = student.get_output_embeddings().weight[SHARED:].detach().clone()
    made.train()
    assert torch.equal(made.model.get_output_embeddings().weight[SHARED:], before)
    assert made.model.get_output_embeddings().weight.shape[0] == PADDED


def test_an_engine_that_draws_what_the_teacher_does_not_have_is_refused(tmp_path: Path) -> None:
    class Stray:
        def generate(self, request: Any) -> list[list[int]]:
            return [[SHARED + 2] for _ in request.prompts]

    with pytest.raises(ScoringError, match=rf"token {SHARED + 2}, .*none of the {SHARED} tokens that student and"):
        kit.trainer(
            tmp_path / "run",
            model=padded(kit.student()),
            teacher_model=saved(kit.teacher(), tmp_path / "teacher"),
            rollout_engine=Stray(),
        )


def test_models_that_are_not_known_to_have_one_tokenizer_are_refused_with_what_to_pass(tmp_path: Path) -> None:
    nameless = padded(kit.teacher())
    with pytest.raises(ModelError, match=rf"{SHARED} tokens, the teacher's {PADDED}.*teacher_processing_class"):
        kit.trainer(tmp_path, teacher_model=nameless)
    kit.trainer(tmp_path, teacher_model=nameless, teacher_processing_class=kit.TOKENIZER)
    other = kit.build_tokenizer(["a", "b"])
    with pytest.raises(ModelError, match="teacher_processing_class"):
        kit.trainer(tmp_path, teacher_model=nameless, teacher_processing_class=other)


def test_a_tokenizer_that_needs_more_ids_than_both_have_is_refused(tmp_path: Path) -> None:
    short = kit.teacher()
    short.resize_token_embeddings(SHARED - 2)
    with pytest.raises(ModelError, match=f"{SHARED} tokens, the teacher's {SHARED - 2}"):
        kit.trainer(tmp_path, teacher_model=saved(short, tmp_path / "short"))


def test_inspection_scores_shared_ids_alone(tmp_path: Path) -> None:
    student = saved(kit.student(), tmp_path / "student")
    cut, wide = saved(kit.teacher(), tmp_path / "cut"), saved(padded(kit.teacher()), tmp_path / "wide")
    prompt = kit.task_rows(1)[0]["prompt"][0]["content"]
    asked = {"completion": "a b 3", "method": "dopd"}
    expected, found = (inspect_prompt(student, teacher, prompt, "a b", **asked) for teacher in (cut, wide))
    assert str(found) == str(expected)
