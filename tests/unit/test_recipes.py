"""Every recipe parses, passes its dry run, and does what its comments say. No model, no data, no network."""

import re
import shlex
import time
from pathlib import Path

import pytest
import yaml

from dopd.cli.main import build_parser, main
from dopd.errors import ConfigError
from dopd.routing import Regime
from dopd.runs import RunSettings, hub, load_settings
from dopd.runs.recipes import FOLDER, config_path, recipe_names
from dopd.runs.settings import split_arguments
from dopd.runs.train import describe, make_config
from dopd.trainer import DOPDConfig

RECIPES = sorted(FOLDER.glob("*.yaml"))
BATCH = re.compile(r"(\d+) prompts(?: a step)? x (\d+) rollouts(?: = (\d+) completions)?")
PROCESSES = re.compile(r"--num_processes (\d+)")
every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def read(path: Path) -> tuple[RunSettings, DOPDConfig]:
    settings = load_settings(path)
    return settings, make_config(settings, elsewhere=True)


def commands(path: Path) -> list[list[str]]:
    """Flags of the `dopd train` commands on this recipe that its comments show."""
    comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(comments).replace("\\\n", " ")
    found = re.findall(rf"(?:dopd|dopd\.cli\.main) train {re.escape(path.stem)}(.*)", text)
    return [shlex.split(flags) for flags in found]


def test_recipes_are_there() -> None:
    needed = {
        "tiny-dag",
        "tiny-vision",
        "smollm2-135m",
        "qwen2.5-coder-1.5b-to-0.5b",
        "qwen3-8b-to-1.7b",
        "qwen3-vl-8b-to-2b",
    }
    assert needed <= {path.stem for path in RECIPES}


