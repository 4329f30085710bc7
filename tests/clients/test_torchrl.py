"""TorchRL drives the environment: `make clients`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from token_net import LEARNED, N_TOKENS, NAMES, PROBE, TokenNet, drawing, mean_score

pytest.importorskip("torchrl")

from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, GymWrapper, check_env_specs
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from text_env.probes import make_probe


def vector_env(n: int = 16) -> Any:
    """TorchRL resets rows by itself, for which it asks for this mode."""
    return GymWrapper(make_probe(PROBE.name, n, autoreset_mode="Disabled"), categorical_action_encoding=True)


def one_row() -> Any:
    return GymEnv("text_env:TextRLHF-v0", categorical_action_encoding=True, **PROBE.kwargs)


@pytest.mark.parametrize("make", [vector_env, one_row])
def test_the_environment_is_what_torchrl_takes_it_for(make: Any) -> None:
    check_env_specs(make())


def test_a_rollout_of_torchrl_has_the_texts_and_their_scores() -> None:
    env = vector_env(8)
    rollout = env.rollout(3 * PROBE.max_new_tokens, break_when_any_done=False)
    assert rollout.batch_size[0] == 8
    ended = rollout["next", "done"].squeeze(-1)
    assert ended.sum() >= 8
    last = rollout["next"][ended]
    for row in range(len(last)):
        length, start = int(last["attention_mask"][row].sum()), int(last["prompt_length"][row])
        ids = last["input_ids"][row, start:length].tolist()
        assert float(last["reward"][row]) == PROBE(["0"], completion_ids=[ids])[0]
    assert rollout["next", "reward"][~rollout["next", "done"]].eq(0).all()


def test_ppo_of_torchrl_learns() -> None:
    torch.manual_seed(0)
    env = vector_env()
    policy, value = TokenNet(N_TOKENS), TokenNet(1)
    actor = ProbabilisticActor(
        TensorDictModule(policy, in_keys=list(NAMES), out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = ValueOperator(value, in_keys=list(NAMES))
    # TokenFeatures looks at the contexts by NumPy, which no tensor of vmap has.
    loss_of, advantages = (
        ClipPPOLoss(actor, critic),
        GAE(gamma=1.0, lmbda=0.95, value_network=critic, deactivate_vmap=True),
    )
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=3e-3)
    before = mean_score(drawing(policy))
    for data in Collector(env, actor, frames_per_batch=16 * 16, total_frames=40 * 16 * 16):
        for _ in range(4):
            advantages(data)
            losses = loss_of(data.reshape(-1))
            loss = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert before < LEARNED < mean_score(drawing(policy))
