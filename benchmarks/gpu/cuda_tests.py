"""The tests that need the device, in a process of their own."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Record

ROOT = Path(__file__).parents[2]


def measure(options: Options, record: Record, which: int = 0) -> None:
    """
    :param options: resolved. On a CPU the same tests run there.
    :param record: where the counts go, with the last lines of pytest.
    :param which: there is but one stage.
    """
    if importlib.util.find_spec("pytest") is None:
        record.add("tests", {"skipped": "pytest is not installed"})
        return
    cuda = torch.device(options.device or "cpu").type == "cuda"
    which_tests = ["-m", "cuda" if cuda else "not cuda", *(["-k", "checkpoint"] if options.quick else [])]
    others = ROOT.glob("tests/*/test_*_on_cuda.py")  # which stand beside what they test
    paths = ["tests/gpu", *sorted(str(path.relative_to(ROOT)) for path in others)]
    # A line for each test: those that have run before time was over count.
    command = [sys.executable, "-u", "-m", "pytest", *paths, *which_tests, "-vv", "-rfE", "--tb=short"]
    seconds = max(record.seconds_left - 2, 1)
    try:
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        output, end = done.stdout + done.stderr, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        output, end = said.decode() if isinstance(said, bytes) else said, f"stopped after {seconds:.0f} s"
    counts = {verdict: len(re.findall(rf"::\S.* {verdict}\b", output)) for verdict in ("PASSED", "FAILED", "ERROR")}
    summary = ", ".join(f"{count} {verdict.lower()}" for verdict, count in counts.items() if count)
    whole = end == "exit status 0"
    figure = {"passed": whole, "counts": counts, "summary": f"{summary or 'nothing ran'}; {end}"}
    # What it says of failures is at the end.
    record.add("tests", {**figure, "output": [] if whole else output.strip().splitlines()[-150:]})
