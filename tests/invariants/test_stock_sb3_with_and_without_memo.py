"""Invariant 4: unmodified SB3 ends with the same weights with the memo and without it."""

from __future__ import annotations

from typing import Any

import pytest
import stable_baselines3 as sb3
import torch
from learners import in_float64, largest_difference, make_env, make_model, randomize_value_head, weights_of

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import TextVecEnv


def weights_after(
    algorithm: type[Any], kind: str, prefix_cache: bool, seed: int = 0, **kwargs: Any
) -> dict[str, torch.Tensor]:
    model = algorithm(
        CausalLMPolicy,
        TextVecEnv(make_env(4)),
        n_steps=12,
        learning_rate=1e-3,
        seed=seed,
        device="cpu",
        # In float32 a single token that rounding flips would send the two runs apart.
        policy_kwargs={"model": in_float64(make_model(kind, ends=0.2)), "prefix_cache": prefix_cache},
        **kwargs,
    )
    randomize_value_head(model.policy)
    before = weights_of(model.policy)
    model.learn(3 * 4 * 12)
    after = weights_of(model.policy)
    assert next(iter(after.values())).dtype == torch.float64
    assert largest_difference(before, after) > 1e-3
    return after


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("algorithm", "kwargs"),
    [
        (sb3.PPO, {"batch_size": 16, "n_epochs": 2}),
        (sb3.PPO, {"batch_size": 16, "n_epochs": 2, "rollout_buffer_class": EpisodeBuffer}),
        (sb3.A2C, {}),
    ],
    ids=["PPO", "PPO with EpisodeBuffer", "A2C"],
)
def test_stock_sb3_ends_with_the_same_weights_with_the_memo_and_without(
    kind: str, algorithm: type[Any], kwargs: dict[str, Any]
) -> None:
    memoised = weights_after(algorithm, kind, prefix_cache=True, **kwargs)
    plain = weights_after(algorithm, kind, prefix_cache=False, **kwargs)
    assert largest_difference(memoised, plain) < 1e-8


def test_another_seed_ends_with_other_weights() -> None:
    """The control: this comparison could fail."""
    one, other = (weights_after(sb3.PPO, "gpt2", True, seed=seed, batch_size=16, n_epochs=2) for seed in (0, 1))
    assert largest_difference(one, other) > 1e-4
