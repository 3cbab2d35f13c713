"""Monitors of rollouts: leaks and loops by their definitions, what a training warns of, and what a report says."""

import itertools
import json
import logging
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import report_kit
import torch
import trainer_kit as kit
from datasets import Dataset
from test_report_findings import only_warning
from transformers import AutoModelForCausalLM

from dopd.errors import ConfigError
from dopd.report.page import report_data
from dopd.report.series import charts
from dopd.sampling import Ending
from dopd.step import PromptEncoder, Rollouts
from dopd.trainer.monitors import answer_metrics
from dopd.wording import copies_hint, distinct, loops, speaks_of_hint

# Answers of a student that never saw a hint: the first ones speak of one, the second ones do not.
SPEAKING = (
    "As the hint says, we first add 3.",
    "According to the solution, x = 4.",
    "Given the reference, the total is 9.",
    "The reference solution starts with the sum.",
    "Following the given plan, we go from B to C.",
    "I follow the provided steps.",
    "The HINTS tell us to factor.",
    "as the\n  plan suggests, compute 2 + 2",
    "Looking at the answer key, it is C.",
    "The privileged context names node B.",
    "Der Hinweis sagt, dass x = 2.",
    "\u6839\u636e\u63d0\u793a\uff0c\u6211\u4eec\u5148\u6c42\u548c\u3002",  # according to the hint, we first add
    "\u53c2\u8003\u7b54\u6848\u662f 4\u3002",  # the reference answer is 4
    "\u30d2\u30f3\u30c8\u306b\u3088\u308b\u3068 4",  # according to the hint
    "\u041f\u043e\u0434\u0441\u043a\u0430\u0437\u043a\u0430: 4",  # a hint
)
SILENT = (
    "",
    "We first add 3, so x = 4.",
    "Taking x = 4 as the solution of the equation, we check it.",
    "The hinterland is large; this hints at a bound.",
    "The given answer choices are A to D.",
    "We plan to add both numbers; our plan is simple.",
    "A reference frame is fixed.",
    "The solution of the given equation is 4.",
    "Privileged users may log in.",
    "\u6211\u4eec\u5148\u6c42\u548c\u3002",
    "\ud800\x00\ufffd" * 50,  # what a tokenizer may make of half a character
)


def test_talk_of_a_hint_is_found_and_other_talk_is_not() -> None:
    assert [text for text in SPEAKING if not speaks_of_hint(text, "What is x?")] == []
    assert [text for text in SILENT if speaks_of_hint(text, "What is x?")] == []
    assert not any(speaks_of_hint(text, "Use this hint: add 3.") for text in SPEAKING)  # asked for in the prompt


def test_words_of_a_hint_are_copied_where_the_prompt_does_not_explain_them() -> None:
    hint, prompt = "First find B, then add nine to it and stop.", "Find B. Then add: what is it?"
    assert copies_hint("so: first FIND b then\nadd 4", hint, prompt)
    assert not copies_hint("so: first find b and then add nine", hint, prompt)  # four words in a row at most
    assert not copies_hint("first find b then add nine", hint, f"{prompt} {hint}")
    assert not copies_hint("first find b then add nine", "", prompt) and not copies_hint("", hint, prompt)
    assert not copies_hint("\ud800\x00" * 9, "\ud800\x00" * 9, prompt)  # no words


def loops_by_definition(tokens: list[int]) -> bool:
    """Every block and every number of times, compared as lists; the last time may be cut."""
    for size in range(1, len(tokens) + 1):
        for length in range(max(4 * size, 16), len(tokens) + 1):
            tail = tokens[len(tokens) - length :]
            if tail == list(itertools.islice(itertools.cycle(tail[:size]), length)):
                return True
    return False


