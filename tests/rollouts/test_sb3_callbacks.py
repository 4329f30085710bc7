"""SB3's own callbacks: each does with our algorithms what it does with SB3's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from learners import largest_difference, make_env, make_ppo, weights_of
from stable_baselines3.common import callbacks
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    CheckpointCallback,
    ConvertCallback,
    EvalCallback,
    EveryNTimesteps,
    LogEveryNTimesteps,
    ProgressBarCallback,
    StopTrainingOnMaxEpisodes,
    StopTrainingOnNoModelImprovement,
    StopTrainingOnRewardThreshold,
)
from stable_baselines3.common.logger import KVWriter, Logger
from test_sb3 import make_stock

from agents.rollouts.sb3_vec_env import TextVecEnv

TOKENS = 100
Case = Callable[[Any, Path], tuple[BaseCallback, Callable[[], bool]]]


class Seen(BaseCallback):
    """Keeps what SB3's own loop has in its local variables."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Any]] = []

    def _on_step(self) -> bool:
        self.steps.append({name: self.locals[name] for name in ("dones", "rewards", "infos", "actions", "new_obs")})
        return True


def evaluation(model: Any, path: Path) -> Any:
    callback = EvalCallback(model.get_env(), eval_freq=5, n_eval_episodes=3, log_path=str(path), verbose=0)
    return callback, lambda: len(np.load(path / "evaluations.npz")["results"]) > 2 and model.num_timesteps >= TOKENS


def reward_threshold(model: Any, path: Path) -> Any:
    stop = StopTrainingOnRewardThreshold(reward_threshold=-1.0)
    callback = EvalCallback(model.get_env(), callback_on_new_best=stop, eval_freq=5, n_eval_episodes=3, verbose=0)
    return callback, lambda: 0 < model.num_timesteps < TOKENS


def no_improvement(model: Any, path: Path) -> Any:
    stop = StopTrainingOnNoModelImprovement(max_no_improvement_evals=1, min_evals=1)
    callback = EvalCallback(model.get_env(), callback_after_eval=stop, eval_freq=4, n_eval_episodes=2, verbose=0)
    callback.best_mean_reward = np.inf
    return callback, lambda: callback.n_calls < 20 and model.num_timesteps < TOKENS


def checkpoints(model: Any, path: Path) -> Any:
    callback = CheckpointCallback(save_freq=6, save_path=str(path))
    return callback, lambda: len(list(path.glob("rl_model_*_steps*"))) > 2


def max_episodes(model: Any, path: Path) -> Any:
    callback = StopTrainingOnMaxEpisodes(max_episodes=2)
    return callback, lambda: callback.n_episodes >= 2 * 4 and model.num_timesteps < TOKENS


def every(model: Any, path: Path) -> Any:
    seen = Seen()
    return EveryNTimesteps(n_steps=20, callback=seen), lambda: 3 <= len(seen.steps) <= 6


class Dumps(KVWriter):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        assert key_values["time/total_timesteps"] == step
        self.steps.append(step)

    def close(self) -> None:
        pass


def log_every(model: Any, path: Path) -> Any:
    dumps = Dumps()
    model.set_logger(Logger(None, [dumps]))
    return LogEveryNTimesteps(n_steps=10), lambda: len(dumps.steps) >= 8 and dumps.steps[0] < 16


def progress_bar(model: Any, path: Path) -> Any:
    callback = ProgressBarCallback()
    return callback, lambda: callback.pbar.total == TOKENS and callback.pbar.n >= TOKENS


def function(model: Any, path: Path) -> Any:
    calls: list[int] = []

    def stop(local: dict[str, Any], _: dict[str, Any]) -> bool:
        calls.append(int(local["dones"].sum()))
        assert local["self"] is model
        return sum(calls) < 3

    return ConvertCallback(stop), lambda: sum(calls) >= 3 and model.num_timesteps < TOKENS


