"""What hints give away: on templates that no rule was written for, on single cases, and from the command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hints_kit
import pytest
import torch
from PIL import Image

from dopd.cli.main import main
from dopd.hints.answers import answer_text
from dopd.hints.audit import Audit, audit_rows
from dopd.hints.leaks import Hint, leaks_of
from dopd.tasks import get_source

APPLES = "Tom has 5 boxes with 8 apples each. He buys 2 more apples. How many apples does he have now?"
WORKED = "5*8=40\n40+2=42\n#### 42"
COWS = "A farmer has 12 cows and sells 9 of them. How many cows remain?"
PENS = "Ann has 10 pens and loses 5. How many pens are left?"
BOILS = "What is the boiling point of water?\nA) 50 C\nB) 75 C\nC) 100 C\nD) 120 C"
SLICES = "What fraction of the 8 slices is eaten if 4 are eaten?"


def found_in(rows: list[dict[str, Any]]) -> list[bool]:
    return [
        bool(leaks_of(Hint(row["privileged_context"], row["prompt"], answer_text(row), row.get("solution") or "")))
        for row in rows
    ]


def figures(held_out: bool) -> tuple[int, int, float, float]:
    """Planted leaks, clean hints, precision and recall."""
    leaking = found_in(hints_kit.hints(held_out=held_out, leaking=True))
    clean = found_in(hints_kit.hints(held_out=held_out, leaking=False))
    return len(leaking), len(clean), sum(leaking) / (sum(leaking) + sum(clean)), sum(leaking) / len(leaking)


def test_templates_that_the_rules_were_written_beside() -> None:
    num_leaks, num_clean, precision, recall = figures(held_out=False)
    assert min(num_leaks, num_clean) >= 200 and precision >= 0.98 and recall >= 0.98


def test_templates_that_the_rules_have_not_seen() -> None:
    """The figures of docs/how-to/make-hints.md: a rule is not changed for these templates."""
    num_leaks, num_clean, precision, recall = figures(held_out=True)
    assert min(num_leaks, num_clean) >= 200 and precision >= 0.95 and recall >= 0.95
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "make-hints.md").read_text(encoding="utf-8")
    assert f"{num_leaks} planted leaks and {num_clean} clean hints" in page
    assert f"precision {precision:.3f} and recall {recall:.3f}" in page


def test_held_out_templates_are_others() -> None:
    for family in hints_kit.FAMILIES:
        seen = {*family.leaks, *family.clean}
        assert not seen & {*family.held_out_leaks, *family.held_out_clean}


@pytest.mark.parametrize(
    ("question", "answer", "leaking"),
    [
        (APPLES, "42", ["the result is 42", "x = 42.0", "forty-two", "Spoiler: 42.", r"\boxed{42}", "6*7", "So"
        " we get 7*6"]),
        (APPLES, "42", [r"It is $\frac{84}{2}$.", "The answer lies between 41 and 43.", "double 21", "4.2e1",
        "42 apples"]),
        (APPLES, 42, ["Die Antwort lautet 42", "La r\u00e9ponse est quarante-deux",
        "\u7b54\u6848\u662f\u56db\u5341\u4e8c", "4\u200b2"]),
        (APPLES, "42", ["First 5*8=40, then add 2.", "After the first step you have 40.", "5 groups of 8 is 40"]),
        (COWS, "3", ["The answer is 3.", "3 cows remain", "so it's three", "12-9=3", "You will have 3 left", "3"]),
        (PENS, "5", ["The answer is 5.", "You get 5.", "5 pens are left.", "10 - 5 = 5", "The result equals five"]),
        (BOILS, "(C)", ["The correct choice is option C", "Eliminate A, B and D.", "Answer: C", "It is 100 C.", "c"]),
        (BOILS, "C) 100 C", ["C is correct because water boils there", "It's not A, B or D.", "**C**"]),
        ("Is 91 prime?", "no", ["The statement is false.", "No, it isn't.", "7*13, so no.", "NO", "It is not true"]),
        ("Is 97 prime?", True, ["Yes, indeed.", "That's true.", "It is prime, yes.", "True"]),
        (SLICES, "1/2", ["0.5", "one half", "50%", r"\frac12", "fifty percent", "4/8 = 1/2", "\u00bd"]),
        (SLICES, "0.5", ["1/2", "50 %", r"\dfrac{1}{2}"]),
        ("A train goes 240 km at 80 km/h. How long?", "3 hours", ["It takes 180 minutes.", "three hours"]),
        ("What is 15% of 8000 dollars?", "$1,200", ["It's 1200", "1.2k", "$1,200.00", "twelve hundred", "1 200"]),
        ("Who is older, Ann or Bob?", "Ann", ["Ann is older", "It is Ann.", "The answer is Ann"]),
        ("Solve x^2-5x+6=0", "2, 3", ["x=2 and x=3", "{3, 2}", "2 and 3"]),
        ("Find the length of the diagonal.", r"2\sqrt{3}", [r"$\sqrt{12}$", "2\u221a3"]),
        ("Expand (x+1)^2", "x^2+2x+1", ["$1+2x+x^2$", "It is x^2+2x+1"]),
        ("Solve x+8=3", "-5", ["minus five", "x=-5"]),
        ("When does it arrive?", "3:45 PM", ["at 15:45"]),
    ],
)  # fmt: skip
def test_leaks(question: str, answer: Any, leaking: list[str]) -> None:
    solution = WORKED if question == APPLES else ""
    rows = [{"prompt": question, "answer": answer, "privileged_context": one, "solution": solution} for one in leaking]
    assert [one for one, found in zip(leaking, found_in(rows), strict=True) if not found] == []


@pytest.mark.parametrize(
    ("question", "answer", "clean"),
    [
        (APPLES, "42", ["Multiply 5 by 8 and add 2 more apples.", "Step 1) 5*8=? Step 2) ?+2=?", "1."
        " Multiply.\n2. Add 2."]),
        (APPLES, "42", ["The answer is less than 50.", "For example, 3 boxes of 4 would be 3*4=12.", "a whole"
        " number"]),
        (COWS, "3", ["There are 3 steps.", "Use three numbers.", "Round to 3 decimal places.", "Hint 3: subtract 9"]),
        (COWS, "1", ["Take the first number; one step is enough.", "1. Subtract.", "There is one operation to do."]),
        (PENS, "5", ["She loses 5 pens.", "Subtract 5 from 10.", "10 - 5 is all you need."]),
        (BOILS, "C", ["Test option C by substitution.", "Options C and D are close; compare them.", "A good"
        " start: think."]),
        (BOILS, "A", ["A common mistake is to guess.", "A is a letter like all others: look at each option."]),
        ("Is 91 prime?", "no", ["There are no even divisors.", "Is it true that 7 divides it?", "No shortcut"
        " exists"]),
        ("Is 97 prime?", "yes", ["Make sure it is correct.", "Yes or no? Decide by testing primes."]),
        (SLICES, "1/2", ["Divide 4 by 8.", "Write 4/8 and simplify."]),
        ("A week has how many days?", "7", ["A list of 7 things will do."]),
        ("Who is older, Ann or Bob?", "Ann", ["Compare Ann and Bob.", "Is Ann older than Bob?"]),
        ("Expand (x+1)^2", "x^2+2x+1", ["Use (a+b)^2 = a^2+2ab+b^2", "Multiply (x+1) by (x+1)"]),
        ("Solve x+8=3", "-5", ["Subtract 8 from both sides.", "The result is negative."]),
    ],
)  # fmt: skip
def test_clean_hints(question: str, answer: Any, clean: list[str]) -> None:
    rows = [{"prompt": question, "answer": answer, "privileged_context": one} for one in clean]
    assert [one for one, found in zip(clean, found_in(rows), strict=True) if found] == []


CASES = json.loads((Path(__file__).parents[1] / "hint_cases.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{'leaks' if case['leaking'] else 'clean'}: {case['answer']}")
def test_hints_that_people_write(case: dict[str, Any]) -> None:
    rows = [
        {"prompt": case["question"], "answer": case["answer"], "solution": case["solution"], "privileged_context": hint}
        for hint in case["hints"]
    ]
    assert [hint for hint, leaks in zip(case["hints"], found_in(rows), strict=True) if leaks != case["leaking"]] == []


@pytest.mark.parametrize("name", ["dag", "graph", "program", "gsm_symbolic"])
def test_embedded_tasks_keep_what_their_kinds_promise(name: str) -> None:
    source = get_source(name)
    audits = {kind: audit_rows(source.rows("train", 12, kind)) for kind in source.privileged_kinds[1:]}
    assert len(audits["final_answer"].leaks) == 12
    assert not audits["hints_without_execution"].leaks and not audits["summarised_hint"].leaks


def test_results_of_steps_leak_where_no_step_is_to_be_carried_out() -> None:
    row = {"prompt": APPLES, "answer": "42", "privileged_context": "First 5*8=40. Then add the rest."}
    assert audit_rows([row]).leaks[0].keys() == {"result"}
    assert not audit_rows([row], kind="steps-with-execution").leaks
    assert not audit_rows([{**row, "hint_kind": "steps-with-execution"}]).leaks


def test_words_of_a_solution() -> None:
    solution = "Tom fills 5 * 8 = 40 places in the boxes that he has, and the 2 apples make 42 of them together."
    row = {"prompt": APPLES, "solution": solution, "answer": "42", "privileged_context": f"{solution} That is all."}
    assert "overlap" in audit_rows([row]).leaks[0]
    masked = solution.replace("40", "?").replace("42", "?")
    assert not audit_rows([{**row, "privileged_context": masked}]).leaks


def coverage_of(*rows: dict[str, Any], **options: Any) -> dict[str, list[int]]:
    found = audit_rows(
        [{"prompt": APPLES, "answer": "42", "privileged_context": "Multiply, then add.", **row} for row in rows],
        **options,
    )
    return {name: numbers for name, numbers in found.coverage.rows.items() if numbers}


def test_coverage() -> None:
    empty = [{"privileged_context": text} for text in (None, "", " \u200b", "N/A", "...")]
    assert coverage_of(*empty) == {"empty": [0, 1, 2, 3, 4]}
    assert coverage_of({}, {"prompt": "What else?", "answer": "1"}, {"privileged_context": "Other."}) == {
        "duplicated": [0, 1]
    }
    assert coverage_of({}, {}) == {}  # one question twice may have one hint
    assert coverage_of({"privileged_context": "The answer is 41."}, {"privileged_context": "5 * 8 = 45"}) == {
        "contradictory": [0, 1]
    }
    assert coverage_of({"prompt": "Is 7 odd?", "answer": "yes", "privileged_context": "It is false."}) == {
        "contradictory": [0]
    }
    assert coverage_of({"prompt": BOILS, "answer": "C", "privileged_context": "Choose B."}) == {"contradictory": [0]}
    assert coverage_of({"privileged_context": "word " * 301}) == {"over_long": [0]}
    assert coverage_of({"privileged_context": "word " * 5}, max_words=4) == {"over_long": [0]}
    german = "Zuerst berechne das Produkt und dann ist die Summe mit der Zahl von Tom zu bilden."
    assert coverage_of({"privileged_context": german}) == {"language": [0]}
    assert coverage_of(
        {"privileged_context": "\u5148\u8ba1\u7b97\u4e58\u79ef\uff0c\u7136\u540e\u76f8\u52a0\u3002"}
    ) == {"language": [0]}


def test_boxes_outside_their_image() -> None:
    row = {
        "prompt": [{"role": "user", "content": "Where is the cat?"}],
        "images": [Image.new("RGB", (40, 30))],
        "answer": "left",
    }
    good = [{"xyxy": [1, 2, 30, 20], "image": 0}, {"xyxy": [0.1, 0.1, 0.9, 1.0]}]
    bad = [
        {"xyxy": [1, 2, 41, 20]},
        {"xyxy": [5, 2, 3, 20]},
        {"xyxy": [1, 2, 3]},
        {"xyxy": [1, 2, 3, 4], "image": 1},
        {"xyxy": [-1, 2, 3, 4]},
    ]
    rows = [{**row, "boxes": [box], "privileged_context": f"Look {n}"} for n, box in enumerate([*good, *bad])]
    assert audit_rows(rows).coverage.rows["boxes"] == [2, 3, 4, 5, 6]
    written = [{**row, "privileged_context": text} for text in ("cat [1, 2, 30, 20]", "cat [1, 2, 50, 20]")]
    assert audit_rows(written).coverage.rows["boxes"] == [1]


@pytest.fixture()
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with columns of other names: one leak, one clean hint, one row without a hint."""
    monkeypatch.chdir(tmp_path)
    hints = ["The answer is <b>42</b>.", "Multiply, then add.", None]
    lines = [json.dumps({"question": APPLES, "plan": hint, "gold": "42"}) for hint in hints]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "rows.jsonl"


