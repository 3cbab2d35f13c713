"""Letters of options, yes and no, and words in a hint that give the answer away."""

import re
from dataclasses import dataclass

from dopd.hints import phrases
from dopd.hints.answers import Answer, yes_no_words
from dopd.hints.text import clause_after, clause_before, folded, is_asked, words

_MARK = r"[(\[\"'*$]*"
_LETTER = re.compile(
    rf"(?P<noun>\b(?:options?|choices?|letter|alternative|answers?|statement"
    rf"|item)\s+)?{_MARK}(?<![A-Za-z0-9'])(?P<letter>[A-J])(?![A-Za-z0-9'])(?P<end>[)\]\"'*$]*)"
)
_LOWER = re.compile(
    r"\b(?:options?|choices?|letter|answer(?:\s+is|:)?|choose|pick|select|take|go with)\s+[(\[\"'*]*(?P<letter>[a-j])\b"
    r"(?!\s+[a-z])[)\]\"'*]*"
)
_TAKE = re.compile(
    r"\b(?:choos\w*|pick\w*|select\w*|go(?:ing)? (?:with|for)|mark|circle|tick|take|trust|prefer|favou?rs?"
    r"|leans?|point(?:s|ing)? (?:to|at|towards?)"
    r"|leads? (?:to|us to|you to)|leav(?:es|ing)(?: only| us with| you with)?|confirm\w*|keep\w*|only|namely|is"
    r"|it's|therefore|thus|hence|settle (?:on|for)"
    r"|match(?:es|ing)?|support\w*|conclude|so|survives?|stands?|want|needs?)\s*:?\s*(?:only "
    r"|on )?(?:the )?(?:option |choice |letter |answer )?[(\[\"'*]*$",
    re.I,
)
_RIGHT = re.compile(
    r"^[^.;\n]{0,30}?\b(?:is|are|must be|has to be|looks|seems|remains?|fits|works|matches|satisf\w+|holds|wins"
    r"|stands|survives)\b"
    r"(?:\s+\w+){0,2}?\s*(?:correct|right|true|best|answer|valid|all|left|up|standing|every\w*|perfectly|\bit\b"
    r"|only|the one|$|\s*[.!]?$)",
    re.I,
)
_TITLED = re.compile(r"\b(?:answer|choice|option)\s*[:=(]+\s*[*\"']*$", re.I)
_WRONG = re.compile(
    r"\b(?:neither|not|isn't|aren't|wrong|incorrect|false|eliminat\w*|rul(?:e|es|ed|ing) out|exclud\w*|discard\w*"
    r"|reject\w*|cannot|can't|never|ignore|cross(?:ed)? out"
    r"|drop|remove|impossible|out)\b",
    re.I,
)
_LOOKED_AT = re.compile(
    r"\b(?:compar\w*|consider\w*|check\w*|test\w*|look(?:ing)? at|examin\w*|between|why|whether|if|either|both"
    r"|each|read\w*|plug\w*|try|evaluat\w*|contrast\w*|what|how|against|start with|begin with)\b",
    re.I,
)
_CLAIM = (
    r"(?:statement|claim|answer|assertion|conjecture|proposition|hypothesis|sentence|inequality|it|this|that"
    r"|response)"
)
_HOLDS = re.compile(
    rf"\b(?:(?:it|that|this)'s|{_CLAIM}\s+(?:is|must be|has to be|turns out(?: to be)?|would be|will be"
    rf"|comes out))\s+(?:indeed |clearly |definitely |actually |really |therefore |thus |in fact |simply "
    rf"|of course )*[\"'*]*"
    r"(?P<no>not |un)?[\"'*]*(?P<word>true|false|correct|incorrect|wrong|right|yes|no)\b(?!\s+(?:that|if|when"
    r"|only|for|to)\b)",
    re.I,
)
_STANDS = re.compile(
    rf"\b{_CLAIM}\s+(?:indeed |clearly |always |actually )?(?P<word>holds|fails|does not hold"
    rf"|doesn't hold)\b(?!\s+(?:if|when|only|for)\b)",
    re.I,
)
_SAID = re.compile(
    r"(?:^|[.!?:;\n]\s*|\b(?:therefore|thus|hence|so|answer|say|respond|reply|answering|with|is|in short"
    r"|conclude|simply|definitely|certainly|clearly|obviously|absolutely|of course)[,:]?\s+"
    r"|,\s+)[\"'*(]*(?P<word>yes|no|true|false)[\"'*)]*\s*(?=[,.;:!\n]|-\s|$)",
    re.I,
)
_TELLS = re.compile(r"\b(?:choose|pick|select|answer|say|write|conclude)\W+(?:the )?$", re.I)
_IS = re.compile(r"\b(?:is|be|namely|called|becomes|so|thus|therefore|hence|it's)\W+(?:the |a |an )?$", re.I)
_STATES = re.compile(r"\b(?:is|are|was|were|does|did|can|has|have|will|must|\w+s)\b", re.I)
_ALL_BUT = re.compile(
    r"\b(?:all|every\w*|none|nothing|any\w*|each|no other|others?)\b[^.;\n]{0,25}"
    r"\b(?:except(?: for)?|but|other than|besides|apart"
    r" from|than)"
    r"\s+(?:option |choice |for )?[(\[\"'*]*$",
    re.I,
)
_REASON = re.compile(r"\W*\s*(?:because|since|as|for)\b", re.I)
_ARE = re.compile(r"\s*(?:are|have|do|can|share|contain|is|fail)\b", re.I)
_SHORT = re.compile(
    r"(?:^|[.!\n]\s*)(?:it|he|she|they|this|that)\s+(?:is|does|did|was|were|can|will|has|do|are)(?P<no>\s+not|n't)?\s*(?:$|[.!])",
    re.I,
)
_INDEED = re.compile(r"(?:^|[.!\n]\s*)(?:indeed|exactly|correct|right|definitely|certainly|absolutely)\s*[,.!]", re.I)
_NOT = re.compile(r"\b(?:not|no|never|isn't|aren't|doesn't|don't|didn't|wasn't|cannot|can't|n't)\b", re.I)
_YES_NO_QUESTION = re.compile(
    r"(?:^|[.!?\n]\s*)(?:is|are|was|were|does|do|did|can|could|will|has|have|had|must|should)\s+([^?]+)\?", re.I
)
_SMALL_WORDS = frozenset(
    ("a", "an", "the", "of", "to", "in", "on", "for", "it", "than", "as", "is", "are", "was", "were", "do", "does",
     "did", "be", "by", "with", "or", "and", "that", "this", "following", "statement", "true", "answer", "yes", "no")
)  # fmt: skip
_TITLES = ("option", "choice", "answer", "the", "letter", "correct", "it", "is", "s")
_ASKS_WHAT = re.compile(r"\bwhat\s+(?:is|was|are|were)\s+(?:the\s+)?([^?]+)", re.I)
_TO_BE = re.compile(r"\W*(?:is|was|would be|must be)\s+(?:the\s+)?((?:\w+\s*){1,3})", re.I)
_ASKS_WHO = re.compile(
    r"\b(?:who|which(?: of the \w+| one| \w+)?|what)\s+((?:is|are|was|were|has|have|can|will|comes?|gets?|wins?"
    r"|arrives?|runs?|lives?|owns?|\w+ed)\s+(?:the )?\w+)",
    re.I,
)
_TRUE = ("true", "correct", "right", "yes", "holds")


