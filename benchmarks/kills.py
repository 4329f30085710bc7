"""Runs that are killed, and go on: do they end as if they had not been?

A small model is trained through the command line alone, once without interruption and then again and again with SIGKILL
at random moments of the training, every other one in the middle of the writing of a checkpoint, each followed by
``textrlhf train --resume``. The ends are compared: every file of ``policy/`` byte by byte, the rows of
``progress.csv`` apart from what a clock measures, ``samples.jsonl``, ``episodes.jsonl``, and the newest checkpoint's
weights.
"""

from __future__ import annotations

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agents.state.history import CheckpointHistory

CLOCKS = ("time/fps", "time/time_elapsed", "time/tokens_per_second", "time/update_tokens_per_second")
# About twenty iterations, with a checkpoint after each, so that there is something to kill.
SMALL_RUN = (
    *("--total-timesteps", "5000", "--n-episodes", "16", "--max-new-tokens", "16", "--device", "cpu"),
    *("--checkpoint-every", "1", "--sample-every", "3", "--n-samples", "2", "--no-progress"),
)


def kill_runs(
    root: Path, kills: int, kills_per_run: int = 1, options: Sequence[str] = SMALL_RUN, seed: int = 0
) -> dict[str, Any]:
    """Kill runs, resume them, and compare their ends with that of a run that was left alone.

    :param root: an empty directory.
    :param kills: the number of SIGKILLs.
    :param kills_per_run: how often a run is killed before it may end.
    :param options: of ``textrlhf train``, except for the directory.
    :param seed: the seed of the moments.
    :return: the numbers of kills, of those in the middle of the writing of a checkpoint, of runs, and of runs that
        ended as the one that was left alone, with what differed in the others.
    """
    moments = random.Random(seed)
    process = _start(root / "whole", options)
    _wait_for_start(process, root / "whole", 0)
    start = time.perf_counter()
    _wait_for_end(process, root / "whole")
    seconds = time.perf_counter() - start
    killed = in_writing = runs = 0
    differing: dict[str, list[str]] = {}
    while killed < kills:
        directory = root / f"run {runs}"
        todo = min(kills_per_run, kills - killed)
        while todo:
            process = _start(directory, options)
            _wait_for_start(process, directory, _starts(directory))
            with contextlib.suppress(subprocess.TimeoutExpired):  # a run that is over is waited for no longer
                process.wait(moments.uniform(0, seconds))
            writing = killed % 2 == 1 and _wait_for_writing(process, directory)
            if process.poll() is not None:  # over before the moment had come
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed, in_writing, todo = killed + 1, in_writing + writing, todo - 1
        _wait_for_end(_start(directory, options), directory)
        if different := differences(directory, root / "whole"):
            differing[directory.name] = different
        runs += 1
        print(f"{killed} kills, {runs} runs, {len(differing)} of them differ", flush=True)
    return {
        "kills": killed,
        "kills_while_a_checkpoint_was_written": in_writing,
        "runs": runs,
        "identical": runs - len(differing),
        "differing": differing,
    }


def differences(directory: Path, whole: Path) -> list[str]:
    """
    :param directory: of a run.
    :param whole: of a run with the same options.
    :return: the names of what differs in the two.
    """
    found = []
    names = {path.name for path in [*(directory / "policy").iterdir(), *(whole / "policy").iterdir()]}
    names -= {"README.md"}  # the model card bears the name of the run
    for name in (*(f"policy/{name}" for name in sorted(names)), "samples.jsonl", "episodes.jsonl"):
        if not (directory / name).exists() or (directory / name).read_bytes() != (whole / name).read_bytes():
            found.append(name)
    if _rows(directory) != _rows(whole):
        found.append("progress.csv")
    ours, theirs = (CheckpointHistory(path / "checkpoints").newest()[1] for path in (directory, whole))
    if any(not tensor.equal(ours["policy"][name]) for name, tensor in theirs["policy"].items()):
        found.append("checkpoints")
    return found


def _start(directory: Path, options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start or resume a run, as its user would."""
    started = (directory / "config.yaml").exists()
    more = ["--resume", str(directory)] if started else ["--run-dir", str(directory), *options]
    command = [sys.executable, "-m", "agents.cli", "train", *more]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with _output(directory).open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": path})


def _output(directory: Path) -> Path:
    """What the latest command for a run has printed."""
    return directory.with_name(f"{directory.name}.txt")


def _starts(directory: Path) -> int:
    """How often a training has begun in a directory."""
    return len(list(directory.glob("events.out.tfevents.*")))


def _wait_for_start(process: subprocess.Popen[bytes], directory: Path, starts: int) -> None:
    while process.poll() is None and _starts(directory) == starts:
        time.sleep(0.005)


def _wait_for_writing(process: subprocess.Popen[bytes], directory: Path) -> bool:
    """Whether a checkpoint is being written, as soon as one is or the process has ended."""
    while process.poll() is None:
        if any((directory / "checkpoints").glob("*.partial")):
            return True
        time.sleep(0.0005)
    return False


def _wait_for_end(process: subprocess.Popen[bytes], directory: Path) -> None:
    """
    :raises RuntimeError: if the run has failed.
    """
    if process.wait() != 0:
        output = _output(directory).read_text()[-2000:]
        raise RuntimeError(f"textrlhf train ended with {process.returncode} in {directory}: {output}")


def _rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "progress.csv").open(newline="") as file:
        return [{name: x for name, x in row.items() if name not in CLOCKS} for row in csv.DictReader(file)]
