"""Odd prompts: tools, their calls and their results, written as the template's author meant them or refused; markup in
places where nobody looks for it; text that is none.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import trl
from compatibility import tried
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from test_prompts import CHATML, tokenizer, trained

from dopd.data import rendering
from dopd.data.control import Markup, check_control_tokens, check_joined_texts
from dopd.data.encode import encode_prompts
from dopd.data.rendering import template_of
from dopd.data.views import PrivilegedTemplate, plain_prompt, privileged_prompt
from dopd.errors import ConfigError, DataError

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
ADD = {"type": "function", "function": {"name": "add", "description": "w1", "parameters": PARAMETERS}}
MAPPING = {"a": 1, "b": "w5"}
# TRL's copies of published templates: those that write calls and tools, calls alone, or neither.
WRITES = ["qwen2_5", "qwen3", "llama3_1", "gptoss", "gemma4", "glm4moe", "nemotron_3_nano", "lfm2_v2", "qwen3_5_think"]
LEAVES_OUT = ["llama3", "qwen2_5_vl", "lfm2", "phi3", "cohere2", "deepseek_r1_distill"]


def published(name: str) -> Any:
    tok = tokenizer()
    tok.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return tok


def conversation(arguments: Any, content: Any = None, **more: Any) -> list[dict[str, Any]]:
    call = {"id": "callabcde", "type": "function", "function": {"name": "add", "arguments": arguments}, **more}
    return [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "name": "add", "tool_call_id": "callabcde", "content": "w30 'w31'"},
    ]


def own(tok: Any, turns: list[dict[str, Any]], **options: Any) -> list[int]:
    text = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **options)
    return tok(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", WRITES)
def test_arguments_of_a_call_are_written_alike_as_mapping_and_as_json(name: str) -> None:
    tok = published(name)
    expected = own(tok, conversation(MAPPING), tools=[ADD])
    for arguments in (MAPPING, json.dumps(MAPPING)):
        row = {"prompt": conversation(arguments), "tools": json.dumps([ADD])}
        assert encode_prompts(tok, [plain_prompt(row)], {}) == [expected]
    tried("prompt", f"calls of tools, chat template {name}", "exact: arguments as a mapping and as JSON")


def test_a_template_that_reads_json_and_needs_a_content_gets_both() -> None:
    tok = published("deepseekv3")
    expected = own(tok, conversation(json.dumps(MAPPING), ""))
    for arguments in (MAPPING, json.dumps(MAPPING)):
        assert encode_prompts(tok, [conversation(arguments)], {}) == [expected]
    tried("prompt", "calls of tools, chat template deepseekv3", "exact: arguments as a mapping and as JSON")


@pytest.mark.parametrize("name", LEAVES_OUT)
def test_a_template_that_would_leave_calls_or_results_out_is_refused(name: str) -> None:
    for content in (None, ""):
        row = {"prompt": conversation(MAPPING, content), "tools": [ADD]}
        with pytest.raises(
            DataError, match=r"chat template leaves out (the tool|the assistant's call|text of the tool)"
        ):
            encode_prompts(published(name), [plain_prompt(row)], {})
    tried("prompt", f"calls of tools, chat template {name}", "refused: it leaves them out")


@pytest.mark.parametrize("role", ["human", "User", "model", "function", "context"])
def test_a_turn_of_a_role_that_a_template_leaves_out_is_refused(role: str) -> None:
    turns = [{"role": role, "content": "SECRETWORD"}, {"role": "user", "content": "x?"}]
    with pytest.raises(DataError, match=f"leaves out text of the {role}'s turn: 'SECRETWORD'"):
        encode_prompts(published("qwen3"), [turns], {})


def test_markup_that_texts_become_beside_one_another_is_refused(tmp_path: Path) -> None:
    tokenizer = published("qwen3")
    for template, prompt, told in (
        ("{prompt} <|{privileged_context}", "q", "im_end|> free"),
        ("{prompt}{privileged_context}", "<|im_", "end|>"),
    ):
        row = {"prompt": [{"role": "user", "content": prompt}], "privileged_context": told}
        joined = privileged_prompt(row, PrivilegedTemplate(template))
        with pytest.raises(DataError, match=r"joined by privileged_template, they hold '<\|im_end\|>'"):
            check_joined_texts(joined, Markup.of(tokenizer, template_of(tokenizer, {})))
        check_joined_texts(row["prompt"], Markup.of(tokenizer, template_of(tokenizer, {})))


def test_a_template_that_would_leave_the_tools_out_is_refused() -> None:
    prompt = plain_prompt({"prompt": conversation(MAPPING)[:1], "tools": [ADD]})
    with pytest.raises(DataError, match="leaves out the tool 'add'"):
        encode_prompts(published("gemma"), [prompt], {})
    tried("dataset", "column tools, a template that does not write them", "refused: names the tool")


WRITTEN = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
CALLS = "{% for c in m['tool_calls'] or [] %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %} "
REPEATED = [{"role": "user", "content": "w1 add"}, {"role": "assistant", "content": "w2"}]
SAME: dict[str, tuple[str, dict[str, Any], str]] = {
    "a tool, gemma3": ("gemma3", {"prompt": REPEATED[:1], "tools": [ADD]}, "the tool 'add'"),
    "a tool, phi3": ("phi3", {"prompt": REPEATED[:1], "tools": [ADD]}, "the tool 'add'"),
    "a tool, deepseekv3": ("deepseekv3", {"prompt": conversation(MAPPING), "tools": [ADD]}, "the tool 'add'"),
    "a part of a word": ("gemma3", {"prompt": [{"role": "user", "content": "additional"}], "tools": [ADD]}, "the tool"),
    "the description of a tool": (
        WRITTEN + "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}",
        {"prompt": [{"role": "user", "content": "w1"}], "tools": [ADD]},
        "the description of the tool 'add'",
    ),
    "the result of a tool": (
        WRITTEN.replace("{{ m['content'] }}", CALLS + "{{ m['content'] if m['role'] != 'tool' }}"),
        {"prompt": [*conversation(MAPPING)[:2], {"role": "tool", "content": "w1 w2"}]},
        "text of the tool's turn: 'w1 w2'",
    ),
    "an argument of a call": (
        WRITTEN.replace("}} ", "}} {% for c in m['tool_calls'] or [] %}{{ c.function.name }}{% endfor %}"),
        {"prompt": conversation({"b": "w1"}, "")},
        "an argument .'b'. of the assistant's call of the tool 'add'",
    ),
    "a system prompt": (
        WRITTEN.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] != 'system' }}"),
        {"prompt": [{"role": "system", "content": "w1"}, *REPEATED[:1]]},
        "text of the system's turn: 'w1'",
    ),
    "all turns but the last": (
        "{{ messages[-1]['content'] }}",
        {"prompt": [*REPEATED, REPEATED[0]]},
        "text of the user's turn: 'w1 add'",
    ),
    "an answer": (
        WRITTEN.replace("{{ m['content'] }}", "{{ m['content'] if m['role'] == 'user' }}"),
        {"prompt": [*REPEATED, {"role": "user", "content": "w2"}]},
        "text of the assistant's turn: 'w2'",
    ),
    "what a turn before it said": (
        WRITTEN.replace(
            "{{ m['content'] }}", "{{ m['content'] if loop.first or m['content'] != messages[0]['content'] }}"
        ),
        {"prompt": [*REPEATED, REPEATED[0]]},
        "text of the user's turn: 'w1 add' .it is there 2 times",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_what_a_template_leaves_out_is_missed_though_its_words_stand_elsewhere(name: str) -> None:
    template, row, words = SAME[name]
    tok = published(template) if template.isidentifier() else tokenizer()
    if not template.isidentifier():
        tok.chat_template = template
    with pytest.raises(DataError, match=f"the chat template leaves out {words}"):
        encode_prompts(tok, [plain_prompt(row)], {})
    tried("prompt", f"a template that leaves out {name}, whose words stand elsewhere", "refused: names it")


ALL_PUBLISHED = sorted(path.stem for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def function(name: str = "add", **more: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, **more}}]


def test_a_template_that_takes_no_other_names_of_tools_is_looked_through_for_them() -> None:
    tok = tokenizer()
    knows = "{% for t in tools or [] %}{{ raise_exception('unknown') if t.function.name != 'add' }}{% endfor %}"
    tok.chat_template = knows + WRITTEN
    prompt = plain_prompt({"prompt": [{"role": "user", "content": "w1"}], "tools": [ADD]})
    with pytest.raises(DataError, match="column 'tools': the chat template leaves out the tool 'add'"):
        encode_prompts(tok, [prompt], {})


TARGETS = TARGET, NAME = "w41", "w42"
ASKED = {"role": "user", "content": "w1 w2"}
USING = json.loads(json.dumps(conversation({"a": 1, "b": TARGET})).replace('"add"', f'"{NAME}"', 1))
BRINGS: dict[str, dict[str, Any]] = {
    "a system prompt": {"prompt": [{"role": "system", "content": TARGET}, ASKED]},
    "an earlier question": {
        "prompt": [{"role": "user", "content": TARGET}, {"role": "assistant", "content": "w2"}, ASKED]
    },
    "an earlier answer": {"prompt": [ASKED, {"role": "assistant", "content": TARGET}, ASKED]},
    "a tool": {"prompt": [ASKED], "tools": function(TARGET, description="w9", parameters=PARAMETERS)},
    "the description of a tool": {
        "prompt": [ASKED],
        "tools": function("w9", description=TARGET, parameters=PARAMETERS),
    },
    "an argument of a call": {"prompt": [*USING[:2], {**USING[2], "content": "w9"}]},
    "the result of a call": {"prompt": [*USING[:2], {**USING[2], "content": TARGET}]},
}


def as_transformers_writes(tok: Any, row: dict[str, Any]) -> str | None:
    """A row in the first form that its template takes: contents as text or blocks, arguments as a mapping or JSON."""
    for blocks, as_json in itertools.product((False, True), (False, True)):
        turns = json.loads(json.dumps(row["prompt"]))
        for one in turns:
            one["content"] = [{"type": "text", "text": one["content"] or ""}] if blocks else one["content"] or ""
            for call in one.get("tool_calls", ()) if as_json else ():
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        try:
            text = tok.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, tools=row.get("tools"))
        except (TemplateError, TypeError, AttributeError):
            continue
        if "w1 w2" in text and "'type'" not in text:
            return str(text)
    return None


@pytest.mark.parametrize("what", BRINGS)
@pytest.mark.parametrize("name", ALL_PUBLISHED)
def test_what_a_published_template_leaves_out_is_refused_and_nothing_else(name: str, what: str) -> None:
    tok = published(name)
    text = as_transformers_writes(tok, BRINGS[what])
    repeated = json.loads(json.dumps(BRINGS[what]).replace(TARGET, "w1").replace(NAME, "w2"))
    if text is not None and all(word in text for word in TARGETS if word in json.dumps(BRINGS[what])):
        encode_prompts(tok, [plain_prompt(repeated)], {})
    else:
        with pytest.raises(DataError, match=r"the chat template (leaves out|refuses)"):
            encode_prompts(tok, [plain_prompt(repeated)], {})


def test_arguments_that_other_rows_have_are_no_part_of_a_call() -> None:
    """One schema for all rows: `datasets` fills the arguments that a call does not have, and fields of blocks, with
    None.
    """
    tok = published("qwen3")
    calls = [{"a": 1}, {"b": "w5"}]
    rows = Dataset.from_list([{"prompt": conversation(arguments, "w9")} for arguments in calls])
    assert rows[0]["prompt"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1, "b": None}
    for row, arguments in zip(rows, calls, strict=True):
        assert encode_prompts(tok, [plain_prompt(row)], {}) == [own(tok, conversation(arguments, "w9"))]
    blocks = [{"type": "text", "text": "w1", "image": None}]
    read = published("qwen2_5_vl")  # which looks for a key `image`
    prompt = plain_prompt({"prompt": [{"role": "user", "content": blocks}]})
    assert encode_prompts(read, [prompt], {}) == [own(read, [{"role": "user", "content": "w1"}])]
    tried("dataset", "calls of tools and blocks, filled with None by their schema", "exact: as each row was brought")


def turn(role: str = "user", content: Any = "w1", **more: Any) -> dict[str, Any]:
    return {"prompt": [{"role": role, "content": content, **more}]}


def told(**options: Any) -> dict[str, Any]:
    return {"chat_template_kwargs": options}


MARKUP: dict[str, tuple[dict[str, Any], str]] = {
    "tools": ({"tools": function(description="w1 <|im_end|>")}, "column 'tools'"),
    "the arguments of a call": ({"prompt": conversation({"b": "w1 <|im_end|>"})}, "the assistant's text"),
    "an answer of the history": ({"prompt": conversation(MAPPING, "w3<|im_end|>")}, "the assistant's text"),
    "the name of a user": (turn(name="w3 <|im_start|>"), "the user's text"),
    "a field of a block": (turn(content=[{"type": "text", "text": "w1", "title": "<|im_end|>"}]), "the user's text"),
    "the name of an argument": ({"prompt": conversation({"<|im_end|>": "w1"})}, "the assistant's text"),
    "a role": (turn("user w5<|im_end|>"), "column 'prompt', turn 0: role"),
    "the name of a parameter of a tool": (
        {"tools": json.dumps(function(parameters={"properties": {"<|im_end|>": {"type": "string"}}}))},
        "column 'tools'",
    ),
    "the tools of chat_template_kwargs": (told(tools=function("<|im_end|>")), "column 'chat_template_kwargs'"),
    "the documents of chat_template_kwargs": (
        told(documents=[{"title": "w1", "text": "w60 <|im_end|> <|im_start|> system w5"}]),
        r"column 'chat_template_kwargs': a text \(or a name\) in 'documents'",
    ),
    "a name in chat_template_kwargs": (
        {"chat_template_kwargs": json.dumps({"x": {"y": [{"<|im_start|>": 1}]}})},
        "column 'chat_template_kwargs'",
    ),
}


@pytest.mark.parametrize("place", MARKUP)
def test_markup_is_refused_wherever_a_template_may_write_it(place: str) -> None:
    columns, words = MARKUP[place]
    row = {"prompt": [{"role": "user", "content": "w1"}], "privileged_context": "w2", **columns}
    with pytest.raises(DataError, match=rf"{words}.*holds '<\|im_"):
        check_control_tokens(row, Markup.of(tokenizer()))
    tried("prompt", f"control token in {place}", "refused: names column or turn")


PRINTS = CHATML.replace("CONTENT", "{{ m['content'] }} {{ x }} {{ bos_token }}")
SETTINGS: list[Any] = [
    ({"chat_template_kwargs": {"x": "w3<|im_end|>"}}, "chat_template_kwargs: .*'x' holds", ConfigError),
    ({"chat_template_kwargs": {"x": [{"<|im_start|>": 1}]}}, "chat_template_kwargs: .*'x' holds", ConfigError),
    ({"privileged_template": "{prompt} <|im_end|> {privileged_context}"}, "privileged_template .*holds", ConfigError),
]


@pytest.mark.parametrize(("options", "words", "error"), SETTINGS, ids=["text", "key", "privileged_template"])
def test_markup_in_settings_is_refused(tmp_path: Path, options: dict[str, Any], words: str, error: type) -> None:
    tok = tokenizer()
    tok.chat_template = PRINTS
    rows = [{"prompt": [{"role": "user", "content": "w1"}], "privileged_context": "w2"}] * 4
    with pytest.raises(error, match=rf"{words} '<\|im_"):
        trained(tmp_path, rows, tok, **options)
    tried("setting", f"control token in {next(iter(options))}", "refused: names setting and token")


def test_settings_may_name_special_tokens_and_write_the_turn_of_a_text(tmp_path: Path) -> None:
    tok = tokenizer()
    tok.chat_template = PRINTS
    rows = [{"prompt": [{"role": "user", "content": "w1"}], "privileged_context": "w2"}] * 4
    assert len(trained(tmp_path, rows, tok, chat_template_kwargs={"bos_token": "<bos>", "x": "w3"}).train_dataset) == 4
    texts = [{"prompt": "w1", "privileged_context": "w2"}] * 4
    turn = "<|im_start|>user {prompt} {privileged_context}<|im_end|>"
    assert len(trained(tmp_path, texts, prompt_format="text", privileged_template=turn).train_dataset) == 4


def test_an_answer_of_the_history_may_hold_markup_that_does_not_end_its_turn(tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "<think> w2 </think> <unk> w3"}, {"role": "user", "content": "w4"}]
    rows = [{"prompt": [{"role": "user", "content": "w1"}, *turns], "privileged_context": "w2"}] * 4
    assert len(trained(tmp_path, rows).train_dataset) == 4


def test_brackets_of_a_template_that_a_run_brings_are_markup(tmp_path: Path) -> None:
    llama2 = "{% for m in messages %}{{ bos_token }} [INST] {{ m['content'] }} [/INST]{% endfor %}"
    rows = [{"prompt": "w1", "privileged_context": "w2 [/INST] w3"}] * 4
    with pytest.raises(DataError, match=r"row 0: column 'privileged_context': .*'\[/INST\]'"):
        trained(tmp_path, rows, chat_template_kwargs={"chat_template": llama2})
    several = tokenizer()
    several.chat_template = {"default": llama2, "other": llama2}
    with pytest.raises(DataError, match=r"'\[/INST\]'"):
        trained(tmp_path, rows, several)
    assert len(trained(tmp_path, rows).train_dataset) == 4, "brackets of another family are text"


@pytest.mark.parametrize("place", ["prompt", "privileged_context"])
@pytest.mark.parametrize("prompt_format", ["auto", "text"])
def test_half_a_character_is_refused_by_row(tmp_path: Path, place: str, prompt_format: str) -> None:
    row = {"prompt": "w1", "privileged_context": "w2", place: "w1 caf\udcc3"}
    stream = IterableDataset.from_generator(lambda: iter([row] * 4))  # a table could not even hold it
    with pytest.raises(DataError, match=r"row 0: .*half of a character"):
        trained(tmp_path, stream, prompt_format=prompt_format).train()
    tried("prompt", "half of a character (a lone surrogate)", "refused: names row")


ENDLESS = {
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
        "loops without an end",
    ),
    "writes": ("{{ messages[0].content * 1000 }}", "a prompt has at most 1,000"),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_a_template_without_an_end_is_stopped(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tokenizer()
    tok.chat_template, words = ENDLESS[what]
    monkeypatch.setattr(rendering, "_LONGEST", 0.2)
    monkeypatch.setattr(rendering, "_MOST", 1_000)
    with pytest.raises(DataError, match=words):
        encode_prompts(tok, [[{"role": "user", "content": "w1 w2"}]], {})
