"""What people bring as prompts: every view holds the user's words, once, where the template puts them, and no other."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
import trl
from compatibility import tried
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from dopd.data.encode import encode_prompts
from dopd.data.views import Conversation, as_conversation, plain_prompt
from dopd.errors import ConfigError, DataError, ModelError
from dopd.tiny.models import TinySpec, build_model

CHATML = (
    "{%- if tools %}<|im_start|>system tools{% for t in tools %} {{ t['function']['name'] }}{% endfor %}<|im_end|>"
    "{%- endif %}{%- for m in messages %}<|im_start|>{{ m['role'] }} CONTENT<|im_end|>{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant {% if enable_thinking is false %}<think> </think> {% endif %}"
    "{% endif %}"
)
# How published templates read `content`.
CONTENTS = {
    "Qwen3: text if it is a string": "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% endif %}",
    "simple: whatever it is": "{{ m['content'] }}",
    "trimmed": "{{ m['content'] | trim }}",
    "blocks joined": (
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for b in m['content'] %}"
        "{% if b['type'] == 'text' %}{{ b['text'] }} {% endif %}{% endfor %}{% endif %}"
    ),
}
WORDS = [f"w{n}" for n in range(60)] + [
    "user",
    "assistant",
    "system",
    "tool",
    "tools",
    "add",
    ":",
    "hint",
    "<think>",
    "</think>",
]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>", "<unk>"]
STUDENT, TEACHER = TinySpec(num_layers=1, hidden_size=32), TinySpec(num_layers=1, hidden_size=48)


def tokenizer(
    content: str = CONTENTS["Qwen3: text if it is a string"], *, adds_bos: bool = False, chat: bool = True
) -> Any:
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|im_end|>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>"],
        padding_side="left",
        chat_template=CHATML.replace("CONTENT", content) if chat else None,
    )


def trained(folder: Path, rows: Any, tok: Any = None, method: str = "dopd", **options: Any) -> Any:
    tok = tok or tokenizer()
    data = rows if isinstance(rows, Dataset | IterableDataset) else Dataset.from_list(rows)
    return kit.trainer(
        folder,
        method,
        model=build_model(STUDENT, tok, 0),
        teacher_model=build_model(TEACHER, tok, 1),
        processing_class=tok,
        train_dataset=data,
        **{"privileged_template": "{prompt} hint {privileged_context}", "shuffle_dataset": False} | options,
    )


def user(*texts: str) -> list[dict[str, Any]]:
    blocks = [{"type": "text", "text": text} for text in texts]
    return [{"role": "user", "content": texts[0] if len(texts) == 1 else blocks}]


def asked(text: str, *, thinking: bool = True) -> str:
    return f"<|im_start|>user {text}<|im_end|><|im_start|>assistant " + ("" if thinking else "<think> </think>")


def words_of(tok: Any, view_ids: Any, mask: Any) -> str:
    return tok.decode(view_ids[mask.bool()].tolist())


def check_views(made: Any, tok: Any, plain: list[str], privileged: list[str]) -> None:
    """The trained prompts, and the privileged ones, are these texts; expected ids come from the tokenizer alone."""
    rows = [made.train_dataset[n] for n in range(len(plain))]
    made.model.train()
    batch = kit.answered(made, rows)
    rows = [as_conversation(row) for row in rows] if made.prompts.asks_text else rows
    read = {
        "plain": (batch["prompt_ids"], batch["prompt_mask"], plain),
        "privileged": (*(lambda v: (v.prompt_ids, v.prompt_mask))(kit.privileged_view(made, rows)), privileged),
    }
    for name, (ids, mask, texts) in read.items():
        expected = [tok(text, add_special_tokens=False)["input_ids"] for text in texts]
        assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == expected, name


PUBLISHED = sorted(
    path for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if "_training" not in path.stem
)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_templates_render_text_blocks_and_history_alike(path: Path) -> None:
    """As TRL ships them. Expected is the template's own rendering of the kind of content that it was written for."""
    tok = tokenizer()
    tok.chat_template = path.read_text(encoding="utf-8")
    reads_blocks_alone = path.stem in ("idefics3", "smolvlm", "llava_next")

    def own(*turns: tuple[str, str]) -> list[int]:
        contents = [[{"type": "text", "text": text}] if reads_blocks_alone else text for _, text in turns]
        messages = [{"role": role, "content": content} for (role, _), content in zip(turns, contents, strict=True)]
        text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tok(text, add_special_tokens=False)["input_ids"]

    history = [*user("w1"), {"role": "assistant", "content": "w2"}, *user("w3 'w4'")]
    assert encode_prompts(tok, [user("w1 w2")], {}) == [own(("user", "w1 w2"))]
    assert encode_prompts(tok, [[{"role": "user", "content": [{"type": "text", "text": "w1 w2"}]}]], {}) == [
        own(("user", "w1 w2"))
    ]
    assert encode_prompts(tok, [history], {}) == [own(("user", "w1"), ("assistant", "w2"), ("user", "w3 'w4'"))]
    tried("prompt", f"chat template {path.stem}", "exact: text, blocks and history")


