"""What a run or a row tells its chat template, and the template does not read: told, or refused where a name is close.

Which names a template reads is seen by rendering it with and without each of them.
"""

from pathlib import Path
from typing import Any

import pytest
from compatibility import tried
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from test_prompts import PUBLISHED, tokenizer, trained

from dopd.data.control import Markup
from dopd.data.options import UnreadOptions, check_generation_prompt, check_options, check_row_options
from dopd.errors import ConfigError, DataError

CHAT = {"prompt": [{"role": "user", "content": "w1 w2"}], "privileged_context": "w3"}
ROWS = [CHAT] * 4
DOCUMENTS = {"documents": [{"title": "w4", "text": "w5 w6"}]}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if "chat_template_kwargs" in one.getMessage()]


def test_another_switch_of_a_template_is_no_misspelt_one() -> None:
    """`enable_thinking` is given to every model, and some templates have `preserve_thinking` alone."""
    tok = tokenizer()
    tok.chat_template = (
        "{% if preserve_thinking %}w1 {% endif %}{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    )
    (sentence,) = check_options([tok], {"enable_thinking": False})
    assert "'enable_thinking' is read by no chat template of this run and changes nothing" in sentence


@pytest.mark.parametrize(("wrong", "right"), [("enable_thinkin", "enable_thinking"), ("thinking", "enable_thinking")])
def test_a_name_close_to_one_that_the_template_reads_is_refused(tmp_path: Path, wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"'{wrong}' is read by no chat template.*Did you mean '{right}'"):
        trained(tmp_path, ROWS, chat_template_kwargs={wrong: False})
    tried("setting", "chat_template_kwargs with a name close to one that is read", "refused: names both")


def test_a_name_that_nothing_reads_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held_out = Dataset.from_list([{"prompt": [{"role": "user", "content": "w9"}], "privileged_context": "w3"}])
    trained(tmp_path, ROWS, chat_template_kwargs={"date": "w5", "enable_thinking": False}, eval_dataset=held_out)
    assert told(caplog) == [
        "chat_template_kwargs: 'date' is read by no chat template of this run and changes nothing. The options that "
        "are read: enable_thinking"
    ]
    tried("setting", "chat_template_kwargs with a name that nothing reads", "warned; the options that are read")


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_that_tell_what_nothing_reads_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, streamed: bool
) -> None:
    rows = [CHAT | {"chat_template_kwargs": options} for options in (None, DOCUMENTS, None, DOCUMENTS)]
    data = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    list(trained(tmp_path, data).train_dataset)
    start = "column 'chat_template_kwargs', 'documents': not read by the chat template in"
    end = ", the first in row 1. The options that are read: enable_thinking"
    counted = [f"{n} rows of the stream so far" for n in (1, 2)] if streamed else ["2 of 4 rows of train_dataset"]
    assert told(caplog) == [f"{start} {rows}{end}" for rows in counted]
    tried("dataset", "chat_template_kwargs of rows that the template does not read", "told: name, rows and count")


def test_what_the_template_reads_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tok = tokenizer()
    tok.chat_template += "{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    read = {"enable_thinking": False} | DOCUMENTS
    trained(tmp_path, [row | {"chat_template_kwargs": read} for row in ROWS], tok)
    trained(tmp_path, ROWS, tok, chat_template_kwargs={**read, "return_assistant_tokens_mask": False})
    trained(tmp_path, ROWS, chat_template_kwargs={"chat_template": tok.chat_template, **read})
    assert not told(caplog)


def test_columns_of_documents_and_functions_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(tmp_path, [row | DOCUMENTS | {"functions": ["w9"]} for row in ROWS])
    assert any(line.startswith("column(s) 'documents', 'functions' are read by nothing") for line in told(caplog))


NAMES = ["enable_thinking", "thinking", "documents", "date_string", "reasoning_effort", "keep_past_thinking", "x"]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_what_changes_a_published_rendering_is_read(path: Path) -> None:
    tok = tokenizer()
    tok.chat_template = path.read_text(encoding="utf-8")
    content = [{"type": "text", "text": "w1"}] if path.stem in ("idefics3", "smolvlm", "llava_next") else "w1"
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]

    def written(**options: Any) -> str:
        try:
            made = tok.apply_chat_template([*turns, turns[0]], tokenize=False, add_generation_prompt=True, **options)
        except (TypeError, TemplateError):  # a value of a kind that the template does not expect
            return "raises"
        return str(made)

    assert "w1" in written()

    for name in NAMES:
        values: list[Any] = DOCUMENTS["documents"] if name == "documents" else [True, False, "w7"]
        changes = any(written(**{name: [value] if name == "documents" else value}) != written() for value in values)
        unread = UnreadOptions([tok], {}).look(CHAT | {"chat_template_kwargs": {name: values}}, "row 0")
        assert not (changes and unread), name
        assert unread or name != "x", "no template reads that"
    assert check_options([tok], {"tools": [], "chat_template": tok.chat_template}) == []


