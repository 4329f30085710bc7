"""The measurement of bfloat16, in miniature: the built-in model stands in for SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.precision import HEADS, main, summary


def test_the_three_ways_are_measured_on_the_same_texts(tmp_path: Path) -> None:
    out = tmp_path / "precision.json"
    sizes = {"episodes": 4, "response": 4, "rollouts": 1, "repeats": 1, "threads": 1}
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    assert main(["--model", "builtin", "--prompts", "builtin:eval", *options, "--json", str(out)]) == 0
    figures = json.loads(out.read_text())["figures"]
    assert set(figures) == {*HEADS, "once more"}
    for head in HEADS:
        assert 0.5 < figures[head]["lowest"] < 1 < figures[head]["highest"] < 2
        assert figures[head]["rollout_time"] > 0
    assert figures["float32, kept"]["lowest"] == figures["float32"]["lowest"] != figures["bfloat16"]["lowest"]
    assert figures["bfloat16"]["update_time"] == 1
    assert figures["once more"]["update_time"] > 1


def test_the_summary_says_how_far_from_one_ratios_are() -> None:
    said = summary(np.array([1.0, 1.0, 1.3, 0.7, 1.1]))
    assert said["lowest"] == 0.7
    assert said["highest"] == 1.3
    assert said["mean_distance"] == pytest.approx(0.14)
    assert said["outside_clip_range"] == pytest.approx(0.4)
