"""The tests that need the device, in a process of their own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Record

ROOT = Path(__file__).parents[2]


def measure(options: Options, record: Record) -> None:
    """
    :param options: resolved. On a CPU the same tests run there.
    :param record: where the counts go, with the last lines of pytest.
    """
    if importlib.util.find_spec("pytest") is None:
        record.add("tests", {"skipped": "pytest is not installed"})
        return
    cuda = torch.device(options.device or "cpu").type == "cuda"
    which = ["-m", "cuda" if cuda else "not cuda", *(["-k", "checkpoint"] if options.quick else [])]
    command = [sys.executable, "-m", "pytest", "tests/gpu", *which, "-rfE", "--durations=5", "--tb=short"]
    seconds = max(record.seconds_left - 5, 1)
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        output, status = said.decode() if isinstance(said, bytes) else said, None
    lines = output.strip().splitlines()
    figure = {"passed": status == 0, "exit_status": status, "summary": lines[-1] if lines else ""}
    record.add("tests", {**figure, "output": lines[-120:]})
