"""The views of a prompt and the checks of a dataset: one rendering, nothing cut, all that is missing counted."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
from datasets import Dataset, IterableDataset
from trl import DistillationTrainer

from dopd.data.views import DEFAULT_CHAT_TEMPLATE, DEFAULT_TEXT_TEMPLATE, PrivilegedTemplate
from dopd.errors import ConfigError, DataError
from dopd.tiny.tokenizer import build_tokenizer
from dopd.trainer import DOPDTrainer

THINKING_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}:{% if not enable_thinking %} 0 0{% endif %}{% endif %}"
)


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in names} for row in rows]


def host_ids(made: DOPDTrainer, prompts: list[Any]) -> list[list[int]]:
    return DistillationTrainer._tokenize_prompts(made, prompts)[0]


# --- Template


def test_the_default_templates_keep_the_question_and_put_text_where_a_completion_can_go_on() -> None:
    template = PrivilegedTemplate()
    text = template.apply("Q", "P")
    assert text == DEFAULT_TEXT_TEMPLATE.replace("{prompt}", "Q").replace("{privileged_context}", "P")
    assert isinstance(text, str) and text.endswith("Q"), "a completion goes on where the prompt stops"
    (message,) = template.apply(user("Q"), "P")
    assert message["content"].startswith("Q\n") and "\nP\n" in message["content"]
    assert message["content"] == DEFAULT_CHAT_TEMPLATE.replace("{prompt}", "Q").replace("{privileged_context}", "P")


@pytest.mark.parametrize("blank", [None, "", "  \n"])
def test_a_missing_or_blank_p_gives_the_very_prompt(blank: str | None) -> None:
    prompt = user("Q")
    assert PrivilegedTemplate().apply(prompt, blank) is prompt
    assert PrivilegedTemplate("{prompt}{privileged_context}").apply("Q", blank) == "Q"


def test_only_the_last_user_turn_changes_and_the_row_is_not_touched() -> None:
    prompt = [{"role": "system", "content": "S"}, *user("A"), {"role": "assistant", "content": "B"}, *user("C")]
    before = [dict(message) for message in prompt]
    result = PrivilegedTemplate("{prompt}|{privileged_context}").apply(prompt, "P")
    assert [message["content"] for message in result] == ["S", "A", "B", "C|P"]  # type: ignore[index]
    assert prompt == before


def test_text_blocks_are_filled_and_other_blocks_kept() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "Q"}]
    (message,) = PrivilegedTemplate("{prompt}|{privileged_context}").apply([{"role": "user", "content": content}], "P")
    assert message["content"] == [{"type": "image"}, {"type": "text", "text": "Q|P"}]
    with pytest.raises(DataError, match="no text block"):
        PrivilegedTemplate().apply([{"role": "user", "content": [{"type": "image"}]}], "P")


def test_braces_in_prompt_and_p_are_text_and_never_fields() -> None:
    template = PrivilegedTemplate("{prompt} {privileged_context} {x} {{y}}")
    assert template.apply("{privileged_context}", r"{prompt} \1 {0}") == (
        r"{privileged_context} {prompt} \1 {0} {x} {{y}}"
    )


@pytest.mark.parametrize("template", ["{prompt}", "{privileged_context}", "", "{prompt}{prompt}{privileged_context}"])
def test_a_template_without_a_field_or_with_a_doubled_one_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match="exactly once"):
        PrivilegedTemplate(template)


# --- Rendering


def test_rendering_is_the_hosts_for_conversations_blocks_and_text(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    made = kit.trainer(tmp_path, processing_class=tokenizer, chat_template_kwargs={"enable_thinking": False})
    for prompts in ([user("1 2 3"), user("4")], ["1 2 3", "4 5"]):
        assert made.prompts.encode(prompts) == host_ids(made, prompts)
    blocks = [[{"role": "user", "content": [{"type": "text", "text": "1 2"}]}]]
    plain = kit.trainer(tmp_path)
    assert plain.prompts.encode(blocks) == host_ids(plain, blocks) == plain.prompts.encode([user("1 2")])


@pytest.mark.parametrize("thinking", [True, False])
def test_generation_prompt_and_thinking_flag_are_the_same_in_every_view(tmp_path: Path, thinking: bool) -> None:
    """Otherwise the first token's divergence is the template's, not the privilege's."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = THINKING_TEMPLATE
    made = kit.trainer(tmp_path, processing_class=tokenizer, chat_template_kwargs={"enable_thinking": thinking})
    rows = [made.train_dataset[n] for n in range(4)]
    suffix = [kit.TOKENIZER.convert_tokens_to_ids(word) for word in ([":"] if thinking else [":", "0", "0"])]
    view = kit.privileged_view(made, rows)
    plain = host_ids(made, [row["prompt"] for row in rows])
    for n, row in enumerate(rows):
        privileged = view.prompt_ids[n][view.prompt_mask[n].bool()].tolist()
        assert plain[n][-len(suffix) :] == privileged[-len(suffix) :] == suffix
        body = tokenizer(row["prompt"][0]["content"])["input_ids"]
        hint = tokenizer(row["privileged_context"])["input_ids"]
        assert privileged == body + hint + suffix