def several(model: Any, path: Path) -> Any:
    one, other = Seen(), StopTrainingOnMaxEpisodes(max_episodes=2)
    return CallbackList([one, other]), lambda: len(one.steps) > 2 and other.n_episodes >= 8


CASES: dict[type[BaseCallback], Case] = {
    EvalCallback: evaluation,
    StopTrainingOnRewardThreshold: reward_threshold,
    StopTrainingOnNoModelImprovement: no_improvement,
    CheckpointCallback: checkpoints,
    StopTrainingOnMaxEpisodes: max_episodes,
    EveryNTimesteps: every,
    LogEveryNTimesteps: log_every,
    ProgressBarCallback: progress_bar,
    ConvertCallback: function,
    CallbackList: several,
}


def test_no_callback_of_sb3s_is_left_out() -> None:
    found = {c for _, c in inspect.getmembers(callbacks, inspect.isclass) if issubclass(c, BaseCallback)}
    assert found - {BaseCallback, callbacks.EventCallback} == set(CASES)


@pytest.mark.filterwarnings("ignore::tqdm.TqdmExperimentalWarning")
@pytest.mark.parametrize("ours", [True, False], ids=["our PPO", "stock PPO"])
@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_a_callback_does_what_it_does_with_sb3s_algorithms(
    kind: type[BaseCallback], ours: bool, tmp_path: Path
) -> None:
    model = make_ppo(make_env(4)) if ours else make_stock()
    callback, happened = CASES[kind](model, tmp_path)
    assert isinstance(callback, kind | EvalCallback)
    model.learn(TOKENS, callback=callback)
    assert happened()


def test_evaluating_in_the_very_environment_of_the_training_changes_nothing_of_it() -> None:
    runs = []
    for own in (False, True):
        # Without the memo, whose last digits depend on what else was asked.
        model = make_ppo(make_env(4), policy_kwargs={"prefix_cache": False})
        callback = EvalCallback(model.get_env(), eval_freq=3, n_eval_episodes=5, verbose=0) if own else None
        model.learn(150, callback=callback)
        runs.append(model)
    assert largest_difference(weights_of(runs[0].policy), weights_of(runs[1].policy)) == 0.0
    np.testing.assert_array_equal(runs[0].buffer.tokens, runs[1].buffer.tokens)


def test_a_seeded_game_in_between_is_forgotten_as_well() -> None:
    env = TextVecEnv(make_env(3))
    env.seed(0)
    first = env.reset()
    with env.left_as_it_was():
        env.seed(7)
        env.reset()
        env.step(np.array([5, 6, 7]))
    again = env.vector_env.episodes.observe()
    assert all((first[name] == again[name]).all() for name in first)
    undisturbed = TextVecEnv(make_env(3))
    undisturbed.seed(0)
    undisturbed.reset()
    assert (env.reset()["input_ids"] == undisturbed.reset()["input_ids"]).all()


def test_callbacks_are_told_of_steps_what_sb3s_own_loop_tells_them() -> None:
    env = make_env(8)
    seen = Seen()
    model = make_ppo(env)
    model.learn(1, callback=seen)
    assert sum(int(step["dones"].sum()) for step in seen.steps) == 8
    over = [info for step in seen.steps for info in step["infos"] if info]
    returns = model.buffer.episode_sums(model.buffer.rewards)
    assert sorted(info["episode"]["l"] for info in over) == sorted(model.buffer.lengths.tolist())
    assert len(returns) == len(over)
    for step in seen.steps:
        assert step["dones"].shape == step["rewards"].shape == step["actions"].shape == (8,)
        assert [bool(info) for info in step["infos"]] == step["dones"].tolist()
        for info, reward in zip(step["infos"], step["rewards"], strict=True):
            if info:
                assert info["episode"]["r"] == pytest.approx(info["score"])
                assert reward == pytest.approx(info["score"])
                length = int(info["terminal_observation"]["attention_mask"].sum())
                assert length == info["episode"]["l"] + int(info["terminal_observation"]["prompt_length"][0])
