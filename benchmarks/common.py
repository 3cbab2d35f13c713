"""What the benchmarks share: the machine they ran on, high-water marks, tables and CSV files."""

import csv
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line), "unknown")
    fields: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count(), "threads": threads, "device": device}
    if device == "cuda":
        fields["device"] = torch.cuda.get_device_name()
    fields["load"] = round(os.getloadavg()[0], 1)  # other work on the machine, before the first run
    fields["python"] = platform.python_version()
    for package in ("torch", "transformers", "trl", "liger-kernel"):
        try:
            fields[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            fields[package] = "absent"
    folder = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=folder)
    return fields | {"commit": git.stdout.strip() or "unknown"}


def reset_high_water() -> int:
    """KiB resident now; the process's high-water mark starts again from there."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """KiB of `VmRSS` (now) or `VmHWM` (at the highest)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    lines = [columns, *[[str(row[column]) for column in columns] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def append_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a file, which gets a header when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
