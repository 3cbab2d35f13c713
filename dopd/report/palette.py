"""Colours of the page, and what the four regimes mean. Contrast is computed from these by a test."""

from collections.abc import Iterable, Mapping, Sequence

# Regimes have colours of Okabe and Ito's palette, told apart by readers with any colour vision. Methods and phases have
# others, so that a colour of the page means one thing; methods differ in their dashes, too.
REGIME_COLOURS = {"LH": "#56B4E9", "LL": "#BBBBBB", "HT": "#D55E00", "HS": "#009E73", "all": "#0072B2"}
METHOD_COLOURS = ("#5b2a9d", "#8c1d40", "#6b6b00", "#0d5c63", "#6e4426", "#17191c", "#a040c8")
METHOD_COLOURS_DARK = ("#b9a3ff", "#ff8f9f", "#dcd56a", "#8fe5dc", "#c9a27e", "#ffffff", "#e58bff")
PHASE_COLOURS = ("#51657a", "#8b8f5a", "#9fb4c4", "#4b4f2a", "#d6cfa8", "#7d8f9c")

# Label -> (name, what its tokens are taught), one line each.
REGIMES: Mapping[str, tuple[str, str]] = {
    "HT": ("high gap, the teacher is surer", "real skill: strong teacher target, whole distribution"),
    "HS": ("high gap, the student is surer", "its own way: light pull to the privileged student"),
    "LH": ("low gap, both confident", "only p was missing: light teacher target"),
    "LL": ("low gap, neither confident", "noise: weak pull to the privileged student"),
    "all": ("every token alike", "not routed: one target for all tokens"),
}

# Of rows that carry a name of their own.
_NAMED_COLOURS = ("#CC79A7", "#E69F00", "#009E73", "#56B4E9", "#D55E00", "#BBBBBB")


def label_colours(labels: Iterable[str]) -> dict[str, str]:
    """A colour for every label of a table's rows: a regime's own, or one of a fixed order for names."""
    names = [label for label in dict.fromkeys(labels) if label not in REGIME_COLOURS]
    named = {name: _NAMED_COLOURS[number % len(_NAMED_COLOURS)] for number, name in enumerate(names)}
    return {**REGIME_COLOURS, **named}


def label_meanings(labels: Iterable[str]) -> dict[str, tuple[str, str]]:
    """What every label of a table's rows stands for, in the order of a legend."""
    names = [label for label in dict.fromkeys(labels) if label not in REGIMES]
    return {**REGIMES, **{name: (name, "a rule of the table that carries this name") for name in names}}


# Custom properties of the style sheet. `tint` is the strongest share of a regime's colour behind a token's text.
LIGHT = {
    "page": "#f6f5f1",
    "card": "#ffffff",
    "ink": "#17191c",
    "soft": "#565b63",
    "line": "#d9d7cf",
    "link": "#00598c",
    "bad": "#a33b00",
    "good": "#1b6b3a",
}
DARK = {
    "page": "#121417",
    "card": "#1b1e23",
    "ink": "#f1f1ee",
    "soft": "#aab0b8",
    "line": "#363b43",
    "link": "#7cc4f2",
    "bad": "#ffa36b",
    "good": "#7bd99b",
}
TINT_LIGHT, TINT_DARK = 0.80, 0.48


def style_variables() -> str:
    """The custom properties of both themes, as CSS; paper is light."""
    regimes = {f"regime-{label}": colour for label, colour in REGIME_COLOURS.items()}
    light = _declarations({**LIGHT, **regimes, **_methods(METHOD_COLOURS), "tint": f"{100 * TINT_LIGHT:g}%"})
    dark = _declarations({**DARK, **_methods(METHOD_COLOURS_DARK), "tint": f"{100 * TINT_DARK:g}%"})
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media screen and (prefers-color-scheme: dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}\n"
    )


def contrast(first: str, second: str) -> float:
    """WCAG 2 contrast ratio of two colours, 1 to 21."""
    brighter, darker = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def blend(colour: str, behind: str, share: float) -> str:
    """`share` of a colour over another, in sRGB as browsers do."""
    channels = zip(_channels(colour), _channels(behind), strict=True)
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in channels)


def method_colour(number: int) -> str:
    """The colour of a method of the page, in either theme; methods beyond the palette begin again."""
    return f"var(--method-{number % len(METHOD_COLOURS)})"


def _methods(colours: Sequence[str]) -> dict[str, str]:
    return {f"method-{number}": colour for number, colour in enumerate(colours)}


def _declarations(values: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in values.items())


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _channels(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