def option_kinds(hint: str, answer: Answer) -> dict[str, str]:
    """How the hint names the letter of the right option, or rules out all others."""
    if [word for word in words(hint) if word not in _TITLES] == [answer.letter.lower()]:
        return {"option": hint.strip()}
    ruled_out = set[str]()
    chosen = ""
    for series in _series(hint):
        start, end = series[0].start, series[-1].end
        before, after = clause_before(hint, start), clause_after(hint, end)
        wrong = _WRONG.search(before[-45:]) or _WRONG.search(re.split(r",|\bbut\b", after[:35])[0])
        letters = {one.letter for one in series}
        others = set(answer.options) - {answer.letter}
        if wrong and not _ALL_BUT.search(before):
            ruled_out |= letters
            continue
        if len(letters) > 1 and letters == others and _ARE.match(after) and not _LOOKED_AT.search(before):
            ruled_out |= letters
            continue
        if letters != {answer.letter}:
            continue
        named = series[0].named
        sure = phrases.NAMED.search(before) or phrases.IS_ANSWER.search(after) or _TITLED.search(before)
        looked_at = _LOOKED_AT.search(before)
        if _ALL_BUT.search(before) or (named and _REASON.match(after) and len(before.split()) < 2):
            chosen = chosen or hint[start:end].strip()
        taken = _TAKE.search(before) and (named or _is_bare(hint, end)) and not looked_at
        right = _RIGHT.search(after) and not looked_at and (named or (answer.options and _is_bare(hint, end)))
        if (sure and _is_bare(hint, end)) or taken or right:
            chosen = chosen or hint[start:end].strip()
    if chosen:
        return {"option": chosen}
    others = set(answer.options) - {answer.letter}
    if others and others <= ruled_out and answer.letter not in ruled_out:
        return {"option": f"all but {answer.letter} are ruled out"}
    return {}


