"""The scripts of the tutorials run, in miniature, and their rewards and tasks say what the tutorials say of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from examples import from_trl, own_task, stock_sb3, your_reward


def test_a_reward_of_ones_own_trains_and_the_policy_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert your_reward.reward(["a", "a"], ["the music", "x" * 500], word=["music", "story"]) == [1 - 9 / 500, -1.0]
    before, after = your_reward.main(total_timesteps=1, n_episodes=8, save=str(tmp_path / "policy"))
    assert -1.0 < before < 1.0
    assert -1.0 < after < 1.0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").config.model_type == "llama"
    shown = capsys.readouterr().out
    assert "total_timesteps" in shown  # one rollout and one update, as SB3 logs them
    assert f"mean score: {before:.2f} before, {after:.2f} after" in shown


def test_a_task_of_ones_own_poses_sums_and_judges_them(capsys: pytest.CaptureFixture[str]) -> None:
    shares = own_task.main(total_timesteps=1, n_episodes=8, n_problems=16)
    assert all(0 <= share <= 1 for share in shares)
    assert len(shares) == 2
    assert "right: " in capsys.readouterr().out
    prompts = [own_task.sums().prompts(part)[0] for part in ("train", "eval")]
    for row in prompts:
        assert sum(int(term) for term in row["prompt"].removesuffix("=").split("+")) == row["answer"]
    assert prompts[0] != prompts[1]


def test_stock_sb3_trains_and_evaluates(capsys: pytest.CaptureFixture[str]) -> None:
    before, after = stock_sb3.main(total_timesteps=1, n_envs=16, n_eval_episodes=4)
    assert -4 < before < 4
    assert -4 < after < 4
    assert "total_timesteps | 768" in capsys.readouterr().out  # a rollout of SB3's: 16 rows of 48 steps


def test_the_script_of_trl_runs_with_its_reward_and_rows_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    assert from_trl.mentions(["a"], ["music, music and music"], word=["music"]) == [2.0]
    before, after = from_trl.main(total_timesteps=1, n_episodes=8)
    assert 0 <= before <= 2
    assert 0 <= after <= 2
    assert "kl_loss" in capsys.readouterr().out