COLUMNS = ["--columns", "{prompt: question, privileged_context: plan, answer: gold}"]


def test_the_command_writes_json_and_a_page(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hints", "audit", "rows.jsonl", *COLUMNS, "--json", "a.json", "--html", "a.html"]) == 0
    found = json.loads(Path("a.json").read_text(encoding="utf-8"))
    assert found["leaks"] == [{"row": 0, "kinds": ["verbatim", "number"]}]
    assert found.keys() == {"leaks", "coverage"}
    assert found["coverage"]["rows"] == 3 and found["coverage"]["with_hint"] == 2 and found["coverage"]["empty"] == [2]
    assert "1 of 2 hints leak (50.0%)" in capsys.readouterr().out
    page = Path("a.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;<mark>42</mark>&lt;/b&gt;" in page and "<script" not in page
    assert "default-src 'none'" in page.partition("</head>")[0]


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (["--max-leaks", "0.5"], 0),
        (["--max-leaks", "0.4"], 1),
        (["--max-faults", "0.3"], 1),
        (["--max-faults", "0.34"], 0),
        (["--max-leaks", "1.5"], 2),
    ],
)
def test_exit_status(flags: list[str], status: int, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        got = main(["hints", "audit", "rows.jsonl", *COLUMNS, *flags])
    except SystemExit as left:
        got = left.code
    assert got == status


def test_missing_columns_are_answered_with_a_mapping(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hints", "audit", "rows.jsonl", "--columns", "{prompt: question}"]) == 2
    assert "--columns '{privileged_context: plan}'" in capsys.readouterr().err
    assert main(["hints", "audit", "task:daag"]) == 2
    assert "dag" in capsys.readouterr().err


def test_a_hint_that_is_no_text_is_named_with_its_line(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.jsonl").write_text('{"prompt": "a", "privileged_context": ["b"]}\n', encoding="utf-8")
    assert main(["hints", "audit", "wrong.jsonl"]) == 2
    assert "'wrong.jsonl', line 1" in capsys.readouterr().err


def test_hints_and_names_are_shown_and_not_obeyed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"prompt": "\x1b[31m6*7?", "answer": "42", "privileged_context": "\x1b[2J the answer is 42 \u202e<script>"}
    Path("odd.jsonl").write_text(json.dumps(rows), encoding="utf-8")
    assert main(["hints", "audit", "odd.jsonl", "--html", "odd.html"]) == 0
    page, printed = Path("odd.html").read_text(encoding="utf-8"), capsys.readouterr().out
    assert not any(sign in page + printed for sign in ("\x1b[2J", "\x1b[31m", "\u202e")) and "<script" not in page
    assert "\\x1b[2J" in page


def test_formulas_are_never_read_as_python(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluated: list[str] = []
    monkeypatch.setattr("math_verify.parser.parse_expr", lambda text, **_: evaluated.append(text))
    code = "__import__('os').system('false')"
    hints = [f"x = {code}+1", f"${code}$", f"\\boxed{{{code}}}", "$2+x-1$", "the answer is 1*x+1"]
    rows = [{"prompt": "q", "answer": "x+1", "privileged_context": hint} for hint in hints]
    assert 3 in audit_rows(rows).leaks and evaluated == []


def test_a_page_is_not_written_over_something_else(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.html").write_text("mine", encoding="utf-8")
    assert main(["hints", "audit", "rows.jsonl", *COLUMNS, "--html", "mine.html"]) == 2
    assert Path("mine.html").read_text(encoding="utf-8") == "mine"


def test_what_a_model_makes_of_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains against a pass of the model alone; accuracies with a verifier that knows whose p it was."""
    from dopd.data.views import PrivilegedTemplate, privileged_prompt
    from dopd.runs.circumstances import circumstances
    from dopd.runs.hint_behaviour import behaviour
    from dopd.runs.local_models import LocalModel

    rows = get_source("dag").rows("train", 5)
    asked, _ = circumstances("tiny:dag/student", max_new_tokens=12)
    model = LocalModel.load("tiny:dag/student", asked, batch_size=2)
    monkeypatch.setattr(
        LocalModel, "answers", lambda self, prompts, label: [(p[0]["content"], True) for p in prompts], raising=True
    )
    found = behaviour(model, rows, lambda text, row: float(text == row["privileged_context"]), template=None)
    assert found["accuracy_from_p"]["mean"] == 1.0 and found["accuracy_from_other_p"]["mean"] == 0.0

    tokenizer, row = model.prompts.tokenizer, rows[0]
    template = PrivilegedTemplate(asked.privileged_template)

    def total(prompt: Any) -> float:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        solution = tokenizer(row["solution"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model.model(torch.tensor([ids + solution])).logits[0].double().log_softmax(-1)
        return sum(float(logits[len(ids) + n - 1, token]) for n, token in enumerate(solution))

    gain = total(privileged_prompt(row, template)) - total(row["prompt"])
    assert found["rows"][0]["gain"] == pytest.approx(gain, abs=1e-3) and gain > 0.1
    assert 0 < found["token_share_of_answer"] < 0.2


def test_sentences_of_a_solution_are_found_in_a_script_without_spaces() -> None:
    solution = (
        "\u8fde\u63a5\u4e24\u70b9\u5f97\u5230\u4e00\u6761\u7ebf\u6bb5\u518d\u4f5c\u5782\u7ebf\u4ea4\u4e8e\u4e00\u70b9"
    )
    question = "\u6c42\u9762\u79ef"
    assert "overlap" in leaks_of(Hint(solution, question, None, solution))
    assert "overlap" not in leaks_of(Hint(solution[:11], question, None, solution))  # fewer than 12 signs in a row


def test_commands_start_without_torch() -> None:
    code = "import sys, dopd.cli.main as m; m.build_parser(); print({*sys.modules} & {'torch', 'datasets'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_an_audit_of_nothing() -> None:
    assert Audit().share == 0.0 and audit_rows([]).to_json()["leaks"] == []
