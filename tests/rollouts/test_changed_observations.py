"""Wrappers that change the observations: what they make of token contexts is refused, not read as text."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3 as sb3
import torch
from gymnasium import spaces
from learners import EOS, make_env, make_model, make_policy, observation_of
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecFrameStack, VecNormalize
from test_sb3 import make_stock, options

import text_env  # noqa: F401  registers TextRLHF-v0
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.policies.maskable import MaskableCausalLMPolicy
from agents.policies.token_features import TokenFeatures
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import TextVecEnv

STACKED = r"'?prompt_length'? of shape \(2,\) where input_ids has \(48,\)"
REASON = "A wrapper that stacks, normalises, rescales or casts observations does that: leave it out"


def features(env: Any) -> Any:
    kwargs = {"features_extractor_class": TokenFeatures}
    return sb3.PPO("MultiInputPolicy", env, policy_kwargs=kwargs, n_steps=8, batch_size=8)


def masked(env: Any) -> Any:
    kwargs = {"model": make_model()}
    return sb3_contrib.MaskablePPO(MaskableCausalLMPolicy, env, policy_kwargs=kwargs, n_steps=8, batch_size=8)


LEARNERS = {
    "CausalLMPolicy": lambda env: make_stock(env=env, batch_size=8),
    "MaskableCausalLMPolicy": masked,
    "TokenFeatures": features,
}


@pytest.mark.parametrize("reader", LEARNERS)
def test_stacked_frames_are_refused(reader: str) -> None:
    env = VecFrameStack(TextVecEnv(make_env(2)), 2)
    with pytest.raises(ValueError, match=rf"^{reader} reads token contexts: .*{STACKED}.*{REASON}"):
        LEARNERS[reader](env)


@pytest.mark.parametrize("reader", LEARNERS)
def test_frames_stacked_by_gymnasium_are_refused(reader: str) -> None:
    stacked = gym.wrappers.FrameStackObservation(gym.make("TextRLHF-v0", **options()), 2)
    with pytest.raises(ValueError, match=rf"^{reader} reads token contexts: .*input_ids of shape \(2, 24\).*{REASON}"):
        LEARNERS[reader](DummyVecEnv([lambda: stacked]))


def test_the_buffer_refuses_what_the_policies_refuse() -> None:
    env = VecFrameStack(TextVecEnv(make_env(2)), 2)
    with pytest.raises(ValueError, match=rf"^EpisodeBuffer reads token contexts: .*{STACKED}"):
        EpisodeBuffer(0, env.observation_space, env.action_space)


@pytest.mark.parametrize("reader", LEARNERS)
def test_normalised_observations_are_refused_though_their_space_says_nothing(reader: str) -> None:
    env = VecNormalize(TextVecEnv(make_env(2)), norm_obs=True)
    assert env.observation_space == TextVecEnv(make_env(2)).observation_space
    model = LEARNERS[reader](env)
    with pytest.raises(ValueError, match=r"Expected input_ids to be whole numbers, got .*VecNormalize: norm_obs=False"):
        model.learn(8)


def test_normalised_rewards_are_fine() -> None:
    assert make_stock(env=VecNormalize(TextVecEnv(make_env(4)), norm_obs=False)).learn(32).num_timesteps == 32


def changed(**boxes: spaces.Box) -> spaces.Dict:
    return spaces.Dict({**make_env(1).single_observation_space.spaces, **boxes})  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (changed(input_ids=spaces.Box(0, 299, (24,), np.float32)), "input_ids of dtype float32"),
        (changed(input_ids=spaces.Box(-1, 299, (24,), np.int64)), "input_ids from -1 to 299 beside 300 actions"),
        (changed(input_ids=spaces.Box(0, 400, (24,), np.int64)), "input_ids from 0 to 400 beside 300 actions"),
        (changed(attention_mask=spaces.Box(0, 1, (23,), np.int8)), r"attention_mask of shape \(23,\)"),
        (changed(attention_mask=spaces.Box(0, 255, (24,), np.uint8)), "attention_mask from 0 to 255"),
        (changed(attention_mask=spaces.Box(0, 1, (24,), np.float32)), "attention_mask of dtype float32"),
        (changed(prompt_length=spaces.Box(0, 16, (1,), np.int64)), "prompt_length from 0 to 16"),
        (changed(prompt_length=spaces.Box(1, 24, (1,), np.int64)), "prompt_length from 1 to 24 where L is 24"),
        (changed(prompt_length=spaces.Discrete(16)), r"'prompt_length' is Discrete\(16\)"),  # type: ignore[arg-type]
    ],
    ids=str,
)
def test_entries_that_do_not_belong_together_are_refused(space: spaces.Dict, said: str) -> None:
    actions = make_env(1).single_action_space
    with pytest.raises(ValueError, match=f"got .*{said}"):
        CausalLMPolicy(space, actions, lambda _: 0.1, model=make_model())
    with pytest.raises(ValueError, match=f"got .*{said.removesuffix(' beside 300 actions')}"):
        EpisodeBuffer(0, space, actions)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("attention_mask", [[0, 1, 1, 1]], "padding stands before a token. Put the padding after"),
        ("attention_mask", [[2, 2, 2, 2]], "Expected attention_mask to be 0 or 1, got values from 2 to 2"),
        ("prompt_length", [[9]], "row 0 has 3 tokens and a prompt of 9"),
        ("input_ids", [[5, -100, 7, 1]], "Expected input_ids to be token ids, 0 or more, got -100"),
        ("input_ids", [5, 6, 7, 1], r"got the shapes \(\(4,\)"),
    ],
)
def test_an_observation_that_is_no_context_is_refused(name: str, value: Any, said: str) -> None:
    policy = make_policy(make_env(1))
    observation = {**observation_of([[5, 6, 7]], [2], width=4), name: torch.tensor(value)}
    with pytest.raises(ValueError, match=said):
        policy.forward(observation)


def test_whole_numbers_may_be_floating_point() -> None:
    policy = make_policy(make_env(1))
    observation = observation_of([[5, 6, 7]], [2])
    as_floats = {name: x.float() for name, x in observation.items()}
    assert policy.forward(observation, True)[0].equal(policy.forward(as_floats, True)[0])
    assert int(policy.forward(as_floats, True)[0]) != EOS


class Rescaled(VecEnvWrapper):
    """Divides token ids by ten and leaves the space as it was."""

    def reset(self) -> Any:
        return self._rescaled(self.venv.reset())

    def step_wait(self) -> Any:
        observation, *rest = self.venv.step_wait()
        return self._rescaled(observation), *rest

    def _rescaled(self, observation: Any) -> Any:
        return {**observation, "input_ids": observation["input_ids"] / 10}


def test_a_wrapper_of_ones_own_is_refused_like_sb3s() -> None:
    with pytest.raises(ValueError, match="Expected input_ids to be whole numbers"):
        make_stock(env=Rescaled(TextVecEnv(make_env(2)))).learn(8)
