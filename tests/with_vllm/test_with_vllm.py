"""vLLM draws the answers, and serves a teacher; in an environment of its own: `make test-vllm`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm
_HERE = Path(__file__).parent
_CHECKOUT = _HERE.parents[1]
# The CPU has no memory of its own to fill, and busy machines take long to start an engine.
_LIMIT = 600.0


def trained(case: str, folder: Path) -> dict[str, Any]:
    environment = os.environ | {"MASTER_PORT": str(free_port())}
    command = [sys.executable, str(_HERE / "worker.py"), case, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.mark.parametrize("case", ["full", "lora", "importance"])
def test_vllm_draws_with_the_students_weights_and_is_found_out_where_it_does_not(tmp_path: Path, case: str) -> None:
    found = trained(case, tmp_path)
    drifts = [entry["rollout/drift"] for entry in found["logged"] if "rollout/drift" in entry]
    assert len(drifts) == 3 and max(drifts) < 1e-5, "its weights are those of the step"
    assert all(found["worst"][str(step)] < 1e-4 for step in range(3)), "against unpadded logits"
    assert found["worst"]["3"] > 0.01 and found["step"] == 3, "the run stops in front of the step with older weights"
    assert "older weights than the student" in found["ended"]
    if case == "importance":
        assert found["logged"][0]["rollout/importance"] == pytest.approx(1.0, abs=1e-4)
        assert found["logged"][0]["rollout/importance_capped"] == 0.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of `vllm serve` with the teacher, and the folder of both models."""
    folder = tmp_path_factory.mktemp("models")
    make = (
        "import trainer_kit as kit; from dopd.tiny.models import TinySpec; import sys\n"
        "for name, seed in (('student', 0), ('teacher', 1)):\n"
        "    kit.student(seed, TinySpec(num_layers=2, hidden_size=128)).save_pretrained(f'{sys.argv[1]}/{name}')\n"
        "    kit.TOKENIZER.save_pretrained(f'{sys.argv[1]}/{name}')\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_CHECKOUT), str(_CHECKOUT / "tests")])}
    subprocess.run([sys.executable, "-c", make, str(folder)], env=environment, check=True, timeout=_LIMIT)
    port = free_port()
    options = [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-logprobs",
        "-1",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    quiet = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder / "teacher"), *options]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment | quiet, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, folder / "server.log")
            yield f"http://127.0.0.1:{port}", folder
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _LIMIT
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(address, timeout=5)
        except OSError:
            time.sleep(1)
        else:
            return
    raise AssertionError(log.read_text()[-3000:])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vanilla", ["--method_options", "{support: sampled}"]),
        ("dopd", ["--teacher_server_support", "target_topk", "--teacher_server_top_k", "20"]),
    ],
)
def test_a_teacher_on_the_server_teaches_what_one_in_the_process_does(
    server: tuple[str, Path], tmp_path: Path, method: str, options: list[str]
) -> None:
    address, models = server
    rows = [
        {"prompt": [{"role": "user", "content": f"{n} + {n} mod 10"}], "privileged_context": f"{n} {n}"}
        for n in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    served = train(models, tmp_path, "served", method, ["--teacher_server", address, *options])
    if method == "vanilla":
        local = train(
            models, tmp_path, "local", method, ["--teacher_model_name_or_path", str(models / "teacher"), *options]
        )
        assert len(served) == len(local) == 2
        for one, other in zip(served, local, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    else:
        assert len(served) == 2 and all(0 < entry["share/HT"] + entry["share/LH"] <= 1 for entry in served)


def train(models: Path, folder: Path, name: str, method: str, more: list[str]) -> list[dict[str, Any]]:
    settings = {
        "model_name_or_path": str(models / "student"),
        "dataset_name": str(folder / "rows.jsonl"),
        "output_dir": str(folder / name),
        "method": method,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "privileged_template": "{prompt} {privileged_context}",
    }
    config = folder / f"{name}.yaml"
    config.write_text(json.dumps(settings))
    command = [str(Path(sys.executable).with_name("dopd")), "train", str(config), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]
