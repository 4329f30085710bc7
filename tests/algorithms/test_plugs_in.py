"""Other people's algorithms, unmodified: each trains in the environment, and here is what each needs for it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import sb3_contrib
import stable_baselines3 as sb3
import torch
from gymnasium.wrappers import FlattenObservation
from learners import EOS, PROMPTS, largest_difference, make_model, weights_of
from sb3_contrib.ars.policies import ARSPolicy
from sb3_contrib.crossq.policies import CrossQPolicy
from stable_baselines3.common.env_util import make_vec_env as sb3_make_vec_env
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from tiny import tiny_tokenizer

from agents.policies.causal_lm_policy import CausalLMActorCritic, CausalLMPolicy
from agents.policies.maskable import MaskableCausalLMPolicy
from agents.policies.token_features import TokenFeatures
from agents.rollouts.sb3_vec_env import make_vec_env
from text_env.constraints import AllowedTokens

DISCRETE, CONTINUOUS = "TextRLHF-v0", "TextRLHFContinuous-v0"
V, H, MIN_NEW_TOKENS, MAX_NEW_TOKENS = 300, 16, 2, 6
ALLOWED = [EOS, *range(40, 140)]
TOKENIZER, MODEL = tiny_tokenizer(), make_model()  # one model: the frozen form is then one for all tests


class TokenARSPolicy(ARSPolicy):
    """ARS has no argument for the features extractor, but its policy has a method that makes one."""

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        return TokenFeatures(self.observation_space, features_dim=8)


class Plug(NamedTuple):
    """What an algorithm needs.

    :param algorithm: SB3's or sb3-contrib's class.
    :param policy: its first argument.
    :param env: its name.
    :param kwargs: small sizes, so that a test takes no time.
    :param masked: whether it reads ``action_masks()``, or the
        environment decodes its actions to allowed tokens.
    :param flat: it can't read a Dict of observations.
    """

    algorithm: type[Any]
    policy: Any
    env: str
    kwargs: dict[str, Any]
    masked: bool = False
    flat: bool = False


ON_POLICY = {"n_steps": 8}
OFF_POLICY = {"learning_starts": 16, "buffer_size": 200, "batch_size": 16, "train_freq": (4, "step")}
TRPO = {**ON_POLICY, "batch_size": 32, "n_critic_updates": 2, "cg_max_steps": 3}
PPO = {**ON_POLICY, "batch_size": 16, "n_epochs": 2}
MULTI = "MultiInputPolicy"

PLUGS = {
    "PPO": Plug(sb3.PPO, CausalLMPolicy, DISCRETE, PPO),
    "PPO, features": Plug(sb3.PPO, MULTI, DISCRETE, PPO),
    "PPO, continuous": Plug(sb3.PPO, MULTI, CONTINUOUS, PPO, masked=True),
    "A2C": Plug(sb3.A2C, CausalLMPolicy, DISCRETE, ON_POLICY),
    "A2C, features": Plug(sb3.A2C, MULTI, DISCRETE, ON_POLICY),
    "DQN": Plug(sb3.DQN, MULTI, DISCRETE, OFF_POLICY),
    "DDPG": Plug(sb3.DDPG, MULTI, CONTINUOUS, OFF_POLICY, masked=True),
    "TD3": Plug(sb3.TD3, MULTI, CONTINUOUS, OFF_POLICY, masked=True),
    "SAC": Plug(sb3.SAC, MULTI, CONTINUOUS, OFF_POLICY, masked=True),
    "TRPO": Plug(sb3_contrib.TRPO, CausalLMPolicy, DISCRETE, TRPO),
    "TRPO, features": Plug(sb3_contrib.TRPO, MULTI, DISCRETE, TRPO),
    "MaskablePPO": Plug(sb3_contrib.MaskablePPO, MaskableCausalLMPolicy, DISCRETE, PPO, masked=True),
    "MaskablePPO, features": Plug(sb3_contrib.MaskablePPO, MULTI, DISCRETE, PPO, masked=True),
    "RecurrentPPO": Plug(sb3_contrib.RecurrentPPO, "MultiInputLstmPolicy", DISCRETE, PPO),
    "QR-DQN": Plug(sb3_contrib.QRDQN, MULTI, DISCRETE, OFF_POLICY),
    "ARS": Plug(sb3_contrib.ARS, TokenARSPolicy, DISCRETE, {"n_delta": 4, "n_eval_episodes": 2}),
    "ARS, continuous": Plug(
        sb3_contrib.ARS, TokenARSPolicy, CONTINUOUS, {"n_delta": 4, "n_eval_episodes": 2}, masked=True
    ),
    "TQC": Plug(sb3_contrib.TQC, MULTI, CONTINUOUS, OFF_POLICY, masked=True),
    "CrossQ": Plug(sb3_contrib.CrossQ, "MlpPolicy", CONTINUOUS, OFF_POLICY, masked=True, flat=True),
}


class TextsSeen:
    """A reward (the share of tokens under 90) that remembers what was written."""

    def __init__(self) -> None:
        self.responses: list[list[int]] = []

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.responses += [list(ids) for ids in completion_ids]
        return [float(np.mean([token < 90 for token in ids])) for ids in completion_ids]


def make_plug(plug: Plug, seen: TextsSeen, frozen: bool = False) -> Any:
    """The algorithm in the environment."""
    env_kwargs: dict[str, Any] = {
        "tokenizer": TOKENIZER,
        "prompts": PROMPTS,
        "reward": seen,
        "max_new_tokens": MAX_NEW_TOKENS,
        "min_new_tokens": MIN_NEW_TOKENS,
        "constraint": AllowedTokens(ALLOWED),
    }
    if plug.env == CONTINUOUS:
        env_kwargs["embeddings"] = MODEL.get_input_embeddings().weight.detach().numpy()
    if plug.flat:  # a wrapper of single environments: SB3's own vectorization
        env = sb3_make_vec_env(plug.env, 4, seed=0, env_kwargs=env_kwargs, wrapper_class=FlattenObservation)
    else:
        env = make_vec_env(plug.env, n_envs=4, seed=0, env_kwargs=env_kwargs)  # type: ignore[assignment]
    policy_kwargs: dict[str, Any] = {}
    if isinstance(plug.policy, str):
        features_kwargs = {"features_dim": 32, "model": MODEL if frozen else None}
        policy_kwargs = {"features_extractor_class": TokenFeatures, "features_extractor_kwargs": features_kwargs}
    elif issubclass(plug.policy, CausalLMActorCritic):
        policy_kwargs = {"model": make_model(ends=0.1)}
    keywords = {"policy_kwargs": policy_kwargs} if policy_kwargs else {}
    return plug.algorithm(plug.policy, env, seed=0, device="cpu", **keywords, **plug.kwargs)


def check_texts(responses: list[list[int]], masked: bool) -> None:
    assert responses
    for ids in responses:
        assert 1 <= len(ids) <= MAX_NEW_TOKENS
        assert all(0 <= token < V for token in ids)
        assert EOS not in ids[MIN_NEW_TOKENS:-1]  # it ends a text
        if masked:
            assert set(ids) <= set(ALLOWED)
            assert EOS not in ids[:MIN_NEW_TOKENS]


def train_plug(name: str, frozen: bool) -> None:
    plug, seen = PLUGS[name], TextsSeen()
    model = make_plug(plug, seen, frozen)
    before = weights_of(model.policy)
    model.learn(96)
    after = weights_of(model.policy)
    assert largest_difference(before, after) > 0
    assert all(bool(torch.isfinite(weight).all()) for weight in after.values())
    assert math.isfinite(np.mean([episode["r"] for episode in model.ep_info_buffer]))
    check_texts(seen.responses, plug.masked)
    if not plug.masked:  # the check above would have failed: a constraint is for those who read it
        assert not set().union(*seen.responses) <= set(ALLOWED)
    observation = model.env.reset()
    masks = {"action_masks": np.stack(model.env.env_method("action_masks"))} if "Maskable" in name else {}
    actions, _ = model.predict(observation, deterministic=True, **masks)
    assert all(model.action_space.contains(action) for action in actions)


@pytest.mark.parametrize("name", PLUGS)
def test_it_trains_unmodified(name: str) -> None:
    train_plug(name, frozen=False)


@pytest.mark.parametrize("name", [name for name, plug in PLUGS.items() if isinstance(plug.policy, str)])
def test_it_trains_on_the_hidden_states_of_a_frozen_language_model(name: str) -> None:
    train_plug(name, frozen=True)


def test_every_weight_of_the_features_is_trained_by_those_that_learn_a_value() -> None:
    for name in ("DQN", "TD3", "PPO, features", "QR-DQN"):
        model = make_plug(PLUGS[name], TextsSeen())
        before = weights_of(model.policy)
        model.learn(96)
        after = weights_of(model.policy)
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        extractors = {key for key in before if "features_extractor" in key}
        assert any("embedding" in key for key in extractors & moved), name
        assert {key for key in extractors if "target" not in key} <= moved, name


# ---- what doesn't work as it is, and why ---------------------------------------------------------------------------


def test_recurrent_ppo_wants_a_recurrent_policy_which_a_language_model_is_not() -> None:
    plug = PLUGS["RecurrentPPO"]._replace(policy=CausalLMPolicy)
    with pytest.raises(TypeError, match=r"CausalLMPolicy has no LSTM.*MultiInputLstmPolicy"):
        make_plug(plug, TextsSeen())


def test_maskable_ppo_wants_a_policy_that_takes_masks() -> None:
    plug = PLUGS["MaskablePPO"]._replace(policy=CausalLMPolicy)
    with pytest.raises(ValueError, match=r"Policy must subclass MaskableActorCriticPolicy"):
        make_plug(plug, TextsSeen()).learn(32)


def test_ars_has_no_argument_for_features_and_its_own_policies_refuse_a_dict() -> None:
    for name, message in {
        "MlpPolicy": "You must use `MultiInputPolicy`",
        MULTI: "Policy MultiInputPolicy unknown",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_plug(PLUGS["ARS"]._replace(policy=name), TextsSeen())
    env = make_plug(PLUGS["ARS"], TextsSeen()).get_env()
    with pytest.raises(TypeError, match="unexpected keyword argument 'features_extractor_class'"):
        sb3_contrib.ARS(ARSPolicy, env, policy_kwargs={"features_extractor_class": TokenFeatures})
    with pytest.raises(AttributeError, match="'dict' object has no attribute 'flatten'"):
        sb3_contrib.ARS(ARSPolicy, env, n_delta=2, device="cpu").learn(16)


def test_crossq_refuses_a_dict_and_would_concatenate_it_as_if_it_were_one_tensor() -> None:
    plug = PLUGS["CrossQ"]
    for name, message in {
        "MlpPolicy": "You must use `MultiInputPolicy`",
        MULTI: "Policy MultiInputPolicy unknown",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_plug(plug._replace(policy=name, flat=False), TextsSeen())
    env = make_plug(PLUGS["SAC"], TextsSeen()).get_env()
    policy_kwargs = {"features_extractor_class": TokenFeatures}
    model = sb3_contrib.CrossQ(CrossQPolicy, env, policy_kwargs=policy_kwargs, device="cpu", **OFF_POLICY)
    with pytest.raises(TypeError, match="expected Tensor as element 0 in argument 0, but got dict"):
        model.learn(32)


def test_flattened_observations_are_the_same_numbers() -> None:
    kwargs = {"tokenizer": TOKENIZER, "prompts": PROMPTS, "reward": TextsSeen()}
    flat, plain = FlattenObservation(gym.make(DISCRETE, **kwargs)), gym.make(DISCRETE, **kwargs)
    (vector, _), (entries, _) = flat.reset(seed=0), plain.reset(seed=0)
    parts = [entries[name] for name in ("attention_mask", "input_ids", "prompt_length")]
    np.testing.assert_array_equal(vector, np.concatenate(parts))