@every_recipe
def test_a_recipe_is_found_by_name_from_anywhere(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (path.stem, path.name, f"recipes/{path.name}", f"recipes/{path.stem}", str(path)):
        assert config_path(given) == path
    assert path.stem in recipe_names()
    (tmp_path / path.name).write_text("model_name_or_path: mine")
    assert config_path(path.name) == Path(path.name)  # a file that is there comes first


def test_a_name_that_is_no_recipe_is_told_the_closest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"Did you mean 'tiny-dag'.* Recipes: .*smollm2-135m"):
        config_path("tiny-dga")
    with pytest.raises(ConfigError, match="no such file, and no recipe"):
        config_path("elsewhere/tiny-dag.yaml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"is a folder: a run's configuration is 'run/config.yaml'"):
        config_path("run")


@every_recipe
def test_dry_run_shows_the_resolved_config_and_the_table(path: Path) -> None:
    settings, config = read(path)
    text = describe(settings, config)
    assert config.routing_table().describe() in text
    resolved = yaml.safe_load(settings.to_yaml())
    assert resolved.items() >= yaml.safe_load(path.read_text()).items()
    assert f"{config.num_generations} rollouts" in text


@every_recipe
def test_resolved_config_reads_back_to_the_same_run(path: Path, tmp_path: Path) -> None:
    settings, _ = read(path)
    (tmp_path / "config.yaml").write_text(settings.to_yaml())
    assert load_settings(tmp_path / "config.yaml") == settings


@every_recipe
def test_every_key_is_read_and_a_misspelt_one_is_refused(path: Path, tmp_path: Path) -> None:
    for key in yaml.safe_load(path.read_text()):
        changed = tmp_path / path.name
        changed.write_text(path.read_text().replace(f"\n{key}:", f"\n{key}x:").replace(f"{key}: ", f"{key}x: ", 1))
        with pytest.raises(ConfigError, match="unknown key"):
            load_settings(changed)


@every_recipe
def test_batch_is_what_the_comment_says(path: Path) -> None:
    text = path.read_text()
    said = BATCH.search(text)
    assert said, "a comment must say: N prompts x M rollouts"
    processes = PROCESSES.search(text)
    _, config = read(path)
    completions = config.per_device_train_batch_size * config.gradient_accumulation_steps
    completions *= int(processes.group(1)) if processes else 1
    prompts, rollouts = int(said.group(1)), int(said.group(2))
    assert rollouts == config.num_generations
    assert prompts * rollouts == completions
    assert said.group(3) is None or int(said.group(3)) == completions


@every_recipe
def test_commands_in_the_comments_work(path: Path) -> None:
    shown = commands(path)
    assert shown, "the comment at the top must show the command"
    for flags in shown:
        _, rest = build_parser().parse_known_args(["train", str(path), *flags])
        config, rest = split_arguments(rest)
        make_config(load_settings(config, rest), elsewhere=True)


@every_recipe
def test_text_is_ascii_and_names_no_folder_of_one_machine(path: Path) -> None:
    text = path.read_text()
    assert text.isascii()
    settings, _ = read(path)
    assert not settings.output_dir.is_absolute() and settings.output_dir.parts[0] == "runs"


def test_large_recipe_has_the_settings_of_the_paper() -> None:
    settings, config = read(FOLDER / "qwen3-8b-to-1.7b.yaml")
    assert settings.model_name_or_path == "Qwen/Qwen3-1.7B"
    assert config.teacher_model_name_or_path == "Qwen/Qwen3-8B"
    assert config.learning_rate == 5e-6 and config.lr_scheduler_type == "cosine" and config.max_steps == 200
    assert config.num_generations == 4 and config.temperature == 1.0
    assert config.chat_template_kwargs == {"enable_thinking": False}
    assert 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps == 512
    rules = {rule.regime: rule for rule in config.routing_table().rules}
    weights = [rules[regime].weight for regime in (Regime.LH, Regime.LL, Regime.HT, Regime.HS)]
    assert weights == [0.6, 0.3, 1.0, 0.6]
    sources = [rules[regime].source for regime in (Regime.LH, Regime.LL, Regime.HT, Regime.HS)]
    assert sources == ["privileged_teacher", "privileged_student", "privileged_teacher", "privileged_student"]
    light = [rules[regime] for regime in (Regime.LH, Regime.LL, Regime.HS)]
    assert {(rule.divergence, rule.support, rule.top_k) for rule in light} == {("reverse_kl", "student_topk", 128)}
    assert (rules[Regime.HT].divergence, rules[Regime.HT].support) == ("js", "full")
    assert config.routing_table().anchor == "current"


def test_large_vision_recipe_has_the_settings_of_the_paper() -> None:
    settings, config = read(FOLDER / "qwen3-vl-8b-to-2b.yaml")
    assert settings.model_name_or_path == "Qwen/Qwen3-VL-2B-Instruct"
    assert config.teacher_model_name_or_path == "Qwen/Qwen3-VL-8B-Instruct"
    assert config.learning_rate == 5e-6 and config.lr_scheduler_type == "cosine" and config.max_steps == 300
    assert config.num_generations == 4 and config.temperature == 1.0 and config.method == "dopd"
    assert 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps == 4 * 64


def test_pruned_student_keeps_the_first_and_the_last_layer() -> None:
    settings, _ = read(FOLDER / "smollm2-135m.yaml")
    layers = settings.student_keep_layers
    assert layers is not None and layers == sorted(set(layers))
    assert layers[0] == 0 and layers[-1] == 29  # of SmolLM2-135M's 30


# --- Hub ids where no hub can be reached


class NoNetwork:
    def head(self, url: str, **_: object) -> None:
        raise ConnectionError("Name or service not known\nand more lines")


@pytest.fixture(params=["offline", "no network"])
def no_hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", request.param == "offline")
    monkeypatch.setattr(hub, "get_session", NoNetwork)
    return "HF_HUB_OFFLINE" if request.param == "offline" else "Name or service not known"


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("qwen2.5-coder-1.5b-to-0.5b", "Qwen/Qwen2.5-Coder-0.5B-Instruct"),
        ("qwen3-8b-to-1.7b", "your-name/prompts-with-hints"),  # the data are read first
    ],
)
def test_hub_that_cannot_be_reached_is_one_error_at_once(
    recipe: str, name: str, no_hub: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("reasoning_gym")
    folder = tmp_path / "run"
    flags = ["--output_dir", str(folder), "--use_cpu", "true", "--train_prompts", "8", "--eval_prompts", "2"]
    flags += ["--use_vllm", "false"] if recipe.startswith("qwen3") else []
    start = time.monotonic()
    assert main(["train", str(FOLDER / f"{recipe}.yaml"), *flags]) == 2
    assert time.monotonic() - start < 20
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert name in line and no_hub in line and "local folder" in line
    assert not folder.exists()


def test_folder_cached_id_and_odd_name_are_left_to_their_readers(
    no_hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "name").mkdir()
    assert hub.unreachable("name", "model") is None
    assert hub.unreachable(str(tmp_path / "missing"), "model") is None
    assert hub.unreachable("a/b/c", "model") is None
    assert hub.unreachable("bad name!/x", "model") is None
    assert no_hub in str(hub.unreachable("someone/model", "model"))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: "config.json")
    assert hub.unreachable("someone/model", "model") is None
