"""Tianshou drives the environment: `make clients`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from token_net import LEARNED, N_TOKENS, PROBE, TokenNet, drawing, mean_score, tensors
from torch import nn

pytest.importorskip("tianshou")

from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams

from text_env.env import TextEnv


class WithoutStrings(gym.Wrapper[Any, Any, Any, Any]):
    """Only numbers in the infos. Tianshou keeps infos of all steps in arrays, in which strings that few steps have
    are missing for the others; before an update it takes what is missing for a fault of the environment."""

    def reset(self, **kwargs: Any) -> Any:
        return self.env.reset(**kwargs)[0], {}

    def step(self, action: Any) -> Any:
        *outcome, info = self.env.step(action)
        return *outcome, {name: value for name, value in info.items() if not isinstance(value, str)}


class Actor(nn.Module):
    """What Tianshou calls with its batches, and expects a recurrent state from."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TokenNet(N_TOKENS)

    def forward(self, obs: Any, state: Any = None, info: Any = None) -> tuple[torch.Tensor, Any]:
        return self.net(**tensors(obs)), state


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = TokenNet(1)

    def forward(self, obs: Any, **kwargs: Any) -> torch.Tensor:
        return self.net(**tensors(obs))


def collector(n: int = 8) -> tuple[PPO, Collector, TokenNet]:
    """Tianshou vectorises single environments. It has no adapter for Gymnasium's vector environments."""
    torch.manual_seed(0)
    envs = DummyVectorEnv([lambda: WithoutStrings(TextEnv(**PROBE.kwargs)) for _ in range(n)])
    actor = Actor()
    policy = DiscreteActorPolicy(
        actor=actor, action_space=envs.action_space[0], observation_space=envs.observation_space[0]
    )
    algorithm = PPO(policy=policy, critic=Critic(), optim=AdamOptimizerFactory(lr=3e-3), gamma=1.0)
    collector = Collector(algorithm, envs, VectorReplayBuffer(2048, n))
    collector.reset()
    return algorithm, collector, actor.net


def test_a_collector_of_tianshou_has_the_texts_and_their_scores() -> None:
    _, collect, _ = collector()
    stats = collect.collect(n_episode=24)
    assert stats.n_collected_episodes == 24
    batch = collect.buffer[:]
    ended = np.flatnonzero(batch.done)
    assert len(ended) == 24
    for index in ended:
        after = batch.obs_next[index]
        start, length = int(after.prompt_length.item()), int(after.attention_mask.sum())
        ids = after.input_ids[start:length].tolist()
        assert batch.rew[index] == PROBE(["0"], completion_ids=[ids])[0]
        assert ids[-1] == batch.act[index]
    assert sorted(batch.rew[ended]) == sorted(stats.returns)


def test_ppo_of_tianshou_learns() -> None:
    algorithm, collect, net = collector()
    before = mean_score(drawing(net))
    algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=collect,
            max_epochs=1,
            epoch_num_steps=8_192,
            collection_step_num_env_steps=256,
            update_step_num_repetitions=4,
            batch_size=None,
            verbose=False,
            show_progress=False,
        )
    )
    assert before < LEARNED < mean_score(drawing(net))