NULLS: dict[str, dict[str, Any]] = {
    "no image column": {},
    "images: null": {"images": None},
    "image: null": {"image": None},
    "images: []": {"images": []},
    "columns of a schema made for text and images": {"images": None, "image": None, "privileged_images": None},
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("nulls", NULLS)
def test_image_columns_without_images_change_nothing_of_a_text_prompt(tmp_path: Path, content: str, nulls: str) -> None:
    tok = tokenizer(CONTENTS[content])
    rows = [{"prompt": user(f"w{n} w7"), "privileged_context": f"w{n + 20}", **NULLS[nulls]} for n in range(4)]
    made = trained(tmp_path, rows, tok)
    plain = [asked(f"w{n} w7") for n in range(4)]
    check_views(made, tok, plain, [asked(f"w{n} w7 hint w{n + 20}") for n in range(4)])
    tried("dataset", nulls, "exact: every view holds the prompt")


@pytest.mark.parametrize("content", CONTENTS)
def test_blocks_of_text_are_read_as_text_by_every_template(tmp_path: Path, content: str) -> None:
    tok = tokenizer(CONTENTS[content])
    rows = [{"prompt": user(f"w{n}", "w8"), "privileged_context": f"w{n + 20}"} for n in range(4)]
    made = trained(tmp_path, rows, tok)
    plain = [asked(f"w{n} w8") for n in range(4)]
    check_views(made, tok, plain, [asked(f"w{n} w8 hint w{n + 20}") for n in range(4)])
    tried("prompt", f"text blocks, template {content}", "exact: read as text")


READS_BLOCKS_OF = (
    "{% if m['role'] == 'ROLE' and m['content'] is not string %}"
    "{% for b in m['content'] %}{{ b['text'] }} {% endfor %}{% else %}{{ m['content'] }}{% endif %}"
)


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_blocks_are_text_for_the_roles_whose_blocks_a_template_does_not_read(role: str) -> None:
    tok = tokenizer(READS_BLOCKS_OF.replace("ROLE", role))
    conversation = [("system", "w1"), ("user", "w2"), ("assistant", "w3"), ("tool", "w4"), ("user", "w5")]
    in_text = [{"role": name, "content": text} for name, text in conversation]
    in_blocks = [{"role": name, "content": [{"type": "text", "text": text}]} for name, text in conversation]
    by_turns = [blocks if n % 2 else text for n, (text, blocks) in enumerate(zip(in_text, in_blocks, strict=True))]
    written = "".join(f"<|im_start|>{name} {text}<|im_end|>" for name, text in conversation)
    for turns in (in_text, in_blocks, by_turns):
        assert encode_prompts(tok, [turns], {}) == [tok.encode(f"{written}<|im_start|>assistant ")]
    tried("prompt", f"text blocks in every turn, template reads those of the {role} alone", "exact: read as text")


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("blocks", [False, True])
def test_the_student_of_privileged_both_reads_p_with_every_template(tmp_path: Path, content: str, blocks: bool) -> None:
    tok = tokenizer(CONTENTS[content])
    texts = ("w1", "w2") if blocks else ("w1 w2",)
    rows = [{"prompt": user(*texts), "privileged_context": "w20", "images": None} for _ in range(4)]
    made = trained(tmp_path, rows, tok, "privileged_both")
    both = [asked("w1 w2 hint w20")] * 4
    check_views(made, tok, both, both)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_text_prompt_is_asked_as_a_users_turn_where_there_is_a_template(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, streamed: bool
) -> None:
    tok = tokenizer()
    rows = [{"prompt": f"w{n}", "privileged_context": f"w{n + 20}"} for n in range(4)]
    data = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    made = trained(tmp_path, data, tok, chat_template_kwargs={"enable_thinking": False})
    if streamed:
        seen = kit.scored(made)
        made.train()
        ids, mask = seen[0]["prompt_ids"], seen[0]["prompt_mask"]
        assert {words_of(tok, i, m) for i, m in zip(ids, mask, strict=True)} <= {
            tok.decode(tok(asked(row["prompt"], thinking=False))["input_ids"]) for row in rows
        }
        return
    assert "asked as a user's turn" in caplog.text and "prompt_format='text'" in caplog.text
    plain = [asked(f"w{n}", thinking=False) for n in range(4)]
    check_views(made, tok, plain, [asked(f"w{n} hint w{n + 20}", thinking=False) for n in range(4)])
    tried(
        "prompt",
        "plain text, tokenizer with a chat template",
        "asked as a user's turn, told; prompt_format='text' as it stands",
    )


def test_evaluation_probes_and_verifier_read_text_as_training_does(tmp_path: Path) -> None:
    tok = tokenizer()
    rows = [{"prompt": f"w{n}", "privileged_context": "w20", "answer": "w1"} for n in range(4)]
    seen: list[Any] = []

    def verifier(completion: str, row: Any) -> float:
        seen.append(row["prompt"])
        return 0.0

    model = kit.many_ends(build_model(STUDENT, tok, 0), 40)
    model.generation_config.eos_token_id = list(range(4, 60))
    made = kit.trainer(
        tmp_path,
        model=model,
        teacher_model=build_model(TEACHER, tok, 1),
        processing_class=tok,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        verifier=verifier,
        student_eval_steps=1,
        trace_steps=1,
        trace_probes=2,
    )
    read: list[str] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        if ids.shape[1] > 1 and (mask is None or ids.shape == mask.shape):  # begins a sequence, goes on with none
            read.extend(tok.batch_decode(ids))

    made.model.model.register_forward_pre_hook(keep, with_kwargs=True)
    made.train()
    assert set(seen) == {f"w{n}" for n in range(4)}, "the verifier gets the row as it was brought"
    begun = [text.replace("<pad> ", "").replace("<pad>", "") for text in read]
    assert len(begun) > 20 and all(text.startswith("<|im_start|> user w") for text in begun)


@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_for_base_models_stands_as_it_is_with_one_beginning(tmp_path: Path, adds_bos: bool) -> None:
    tok = tokenizer(adds_bos=adds_bos)
    rendered = asked("w3")
    rows = [{"prompt": text} for text in ("w1 w2", f"<bos> {rendered}", "w4", rendered)]
    made = trained(tmp_path, rows, tok, "vanilla", prompt_format="text")
    start = "<bos> " if adds_bos else ""
    expected = [f"{start}w1 w2", f"<bos> {rendered}", f"{start}w4", start + rendered]
    check_views(made, tok, expected, expected)
    tried("prompt", "rendered text that begins with BOS, prompt_format='text'", "exact: one BOS")


LLAMA2 = "{% for m in messages %}{{ bos_token }} [INST] {{ m['content'] }} [/INST]{% endfor %}"


@pytest.mark.parametrize("column", ["prompt", "privileged_context"])
def test_brackets_of_the_template_are_markup_though_no_special_tokens(tmp_path: Path, column: str) -> None:
    tok = tokenizer()
    tok.chat_template = LLAMA2
    rows = [{"prompt": "w1", "privileged_context": "w2 [w3]", column: "w1 [/INST] w2"}] * 4
    with pytest.raises(DataError, match=rf"row 0: column '{column}': .*'\[/INST\]'"):
        trained(tmp_path, rows, tok)
    tried("prompt", "[/INST] in a text, Llama 2's template", "refused: names row, column and token")


REFUSED = [
    ({"prompt": asked("w3")}, {}, r"row 1: column 'prompt': .*markup.*prompt_format='text'", "rendered text"),
    (
        {"prompt": asked("w3")},
        {"prompt_format": "text"},
        r"row 1: column 'prompt': .*stand outside of its turn",
        "rendered text with p, prompt_format='text'",
    ),
    ({"prompt": "<bos> w3"}, {"prompt_format": "text"}, "outside of its turn", "BOS with p, prompt_format='text'"),
    (
        {"privileged_context": "w20 <|im_end|> w1"},
        {},
        r"row 1: column 'privileged_context': .*'<\|im_end\|>'",
        "control token in p",
    ),
    (
        {"prompt": "w1<|im_start|>system"},
        {},
        r"row 1: column 'prompt': the user's text holds",
        "control token in a prompt",
    ),
]


@pytest.mark.parametrize(("change", "options", "words", "what"), REFUSED, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("streamed", [False, True])
def test_text_that_would_act_as_markup_is_refused_by_row(
    tmp_path: Path, change: dict[str, Any], options: dict[str, Any], words: str, what: str, streamed: bool
) -> None:
    rows = [{"prompt": f"w{n}", "privileged_context": "w20"} for n in range(4)]
    rows[1] |= change
    data = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    with pytest.raises(DataError, match=words):
        trained(tmp_path, data, **options).train()
    tried("prompt", what, "refused: names row, column and token")


CONVERSATIONS: list[tuple[Any, str, str]] = [
    (
        [*user("w1"), {"role": "assistant", "content": "w9"}],
        "last turn is the assistant's.*continue_final_message",
        "gold answer as last turn",
    ),
    ([*user("w1"), {"role": "system", "content": "w9"}], "last turn is the system's", "system turn last"),
    ([{"role": "user", "content": None}], "turn 0: the user's turn has no content", "content: null"),
    ([{"role": "user", "content": "  "}], "turn 0: the user's turn is empty", "blank user turn"),
    ([{"role": "user", "content": [{"type": "text", "text": " "}]}], "user's turn is empty", "blank text block"),
    ([{"role": "user", "content": []}], "user's turn is empty", "no blocks"),
    (
        [{"role": "user", "content": [{"type": "video", "video": "a"}, {"type": "text", "text": "w1"}]}],
        "block of type 'video'",
        "video block, text model",
    ),
    ([{"role": "user", "content": [{"type": "text"}]}], "no 'text'", "text block without text"),
    ([{"role": "user"}], "has no content", "no content"),
]


@pytest.mark.parametrize(("prompt", "words", "what"), CONVERSATIONS, ids=lambda value: str(value)[:40])
def test_a_conversation_that_cannot_be_answered_is_refused_by_row(
    tmp_path: Path, prompt: list[dict[str, Any]], words: str, what: str
) -> None:
    rows = [{"prompt": p, "privileged_context": "w20"} for p in (prompt, prompt)]
    with pytest.raises(DataError, match=f"(?s)row 0.*{words}"):
        trained(tmp_path, rows, per_device_train_batch_size=8, num_generations=4)
    tried("prompt", what, "refused: names row and turn")


def test_an_answer_that_is_begun_is_continued_if_asked(tmp_path: Path) -> None:
    tok = tokenizer()
    rows = [
        {"prompt": [*user(f"w{n}"), {"role": "assistant", "content": "w9"}], "privileged_context": "w20"}
        for n in range(4)
    ]
    made = trained(tmp_path, rows, tok, chat_template_kwargs={"continue_final_message": True})
    begun = "<|im_end|><|im_start|>assistant w9"
    plain = [f"<|im_start|>user w{n}{begun}" for n in range(4)]
    check_views(made, tok, plain, [f"<|im_start|>user w{n} hint w20{begun}" for n in range(4)])
    tried("prompt", "last turn the assistant's, continue_final_message", "exact: continued")


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


def test_tools_and_template_arguments_of_a_row_are_rendered_in_every_view(tmp_path: Path) -> None:
    tok = tokenizer()
    rows = [
        {"prompt": user(f"w{n}"), "privileged_context": "w20", "tools": tools, "chat_template_kwargs": options}
        for n, (tools, options) in enumerate([("[]", None), (None, '{"enable_thinking": false}')])
    ]
    rows[0]["tools"] = json.dumps([TOOL])
    made = trained(tmp_path, rows * 2, tok)
    plain = ["<|im_start|>system tools add<|im_end|>" + asked("w0"), asked("w1", thinking=False)]
    privileged = ["<|im_start|>system tools add<|im_end|>" + asked("w0 hint w20"), asked("w1 hint w20", thinking=False)]
    check_views(made, tok, plain, privileged)
    nested = [{"prompt": user("w1"), "privileged_context": "w20", "tools": [TOOL]}] * 4
    check_views(
        trained(tmp_path / "b", nested, tok), tok, [plain[0].replace("w0", "w1")], [privileged[0].replace("w0", "w1")]
    )
    tried("dataset", "columns tools and chat_template_kwargs", "used in every view")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"tools": "not json"}, "column 'tools' is text that is not JSON"),
        ({"tools": '{"a": 1}'}, "column 'tools' must be a list"),
        ({"chat_template_kwargs": '{"tokenize": true}'}, "column 'chat_template_kwargs': tokenize cannot be set"),
    ],
)
def test_tools_and_arguments_that_cannot_be_used_are_refused(tmp_path: Path, columns: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"row 0: {words}"):
        trained(tmp_path, [{"prompt": user("w1"), "privileged_context": "w20", **columns}] * 4)


