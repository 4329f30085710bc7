"""Invariant 8, as a whole: from sampled tokens to advantages, worked out by hand. The parts:
tests/objectives/test_advantages.py and tests/objectives/test_losses.py.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from learners import EOS, length_of, make_env, make_model

from agents.algorithms.ppo import PPO
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer

# One row writes two texts: 5 6 EOS, whose score is 3, and 7 EOS, whose score is 2.
TOKENS = [5, 6, EOS, 7, EOS]
VALUES = [1.0, 2.0, 0.5, -1.0, 1.0]
LOG_PROBS = [-1.0, -3.0, -2.0, -0.5, -2.5]
LOG_REF = -2.0


class Script:
    """A policy that reads its answers off a list."""

    def __init__(self) -> None:
        self.steps = iter(zip(TOKENS, VALUES, LOG_PROBS, strict=True))

    def __call__(self, observation: Any, deterministic: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        token, value, log_prob = next(self.steps)
        return torch.tensor([token]), torch.tensor([[value]]), torch.tensor([log_prob])


class FlatReference:
    def log_probs(self, observations: Any, actions: torch.Tensor) -> torch.Tensor:
        return torch.full((len(actions),), LOG_REF)


def estimate(gae_lambda: float, gamma: float = 1.0, kl_coef: Any = 0.2) -> EpisodeBuffer:
    env = make_env(1, reward=length_of)
    model = PPO(
        "CausalLMPolicy",
        env,
        gamma=gamma,
        gae_lambda=gae_lambda,
        gae_lambda_value=None,
        policy_kwargs={"model": make_model()},
        device="cpu",
    )
    spaces = env.single_observation_space, env.single_action_space
    buffer = EpisodeBuffer(0, *spaces, "cpu", reference=FlatReference(), kl_coef=kl_coef)  # type: ignore[arg-type]
    collect_episodes(Script(), env, 2, buffer)  # type: ignore[arg-type]
    buffer.finalize()
    model.estimate(buffer)
    return buffer


def test_rewards_advantages_and_returns_are_those_worked_out_by_hand() -> None:
    # β = 0.2: r_t = −0.2 (log π_old + 2), plus the score on the last token.
    #   first text:   −0.2 · 1 = −0.2;   −0.2 · −1 = 0.2;    −0.2 · 0 + 3 = 3
    #   second text:  −0.2 · 1.5 = −0.3; −0.2 · −0.5 + 2 = 2.1
    # γ = 1, λ = 0.5:
    #   first text:   δ = (−0.2 + 2 − 1, 0.2 + 0.5 − 2, 3 − 0.5) = (0.8, −1.3, 2.5)
    #                 A_2 = 2.5;  A_1 = −1.3 + 1.25 = −0.05;  A_0 = 0.8 − 0.025 = 0.775
    #   second text:  δ = (−0.3 + 1 + 1, 2.1 − 1) = (1.7, 1.1);  A_1 = 1.1;  A_0 = 1.7 + 0.55 = 2.25
    buffer = estimate(gae_lambda=0.5)
    np.testing.assert_allclose(buffer.log_ratio, [1, -1, 0, 1.5, -0.5], atol=1e-6)
    np.testing.assert_allclose(buffer.rewards, [-0.2, 0.2, 3.0, -0.3, 2.1], atol=1e-6)
    np.testing.assert_allclose(buffer.advantages, [0.775, -0.05, 2.5, 2.25, 1.1], atol=1e-6)
    np.testing.assert_allclose(buffer.returns, [1.775, 1.95, 3.0, 1.25, 2.1], atol=1e-6)


def test_with_lambda_one_returns_are_sums_of_rewards_to_the_end() -> None:
    # 3, 3 + 0.2, 3 + 0.2 − 0.2;  2.1, 2.1 − 0.3
    np.testing.assert_allclose(estimate(gae_lambda=1.0).returns, [3.0, 3.2, 3.0, 1.8, 2.1], atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gae_lambda": 0.95},
        {"gae_lambda": 0.5, "gamma": 0.9},
        {"gae_lambda": 0.5, "kl_coef": SimpleNamespace(coef=-0.2)},  # as a number it would be refused
    ],
)
def test_another_lambda_discount_or_sign_of_the_kl_misses_by_a_lot(wrong: dict[str, Any]) -> None:
    difference = estimate(**wrong).advantages - np.array([0.775, -0.05, 2.5, 2.25, 1.1])
    assert np.abs(difference).max() > 0.1


def test_the_advantages_of_one_text_do_not_depend_on_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values do not leak over the border between two texts of the same row."""
    expected = estimate(gae_lambda=0.5).advantages[:3]
    monkeypatch.setattr(sys.modules[__name__], "VALUES", [*VALUES[:3], 50.0, VALUES[4]])
    buffer = estimate(gae_lambda=0.5)
    assert abs(buffer.advantages[3]) > 40
    np.testing.assert_array_equal(buffer.advantages[:3], expected)
