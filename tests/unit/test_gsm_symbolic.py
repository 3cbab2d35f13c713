"""`gsm_symbolic`: hints that give nothing away, splits that share nothing, a verifier that takes gold alone."""

import hashlib
import importlib.metadata
import itertools
import json
import re
import sys
from fractions import Fraction
from typing import Any

import pytest

from dopd.errors import ConfigError
from dopd.tasks import PRIVILEGED_KINDS, SPLITS
from dopd.tasks.gsm_symbolic import GsmSymbolic, privileged_text

pytest.importorskip("reasoning_gym")
pytest.importorskip("math_verify")

PINNED_VERSION = "0.1.25"  # of reasoning-gym: another one may make other problems
PINNED = {
    (0, "train"): "1abd74f5bfc2b7b2",
    (0, "test"): "cbc7406288a6f588",
    (0, "ood"): "99cb4778f9241f0d",
    (1, "train"): "89ef16f5bbaa7924",
    (1, "test"): "911e32858c88f63e",
    (1, "ood"): "f9f644870ab6d970",
}
NUMBER = re.compile(r"(?<![\d.])(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def values(text: str) -> set[Fraction]:
    """The numbers of a text by value: 1,000 and 1000.0 are one number."""
    return {Fraction(number.replace(",", "")) for number in NUMBER.findall(text)}


def worked_out(step: str) -> set[Fraction]:
    """Right sides of the equations of a step whose left side, reckoned here, gives them."""
    found = set()
    sides = step.split("=")
    for left, right in itertools.pairwise(sides):
        result = NUMBER.search(right)
        terms = re.findall(r"[-+*/x]|[\d.,]*\d", re.sub(r"[A-Za-z]{2,}|/[a-z]+|[^\d.,+*/x -]", " ", left))
        # The longest tail of the left side that reads number, operator, number, ...
        for start in range(len(terms)):
            tail = terms[start:]
            if result and len(tail) >= 3 and len(tail) % 2 and _reckoned(tail) == values(result.group()):
                found |= values(result.group())
                break
    return found


def _reckoned(terms: list[str]) -> set[Fraction]:
    numbers, operators = terms[::2], terms[1::2]
    if any(not NUMBER.fullmatch(number) for number in numbers) or any(sign not in "+-*x/" for sign in operators):
        return set()
    products, signs = [Fraction(numbers[0].replace(",", ""))], ["+"]
    for sign, number in zip(operators, numbers[1:], strict=True):
        value = Fraction(number.replace(",", ""))
        if sign in "*x":
            products[-1] *= value
        elif sign == "/" and value:
            products[-1] /= value
        else:
            products.append(value)
            signs.append(sign)
    return {sum(value if sign == "+" else -value for value, sign in zip(products, signs, strict=True))}


def test_reckoning_of_this_test() -> None:
    assert worked_out("he works 6 days/week * 2 weeks/month = 12 days/month") == {12}
    assert worked_out("getting him back to 36+17=53 pebbles") == {53}
    assert worked_out("They need 2 * (3 + 4) = 14") == set()  # brackets are beyond it
    assert worked_out("In total 1,000 x 2 - 500 = 1500 coins, and y = 3") == {1500}
    assert values("$1,000 and 36.0 or 5.") == {1000, 36, 5}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [row for split in SPLITS for row in GsmSymbolic().rows(split, 400, "hints_without_execution")]


def test_hint_without_execution_has_numbers_of_the_question_alone_and_never_the_answer(
    rows: list[dict[str, Any]],
) -> None:
    for row in rows:
        question, hint = values(row["prompt"][0]["content"]), values(row["privileged_context"])
        assert hint <= question, row
        assert not values(row["answer"]) & hint, row


def test_hint_without_execution_has_no_intermediate_result(rows: list[dict[str, Any]]) -> None:
    checked = 0
    for row in rows:
        results = {value for step in row["solution"].splitlines() for value in worked_out(step)}
        assert not results & values(row["privileged_context"]), row
        checked += bool(results)
    assert checked > 0.9 * len(rows)  # else the test above says nothing


def test_result_that_is_also_a_given_number_is_hidden() -> None:
    question = "A tank holds 20 liters, 10 of them water. Half of the rest is juice."
    steps = ["The rest is 20 - 10 = 10 liters.", "Juice: 10 * 0.5 = 5 liters.", "That is 5.0 of 20."]
    hint = privileged_text(question, steps, "5", "hints_without_execution")
    assert hint is not None
    assert hint.splitlines()[1:] == [
        "- The rest is 20 - ? = ? liters.",
        "- Juice: ? * ? = ? liters.",
        "- That is ? of 20.",
    ]


def test_hint_with_execution_stops_before_the_last_step_and_hides_the_answer() -> None:
    for row in GsmSymbolic().rows("train", 200, "hints_with_execution"):
        hint, solution = row["privileged_context"], row["solution"].splitlines()
        assert len(hint.splitlines()) == len(solution) - 1, row  # a title; without the last step and the conclusion
        assert not values(row["answer"]) & values(hint), row


def test_other_kinds_say_what_they_are() -> None:
    (row,) = GsmSymbolic().rows("test", 1, "final_answer")
    assert row["answer"] in row["privileged_context"]
    (row,) = GsmSymbolic().rows("test", 1, "none")
    assert row["privileged_context"] is None
    for row in GsmSymbolic().rows("test", 100, "summarised_hint"):
        assert len(row["privileged_context"].splitlines()) == 1
        assert not values(row["answer"]) & values(row["privileged_context"].split("It begins", 1)[1]), row


def test_splits_share_no_question_and_a_longer_draw_begins_like_a_shorter_one() -> None:
    source = GsmSymbolic()
    drawn = {split: source.rows(split, 300) for split in SPLITS}
    questions = {split: {row["prompt"][0]["content"] for row in part} for split, part in drawn.items()}
    assert all(len(part) == 300 for part in questions.values())  # nothing is drawn twice
    assert not questions["train"] & questions["test"]
    assert not questions["ood"] & (questions["train"] | questions["test"])
    steps = {split: {json.loads(row["metadata"])["num_steps"] for row in part} for split, part in drawn.items()}
    assert max(steps["train"] | steps["test"]) < min(steps["ood"])
    assert source.rows("train", 40) == drawn["train"][:40]
    assert source.rows("train", 10, start=30) == drawn["train"][30:40]
    assert GsmSymbolic(seed=1).rows("train", 5) != drawn["train"][:5]


@pytest.mark.parametrize(("seed", "split"), list(PINNED))
def test_first_rows_of_a_seed_do_not_change(seed: int, split: str) -> None:
    if importlib.metadata.version("reasoning-gym") != PINNED_VERSION:
        pytest.skip(f"hashes are of reasoning-gym {PINNED_VERSION}")
    rows = GsmSymbolic(seed=seed).rows(split, 100, "hints_without_execution")
    text = json.dumps(rows, sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == PINNED[seed, split]


def test_verifier_takes_gold_and_nothing_near_it() -> None:
    source = GsmSymbolic()
    for row in source.rows("train", 40) + source.rows("ood", 10):
        gold = float(row["answer"])
        assert source.verify(row["solution"], row) == 1.0, row
        assert source.verify(f"So \\boxed{{{row['answer']}}}", row) == 1.0
        steps = "\n".join(row["solution"].splitlines()[:-1])
        for wrong in (gold + 1, gold - 1, 10 * gold + 10, -gold - 1, gold + 0.5):
            assert source.verify(f"{steps}\nThe answer is {wrong:g}.", row) == 0.0, (row, wrong)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("The answer is 1,044.", 1.0),
        ("The answer is $1044.00.", 1.0),
        ("**The answer is 1044 apples.**", 1.0),
        ("", 0.0),
        ("The answer is N.", 0.0),
        ("The answer is -1044.", 0.0),
        ("1044\nThe answer is 1045.", 0.0),
        ("The answer is 1044.\nWait: the answer is 1045.", 0.0),
        ("The answer is 1045, not 1044.", 0.0),
        ("1040 1041 1042 1043 1044 1045 1046", 0.0),
        ("The answer is 10440.", 0.0),
    ],
)
def test_verifier_on_forms_and_tricks(completion: str, score: float) -> None:
    assert GsmSymbolic().verify(completion, {"answer": "1044"}) == score


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("reasoning_gym", lambda: GsmSymbolic().rows("train", 1)),
        ("math_verify", lambda: GsmSymbolic().verify("4", {"answer": "4"})),
    ],
)
def test_missing_package_is_one_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, package: str, call: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match="pip install"):
        call()


def test_unknown_split_and_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="split"):
        GsmSymbolic().rows("training", 1)
    with pytest.raises(ConfigError, match=PRIVILEGED_KINDS[0]):
        GsmSymbolic().rows("train", 1, "hint")