@dataclass(frozen=True)
class _Letter:
    """A letter in a hint that may be that of an option; `named` if it is called one or stands in brackets."""

    letter: str
    start: int
    end: int
    named: bool


def _series(hint: str) -> list[list[_Letter]]:
    """Letters of options, those that are listed (A, B and C) together."""
    found = [
        _Letter(
            one["letter"],
            one.start("letter"),
            one.end(),
            bool(one["noun"]) or one.group().lstrip().startswith(("(", "[")) or one["end"].startswith(")"),
        )
        for one in _LETTER.finditer(hint)
    ]
    found += [_Letter(one["letter"].upper(), one.start("letter"), one.end(), True) for one in _LOWER.finditer(hint)]
    groups: list[list[_Letter]] = []
    for one in sorted(found, key=lambda letter: letter.start):
        between = hint[groups[-1][-1].end : one.start] if groups else "-"
        if groups and re.fullmatch(r"\s*(?:,\s*(?:and|or|nor)?|and|or|nor|&|/)\s*[(\[]?", between):
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _is_bare(hint: str, end: int) -> bool:
    """Whether a letter stands for itself, and not as the article before a noun."""
    return (
        re.match(r"\s*(?:$|[.,;:!?)\n-]|\s(?:is|as|because|since|and|or|for|which|here|based)\b)", hint[end:])
        is not None
    )


def truth_kinds(hint: str, truth: bool, question: str = "") -> dict[str, str]:
    """How the hint says yes or no where that is the answer."""
    if quoted := _answers(hint, truth, question):
        return {"yes_no": quoted}
    for pattern in (_HOLDS, _STANDS):
        for found in pattern.finditer(hint):
            if phrases.ASKED.search(clause_before(hint, found.start())):
                continue
            word = found["word"].lower()
            states = (word in _TRUE) != bool(found.groupdict().get("no"))
            if states == truth:
                return {"yes_no": found.group()}
    for found in _SAID.finditer(hint):
        asked = phrases.ASKED.search(clause_before(hint, found.start("word")))
        other = re.match(r"[\"'*)]*\s*(?:or|and|/)\b", hint[found.end("word") :], re.I)
        if (found["word"].lower() in _TRUE) == truth and not asked and not other:
            return {"yes_no": found["word"]}
    for word in yes_no_words(truth):
        for found in re.finditer(rf"(?<![^\W\d_]){re.escape(word)}(?![^\W\d_])", hint, re.I):
            before = clause_before(hint, found.start())
            if phrases.NAMED.search(before) and not phrases.ASKED.search(before):
                return {"yes_no": word}
    return {}


def _answers(hint: str, truth: bool, question: str) -> str | None:
    """A sentence that says what the question asks, or a short reply to it."""
    if truth and (found := _INDEED.search(hint)):
        return found.group().strip()
    if (found := _SHORT.search(hint)) and bool(found["no"]) != truth:
        return found.group().strip()
    asked = _YES_NO_QUESTION.search(question)
    wanted = [word for word in words(asked[1]) if word not in _SMALL_WORDS] if asked else []
    for sentence in re.split(r"(?<=[.!?;\n])\s+", hint):
        own = words(sentence)
        if len(wanted) < 2 or sentence.strip().endswith("?") or phrases.ASKED.search(sentence):
            continue
        if all(word in own for word in wanted) and _STATES.search(sentence) and (not _NOT.search(sentence)) == truth:
            return sentence.strip()
    return None


