"""Words of a row that a tokenizer does not know: it reads the unknown token for them, or nothing at all."""

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dopd.data.blocks import texts_of
from dopd.data.control import strings_in
from dopd.data.encode import text_of, tokenizer_of
from dopd.data.findings import Findings
from dopd.data.rendering import CALLS
from dopd.data.views import TEMPLATE_COLUMN, PrivilegedTemplate, Prompt, is_blank, row_options, with_turns
from dopd.errors import DataError, cut
from dopd.sources import CONTEXT_COLUMNS

# The context of a view (p, `None` for the plain one), and its prompt.
ShownPrompt = tuple[str | None, Prompt]
Span = tuple[int, int]

# Two letters that share no byte: a tokenizer that reads both alike reads them as unknown.
_RARE = ("\ua66e", "\U00012345")
# Every byte that UTF-8 has, in characters of one to four bytes.
_ALL_BYTES = " ".join(
    "".join(chr(code) for code in codes if unicodedata.category(chr(code))[0] in "LMNPS")
    for codes in (range(0x20, 0x800), range(0x800, 0x10000, 0x1000), range(0x10000, 0x110000, 0x10000))
)
_TEMPLATE, _METHOD = "privileged_template", "what the method tells the teacher"
_PROMPT = "column 'prompt'"
_OTHER = "qanothertextq"  # in the place of a text, to see where that is
_FIX = "Write it in words of the vocabulary, or take models with another tokenizer"


@dataclass(frozen=True)
class _Piece:
    """Texts of a row: what they are of, the turn that they stand in, and whether a view without a word of them is of
    no use. Texts among a template's options stand in no turn, and may stand nowhere.
    """

    field: str
    texts: Sequence[str]
    turn: int | None
    needed: bool = False


