"""Hints that leak and hints that do not, from templates: some that the rules were written beside, some held out.

Nobody changes a rule for the held-out ones: what they give is the figure in the documentation.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
_NAMES = ["Mira", "Tom", "Ada", "Jonas", "Lea", "Omar", "Nina", "Paul"]
_THINGS = ["apples", "books", "stamps", "marbles", "cards", "pencils", "shells", "tickets"]
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def in_words(n: int) -> str:
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10 - 2] + (f"-{_ONES[n % 10]}" if n % 10 else "")
    return f"{_ONES[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")


@dataclass(frozen=True)
class Family:
    """Problems of one form: `draw` gives a row and the fields of the templates."""

    name: str
    draw: Callable[[random.Random], tuple[Row, dict[str, Any]]]
    leaks: tuple[str, ...]
    clean: tuple[str, ...]
    held_out_leaks: tuple[str, ...]
    held_out_clean: tuple[str, ...]


def _boxes(rng: random.Random) -> tuple[Row, dict[str, Any]]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    a, b, c = rng.randint(3, 9), rng.randint(6, 19), rng.randint(3, 25)
    x, y = a * b, a * b + c
    row = {
        "prompt": f"{name} has {a} boxes with {b} {thing} each and gets {c} more {thing} from a friend. How"
        " many {thing} does {name} have?",
        "solution": f"{name} has {a} * {b} = {x} {thing} in boxes. With the gift there are {x} + {c} = {y}"
        " {thing}.\n#### {y}",
        "answer": str(y),
    }
    return row, {
        "N": name,
        "T": thing,
        "a": a,
        "b": b,
        "c": c,
        "x": x,
        "y": y,
        "w": in_words(y),
        "W": in_words(x),
        "p": y - 1,
        "d": 2 * y,
    }


def _small(rng: random.Random) -> tuple[Row, dict[str, Any]]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    y, a = rng.randint(2, 9), rng.randint(11, 19)
    b = a - y
    row = {
        "prompt": f"{name} had {a} {thing} and gave {b} of them away. How many {thing} does {name} keep?",
        "solution": f"{a} - {b} = {y}\n#### {y}",
        "answer": rng.choice([str(y), f"{y}.0", y]),
    }
    return row, {"N": name, "T": thing, "a": a, "b": b, "y": y, "w": in_words(y), "d": 2 * y, "p": y + 1}


def _fraction(rng: random.Random) -> tuple[Row, dict[str, Any]]:
    name = rng.choice(_NAMES)
    top, share, percent, decimal = rng.choice(
        [(1, 5, 20, "0.2"), (2, 5, 40, "0.4"), (3, 5, 60, "0.6"), (3, 8, 37.5, "0.375"), (5, 8, 62.5, "0.625")]
    )
    factor = rng.randint(3, 7)
    total, red = share * factor, top * factor
    answer = rng.choice([f"{top}/{share}", f"\\frac{{{top}}}{{{share}}}", decimal, f"{percent}%"])
    row = {
        "prompt": f"{name} draws one ball from a bag with {red} red balls and {total - red} blue balls. What is"
        " the probability that it is red?",
        "solution": f"There are {red} + {total - red} = {total} balls, so the probability is {red}/{total} ="
        " {top}/{share}.",
        "answer": answer,
    }
    return row, {"N": name, "t": top, "s": share, "pc": percent, "de": decimal, "r": red, "u": total - red, "n": total}


def _options(rng: random.Random) -> tuple[Row, dict[str, Any]]:
    subject, options = rng.choice(
        [
            ("Which gas do plants take in for photosynthesis?", ["carbon dioxide", "oxygen", "nitrogen", "helium"]),
            ("Which planet is closest to the sun?", ["Mercury", "Venus", "Earth", "Mars"]),
            ("Which organ pumps blood through the body?", ["the heart", "the liver", "the lungs", "the stomach"]),
            ("Which metal is liquid at room temperature?", ["mercury", "iron", "copper", "zinc"]),
        ]
    )
    right, order = options[0], rng.sample(options, 4)
    letter = "ABCD"[order.index(right)]
    others = [one for one in "ABCD" if one != letter]
    style = rng.choice(["{0}. {1}", "({0}) {1}", "{0}) {1}"])
    row = {
        "prompt": "\n".join([subject, *(style.format(key, text) for key, text in zip("ABCD", order, strict=True))]),
        "answer": rng.choice([letter, f"({letter})", f"{letter}. {right}"]),
    }
    return row, {"L": letter, "l": letter.lower(), "o": right, "q": others[0], "r": others[1], "s": others[2]}


def _truth(rng: random.Random) -> tuple[Row, dict[str, Any]]:
    n = rng.choice([91, 97, 51, 53, 57, 59, 87, 89, 111, 113, 119, 127])
    prime = all(n % k for k in range(2, n))
    row = {
        "prompt": f"Is the following statement true? The number {n} has no divisor other than 1 and itself."
        " Answer yes or no.",
        "answer": rng.choice(["yes", "Yes", "true"]) if prime else rng.choice(["no", "No", "false"]),
    }
    said = {"Y": "Yes", "v": "true", "h": "holds", "c": "correct", "y": "yes"}
    denied = {"Y": "No", "v": "false", "h": "fails", "c": "wrong", "y": "no"}
    return row, {"n": n, **(said if prime else denied)}


def _text(rng: random.Random) -> tuple[Row, dict[str, Any]]:
    question, answer, about = rng.choice(
        [
            ("What is the capital of France?", "Paris", "a city on the Seine"),
            ("Who wrote the play about the prince of Denmark?", "William Shakespeare", "an author of Stratford"),
            ("Which element has the symbol Fe?", "iron", "a metal that rusts"),
            ("What is the largest ocean?", "the Pacific Ocean", "the one between Asia and America"),
            (
                "Which language do most people in Brazil speak?",
                "Portuguese",
                "that of the country which had the colony",
            ),
        ]
    )
    return {"prompt": question, "answer": answer}, {
        "A": answer,
        "low": answer.lower(),
        "up": answer.upper(),
        "about": about,
    }


def _formula(rng: random.Random) -> tuple[Row, dict[str, Any]]:
    a, b = rng.sample(range(2, 9), 2)
    row = {
        "prompt": f"Factor the polynomial $x^2 + {a + b}x + {a * b}$.",
        "answer": rng.choice([f"(x+{a})(x+{b})", f"$(x + {a})(x + {b})$"]),
        "solution": f"The numbers {a} and {b} have the sum {a + b} and the product {a * b}, so it is (x+{a})(x+{b}).",
    }
    return row, {"a": a, "b": b, "s": a + b, "p": a * b}


def _unit(rng: random.Random) -> tuple[Row, dict[str, Any]]:
    name, speed, hours = rng.choice(_NAMES), rng.randint(13, 29), rng.choice([3, 5, 6, 7])
    km = speed * hours
    row = {
        "prompt": f"{name} rides at {speed} km per hour for {hours} hours. How far does {name} get?",
        "answer": rng.choice([f"{km} km", f"{km} kilometers"]),
        "solution": f"{speed} * {hours} = {km}, so {name} gets {km} km far.",
    }
    return row, {"N": name, "v": speed, "h": hours, "k": km, "m": f"{km * 1000:,}", "w": in_words(km)}


FAMILIES = (
    Family(
        "sums",
        _boxes,
        leaks=(
            "The answer is {y}.",
            "Multiply first; the result is {y}.",
            "Multiply, then add: x = {y}.0",
            "You should end up with {w}.",
            "\\boxed{{{y}}}",
            "First {a} * {b} = {x}, then add the rest.",
            "{N} has {y} {T}.",
            "Das Ergebnis ist {y}.",
            "The boxes hold {x} {T}; add {c} to that.",
            "It is one more than {p}.",
        ),
        clean=(
            "Multiply the number of boxes by the {T} in each, then add the gift.",
            "Step 1: find how many {T} the boxes hold. Step 2: add the {c} from the friend.",
            "Multiply {a} by {b}, then add {c}.",
            "Use {a} * {b} for the boxes. Do not forget the friend.",
            "1. Work out the boxes.\n2. Add what {N} gets from the friend.",
            "There are two operations: a product, and a sum.",
            "Think of the boxes as {a} equal groups.",
            "Compute the product ? = {a} * {b}; the total is ? + {c}.",
        ),
        held_out_leaks=(
            "In the end everything comes to {y}, you just have to justify it.",
            "{y} -- now explain why.",
            "Count the boxes, count the gift, and report {w} {T}.",
            "The number you are looking for is {y}",
            "Half of {d} is what you want.",
            "Since {a}x{b}={x}, only the gift of {c} is missing.",
            "Boxes: {x}. Gift: {c}. Put these together.",
            "Go through the boxes (this makes {x}) and add the friend's.",
            "La respuesta es {y}.",
            "$ \\text{{total}} = {y} $",
            "Adding {c} to {x} does the job.",
            "Final: {y}!",
            "Make sure that you reach {y} {T} at the end.",
            "total={y}",
            "The correct tally reads {y} {T}, not {p}.",
            "Begin with {W} {T} in the boxes.",
        ),
        held_out_clean=(
            "Two quantities matter here: what is in the boxes, and what the friend brings. Find the former by a"
            " product.",
            "How many {T} would a single box hold? Repeat that for all {a} boxes, and only then look at the"
            " gift of {c}.",
            "Set up an expression of the form boxes * {T} per box + gift.",
            "(a) What do {a} boxes of {b} hold? (b) What changes with {c} more?",
            "Let n be the number of {T} in the boxes. Express n by {a} and {b}, then the total by n and {c}.",
            "Careful: the {c} {T} of the friend are not in a box, so they must not be multiplied.",
            "Plan:\n- product of the first 2 numbers\n- sum with the third one\nWrite the final number alone on"
            " the last line.",
            "Equal groups call for multiplication; something extra calls for addition. Apply both, in this order.",
            "One way: imagine the {T} of each box in a row. The rows give a rectangle of {a} by {b}. Then the"
            " extra ones.",
            "First boxes, then friend. Check your arithmetic with a rough estimate.",
        ),
    ),
    Family(
        "small",
        _small,
        leaks=(
            "The answer is {y}.",
            "Subtract; you get {y}.",
            "{y} {T}",
            "{N} keeps {w} {T}.",
            "{a} - {b} = {y}",
            "There are {y} left.",
            "It's {y}.",
            "answer {y}",
        ),
        clean=(
            "Subtract {b} from {a}.",
            "Only one operation is needed: take away what was given.",
            "Step 2: subtract. Step 1: find out what {N} had.",
            "Start with {a} {T} and take {b} away.",
            "Giving away means subtraction; no other number is needed.",
        ),
        held_out_leaks=(
            "{N} is left with {y}.",
            "Taking {b} from {a} leaves {y} {T}.",
            "Result: {w}",
            "If you do it right you will see that {y} {T} remain.",
            "We are after a number, and that number is {w}.",
            "{y}",
            "ANSWER = {y}",
            "Take the difference, which is {y}.",
            "The value you need equals {d}/2.",
            "the solution would be {y} {T}",
        ),
        held_out_clean=(
            "A part of the {a} {T} goes away. What is the sign for that?",
            "There is a single step: compare what {N} had with what {N} gave.",
            "Write {a} - {b} and work it out.",
            "Imagine the {a} {T} in a row, and cross out {b} of them. Count the rest.",
            "You need one of the four basic operations. Which one makes a number smaller?",
            "Ask yourself: {b} plus what makes {a}?",
            "Let k be what {N} keeps. Then k + {b} = {a}; solve for k.",
        ),
    ),
    Family(
        "fractions",
        _fraction,
        leaks=(
            "The probability is {t}/{s}.",
            "It comes to {pc}%.",
            "So the chance is {de}.",
            "$\\frac{{{t}}}{{{s}}}$",
            "There are {r} + {u} = {n} balls, of which {r} are red.",
        ),
        clean=(
            "Divide the number of red balls by the number of all balls, and simplify.",
            "Count all balls first: {r} red ones and {u} blue ones.",
            "A probability is favourable cases over all cases.",
            "Find the sum of {r} and {u}; it goes below the line of the fraction.",
        ),
        held_out_leaks=(
            "You will find {pc} percent.",
            "Reduce the fraction until you have \\dfrac{{{t}}}{{{s}}}.",
            "On average, {t} out of {s} draws, that is {de}, are red",
            "{r}/{n} is the fraction to simplify",
            "In decimal form one obtains {de}",
            "With {n} balls in the bag, what is the share of the red ones?",
        ),
        held_out_clean=(
            "What is the size of the whole bag? The red balls are a part of it.",
            "Every ball is equally likely, so compare {r} with everything that is in the bag.",
            "Use P = favourable / possible. Mind that possible includes the {r} red balls.",
            "Write a fraction with {r} on top. Below it, put the balls of both colours together. Cancel common"
            " factors.",
            "Do not divide red by blue: that gives odds, not a probability.",
        ),
    ),
    Family(
        "options",
        _options,
        leaks=(
            "The answer is ({L}).",
            "Option {L} is right.",
            "answer: {L}",
            "Choose {L}.",
            "{q}, {r} and {s} are wrong.",
            "The answer is {o}.",
            "({L})",
        ),
        clean=(
            "Go through the options one by one and recall what you know of each.",
            "A common mistake is to take the first option that sounds familiar.",
            "Compare options A and B first.",
            "Option {q} is wrong: think about why.",
            "Think of a definition, then match it with the choices (A) to (D).",
        ),
        held_out_leaks=(
            "It has to be {L}, as nothing else fits.",
            "You can rule out {q}, {r}, and {s}.",
            "Go with choice {l}.",
            "Pick the one that says {o}; the answer is {o}",
            "Correct option: **{L}**",
            "{L} is the only one that works.",
            "The right choice here is {L}) {o}",
            "Everything points to option {L}.",
        ),
        held_out_clean=(
            "Look at each of the four choices, and strike out those that you can refute.",
            "A good start is to ask what the key word in the question means; no choice is a trick.",
            "Is A plausible? Is B? Give a reason for each before you decide.",
            "You can eliminate ({q}) at once. Of the others, ask what sets them apart.",
            "The options differ in one property. Name it, then decide.",
            "Answer with a single letter. A short justification helps.",
        ),
    ),
    Family(
        "yes or no",
        _truth,
        leaks=(
            "The answer is {y}.",
            "{Y}.",
            "{Y}, and here is why: try small divisors.",
            "The statement is {v}.",
            "The claim {h}.",
        ),
        clean=(
            "Try all primes up to the square root of {n}.",
            "Check whether the statement is true by dividing by 2, 3, 5 and 7.",
            "There is no need to test even divisors.",
            "Decide between yes and no only after you have tried all of them.",
            "If no small prime divides {n}, it is prime.",
        ),
        held_out_leaks=(
            "This is {v}.",
            "In short: {y}!",
            "You should conclude that the assertion is {c}.",
            "Testing the primes up to 11 shows that the claim is indeed {v}.",
            'Say "{y}" and give your reasons.',
            "Hint: it's {v}",
        ),
        held_out_clean=(
            "Look for a divisor among the small primes; no luck with 2 or 5 is to be expected.",
            "Sum the digits to test for 3. Then go on with 7, and with 11 if need be.",
            "A true statement of this kind needs all candidates ruled out; one divisor is enough to show that"
            " it is false.",
            "Is it true that {n} is odd? What does that say about even divisors?",
            "Write down the list of primes below 12 and go through it. No calculator is needed.",
            "Answer yes if you find none, and no if you find one.",
        ),
    ),
    Family(
        "text",
        _text,
        leaks=("The answer is {A}.", "It is {A}.", "{up}", "Think of {A}, of course.", "answer: {low}"),
        clean=(
            "Think of {about}.",
            "Recall what you learned at school.",
            "The answer is a name.",
            "Start with the key word of the question.",
        ),
        held_out_leaks=(
            "People often forget {A} here.",
            "What about {low}?",
            "Only {A} fits the description",
            "Remember: '{A}'!",
            "It starts with {A}...",
        ),
        held_out_clean=(
            "It has something to do with {about}.",
            "Do not confuse it with something that sounds alike; look at every word of the question.",
            "Write down what you know, then leave out what does not fit.",
            "This is a question of general knowledge. An atlas or a dictionary would tell.",
        ),
    ),
    Family(
        "formulas",
        _formula,
        leaks=(
            "The answer is $(x+{a})(x+{b})$.",
            "$x^2+{s}x+{p} = (x+{b})(x+{a})$",
            "It factors as (x + {a})(x + {b}).",
        ),
        clean=(
            "Find two numbers whose sum is {s} and whose product is {p}.",
            "Write it as $(x + m)(x + n)$ and compare coefficients.",
            "Look for two integers m and n with $mn = {p}$.",
        ),
        held_out_leaks=(
            "Use (x+{a})(x+{b}) and expand to check.",
            "One gets \\[ (x + {b})(x + {a}) \\]",
            "\\boxed{{(x+{b})(x+{a})}}",
        ),
        held_out_clean=(
            "List the pairs of factors of {p}; one pair adds up to the coefficient of $x$.",
            "Use the quadratic formula on $x^2 + {s}x + {p} = 0$, and turn each root r into a factor $x - r$.",
            "Both constants are positive, as {s} and {p} are. Try (x + ?)(x + ?).",
        ),
    ),
    Family(
        "units",
        _unit,
        leaks=("The distance is {k} km.", "{m} m", "{N} gets {w} kilometers far.", "Multiply: {v} * {h} = {k}."),
        clean=(
            "Distance is speed times time.",
            "Multiply {v} km per hour by {h} hours; the hours cancel.",
            "Give the result in km.",
        ),
        held_out_leaks=(
            "After {h} hours the odometer shows {m} metres more.",
            "That is a ride of {k} kilometres.",
            "Write {k}km.",
            "At that speed the trip covers {w} km",
        ),
        held_out_clean=(
            "In 1 hour the ride covers {v} km. What about {h} of these?",
            "Units guide you: (km / h) * h leaves km.",
            "No conversion to metres is needed (1 km = 1000 m would only make numbers larger).",
            "Make a table with the hours 1, 2, ... in one row and the distance in the other.",
        ),
    ),
)


def hints(*, held_out: bool, leaking: bool, seed: int = 0, each: int = 6) -> list[Row]:
    """Rows with a hint of every template, `each` times with other problems."""
    rng = random.Random(f"{seed} {held_out} {leaking}")
    rows = []
    for family in FAMILIES:
        templates = {
            (False, False): family.clean,
            (False, True): family.leaks,
            (True, False): family.held_out_clean,
            (True, True): family.held_out_leaks,
        }[held_out, leaking]
        for template in templates:
            for _ in range(each):
                row, fields = family.draw(rng)
                rows.append({**row, "privileged_context": template.format(**fields), "template": template})
    return rows
