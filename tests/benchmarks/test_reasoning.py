"""The benchmark of a real model at reasoning-gym, in miniature: the built-in model stands in for SmolLM2."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from agents.runs.algorithms import resolved
from agents.runs.config import load_config
from benchmarks.reasoning import Config, before_and_after, main, train_config
from text_env.builtin import LANGUAGE_MODEL

pytest.importorskip("reasoning_gym")


def test_a_run_leaves_the_accuracy_before_and_after_and_says_whether_it_rose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(
        LANGUAGE_MODEL,
        tmp_path / "run",
        tmp_path / "out",
        total_timesteps=100,
        max_new_tokens=8,
        n_episodes=8,
        batch_size=8,
        episodes=14,
    )
    status = main(config)
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    kept = {"kl", "seconds", "minutes", "command", "settings", "machine", "versions", "date", "commit"}
    assert kept <= set(result)
    for side in ("before", "after"):
        low, high = result[side]["interval"]
        assert -1e-9 <= low - 1e-9 < result[side]["accuracy"] <= high <= 1
        assert {"greedy_accuracy", "well_formed", "mean_length"} <= set(result[side])
    assert result["items"] == 14
    assert 1 < result["problems"] <= 14
    assert len(result["texts"]) == 12
    assert all({"prompt", "before", "after"} == set(text) for text in result["texts"])
    expected = dataclasses.replace(resolved(train_config(config)), critic="head")  # what PPO takes beside an adapter
    assert load_config(tmp_path / "out" / "config.yaml") == expected
    assert (tmp_path / "out" / "learning_curve.png").stat().st_size > 1000
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("yes ", "NO "))]
    assert len(lines) == 2
    assert status == int(any(line.startswith("NO ") for line in lines))


def evaluated(prompts: list[str], before: list[int], after: list[int]) -> dict[str, Any]:
    """An evaluation, as far as it is looked at."""
    texts = [
        {"prompt": prompt, "reference": {"correct": float(b)}, "policy": {"correct": float(a)}}
        for prompt, b, a in zip(prompts, before, after, strict=True)
    ]
    means, greedy = {"well_formed": 1.0, "mean_length": 5.0}, {"greedy_accuracy": 0.5}
    intervals = {"reference": {"greedy_accuracy": [0.0, 1.0]}, "policy": {"greedy_accuracy": [0.0, 1.0]}}
    answers = {"reference": greedy, "policy": greedy, "intervals": intervals}
    return {"texts": texts, "reference": means, "policy": means, "answers": answers}


def test_a_problem_that_is_posed_again_makes_nothing_more_certain() -> None:
    before, after = [0, 1, 0, 0, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0, 1, 0]
    once = before_and_after(evaluated(list("abcdefgh"), before, after), 0)
    again = before_and_after(evaluated(list("abcdefgh") * 4, before * 4, after * 4), 0)
    unlike = before_and_after(evaluated([str(n) for n in range(32)], before * 4, after * 4), 0)
    assert (once["before"]["accuracy"], once["after"]["accuracy"]) == (0.25, 0.625)
    assert once["difference"]["accuracy"] == 0.375
    assert (again["items"], again["problems"]) == (32, 8)
    for part in ("before", "after", "difference"):
        assert again[part]["interval"] == pytest.approx(once[part]["interval"], abs=0.02)
        (low, high), (narrow_low, narrow_high) = again[part]["interval"], unlike[part]["interval"]
        assert low < narrow_low < narrow_high < high
