"""Words that a tokenizer does not know: told with row, column and word, or refused where nothing else is left.

Which words are known is what each vocabulary was made of here.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import vision_kit
from compatibility import tried
from datasets import Dataset, IterableDataset
from test_prompts import CHATML, CONTENTS, tokenizer, trained, user
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dopd.data.control import Markup
from dopd.data.encode import PromptLengths
from dopd.data.unknown import Reader, UnknownWords
from dopd.data.views import PrivilegedTemplate, lacks_privileged
from dopd.errors import DataError
from dopd.runs.inspection import inspect_prompt

KNOWN = ["hello", "world", "good"]
LETTERS = sorted({letter for word in KNOWN for letter in word})
END = "<|endoftext|>"
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def fast(model: Any, before: Any, *, norm: Any = None, **named: str) -> Any:
    backend = Tokenizer(model)
    backend.pre_tokenizer = before
    if norm is not None:
        backend.normalizer = norm
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def unigram(*more: str, **options: Any) -> Any:
    scored = [("<unk>", 0.0), ("\u2581", -5.0), *((f"\u2581{word}", -1.0) for word in KNOWN)]
    pieces = [*scored, *((letter, -4.0) for letter in LETTERS), *((piece, -9.0) for piece in more)]
    return fast(models.Unigram(pieces, unk_id=0, **options), pre_tokenizers.Metaspace(), unk_token="<unk>")


def byte_level(alphabet: list[str], **named: str) -> Any:
    vocabulary = {symbol: number for number, symbol in enumerate([END, *alphabet])}
    return fast(models.BPE(vocab=vocabulary, merges=[]), pre_tokenizers.ByteLevel(add_prefix_space=False), **named)


def word_level(unk: str = "<unk>", **named: str) -> Any:
    words = {word: number for number, word in enumerate(["<unk>", END, *KNOWN])}
    return fast(models.WordLevel(words, unk_token=unk), pre_tokenizers.WhitespaceSplit(), **named)


def word_piece() -> Any:
    pieces = ["[UNK]", "hello", "world", "go", "##od", "."]
    model = models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]")
    return fast(model, pre_tokenizers.BertPreTokenizer(), norm=normalizers.BertNormalizer(), unk_token="[UNK]")


def python_tokenizer(folder: Path) -> Any:
    """One without offsets, written in Python."""
    from transformers.models.bert_japanese.tokenization_bert_japanese import BertJapaneseTokenizer

    path = folder / "vocab.txt"
    path.write_text("\n".join(["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]", *KNOWN]))
    return BertJapaneseTokenizer(
        str(path), word_tokenizer_type="basic", subword_tokenizer_type="wordpiece", do_lower_case=True
    )


LOSING = {
    "words": (word_level(unk_token="<unk>"), {"hello zzz": "zzz", "zzz": "zzz", "hello world": None}),
    "words, unknown token not declared": (word_level(), {"hello zzz": "zzz", "<unk> hello": None, "None": "None"}),
    "words, unknown token also ends texts": (
        word_level(END, unk_token=END, eos_token=END, bos_token=END),
        {"hello zzz": "zzz", "good": None},
    ),
    "words, unknown token also pads": (word_level(unk_token="<unk>", pad_token="<unk>"), {"a hello": "a"}),
    "pieces of words": (word_piece(), {"Hello good.": None, "hello goodly": "goodly", "\u597d good": "\u597d"}),
    "unigrams": (unigram(), {"hello whole": None, "hello wh\u00f6le": "wh\u00f6le", "<unk>": None}),
    "letters": (
        fast(
            models.BPE(vocab={c: n for n, c in enumerate(["<unk>", *LETTERS])}, merges=[], unk_token="<unk>"),
            pre_tokenizers.Whitespace(),
            unk_token="<unk>",
        ),
        {"whole": None, "who\u00e9le d": "who\u00e9le"},
    ),
    "letters without an unknown token": (
        fast(models.BPE(vocab={c: n for n, c in enumerate(LETTERS)}, merges=[]), pre_tokenizers.Whitespace()),
        {"whole": None, "hello zzz": "zzz", "zzz hello": "zzz", "hello.": None},
    ),
    "some bytes": (byte_level(sorted({*LETTERS, "\u0120"})), {"hello world": None, "hello zzz": "zzz"}),
}
KEEPING = {
    "all bytes": byte_level(BYTES, eos_token=END),
    "all bytes, as GPT-2 names them": byte_level(BYTES, eos_token=END, bos_token=END, unk_token=END),
    "unigrams with bytes to fall back on": unigram(*(f"<0x{n:02X}>" for n in range(256)), byte_fallback=True),
}


@pytest.mark.parametrize("name", LOSING)
def test_unknown_words_are_found(name: str) -> None:
    made, cases = LOSING[name]
    reader = Reader("the tokenizer", made)
    assert {text: reader.first_in(text) for text in cases} == cases
    tried("prompt", f"words that are unknown to a tokenizer of {name}", "told: row, column and word")


@pytest.mark.parametrize("name", KEEPING)
def test_a_tokenizer_of_bytes_knows_every_text(name: str) -> None:
    reader = Reader("the tokenizer", KEEPING[name])
    assert not reader.loses
    for text in ("zzz \u597d \U0001f600", END, "\u00e4\u00b4\u00ad"):
        assert reader.first_in(text) is None
    tried("prompt", f"words that no tokenizer of {name} can miss", "exact: never told")


def test_a_tokenizer_without_offsets_is_asked_word_by_word(tmp_path: Path) -> None:
    made = python_tokenizer(tmp_path)
    assert not made.is_fast
    reader = Reader("the tokenizer", made)
    assert [reader.first_in(text) for text in ("hello zzz good", "hello world", "[UNK] good")] == ["zzz", None, None]


def test_the_end_of_texts_is_markup_though_it_is_the_unknown_token_too() -> None:
    made = KEEPING["all bytes, as GPT-2 names them"]
    assert Markup.of(made).first_in([f"hello {END} world"]) == END
    assert Markup.of(word_level(unk_token="<unk>")).first_in(["hello <unk> zzz"]) is None


CHAT = {"prompt": [{"role": "user", "content": "w1 w2"}], "privileged_context": "w3"}
WHOLE: dict[str, tuple[dict[str, Any], str]] = {
    "p": ({"privileged_context": "hello world zzz"}, r"row 2, column 'privileged_context' \(='hello world zzz'\)"),
    "p, known punctuation": ({"privileged_context": "zzz : yyy"}, "row 2, column 'privileged_context'"),
    "text": ({"prompt": "hello zzz"}, r"row 2, column 'prompt' \(='hello zzz'\)"),
    "last turn": (
        {"prompt": [*CHAT["prompt"], {"role": "assistant", "content": "w4"}, {"role": "user", "content": "zzz"}]},
        r"row 2, column 'prompt' \(='zzz'\)",
    ),
    "blocks": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "zzz"}] * 2}]},
        r"row 2, column 'prompt' \(='zzz\\nzzz'\)",
    ),
}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "stream"])
def test_a_row_of_unknown_words_alone_is_refused(tmp_path: Path, name: str, streamed: bool) -> None:
    change, words = WHOLE[name]
    asked = {"text": "w1 w2", "blocks": [{"role": "user", "content": [{"type": "text", "text": "w1"}]}]}
    base = {**CHAT, "prompt": asked.get(name, CHAT["prompt"])}
    rows = [base, base, {**base, **change}, base]
    data = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    with pytest.raises(DataError, match=f"{words}.*knows none of its words and reads '<unk>'.*leave the row out"):
        list(trained(tmp_path, data, logging_steps=1).train_dataset)
    tried("dataset", f"a row with unknown words alone: {name}", "refused: row, column and text")


def test_rows_with_some_unknown_words_are_counted_for_each_column(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    history = [{"role": "user", "content": "zzz"}, {"role": "assistant", "content": "w4"}]
    rows = [
        CHAT,
        CHAT | {"privileged_context": "w3 yyy xxx w4"},
        CHAT | {"prompt": [*history, *CHAT["prompt"]]},
        CHAT | {"prompt": [{"role": "user", "content": "w1 <unk> w2"}], "privileged_context": "w5 yyy"},
    ]
    made = trained(tmp_path, rows, eval_dataset=Dataset.from_list([CHAT | {"privileged_context": "w3 vvv"}]))
    told = [record.message for record in caplog.records if "unknown words" in record.message]
    assert [line.partition(". Write")[0] for line in told] == [
        "column 'privileged_context': unknown words in 2 of 4 rows of train_dataset, the first 'yyy' in row 1, for "
        "which the tokenizer reads '<unk>'",
        "column 'prompt': unknown words in 1 of 4 rows of train_dataset, the first 'zzz' in row 2, for which the "
        "tokenizer reads '<unk>'",
        "column 'privileged_context': unknown words in 1 of 1 rows of eval_dataset, the first 'vvv' in row 0, for "
        "which the tokenizer reads '<unk>'",
    ]
    assert len(made.train_dataset) == 4


def test_a_stream_tells_when_the_count_has_doubled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [CHAT | {"privileged_context": f"w3 {word}"} for word in ("w4", "aaa", "bbb", "ccc", "ddd")]
    list(trained(tmp_path, IterableDataset.from_generator(lambda: iter(rows))).train_dataset)
    told = [record.message for record in caplog.records if "unknown words" in record.message]
    assert [line.split(", the first")[0].rpartition(" in ")[2] for line in told] == [
        f"{n} rows of the stream so far" for n in (1, 2, 4)
    ]
    assert all("'aaa' in row 1" in line for line in told)


def test_what_stands_around_may_make_a_word_unknown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Words of the vocabulary, written together by the template of p."""
    rows = [{"prompt": [{"role": "user", "content": "w1 w2"}], "privileged_context": "w3 w4"}] * 4
    trained(tmp_path, rows, privileged_template="{prompt}{privileged_context} hint")
    told = [record.message for record in caplog.records if "unknown words" in record.message]
    assert len(told) == 2 and all(
        "'w2w3' (a template writes it with what stands beside it) in row 0" in line and "4 of 4" in line
        for line in told
    )
    with pytest.raises(DataError, match=r"row 0, column 'privileged_context' \(='w3'\)"):
        trained(tmp_path, [CHAT] * 4, privileged_template="{prompt}{privileged_context} hint")


