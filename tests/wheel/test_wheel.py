"""The wheel in an environment of its own, outside the checkout: what a `pip install dopd` gives."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.wheel
ROOT = Path(__file__).resolve().parents[2]
MAX_MEGABYTES = 5
SHORT = [
    *("--max_steps", "1", "--train_prompts", "64", "--eval_prompts", "8", "--student_eval_steps", "1"),
    *("--student_eval_prompts", "8", "--final_eval_prompts", "8"),
]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built in a copy: a build leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "dopd", source / "dopd", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs `dopd` of an environment that has the wheel, and beside it what this one has but dopd."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*command, str(wheel)], check=True)
    ask = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    # A path in a .pth file comes last, and .pth files that lie there (that of an editable dopd) are not read.
    (Path(packages) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    place = folder / "elsewhere"
    place.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"DOPD_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def started(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        command = [str(python.parent / "dopd"), *arguments]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        assert done.returncode == status, f"{arguments}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done

    where = subprocess.run([str(python), "-c", "import dopd; print(dopd.__file__)"], cwd=place, env=environment,
                           check=True, capture_output=True, text=True).stdout  # fmt: skip
    assert where.startswith(packages), where
    return started


def test_the_wheel_is_small_and_has_what_commands_read(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_MEGABYTES * 1e6
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (*(ROOT / "dopd" / "recipes").iterdir(), *(ROOT / "dopd" / "report").glob("*.*")):
        if path.suffix != ".pyc":
            assert path.relative_to(ROOT).as_posix() in names
    assert not [name for name in names if name.startswith(("lab", "experiments", "tests", "recipes"))]


def test_a_recipe_trains_by_name_and_its_run_is_evaluated_and_reported(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run("train", "tiny-dag", *SHORT, "--output_dir", str(folder))
    assert (folder / "report.html").is_file() and (folder / "model.safetensors").is_file()
    record = json.loads(run("eval", str(folder), "--prompts", "4", "--json").stdout.splitlines()[-1])
    assert record["metrics"]["num_prompts"] == 4
    run("report", str(folder), "--output", str(tmp_path / "page.html"))
    assert "Qwen/Qwen3-8B" in run("train", "qwen3-8b-to-1.7b", "--dry-run").stdout
    assert "Did you mean 'tiny-dag'" in run("train", "tiny-dga", status=2).stderr


def test_the_quickstart_runs_outside_the_checkout(run: Run, tmp_path: Path) -> None:
    recipe = yaml.safe_load((ROOT / "dopd" / "recipes" / "tiny-dag.yaml").read_text())
    short = dict(zip((flag.removeprefix("--") for flag in SHORT[::2]), map(int, SHORT[1::2]), strict=True))
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(recipe | short))
    flags = ["--config", str(tmp_path / "short.yaml"), "--methods", "dopd", "--seeds", "1"]
    run("quickstart", *flags, "--output-dir", str(tmp_path / "quick"))
    assert (tmp_path / "quick" / "report.html").is_file()
    for name in ("tiny-dag", "tiny-vision"):  # the models of both quickstarts come with the wheel
        models = yaml.safe_load((ROOT / "dopd" / "recipes" / f"{name}.yaml").read_text())
        for key in ("model_name_or_path", "teacher_model_name_or_path"):
            task, _, role = models[key].removeprefix("tiny:").partition("/")
            assert list((ROOT / "dopd" / "tiny" / "weights").glob(f"{task}-{role}-seed0-*.safetensors"))


def test_listings_work_and_what_needs_the_checkout_says_so_in_one_line(run: Run) -> None:
    assert "vanilla" in run("methods").stdout and "dag" in run("tasks").stdout
    assert run("--version").stdout.startswith("dopd ")
    for command in (["experiment", "figure3", "--jobs", "2"], ["experiment", "--help"], ["tiny", "dag"]):
        (line,) = run(*command, status=2).stderr.splitlines()
        assert line.startswith(f"error: dopd {command[0]} needs a checkout")
    (line,) = run("eval", "tiny:graph/student", "--prompts", "4", status=2).stderr.splitlines()
    assert line.startswith("error: model 'tiny:graph/student': no 'student' of task 'graph' and seed 0 comes with dopd")
