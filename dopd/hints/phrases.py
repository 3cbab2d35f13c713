"""Words around a number, a letter or a name that say whether it is given as the result, used, or only spoken of."""

import re


def _any(*several: str) -> str:
    """An alternative of phrases, which stand between bars; spaces stand for any white space."""
    return "(?:" + "|".join(one.strip().replace(" ", r"\s+") for part in several for one in part.split("|")) + ")"


_ANSWER = _any(
    "answer|result|solution|outcome|output|final figure|final number|final value|final count|correct choice",
    "antwort|ergebnis|l\u00f6sung|lo\u0308sung|losung|r\u00e9ponse|re\u0301ponse|reponse|r\u00e9sultat|resultat",
    "respuesta|resultado|risposta|risultato|resposta|antwoord|uitkomst|wynik|odpowied\u017a",
    "\u043e\u0442\u0432\u0435\u0442|\u0440\u0435\u0437\u0443\u043b\u044c\u0442\u0430\u0442",
    "\u7b54\u6848|\u7ed3\u679c|\u7d50\u679c|\u7b54\u3048|\uc815\ub2f5|\ub2f5",
)
_QUANTITY = _any(
    "total|sum|product|quotient|remainder|difference|count|value|number|amount|average|mean|figure|tally|target",
    "cost|price|area|length|speed|distance|age|profit|perimeter|volume|probability|height|width|weight|rest",
)
_LINK = _any(
    "is|are|was|be|being|equals?|equal to|=|:|will be|would be|must be|should be|has to be|turns? out(?: to be)?",
    "comes? (?:out )?(?:to|as|at)|works? out (?:to|at|as)|happens to be|reads?|ends? up (?:as|at|being)|reaches|hits",
    "is found to be|ist|lautet|betr\u00e4gt|betra\u0308gt|est|vaut|es|\u00e8|e\u0300|\u00e9|\u662f|\u4e3a|\u306f",
    "\u0435\u0441\u0442\u044c|\ub294|\uc740|jest|wynosi",
)
_FILLER = _any(
    "the|an|exactly|precisely|just|about|simply|then|thus|therefore|clearly|actually|indeed|only|to be|be|equal to",
    "equals|option|choice|letter|number|value|approximately|roughly|around|nothing but|none other than",
)
_OPENING = r"[\s$(\[{\"'*:=]"
_SOFT = rf"(?:{_OPENING}|\\f?boxed\{{|\b{_FILLER}\b|\b[xyznk]\s*=)*$"
# What names the thing that follows as the answer itself.
NAMED = re.compile(
    rf"(?:\b|(?<=[^\x00-\x7f])){_ANSWER}(?![a-z])[^.?!;\n\d]{{0,45}}?(?:\b|\s|(?<=[^\x00-\x7f])"
    rf"|(?=[:=])){_LINK}(?![a-z]){_SOFT}"
    rf"|\\f?boxed\s*\{{\s*$|####\s*$|^\W*(?:{_ANSWER})\W*$",
    re.I,
)
_SUBJECT = _any("we|you|one|this|that|which|it|they|he|she|and|to|should|will|would|finally|then|so|must|can")
_REACH = _any(
    "gets?|obtains?|yields?|gives?|leaves?|finds?|makes?|equals?|reach(?:es)?|arrives? at|lands? on|be left with",
    "have left|comes? (?:out )?to|adds? up to|totals?|amounts? to|results? in|ends? up (?:with|at|on)|concludes?|see",
    "writes?|reports?|says?|becomes?|ends? with",
)
_REACHED = _any(
    "giving|yielding|leaving|making|totall?ing|which is|that is|that's|it's|namely|i\\.e\\.|equals|altogether|in total",
    "in all|left with|ends? up with|ends? with|arrive at|adds? up to|comes? to|amounts to|works out to|boils down to",
    "there will be|there must be|you should have|simplif(?:ies|y) to|reduces to|evaluates to|spoiler",
)
# What says that a number is what a calculation comes to.
CONCLUDED = re.compile(
    rf"(?:\b{_QUANTITY}\b[^.?!;\n\d]{{0,40}}?\b{_LINK}"
    rf"|\b{_SUBJECT}\s+(?:\w+ly\s+|(?:should|will|would|can|must|finally|then|is|all|always"
    rf"|now)\s+)*{_REACH}(?:\s+(?:you|us))?"
    rf"|\b{_REACHED}(?!\w))(?:{_OPENING}|,|\b(?:about|exactly|just|only|precisely|the\s+number|a\s+total\s+of"
    rf"|you|us|to|as|be)\b)*$",
    re.I,
)
EQUALS = re.compile(r"[\w)\]}?]\s*=\s*[\s$({\"'*]*$")
COPULA = re.compile(
    r"\b(?:is|are|was|were|there are|will be|would be|must be|has|have|had)\s+(?:exactly\s+|only\s+|just\s+"
    r"|precisely\s+|now\s+)?[$(\"'*]*$",
    re.I,
)
# A condition, or a value that the problem gives.
GIVEN = re.compile(
    r"\b(?:let|given|where|if|set|setting|when|whenever|since|substitut\w*|plug\w*|suppos\w+|assum\w+|for|at"
    r"|with|using|use"
    r"|cases?|consider\w*|try|starting|start|recall|remember|because|know|knowing|states?|told|says|by|than)\b",
    re.I,
)
NEGATED = re.compile(
    r"\b(?:not|never|no|isn't|aren't|wasn't|cannot be|can't be|other than|rather than|instead of|unlike|neither"
    r"|nor|except|without)"
    r"\s+(?:(?:simply|just|the|a|an|equal to|be|equal|yet|option)\s+)*[$(\"']*$",
    re.I,
)
# The thing is asked about, and not said.
ASKED = re.compile(
    r"\b(?:if|whether|when|either|or|suppose|assume|decide|check|checking|determine|test|see|ask|asks|prove"
    r"|could|might|may|unless"
    r"|verify|why|how|judge|depends|what|which|consider|imagine|claims?|say|make sure|be sure|ensure|until|once"
    r"|before)\b",
    re.I,
)
IS_ANSWER = re.compile(
    r"^[^.;\n]{0,24}?[)}\"'*$\s]*(?:is|are|as|being|must be|would be|will be|=)\s+(?:indeed\s+|clearly\s+"
    r"|therefore\s+|thus\s+)?"
    r"(?:the |our |your |what |a )?(?:final |correct |right |only |best )*"
    r"(?:answer|result|solution|outcome|correct|right\b|(?:you|we) (?:want|need|are after)|is asked"
    r"|the (?:question|problem) asks)",
    re.I,
)
LEFT_OVER = re.compile(
    r"^(?:\s+[\w-]+){0,3}\s+(?:left(?! side| hand|-| of)|remain(?:s|ing)?|in total|altogether|in all|overall"
    r"|at the end|in the end)\b",
    re.I,
)
# A number that is used, and not found.
OPERAND_BEFORE = re.compile(
    r"(?:\b(?:by|times|plus|minus|add|adding|subtract|subtracting|multiply|multiplying|divide|dividing|over"
    r"|power|mod|modulo|base"
    r"|than|every|each|per|from|in|the|next|last|these|those|all|both|any|with|least|most|up to|between|and|or"
    r"|of|into|first"
    r"|exactly|for|as|other|another|its|their|to)\b|[-+*/^(,])\s*[$\"']*$",
    re.I,
)
OPERAND_AFTER = re.compile(
    r"^\s*(?:[-+*/^(]|(?:[a-z]+ )?(?:times|steps?|parts?|equations?|sides?|cases?|ways?|unknowns?|variables?"
    r"|groups?|digits?|numbers?"
    r"|terms?|things|quantities|minutes in|hours in|days in|months in|seconds in|operations?|stages?|pieces"
    r"|halves|facts?"
    r"|conditions?|constraints?|rules?|amounts?|values?|of|by one|at a time|who|that|another|sub\w*|or|and|to)\b)",
    re.I,
)
ENUMERATOR = re.compile(
    r"(?:\b(?:step|steps|part|hint|case|equation|eq\.?|line|figure|fig\.?|phase|stage|round|question|problem"
    r"|note|rule|item|point"
    r"|exercise|theorem|lemma|task|chapter|section)|#)\s*[(#]?\d+(?:\s*(?:-|to|and|,)\s*\d+)*[).:]?(?![\d.])",
    re.I,
)
LISTED = re.compile(r"(?:(?<=\s)|^)[(\[]?(\d{1,2})[).\]:](?=\s+\S)", re.M)
BOX = re.compile(r"\[\s*\d+(?:\.\d+)?(?:[\s,]+\d+(?:\.\d+)?){3}\s*\]")
