"""`teacher_chat_template_kwargs`: the teacher reads prompts that its own arguments wrote, the student as before."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from datasets import Dataset
from server_kit import serving
from test_prompts import CHATML, CONTENTS, STUDENT, TEACHER, asked, build_model, tokenizer, trained
from text_kit import own_logprobs

from dopd.errors import ConfigError
from dopd.inspection.schema import read_json_lines
from dopd.runs.examination import row_views

EFFORT = "{% if effort %}{{ effort }} {% endif %}"
CHAT = {"prompt": [{"role": "user", "content": "w1 w2"}], "privileged_context": "w3"}
ROWS = [CHAT, {**CHAT, "privileged_context": "w4 w5 w6"}] * 2
STRENUOUS = {"effort": "w9"}


@pytest.fixture
def tok() -> Any:
    made = tokenizer()
    made.chat_template = EFFORT + CHATML.replace("CONTENT", CONTENTS["Qwen3: text if it is a string"])
    return made


def test_both_views_of_the_teacher_are_those_of_its_own_arguments_and_the_students_as_before(
    tmp_path: Path, tok: Any
) -> None:
    made = trained(
        tmp_path, ROWS, tok, chat_template_kwargs={"effort": "w8"}, teacher_chat_template_kwargs=STRENUOUS, max_steps=1
    )
    batch = kit.rollout(made)
    models = {"teacher": made.unwrapped_teacher, "student": made.unwrapped_student}
    assert {"privileged_teacher", "privileged_student"} <= set(made.table.sources)
    for name in made.table.sources:
        model = models["student" if name.endswith("student") else "teacher"]
        logprobs = model.lm_head(batch[f"hidden/{name}"]).double().log_softmax(-1)
        for row, (ids, mask) in enumerate(zip(batch["completion_ids"], batch["completion_mask"], strict=True)):
            hint = f" hint {ROWS[row]['privileged_context']}" if name.startswith("privileged") else ""
            text = ("w9 " if model is models["teacher"] else "w8 ") + asked(f"w1 w2{hint}")
            completion = ids[mask.bool()].tolist()
            mine = logprobs[row, : len(completion)].gather(-1, torch.tensor(completion)[:, None])[:, 0]
            expected = own_logprobs(model, tok(text, add_special_tokens=False)["input_ids"], completion)
            assert torch.allclose(mine, expected, atol=1e-5), name
    made.train()
    assert made.state.global_step == 1


def test_answers_are_drawn_and_traced_with_the_students_own(tmp_path: Path, tok: Any) -> None:
    made = trained(tmp_path, ROWS, tok, teacher_chat_template_kwargs=STRENUOUS, max_steps=1, trace_steps=1)
    made.train()
    texts = [record["prompt"] for record in read_json_lines(tmp_path / "trace.jsonl")]
    assert texts and not any("w9" in str(text) for text in texts)


@pytest.mark.parametrize("asks", ["student", "teacher"])
def test_an_answer_that_would_stand_behind_another_text_is_refused(tmp_path: Path, asks: str) -> None:
    """A thought that is closed for one and open for the other: Qwen3's `enable_thinking`."""
    thinking: dict[str, Any] = {"enable_thinking": False}
    options = {"chat_template_kwargs": thinking} if asks == "student" else {"teacher_chat_template_kwargs": thinking}
    with pytest.raises(ConfigError, match="between question and answer") as refused:
        trained(tmp_path, ROWS, **{"teacher_chat_template_kwargs": {"enable_thinking": True}, **options})
    assert "assistant <think> </think>" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenize": True}, "teacher_chat_template_kwargs: tokenize cannot be set there"),
        ({"efort": "w9"}, "teacher_chat_template_kwargs: 'efort' is read by no chat template.*Did you mean 'effort'"),
        ({"effort": "w1<|im_end|>"}, "teacher_chat_template_kwargs: .*'effort' holds '<|im_end|>'"),
        (3, "teacher_chat_template_kwargs"),
    ],
)
def test_what_would_be_refused_of_the_students_is_refused_by_name(
    tmp_path: Path, tok: Any, options: Any, words: str
) -> None:
    with pytest.raises(Exception, match=words.replace("<|", r"<\|").replace("|>", r"\|>")):
        trained(tmp_path, ROWS, tok, teacher_chat_template_kwargs=options)


def test_what_is_the_same_for_both_is_no_reading_of_its_own(tmp_path: Path, tok: Any) -> None:
    same = trained(tmp_path, ROWS, tok, chat_template_kwargs=STRENUOUS, teacher_chat_template_kwargs=STRENUOUS)
    assert same.prompts.teacher_processing_class is None


def test_prompts_that_are_too_long_for_the_teacher_alone_are_counted(tmp_path: Path, tok: Any) -> None:
    length = len(tok(asked("w1 w2 hint w3"), add_special_tokens=False)["input_ids"])
    long = {"effort": " ".join(["w9"] * 9)}
    trained(tmp_path / "fits", [CHAT] * 4, tok, max_prompt_length=length)
    with pytest.raises(Exception, match=f"{length + 9}"):
        trained(tmp_path, [CHAT] * 4, tok, max_prompt_length=length, teacher_chat_template_kwargs=long)


def test_row_0_is_shown_as_each_of_them_reads_it(tmp_path: Path, tok: Any) -> None:
    made = trained(tmp_path, ROWS, tok, teacher_chat_template_kwargs=STRENUOUS)
    shown = {tuple(readers): tok.decode(ids) for _, readers, ids in row_views(made)}
    assert len(shown) > 2
    for readers, text in shown.items():
        assert {reader.endswith("teacher") for reader in readers} == {text.startswith("w9 ")}


def test_a_teacher_on_a_server_is_sent_its_own(tmp_path: Path, tok: Any) -> None:
    with serving(build_model(TEACHER, tok, 1), tok) as server:
        options = {"teacher_server": server.url, "teacher_chat_template_kwargs": STRENUOUS}
        made = kit.trainer(
            tmp_path,
            "vanilla_pg",
            model=build_model(STUDENT, tok, 0),
            teacher_model=None,
            processing_class=tok,
            train_dataset=Dataset.from_list(ROWS),
            **options,
        )
        server.asked.clear()
        kit.rollout(made)
        sent = [tok.decode(body["prompt"]) for body in server.asked if "prompt" in body]
    assert len(sent) == len(ROWS) and all(text.startswith("w9 <|im_start|>") for text in sent)
