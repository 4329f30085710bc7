"""Several processes, each with its share of the episodes, train to the weights of one process with all of them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from learners import largest_difference
from rank_trainings import KINDS, RANKS, trained

from agents.state import checkpoint
from agents.state.checkpoint import Tree

TESTS = Path(__file__).parents[1]
# What a clock measures.
CLOCKS = ("time/fps", "time/time_elapsed", "time/tokens_per_second", "time/update_tokens_per_second")


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[Tree]]:
    """Of each training what each process has written."""
    directory = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={RANKS}", str(TESTS / "algorithms" / "rank_trainings.py"), str(directory)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return [[checkpoint.load(directory / f"{n}_of_{rank}") for rank in range(RANKS)] for n in range(len(KINDS))]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_to_the_weights_of_one(kind: str, of_ranks: list[list[Tree]]) -> None:
    first, second = of_ranks[list(KINDS).index(kind)]
    before, weights, logged = trained(kind)
    assert largest_difference(first["before"], before) == largest_difference(first["weights"], second["weights"]) == 0.0
    assert largest_difference(first["weights"], weights) < 1e-6
    assert largest_difference(before, weights) > 1e-4
    lengths = logged[-1]["lengths"]
    assert len(set(lengths)) > 2  # uneven texts, and other sums of them in the two halves
    assert sum(first["logged"][-1]["lengths"]) != sum(second["logged"][-1]["lengths"])
    assert lengths == [*first["logged"][-1]["lengths"], *second["logged"][-1]["lengths"]]
    for ours, *theirs in zip(logged, first["logged"], second["logged"], strict=True):
        for name in ours.keys() - set(CLOCKS) - {"lengths"}:
            expected = ours[name]
            for row in theirs:
                assert row[name] == pytest.approx(expected, rel=2e-4, abs=1e-6, nan_ok=True), name
    if "early" in kind:
        assert logged[-1]["train/n_updates"] < 4 * 3
    assert not any(math.isnan(row["train/loss"]) for row in logged)
