"""The benchmark of a real model, in miniature: the built-in model stands in for SmolLM2."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from agents.runs.algorithms import resolved
from agents.runs.config import load_config
from benchmarks.smollm2 import Config, main, train_config
from examples.film_reviews import held_out_prompts, training_prompts
from text_env.builtin import LANGUAGE_MODEL


def test_a_run_leaves_what_the_readme_quotes_and_says_whether_it_did_what_it_should(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Config(LANGUAGE_MODEL, tmp_path / "run", tmp_path / "out", total_timesteps=100, episodes=8)
    status = main(config)
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    quoted = {"policy", "reference", "kl", "win_rate", "perplexity", "distinct_2", "seconds", "peak_rss_gb"}
    assert quoted <= set(result)
    assert result["episodes"] == 8
    assert result["policy"]["perplexity"] == result["perplexity"] > 1
    assert 0 < result["seconds"] < 600
    assert 0.1 < result["peak_rss_gb"] < 16
    assert len(result["texts"]) == 6
    expected = dataclasses.replace(resolved(train_config(config)), critic="head")  # what PPO takes beside an adapter
    assert load_config(tmp_path / "out" / "config.yaml") == expected
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("yes ", "NO "))]
    assert len(lines) == 5
    assert status == int(any(line.startswith("NO ") for line in lines))
    gain = result["policy"]["gold_score"] - result["reference"]["gold_score"]
    assert lines[0].startswith("yes" if gain >= 0.3 else "NO")


def test_nothing_that_is_held_out_is_trained_on() -> None:
    training, held_out = training_prompts(), held_out_prompts()
    assert (len(set(training)), len(set(held_out))) == (96, 48)
    assert not set(training) & set(held_out)
