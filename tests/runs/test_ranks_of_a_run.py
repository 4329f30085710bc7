"""`textrlhf train` in two processes, one of which is killed: the other ends and says why, and the run can go on."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from learners import PROMPTS, even_tokens, save_model
from safetensors.torch import load_file

from agents.algorithms.engine import launched
from agents.algorithms.ppo import PPO
from agents.cli import main
from agents.runs.run_files import TIMESTEPS
from agents.state import checkpoint
from agents.state.history import CheckpointHistory

TESTS = Path(__file__).parents[1]
TRAIN = ["--algo", "test_ranks_of_a_run:Fragile", "--reward", "test_ranks_of_a_run:judge", "--gold", "None"]
TRAIN += ["--checkpoint-every", "1", "--no-progress"]
TRAIN += ["--max-new-tokens", "6", "--n-episodes", "8", "--batch-size", "4", "--n-epochs", "1", "--device", "cpu"]
TRAIN += ["--total-timesteps", "150", "--n-samples", "2", "--sample-every", "2", "--learning-rate", "3e-3"]
CUT_UP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
_answers, _losses = [0], [0]


def judge(**batch: Any) -> list[float]:
    """A reward that kills the second process at one of its answers, if it is told to: in the middle of a rollout."""
    count(_answers, "KILLED_AT_ANSWER")
    return even_tokens(**batch)


class Fragile(PPO):
    """PPO whose second process is killed at one of its losses, if it is told to: in the middle of an update."""

    def loss(self, *args: Any) -> Any:
        count(_losses, "KILLED_AT_LOSS")
        return super().loss(*args)


def count(calls: list[int], variable: str) -> None:
    calls[0] += 1
    if launched()[0] == 1 and calls[0] == int(os.environ.get(variable, 0)):
        os.kill(os.getpid(), signal.SIGKILL)


def launch(arguments: list[str], variables: dict[str, str]) -> list[tuple[int, str]]:
    """Start the processes as `torchrun` does, but without its watching over them.

    :return: the exit status of each process, and what it has said.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "runs")))
    started = []
    for rank in range(2):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        names |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": 1, "COLUMNS": 500}
        names |= {"PYTHONPATH": paths, **variables}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "agents.cli", "train", *arguments],
                env={**os.environ, **{name: str(value) for name, value in names.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [process.communicate(timeout=500)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]


def rows(directory: Path) -> list[dict[str, str]]:
    """What the run has logged, except for what a clock measures."""
    with (directory / "progress.csv").open() as file:
        return [{k: v for k, v in row.items() if "time" not in k or k == TIMESTEPS} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("variables", "kill"), [({}, {"KILLED_AT_ANSWER": "7"}), (CUT_UP, {"KILLED_AT_LOSS": "5"})], ids=["whole", "cut up"]
)
def test_one_of_two_processes_is_killed_and_the_run_ends_as_if_it_had_not_been(
    variables: dict[str, str], kill: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    names = ["--model", save_model(tmp_path / "model"), "--prompts", str(tmp_path / "prompts.txt"), *TRAIN]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    ends = launch([*names, "--run-dir", str(whole)], variables)
    assert [status for status, _ in ends] == [0, 0], ends
    assert [f"Wrote {whole}" in said for _, said in ends] == [True, False]

    (status, said), (killed, _) = launch([*names, "--run-dir", str(stopped)], variables | kill)
    assert killed == -signal.SIGKILL
    assert status == 1
    assert "RankLost: Process 0 of 2 has lost another one: it has ended" in said
    assert f"`textrlhf train --resume {stopped} --trust` goes on from" in said
    done = CheckpointHistory(stopped / "checkpoints").timesteps()[-1]
    assert 0 < done < 150
    state = checkpoint.load(CheckpointHistory(stopped / "checkpoints").path(done))
    assert state["other_generators"].keys() == {"1"}
    assert state["other_generators"]["1"]["env"] != state["generators"]["env"]
    alone = Path(shutil.copytree(stopped, tmp_path / "alone"))

    ends = launch(["--resume", str(stopped), "--trust"], variables)
    assert [status for status, _ in ends] == [0, 0], ends
    weights = [load_file(directory / "policy" / "model.safetensors") for directory in (whole, stopped)]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    assert rows(stopped) == rows(whole)
    samples = [(directory / "samples.jsonl").read_text().splitlines() for directory in (whole, stopped)]
    assert [*map(json.loads, samples[0])] == [*map(json.loads, samples[1])]

    assert main(["train", "--resume", str(alone), "--trust"]) == 0  # by a single process
    assert int(rows(alone)[-1][TIMESTEPS]) >= 150
    before = [row for row in rows(alone) if int(row[TIMESTEPS]) <= done]
    assert before == [row for row in rows(whole) if int(row[TIMESTEPS]) <= done] != []
