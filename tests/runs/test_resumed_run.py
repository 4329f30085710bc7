"""A run of the command line that is stopped can be taken up again from its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from learners import PROMPTS, largest_difference, save_model, weights_of

from agents.algorithms.ppo import PPO
from agents.runs.checkpoints import Checkpoints
from agents.runs.config import EnvConfig, TrainConfig, load_config
from agents.runs.train import train
from agents.state.history import CheckpointHistory
from agents.state.schedules import LearningRate


class Killed(Exception):
    """Stands for a kill."""


def configured(root: Path, name: str, **kwargs: Any) -> TrainConfig:
    model = str(root / "model") if (root / "model").exists() else save_model(root / "model")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    env = EnvConfig(prompts=str(root / "prompts.txt"), reward="learners:even_tokens", gold=None, max_new_tokens=6)
    sizes: dict[str, Any] = {"n_episodes": 8, "batch_size": 4, "n_epochs": 1, "total_timesteps": 250, "n_samples": 2}
    return TrainConfig(
        model=model, env=env, run_dir=root / name, device="cpu", progress=False, learning_rate=3e-3, **sizes, **kwargs
    )


@pytest.mark.parametrize(("schedule", "warmup"), [("linear", 0.0), ("cosine", 0.4), ("constant", 0.4)])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: Any, warmup: float
) -> None:
    """The checkpoint says how the learning rate goes on: it isn't given again."""
    options: dict[str, Any] = {"lr_schedule": schedule, "lr_warmup": warmup, "checkpoint_every": 1}
    whole = train(configured(tmp_path, "whole", **options))

    class CheckpointThenStop(Checkpoints):
        def _on_rollout_start(self) -> None:
            super()._on_rollout_start()
            if len(self._table) == 2:
                raise Killed

    monkeypatch.setattr("agents.runs.train.Checkpoints", CheckpointThenStop)
    config = configured(tmp_path, "stopped", **options)
    with pytest.raises(Killed):
        train(config)
    env = config.env.make(8, config.model, gamma=1.0)
    history = CheckpointHistory(tmp_path / "stopped" / "checkpoints")
    resumed = PPO.load(history.path(history.timesteps()[-1]), env=env, device="cpu")
    assert 0 < resumed.num_timesteps < whole.num_timesteps
    assert resumed.learning_rate == LearningRate(3e-3, schedule, warmup)
    resumed.learn(config.total_timesteps - resumed.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps
    assert largest_difference(weights_of(whole.policy), weights_of(resumed.policy)) == 0.0


def test_the_options_of_the_learning_rate_are_in_the_runs_config(tmp_path: Path) -> None:
    config = configured(tmp_path, "run", lr_schedule="cosine", lr_warmup=0.25)
    model = train(config)
    assert model.learning_rate == LearningRate(3e-3, "cosine", 0.25)
    written = load_config(tmp_path / "run" / "config.yaml")
    assert (written.lr_schedule, written.lr_warmup) == ("cosine", 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr_schedule": "exponential"}, "Expected the decay to be one of constant, linear, cosine, got 'exponential'"),
        ({"lr_warmup": 10}, "Expected a warm-up of 0 <= warmup < 1"),
    ],
)
def test_a_schedule_that_does_not_exist_is_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(configured(tmp_path, "run", **options))
    assert not (tmp_path / "run").exists()
