"""RLlib drives the environment: `make clients`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from token_net import LEARNED, NAMES, PROBE, TokenNet, drawing, mean_score

ray = pytest.importorskip("ray")
pytest.importorskip("ray.rllib")

from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule


class TokenModule(TorchRLModule, ValueFunctionAPI):
    """RLlib's own networks take no Dict of integers, so that it is given one."""

    def setup(self) -> None:
        self.actor = TokenNet(int(self.action_space.n), self.observation_space)
        self.critic = TokenNet(1, self.observation_space)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        return {Columns.ACTION_DIST_INPUTS: self.actor(**batch[Columns.OBS])}

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> torch.Tensor:
        return self.critic(**batch[Columns.OBS]).squeeze(-1)


@pytest.fixture(scope="module")
def algorithm() -> Iterator[Any]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    config = (
        PPOConfig()
        .environment("text_env:TextRLHF-v0", env_config=PROBE.kwargs)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=16)
        .learners(num_learners=0)
        .training(
            lr=3e-3,
            gamma=1.0,
            lambda_=0.95,
            train_batch_size_per_learner=256,
            minibatch_size=256,
            num_epochs=4,
            use_kl_loss=False,
            vf_loss_coeff=0.5,
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=TokenModule))
        .debugging(seed=0)
    )
    made = config.build_algo()
    yield made
    made.stop()
    ray.shutdown()


def test_an_env_runner_of_rllib_has_the_texts_and_their_scores(algorithm: Any) -> None:
    episodes = algorithm.env_runner.sample(num_episodes=20)
    assert len(episodes) >= 20
    for episode in episodes:
        assert episode.is_terminated
        assert not episode.is_truncated
        last = {name: episode.get_observations(-1)[name] for name in NAMES}
        start, length = int(last["prompt_length"].item()), int(last["attention_mask"].sum())
        ids = last["input_ids"][start:length].tolist()
        assert ids == [int(action) for action in episode.get_actions()]
        assert episode.get_return() == PROBE(["0"], completion_ids=[ids])[0]


def test_ppo_of_rllib_learns(algorithm: Any) -> None:
    before = mean_score(drawing(algorithm.get_module().actor))
    for _ in range(32):
        result = algorithm.train()
    assert before < LEARNED < mean_score(drawing(algorithm.get_module().actor))
    assert before < result["env_runners"]["episode_return_mean"] <= 1