def test_rows_that_differ_in_their_tools_alone_are_different_prompts() -> None:
    row = {"prompt": user("w1")}
    with_tools, without = plain_prompt({**row, "tools": [TOOL]}), plain_prompt(row)
    assert (
        isinstance(with_tools, Conversation)
        and with_tools != without
        and with_tools == plain_prompt({**row, "tools": [TOOL]})
    )
    tok = tokenizer()
    several = encode_prompts(tok, [with_tools, without, without], {})
    assert several[0] != several[1] == several[2]


def test_fields_that_a_schema_adds_are_no_part_of_a_turn(tmp_path: Path) -> None:
    """One row with a name gives every turn of the column a name: None in the others."""
    tok = tokenizer("{% if m['name'] is defined %}w50 {% endif %}{{ m['content'] }}")
    rows = [{"prompt": [{"role": "user", "content": f"w{n}"}], "privileged_context": "w20"} for n in range(4)]
    rows[3]["prompt"][0]["name"] = "w9"
    check_views(
        trained(tmp_path, rows, tok), tok, [asked("w0"), asked("w1")], [asked("w0 hint w20"), asked("w1 hint w20")]
    )


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
        ("{{ messages[0]['text']['no'] }}", "refuses the conversation"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "leaves out text of the user's turn: 'w1'"),
        ("{% for m in messages %}{{ m['content'][:1] }}{% endfor %}", "leaves out text of the user's turn"),
    ],
)
def test_a_template_that_is_missing_refuses_or_forgets_is_said_with_the_row(
    tmp_path: Path, template: str | None, words: str
) -> None:
    tok = tokenizer(chat=False)
    tok.chat_template = template
    with pytest.raises(DataError, match=f"row 0: column 'prompt': .*{words}"):
        trained(tmp_path, [{"prompt": user("w1"), "privileged_context": "w20"}] * 4, tok)


