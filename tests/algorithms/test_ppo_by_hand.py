"""The teaching example computes what the package computes, and trains."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from learners import largest_difference, make_env, make_model, make_policy, weights_of

import examples.ppo_by_hand as by_hand
from agents.models.reference import Reference
from agents.objectives.advantages import whiten
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer


def policy_and_reference(env: Any, lr: float = 1e-2) -> tuple[CausalLMPolicy, CausalLMPolicy]:
    """Different from each other, so that there is a KL to pay; the values aren't zero."""
    return make_policy(env, lr=lr, model=make_model(ends=0.2)), make_policy(env, model=make_model(ends=0.2, sharp=0.1))


def test_texts_rewards_advantages_and_targets_are_those_of_the_package() -> None:
    env = make_env(8, autoreset_mode=AutoresetMode.DISABLED)
    policy, reference = policy_and_reference(env)
    env.reset(seed=0)
    torch.manual_seed(0)
    rollout = by_hand.collect(env, policy)
    advantages, targets, log_ratio = by_hand.judge(rollout, reference)

    spaces = env.single_observation_space, env.single_action_space
    frozen = Reference(reference.lm)
    buffer = EpisodeBuffer(0, *spaces, "cpu", n_envs=8, reference=frozen, kl_coef=by_hand.KL_COEF)
    env.reset(seed=0)
    torch.manual_seed(0)
    collect_episodes(policy, env, 8, buffer)
    buffer.finalize()
    buffer.estimate_gae(by_hand.GAMMA, by_hand.GAE_LAMBDA)

    mask = rollout.mask
    assert len(set(mask.sum(axis=1))) > 1  # texts of different lengths
    assert rollout.actions[mask].tolist() == buffer.actions.tolist()
    for ours, theirs in (
        (log_ratio, buffer.log_ratio),
        (targets, buffer.returns),
        (advantages, whiten(buffer.advantages)),
    ):
        assert np.abs(theirs).max() > 0.1
        assert ours[mask] == pytest.approx(theirs, abs=1e-5)
    packed = buffer.pack(np.arange(8)).observations
    assert rollout.packed["action_mask"].sum() == packed["action_mask"].sum()


def test_it_trains_the_policy_and_not_the_reference_and_prints_a_line_an_iteration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.random.seed(0)
    env = make_env(32, autoreset_mode=AutoresetMode.DISABLED)
    policy, reference = policy_and_reference(env)
    before, frozen = weights_of(policy), weights_of(reference)
    scores = by_hand.train(env, policy, reference, iterations=10)
    assert np.mean(scores[-3:]) > scores[0] + 0.1  # the share of even tokens
    assert largest_difference(before, weights_of(policy)) > 1e-3
    assert largest_difference(frozen, weights_of(reference)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    ratios = [re.search(r"score [+-]\d\.\d\d  KL .* nats .* first ratio 1 ± (\S+)$", line) for line in lines]
    assert [line for line, found in zip(lines, ratios, strict=True) if not found or float(found[1]) > 1e-3] == []


def test_it_runs_on_the_built_in_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(by_hand.main(iterations=1, num_envs=4)) == 1
    assert "score" in capsys.readouterr().out
