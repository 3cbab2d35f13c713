"""The README: its examples run as they are written, and its figures are those of committed results."""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_kit as kit
import trl
from compatibility import tried
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from dopd.report.page import report_data

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def examples() -> list[str]:
    """The README's Python: the one for this machine, and the one for Qwen3."""
    found = re.findall(r"```python\n(from datasets.*?)```", README, re.S)
    assert len(found) == 2 and sum(map(bool, found[0].splitlines())) <= 12
    return found


def qwen_tokenizer() -> Any:
    """Bytes as tokens, with Qwen3's own chat template and control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[2],
        additional_special_tokens=SPECIAL,
        chat_template=(Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8"),
    )


def save_model(folder: str, hidden: int, seed: int) -> None:
    tokenizer = qwen_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=hidden // 2,
        max_position_embeddings=40960,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    # An untrained model would go on to the limit of 4096 tokens: here most bytes end an answer. The rest is Qwen's.
    model.generation_config.eos_token_id = list(range(2, len(tokenizer), 2))
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


QUESTION, HINT = "What is 17 times 3? Think of 17 + 17 + 17.", "First add two of them."
PROMPTS: dict[str, dict[str, Any]] = {
    "text": {"prompt": QUESTION},
    "conversation": {"prompt": [{"role": "user", "content": QUESTION}]},
    "conversation of blocks": {"prompt": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]},
    "conversation, images: null": {"prompt": [{"role": "user", "content": QUESTION}], "images": None},
    "4-bit student with LoRA": {"prompt": [{"role": "user", "content": QUESTION}]},
    "blocks, image: null": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
        "image": None,
    },
}


@pytest.mark.parametrize("what", PROMPTS)
def test_the_example_trains_on_the_question_as_qwen3_reads_it(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model("Qwen/Qwen3-1.7B", 16, 0)
    save_model("Qwen/Qwen3-8B", 24, 1)
    rows = [{**PROMPTS[what], "privileged_context": HINT} for _ in range(4)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    code = examples()[1]
    here = 'DOPDConfig("qwen3-dopd", use_cpu=True, bf16=False, max_steps=1, report_to="none", save_strategy="no", '
    assert 'DOPDConfig("qwen3-dopd", ' in code, "the settings of a test machine go in there"
    code = code.replace('DOPDConfig("qwen3-dopd", ', here).replace("trainer.train()", "")
    names: dict[str, Any] = {}
    if "4-bit" in what:  # as a TRL user adds it
        packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        names = {"packed": packed, "lora": LoraConfig(r=2, target_modules=["q_proj", "down_proj"])}
        code = code.replace(
            "train_dataset=dataset", "train_dataset=dataset, quantization_config=packed, peft_config=lora"
        )
    exec(code, names)
    made, tokenizer = names["trainer"], qwen_tokenizer()
    seen = kit.scored(made)
    made.train()
    asked = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    plain = tokenizer.decode(seen[0]["prompt_ids"][0][seen[0]["prompt_mask"][0].bool()])
    assert plain == asked.format(QUESTION)
    hinted = kit.privileged_view(
        made, [{"prompt": [{"role": "user", "content": QUESTION}], "privileged_context": HINT}]
    )
    text = tokenizer.decode(hinted.prompt_ids[0])
    assert text.startswith(f"<|im_start|>user\n{QUESTION}\n") and f"\n{HINT}\n" in text and text.endswith(asked[-20:])
    if "4-bit" in what:
        assert any(type(module).__name__ == "Linear4bit" for module in made.unwrapped_student.modules())
    # The privileged teacher's scores, from one unpadded pass of the teacher over that text and the answer.
    answer = seen[0]["completion_ids"][0][seen[0]["completion_mask"][0].bool()].tolist()
    prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = made.unwrapped_teacher(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    own = logits.double().log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)
    got = seen[0]["logprobs/privileged_teacher"][0][: len(answer)].double()
    torch.testing.assert_close(got, own, atol=1e-5, rtol=0)
    tried("prompt", f"the README's example, Qwen3, {what}", "exact")


def test_the_first_example_trains_as_it_is_pasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(examples()[0], names)
    assert [warning for warning in recwarn if warning.category is FutureWarning] == []  # of names that TRL uses
    lines = (tmp_path / "runs" / "first" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}
    assert names["trainer"].state.global_step == 20 and losses and all(loss > 0 for loss in losses.values())
    assert (tmp_path / "runs" / "first" / "report.html").is_file()
    page = report_data([tmp_path / "runs" / "first"])
    assert page["title"] == "first: dopd" and page["verdict"]["level"] in ("better", "worse", "undecided")
    assert "over 128 prompts" in page["verdict"]["sentence"]


# --- Figures


def committed(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "experiments" / name / "results.json").read_text(encoding="utf-8"))["runs"]


def interval(runs: list[dict[str, Any]], condition: str, metric: str) -> list[float]:
    """Mean and Student's 95% interval over the runs of a condition, in percent; 2.571 is the quantile for six runs."""
    values = [100 * run["metrics"][metric] for run in runs if run["condition"] == condition]
    assert len(values) == 6, condition
    mean = statistics.mean(values)
    half = 2.570582 * statistics.stdev(values) / math.sqrt(6)
    return [mean, mean - half, mean + half]


def test_the_table_is_that_of_the_committed_runs() -> None:
    runs = committed("table1_dag")
    rows = [[part.strip().replace("*", "") for part in line.strip("|").split("|")] for line in README.splitlines()]
    shown = {row[0]: row[1:] for row in rows if len(row) == 4 and "[" in row[1] and row[1][0].isdigit()}
    named = {re.search(r"\(`(\w+)`\)", name)[1] if "`" in name else "start": name for name in shown}  # type: ignore[index]
    assert set(named) == {"start", "vanilla", "privileged_teacher", "dopd", "dopd_ema"}
    for condition, name in named.items():
        expected = [interval(runs, condition, metric) for metric in ("greedy", "sampled", "privileged")]
        cells = [[float(number) for number in re.findall(r"-?[\d.]+", text)] for text in shown[name]]
        for numbers, (mean, low, high) in zip(cells, expected, strict=True):
            assert numbers == pytest.approx([mean, low, high], abs=0.051), condition  # to a tenth
    assert {run["run"]["pretraining_seed"] for run in runs} == {0, 3}


def test_every_figure_of_the_findings_is_in_a_committed_result() -> None:
    """Each number with a decimal stands in the page of an experiment that the section links."""
    section = README.partition("## What was measured")[2].partition("\n## ")[0]
    linked = set(re.findall(r"\(experiments/(\w+)/README\.md\)", section))
    assert linked == {"table1_dag", "weak_teacher", "figure8", "robustness"}
    pages = "\n".join((ROOT / "experiments" / name / "README.md").read_text(encoding="utf-8") for name in linked)
    figures = re.findall(r"(?<![\w.])[-+]?\d+\.\d+", section)
    assert len(figures) > 40
    assert [figure for figure in figures if not re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", pages)] == []


def test_the_verdicts_are_counted_as_the_index_has_them() -> None:
    index = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    verdicts = [line.split("|")[-2].strip() for line in index.splitlines() if line.startswith("| [")]
    partly, refused, refuted = (verdicts.count(one) for one in ("partly", "not", "refuted"))
    said = (
        f"of {partly + refused + refuted} with claims {partly} are supported in part, {refused} are not supported, and"
    )
    assert f"{said} {refuted} are refuted" in README


def test_the_readme_can_be_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 120