def test_two_beginnings_are_refused(tmp_path: Path) -> None:
    tok = tokenizer()
    tok.chat_template = "{{ bos_token }} <bos> {{ messages[0]['content'] }}"
    with pytest.raises(DataError, match="two '<bos>' tokens"):
        trained(tmp_path, [{"prompt": user("w1"), "privileged_context": "w20"}] * 4, tok)


def test_columns_that_nothing_reads_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": user("w1"), "privileged_context": "w20", "system": "w3", "hints": "w4", "level": 3}] * 4
    trained(tmp_path, [{**row, "teacher_chat_template_kwargs": {"enable_thinking": False}} for row in rows])
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("'system', 'hints'" in text for text in told) and not any("'level'" in text for text in told)
    assert any("'teacher_chat_template_kwargs' are read by nothing" in text for text in told)
    tried("dataset", "columns system, hints, messages", "told: read by nothing but the verifier")


@pytest.mark.parametrize("place", ["prompt", "privileged_context"])
def test_tokens_without_an_embedding_are_refused_before_the_first_rollout(tmp_path: Path, place: str) -> None:
    tok = tokenizer()
    student, teacher = build_model(STUDENT, tok, 0), build_model(TEACHER, tok, 1)
    tok.add_tokens(["new"])
    rows = [{"prompt": "w1", "privileged_context": "w20", place: "w2 new"}] * 4
    with pytest.raises(DataError, match=r"row 0: .*token \d+ .*resize_token_embeddings"):
        kit.trainer(
            tmp_path, model=student, teacher_model=teacher, processing_class=tok, train_dataset=Dataset.from_list(rows)
        )
    tried("checkpoint", "tokens added to the tokenizer, model not resized", "refused before the first rollout")


