"""The benchmark of a run's memory, with seconds in the place of minutes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from learners import PROMPTS, save_model

from benchmarks.soak import resident_bytes, soak


def small_run(directory: Path, tokens: int) -> list[str]:
    (directory / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ["--model", save_model(directory / "model"), "--prompts", str(directory / "prompts.txt")]
    options += ["--reward", "length(budget=3)", "--gold", "None", "--max-new-tokens", "6", "--n-episodes", "8"]
    return [*options, "--total-timesteps", str(tokens), "--n-samples", "2", "--device", "cpu", "--no-progress"]


def test_a_soak_compares_the_memory_of_its_end_with_that_of_its_start(tmp_path: Path) -> None:
    figures = soak(tmp_path, minutes=0.5, start_minute=0.35, options=small_run(tmp_path, 10**9))
    assert figures["first_mib"] > 100  # PyTorch alone has more
    assert figures["growth"] == pytest.approx(figures["last_mib"] / figures["first_mib"] - 1, abs=1e-4)
    assert figures["iterations"] > 0
    assert figures["tokens"] == figures["checkpoint_kept"]  # SIGTERM made the last one


@pytest.mark.parametrize("minutes", [2.0, 3.0, 3.1])
def test_a_soak_that_is_over_before_there_is_something_to_compare_with_is_refused_before_it_starts(
    tmp_path: Path, minutes: float
) -> None:
    with pytest.raises(ValueError, match=rf"first 3 minutes.* got {minutes:g} minutes\. Ask for 4 or more"):
        soak(tmp_path, minutes)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_by_itself_is_no_soak(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ended after \d+ s by itself, with status 0"):
        soak(tmp_path, minutes=5, options=small_run(tmp_path, 8))


def test_the_resident_memory_of_a_process_grows_by_what_it_fills() -> None:
    with mmap.mmap(-1, 50 * 2**20) as fresh:  # memory that the process cannot have had before
        before = resident_bytes(os.getpid())
        fresh.write(b"x" * len(fresh))
        assert resident_bytes(os.getpid()) - before > 40 * 2**20