def test_text_prompts_get_what_the_tokenizer_adds_once_in_every_view(tmp_path: Path) -> None:
    rows = [{"prompt": "1 2 3 ?", "privileged_context": "4 5"} for _ in range(4)]
    options = {"privileged_template": None, "prompt_format": "text"}
    made = kit.trainer(tmp_path, train_dataset=Dataset.from_list(rows), **options)
    view = kit.privileged_view(made, [made.train_dataset[0]])
    assert view.prompt_ids[0].tolist() == kit.TOKENIZER("4 5 1 2 3 ?")["input_ids"]
    made.train()
    assert kit.records(made, "loss")[0] > 0


def test_the_completion_ids_are_the_same_objects_in_every_view(tmp_path: Path) -> None:
    made = kit.trainer(
        tmp_path,
        train_dataset=Dataset.from_list(kit.uneven_rows()),
        per_device_scoring_batch_size=8,
        share_prompts=False,  # prompt and completion in one pass, to be read off its input
    )
    read: list[list[list[int]]] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        rows = zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True)
        read.append([ids[mask.bool()].tolist() for ids, mask in rows])

    batch = kit.rollout(made)
    for model in (made.model, made.teacher_model):
        model.model.register_forward_pre_hook(keep, with_kwargs=True)
    views = {"privileged": kit.privileged_view(made, [made.train_dataset[n] for n in range(8)])}
    kit.scored_again(made, views, batch)
    kit.loss_of(made, batch)
    answers = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    for rows in read[-3:]:
        assert all(row[-len(ids) :] == ids for row, ids in zip(rows, answers, strict=True))
    lengths = [tuple(map(len, rows)) for rows in read[-3:]]
    assert len(set(lengths)) == 2, "each view has its own prompt lengths"


@pytest.mark.parametrize("missing", [None, ""])
def test_an_empty_p_gives_exactly_the_plain_view_and_its_log_probs(tmp_path: Path, missing: str | None) -> None:
    rows = [{**row, "privileged_context": missing} for row in kit.uneven_rows()]
    rows[0]["privileged_context"] = "1"  # a column of None alone has no text type
    made = kit.trainer(tmp_path, train_dataset=Dataset.from_list(rows), teacher_model=kit.teacher())
    batch = kit.rollout(made)
    vanilla = kit.trainer(tmp_path, "vanilla", train_dataset=Dataset.from_list(rows), teacher_model=kit.teacher())
    views = {"plain": kit.privileged_view(made, rows)}
    again = kit.scored_again(vanilla, views, batch)
    view = kit.privileged_view(made, rows[1:])
    plain = host_ids(made, [row["prompt"] for row in rows[1:]])
    assert [ids[mask.bool()].tolist() for ids, mask in zip(view.prompt_ids, view.prompt_mask, strict=True)] == plain
    assert torch.equal(again["logprobs/teacher"][1:], batch["logprobs/privileged_teacher"][1:])


# --- Lengths: nothing is ever truncated


def test_a_prompt_that_is_too_long_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    rows = kit.uneven_rows()
    with pytest.raises(DataError, match=r"row 6: a view of the prompt has \d+ tokens, 20 are allowed.*Nothing is"):
        kit.trainer(tmp_path, "vanilla", train_dataset=Dataset.from_list(rows), max_prompt_length=20)


def test_the_privileged_view_counts_too(tmp_path: Path) -> None:
    rows = [*kit.task_rows(3), {**kit.task_rows(1)[0], "privileged_context": "1 " * 600}]
    kit.trainer(tmp_path, "vanilla", train_dataset=Dataset.from_list(rows))
    with pytest.raises(DataError, match="row 3: a view of the prompt has"):
        kit.trainer(tmp_path, train_dataset=Dataset.from_list(rows))


def test_dropped_prompts_are_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = kit.trainer(
        tmp_path,
        "vanilla",
        train_dataset=Dataset.from_list(kit.uneven_rows()),
        max_prompt_length=20,
        overlong_prompts="drop",
    )
    assert len(made.train_dataset) == 6
    assert "2 prompts were dropped" in warnings_of(caplog)
    with pytest.raises(DataError, match="all 8 prompts are longer than 2"):
        kit.trainer(
            tmp_path, train_dataset=Dataset.from_list(kit.uneven_rows()), max_prompt_length=2, overlong_prompts="drop"
        )


# --- Columns and rows


@pytest.mark.parametrize("method", ["dopd", "privileged_student", "privileged_teacher"])
def test_a_missing_privileged_column_is_an_error_where_the_method_reads_it(tmp_path: Path, method: str) -> None:
    rows = without(kit.task_rows(), "privileged_context")
    with pytest.raises(DataError, match=f"'privileged_context' is missing and method '{method}' reads it.*vanilla"):
        kit.trainer(tmp_path, method, train_dataset=Dataset.from_list(rows))


