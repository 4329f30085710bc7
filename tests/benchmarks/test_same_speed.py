"""The script that compares the speed of two commits."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import benchmarks.same_speed
import benchmarks.throughput
from benchmarks.same_speed import main, ratios


def test_a_commit_is_compared_figure_by_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A miniature of the whole, in this process: that trees run on their own packages is tested with the weights."""
    trees = []

    def run_here(tree: Path, arguments: Sequence[str]) -> None:
        trees.append(tree)
        monkeypatch.setattr(sys, "argv", [*arguments[1:], "--threads", "1"])
        benchmarks.throughput.main()

    monkeypatch.setattr(benchmarks.same_speed, "run_in", run_here)
    out = tmp_path / "speed.json"
    options = ["--rounds", "2", "--models", "builtin", "--repeats", "1", "--only", "rollout_vs_generate_builtin"]
    status = main(["HEAD", *options, "--json", str(out)])
    assert [tree == benchmarks.same_speed.ROOT for tree in trees] == [False, True, True, False]  # in turns
    figure = json.loads(out.read_text())["figures"]["rollout_vs_generate_builtin"]
    assert len(figure["rounds"]) == 2
    assert figure["low"] <= figure["median"] <= figure["high"]
    assert status == (1 if figure["median"] < 0.97 else 0)
    assert "rollout_vs_generate_builtin" in capsys.readouterr().out


def test_more_tokens_a_second_are_faster_and_so_are_fewer_seconds_and_smaller_is_fewer_bytes() -> None:
    ours = {
        "rollout": {"ours": 300.0, "unit": "tokens/s"},
        "growth": {"ours": 2.0, "unit": "s/episode"},
        "memory": {"ours": 40.0, "unit": "B/token"},
        "only here": {"ours": 1.0, "unit": "tokens/s"},
    }
    theirs = {
        "rollout": {"ours": 200.0, "unit": "tokens/s"},
        "growth": {"ours": 3.0, "unit": "s/episode"},
        "memory": {"ours": 32.0, "unit": "B/token"},
    }
    assert ratios(ours, theirs) == {"rollout": 1.5, "growth": 1.5, "memory": 0.8}