TOOL = {"type": "function", "function": {"name": "w9", "description": "w10", "parameters": {"w12": "w11"}}}
WRITES_JSON = "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"


@pytest.mark.parametrize("prompt", ["w1", "w9", "w1 w2"])
def test_words_that_stand_in_a_tool_too_are_looked_for_in_their_own_place(
    tmp_path: Path, prompt: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each word of the turn stands between spaces and is known; the tool is JSON, of which no word is."""
    tok = tokenizer()
    tok.chat_template = "".join(
        (WRITES_JSON, CHATML.replace("CONTENT", CONTENTS["trimmed"]).partition("{%- endif %}")[2])
    )
    tools = {"tools": [TOOL]}
    rows = [CHAT | {"prompt": [{"role": "user", "content": prompt}], "privileged_context": "w10"} | tools] * 4
    trained(tmp_path, rows, tok)
    told = [record.message for record in caplog.records if "unknown words" in record.message]
    assert [line.partition(" in 4 of 4")[0] for line in told] == ["column 'tools': unknown words"]
    rows[1] = rows[1] | {"prompt": [{"role": "user", "content": "zzz"}]}
    with pytest.raises(DataError, match=r"row 1, column 'prompt' \(='zzz'\)"):
        trained(tmp_path, rows, tok)
    tried("dataset", "words of a prompt that stand in its tools, too", "exact: looked for in their own place")


@pytest.mark.parametrize("of_row", [True, False])
def test_unknown_words_that_a_template_is_told_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, of_row: bool
) -> None:
    tok = tokenizer("{{ m['content'] }} {{ x }}")
    options = {"chat_template_kwargs": {"x": "w4 zzz"}}
    own, of_run = (options, {}) if of_row else ({}, options)
    trained(tmp_path, [CHAT | own] * 4, tok, **of_run)
    said = [record.message for record in caplog.records if "unknown words" in record.message]
    name = "column 'chat_template_kwargs'" if of_row else "chat_template_kwargs"
    assert len(said) == 1 and said[0].startswith(
        f"{name}: unknown words in 4 of 4 rows of train_dataset, the first 'zzz'"
    )
    tried("dataset" if of_row else "setting", "unknown words in chat_template_kwargs", "told: rows and word")


CALLED = CHATML.replace(
    "CONTENT", "{{ m['content'] }} {% for c in m['tool_calls'] or [] %} {{ c.function.name }} FIELDS{% endfor %}"
)
FIELDS = "{% for n, v in c.function.arguments.items() %} {{ n }} {{ v }} {% endfor %}"


@pytest.mark.parametrize("as_json", [False, True], ids=["mapping", "JSON"])
@pytest.mark.parametrize("place", ["name", "argument", "value"])
def test_unknown_words_of_calls_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str, as_json: bool
) -> None:
    tok = tokenizer()
    tok.chat_template = CALLED.replace("FIELDS", FIELDS)
    words = {"name": "w9", "argument": "w10", "value": "w11"} | {place: "zzz"}

    def rows(words: dict[str, str]) -> list[dict[str, Any]]:
        arguments: Any = {words["argument"]: words["value"]}
        call = {"function": {"name": words["name"], "arguments": json.dumps(arguments) if as_json else arguments}}
        turns = [{"role": "assistant", "content": "w3", "tool_calls": [call]}, {"role": "user", "content": "w4"}]
        return [CHAT | {"prompt": [*CHAT["prompt"], *turns]}] * 4

    trained(tmp_path, rows(words), tok)
    said = [record.message for record in caplog.records if "unknown words" in record.message]
    assert len(said) == 1 and said[0].startswith(
        "column 'prompt': unknown words in 4 of 4 rows of train_dataset, the first 'zzz' in row 0"
    )
    caplog.clear()
    trained(tmp_path, rows(dict.fromkeys(words, "w9")), tok)
    assert not [record for record in caplog.records if "unknown words" in record.message]
    tried("dataset", f"an unknown word as {place} of a tool call", "warning: column, row and word")


def test_what_a_tokenizer_drops_is_not_said_to_be_its_unknown_token(caplog: pytest.LogCaptureFixture) -> None:
    dropping = fast(
        models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"),
        pre_tokenizers.WhitespaceSplit(),
        norm=normalizers.Replace("\u2211", ""),
        unk_token="[UNK]",
    )
    found = UnknownWords(dropping, None, {}, PrivilegedTemplate())
    for text, instead in (("hello \u2211", "nothing"), ("hello zzz", "'[UNK]'")):
        assert instead == ("nothing" if dropping(text)["input_ids"] == [1] else "'[UNK]'")
        found._first.clear()
        found.look({"prompt": text}, "row 0", [(None, text)])
        assert found._first["column 'prompt'"].endswith(f"the tokenizer reads {instead}")


GLUES = "{% for b in m['content'] %}{% if b['type'] == 'text' %}{{ b['text'] }}{% endif %}{% endfor %}"


def test_blocks_that_a_template_writes_together_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    glued = tokenizer(GLUES)
    trained(tmp_path, [CHAT | {"prompt": user("w1 w2", "w3")}] * 4, glued)
    told = [record.message for record in caplog.records if "unknown words" in record.message]
    assert len(told) == 1 and told[0].startswith(
        "column 'prompt': unknown words in 4 of 4 rows of train_dataset, the first 'w2w3' (a template writes it "
        "with what"
    )
    with pytest.raises(DataError, match=r"row 0, column 'prompt' \(='w2\\nw3'\)"):
        trained(tmp_path, [CHAT | {"prompt": user("w2", "w3")}] * 4, glued)
    caplog.clear()
    trained(tmp_path, [CHAT | {"prompt": user("w1 w2 ", "w3")}] * 4, glued)
    assert not [record for record in caplog.records if "unknown words" in record.message]
    tried(
        "prompt", "text blocks that a template writes without a space between them", "told where it makes unknown words"
    )


def test_unknown_words_of_templates_refuse_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strange = tokenizer()
    strange.chat_template = CHATML.replace("CONTENT", CONTENTS["trimmed"]).replace("{{ m['role'] }}", "Speaker says")
    made = trained(tmp_path, [CHAT] * 4, strange, privileged_template="{prompt} Psst {privileged_context}")
    told = [record.message for record in caplog.records if "unknown words" in record.message]
    assert len(told) == 1 and told[0].startswith(
        "privileged_template: unknown words in 4 of 4 rows of train_dataset, the first 'Psst' in row 0"
    )
    assert len(made.train_dataset) == 4


def test_columns_that_no_view_reads_are_not_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [CHAT | {"privileged_context": "zzz", "contrast_context": "yyy"}] * 4
    trained(tmp_path, rows, method="vanilla")
    trained(tmp_path, [row | {"privileged_context": "w4"} for row in rows])
    assert not [record for record in caplog.records if "unknown words" in record.message]


def test_processors_of_pictures_and_a_teacher_s_own(caplog: pytest.LogCaptureFixture) -> None:
    mine, theirs = vision_kit.processor("qwen3_vl"), vision_kit.processor("llava")
    template = PrivilegedTemplate("{prompt} {privileged_context}")

    def found(text: str, told: str) -> list[str]:
        row = {"prompt": vision_kit.user(text, vision_kit.picture(0)), "privileged_context": told}
        looked = UnknownWords(mine, theirs, {}, template)
        return looked.look(row, "row 5", [(None, row["prompt"]), (told, template.apply(row["prompt"], told))])

    assert found("how many red", "box 1") == []
    assert found("how many zzz", "box 1") == ["column 'prompt'"]
    assert found("how many red", "box zzz") == ["column 'privileged_context'"]
    with pytest.raises(DataError, match="row 5, column 'privileged_context'"):
        found("how many red", "zzz")
    theirs.tokenizer = word_level(unk_token="<unk>")
    theirs.tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"row 5, column 'prompt'.*the teacher's tokenizer knows none"):
        found("how many red", "box 1")


def test_inspection_and_evaluation_look_too(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = "tiny:dag/student", "tiny:dag/teacher"
    prompt = "A B"
    with pytest.raises(DataError, match=r"column 'privileged_context' \(='hello world zzz'\).*'<unk>'"):
        inspect_prompt(student, teacher, prompt, "hello world zzz")
    inspect_prompt(student, teacher, prompt, " ", max_new_tokens=2)
    assert "privileged context (=' ') is blank" in caplog.records[-1].message
    caplog.clear()
    with pytest.raises(DataError, match=r"column 'prompt' \(='hello'\)"):
        inspect_prompt(student, teacher, "hello", None)
    for empty in ("", " ", "\ufeff"):
        with pytest.raises(DataError, match="column 'prompt': the text is empty"):
            inspect_prompt(student, teacher, empty, None)
    with pytest.raises(DataError, match="a conversation written as text"):
        inspect_prompt(student, teacher, '[{"role": "user", "content": "A"}]', None)
    with pytest.raises(DataError, match=r"completion \(='A zzz'\).*does not know 'zzz'"):
        inspect_prompt(student, teacher, prompt, None, completion="A zzz")
    inspect_prompt(student, teacher, f"{prompt} zzz", None, max_new_tokens=2)
    told = [record for record in caplog.records if "unknown words" in record.message]
    assert [record.levelno for record in told] == [logging.WARNING]
    assert "column 'prompt': unknown words in 1 of 1 rows of the prompts, the first 'zzz'" in told[0].message


INVISIBLE = ["\ufeff", "\u200b \u200d", "\u00a0\u00ad", "\0"]


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_a_text_of_which_nothing_is_seen_is_none(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert lacks_privileged({"privileged_context": text})
    template = PrivilegedTemplate()
    assert template.apply(CHAT["prompt"], text) == CHAT["prompt"] and template.apply("w1", text) == "w1"
    trained(tmp_path, [CHAT, CHAT | {"privileged_context": text}] * 2)
    assert any("2 of 4 prompts have no privileged_context" in record.message for record in caplog.records)
    for prompt in (text, [{"role": "user", "content": text}], user(text, text)):
        with pytest.raises(DataError, match=r"row 0, column 'prompt'.*is empty"):
            trained(tmp_path, [{"prompt": prompt, "privileged_context": "w3"}] * 4)
    assert not any(
        map(lacks_privileged, [{"privileged_context": seen} for seen in ("\u4e2d", "!", "\ue000", "\ud800")])
    )
    tried("dataset", "p or prompt of invisible characters", "as empty text: p is missing, a prompt is refused")


RAISING = {
    "words": fast(models.WordLevel({"w1": 0, "w2": 1}, unk_token="<unk>"), pre_tokenizers.WhitespaceSplit()),
    "unigrams": fast(models.Unigram([("\u2581w1", -1.0), ("\u2581w2", -1.0)]), pre_tokenizers.Metaspace()),
}


@pytest.mark.parametrize("name", RAISING)
def test_what_a_tokenizer_raises_is_said_of_the_row(name: str) -> None:
    made = RAISING[name]
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert not Reader("the tokenizer", made).loses
    if name == "words":
        assert PromptLengths(made, {})(["w1 w2", "w1"]) == [2, 1]
    for prompt in ("w1 w3", user("w3")):
        with pytest.raises(DataError, match=r"the tokenizer cannot read it: Exception: .*(nknown|UNK)"):
            PromptLengths(made, {})([prompt])
    tried("prompt", f"unknown words, a tokenizer of {name} without an unknown token", "refused: names the row")
