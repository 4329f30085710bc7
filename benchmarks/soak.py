"""A run of half an hour: does it need more and more memory?

``textrlhf train`` runs with its defaults, checkpoints and samples included, until its time is over; then SIGTERM ends
it. Its resident memory is read once a second. The first minutes are not counted: weights, the caches of allocators and
the storage of the memo grow until the longest texts have been seen.
"""

from __future__ import annotations

import csv
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Never over by itself, and as long texts, checkpoints and samples as a usual run has.
ENDLESS_RUN = ("--total-timesteps", str(10**9), "--device", "cpu", "--no-progress")
TERMINATED = 128 + signal.SIGTERM


def soak(work: Path, minutes: float, start_minute: float = 3.0, options: Sequence[str] = ENDLESS_RUN) -> dict[str, Any]:
    """Watch the resident memory of a run.

    :param work: an empty directory.
    :param minutes: the length of the run, in minutes.
    :param start_minute: the minute that the end is compared with.
    :param options: of ``textrlhf train``, except for the directory.
    :return: the resident memory of the process in MiB, at the two times (medians of the minute before the end and of
        the one after ``start_minute``, or of a tenth of a shorter run) and once a minute; the growth as a share; how
        many iterations, tokens and checkpoints there were.
    :raises ValueError: if the run is over before what its end is compared with has been read.
    :raises RuntimeError: if the run ended by itself, or not as SIGTERM asks for.
    """
    window = min(60.0, 6 * minutes)
    if 60 * start_minute + window > 60 * minutes:
        raise ValueError(
            f"Expected a soak that goes on after its first {start_minute:g} minutes, whose end is compared with the "
            f"minute that follows these, got {minutes:g} minutes. Ask for {start_minute + 1:g} or more (--minutes)."
        )
    run = work / "run"
    command = [sys.executable, "-m", "agents.cli", "train", "--run-dir", str(run), *options]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    output = work / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": path})
    try:
        read = _watch(process.pid, process, 60 * minutes)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    if status != TERMINATED:
        raise RuntimeError(
            f"Expected SIGTERM to end the run with {TERMINATED}, got {status}: {output.read_text()[-2000:]}"
        )
    first = round(_median(read, 60 * start_minute, 60 * start_minute + window), 1)
    last = round(_median(read, 60 * minutes - window, 60 * minutes), 1)
    with (run / "progress.csv").open(newline="") as progress:
        rows = list(csv.DictReader(progress))
    return {
        "minutes": minutes,
        "start_minute": start_minute,
        "first_mib": first,
        "last_mib": last,
        "growth": round(last / first - 1, 4),
        "mib_each_minute": [round(_median(read, 60 * minute, 60 * (minute + 1)), 1) for minute in range(int(minutes))],
        "iterations": len(rows),
        "tokens": int(rows[-1]["time/total_timesteps"]),
        "checkpoint_kept": max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()),
    }


def resident_bytes(pid: int) -> int:
    """
    :param pid: of a process.
    :return: its resident memory, in bytes (Linux).
    """
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _watch(pid: int, process: subprocess.Popen[bytes], seconds: float) -> list[tuple[float, float]]:
    """Second and MiB of each reading."""
    start, read = time.monotonic(), []
    while (now := time.monotonic() - start) < seconds:
        if process.poll() is not None:
            raise RuntimeError(f"The run ended after {now:.0f} s by itself, with status {process.returncode}.")
        read.append((now, resident_bytes(pid) / 2**20))
        time.sleep(min(1.0, seconds / 100))
    return read


def _median(read: list[tuple[float, float]], start: float, end: float) -> float:
    return statistics.median(mib for second, mib in read if start <= second < end)