def test_vanilla_does_not_ask_for_a_privileged_column(tmp_path: Path) -> None:
    kit.trainer(tmp_path, "vanilla", train_dataset=Dataset.from_list(without(kit.task_rows(), "privileged_context")))


def test_rows_without_privileged_context_are_counted_said_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = kit.task_rows(4)
    for row in rows[:3]:
        row["privileged_context"] = None
    made = kit.trainer(tmp_path, train_dataset=Dataset.from_list(rows), num_generations=2)
    assert "3 of 4 prompts have no privileged_context" in warnings_of(caplog)
    made.train()
    assert kit.records(made, "privileged/missing_ratio") == [0.75]


def test_no_privileged_context_at_all_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kit.trainer(tmp_path, train_dataset=Dataset.from_list(kit.task_rows(4, "none")))
    assert "no prompt has privileged context" in warnings_of(caplog)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the dataset is empty"),
        ([{"question": "1"}], "column 'prompt' is missing; the dataset has question"),
        ([{"prompt": "1"}, {"prompt": " "}], "row 1, column 'prompt': the text is empty"),
        ([{"prompt": [{"role": "system", "content": "1"}]}], "row 0, column 'prompt': .* no user turn"),
        ([{"prompt": 3}], "row 0, column 'prompt' .*expected text, or a list"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        kit.trainer(tmp_path, "vanilla", train_dataset=Dataset.from_list(rows))


def test_privileged_context_that_is_no_text_is_named(tmp_path: Path) -> None:
    rows = [{**row, "privileged_context": 7} for row in kit.task_rows(4)]
    with pytest.raises(DataError, match="row 0, column 'privileged_context': expected text or None, got int"):
        kit.trainer(tmp_path, train_dataset=Dataset.from_list(rows))


class Mixed(list):  # type: ignore[type-arg]
    """Arrow cannot hold both kinds in one column; data sets of other makes can."""

    column_names = ("prompt",)


def test_text_and_conversations_in_one_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1, column 'prompt': text and conversations are mixed"):
        kit.trainer(tmp_path, "vanilla", train_dataset=Mixed([{"prompt": "1"}, {"prompt": user("1")}]))


# --- Streams


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def streamed(folder: Path, rows: list[dict[str, Any]], **options: Any) -> tuple[DOPDTrainer, list[dict[str, Any]]]:
    made = kit.trainer(folder, train_dataset=stream(rows), shuffle_dataset=False, **options)
    seen = kit.scored(made)
    made.train()
    return made, seen


def test_a_stream_is_grouped_into_rollouts_of_one_prompt_across_micro_batches(tmp_path: Path) -> None:
    rows = kit.task_rows(8)
    _, seen = streamed(tmp_path, rows, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=2)
    prompts = [
        [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]
        for batch in seen
    ]
    expected = [kit.TOKENIZER(row["prompt"][0]["content"] + " :")["input_ids"] for row in rows]
    assert prompts == [[expected[0]] * 4 + [expected[1]] * 4, [expected[2]] * 4 + [expected[3]] * 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": user("1 " * 600)}, r"row 2: a view of the prompt has 606 tokens"),
        ({"prompt": [{"role": "system", "content": "1"}]}, "row 2, column 'prompt'"),
        ({"prompt": "1 2"}, "row 2, column 'prompt': text and conversations are mixed"),
    ],
)
def test_rows_of_a_stream_are_checked_as_they_pass(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    rows = kit.task_rows(4)
    rows[2] |= change
    with pytest.raises(DataError, match=message):
        streamed(tmp_path, rows, per_device_train_batch_size=8, max_steps=2)


def test_a_stream_without_the_privileged_column_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'privileged_context' is missing"):
        streamed(tmp_path, without(kit.task_rows(4), "privileged_context"))


def test_overlong_rows_of_a_stream_are_dropped_and_counted_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = kit.task_rows(4)
    rows[1]["prompt"] = user("1 " * 600)
    _, seen = streamed(tmp_path, rows, overlong_prompts="drop")
    assert "row 1 of the stream dropped (1 so far)" in warnings_of(caplog)
    assert len({tuple(ids) for ids in seen[0]["prompt_ids"].tolist()}) == 2


def test_missing_privileged_context_in_a_stream_is_logged(tmp_path: Path) -> None:
    rows = kit.task_rows(2)
    rows[1]["privileged_context"] = None
    made, _ = streamed(tmp_path, rows)
    assert kit.records(made, "privileged/missing_ratio") == [0.5]


# --- Rollouts per prompt


def test_every_prompt_gets_its_rollouts_and_a_step_whole_groups(tmp_path: Path) -> None:
    made = kit.trainer(tmp_path, num_generations=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    seen = kit.scored(made)
    made.train()
    prompts = [tuple(ids) for ids in seen[0]["prompt_ids"].tolist()]
    assert len(prompts) == 8 and all(prompts.count(prompt) == 2 for prompt in prompts)