def word_kinds(hint: str, question: str, answer: Answer) -> dict[str, str]:
    """How the hint has the words of an answer that is text."""
    wanted = _content(answer.words)
    if not wanted or (len(wanted) == 1 and len(wanted[0]) < 2 and not answer.options):
        return _one_sign(hint, question, answer) if wanted else {}
    own, asked = words(hint), words(question)
    if not _places(own, wanted):
        part = _part_of_name(hint, asked, answer)
        return {"verbatim": part} if part else {}
    if own == wanted:
        return {"verbatim": " ".join(wanted)}
    if not _places(asked, wanted) and not answer.options:
        return {"verbatim": " ".join(wanted)}
    predicate = _ASKS_WHO.search(question)
    if predicate and _places(own, [*wanted, *words(predicate[1])]):
        return {"verbatim": " ".join([*wanted, *words(predicate[1])])}
    pattern = r"\W+(?:(?:the|a|an)\W+)?".join(map(re.escape, wanted))
    for found in re.finditer(rf"(?<![^\W_]){pattern}(?![^\W_])", hint, re.I):
        before, after = clause_before(hint, found.start()), clause_after(hint, found.end())
        if phrases.NEGATED.search(before) or is_asked(hint, found.end()):
            continue
        if phrases.NAMED.search(before) or phrases.IS_ANSWER.search(after) or _is_asked_thing(after, question):
            return {"verbatim": found.group()}
        if _TELLS.search(before):
            return {"verbatim": found.group()}
        states = phrases.COPULA.search(before) or _IS.search(before)
        if states and not phrases.ASKED.search(before) and not _restated(before, found.group(), question):
            return {"verbatim": found.group()}
    return {}


def _is_asked_thing(after: str, question: str) -> bool:
    """Whether something is said to be what the question asks for: `is the diagnosis`."""
    asked = _ASKS_WHAT.search(question)
    is_what = _TO_BE.match(after)
    return bool(asked and is_what and set(words(is_what[1])) & set(words(asked[1])) - _SMALL_WORDS)


def _part_of_name(hint: str, asked: list[str], answer: Answer) -> str | None:
    """A word of a name that the question does not have, such as a family name."""
    parts = [part for part in re.findall(r"[^\W\d_]+", answer.text) if part[0].isupper() and len(part) >= 4]
    if answer.options or len(answer.words) < 2 or not answer.text[:1].isupper():
        return None
    own = re.findall(r"[^\W\d_]+", hint)
    return next((part for part in parts if part in own and folded(part) not in asked), None)


def _one_sign(hint: str, question: str, answer: Answer) -> dict[str, str]:
    """An answer of one letter that is no option: named as the answer, or in a hint that is no prose."""
    sign = answer.words[0]
    if len(words(hint)) <= 2 and sign in words(hint):
        return {"verbatim": sign}
    for found in re.finditer(rf"(?<![^\W_]){re.escape(sign)}(?![^\W_])", hint, re.I):
        before = clause_before(hint, found.start())
        if phrases.NAMED.search(before) or re.search(r"\banswer\s+$", before, re.I):
            return {"verbatim": found.group()}
    return {}


def _restated(before: str, name: str, question: str) -> bool:
    near = " ".join([*words(before)[-2:], *words(name)])
    return f" {near} " in f" {' '.join(words(question))} "


def _content(all_words: tuple[str, ...]) -> list[str]:
    """The words of an answer without articles."""
    kept = [word for word in all_words if word not in ("the", "a", "an")]
    return kept or list(all_words)


def _places(text: list[str], wanted: list[str]) -> bool:
    """Whether words stand in a row in a text, articles between them left out."""
    text = [word for word in text if word not in ("the", "a", "an")] if len(wanted) > 1 else text
    size = len(wanted)
    return any(text[n : n + size] == wanted for n in range(len(text) - size + 1))