def test_loops_and_different_runs_are_as_defined() -> None:
    rng = random.Random(0)
    found = []
    for _ in range(400):
        block = [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
        tokens = [rng.randrange(3) for _ in range(rng.randrange(8))] + block * rng.randrange(6)
        tokens += block[: rng.randrange(len(block))]
        assert loops(tokens) == loops_by_definition(tokens), tokens
        found.append(loops(tokens))
    assert 50 < sum(found) < 350
    assert loops([*range(256)] * 4) and not loops([*range(257)] * 4) and not loops([*range(5000)])
    assert distinct([1, 2, 3, 1, 2, 3, 1]) == 3 / 5 and distinct([1, 2, 3]) == 1.0 and math.isnan(distinct([1, 2]))


class TwoRanks:
    """This rank's rows, and those of another one behind them."""

    count = 2

    def __init__(self, others: list[list[float]]) -> None:
        self._others = others

    def total(self, values: torch.Tensor) -> torch.Tensor:
        raise AssertionError("shares are of rows")

    def gathered(self, values_N: torch.Tensor) -> torch.Tensor:
        return torch.cat([values_N, torch.tensor(self._others, dtype=values_N.dtype)])


def test_shares_are_over_the_answers_of_all_ranks_that_have_them() -> None:
    prompts, end = PromptEncoder(kit.TOKENIZER, kit.PrivilegedTemplate()), kit.TOKENIZER.eos_token_id
    answers = [[7, 8] * 9 + [end], [7, 8]]
    ids, mask, _ = prompts.padded(answers, torch.device("cpu"))
    rows = [{"prompt": "Q", "privileged_context": text} for text in ("a b c d e f", None)]
    rollouts = Rollouts(rows, None, ids, mask)  # type: ignore[arg-type]
    texts = ["says: A, b c d E", "as the hint says"]
    ending, nan = Ending([end], tokenizer=kit.TOKENIZER), math.nan
    others = [[0.0, 0.5, 0.0, 0.0], [0.0, nan, 0.0, 0.0]]  # looping, distinct-3, copies, speaks
    metrics = answer_metrics(rollouts, texts, ending, TwoRanks(others), needs_privileged=True)
    # 18 tokens of two kinds have 16 runs of three, of which two differ.
    assert metrics == pytest.approx(
        {
            "repetition/looping_ratio": 1 / 4,
            "repetition/distinct_3": (2 / 16 + 0.5) / 2,  # two answers have no three tokens
            "leak/copies_hint": 1 / 3,  # one row has no p
            "leak/speaks_of_hint": 1 / 4,
        }
    )
    bare = answer_metrics(rollouts, texts, ending, TwoRanks([row[:2] for row in others]), needs_privileged=False)
    assert set(bare) == {"repetition/looping_ratio", "repetition/distinct_3"}


class Leaking:
    """Draws short answers, and from step 3 on what p says, over and over."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.hints = {str(row["prompt"]): kit.TOKENIZER.encode(row["privileged_context"]) for row in rows}

    def generate(self, request: Any) -> list[list[int]]:
        end = kit.TOKENIZER.eos_token_id
        if request.step < 3:
            return [[7 + request.step, end] for _ in request.prompts]
        return [[*self.hints[str(prompt)] * 4, end] for prompt in request.prompts]


def test_a_training_logs_warns_once_and_its_report_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = kit.task_rows(8)
    options: dict[str, Any] = {
        "train_dataset": Dataset.from_list(rows),
        "rollout_engine": Leaking(rows),
        "max_completion_length": 24,
        "learning_rate": 1e-3,
    }
    made = kit.trainer(tmp_path / "run", max_steps=8, monitor_limits={"completions/mean_length": None}, **options)
    decoded: list[int] = []
    text_of = PromptEncoder.text
    monkeypatch.setattr(PromptEncoder, "text", lambda self, ids: decoded.append(1) or text_of(self, ids))
    with caplog.at_level(logging.WARNING):
        made.train()
    assert len(decoded) == 8 * 8  # each answer of each step once
    hints = [kit.TOKENIZER.encode(row["privileged_context"]) for row in rows]
    assert all(len(hint) >= 5 for hint in hints)  # so each copy is one, and four of them are a loop
    for name in ("leak/copies_hint", "repetition/looping_ratio"):
        assert kit.records(made, name) == [0.0] * 3 + [1.0] * 5
        (said,) = [line for line in caplog.messages if f"{name} went from" in line]
        assert said.startswith("step 6: ") and "went from 0 to 1 " in said and "learning_rate" in said
    assert set(kit.records(made, "leak/speaks_of_hint")) == {0.0}
    mean = 4 * sum(map(len, hints)) / 8 + 1
    assert kit.records(made, "completions/length_change") == pytest.approx([mean / 2] * 5)  # from the fourth log on
    assert not any("completions/mean_length went" in line for line in caplog.messages)

    (method,) = report_data([tmp_path / "run"])["findings"]
    warnings = {warning["title"]: warning["runs"][0]["text"] for warning in method["warnings"]}
    text = warnings["the hint leaks into answers"]
    assert text.startswith("100% of the last rollouts repeat") and "0% of the first" in text
    assert "answers end in loops" in warnings and "answers grow longer" not in warnings  # its limit is null
    levels = {
        chart["title"]: [(level["label"], level["y"]) for level in chart["levels"]]
        for chart in report_data([tmp_path / "run"])["charts"]
        if chart["kind"] == "lines"
    }
    assert levels["Rollouts that repeat their p"] == [("limit", 0.05)]
    assert levels["Length of rollouts"] == []

    caplog.clear()
    off = kit.trainer(tmp_path / "off", max_steps=1, monitors=False, **options)
    off.train()
    assert not [name for record in off.state.log_history for name in record if name.startswith(("leak", "repet"))]


def logprob(model: Any, row: dict[str, Any], answer: list[int]) -> float:
    """Of an answer to a prompt with p, by the model's own forward pass."""
    (turn,) = row["prompt"]
    asked = [{**turn, "content": f"{turn['content']} {row['privileged_context']}"}]
    prompt = kit.TOKENIZER.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1)[range(len(answer)), answer].sum().item()


