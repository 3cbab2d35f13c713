"""Users' own methods, signals, divergences and tasks: registered, named on the command line, found again, refused."""

import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml

import dopd
from dopd.assignment import assign
from dopd.cli.main import main
from dopd.errors import ConfigError, DataError, ScoringError
from dopd.methods import CARDS, METHODS, own_code
from dopd.registry import is_reference
from dopd.runs import quickstart as quickstart_module
from dopd.runs.settings import load_settings
from dopd.signals import SIGNALS, SignalBatch
from dopd.tasks import TASKS, get_source, get_task, rows_of_task

DOCS = Path(__file__).parents[2] / "docs" / "how-to" / "own-method.md"
SHORT = (
    "--max_steps 1 --final_eval_prompts 2 --train_prompts 64 --eval_prompts 8 --student_eval_steps null "
    "--save_strategy steps --save_steps 1"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, registries: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def blocks(language: str) -> list[str]:
    section = DOCS.read_text(encoding="utf-8").partition("## Code of your own")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def test_the_how_to_runs_as_written_and_its_run_is_found_again(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,), (commands,) = blocks("python"), blocks("bash")
    (folder / "mine.py").write_text(code)
    shown, trained, looked = (shlex.split(line)[1:] for line in commands.splitlines())
    assert main(shown) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "jeffreys" in said and "where surprise top 0.5" in said and "top_k: int; default 64" in said
    assert main([*trained, *SHORT.split()]) == 0
    config = yaml.safe_load((folder / "runs/surprised/config.yaml").read_text())
    assert (config["method"], config["method_options"]) == ("./mine.py:surprised", {"top_k": 16})
    assert json.loads((folder / "runs/surprised/result.json").read_text())["method"] == "surprised"
    assert (
        main([*trained, *SHORT.replace("max_steps 1", "max_steps 2").split(), "--resume_from_checkpoint", "true"]) == 0
    )
    steps = [json.loads(line)["step"] for line in (folder / "runs/surprised/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 2
    edited = code.replace('"top": share', '"bottom": share')
    assert edited != code
    (folder / "mine.py").write_text(edited)
    longer = [*trained, *SHORT.replace("max_steps 1", "max_steps 3").split(), "--resume_from_checkpoint", "true"]
    capsys.readouterr()
    assert main(longer) == 2
    said = capsys.readouterr().err
    assert re.search(r"own_code \(files of the method\) is mine\.py \w{12} there and mine\.py \w{12} here", said)
    assert main([*longer, "--resume_with_changes", "own_code"]) == 0
    capsys.readouterr()
    assert main([*looked, "--greedy", "--max-new-tokens", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[0])
    assert record["method"] == "surprised"
    (folder / "elsewhere").mkdir()
    (folder / "mine.py").unlink()
    monkeypatch.chdir(folder / "elsewhere")
    assert main(["report", "../runs/surprised", "--output", "page.html"]) == 0
    assert "surprised" in (folder / "elsewhere/page.html").read_text()


def test_what_is_registered_goes_by_its_name() -> None:
    (code,) = blocks("python")
    exec(compile(code, "mine", "exec"), {"__name__": "mine"})
    config = dopd.DOPDConfig(
        output_dir="r", method="surprised", method_options={"share": 0.25}, use_cpu=True, bf16=False
    )
    (rule,) = config.routing_table().rules
    assert (rule.divergence, rule.top_k, rule.select.value) == ("jeffreys", 64, 0.25)
    assert dopd.table("surprised").sources == {"teacher", "student"}


METHOD = "import dopd\ndef plain(*, beta: float = 0.5):\n    return dopd.table('gkd', beta=beta)\n"
WRONG: dict[str, tuple[str, str, str]] = {
    "no module": ("", "my_none:plain", "ModuleNotFoundError: No module named 'my_none'"),
    "no file": ("", "./my_none.py:plain", "FileNotFoundError: there is no file './my_none.py'"),
    "no such function": (
        METHOD,
        "my_code:plane",
        r"cannot be read: it has no 'plane' \(did you mean 'plain'\?\)\. It names",
    ),
    "no function": ("plain = 3", "./my_code.py:plain", "TypeError: plain is int and no function"),
    "syntax": ("def plain(:", "./my_code.py:plain", "SyntaxError"),
    "fails at import": ("1 / 0", "my_code:plain", "ZeroDivisionError: division by zero"),
    "leaves": ("raise SystemExit(0)", "./my_code.py:plain", "SystemExit: 0"),
    "returns nothing": (
        "def plain(): ...",
        "./my_code.py:plain",
        "returns NoneType: it must return a dopd.RoutingTable",
    ),
    "raises": ("def plain():\n    [].pop()", "my_code:plain", "raises IndexError: pop from empty list"),
    "needs an option": ("def plain(k): ...", "my_code:plain", "raises TypeError: .*'k'"),
    "a wrong table": (
        "import dopd\ndef plain():\n    return dopd.RoutingTable(name='x', rules=())",
        "my_code:plain",
        "table 'x' has no rules",
    ),
    "no name": ("", "mine", "must be one of dopd, .* or your own: package.module:name or ./file.py:name"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_method_that_cannot_be_is_one_line_and_status_2(
    what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, name, words = WRONG[what]
    if code:
        (folder / "my_code.py").write_text(code)
    assert main(["train", "tiny-dag", "--method", name, "--method_options", "{}", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line) and (what == "a wrong table" or f"method (={name!r})" in line)


def test_a_method_without_the_options_of_the_recipe_says_the_way_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "my_code.py").write_text(METHOD)
    command = ["train", "tiny-dag", "--method", "my_code:plain", "--dry-run"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "has no option top_k; it has beta. Options of another method are left out by" in said
    (way,) = re.findall(r"\((--.*)\)", said)
    assert main([*command, *shlex.split(way)]) == 0


def test_a_script_that_names_itself_is_not_run_again(folder: Path) -> None:
    script = METHOD + "print('run')\nprint(dopd.table('./my_code.py:plain', beta=0.25).rules[0].beta)\n"
    (folder / "my_code.py").write_text(script)
    done = subprocess.run([sys.executable, "my_code.py"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["run", "0.25"]


def test_a_function_without_a_decorator_is_a_method_with_options(folder: Path) -> None:
    (folder / "my_code.py").write_text(METHOD)
    for name in ("my_code:plain", "./my_code.py:plain", str(folder / "my_code.py:plain")):
        assert dopd.table(name, beta=0.9).rules == dopd.table("gkd", beta=0.9).rules
        with pytest.raises(ConfigError, match=r"method '.*my_code.*:plain' has no option top_k; it has beta"):
            dopd.table(name, top_k=3)
        with pytest.raises(ConfigError, match=r"method_options of .*my_code.*:plain: beta \(='x'\) must be float"):
            dopd.table(name, beta="x")
    (folder / "parts").mkdir()
    (folder / "parts/deep.py").write_text("from beside import made\n")
    (folder / "parts/beside.py").write_text(METHOD.replace("plain", "made"))
    assert dopd.table("parts/deep.py:made").name == "gkd"


def test_a_file_is_run_once_and_named_with_its_checksum(folder: Path) -> None:
    text = "import os\nos.mkdir('run')\n" + "\n".join(blocks("python"))
    (folder / "my_code.py").write_text(text)
    rows = [{"source": "teacher", "divergence": "./my_code.py:jeffreys", "scale": "./my_code.py:surprise"}]
    made = dopd.RoutingTable.from_dicts(rows)
    named = f"my_code.py {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    assert own_code(None, made) == own_code("./my_code.py:surprised", dopd.table("vanilla")) == named
    assert own_code("dopd", dopd.table("grpo")) == "none" and (folder / "run").is_dir()


def test_rows_name_own_code_too(folder: Path) -> None:
    (folder / "my_code.py").write_text("\n".join(blocks("python")))
    rows = [{"source": "teacher", "divergence": "./my_code.py:jeffreys", "scale": {"signal": "./my_code.py:surprise"}}]
    made = dopd.RoutingTable.from_dicts(rows)
    assert made.sources == {"teacher", "student"}
    assert dopd.RoutingTable.from_dicts(yaml.safe_load(yaml.safe_dump(made.to_dicts()))) == made
    logits = torch.randn(2, 2, 3, 7, dtype=torch.float64)
    ids, mask = torch.randint(7, (2, 3)), torch.ones(2, 3)
    loss = dopd.routed_loss(logits[0], {"teacher": logits[1]}, ids, mask, made).loss
    s, t = (numpy.exp(z) / numpy.exp(z).sum(-1, keepdims=True) for z in logits.numpy())
    surprise = -numpy.log(numpy.take_along_axis(s, ids.numpy()[..., None], -1))[..., 0]
    assert float(loss) == pytest.approx((surprise * ((s - t) * numpy.log(s / t)).sum(-1)).mean())


@pytest.mark.parametrize("code", ["os:system", "builtins:dict", "./mine.py:part", "./mine.py:thing", "./mine.py:Thing"])
def test_a_method_that_is_no_function_is_refused(folder: Path, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mine.py").write_text(
        "import functools\npart = functools.partial(dict)\n"
        "class Thing:\n    def __call__(self, top_k):\n        pass\nthing = Thing()\n"
    )
    assert main(["train", "tiny-dag", "--dry-run", "--method", code]) == 2
    said = capsys.readouterr().err
    assert f"method (='{code}')" in said and "must be a function" in said and "Traceback" not in said


SAME = "import dopd\n@dopd.register_method('one')\ndef one():\n    return dopd.table('vanilla')\n"


def test_a_name_has_one_meaning_and_code_that_is_read_twice_is_one(folder: Path) -> None:
    (folder / "my_one.py").write_text(SAME)
    for name in ("my_one:one", "./my_one.py:one", "my_one:one"):
        assert METHODS.resolve(name) == "one"
    (folder / "my_two.py").write_text(f"\n{SAME}")
    places = r"method 'one' is taken by .*one \(.*my_one\.py, line 2\): register .*my_two\.one \(.*my_two\.py, line 3\)"
    with pytest.raises(ConfigError, match=rf"method \(='my_two:one'\) cannot be read: {places}"):
        dopd.table("my_two:one")


def test_other_code_under_a_known_name_is_refused_and_leaves_the_first() -> None:
    def made(level: float) -> Any:
        return lambda log_s, log_t: ((log_s - log_t) ** 2).sum(-1) * level

    first = made(1.0)
    assert dopd.register_divergence("square")(first) is dopd.register_divergence("square")(first) is first
    with pytest.raises(ConfigError, match=r"divergence 'square' is taken by .*test_registries.*test_registries"):
        dopd.register_divergence("square")(made(2.0))
    assert dopd.divergence(torch.zeros(1, 2), torch.zeros(1, 2), kind="square").item() == 0.0
    for name, words in (("js", r"'js' is taken by dopd\.divergences\.js"), ("policy_gradient", "is taken: register")):
        with pytest.raises(ConfigError, match=words):
            dopd.register_divergence(name)(first)
    for bad in ("", "a b", "a,b", "1st", 3, "-x"):
        with pytest.raises(ConfigError, match=r"the name of a divergence \(=.*must begin with a letter"):
            dopd.register_divergence(bad)(first)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="signal 'random' is taken by dopd"):
        dopd.register_signal("random")(lambda batch: batch.mask)
    with pytest.raises(ConfigError, match="method 'dopd' is taken by dopd"):
        dopd.register_method("dopd")(lambda: dopd.table("vanilla"))


@pytest.mark.parametrize("confidence", ["sure", "low"])
def test_what_is_said_of_a_method_fits(confidence: Any) -> None:
    with pytest.raises(ConfigError, match=rf"confidence \(='{confidence}'\) (must be one of 'high'|needs departures)"):
        dopd.register_method("mine", confidence=confidence)(lambda: dopd.table("vanilla"))


def test_a_table_carries_what_is_said_of_its_method() -> None:
    @dopd.register_method("said", source="a report", confidence="low", departures="its weights")
    def said() -> dopd.RoutingTable:
        """Teaches.

        At length.
        """
        return dopd.RoutingTable(name="said", rules=(dopd.Rule(source="teacher"),))

    made = dopd.table("said")
    assert (made.source_note, made.unverified) == ("a report; DEPARTURE: its weights", "its weights")
    assert CARDS["said"].about == "Teaches."


def batch(**more: Any) -> SignalBatch:
    values = torch.arange(6.0).view(2, 3)
    return SignalBatch(torch.ones(2, 3), {"student": values}, {"student": values}, **more)


def test_a_signal_has_options_and_needs_to_say_what_it_reads(folder: Path) -> None:
    @dopd.register_signal("height", "above a level", sources="student")
    def height(batch: SignalBatch, level: float = 1.0) -> torch.Tensor:
        return batch.logprobs["student"] - level

    assert SIGNALS["height"].sources == {"student"}
    rule = dopd.Rule(source="teacher", select={"signal": "height", "level": 3.0, "above": 0.0})
    made = dopd.RoutingTable(name="x", rules=(rule,))
    assert assign(made, batch()).factors[0].tolist() == [[0, 0, 0], [0, 1, 1]]
    with pytest.raises(ConfigError, match="signal 'height' has no option depth; it has level"):
        dopd.Rule(source="teacher", scale={"signal": "height", "depth": 1})
    (folder / "my_code.py").write_text("def bare(batch): ...")
    with pytest.raises(ConfigError, match=r"is not registered: decorate it with dopd\.register_signal"):
        dopd.Rule(source="teacher", scale="my_code:bare")
    with pytest.raises(ConfigError, match=r"signal 'other': sources \(=\['techer'\]\) must be among teacher, privil"):
        dopd.register_signal("other", sources=["techer"])
    with pytest.raises(ConfigError, match=r"signal 'other': measures \(=\['kl'\]\) must be among reverse_kl, compat"):
        dopd.register_signal("other", measures=["kl"])


SIGNALS_GONE_WRONG: dict[str, tuple[Any, str]] = {
    "raises": (lambda b: {}["teacher"], r"raises KeyError: 'teacher'.*sources=\[\]"),
    "one number": (lambda b: b.mask.sum(), r"returns \(\): it must return a tensor \(B, T\) \(\d, \d\)"),
    "no tensor": (lambda b: [1.0], "returns list: it must return a tensor"),
    "not finite": (lambda b: b.mask * float("nan"), "not finite|gives nan at 13 of 13 scored tokens"),
    "undeclared": (lambda b: b.per_token(b.rewards), r"reads batch\.rewards .*: add needs_rewards=True"),
}


@pytest.mark.parametrize("use", ["scale", "select"])
@pytest.mark.parametrize("what", SIGNALS_GONE_WRONG)
def test_a_signal_that_goes_wrong_is_told_by_name_before_and_in_training(what: str, use: str) -> None:
    compute, words = SIGNALS_GONE_WRONG[what]
    dopd.register_signal("wrong")(compute)
    # It goes wrong with the two sequences of `batch` alone, so that the trial cannot find it.
    dopd.register_signal("late")(lambda b: compute(b) if len(b.mask) == 2 else torch.rand(b.mask.shape))
    rules = [dopd.Rule(source="teacher", **{use: of(use, name)}) for name in ("wrong", "late")]
    with pytest.raises(ConfigError, match=rf"table 'x', rule 'all': signal 'wrong'.*({words})"):
        dopd.RoutingTable(name="x", rules=rules[:1])
    state = torch.get_rng_state()
    late = dopd.RoutingTable(name="x", rules=rules[1:])
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises((ScoringError, ConfigError), match=rf"('late'|rule 'all').*({words})"):
        assign(late, batch())


LATER_OR_ALONE: dict[str, tuple[Any, str]] = {
    "at the end": (lambda b: b.mask / (1.0 - b.progress), "inf .*, at the last step"),
    "late steps": (lambda b: b.mask * torch.tensor(10.0) ** b.step, "inf .*, at the last step"),
    "at the start": (lambda b: b.mask / b.progress, "inf .*, at the first step"),
    "alone": (
        lambda b: b.per_token(b.scores_of_groups().std(1).repeat_interleave(b.num_generations)),
        "num_generations 1",
    ),
    "raises alone": (lambda b: b.per_token(b.scores_of_groups()[:, 1].repeat(2)), r"IndexError.*num_generations 1"),
}


@pytest.mark.parametrize("what", LATER_OR_ALONE)
def test_a_signal_is_tried_at_both_ends_of_a_training_and_on_single_answers(what: str) -> None:
    compute, words = LATER_OR_ALONE[what]
    dopd.register_signal("later", needs_scores=True)(compute)
    with pytest.raises(ConfigError, match=rf"table 'x', rule 'all': signal 'later'.*{words}"):
        dopd.RoutingTable(name="x", rules=[dopd.Rule(source="teacher", scale="later")])


def of(use: str, name: str) -> Any:
    return {"signal": name, "top": 0.5} if use == "select" else name


def test_a_dry_run_tries_signals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = "def last(batch):\n    return batch.logprobs['student'][:, 9]\n"
    (folder / "my_code.py").write_text(f"import dopd\n@dopd.register_signal('last', sources=['student'])\n{last}")
    rules = ["--rules", "[{source: teacher, scale: './my_code.py:last'}]", "--method_options", "{}"]
    assert main(["train", "tiny-dag", *rules, "--output_dir", "run", "--dry-run"]) == 2
    said = capsys.readouterr().err.strip()
    assert re.fullmatch(r"error: table 'custom', rule 'all': signal '[^']*last', .*raises IndexError.*", said)
    assert not (folder / "run").exists()


TASK = """
import dopd
from dopd.tasks import get_task
@dopd.register_task
class Sevens:
    name, description = "sevens", "dag problems, answered by heart"
    privileged_kinds, default_kind = ("none", "final_answer"), "final_answer"
    def __init__(self, first: int = 0):
        self.dag, self.first = get_task("dag"), first
    def rows(self, split, count, privileged_kind=None):
        return self.dag.rows(split, count, privileged_kind, start=self.first)
    def verify(self, completion, row):
        return float(completion.split()[-1:] == [row["answer"]])
"""


def test_a_task_of_ones_own_is_shown_trained_on_and_judged_by(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my_task.py").write_text(TASK)
    name = "./my_task.py:Sevens"
    assert main(["tasks", name]) == 0
    assert get_task("dag").example("train", 0).prompt in " ".join(capsys.readouterr().out.split())
    own = ["--task", name, "--task_options", "{first: 3}", "--privileged_kind", "final_answer", "--method", "vanilla"]
    assert main(["train", "tiny-dag", *own, "--output_dir", "run", *SHORT.split()]) == 0
    assert main(["eval", "run", "--prompts", "4", "--json"]) == 0  # of the run: task, options and kind
    said = capsys.readouterr()
    assert (
        "task_options {'first': 3}" in said.err and len(json.loads(said.out.splitlines()[-1])["scores"]["greedy"]) == 4
    )
    assert TASKS.resolve(name) == "sevens"
    assert rows_of_task(get_source("sevens", first=2), "test", 2, "none") == get_task("dag").rows(
        "test", 2, "none", start=2
    )
    values = {"model_name_or_path": "tiny:dag/student", "output_dir": "r", "task": "sevens"}
    for wrong, words in (
        ({"task_options": {"last": 1}}, "task_options of sevens: unknown key 'last'"),
        ({"task_options": {"first": "x"}}, r"task_options of sevens: first \(='x'\) must be int"),
        (
            {"privileged_kind": "hint"},
            r"privileged_kind \(='hint'\) of task 'sevens' must be one of none, final_answer",
        ),
        ({"task": "my_task:Eights"}, r"task \(='my_task:Eights'\) cannot be read: it has no 'Eights'"),
        ({"task": "seven"}, r"task \(='seven'\) must be one of dag, .*Did you mean 'sevens'"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_settings(None, **values | wrong)


def test_what_is_no_task_is_told(folder: Path) -> None:
    class Bare:
        name = "bare"

    class Half(dopd_task()):  # type: ignore[misc]
        name = "half"

    with pytest.raises(ConfigError, match=r"task .*Bare.* has no privileged_kinds, default_kind, rows, verify: derive"):
        dopd.register_task(Bare)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"task .*Half.* has no _check_privileged, .*vocabulary: derive"):
        dopd.register_task(Half)
    with pytest.raises(ConfigError, match="join has no privileged_kinds, default_kind"):
        TASKS.find("os.path:join")

    @dopd.register_task
    class Broken:
        name, privileged_kinds, default_kind = "broken", ("none",), "none"

        def rows(self, split: str, count: int, privileged_kind: str | None = None) -> Any:
            return 1 / 0 if split == "train" else "rows"

        def verify(self, completion: str, row: Any) -> float:
            return 0.0

    with pytest.raises(DataError, match=r"Broken.*: rows\('train', 3, 'none'\) raises ZeroDivisionError: division"):
        rows_of_task(get_source("broken"), "train", 3, "none")
    with pytest.raises(DataError, match=r"rows\('test', 3, 'none'\) returns str: it must return a list of mappings"):
        rows_of_task(get_source("broken"), "test", 3, "none")
    with pytest.raises(ConfigError, match=r"task \(='broken'\) is no dopd\.tasks\.AbstractTask"):
        get_task("broken")


def dopd_task() -> Any:
    from dopd.tasks import AbstractTask

    return AbstractTask


def test_the_quickstart_labels_a_method_by_its_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "my_code.py").write_text(
        "import dopd\ndef mine():\n    return dopd.RoutingTable(name='my/own', rules=(dopd.Rule(source='teacher'),))"
    )
    jobs: list[Any] = []
    monkeypatch.setattr(quickstart_module, "run_jobs", lambda asked, **options: jobs.extend(asked))
    methods = ["vanilla", "./my_code.py:mine"]
    with pytest.raises(DataError):  # nothing has been trained
        quickstart_module.quickstart(config=None, folder="q", methods=methods, seeds=1)
    trained = [job.arguments for job in jobs if job.arguments[0] == "train"]
    assert [words[words.index("--method") + 1] for words in trained] == methods
    assert [words[words.index("--method_options") + 1] for words in trained] == ['{"top_k": 8}', "{}"]  # as it has them
    assert [words[words.index("--output_dir") + 1] for words in trained] == ["q/vanilla-seed0", "q/my_own-seed0"]
    with pytest.raises(ConfigError, match="methods: my/own is named more than once"):
        quickstart_module.quickstart(config=None, folder="q", methods=[*methods, "my_code:mine"], seeds=1)


def test_references_are_told_from_names() -> None:
    assert all(map(is_reference, ("a:b", "a.b:c", "./a.py:b", "../x-y/a b.py:f", "C:/a.py:f")))
    assert not any(map(is_reference, ("a", "a.b", ":b", "a:", "a:b c", "a-b:c", "./a:b", "a.py:", "tiny:dag/student")))


def test_a_rollout_engine_by_name_draws_the_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS.parent / "own-engine.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (folder / "my_engine.py").write_text(code)
    run = ["train", "tiny-dag", "--output_dir", "run", *SHORT.split()]
    assert main([*run, "--rollout_engine", "./my_engine.py:Counted", "--max_completion_length", "24"]) == 0
    calls = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 0: ")]
    assert calls == ["step 0: 2 answers of at most 16 tokens", "step 0: 64 answers of at most 24 tokens"]
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text())["rollout_engine"] == "./my_engine.py:Counted"


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("generate", "", "must name a function of your own, package.module:factory"),
        ("./my_engine.py:broken", "", "raises ZeroDivisionError: division by zero. It is called with a dopd.step.Eng"),
        ("./my_engine.py:none", "", "which returned dict) is no engine: it must have a method generate(request)"),
        ("./my_engine.py:short", "", "the rollout engine gave a list of 1, and was asked for a list of 2 lists"),
        ("./my_engine.py:none", "--use_vllm true", "use_vllm (=True) and rollout_engine"),
    ],
)
def test_a_rollout_engine_that_cannot_be_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, more: str, words: str
) -> None:
    short = "class short:\n    def __init__(self, setup): ...\n    def generate(self, request): return [[5]]\n"
    (folder / "my_engine.py").write_text(f"broken, none = lambda setup: 1 / 0, lambda setup: {{}}\n{short}")
    run = ["train", "tiny-dag", "--output_dir", "run", *SHORT.split(), "--rollout_engine", name, *more.split()]
    assert main(run) == 2
    said = capsys.readouterr().err.partition("error: ")[2]
    assert words in said and not (folder / "run").exists()
