"""The algorithms under comparison, each set up for the same task.

What all have in common: the built-in model, reward model and prompts; the token budget; β = 0.04 on the KL to the model
that they start from; γ = 1; Adam (eps 1e-5), a learning rate that falls linearly to 0, gradients clipped at norm 1; and
16 episodes to a gradient step. PPO takes 8 such steps on 64 episodes (2 epochs of 4 minibatches; SB3's and TRL's 4
epochs), the single-step algorithms one step on 16 fresh episodes. PPO's critic is a model of its own that starts as the
reward model, as TRL's does; that of ``ppo-value-head`` shares the policy's decoder. ``ppo-two-thirds`` is PPO with two
thirds of the others' tokens. DDPG and TD3, which have no likelihood and so neither a KL
penalty nor these gradients, keep SB3's settings, but for the network that reads the text, exploration noise, and γ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import stable_baselines3 as sb3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise

from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.algorithms.rloo import RLOO
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.policies.token_features import TokenFeatures
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import make_vec_env

KL_COEF = 0.04
BATCH_EPISODES, GROUP_SIZE = 16, 4
PPO_EPISODES = 64
MAX_PROMPT_TOKENS, MAX_NEW_TOKENS = 16, 48
ENV_KWARGS: dict[str, Any] = {
    "max_prompt_tokens": MAX_PROMPT_TOKENS,
    "max_new_tokens": MAX_NEW_TOKENS,
    "metrics": {"gold_score": "sentiment"},
}

Schedule = Callable[[float], float]


def ours(cls: Any, group_size: int = 1, **kwargs: Any) -> Callable[[float, int], BaseAlgorithm]:
    """One of our own algorithms with its defaults, which are the settings named above."""

    def build(learning_rate: float, seed: int) -> BaseAlgorithm:
        rows = PPO_EPISODES if cls is PPO else BATCH_EPISODES
        env = make_vec_env(n_envs=rows, env_kwargs={**ENV_KWARGS, "group_size": group_size})
        model: BaseAlgorithm = cls(
            "CausalLMPolicy", env, learning_rate=linear(learning_rate), kl_coef=KL_COEF, seed=seed, **kwargs
        )
        return model

    return build


def stock(cls: Any, rows: int, **kwargs: Any) -> Callable[[float, int], BaseAlgorithm]:
    """One of SB3's on-policy algorithms, unmodified, with our policy and our buffer, which pays the KL penalty."""

    def build(learning_rate: float, seed: int) -> BaseAlgorithm:
        model: BaseAlgorithm = cls(
            CausalLMPolicy,
            make_vec_env(n_envs=rows, env_kwargs=ENV_KWARGS),
            learning_rate=linear(learning_rate),
            n_steps=MAX_NEW_TOKENS,
            gamma=1.0,
            gae_lambda=0.95,
            vf_coef=0.1,
            ent_coef=0.0,
            max_grad_norm=1.0,
            rollout_buffer_class=EpisodeBuffer,
            rollout_buffer_kwargs={"reference": "builtin", "kl_coef": KL_COEF},
            seed=seed,
            **kwargs,
        )
        return model

    return build


def continuous(cls: Any) -> Callable[[float, int], BaseAlgorithm]:
    """DDPG or TD3 on points in embedding space; the frozen language model reads the context."""

    def build(learning_rate: float, seed: int) -> BaseAlgorithm:
        env = make_vec_env("TextRLHFContinuous-v0", n_envs=BATCH_EPISODES, env_kwargs=ENV_KWARGS)
        assert env.action_space.shape is not None
        (dimensions,) = env.action_space.shape
        # Typical distances: the points of tokens have length 1, so this noise has a length of a half.
        noise = NormalActionNoise(np.zeros(dimensions), np.full(dimensions, 0.5 / np.sqrt(dimensions)))
        model: BaseAlgorithm = cls(
            "MultiInputPolicy",
            env,
            learning_rate=linear(learning_rate),
            buffer_size=100_000,
            learning_starts=2_000,
            gamma=1.0,
            action_noise=noise,
            policy_kwargs={
                "features_extractor_class": TokenFeatures,
                "features_extractor_kwargs": {"model": "builtin"},
                "net_arch": [256, 256],
            },
            seed=seed,
        )
        return model

    return build


def linear(learning_rate: float) -> Schedule:
    """Falls to 0 with the remaining progress, which SB3 lets go below 0."""
    return lambda progress: learning_rate * max(0.0, progress)


LEARNERS: dict[str, Callable[[float, int], BaseAlgorithm]] = {
    "ppo": ours(PPO),
    "ppo-two-thirds": ours(PPO),
    "ppo-value-head": ours(PPO, policy_kwargs={"separate_critic": False}),
    "a2c": ours(A2C),
    "reinforce": ours(REINFORCE, baseline="mean"),
    "reinforce-no-baseline": ours(REINFORCE, baseline="none"),
    "reinforce-value": ours(REINFORCE, baseline="value"),
    "rloo": ours(RLOO, group_size=GROUP_SIZE),
    "grpo": ours(GRPO, group_size=GROUP_SIZE),
    "sb3-ppo": stock(
        sb3.PPO,
        PPO_EPISODES,
        batch_size=PPO_EPISODES * MAX_NEW_TOKENS // 4,  # in tokens: four minibatches
        n_epochs=4,
        clip_range=0.2,
        clip_range_vf=0.2,
    ),
    "sb3-a2c": stock(sb3.A2C, BATCH_EPISODES, use_rms_prop=False),
    "sb3-ddpg": continuous(sb3.DDPG),
    "sb3-td3": continuous(sb3.TD3),
}
"""Name → a function of learning rate and seed that sets the algorithm up."""

PEERS = {"trl-ppo": "ppo", "trl-rloo": "rloo", "trl-grpo": "grpo"}
"""Name → what ``benchmarks.peers.trl_train`` calls it."""

BUDGETS = {"ppo-two-thirds": 2 / 3}
"""Name → the share of the tokens that it gets, where that isn't all of them."""

# These have ten seeds, the questions being about them; the others five.
MAIN = ("ppo", "ppo-two-thirds", "a2c", "reinforce", "trl-ppo")
DEFAULT = (*LEARNERS, "trl-ppo", "trl-rloo")