@pytest.mark.parametrize("name", ["qwen3_5_think", "nemotron_3_nano", "gemma4", "glm4moe"])
def test_a_template_s_own_variables_are_not_offered(name: str) -> None:
    tok = tokenizer()
    path = next(path for path in PUBLISHED if path.stem == name)
    tok.chat_template = path.read_text(encoding="utf-8")
    (sentence,) = check_options([tok], {"zzzzzz": 1})
    offered = sentence.rpartition("The options that are read: ")[2].split(", ")
    assert "enable_thinking" in offered
    assert not {"c", "role", "reasoning_content", "ns_args", "thinking_text"} & set(offered)


def test_a_row_has_no_template_of_its_own(tmp_path: Path) -> None:
    own = {"chat_template_kwargs": {"chat_template": "{{ messages[0]['content'] }}"}}
    with pytest.raises(DataError, match="row 0: column 'chat_template_kwargs': a row has no chat_template of its own"):
        trained(tmp_path, [row | own for row in ROWS])
    tried("dataset", "chat_template in a row's chat_template_kwargs", "refused: set it for the run")


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_templates_begin_the_turn_of_the_assistant(path: Path) -> None:
    tok = tokenizer()
    tok.chat_template = path.read_text(encoding="utf-8")
    assert check_generation_prompt(tok, {}, Markup.of(tok).closing) == []


BEGINS = "{%- if add_generation_prompt"
GEMMA = "{% for m in messages %}<start_of_turn>{{ m['role'] }} {{ m['content'] }} <end_of_turn>\n{% endfor %}"
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
NONE: dict[str, tuple[str, str | None]] = {
    "ChatML": (str(tokenizer().chat_template).partition(BEGINS)[0], "<|im_end|>"),
    "Gemma": (GEMMA, "<end_of_turn>"),
    "Llama 2, which needs none": (LLAMA2, None),
    "ChatML with one": (str(tokenizer().chat_template), None),
}


@pytest.mark.parametrize("name", NONE)
def test_a_template_without_a_generation_prompt_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    tok = tokenizer()
    template, end = NONE[name]
    trained(tmp_path, ROWS, tok, chat_template_kwargs={"chat_template": template})
    said = [line for line in told(caplog) if "generation prompt" in line]
    assert len(said) == (end is not None) and all(f"prompts end with '{end}'" in line for line in said)
    tried("prompt", "a chat template without a generation prompt", "told where the prompt ends as an answer does")


ASKS = (
    "{% if is_on is false %}off{% endif %}{% if mode == 'true' %}on{% endif %}{% if plain %}plain{% endif %}"
    "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
)


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ({"is_on": "False"}, "false without quotes"),
        ({"is_on": "true"}, "true without quotes"),
        ({"is_on": 0}, "false without quotes"),
        ({"is_on": 1.0}, "true without quotes"),
        ({"plain": " FALSE "}, "false without quotes"),
        ({"continue_final_message": "false"}, "false without quotes"),
        ({"mode": "true"}, None),
        ({"plain": 0}, None),
        ({"is_on": False, "plain": True}, None),
        ({"is_on": None, "plain": "falsehood"}, None),
    ],
)
def test_a_truth_value_that_is_none_for_the_template_is_refused(option: dict[str, Any], meant: str | None) -> None:
    """What a template does with a value is what it does with the truth value of its name, or the value is refused."""
    tok = tokenizer()
    tok.chat_template = ASKS

    def written(**options: Any) -> Any:
        return tok.apply_chat_template(CHAT["prompt"], tokenize=False, **options)

    row = CHAT | {"chat_template_kwargs": option}
    if meant is None:
        check_options([tok], option)
        check_row_options(row, [tok], {})
        return
    (name,) = option
    if "continue" not in name and "true" not in meant:
        assert written(**option) != written(**{name: False}), "the template takes it for false: no reason to refuse"
    with pytest.raises(ConfigError, match=f"^chat_template_kwargs: {name} .*{meant}"):
        check_options([tok], option)
    with pytest.raises(DataError, match=f"^column 'chat_template_kwargs': {name} .*{meant}"):
        check_row_options(row, [tok], {})
    tried(
        "setting", "chat_template_kwargs: a truth value in quotes, 0 or 1 where false is asked for", "refused: names it"
    )


def test_a_truth_value_in_quotes_and_a_column_of_an_option_in_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [CHAT, CHAT | {"chat_template_kwargs": '{"enable_thinking": "false"}'}] * 2
    with pytest.raises(DataError, match=r"^row 1: column 'chat_template_kwargs': enable_thinking \(='false'\) is text"):
        trained(tmp_path / "text", [{"chat_template_kwargs": None} | row for row in rows])
    trained(tmp_path / "column", [row | {"enable_thinking": False} for row in ROWS])
    (line,) = told(caplog)
    assert line.startswith("column(s) 'enable_thinking' have the name of an option of the chat template")
    tried("dataset", "a column with the name of an option of the chat template", "told: where it belongs")
