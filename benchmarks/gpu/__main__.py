"""Everything that is worth knowing of a GPU, in one command of under ten minutes.

    make gpu                            # in the project's own environment
    GPU_PYTHON=python3 make gpu         # where PyTorch with CUDA is installed already
    python -m benchmarks.gpu --parts throughput --models 135m --rows 64

Everything is measured in one process, which is ended when something takes too long or has died, upon which another goes
on with the rest. The report is written after every figure: what fails or takes too long costs nothing but itself.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from benchmarks.gpu.options import Options, Stage
from benchmarks.gpu.report import as_markdown, tables, troubles
from benchmarks.provenance import provenance

ROOT = Path(__file__).parents[2]
GRACE = 5.0
"""Seconds after which a stage that should have ended is ended."""
LEAST_OF_ALL = 20.0
"""Seconds with which no process is started: its imports alone take that long on a slow disk."""


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


def origin_of(options: Options) -> dict[str, Any]:
    """
    :param options: resolved.
    :return: what the figures came from.
    """
    device = torch.device(options.device or "cpu")
    origin = provenance("benchmarks.gpu", device=device)
    machine = origin["machine"]
    return {
        **origin,
        "device": machine["device"] if device.type == "cuda" else machine["cpu"] or "cpu",
        "driver": driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if device.type == "cuda" else None,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
    }


def merge(parts: dict[str, Any], found: dict[str, Any]) -> None:
    """
    :param parts: of the report, to which is added
    :param found: what a worker has found.
    """
    for part, new in found.items():
        old = parts.setdefault(part, {"figures": {}, "seconds": 0.0})
        old["figures"] |= new["figures"]
        old["seconds"] += new["seconds"]
        old |= {name: value for name, value in new.items() if name not in ("figures", "seconds")}


def read(path: Path) -> dict[str, Any]:
    """
    :param path: a worker's file.
    :return: what it says, also before there is one.
    """
    state: dict[str, Any] = {"began": 0.0, "end": 0.0, "finished": 0, "parts": {}}
    return json.loads(path.read_text()) if path.exists() else state


def work(stages: list[Stage], end: float, options: Options, look: Callable[[dict[str, Any]], None]) -> int:
    """Let a process measure stage after stage, until it has finished, a stage takes too long, or it dies.

    :param stages: what is to be measured.
    :param end: the time at which everything must end, in seconds since the epoch.
    :param options: resolved.
    :param look: is given what was found, whenever there is something new.
    :return: how many stages are done with, the one included that was ended or of which the process has died.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path, log = Path(scratch) / "figures.json", Path(scratch) / "log"
        command = [sys.executable, "-m", "benchmarks.gpu.worker", str(path), str(end - GRACE)]
        question = {"options": dataclasses.asdict(options), "stages": stages}
        with log.open("w") as said:
            child = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=said, stderr=said, text=True, start_new_session=True
            )
            assert child.stdin is not None
            with contextlib.suppress(BrokenPipeError), child.stdin:
                child.stdin.write(json.dumps(question, default=str))
            trouble, state = None, read(path)
            while child.poll() is None and trouble is None:
                time.sleep(0.2)
                new = read(path)
                if new != state:
                    state = new
                    look(state["parts"])
                now = time.time()
                if state["began"] and now > state["end"] + GRACE:
                    trouble = f"ended after {now - state['began']:.0f} s"
                elif now > end:
                    trouble = "ended when time was over"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # a session of its own: with all that it has started
            status = child.wait()
        state = read(path)
        done: int = state["finished"]
        if trouble is None and status:
            trouble = f"failed with exit status {status}"
        if trouble is not None and done < len(stages):
            part = state["parts"].setdefault(stages[done].part, {"figures": {}, "seconds": 0.0})
            part |= {"error": trouble, "log": log.read_text(errors="replace")[-4000:].splitlines()}
            if state["began"]:
                part["seconds"] += time.time() - state["began"]
            done += 1
        look(state["parts"])
        return done


def name_of(options: Options, device: str) -> str:
    """
    :param options: as they were given.
    :param device: on which everything runs.
    :return: the name of the report's files: the device and, so that a try-out leaves a whole report alone, each option
        by which this is another measurement.
    """
    values = dataclasses.asdict(options)
    changed = {
        field.name: values[field.name]
        for field in dataclasses.fields(options)
        if field.name not in ("out", "minutes", "device") and values[field.name] != field.default
    }
    return re.sub(r"[^A-Za-z0-9]+", "-", f"{device} {changed or ''}").strip("-").lower()


def main(options: Options) -> int:
    """
    :param options: of the command line.
    :return: the exit status: 0 if everything ran to its end.
    """
    given, options = options, options.resolved()
    console = Console(width=150)
    start = time.time()
    end = start + 60 * options.minutes
    report: dict[str, Any] = {**origin_of(options), "parts": {}}
    cores = f"{os.cpu_count()}cores" if torch.device(options.device or "cpu").type == "cpu" else ""
    name = name_of(given, f"{report['device']} {cores}")
    options.out.mkdir(parents=True, exist_ok=True)
    stages, before = options.stages(), report["parts"]

    def write(found: dict[str, Any]) -> None:
        # After every figure: an interrupted run is not lost.
        report["parts"] = copy.deepcopy(before)
        merge(report["parts"], found)
        report["minutes"] = (time.time() - start) / 60
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        for suffix, of in ((".json", text), (".md", as_markdown(report))):
            (options.out / f"{name}{suffix}").write_text(of)

    while stages and end - time.time() > LEAST_OF_ALL:
        console.print(f"{end - time.time():.0f} s left for {len(stages)} stages, the next is {stages[0].part} …")
        done = work(stages, end, options, write)
        stages, before = stages[done:], report["parts"]
        if not done:  # the worker found that there is no time left
            break
    for stage in stages:
        part = before.setdefault(stage.part, {"figures": {}, "seconds": 0.0})
        part.setdefault("skipped", []).append(stage.which)
    write({})
    for table in tables(report):
        console.print(table.rich())
    console.print(f"Wrote {options.out / name}.json and .md")
    return 1 if any(map(troubles, report["parts"].values())) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
