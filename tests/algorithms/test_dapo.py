"""DAPO: dynamic sampling keeps whole groups of texts with different scores, and ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from learners import constant, even_tokens, largest_difference, make_env, make_model, make_ppo, prompt_of, weights_of

from agents.algorithms.dapo import DAPO
from agents.algorithms.grpo import GRPO
from agents.objectives.advantages import informative_groups

N_EPISODES = 8
K = 2  # texts of a prompt


def mostly_flat(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """1 for a text whose first token is a multiple of four, which is so for a quarter of them."""
    return [float(ids[0] % 4 == 0) for ids in completion_ids]


def make(reward: Any = mostly_flat, **kwargs: Any) -> Any:
    env = make_env(4, reward=reward, group_size=K)
    return make_ppo(env, algorithm=DAPO, n_episodes=N_EPISODES, batch_size=None, n_epochs=1, **kwargs)


def rollout(model: Any) -> tuple[Any, list[list[float]]]:
    """Collect once; the algorithm, and the scores of the texts that were sampled in each round."""
    rounds: list[list[float]] = []
    sample = model.sample

    def counted(collect: Any) -> Any:
        def collect_and_note(n: int, buffer: Any) -> Any:
            episodes = collect(n, buffer)
            assert len(episodes) == n
            rounds.append([episode["score"] for episode in episodes])
            return episodes

        return sample(collect_and_note)

    model.sample = counted
    _, callback = model._setup_learn(10**6, None)
    assert model.collect_rollouts(callback)
    return model, rounds


def test_informative_groups_are_those_whose_scores_differ() -> None:
    scores = np.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, -0.5, -0.25])
    assert informative_groups(scores, 2).tolist() == [False, False, True, True, False, False, True, True]
    assert informative_groups(scores, 4).tolist() == [True] * 8


def test_dynamic_sampling_keeps_whole_groups_whose_scores_differ() -> None:
    model, rounds = rollout(make(max_sampling_rounds=100))
    buffer = model.buffer
    assert len(rounds) > 1
    assert len(rounds[0]) == buffer.n_episodes == N_EPISODES
    assert all(len(scores) % K == 0 and len(scores) < N_EPISODES for scores in rounds[1:])  # what is missing, no more
    assert informative_groups(buffer.scores, K).all()
    for first in range(0, N_EPISODES, K):
        assert prompt_of(buffer, first) == prompt_of(buffer, first + 1)
    # Scores are with the texts that they are of, and advantages with them.
    starts = buffer.actions[buffer.starts[:-1]]
    np.testing.assert_array_equal(buffer.scores, starts % 4 == 0)
    advantages = buffer.advantages[buffer.starts[:-1]]
    np.testing.assert_array_equal(np.sign(advantages), np.where(buffer.scores == 1, 1, -1))


def test_all_texts_are_counted_and_logged_also_those_that_are_left_out() -> None:
    model, rounds = rollout(make(max_sampling_rounds=100))
    logged = model.logger.name_to_value
    assert model.num_timesteps > model.buffer.n_tokens
    sampled = np.concatenate(rounds)
    assert logged["rollout/sampled_episodes"] == len(sampled) > N_EPISODES
    assert logged["rollout/sampling_rounds"] == len(rounds)
    assert logged["objective/scores"] == 0.5  # one of each pair is right
    assert logged["objective/sampled_scores"] == pytest.approx(sampled.mean())
    assert sampled.mean() != 0.5


@pytest.mark.parametrize("rounds", [1, 3])
def test_dynamic_sampling_stops_at_the_last_round_with_a_whole_rollout(rounds: int) -> None:
    model, asked = rollout(make(reward=constant, max_sampling_rounds=rounds))
    assert [len(scores) for scores in asked] == [N_EPISODES] * rounds
    assert model.buffer.n_episodes == N_EPISODES
    assert (model.buffer.advantages == 0).all()
    model.train()


def test_where_every_group_is_informative_dapo_is_grpo_with_its_settings() -> None:
    settings = {"clip_range_high": 0.28, "kl_coef": 0.0, "loss_weighting": "token"}
    same = {"n_episodes": N_EPISODES, "n_epochs": 3, "learning_rate": 1e-2}

    def all_different(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(ids) / 1000 for ids in completion_ids]

    env = {"group_size": 4, "min_new_tokens": 4, "reward": all_different}
    dapo: Any = make_ppo(make_env(4, **env), algorithm=DAPO, **same).learn(60)
    grpo: Any = make_ppo(make_env(4, **env), algorithm=GRPO, **settings, **same).learn(60)
    assert dapo.num_timesteps == grpo.num_timesteps
    assert largest_difference(weights_of(dapo.policy), weights_of(grpo.policy)) == 0
    assert (dapo.clip_range, dapo.clip_range_high, dapo.kl_coef, dapo.loss_weighting) == (0.2, 0.28, 0.0, "token")


def test_dapo_learns_to_write_even_tokens() -> None:
    env = make_env(32, reward=even_tokens, group_size=4, max_new_tokens=6, min_new_tokens=6)
    lm = make_model(num_hidden_layers=1)
    model: Any = make_ppo(env, lm, DAPO, n_episodes=32, batch_size=16, n_epochs=4, learning_rate=3e-3)
    before: list[float] = []
    _, callback = model._setup_learn(1, None)
    assert model.collect_rollouts(callback)
    before.append(float(model.buffer.scores.mean()))
    model.learn(6_000)
    assert 0.3 < before[0] < 0.7
    assert np.mean([info["r"] for info in model.ep_info_buffer]) > 0.85


def test_a_resumed_run_of_dapo_is_the_run_that_was_never_stopped(tmp_path: Any) -> None:
    env_kwargs = {"reward": mostly_flat, "group_size": K}
    whole = make().learn(160)
    half = make().learn(80)
    half.save(tmp_path / "half")
    policy_kwargs = {"model": make_model(ends=0.2)}
    resumed = DAPO.load(tmp_path / "half", make_env(4, **env_kwargs), device="cpu", policy_kwargs=policy_kwargs)
    assert resumed.max_sampling_rounds == 10
    resumed.learn(whole.num_timesteps - half.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps > half.num_timesteps
    assert largest_difference(weights_of(whole.policy), weights_of(resumed.policy)) == 0


def test_no_rounds_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="max_sampling_rounds >= 1, got 0"):
        make(max_sampling_rounds=0)


def test_a_group_in_which_only_the_penalty_differs_is_kept() -> None:
    penalised, rounds = rollout(make(constant, max_sampling_rounds=5, missing_eos_penalty=1.0))
    paid = penalised.buffer.episode_sums(penalised.buffer.rewards).reshape(-1, K)
    assert penalised.buffer.truncated.any()
    assert not penalised.buffer.truncated.all()
    assert (paid.min(axis=1) < paid.max(axis=1)).any()
    _, all_rounds = rollout(make(constant, max_sampling_rounds=5))
    assert [len(scores) for scores in all_rounds] == [N_EPISODES] * 5  # the control: without it nothing is kept
    assert sum(map(len, rounds)) < N_EPISODES * 5
