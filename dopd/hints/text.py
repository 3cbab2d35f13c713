"""A text in one way of writing: forms of Unicode, LaTeX and markup that mean the same become the same."""

import re
import unicodedata

_VULGAR = re.compile("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215e])")
_POWERS = str.maketrans("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789")
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_SIGNS = str.maketrans(
    {
        "\u2044": "/",
        "\u2215": "/",
        "\u00f7": "/",
        "\u2212": "-",
        "\u2010": "-",
        "\u2011": "-",
        "\u00d7": "*",
        "\u22c5": "*",
        "\u00b7": "*",
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u3002": ".",
        "\u2248": "=",
        "\u2192": "=",
        "\u21d2": "=",
    }
)
_LATEX = (
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname|mathit|bm)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[dtc]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}"), r"(\1)/(\2)"),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r"(\1)/(\2)"),
    (re.compile(r"\((-?\d+(?:\.\d+)?)\)/\((-?\d+(?:\.\d+)?)\)"), r"\1/\2"),
    (re.compile(r"(?<=\d)\{,\}(?=\d{3})"), ","),
    (re.compile(r"\\[,!;: ]"), ""),
    (re.compile(r"\\(?:times|cdot|ast)\b"), "*"),
    (re.compile(r"\\div\b"), "/"),
    (re.compile(r"\\(?:approx|Rightarrow|implies|to|rightarrow)\b|-+>|=+>"), "="),
    (re.compile(r"\\(?:left|right)\b"), ""),
    (re.compile(r"\\([%$#&])"), r"\1"),
    (re.compile(r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ|\u00b0"), " degrees"),
    (re.compile(r"\^\{(-?\d+)\}"), r"^\1"),
    (re.compile("\u221a\\s*\\(?(\\w+)\\)?"), r"\\sqrt{\1}"),
    (re.compile(r"\*\*|__|`"), ""),
)
_WORD = re.compile(r"[^\W_]+(?:'[a-z]+)?")


def plain(text: str) -> str:
    """The text with one way of writing each sign; case and lines stay."""
    text = _VULGAR.sub(" ", text)
    text = _RAISED.sub(lambda found: "^" + found.group().translate(_POWERS), text)
    text = unicodedata.normalize("NFKC", text)
    text = "".join(one for one in text if unicodedata.category(one) != "Cf")
    text = "".join(_digit(one) for one in text).translate(_SIGNS)
    for pattern, instead in _LATEX:
        text = pattern.sub(instead, text)
    return text


def _digit(one: str) -> str:
    """A digit of any script as one of ours."""
    return str(unicodedata.digit(one)) if unicodedata.category(one) == "Nd" else one


def is_asked(text: str, place: int) -> bool:
    """Whether a place is in a sentence that ends with a question mark."""
    found = re.search(r"[?!;\n]|[.](?=\s|$)", text[place:])
    return found is not None and found.group() == "?"


def words(text: str) -> list[str]:
    """Words of a text without case and accents."""
    return _WORD.findall(folded(text))


def folded(text: str) -> str:
    """The text without case and accents."""
    spread = unicodedata.normalize("NFKD", text.casefold())
    return "".join(one for one in spread if unicodedata.category(one) != "Mn")


def squeezed(text: str) -> str:
    """The text without spaces, dollar signs and a full stop at its end: for formulas."""
    return re.sub(r"[\s$]", "", text).rstrip(".").casefold()


# Where a sentence ends; a full stop within a number ends none.
_END = re.compile(r"[!?;\n]|[.](?=\s|$)|\bso\b(?=\s)|,\s*(?=then\b|so\b)")


def clause_before(text: str, place: int, most: int = 90) -> str:
    """What stands before a place in the same sentence."""
    part = text[max(0, place - most) : place]
    ends = [found.end() for found in re.finditer(r"[!?;\n]|[.](?=\s)", part)]
    return part[ends[-1] :] if ends else part


def clause_after(text: str, place: int, most: int = 70) -> str:
    """What stands behind a place in the same sentence."""
    part = text[place : place + most]
    found = _END.search(part)
    return part[: found.start()] if found else part