def test_the_student_with_p_is_measured_from_its_start_and_after_a_kill_too(tmp_path: Path) -> None:
    rows = kit.task_rows(3, split="test")
    rows[1]["privileged_context"] = None
    options: dict[str, Any] = {
        "train_dataset": Dataset.from_list(kit.task_rows(8)),
        "eval_dataset": Dataset.from_list(rows),
        "verifier": kit.TASK.verify,
        "student_eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 2,
    }
    made = kit.trainer(tmp_path / "run", **options)
    made.train()
    values = kit.records(made, "eval_privileged_kl")
    record = json.loads((tmp_path / "run" / "checkpoint-1" / "privileged_start.json").read_text())
    assert [row for row, _, _ in record["answers"]] == [0, 2]
    start = kit.student().eval()
    later = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2").eval()
    fallen = sum(logprob(start, rows[n], ids) - logprob(later, rows[n], ids) for n, ids, _ in record["answers"])
    expected = fallen / sum(len(ids) for _, ids, _ in record["answers"])
    assert values[0] == 0.0 and values[2] == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-3

    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    again = kit.trainer(tmp_path / "run", **options)
    again.train(resume_from_checkpoint=True)
    assert kit.records(again, "eval_privileged_kl") == values


def test_a_report_draws_limits_and_goes_by_what_was_logged(tmp_path: Path) -> None:
    """Leaks of a few traced completions say less than the shares of all rollouts."""
    hint = "first find B then add nine to it"
    leak = report_kit.record(3, 0, privileged_context=hint, texts=("I", " find", " B", " then", " add", " nine"))
    run = report_kit.run_folder(tmp_path / "run", steps=8, trace=[leak])
    assert only_warning(report_kit.groups_of(run))["title"] == "the hint leaks into answers"
    records = report_kit.metrics(8)
    for record in records:
        if "loss" in record:
            record |= {"leak/copies_hint": 0.02, "completions/mean_length": 20.0}
    report_kit.write_lines(run / "metrics.jsonl", records)
    groups = report_kit.groups_of(run)
    (drawn,) = [chart for chart in charts(groups, {}) if chart["title"] == "Length of rollouts"]
    assert {level["label"]: level["y"] for level in drawn["levels"]} == {"upper limit": 30.0, "lower limit": 13.333}
    assert report_data([run])["findings"] == []


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"leak/copies": 0.1}, "monitor_limits: unknown key 'leak/copies'. Did you mean 'leak/copies_hint'?"),
        ({"leak/copies_hint": 1.5}, r"leak/copies_hint \(=1.5\) must be float of at least 0 and of at most 1"),
        ({"completions/mean_length": 0.5}, r"completions/mean_length \(=0.5\) must be float above 1"),
        ({"eval_privileged_kl": -1}, r"eval_privileged_kl \(=-1\) must be float of at least 0"),
        (0.1, r"monitor_limits \(=0.1\) must be mapping"),
    ],
)
def test_limits_that_cannot_be_are_refused(tmp_path: Path, limits: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kit.config(tmp_path, monitor_limits=limits)
    assert kit.config(tmp_path, monitor_limits='{"leak/copies_hint": null}').monitor_limits == {
        "leak/copies_hint": None
    }
