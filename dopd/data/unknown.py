"""Words of a row that a tokenizer does not know: it reads the unknown token for them, or nothing at all."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dopd.data.encode import text_of, tokenizer_of
from dopd.data.findings import Findings
from dopd.data.privileged import PrivilegedTemplate, Prompt, is_blank
from dopd.data.rendering import texts_of
from dopd.errors import DataError, cut

# What a view is told (p, `None` for the plain one), and its prompt.
ToldPrompt = tuple[str | None, Prompt]
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
_FIX = "Write it in words of the vocabulary, or take models with another tokenizer"


@dataclass(frozen=True)
class _Piece:
    """A text of a row: what it is of, and whether a view without a word of it is of no use."""

    field: str
    text: str
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
    drops: bool = field(init=False, default=False)
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
            self.drops = not self.loses and bool(self.spans(_ALL_BYTES))
        except Exception:  # a tokenizer that fails of what it does not know says so where a row is encoded
            return
        self.loses = self.loses or self.drops

    @property
    def instead(self) -> str:
        """What it reads in the place of a word that it does not know."""
        return "nothing" if self.drops else " or ".join(map(repr, sorted(self.names)))

    def spans(self, text: str) -> list[Span]:
        """Where text is unknown: from each first character to the one behind the last."""
        if not self.tokenizer.is_fast:
            words = [match.span() for match in re.finditer(r"\S+", text)]
            return [(start, end) for start, end in words if self._is_lost(text[start:end])]
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        read, lost = 0, list[Span]()
        for number, (start, end) in zip(made["input_ids"], made["offset_mapping"], strict=True):
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

    def look(self, row: Mapping[str, Any], where: str, views: Iterable[ToldPrompt]) -> list[str]:
        """Columns (and settings) of a row in which words are unknown.

        Args:
            row (`dict`): of the dataset.
            where (`str`): which row it is, for messages.
            views: what each view of it is told, and its prompt.

        Raises:
            DataError: none of the words of the last user turn, or of p, is known.
        """
        found: dict[str, str] = {}
        for told, prompt in views:
            pieces = _pieces(row, told, prompt, self.template)
            for reader in self._readers:
                text = text_of(reader.processing_class, prompt, self.chat_template_kwargs)
                for name, word in _unread(reader, text, pieces, where).items():
                    found.setdefault(name, f"{word} in {where}, for which {reader.who} reads {reader.instead}")
        return self.add(found)

    def sentence(self, name: str, rows: str) -> str:
        """What was found in a column, in rows as they are counted here, and the fix."""
        return f"{super().sentence(name, rows)}. {_FIX}"


def _pieces(row: Mapping[str, Any], told: str | None, prompt: Prompt, template: PrivilegedTemplate) -> list[_Piece]:
    """The texts of a view."""
    asked = row["prompt"]
    if isinstance(asked, str):
        pieces = [_Piece(_PROMPT, asked, needed=True)]
    else:
        last = max(number for number, turn in enumerate(asked) if turn["role"] == "user")
        pieces = [_Piece(_PROMPT, "\n".join(texts_of(asked[last])), needed=True)]
        pieces += [_Piece(_PROMPT, text) for turn in (*asked[:last], *asked[last + 1 :]) for text in texts_of(turn)]
    if told is not None and not is_blank(told):
        column = next((name for name in ("privileged_context", "contrast_context") if row.get(name) == told), None)
        pieces.append(_Piece(_METHOD if column is None else f"column {column!r}", told, needed=column is not None))
        pieces += [_Piece(_TEMPLATE, text) for text in template.own_texts(prompt)]
    return [piece for piece in pieces if piece.text.strip()]


def _unread(reader: Reader, text: str, pieces: Sequence[_Piece], where: str) -> dict[str, str]:
    """The first unknown word of each column that has any.

    A piece is looked for in the text of its view, where a word may hang together with what stands around it.
    """
    spans, claimed, found = reader.spans(text), list[Span](), dict[str, str]()
    for piece in sorted(pieces, key=lambda piece: len(piece.text), reverse=True):
        place = _place(text, piece.text.strip(), claimed)
        if place is None:  # the template writes it otherwise: trimmed inside, or as JSON
            lost, within = reader.spans(piece.text), piece.text
            place = (0, len(within))
        else:
            claimed.append(place)
            lost, within = [span for span in spans if span[0] < place[1] and place[0] < span[1]], text
        if not lost:
            continue
        if piece.needed and not any(map(_says, _outside(within, place, lost))):
            raise DataError(
                f"{where}, {piece.field} (={cut(piece.text)!r}): {reader.who} knows none of its words and reads "
                f"{reader.instead} for them. {_FIX}, or leave the row out"
            )
        together = lost[0][0] < place[0] or place[1] < lost[0][1]
        said = " (a template writes it with what stands beside it)" if together else ""
        found.setdefault(piece.field, f"{_word(within, place, lost[0])!r}{said}")
    return found


def _place(text: str, words: str, claimed: Sequence[Span]) -> Span | None:
    """The first place of words in a text that nothing longer has claimed."""
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        if not any(start < other_end and other < end for other, other_end in claimed):
            return start, end
        start = text.find(words, start + 1)
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
