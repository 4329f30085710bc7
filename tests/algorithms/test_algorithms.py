"""A2C, REINFORCE, RLOO, GRPO and DAPO: what each is, and what they have in common with one another."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import (
    even_tokens,
    largest_difference,
    length_of,
    make_env,
    make_model,
    make_ppo,
    prompt_of,
    randomize_value_head,
    weights_of,
)
from stable_baselines3.common.logger import Logger
from tiny import tiny_tokenizer

from agents.algorithms.a2c import A2C
from agents.algorithms.dapo import DAPO
from agents.algorithms.environments import default_rows
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.objectives.advantages import group_relative, leave_one_out
from agents.runs.algorithms import ALGORITHMS
from benchmarks.logged import Rows
from text_env.finished_texts import RESERVED_NAMES

N_EPISODES = 8


def make(cls: type[OnPolicyAlgorithm], group_size: int = 2, reward: Any = even_tokens, **kwargs: Any) -> Any:
    """An algorithm over the same tiny model and environment every time; its value head is not zero."""
    env = make_env(n=N_EPISODES, group_size=group_size, reward=reward)
    defaults = {"learning_rate": 1e-4, "n_episodes": N_EPISODES, "kl_coef": 0.1, "seed": 0, "device": "cpu"}
    options: dict[str, Any] = {**defaults, **kwargs}
    policy_kwargs = {"model": make_model(ends=0.2), **options.pop("policy_kwargs", {})}
    model = cls("CausalLMPolicy", env, policy_kwargs=policy_kwargs, **options)
    randomize_value_head(model.policy)
    return model


def rollout(model: OnPolicyAlgorithm, iterations: int = 1) -> OnPolicyAlgorithm:
    """Collect once (or learn first), so that the buffer is full and the weights are those that sampled it."""
    _, callback = model._setup_learn(10**6, None, True)
    for number in range(iterations):
        if number:
            model.train()
        assert model.collect_rollouts(callback)
    return model


def gradient(model: OnPolicyAlgorithm, minibatch: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    """Of the loss over the whole rollout."""
    model._backward(np.arange(N_EPISODES) if minibatch is None else minibatch)
    return {name: p.grad.clone() for name, p in model.policy.named_parameters() if p.grad is not None}


def actor(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: g for name, g in gradients.items() if not name.startswith("value_head")}


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.sqrt(sum((g.double() ** 2).sum() for g in gradients.values())))


# ---- estimators, by hand ------------------------------------------------------------------------------------------


def test_leave_one_out_is_worked_out_by_hand() -> None:
    # Group (1, 2, 6): others' means 4, 3.5, 1.5. Group (0, 0, 3): 1.5, 1.5, 0.
    expected = [-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]
    np.testing.assert_allclose(leave_one_out(np.array([1.0, 2.0, 6.0, 0.0, 0.0, 3.0]), 3), expected)


def test_leave_one_out_of_two_is_the_difference_of_the_pair() -> None:
    np.testing.assert_allclose(leave_one_out(np.array([1.0, 4.0, 2.0, -2.0]), 2), [-3.0, 3.0, 4.0, -4.0])


def test_leave_one_out_is_the_centred_return_times_k_over_k_minus_1() -> None:
    returns = np.random.default_rng(0).normal(size=12)
    centred = group_relative(returns, 4, scale=False)
    np.testing.assert_allclose(leave_one_out(returns, 4), centred * 4 / 3)


def test_group_relative_is_worked_out_by_hand() -> None:
    # Mean 3 and sample variance ((−2)² + (−1)² + 3²)/2 = 7; a group of equals gives zeros, not NaN.
    scaled = group_relative(np.array([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3, scale=True)
    np.testing.assert_allclose(scaled, [*np.array([-2.0, -1.0, 3.0]) / (np.sqrt(7) + 1e-4), 0, 0, 0], atol=1e-12)
    centred = group_relative(np.array([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3, scale=False)
    np.testing.assert_allclose(centred, [-2, -1, 3, 0, 0, 0])


def test_reinforce_advantages_are_returns_to_go_minus_the_baseline() -> None:
    model = rollout(make(REINFORCE, baseline="none"))
    buffer = model.buffer
    for episode in range(N_EPISODES):
        own = slice(buffer.starts[episode], buffer.starts[episode + 1])
        to_go = np.cumsum(buffer.rewards[own][::-1])[::-1]
        np.testing.assert_allclose(buffer.advantages[own], to_go, atol=1e-5)
    valued = rollout(make(REINFORCE, baseline="value"))
    assert np.abs(valued.buffer.values).max() > 1e-3
    np.testing.assert_allclose(valued.buffer.advantages, buffer.advantages - valued.buffer.values, atol=1e-5)
    np.testing.assert_allclose(valued.buffer.returns, buffer.advantages, atol=1e-5)


def test_the_running_mean_is_of_past_episodes_only() -> None:
    model = make(REINFORCE, reward=length_of, kl_coef=0.0, baseline_decay=0.75, learning_rate=0.0)
    means = []
    _, callback = model._setup_learn(10**6, None, True)
    for _ in range(3):
        before = model.mean_return
        assert model.collect_rollouts(callback)
        mean = float(model.buffer.lengths.mean())  # the return of an episode is its length here
        expected = mean if before is None else before
        episode = np.repeat(model.buffer.lengths, model.buffer.lengths)
        np.testing.assert_allclose(model.buffer.advantages, episode - expected, atol=1e-5)
        assert model.mean_return == pytest.approx(0.75 * expected + 0.25 * mean)
        means.append(mean)
    assert len(set(means)) == 3, "lengths must differ for this to say anything"


def test_rloo_and_grpo_compare_a_text_with_the_others_of_its_prompt() -> None:
    rloo, grpo = rollout(make(RLOO, group_size=4)), rollout(make(GRPO, group_size=4))
    for model in (rloo, grpo):
        prompts = [prompt_of(model.buffer, episode) for episode in range(N_EPISODES)]
        assert prompts[:4] == [prompts[0]] * 4
        assert prompts[4:] == [prompts[4]] * 4
    returns = rloo.buffer.episode_sums(rloo.buffer.rewards)
    per_episode = rloo.buffer.advantages[rloo.buffer.starts[:-1]]
    np.testing.assert_allclose(per_episode, leave_one_out(returns, 4), atol=1e-6)
    assert np.abs(per_episode).max() > 0.01
    np.testing.assert_array_equal(rloo.buffer.advantages, np.repeat(per_episode, rloo.buffer.lengths))
    scores = grpo.buffer.episode_sums(grpo.buffer.rewards)
    np.testing.assert_allclose(
        grpo.buffer.advantages[grpo.buffer.starts[:-1]], group_relative(scores, 4, scale=True), rtol=1e-5
    )


def test_the_kl_penalty_is_in_the_reward_or_in_the_loss_but_not_in_both() -> None:
    for cls, in_reward in ((RLOO, True), (GRPO, False)):
        model = rollout(make(cls, learning_rate=3e-2), iterations=2)
        buffer = model.buffer
        assert np.abs(buffer.log_ratio).max() > 0.01
        before_the_score = np.ones(buffer.n_tokens, dtype=bool)
        before_the_score[buffer.starts[1:] - 1] = False
        expected = -0.1 * buffer.log_ratio if in_reward else np.zeros_like(buffer.rewards)
        np.testing.assert_allclose(buffer.rewards[before_the_score], expected[before_the_score], atol=1e-6)
        samples = buffer.pack(np.arange(N_EPISODES))
        _, log_prob, entropy = model.policy.evaluate_actions(samples.observations, samples.actions)
        loss, logged = model.loss(samples, torch.zeros(1), log_prob, entropy)
        assert ("kl_loss" in logged) is not in_reward
        if not in_reward:  # k3 from samples of π: π_ref/π − 1 − log(π_ref/π)
            ratio = torch.exp(torch.from_numpy(-buffer.log_ratio))
            expected_kl = ratio - 1 - ratio.log()
            torch.testing.assert_close(logged["kl_loss"], expected_kl, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(loss - logged["policy_gradient_loss"], 0.1 * logged["kl_loss"])


# ---- identities ---------------------------------------------------------------------------------------------------


def test_ppo_with_one_epoch_and_one_minibatch_has_the_gradient_of_a2c() -> None:
    same = {"gae_lambda": 0.9, "gae_lambda_value": None, "vf_coef": 0.3, "ent_coef": 0.02}
    head = {"separate_critic": False}  # as A2C's is
    ppo = rollout(make(PPO, batch_size=None, n_epochs=1, normalize_advantage=False, policy_kwargs=head, **same))
    a2c = rollout(make(A2C, **same))
    assert norm(gradient(a2c)) > 1e-3
    assert largest_difference(gradient(ppo), gradient(a2c)) < 1e-6
    other = rollout(make(A2C, **{**same, "gae_lambda": 0.5}))
    assert largest_difference(gradient(ppo), gradient(other)) > 1e-4


def test_ppo_with_one_epoch_and_one_minibatch_takes_the_steps_of_a2c() -> None:
    same = {"gae_lambda": 0.95, "gae_lambda_value": 1.0, "policy_kwargs": {"separate_critic": True}}
    ppo = make(PPO, batch_size=None, n_epochs=1, normalize_advantage=False, **same).learn(60)
    a2c = make(A2C, **same).learn(60)
    assert a2c._n_updates == ppo._n_updates >= 2
    assert largest_difference(weights_of(ppo.policy), weights_of(a2c.policy)) < 1e-5


def test_a2c_without_bootstrapping_is_reinforce_with_a_value_baseline() -> None:
    a2c, reinforce = rollout(make(A2C, gae_lambda=1.0)), rollout(make(REINFORCE, baseline="value"))
    assert norm(gradient(a2c)) > 1e-3
    assert largest_difference(gradient(a2c), gradient(reinforce)) < 1e-6


def test_rloo_with_a_group_of_everything_is_reinforce_around_the_mean_but_for_a_factor() -> None:
    same = {"group_size": N_EPISODES, "kl_coef": 0.0}
    rloo, reinforce = gradient(rollout(make(RLOO, **same))), gradient(rollout(make(REINFORCE, **same)))
    assert norm(rloo) > 1e-3
    for name, expected in reinforce.items():
        torch.testing.assert_close(rloo[name] * (N_EPISODES - 1) / N_EPISODES, expected, atol=1e-6, rtol=1e-4)


def test_grpo_without_std_is_reinforce_around_the_mean_of_the_group() -> None:
    same = {"group_size": N_EPISODES, "kl_coef": 0.0, "loss_weighting": "token"}  # texts weighted by their lengths
    grpo = gradient(rollout(make(GRPO, scale_rewards=False, **same)))
    reinforce = gradient(rollout(make(REINFORCE, **same)))
    assert norm(grpo) > 1e-3
    assert largest_difference(grpo, reinforce) < 1e-6


def test_rloo_with_groups_of_two_pushes_each_pair_apart() -> None:
    model = rollout(make(RLOO, group_size=2))
    advantages = model.buffer.advantages[model.buffer.starts[:-1]].reshape(-1, 2)
    np.testing.assert_allclose(advantages[:, 0], -advantages[:, 1], atol=1e-6)


def test_in_grpo_every_text_counts_the_same_whatever_its_length() -> None:
    model = rollout(make(GRPO, kl_coef=0.0))
    lengths = model.buffer.lengths
    assert len(set(lengths)) > 2
    whole = gradient(model)
    # The mean over texts of the gradient of each text's mean.
    single = [gradient(model, np.array([episode])) for episode in range(N_EPISODES)]
    for name, expected in whole.items():
        mean = torch.stack([g[name] for g in single]).mean(dim=0)
        torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-4)
    # The others weight a text by its length.
    weighted = gradient(rollout(make(RLOO, kl_coef=0.0)))
    assert norm(weighted) > 1e-4


@pytest.mark.parametrize("cls", [A2C, REINFORCE, RLOO, GRPO, DAPO, PPO])
def test_the_gradient_does_not_depend_on_micro_batches(cls: type[OnPolicyAlgorithm]) -> None:
    whole, split = rollout(make(cls)), rollout(make(cls, micro_batch_tokens=20))
    assert norm(gradient(whole)) > 1e-4
    assert largest_difference(gradient(whole), gradient(split)) < 1e-6


# ---- the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_no_algorithm_inherits_from_another(name: str) -> None:
    assert not set(ALGORITHMS[name].__mro__[1:]) & set(ALGORITHMS.values())


@pytest.mark.parametrize("cls", [REINFORCE, RLOO, GRPO, DAPO])
def test_without_a_critic_the_value_head_stays_as_it_is(cls: type[OnPolicyAlgorithm]) -> None:
    model = make(cls)
    before = weights_of(model.policy)
    model.learn(50)
    after = weights_of(model.policy)
    assert torch.equal(before["value_head.weight"], after["value_head.weight"])
    assert largest_difference(before, after) > 0
    assert "train/explained_variance" not in model.logger.name_to_value


@pytest.mark.parametrize("cls", [RLOO, GRPO, DAPO])
def test_a_name_makes_an_environment_of_groups(cls: type[OnPolicyAlgorithm]) -> None:
    model: Any = cls("CausalLMPolicy", "TextRLHF-v0", device="cpu")
    assert model.vector_env.group_size == 4
    assert (model.n_episodes, model.batch_size) == (16, None)  # a minibatch is the rollout


@pytest.mark.parametrize("cls", [RLOO, GRPO, DAPO])
def test_groups_that_do_not_fit_are_refused(cls: type[OnPolicyAlgorithm]) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__} compares the texts of one prompt.*group_size=4"):
        make(cls, group_size=1)
    with pytest.raises(ValueError, match="multiples of its group_size=3, got n_episodes=8 and 8 rows"):
        make(cls, group_size=3)


def test_a_baseline_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected baseline to be 'none', 'mean' or 'value', got 'median'"):
        make(REINFORCE, baseline="median")


@pytest.mark.parametrize("cls", [A2C, REINFORCE, RLOO, GRPO])
def test_a_resumed_run_is_the_run_that_was_never_stopped(cls: type[OnPolicyAlgorithm], tmp_path: Path) -> None:
    policy_kwargs = {"model": make_model(ends=0.2)}

    def again() -> Any:
        return make_env(n=N_EPISODES, group_size=2, tokenizer=tiny_tokenizer())

    whole = make(cls).learn(160)
    half = make(cls).learn(80)
    half.save(tmp_path / "half")
    resumed = cls.load(tmp_path / "half", again(), device="cpu", policy_kwargs=policy_kwargs)
    resumed.learn(whole.num_timesteps - half.num_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == whole.num_timesteps > half.num_timesteps
    if cls is REINFORCE:
        assert resumed.mean_return == whole.mean_return is not None
    assert largest_difference(weights_of(whole.policy), weights_of(resumed.policy)) == 0


# ---- an algorithm of one's own ------------------------------------------------------------------------------------


def test_the_example_of_an_algorithm_of_ones_own_trains_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "train --algo examples.dr_grpo:DrGRPO --total-timesteps 70 --n-episodes 8 --no-progress"
    options = ["--max-new-tokens", "4", "--run-dir", str(tmp_path / "run")]
    # As `python -m agents.cli` would at the root of the repository, but without another process's imports.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    monkeypatch.delitem(sys.modules, "agents.cli", raising=False)
    monkeypatch.setattr(sys, "argv", ["agents.cli", *command.split(), *options])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("agents.cli", run_name="__main__")
    lines = (tmp_path / "run/progress.csv").read_text().splitlines()
    assert len(lines) > 2
    assert "train/policy_gradient_loss" in lines[0]
    assert (tmp_path / "run/policy/model.safetensors").exists()


def test_the_example_is_grpo_without_std_and_length_normalisation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from examples.dr_grpo import DrGRPO

    example = gradient(rollout(make(DrGRPO, kl_coef=0.0)))
    grpo = gradient(rollout(make(GRPO, kl_coef=0.0, scale_rewards=False, loss_weighting="constant")))
    assert norm(grpo) > 1e-4
    assert largest_difference(example, grpo) < 1e-7


def test_ppo_still_has_its_own_defaults() -> None:
    model = make_ppo(n_episodes=8)
    assert (model.normalize_advantage, model.n_epochs, model.batch_size) == (True, 2, 4)


def test_groups_stay_whole_after_an_interrupted_rollout() -> None:
    model = make(RLOO, group_size=4)
    model.vector_env.reset()
    # Someone refills three rows from outside, which leaves a group of four with one place.
    model.vector_env.reset(options={"reset_mask": np.arange(N_EPISODES) < 3})
    rollout(model)
    prompts = [prompt_of(model.buffer, episode) for episode in range(N_EPISODES)]
    assert prompts[:4] == [prompts[0]] * 4
    assert prompts[4:] == [prompts[4]] * 4


def test_grpo_logs_the_loss_that_it_minimises() -> None:
    model = rollout(make(GRPO, kl_coef=0.0))
    means = model._backward(np.arange(N_EPISODES))
    per_text = [model._backward(np.array([episode]))["loss"] for episode in range(N_EPISODES)]
    assert len(set(model.buffer.lengths)) > 2
    assert means["loss"] == pytest.approx(np.mean(per_text), abs=1e-6)


def test_no_metric_can_have_the_name_of_what_an_algorithm_logs_of_its_objective() -> None:
    memory = Rows()
    for model in (*map(make, ALGORITHMS.values()), make(PPO, kl_estimator="exact")):
        model.set_logger(Logger(folder=None, output_formats=[memory]))
        model.learn(1)
    logged = {name.removeprefix("objective/") for row in memory.rows for name in row if name.startswith("objective/")}
    assert logged == RESERVED_NAMES["the training logs itself"]


def test_rows_made_for_an_algorithm_hold_whole_groups() -> None:
    assert [default_rows(*sizes) for sizes in ((96, 6), (16, 4), (64, 1), (200, 1), (3, 4))] == [60, 16, 64, 64, 4]
