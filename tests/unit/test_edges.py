"""Values at the edge of a condition, where one wrong sign, bound or default shows."""

import json
import logging
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dopd
from dopd.assignment import assign
from dopd.cli import doctor
from dopd.cli.evaluate import print_evaluations
from dopd.data.images import image_key, open_image, path_in
from dopd.data.views import Conversation
from dopd.errors import ConfigError
from dopd.evaluation.kept import Evaluated
from dopd.evaluation.results import EvaluationResult
from dopd.files import fingerprint, is_part, is_unchanged
from dopd.sampling import Ending
from dopd.settings import settings_of_call
from dopd.settings.described import Setting, Text, check_attributes
from dopd.settings.quoting import quoted
from dopd.signals import SignalBatch
from dopd.tiny.shipped import complete_folder
from dopd.trainer import lock
from dopd.trainer.owned import MARKER_FILE, read_marker
from dopd.trainer.progress import Speed


@pytest.mark.parametrize("beta", [0.0, 1.0, 1.5])
def test_a_mixture_needs_both_distributions(beta: float) -> None:
    with pytest.raises(ConfigError, match="must be between 0 and 1, both excluded"):
        dopd.Rule(source="teacher", divergence="js", beta=beta)


@pytest.mark.parametrize(("bound", "expected"), [("top", 0.9), ("bottom", 0.1)])
def test_the_smallest_share_is_one_token(bound: str, expected: float) -> None:
    values_BT = torch.tensor([[0.5, 0.9, 0.3], [0.1, 0.7, 0.2]])
    rule = dopd.Rule(source="teacher", select={"signal": "student_entropy", bound: 0.01})
    logprobs = {name: -torch.ones(2, 3) for name in ("student", "teacher")}
    batch = SignalBatch(torch.ones(2, 3), logprobs, {"student": values_BT, "teacher": values_BT}, {})
    assignment = assign(dopd.RoutingTable(name="one", rules=(rule,)), batch)
    assert values_BT[assignment.factors[0] > 0].tolist() == pytest.approx([expected])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_doctor_advises_one_thread_where_there_are_several(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    found = [finding for finding in doctor.environment() if "torch uses" in finding.text]
    assert len(found) == (threads > 1)


def test_an_evaluation_is_printed_with_its_accuracies(capsys: pytest.CaptureFixture[str]) -> None:
    result = EvaluationResult(greedy=[1.0, 0.0, 0.0, 0.0], privileged=[1.0] * 4, lengths=[12, 13])
    print_evaluations([Evaluated("mine", {}, result)], as_json=False)
    lines = [line.strip("\u2502 ").split("\u2502") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == 2]
    assert cells[0] == ["accuracy_greedy", "25.0% [4.6, 69.9]"]  # Wilson's, of 1 in 4
    assert cells[1][0] == "accuracy_greedy WITH p" and cells[1][1].startswith("100.0% [")
    assert cells[2:] == [["length", "12.5"]]


def test_without_locks_of_the_system_a_folder_nobody_has_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    assert lock._lock(-1, {}) is True
    assert lock._lock(-1, {"host": "another machine", "pid": 1}) is False


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_sampled_ids_have_one_dimension_less_than_logits(shape: tuple[int, ...]) -> None:
    student, target = torch.randn(*shape, 5), torch.randn(*shape, 5)
    ids = torch.randint(5, shape)
    value = dopd.divergence(student, target, kind="reverse_kl", support="sampled", sampled_ids=ids)
    log_s, log_t = (logits.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1) for logits in (student, target))
    torch.testing.assert_close(value, log_s - log_t)
    with pytest.raises(ConfigError, match="must have the shape"):
        dopd.divergence(student, target, kind="reverse_kl", support="sampled", sampled_ids=ids.unsqueeze(-1))


def test_a_loss_is_shown_without_its_sums() -> None:
    logits = torch.randn(1, 2, 3)
    table = dopd.table("vanilla")
    result = dopd.routed_loss(logits, {"teacher": logits}, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), table)
    assert "loss=" in repr(result) and "sums" not in repr(result)


def test_pictures_of_the_same_bytes_and_other_shapes_or_types_are_others() -> None:
    flat = np.arange(12, dtype=np.uint8)
    keys = {image_key(flat.reshape(shape)) for shape in ((2, 2, 3), (1, 4, 3), (4, 1, 3))}
    assert len(keys) == 3 and image_key(flat.reshape(2, 2, 3)) in keys
    assert image_key(flat) != image_key(flat.view(np.int8))


def test_the_time_left_counts_from_the_first_step_of_the_run() -> None:
    times = iter([0.0, 10.0])
    assert Speed(clock=lambda: next(times)).read(1, 3, None) == {"s left": "20"}


class _Described:
    def to_dict(self) -> dict[str, int]:
        return {"a": 1}


def test_an_object_stands_for_a_mapping_and_for_nothing_else() -> None:
    assert Setting("where", dict).read(_Described())[1] == []
    assert Setting("where", int).read(_Described())[1] != []


def _signal(batch: Any, start=0.5, parts=(1, 2)) -> Any:  # type: ignore[no-untyped-def]
    """Without annotations, as a user may write it."""


def test_an_argument_without_a_type_has_that_of_its_default() -> None:
    settings = settings_of_call(_signal)
    assert settings["start"].read("high")[1] != [] and settings["start"].read(0.25) == (0.25, [])
    assert settings["parts"].read("anything") == ("anything", [])


