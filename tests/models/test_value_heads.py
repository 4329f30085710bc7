"""The critic by classification: its values, its loss, and what it is saved as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3 as sb3
import torch
from learners import largest_difference, make_env, make_model, make_policy, make_ppo, observation_of, weights_of

from agents.algorithms.a2c import A2C
from agents.algorithms.ppo import PPO
from agents.algorithms.reinforce import REINFORCE
from agents.models.critic import BinnedValueHead, ValueHead
from agents.objectives.losses import value_loss
from agents.objectives.value_targets import hl_gauss, two_hot
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import TextVecEnv

BINS = (-0.5, 1.5, 21)
OBSERVATION = observation_of([[5, 6, 7], [8, 9]], [1, 2])


def binned(**kwargs: Any) -> CausalLMPolicy:
    policy = make_policy(make_env(), randomize=False, **{"value_bins": BINS, **kwargs})
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in (policy.value_head.weight, policy.value_head.bias):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float32))
    return policy


@pytest.mark.parametrize("separate", [False, True])
def test_before_training_the_value_is_the_middle_of_the_range(separate: bool) -> None:
    for bins, middle in (((-1.0, 1.0, 51), 0.0), ((0.0, 1.0, 4), 0.5)):
        policy = make_policy(make_env(), randomize=False, value_bins=bins, separate_critic=separate)
        torch.testing.assert_close(policy.predict_values(OBSERVATION), torch.full((2, 1), middle), atol=1e-6, rtol=0)


@torch.no_grad()
def test_the_values_are_the_means_of_the_predicted_distributions() -> None:
    policy = binned()
    actions = torch.tensor([3, 4])
    predictions, *rest = policy.evaluate(OBSERVATION, actions)[:3]
    assert predictions.shape == (2, 21)
    expected = torch.softmax(predictions, dim=1) @ torch.linspace(*BINS)
    values, *scores = policy.evaluate_actions(OBSERVATION, actions)
    assert float((values - 0.5).abs().min()) > 1e-3  # not the middle
    torch.testing.assert_close(values, expected[:, None])
    torch.testing.assert_close(policy.predict_values(OBSERVATION), values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy(OBSERVATION)[1], values, atol=1e-5, rtol=1e-5)
    for one, other in zip(rest, scores, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("sigma", [None, 0.75])
def test_the_loss_is_the_cross_entropy_to_the_target(sigma: float | None) -> None:
    head = BinnedValueHead(4, BINS, sigma)
    logits, returns = torch.randn(3, 21), torch.tensor([0.0, 0.33, 9.0])
    targets = two_hot(returns, head.support) if sigma is None else hl_gauss(returns, head.support, 0.75 * 0.1)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(head.loss(logits, returns, returns, None), expected)


def test_a_clipped_value_has_no_gradient_in_either_kind_of_critic() -> None:
    old, returns = torch.tensor([0.0, 0.9, 0.5]), torch.tensor([1.0, 1.0, 1.0])
    regression, classes = ValueHead(4), BinnedValueHead(4, BINS, None)
    # The values are 0.5, 0.5 and 0.5: by ε = 0.2 too far on the way to the target, away from it, and where they were.
    values = torch.full((3, 1), 0.5, requires_grad=True)
    logits = torch.zeros(3, 21, requires_grad=True)
    regression.loss(values, old, returns, 0.2).sum().backward()
    classes.loss(logits, old, returns, 0.2).sum().backward()
    assert values.grad is not None
    assert logits.grad is not None
    assert (values.grad.abs().sum(dim=1) > 0).tolist() == [False, True, True]
    assert (logits.grad.abs().sum(dim=1) > 0).tolist() == [False, True, True]


@pytest.mark.parametrize("sigma", [None, 0.75])
def test_a_critic_of_classes_comes_nearer_to_the_returns(sigma: float | None) -> None:
    model = make_ppo(
        critic_warmup_episodes=1,
        critic_warmup_epochs=30,
        learning_rate=3e-3,
        policy_kwargs={"value_bins": BINS, "value_sigma": sigma},
    )
    actor = weights_of(model.policy.lm)
    model.learn(1)
    assert largest_difference(actor, weights_of(model.policy.lm)) == 0
    buffer = model.buffer
    before = float(np.mean((buffer.values - buffer.returns) ** 2))
    with torch.no_grad():
        samples = buffer.pack(np.arange(8))
        after = float(((model.policy.evaluate_values(samples.observations) - samples.returns) ** 2).mean())
    assert after < 0.5 * before


@pytest.mark.parametrize(
    ("algorithm", "options"), [(PPO, {}), (A2C, {"vf_coef": 0.5}), (REINFORCE, {"baseline": "value"})]
)
def test_every_algorithm_with_a_critic_trains_it(algorithm: Any, options: dict[str, Any]) -> None:
    model = make_ppo(algorithm=algorithm, policy_kwargs={"value_bins": BINS}, learning_rate=1e-2, **options)
    before = weights_of(model.policy)
    model.learn(60)
    after = weights_of(model.policy)
    assert float((before["value_head.weight"] - after["value_head.weight"]).abs().max()) > 1e-3
    assert torch.equal(before["value_head.support"], after["value_head.support"])
    assert all(bool(torch.isfinite(weight).all()) for weight in after.values())


@pytest.mark.parametrize("packed", [False, True])
def test_stock_ppo_regresses_on_the_mean(packed: bool) -> None:
    buffer = {"rollout_buffer_class": EpisodeBuffer} if packed else {}
    env = TextVecEnv(make_env())
    policy_kwargs = {"model": make_model(ends=0.1), "value_bins": BINS}
    model = sb3.PPO(
        CausalLMPolicy,
        env,
        n_steps=8,
        batch_size=16,
        n_epochs=1,
        seed=0,
        device="cpu",
        policy_kwargs=policy_kwargs,
        **buffer,
    )
    before = weights_of(model.policy)
    model.learn(32)
    after = weights_of(model.policy)
    assert float((before["value_head.weight"] - after["value_head.weight"]).abs().max()) > 1e-5


def test_the_head_is_saved_and_loaded(tmp_path: Path) -> None:
    policy = binned()
    policy.save_pretrained(tmp_path)
    again = make_policy(make_env(), randomize=False, value_bins=BINS)
    again.load_value_head(tmp_path)
    torch.testing.assert_close(again.predict_values(OBSERVATION), policy.predict_values(OBSERVATION))
    for other in (None, (-0.5, 1.5, 11), (-1.0, 1.0, 21)):
        stranger = make_policy(make_env(), randomize=False, value_bins=other)
        with pytest.raises(ValueError, match=r"differ in \['value_head.*the value_bins that were saved"):
            stranger.load_value_head(tmp_path)


def test_a_checkpoint_holds_the_range(tmp_path: Path) -> None:
    env = make_env(tokenizer="builtin")
    policy_kwargs = {"model": "builtin", "value_bins": (0.0, 1.0, 5), "value_sigma": None}
    model = make_ppo(env, policy_kwargs=policy_kwargs)
    model.learn(1)
    model.save(tmp_path / "checkpoint")
    again = PPO.load(tmp_path / "checkpoint", env=make_env(tokenizer="builtin"), device="cpu")
    assert isinstance(again.policy.value_head, BinnedValueHead)
    assert again.policy.value_head.sigma is None
    assert largest_difference(weights_of(model.policy), weights_of(again.policy)) == 0


def test_in_float64_the_range_is_too() -> None:
    policy = make_policy(make_env(), model=make_model().double(), randomize=False, value_bins=(-1.0, 1.0, 3))
    assert policy.predict_values(OBSERVATION).dtype == torch.float64


def test_ranges_that_are_none_are_refused() -> None:
    for bins in ((1.0, 0.0, 5), (0.0, 1.0, 1), (0.0, 1.0, 2.5), (0.0, 1.0)):
        with pytest.raises(ValueError, match="Expected value_bins to be the lowest value"):
            make_policy(make_env(), randomize=False, value_bins=bins)
    with pytest.raises(ValueError, match="value_sigma > 0, or None"):
        make_policy(make_env(), randomize=False, value_bins=BINS, value_sigma=0.0)


def test_a_reward_model_as_the_critic_predicts_the_value_itself() -> None:
    env = make_env(tokenizer="builtin")
    with pytest.raises(ValueError, match=r"either separate_critic='builtin'.*or value_bins=\(-0.5"):
        make_policy(env, model="builtin", randomize=False, separate_critic="builtin", value_bins=BINS)


def test_a_loss_of_values_refuses_logits() -> None:
    with pytest.raises(AssertionError):
        value_loss(torch.zeros(3, 3), torch.zeros(3), torch.zeros(3), None)
