"""Benchmarks are graded by lm-evaluation-harness: what is handed to it, what is read from it, what is refused.

Where the library is not installed, a stand-in with its entry points has its place; the last tests hold them, and run
it, where it is installed (`pip install 'dopd[benchmarks]'`).
"""

import inspect
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dopd.cli.main import main
from dopd.errors import ConfigError, DataError
from dopd.evaluation.kept import read_evaluated
from dopd.runs import benchmarks
from dopd.runs.benchmarks import BENCHMARKS, LibraryTask, answers_of, benchmarks_of

needs_library = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")

STAND_IN = """
import json, os
def simple_evaluate(model, tasks, **options):
    if tasks == ["aime24"]:
        raise FileNotFoundError("Maxwell-Jia/AIME_2024 is not in the cache")
    with open(os.environ["ASKED"], "a") as file:
        file.write(json.dumps({"tasks": tasks, "model": model.options, "limit": options["limit"],
                               "gen_kwargs": options["gen_kwargs"], "chats": options["apply_chat_template"]}) + "\\n")
    def record(doc, filter, score):
        return {"doc_id": doc, "filter": filter, "exact_match": score, "metrics": ["exact_match"],
                "resps": [[f"<b>{doc}"]]}
    return {"samples": {tasks[0]: [record(1, "flexible-extract", 0.0), record(0, "strict-match", 0.0),
                                   record(0, "flexible-extract", 1.0)]}}
"""
HFLM = """
class HFLM:
    def __init__(self, pretrained, tokenizer, **options):
        self.options = {"class": type(pretrained).__name__, "tokens": len(tokenizer) > 9, **options}
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the library's name and version, and what it was asked."""
    place = tmp_path / "site" / "lm_eval"
    (place / "models").mkdir(parents=True)
    (place / "__init__.py").write_text(STAND_IN)
    (place / "tasks.py").write_text("class TaskManager: pass\n")
    (place / "models" / "__init__.py").write_text("")
    (place / "models" / "huggingface.py").write_text(HFLM)
    info = place.parent / "lm_eval-0.4.13.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lm_eval\nVersion: 0.4.13\n")
    for name in [one for one in sys.modules if one.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(place.parent))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked.jsonl"))
    yield tmp_path / "asked.jsonl"  # type: ignore[misc]
    for name in [one for one in sys.modules if one.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


def test_names_are_looked_up_and_others_are_refused_with_the_reason(
    library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert list(benchmarks_of(["GSM8K", " math-500 ", "AIME-24"])) == ["gsm8k", "math500", "aime24"]
    for name, words in {
        "humaneval": "without a sandbox.*--verifier code",
        "LiveBench": "has no such task",
        "MMMU-Pro": "pictures",
        "vsi-bench": "videos",
        "gsm8q": r"is no benchmark.*gsm8k, math500.*Did you mean 'gsm8k'",
        "./nowhere.yaml": "is no file",
        "": "is no benchmark",
    }.items():
        with pytest.raises(ConfigError, match=rf"--benchmark \(={name!r}\).*{words}"):
            benchmarks_of([name])
    with pytest.raises(ConfigError, match="gsm8k twice"):
        benchmarks_of(["gsm8k", "GSM8K"])
    monkeypatch.setattr(benchmarks, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dopd\[benchmarks\]'"):
        benchmarks_of(["gsm8k"])


def test_scores_and_answers_are_read_by_filter_in_the_order_of_documents() -> None:
    def record(doc: int, kind: str, **more: Any) -> dict[str, Any]:
        return {"doc_id": doc, "filter": kind, "resps": [["text"]], "metrics": [*more], **more}

    samples = {"one": [record(2, "x", acc=1.0), record(0, "x", acc=0.0), record(0, "y", acc=1.0)],
               "two": [record(0, "x", acc=0.5, resps=[[(-3.0, False)], [(-1.0, True)]])]}  # fmt: skip
    found = [one.greedy for one in answers_of(samples, LibraryTask("t", "acc", "x"))]
    assert [(one.text, one.score) for one in found if one] == [("text", 0.0), ("text", 1.0), ("option 1", 0.5)]
    assert [one.greedy.score for one in answers_of(samples, LibraryTask("t")) if one.greedy] == [0.0, 1.0, 0.5]
    with pytest.raises(DataError, match="no filter 'z'"):
        answers_of(samples, LibraryTask("t", "acc", "z"))
    for metric, value in (("em", None), ("acc", 50.0)):
        with pytest.raises(DataError, match=metric):
            answers_of({"one": [record(0, "x", acc=value)]}, LibraryTask("t", metric, "x"))


def test_models_are_judged_on_benchmarks_paired_and_kept(
    library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key := "sk-planted-6161-key")
    kept = tmp_path / "kept"
    command = ["eval", "tiny:dag/student", "tiny:dag/teacher", "--benchmark", "gsm8k", "--limit", "2",
               "--max-new-tokens", "5", "--batch-size", "3", "--output", str(kept), "--json"]  # fmt: skip
    assert main(command) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])["benchmarks"]["gsm8k"]
    asked = [json.loads(line) for line in library.read_text().splitlines()]
    assert [one["tasks"] for one in asked] == [["gsm8k"], ["gsm8k"]]
    assert asked[0]["model"] | {"class": ""} == {"class": "", "tokens": True, "batch_size": 3, "chat_template_args": {}}
    assert (asked[0]["limit"], asked[0]["gen_kwargs"]) == (2, {"max_gen_toks": 5})
    files = sorted(kept.glob("gsm8k/[!.]*"))
    assert [one.name for one in files] == ["tiny-dag-student.jsonl", "tiny-dag-teacher.jsonl"]
    first = read_evaluated(files[0])
    assert first.result.greedy == [1.0, 0.0] and first.versions["lm_eval"] == "0.4.13"
    assert first.about["benchmark"] == "gsm8k" and "differences" in json.dumps(record)
    assert all(key not in path.read_text() for path in [*files, library])
    assert main(command) == 0  # whole files are read, and not asked for again
    assert len(library.read_text().splitlines()) == 2
    capsys.readouterr()
    assert main(["eval", "tiny:dag/student", "--benchmark", "aime24"]) == 2
    assert "cannot be run: FileNotFoundError: Maxwell-Jia" in capsys.readouterr().err.replace("\n", " ")
    for more, words in (
        (["--task", "dag"], "--task (='dag') is not of benchmarks"),
        (["--verifier", "math"], "--verifier (='math') is not of benchmarks"),
    ):
        assert main(["eval", "tiny:dag/student", "--benchmark", "gsm8k", *more]) == 2
        assert words in capsys.readouterr().err.replace("\n", " ")
    assert main(["eval", "m=http://127.0.0.1:9", "--benchmark", "gsm8k"]) == 2
    assert "is on a server" in capsys.readouterr().err.replace("\n", " ")
    assert main(["eval", "--benchmark", "gsm8k"]) == 2 and main(["eval", "tiny:dag/student", "--limit", "3"]) == 2


@needs_library
def test_the_library_has_what_is_called_of_it() -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    called = {"model", "tasks", "limit", "gen_kwargs", "apply_chat_template", "log_samples", "bootstrap_iters",
              "random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed",
              "task_manager"}  # fmt: skip
    assert called <= set(inspect.signature(simple_evaluate).parameters)
    assert {"pretrained", "tokenizer", "batch_size", "chat_template_args"} <= set(inspect.signature(HFLM).parameters)
    names = TaskManager().all_tasks
    assert [one.task for one in BENCHMARKS.values() if one.task not in names] == []


@needs_library
def test_a_task_of_ones_own_runs_in_the_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"a 3 b a {n} ? b", "a": str(n)}) + "\n" for n in range(3)))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\ntest_split: test\nnum_fewshot: 0\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
    )
    written = "output_type: generate_until\ngeneration_kwargs: {until: ['x'], do_sample: false, max_gen_toks: 8}\n"
    chosen = 'output_type: multiple_choice\ndoc_to_choice: [" 0", " 1", " 2"]\n'
    for name, kind, metric in (("sums", written, "exact_match"), ("picks", chosen, "acc")):
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\n{common}{kind}metric_list: [{{metric: {metric}, aggregation: mean}}]\n"
        )
    names = ",".join(str(tmp_path / f"{name}.yaml") for name in ("sums", "picks"))
    assert main(["eval", "tiny:dag/student", "--benchmark", names, "--limit", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["benchmarks"]
    assert [len(found[name]["scores"]["greedy"]) for name in ("sums", "picks")] == [2, 2]
