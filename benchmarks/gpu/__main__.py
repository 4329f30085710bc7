"""Everything that is worth knowing of a GPU, in one command of under ten minutes.

    make gpu                            # in the project's own environment
    GPU_PYTHON=python3 make gpu         # where PyTorch with CUDA is installed already
    python -m benchmarks.gpu --parts throughput --models 135m --rows 64

Each part runs in a process of its own that is ended when its time is over, and the report is written after each: what
fails or takes too long costs nothing but itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.gpu.options import SHARES, Options, Part
from benchmarks.gpu.report import as_markdown, tables
from benchmarks.timing import machine, today, versions

ROOT = Path(__file__).parents[2]
LEAST = 15.0
"""Seconds that a part needs to begin with: its imports alone take that long on a slow disk."""


def commit() -> str | None:
    """
    :return: the hash of the commit that is measured; None where there is no repository.
    """
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or None


def driver() -> str | None:
    """
    :return: the version of NVIDIA's driver; None without one.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        asked = subprocess.run(question, capture_output=True, text=True, timeout=20, check=False)
        return asked.stdout.strip().splitlines()[0] if asked.stdout.strip() else None
    return None


def provenance(options: Options) -> dict[str, Any]:
    """
    :param options: resolved.
    :return: what the figures came from.
    """
    device = torch.device(options.device or "cpu")
    found = machine(device)
    return {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "commit": commit(),
        "date": today(),
        "device": found["device"] if device.type == "cuda" else found["cpu"] or "cpu",
        "driver": driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else None,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "machine": found,
        "versions": versions(),
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
    }


def run_part(part: Part, seconds: float, options: Options) -> dict[str, Any]:
    """Run one part.

    :param part: which one.
    :param seconds: after which it is ended, with whatever it has started.
    :param options: resolved.
    :return: ``figures``; ``seconds``; and what went wrong, if anything did.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path, log = Path(scratch) / "figures.json", Path(scratch) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu.part", part, str(path), str(time.time() + 0.97 * seconds - 2)]
        start = time.monotonic()
        trouble = None
        with log.open("w") as said:
            child = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=said, stderr=said, text=True, start_new_session=True
            )
            try:
                child.communicate(json.dumps(dataclasses.asdict(options), default=str), timeout=seconds)
            except subprocess.TimeoutExpired:
                trouble = f"ended after {seconds:.0f} s"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # a session of its own: with all that it has started
                child.wait()
        words = log.read_text(errors="replace")
        if trouble is None and child.returncode:
            trouble = f"failed with exit status {child.returncode}"
        figures = json.loads(path.read_text()) if path.exists() else {}
        result = {"seconds": time.monotonic() - start, "figures": figures}
        return result if trouble is None else {**result, "error": trouble, "log": words[-4000:].splitlines()}


def main(options: Options) -> int:
    """
    :param options: of the command line.
    :return: the exit status: 0 if every part ran to its end.
    """
    options = options.resolved()
    console = Console(width=150)
    report: dict[str, Any] = {**provenance(options), "parts": {}}
    cores = f"{os.cpu_count()}cores" if torch.device(options.device or "cpu").type == "cpu" else ""
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{report['device']} {cores}").strip("-").lower()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    todo = list(options.parts)
    while todo:
        part = todo.pop(0)
        left = 60 * options.minutes - (time.monotonic() - start)
        seconds = left * SHARES[part] / (SHARES[part] + sum(SHARES[other] for other in todo))
        if seconds < LEAST:
            report["parts"][part] = {"skipped": f"{seconds:.0f} s were left for it"}
        else:
            console.print(f"{part}: at most {seconds:.0f} s …")
            report["parts"][part] = run_part(part, seconds, options)
        report["minutes"] = (time.monotonic() - start) / 60
        # After each part: an interrupted run is not lost.
        (options.out / f"{name}.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        (options.out / f"{name}.md").write_text(as_markdown(report))
    for table in tables(report):
        console.print(table.rich())
    console.print(f"Wrote {options.out / name}.json and .md")
    return 0 if all("error" not in found and "skipped" not in found for found in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
