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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agents.state.history import CheckpointHistory
from agents.state.replacing import PARTIAL

CLOCKS = ("time/fps", "time/time_elapsed", "time/tokens_per_second", "time/update_tokens_per_second")
TRAIN = ("-m", "agents.cli", "train")
PATIENCE = 1800.0  # seconds of waiting after which a run counts as one that hangs
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
    :return: the numbers of kills, of those that have left a checkpoint half-written, of runs, and of runs that ended as
        the one that was left alone, with what differed in the others.
    :raises RuntimeError: if a run fails, hangs, or ends by another signal.
    """
    moments = random.Random(seed)
    with _training(root / "whole", options) as process:
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
            before, starts = time.time(), _starts(directory)
            with _training(directory, options) as process:
                _wait_for_start(process, directory, starts)
                with contextlib.suppress(subprocess.TimeoutExpired):  # a run that is over is waited for no longer
                    process.wait(moments.uniform(0, seconds))
                if killed % 2 == 1:
                    _stop_while_writing(process, directory, before)
                if not _kill(process, directory):  # over before the moment had come
                    break
            killed, in_writing, todo = killed + 1, in_writing + _half_written(directory, before), todo - 1
        with _training(directory, options) as process:
            _wait_for_end(process, directory)
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


@contextlib.contextmanager
def _training(directory: Path, options: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Within it a run is started or resumed, as its user would. It does not outlive an error."""
    started = (directory / "config.yaml").exists()
    more = ["--resume", str(directory)] if started else ["--run-dir", str(directory), *options]
    command = [sys.executable, *TRAIN, *more]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    with _output(directory).open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "PYTHONPATH": path})
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _output(directory: Path) -> Path:
    """What the latest command for a run has printed."""
    return directory.with_name(f"{directory.name}.txt")


def _starts(directory: Path) -> int:
    """How often a training has begun in a directory."""
    return len(list(directory.glob("events.out.tfevents.*")))


def _wait_for_start(process: subprocess.Popen[bytes], directory: Path, starts: int) -> None:
    _wait_until(lambda: process.poll() is not None or _starts(directory) > starts, directory)


def _wait_for_end(process: subprocess.Popen[bytes], directory: Path) -> None:
    _wait_until(lambda: process.poll() is not None, directory)
    if process.returncode != 0:
        raise _failure(directory, f"ended with {process.returncode}")


def _stop_while_writing(process: subprocess.Popen[bytes], directory: Path, since: float) -> None:
    """Stop a process in the middle of the writing of a checkpoint, unless it ends before it writes one."""

    def stopped() -> bool:
        if process.poll() is not None:
            return True
        if not _half_written(directory, since):
            return False
        os.kill(process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if _half_written(directory, since):
            return True
        process.send_signal(signal.SIGCONT)  # it had finished the checkpoint before it stopped
        return False

    _wait_until(stopped, directory, pause=0.0005)


def _kill(process: subprocess.Popen[bytes], directory: Path) -> bool:
    """Kill a process, and say whether that has ended it; if not, it had come to its end before."""
    was_over = process.poll() is not None
    process.kill()
    status = process.wait()
    if status != 0 and (was_over or status != -signal.SIGKILL):
        raise _failure(directory, f"ended with {status}")
    return status != 0


def _half_written(directory: Path, since: float) -> bool:
    """Whether a checkpoint that was begun after a time is there by half, and none that is newer."""
    history = CheckpointHistory(directory / "checkpoints")
    begun = [-1]
    for path in history.directory.glob(f"*{PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):  # it has been finished meanwhile
            if path.stem.isdigit() and path.stat().st_mtime > since:
                begun.append(int(path.stem))
    # An older one is being removed, which gives it the same name.
    return max(begun) >= max(history.timesteps(), default=0)


def _wait_until(done: Callable[[], bool], directory: Path, pause: float = 0.005) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > deadline:
            raise _failure(directory, f"has been waited for in vain, for {PATIENCE:g} seconds,")
        time.sleep(pause)


def _failure(directory: Path, what: str) -> RuntimeError:
    return RuntimeError(f"textrlhf train {what} in {directory}: {_output(directory).read_text()[-2000:]}")


def _rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "progress.csv").open(newline="") as file:
        return [{name: x for name, x in row.items() if name not in CLOCKS} for row in csv.DictReader(file)]
