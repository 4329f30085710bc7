"""Where a figure comes from: the command, the commit, the date, the machine and the versions of the libraries."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

CPU = torch.device("cpu")


def provenance(module: str, arguments: Sequence[str] | None = None, device: torch.device = CPU) -> dict[str, Any]:
    """What belongs to every figure that is kept. Call it before the measurement: a repository moves on.

    :param module: the name of the benchmark's module.
    :param arguments: its command line; None: that of the process.
    :param device: where the models are.
    :return: ``command``, ``commit``, ``date``, ``machine`` and ``versions``.
    """
    return {
        "command": shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]),
        "commit": commit(),
        "date": today(),
        "machine": machine(device),
        "versions": versions(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """
    :param device: where the models are.
    :return: what the figures depend on.
    """
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = [int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),  # which products of matrices depend on
        "cores": os.cpu_count(),
        "memory_gib": round(memory[0] / 2**20, 1) if memory else None,
        "load_at_start": os.getloadavg()[0],
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def versions() -> dict[str, str]:
    """Of everything that the figures depend on."""
    names = ("torch", "transformers", "tokenizers", "stable-baselines3", "gymnasium", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def commit() -> str | None:
    """
    :return: the hash of the commit that is measured, with ``-dirty`` if its code has been changed since; None where
        there is no repository.
    """

    def git(*arguments: str) -> str:
        asked = ["git", *arguments]
        return subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout

    # Results are written while others are measured, so that only what runs counts.
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/*.toml", ":/text_env")
    head = git("rev-parse", "HEAD").strip()
    return f"{head}-dirty" if head and changed else head or None


def today() -> str:
    """Date and time in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
