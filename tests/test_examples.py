"""The scripts of the tutorials run, in miniature, and their rewards and tasks say what the tutorials say of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from examples import from_trl, optuna_study, own_task, stock_sb3, your_reward


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning:sqlalchemy", "ignore::DeprecationWarning:alembic")
def test_an_optuna_study_is_kept_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("optuna")
    storage, sizes = f"sqlite:///{tmp_path / 'study.db'}", {"total_timesteps": 128, "n_episodes": 4, "n_texts": 4}
    first = optuna_study.main(n_trials=1, storage=storage, **sizes)
    study = optuna_study.main(n_trials=1, storage=storage, **sizes)
    assert [trial.number for trial in study.trials] == [0, 1]
    assert study.trials[0].params == first.trials[0].params
    for trial in study.trials:
        assert 3e-5 <= trial.params["learning_rate"] <= 3e-3
        assert 0.01 <= trial.params["kl_coef"] <= 0.3
        assert trial.value == trial.intermediate_values[max(trial.intermediate_values)]
        assert -1 <= trial.value <= 1
    assert f"best: {study.best_params}" in capsys.readouterr().out


def test_optuna_ends_a_trial_that_falls_behind() -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=1.1))
    study.optimize(lambda trial: optuna_study.train(trial, 800, 4, 4), n_trials=1)
    [trial] = study.trials
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert 100 <= max(trial.intermediate_values) < 800  # after an eighth of the training


def test_optuna_compares_trials_whose_texts_are_of_other_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    optuna = pytest.importorskip("optuna")
    golds = iter([0.5] + [0.9] * 7 + [0.5] * 8)  # the second trial falls behind after its first measurement
    told: list[float] = []

    def texts(policy: Any, env: Any, prompts: Any) -> list[dict[str, float]]:
        told.append(next(golds))
        return [{"gold_score": told[-1]}]

    monkeypatch.setattr(optuna_study, "sample_texts", texts)
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    for rate in (3e-5, 3e-3):  # after the first update they write other texts
        study.enqueue_trial({"learning_rate": rate, "kl_coef": 0.04})
    study.optimize(lambda trial: optuna_study.train(trial, 1600, 4, 4), n_trials=2)
    states = [trial.state for trial in study.trials]
    assert states == [optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]
    assert told.count(0.5) == 3  # once in the first trial, twice in the second
