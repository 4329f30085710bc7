"""AgileRL drives the environment: `make clients`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from token_net import LEARNED, PROBE, SPACE, mean_score

pytest.importorskip("agilerl")

from agilerl.algorithms import PPO
from agilerl.modules import EvolvableModule
from agilerl.rollouts import collect_rollouts

from agents.policies.token_features import TokenFeatures
from text_env.probes import make_probe


class TokenEncoder(EvolvableModule):
    """Token features in place of the networks that AgileRL would make for a Dict, which take token ids for sizes."""

    num_outputs = 32
    activation = "ReLU"

    def __init__(self, device: str = "cpu") -> None:
        super().__init__(device)
        self.features = TokenFeatures(SPACE, self.num_outputs)

    def forward(self, observations: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.features(dict(observations))


def made(num_envs: int, use_gae: bool = False) -> tuple[Any, PPO]:
    """AgileRL takes Gymnasium's vector environments as they are.

    Its generalised advantage estimation asks whether the next step ended an episode where it should ask whether this
    one did (2.58.0, `compute_returns_and_advantages`), so that a score at the end reaches the last token alone. Its
    Monte-Carlo returns are right.
    """
    torch.manual_seed(0)
    env = make_probe(PROBE.name, num_envs)
    agent = PPO(
        env.single_observation_space,
        env.single_action_space,
        actor_network=TokenEncoder(),
        critic_network=TokenEncoder(),
        num_envs=num_envs,
        learn_step=256,
        batch_size=256,
        lr=3e-3,
        gamma=1.0,
        update_epochs=4,
        rollout_buffer_config={"use_gae": use_gae},
    )
    agent.set_training_mode(True)
    return env, agent


def test_a_rollout_of_agilerl_has_the_texts_and_their_scores() -> None:
    env, agent = made(8)
    scores, *_ = collect_rollouts(agent, env, n_steps=32)
    buffer = agent.rollout_buffer.buffer
    seen = []
    for row in range(8):
        actions, dones, rewards = (buffer[name][:, row].flatten().tolist() for name in ("actions", "dones", "rewards"))
        text: list[int] = []
        for action, done, reward in zip(actions, dones, rewards, strict=True):
            text.append(int(action))
            if done:
                assert reward == PROBE(["0"], completion_ids=[text])[0]
                seen.append(reward)
                text = []
            else:
                assert reward == 0
    assert len(seen) >= 8 * 32 // PROBE.max_new_tokens
    assert sorted(seen) == sorted(scores)


def test_ppo_of_agilerl_learns() -> None:
    env, agent = made(16)
    before = mean_score(lambda observations: agent.get_action(observations)[0])
    for _ in range(60):
        collect_rollouts(agent, env)
        agent.learn()
    assert before < LEARNED < mean_score(lambda observations: agent.get_action(observations)[0])


def test_a_score_reaches_the_first_token_by_its_returns_and_not_by_its_gae() -> None:
    """Whoever sees this fail may use its GAE again: then docs/plugs.md has to say so."""
    for use_gae, reaches in ((False, 1.0), (True, 0.0)):
        _, agent = made(1, use_gae)
        buffer = agent.rollout_buffer
        for step in range(4):
            zeros = {name: np.zeros((1, *SPACE[name].shape), SPACE[name].dtype) for name in SPACE}
            done = np.array([step == 3])
            buffer.add(zeros, np.zeros(1), done.astype(float), done, np.zeros(1), np.zeros(1), zeros)
        buffer.compute_returns_and_advantages(np.zeros(1), np.ones(1))
        assert float(buffer.buffer["returns"][0, 0]) == reaches