# --- Files and names


def test_a_part_of_a_file_is_known_by_the_name_of_the_file() -> None:
    name = "a" * 200
    assert is_part(".run.json.0123abcd.part", ["run.json"]) and is_part(f".{name[:100]}.0123abcd.part", [name])
    for other in ("run.json", ".run.json.0123abcd", ".run.json.0123abcg.part", ".other.json.0123abcd.part"):
        assert not is_part(other, ["run.json"])


@pytest.mark.parametrize(("size", "seen"), [(41, True), (2**20, True), (2**20 + 1, False)])
def test_another_content_of_the_same_size_is_seen_up_to_a_mebibyte(size: int, seen: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * size)
    written = fingerprint(path)
    assert is_unchanged(path, written)
    path.write_bytes(b"a" * (size - 1) + b"b")
    assert is_unchanged(path, written) is not seen


@pytest.mark.parametrize("name", ["", "/etc/hosts", "../other/run.json", "a/../../b"])
def test_a_marker_is_not_believed_about_files_outside_of_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / MARKER_FILE).write_text(json.dumps({"format": 2, "files": {name: None, "a/b.json": None}}))
    marker = read_marker(tmp_path)
    assert marker is not None and list(marker["files"]) == ["a/b.json"]


def test_a_folder_of_another_content_is_not_taken_for_the_model_that_was_made(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.mkdir()
    (final / "mine.txt").write_text("kept")
    with pytest.raises(OSError, match="not empty"):
        complete_folder(final, lambda folder: (folder / "weights").write_text("made"))
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine.txt"]


@pytest.mark.parametrize("value", [None, 3, b"a.png", ["a.png"], "", "  "])
def test_what_is_no_text_is_no_path(value: Any) -> None:
    assert path_in(value) is None


def test_conversations_are_equal_with_equal_options() -> None:
    turns = [{"role": "user", "content": "a"}]
    tools = {"tools": [{"name": "f"}]}
    assert Conversation(turns, tools) == Conversation(turns, tools) and Conversation(turns, {}) == turns
    assert Conversation(turns, tools) != Conversation(turns, {}) and Conversation(turns, tools) != turns
    assert Conversation(turns, tools) != Conversation([], tools)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 1.0, 1.0], [0, 1, 1]), ([0.0, 127.6, 255.0], [0, 128, 255])],
)
def test_floats_are_shares_of_white_where_none_is_above_one(values: list[float], expected: list[int]) -> None:
    picture = open_image(Image.fromarray(np.array([values], dtype=np.float32)))
    assert np.asarray(picture)[0, :, 0].tolist() == expected


# --- Words


def test_a_text_or_a_list_with_nothing_in_it_is_said_to_be_empty() -> None:
    assert Setting("where", Text).read("")[1][0].startswith("where (='') is empty")
    assert Setting("where", list[Text]).read(["a", ""])[1][0].startswith("where (=['a', '']) has an empty entry")


def test_a_mapping_of_fixed_keys_is_read_key_by_key() -> None:
    setting = Setting("sizes", dict, keys={"width": Setting("width", int)})
    assert setting.read({"width": 3}) == ({"width": 3}, [])
    assert "width" in setting.read({"wide": 3})[1][0] and "sizes" in setting.read({"width": "a"})[1][0]


def test_a_mapping_or_a_list_may_be_written_as_json() -> None:
    assert Setting("options", dict).read(' {"a": [1]}') == ({"a": [1]}, [])
    assert Setting("names", list).read('["a"]') == (["a"], [])


def test_an_answer_ends_with_the_first_token_that_ends_it() -> None:
    ending = Ending([9])
    assert ending.cut([3, 9, 4, 9]) == [3, 9] and ending.cut([3, 4]) == [3, 4] and ending.cut([]) == []
    assert ending.ended([3, 9]) and not ending.ended([9, 3]) and not ending.ended([])


class _Mode(str, Enum):
    FAST = "fast"


def test_a_choice_of_an_enumeration_of_words_stays_as_it_is() -> None:
    owner = SimpleNamespace(mode=_Mode.FAST, rate="5e-6")
    check_attributes(owner, {"mode": Setting("mode", str), "rate": Setting("rate", float)})
    assert owner.mode is _Mode.FAST and owner.rate == 5e-6


def test_a_value_is_quoted_four_levels_deep() -> None:
    lists: Any = 1
    mappings: Any = 1
    for _ in range(6):
        lists, mappings = [lists], {"a": mappings}
    assert quoted(lists) == "[[[[[...]]]]]" and quoted(mappings) == "{'a': {'a': {'a': {'a': {...}}}}}"
    assert quoted([[[[1]]]]) == "[[[[1]]]]"


def test_a_table_says_which_tokens_a_rule_selects() -> None:
    rule = dopd.Rule(source="teacher", select={"signal": "student_entropy", "top": 0.25}, weight=0.5)
    described = dopd.RoutingTable(name="one", rules=(rule,)).describe()
    assert described.splitlines()[-1].endswith("0.5 where student_entropy top 0.25")


@pytest.mark.parametrize(("process", "level"), [(0, logging.NOTSET), (1, logging.ERROR)])
def test_of_several_processes_the_main_one_warns(
    process: int, level: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dopd.DOPDConfig, "process_index", process)
    logging.getLogger("dopd").setLevel(logging.NOTSET)
    dopd.DOPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert logging.getLogger("dopd").level == level