@dataclass
class Reader:
    """A tokenizer, and what it does with what it does not know.

    Attributes:
        who (`str`): in messages.
        processing_class: a tokenizer or a processor.
    """

    who: str
    processing_class: Any
    tokenizer: Any = field(init=False)
    unknown: frozenset[int] = field(init=False)
    names: frozenset[str] = field(init=False, default=frozenset())
    loses: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.tokenizer = tokenizer_of(self.processing_class)
        self.unknown = frozenset({self.tokenizer.unk_token_id} - {None})
        try:
            first, second = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in _RARE)
            if (
                first == second
                and first
                and str(self.tokenizer.convert_ids_to_tokens(first[-1])).strip("\u2581\u0120 ")
            ):
                self.unknown |= {first[-1]}
            self.names = frozenset(map(str, self.tokenizer.convert_ids_to_tokens(sorted(self.unknown))))
            self.loses = bool(self.unknown & set(self.tokenizer(_ALL_BYTES, add_special_tokens=False)["input_ids"]))
            self.loses = self.loses or bool(self.spans(_ALL_BYTES))
        except Exception:  # a tokenizer that fails of what it does not know says so where a row is encoded
            return

    def instead_of(self, text: str) -> str:
        """What it reads in the place of text that it does not know: the unknown token, or nothing."""
        read = set(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return " or ".join(map(repr, sorted(self.names))) if self.unknown & read else "nothing"

    def spans(self, text: str) -> list[Span]:
        """Where text is unknown: from each first character to the one behind the last."""
        if not self.tokenizer.is_fast:
            words = [match.span() for match in re.finditer(r"\S+", text)]
            return [(start, end) for start, end in words if self._is_lost(text[start:end])]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        read, lost = 0, list[Span]()
        for number, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            lost += _without_blanks(text, read, start)
            read = max(read, end)
            # Text that has been through a tokenizer may itself hold the unknown token.
            if number in self.unknown and text[start:end].strip() not in ("", *self.names):
                lost.append((start, end))
        return [*lost, *_without_blanks(text, read, len(text))]

    def first_in(self, text: str) -> str | None:
        """The first word of a text that is unknown, if any is."""
        spans = self.spans(text) if self.loses else []
        return _word(text, (0, len(text)), spans[0]) if spans else None

    def _is_lost(self, word: str) -> bool:
        if word in self.names:
            return False
        return bool(self.unknown & set(self.tokenizer(word, add_special_tokens=False)["input_ids"]))


@dataclass
class UnknownWords(Findings):
    """Looks for words that models cannot read, counts the rows that hold any, and refuses those that hold no other.

    Tokenizers of bytes (or with bytes to fall back on) know every text, and cost nothing here.

    Args:
        processing_class: a tokenizer or a processor.
        teacher_processing_class: of a teacher that reads its prompts through its own; else `None`.
        chat_template_kwargs (`dict`): as in training.
        template (`PrivilegedTemplate`): whose own words are looked at too.
    """

    processing_class: Any
    teacher_processing_class: Any
    chat_template_kwargs: Mapping[str, Any]
    template: PrivilegedTemplate
    what: str = field(init=False, default="unknown words")

    def __post_init__(self) -> None:
        readers = [Reader("the tokenizer", self.processing_class)]
        if self.teacher_processing_class is not None:
            readers.append(Reader("the teacher's tokenizer", self.teacher_processing_class))
        self._readers = [reader for reader in readers if reader.loses]

    @property
    def may_be(self) -> bool:
        """Whether there are words that a tokenizer does not know."""
        return bool(self._readers)

    def look(self, row: Mapping[str, Any], where: str, views: Iterable[ShownPrompt]) -> list[str]:
        """Columns (and settings) of a row in which words are unknown.

        Args:
            row (`dict`): of the dataset.
            where (`str`): which row it is, for messages.
            views: the context of each view of it, and its prompt.

        Raises:
            DataError: none of the words of the last user turn, or of p, is known.
        """
        found: dict[str, str] = {}
        for context, prompt in views:
            pieces = _pieces(row, context, prompt, self.template, self.chat_template_kwargs)
            for reader in self._readers:
                for name, word in _unread(reader, prompt, self.chat_template_kwargs, pieces, where).items():
                    found.setdefault(name, word)
        return self.add(found)

    def sentence(self, name: str, rows: str) -> str:
        """What was found in a column, in rows as they are counted here, and the fix."""
        return f"{super().sentence(name, rows)}. {_FIX}"


def _pieces(
    row: Mapping[str, Any],
    context: str | None,
    prompt: Prompt,
    template: PrivilegedTemplate,
    options: Mapping[str, Any],
) -> list[_Piece]:
    """The texts of a view."""
    asked = row["prompt"]
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    last = max(number for number, turn in enumerate(turns) if turn["role"] == "user")
    pieces = [_Piece(_PROMPT, texts_of(turn), n, needed=n == last) for n, turn in enumerate(turns)]
    calls = [text for turn in turns for text in _texts_of_calls(turn)]
    pieces.append(_Piece(_PROMPT, calls, None))
    if context is not None and not is_blank(context):
        column = next((name for name in CONTEXT_COLUMNS.values() if row.get(name) == context), None)
        name = _METHOD if column is None else f"column {column!r}"
        pieces.append(_Piece(name, [context], last, needed=column is not None))
        pieces += [_Piece(_TEMPLATE, [text], last) for text in template.own_texts(prompt)]
    own = row_options(row)
    for name, value in {**options, **own}.items() if not isinstance(asked, str) else ():
        column = name if name in row else TEMPLATE_COLUMN
        texts = [*strings_in(value)] if name != "chat_template" else []
        pieces.append(_Piece(f"column {column!r}" if name in own else TEMPLATE_COLUMN, texts, None))
    return pieces


def _texts_of_calls(turn: Mapping[str, Any]) -> list[str]:
    """What a chat template may write of a turn's tool calls: their names, and names and values of arguments."""
    texts = list[str]()
    for call in turn.get(CALLS) or ():
        named = call.get("function", call)
        arguments = named.get("arguments")
        with suppress(json.JSONDecodeError):  # a text that stands as it is
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        texts += [str(named.get("name")), *strings_in(arguments)]
    return texts


def _unread(
    reader: Reader, prompt: Prompt, options: Mapping[str, Any], pieces: Sequence[_Piece], where: str
) -> dict[str, str]:
    """The first unknown word of each column that has any.

    A piece is looked for in the text of its view, where a word may hang together with what stands around it.
    """
    text = text_of(reader.processing_class, prompt, options)
    spans, found = reader.spans(text), dict[str, str]()
    if not spans:
        return found
    turns = [[(0, len(text))]] if isinstance(prompt, str) else _places_of_turns(reader, prompt, options, text)
    placed = _placed(text, turns, pieces)
    for piece in sorted(pieces, key=lambda piece: sum(map(len, piece.texts)), reverse=True):
        lost_words, is_named = list[str](), False
        for words, place in zip(piece.texts, placed[id(piece)], strict=True):
            if place is None and piece.turn is None:
                continue
            # A template may write it otherwise: trimmed inside, or as JSON.
            within, (start, end) = (words, (0, len(words))) if place is None else (text, place)
            lost = [
                span for span in (reader.spans(words) if place is None else spans) if span[0] < end and start < span[1]
            ]
            is_named = is_named or any(map(_says, _outside(within, (start, end), lost)))
            if lost:
                together = lost[0][0] < start or end < lost[0][1]
                beside = " (a template writes it with what stands beside it)" if together else ""
                instead = reader.instead_of(within[slice(*lost[0])])
                word = f"{_word(within, (start, end), lost[0])!r}{beside}"
                lost_words.append(f"{word} in {where}, for which {reader.who} reads {instead}")
        if lost_words and piece.needed and not is_named:
            whole = "\n".join(piece.texts)
            raise DataError(
                f"{where}, {piece.field} (={cut(whole)!r}): {reader.who} knows none of its words and reads "
                f"{reader.instead_of(whole)} for them. {_FIX}, or leave the row out"
            )
        if lost_words:
            found.setdefault(piece.field, lost_words[0])
    return found


def _placed(
    text: str, turns: Sequence[Sequence[Span | None]], pieces: Sequence[_Piece]
) -> dict[int, list[Span | None]]:
    """The place of each text of each piece in the text of a view, or `None`; the longer ones first."""
    placed: dict[int, list[Span | None]] = {id(piece): [None] * len(piece.texts) for piece in pieces}
    everywhere, claimed = (0, len(text)), list[Span]()
    inside = [(piece, n) for piece in pieces if piece.turn is not None for n in range(len(piece.texts))]
    for piece, number in sorted(inside, key=lambda one: len(one[0].texts[one[1]]), reverse=True):
        own = turns[piece.turn or 0]
        # Texts of the prompt stand in their own places; those around p in the last text of their turn.
        spot = own[number] if len(own) == len(piece.texts) else (own or [None])[-1]
        place = _place(text, piece.texts[number].strip(), claimed, spot or everywhere)
        placed[id(piece)][number] = place
        claimed += [place] if place is not None else []
    claimed += [spot for own in turns for spot in own if spot is not None]
    for piece in pieces:
        if piece.turn is None:
            placed[id(piece)] = [_place(text, words.strip(), claimed, everywhere, alone=True) for words in piece.texts]
    return placed


def _places_of_turns(
    reader: Reader, prompt: list[dict[str, Any]], options: Mapping[str, Any], text: str
) -> list[list[Span | None]]:
    """Where a chat template wrote each text of each turn: what changes when another text stands there."""
    places = list[list[Span | None]]()
    for number, turn in enumerate(prompt):
        places.append([])
        for at in range(len(texts_of(turn))):
            changed = [*prompt[:number], _with_text(turn, at, _OTHER), *prompt[number + 1 :]]
            try:
                other = text_of(reader.processing_class, with_turns(prompt, changed), options)
            except DataError:
                other = ""
            before, _, behind = other.partition(_OTHER)
            end = len(text) - len(behind)
            same = _OTHER in other and len(before) <= end and text.startswith(before) and text.endswith(behind)
            places[-1].append((len(before), end) if same else None)
    return places


def _with_text(turn: Mapping[str, Any], at: int, text: str) -> dict[str, Any]:
    """A turn with another one of its texts."""
    if isinstance(turn["content"], str):
        return {**turn, "content": text}
    blocks = list(turn["content"])
    place = [number for number, block in enumerate(blocks) if isinstance(block.get("text"), str)][at]
    blocks[place] = {**blocks[place], "text": text}
    return {**turn, "content": blocks}


def _place(text: str, words: str, claimed: Sequence[Span], within: Span, *, alone: bool = False) -> Span | None:
    """The first place of words in a part of a text that nothing longer has claimed; `alone`: as a word of their own."""
    edge = (r"(?<!\w)", r"(?!\w)") if alone else ("", "")
    for match in re.compile(f"{edge[0]}{re.escape(words)}{edge[1]}").finditer(text, *within) if words else ():
        if not any(match.start() < end and start < match.end() for start, end in claimed):
            return match.span()
    return None


def _outside(text: str, place: Span, spans: Iterable[Span]) -> str:
    inside = {number for start, end in spans for number in range(start, end)}
    return "".join(text[number] for number in range(*place) if number not in inside)


def _without_blanks(text: str, start: int, end: int) -> list[Span]:
    """What no token stands for, unless it is space or punctuation, or was changed into what one stands for."""
    found = re.search(r"\S.*\S|\S", text[start:end], re.DOTALL) if start < end else None
    return [(start + found.start(), start + found.end())] if found and any(map(_says, found.group())) else []


def _says(character: str) -> bool:
    """Whether a character says something by itself: a letter, a number, a symbol; no punctuation, no space."""
    category = unicodedata.category(character)
    return category[0] in "LNS" and category != "Sk"


def _word(text: str, place: Span, span: Span) -> str:
    """What is unknown, with as much of the word that it is in as is part of the same piece."""
    start, end = span
    before = re.search(r"\S{0,20}$", text[min(place[0], start) : start])
    behind = re.match(r"\S{0,20}", text[end : max(place[1], end)])
    assert before is not None and behind is not None
    return cut((before.group() + text[start:end] + behind.group()).strip())