def test_a_padding_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    tok = tokenizer()
    student, teacher = build_model(STUDENT, tok, 0), build_model(TEACHER, tok, 1)
    tok.add_special_tokens({"pad_token": "[PAD]"})
    rows = Dataset.from_list([{"prompt": "w1", "privileged_context": "w2"}] * 4)
    with pytest.raises(ModelError, match=r"pad_token \(id \d+\) is outside"):
        kit.trainer(tmp_path, model=student, teacher_model=teacher, processing_class=tok, train_dataset=rows)


def test_reserved_template_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add_generation_prompt cannot be set"):
        kit.config(tmp_path, chat_template_kwargs={"add_generation_prompt": False})


def test_scores_behind_a_nulled_column_are_the_models_own(tmp_path: Path) -> None:
    """The whole way: columns, blocks, template, padding, scoring; against one unpadded forward pass of each model."""
    tok = tokenizer()
    rows = [
        {"prompt": user(*[f"w{n}"] * (2 + n)), "privileged_context": f"w{n + 20} " * (4 - n), "images": None}
        for n in range(4)
    ]
    made = trained(tmp_path, rows, tok)
    batch = kit.answered(made, [made.train_dataset[n] for n in range(4)])
    sources = {
        "privileged_teacher": made.unwrapped_teacher,
        "privileged_student": made.unwrapped_student,
    }
    for source, model in sources.items():
        for n, row in enumerate(rows):
            text = asked(" ".join([f"w{n}"] * (2 + n)) + f" hint {row['privileged_context']}")
            prompt = tok(text, add_special_tokens=False)["input_ids"]
            answer = batch["completion_ids"][n][batch["completion_mask"][n].bool()].tolist()
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
            own = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)
            got = batch[f"logprobs/{source}"][n][: len(answer)].double()
            torch.testing.assert_close(got, own, atol=1e-5, rtol=0)
