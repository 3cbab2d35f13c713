"""Configs and flags as they are written: YAML that is hostile, odd or broken, flags in any order, quoted values."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from annotated_types import Ge
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dopd.errors import ConfigError
from dopd.runs.settings import all_settings, load_settings, parse_flags, split_arguments
from dopd.settings import Setting, dump_yaml, quoted, read_yaml, read_yaml_file

BASE = {"model_name_or_path": "s", "task": "dag", "output_dir": "runs/x"}
# The same examples every time.
quick = settings(deadline=None, max_examples=80, derandomize=True, suppress_health_check=list(HealthCheck))


def bomb(levels: int = 12) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"max_steps: *a{levels - 1}"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bomb().encode(), "more than 50000 values"),
        (b"a: &a [*a]", "inside of itself"),
        (b"a: &a {b: *a}", "inside of itself"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, "levels deep"),
        (b"max_steps: 1\nseed: 3\nmax_steps: 2", "'max_steps' is there twice, in lines 1 and 3"),
        (b"task_options: {num_needed: 1, num_needed: 2}", "'num_needed' is there twice"),
        ("caf\u00e9: 1".encode("latin-1"), r"is not UTF-8 \(line 1\)"),
        (b"a: 1\nb: \xff", r"is not UTF-8 \(line 2\)"),
        ("a: 1".encode("utf-16"), "is not UTF-8"),
        (b"a: \x00", "is not YAML"),
        (b"a: [1", "is not YAML"),
        (b"a: 1\n---\nb: 2", "single document"),
        (b"? [a, b]\n: 1", "is not YAML"),
        (b"a: !!python/object/apply:os.system [ls]", "is not YAML"),
        (b"a: !!int x", "is not YAML"),
        (b"a: !!bool x", "is not YAML"),
        (b"a: !!timestamp x", "is not YAML"),
        (b"a: " + b"9" * 6000, "is not YAML"),
        (b"", "must be a mapping of keys to values, got nothing"),
        (b"- 1", "must be a mapping"),
        (b"x" * (2**20 + 1), "has 1.0 MiB"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_file_that_cannot_be_a_config_is_one_short_line(data: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=words) as caught:
        load_settings(path)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-6", 5e-6),
        ("1e3", 1000.0),
        ("1.5E+3", 1500.0),
        ("1_000", 1000),
        ("0x1f", 31),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("2024-99-99", "2024-99-99"),
        ("no", False),
        ("On", True),
        ("~", None),
        ("", None),
        ("12e4567x", "12e4567x"),
        ("-3", -3),
        (".5", 0.5),
        ("3.", 3.0),
        ("e5", "e5"),
        ("{a: 1e-3}", {"a": 1e-3}),
    ],
)
def test_a_value_is_what_it_looks_like(text: str, value: Any) -> None:
    read = read_yaml(text)
    assert read == value and type(read) is type(value)
    assert read_yaml(dump_yaml({"k": read})) == {"k": value}


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes("\ufeffmodel_name_or_path: s\ntask: dag\noutput_dir: x\nuse_cpu: yes\nsave_strategy: no".encode())
    made = load_settings(path)
    assert made.trainer["use_cpu"] is True and made.trainer["save_strategy"] == "no"


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
NESTED = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=4), inner), max_leaves=6)


@quick
@given(st.dictionaries(st.text(max_size=12), NESTED, max_size=4))
def test_what_is_written_is_read_back_by_this_reader_and_by_others(values: dict[str, Any]) -> None:
    text = dump_yaml(values)
    assert read_yaml(text) == values
    assert yaml.safe_load(text) == values


@quick
@given(st.text() | st.text(alphabet="abk:-[]{}&*!|>'\"#%@, \n\t019.eE+~?_"))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read_yaml(text)
    except ConfigError as error:
        assert "is not YAML" in str(error) or "levels deep" in str(error)


@quick
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(read_yaml_file(path), dict)
    except ConfigError as error:
        assert str(path) in str(error)


@quick
@given(st.data())
def test_any_settings_are_taken_as_they_are_meant_or_refused_by_name(data: st.DataObject) -> None:
    keys = st.sampled_from(sorted(all_settings()))
    given_values = data.draw(st.dictionaries(keys | st.text(max_size=8), NESTED, max_size=4))
    try:
        made = load_settings(None, **{**BASE, **{str(key): value for key, value in given_values.items()}})
    except ConfigError as error:
        assert len(str(error)) < 6000
        return
    assert set(given_values) <= set(all_settings())
    assert load_settings(None, **read_yaml(made.to_yaml())).to_yaml() == made.to_yaml()


@pytest.mark.parametrize("name", ["path", "flags"])
def test_a_key_may_have_the_name_of_an_argument(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown key '{name}'"):
        load_settings(None, **BASE, **{name: "x"})


# --- Flags


@pytest.mark.parametrize(
    ("words", "config", "flags"),
    [
        ("c.yaml --max_steps 1", "c.yaml", "--max_steps 1"),
        ("--max_steps 1 c.yaml", "c.yaml", "--max_steps 1"),
        ("--max_steps=1 c.yaml --seed 3", "c.yaml", "--max_steps=1 --seed 3"),
        ("--overwrite c.yaml", "c.yaml", "--overwrite"),
        ("--overwrite yes c.yaml", "c.yaml", "--overwrite yes"),
        ("--use-cpu c.yaml --bf16 false", "c.yaml", "--use-cpu --bf16 false"),
        ("--resume_from_checkpoint last c.yaml", "c.yaml", "--resume_from_checkpoint last"),
        ("--local_rank -1 c.yaml", "c.yaml", "--local_rank -1"),
        ("--include_num_input_tokens_seen all c.yaml", "c.yaml", "--include_num_input_tokens_seen all"),
        ("--overwrite --seed 1", None, "--overwrite --seed 1"),
    ],
)
def test_flags_stand_before_the_config_or_behind_it(words: str, config: str | None, flags: str) -> None:
    assert split_arguments(words.split()) == (config, flags.split())


def test_a_place_below_the_users_folder_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "c.yaml"
    path.write_text("model_name_or_path: ~/student\ndataset_name: [~/a.jsonl, ~/b.jsonl]\noutput_dir: ~/run\n")
    made = load_settings(path, ["--teacher_model_name_or_path", "~/teacher", "--run_name", "~/run"])
    assert made.output_dir == tmp_path / "run" and made.model_name_or_path == f"{tmp_path}/student"
    assert made.dataset_name == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    assert made.trainer["teacher_model_name_or_path"] == f"{tmp_path}/teacher" and made.trainer["run_name"] == "~/run"


def test_two_configs_are_told() -> None:
    with pytest.raises(ConfigError, match=r"one config is read, got 'a\.yaml' and 'b'"):
        split_arguments(["a.yaml", "--seed", "1", "b"])


def test_text_needs_no_quotes_and_numbers_need_a_value() -> None:
    read = parse_flags(["--privileged_template", "{prompt} {x", "--run_name=5", "--save_strategy", "no", "--overwrite"])
    assert read == {
        "privileged_template": "{prompt} {x",
        "run_name": "5",
        "save_strategy": "no",
        "overwrite": True,
    }
    with pytest.raises(ConfigError, match="--max_steps has no value: it must be -1 or int of at least 1"):
        parse_flags(["--max_steps", "--overwrite"])


# --- Descriptions


@quick
@given(NESTED)
def test_a_quoted_value_is_short_and_exact_where_it_is_small(value: Any) -> None:
    assert len(quoted(value)) <= 400
    if not isinstance(value, dict | list) and len(repr(value)) < 150:
        assert quoted(value) == repr(value)


def test_quoting_takes_no_time_for_what_is_nested_in_itself() -> None:
    value: Any = ["x"] * 10
    for _ in range(40):
        value = [value] * 10
    value[0][0].append(value)
    assert len(quoted(value)) <= 400
    assert quoted(10**6000).startswith("a whole number of")


@quick
@given(st.integers() | st.floats() | st.text() | st.booleans() | st.none())
def test_a_count_is_a_whole_number_of_at_least_1(value: Any) -> None:
    right = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**63
    assert (not Setting("k", Annotated[int, Ge(1)]).read(value)[1]) == right


@quick
@given(st.integers() | st.floats() | st.text() | st.booleans() | st.none())
def test_a_number_is_finite(value: Any) -> None:
    read, problems = Setting("k", float).read(value)
    if isinstance(value, float) and math.isfinite(value):
        assert read == value and not problems
    if isinstance(value, bool | None) or (isinstance(value, float) and not math.isfinite(value)):
        assert problems
    if not problems:
        assert math.isfinite(read) and read == float(value)


def test_choices_have_no_other_meaning() -> None:
    choice = Setting("k", Literal["no", "steps"])
    assert choice.read(False) == ("no", []) and choice.read("no") == ("no", [])
    assert choice.read("step")[1] == ["k (='step') must be 'no' or 'steps'. Did you mean 'steps'?"]
    assert choice.read(True)[1] and choice.read(0)[1] and choice.read(None)[1]
    assert Setting("k", Literal[False] | str | None).read(0)[1]


def test_config_prints_what_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    from dopd.cli.main import main

    assert main(["config"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{key}: " in f"\n{shown}" for key in all_settings())
    assert "lora_r: int of at least 1; default 16 (TRL)" in shown
    assert main(["config", "lora-drop"]) == 0
    assert capsys.readouterr().out.startswith("lora_dropout: float of at least 0 and below 1; default 0.0 (TRL)\n")
    assert main(["config", "learning_rate"]) == 0
    assert "default 5e-06 (transformers; TRL's default is 1e-06)" in " ".join(capsys.readouterr().out.split())
    assert main(["config", "no_such_key"]) == 2
    assert "no key has 'no_such_key' in its name or description" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--keys"], ["tiny-dag", "--keys"]], ids=["alone", "with a config"])
def test_the_flag_that_listed_keys_names_the_command_that_does(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    from dopd.cli.main import main

    assert main(["train", *arguments]) == 2
    assert "`dopd config" in capsys.readouterr().err


def test_each_key_is_of_the_library_that_documents_it() -> None:
    """Against the classes as they are written: a key that a class of theirs declares in its own body is theirs."""
    import ast
    import inspect

    import transformers
    import trl

    from dopd.runs.origins import origin_of

    def declared(*classes: type) -> set[str]:
        trees = [ast.parse(inspect.getsource(cls)).body[0] for cls in classes]
        return {one.target.id for tree in trees for one in tree.body if isinstance(one, ast.AnnAssign)}  # type: ignore[attr-defined, union-attr]

    trainings = declared(transformers.TrainingArguments)
    of_trl = declared(trl.DistillationConfig, trl.trainer.base_config._BaseConfig, trl.ModelConfig, trl.ScriptArguments)
    for key in all_settings():
        expected = "transformers" if key in trainings else "TRL" if key in of_trl else "dopd"
        assert origin_of(key) == expected, key
    assert [origin_of(key) for key in ("privileged_student", "use_vllm", "learning_rate")] == [
        "dopd",
        "TRL",
        "transformers",
    ]
