"""Several processes, each with its share of the episodes, train to the weights of one process with all of them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from learners import largest_difference
from rank_trainings import KINDS, RANKS, trained

from agents.algorithms.accelerate_engine import AccelerateEngine, _filled, _sizes, _together
from agents.algorithms.engine import RankLost
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
        for name in ours.keys() - set(CLOCKS) - {"lengths", "micro_batch_tokens"}:
            expected = ours[name]
            for row in theirs:
                tolerance = 1e-5 if name == "train/ratio_first_max" else 1e-6  # which is nothing but rounding
                assert row[name] == pytest.approx(expected, rel=2e-4, abs=tolerance, nan_ok=True), name
    if kind == "ppo that runs out of memory":
        assert first["logged"][-1]["micro_batch_tokens"] == second["logged"][-1]["micro_batch_tokens"] < 48
    if "early" in kind:
        assert logged[-1]["train/n_updates"] < 4 * 3
    assert not any(math.isnan(row["train/loss"]) for row in logged)


def test_what_can_not_be_shared_is_refused() -> None:
    engine = AccelerateEngine.__new__(AccelerateEngine)  # which would wait for other processes
    engine._n = 4
    assert engine.share(24) == 6
    assert engine.share(24, of=3) == 6
    with pytest.raises(ValueError, match=r"divisible into 4 equal shares, one .* got 18: .* multiple of 4"):
        engine.share(18)
    with pytest.raises(ValueError, match=r"4 equal shares of whole groups of 4, .* got 24: take a multiple of 16"):
        engine.share(24, of=4)


def test_gradients_are_bundled_in_order_up_to_the_limit() -> None:
    """In 16 bits, too, which are added up in 32."""
    pieces = [torch.full((n,), float(n), dtype=torch.bfloat16) for n in (3, 4, 1, 8, 2)]
    bundles = list(_filled(iter(pieces), limit=8))
    assert [[len(piece) for piece in bundle] for bundle in bundles] == [[3, 4, 1], [8], [2]]
    assert _sizes(pieces) == {(torch.device("cpu"), torch.float32): 18}


def test_a_lost_process_is_named_in_words_that_help() -> None:
    said = r"Process 0 of 1 has lost another one: .* for 1800 s .* Here: Connection closed by peer$"
    with pytest.raises(RankLost, match=said), _together():
        raise RuntimeError("Connection closed by peer\nand more")
