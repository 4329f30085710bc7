"""The critic of PPO and A2C: what it learns from, when, and what of the policy that leaves alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import constant, largest_difference, make_env, make_model, make_ppo, weights_of

from agents.algorithms.a2c import A2C
from agents.algorithms.ppo import PPO
from agents.objectives.advantages import discounted_returns
from agents.policies.causal_lm_policy import is_actor
from agents.rollouts.collector import collect_episodes
from agents.state.schedules import LearningRate


def split(model: PPO, weights: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Copies of weights: the actor's and the critic's."""
    actor = {name for name, p in model.policy.named_parameters() if is_actor(name, p)}
    return {k: v for k, v in weights.items() if k in actor}, {k: v for k, v in weights.items() if k not in actor}


@pytest.mark.parametrize("separate", [False, True])
def test_the_warm_up_changes_the_critic_and_nothing_else(separate: bool) -> None:
    model = make_ppo(critic_warmup_episodes=16, policy_kwargs={"separate_critic": separate})
    actor, critic = split(model, weights_of(model.policy))
    model.learn(1)
    warm_actor, warm_critic = split(model, weights_of(model.policy))
    assert largest_difference(actor, warm_actor) == 0
    assert largest_difference(critic, warm_critic) > 1e-5
    assert model.critic_warmup_left == 8
    model.learn(1)
    assert largest_difference(actor, split(model, weights_of(model.policy))[0]) == 0
    assert model.critic_warmup_left == 0
    model.learn(1)
    assert largest_difference(actor, split(model, weights_of(model.policy))[0]) > 1e-5


def test_a_warm_up_of_no_episodes_changes_nothing() -> None:
    ends = []
    for warm_up in ({}, {"critic_warmup_episodes": 0, "critic_warmup_epochs": 9}):
        model = make_ppo(**warm_up)
        model.learn(60)
        ends.append(weights_of(model.policy))
    assert largest_difference(*ends) == 0


def test_the_warm_up_fits_monte_carlo_returns_whatever_lambda_is() -> None:
    model = make_ppo(gae_lambda=0.3, gae_lambda_value=0.5, critic_warmup_episodes=8)
    collect_episodes(model.policy, model.vector_env, 8, model.buffer)
    model.buffer.finalize()
    model.estimate(model.buffer)
    buffer = model.buffer
    expected = discounted_returns(buffer.padded(buffer.rewards), np.zeros(8), buffer.mask, 1.0)[buffer.mask]
    np.testing.assert_allclose(buffer.returns, expected, atol=1e-5)


def test_a_critic_that_is_fitted_comes_nearer_to_the_returns() -> None:
    model = make_ppo(critic_warmup_episodes=1, critic_warmup_epochs=30, learning_rate=3e-3)
    model.learn(1)
    buffer = model.buffer
    before = float(np.mean((buffer.values - buffer.returns) ** 2))
    with torch.no_grad():
        samples = model.buffer.pack(np.arange(8))
        after = float(((model.policy.evaluate_values(samples.observations) - samples.returns) ** 2).mean())
    assert after < 0.5 * before


@pytest.mark.parametrize(("group", "kl_estimator"), [(False, "k1"), (True, "k1"), (False, "exact")])
def test_where_all_texts_are_paid_the_same_the_critics_errors_move_the_critic_alone(
    group: bool, kl_estimator: str
) -> None:
    moved = {}
    for normalize in (("group" if group else True), False):
        env = make_env(reward=constant, group_size=2) if group else make_env(reward=constant)
        kwargs: dict[str, Any] = {
            "kl_coef": 0.0,
            "kl_estimator": kl_estimator,
            "policy_kwargs": {"separate_critic": True},
        }
        model = make_ppo(env, normalize_advantage=normalize, **kwargs)
        with torch.no_grad():
            for parameter in model.policy.value_head.parameters():
                parameter.normal_()
        actor, critic = split(model, weights_of(model.policy))
        model.learn(1)
        assert model.buffer.values.std() > 0.1
        after = split(model, weights_of(model.policy))
        moved[normalize] = largest_difference(actor, after[0])
        assert largest_difference(critic, after[1]) > 1e-5
    assert moved.pop(False) > 1e-5  # the control: these errors would move the policy
    assert list(moved.values()) == [0.0]


@pytest.mark.parametrize("group_size", [1, 8])
@pytest.mark.parametrize("right", [0, 1])
def test_rounding_in_bfloat16_hides_no_right_answer(right: int, group_size: int) -> None:
    judged = itertools.count()

    def one_is_right(completions: list[str], **_: Any) -> list[float]:
        return [float(right and next(judged) == 5) for _ in completions]

    env = make_env(8, reward=one_is_right, min_new_tokens=64, max_new_tokens=64, group_size=group_size)
    model = make_ppo(
        env,
        make_model().bfloat16(),
        n_episodes=32,
        gae_lambda=0.98,
        kl_coef=0.5,
        normalize_advantage="group" if group_size > 1 else True,
    )
    model.learn(1)
    buffer = model.buffer
    assert buffer.kl_penalty.std() > 1e-4  # which is rounding alone: the policy is its own reference
    counted = np.flatnonzero(np.abs(buffer.episode_sums(np.abs(buffer.advantages))) > 0)
    everywhere, nowhere = list(range(32)), []
    if group_size == 1:
        assert list(counted) == (everywhere if right else nowhere)
        assert model._signal_share is not None
        assert (model._signal_share > 0) == bool(right)
    else:  # no other group has a right answer
        assert len(counted) == 8 * right
        assert not right or buffer.scores[counted].sum() == 1


@pytest.mark.parametrize("score", [0.0, 0.7])
def test_where_nothing_was_paid_but_what_rounding_makes_of_the_penalty_nobody_moves(score: float) -> None:
    def the_same(completions: list[str], **_: Any) -> list[float]:
        return [score] * len(completions)

    model = make_ppo(make_env(32, reward=the_same), n_episodes=32, gae_lambda=1.0)
    actor, _ = split(model, weights_of(model.policy))
    model.learn(1)
    assert model.kl_coef > 0
    assert not model.buffer.advantages.any()
    assert largest_difference(actor, split(model, weights_of(model.policy))[0]) == 0


def test_the_kl_coefficient_is_not_adapted_while_the_critic_warms_up() -> None:
    model = make_ppo(critic_warmup_episodes=16, kl_target=5.0)
    for expected in (0.04, 0.04, 0.036):  # only the last rollout is learned from by the policy
        model.learn(1)
        assert model.kl_coef == pytest.approx(expected)


def test_a_schedule_of_the_critic_is_saved_like_the_policys(tmp_path: Path) -> None:
    rate = LearningRate(1e-2, "cosine", 0.1)
    env = make_env(tokenizer="builtin")
    make_ppo(env, "builtin", critic_learning_rate=rate).save(tmp_path / "checkpoint")
    again = PPO.load(tmp_path / "checkpoint", env=make_env(tokenizer="builtin"), device="cpu")
    assert again.critic_learning_rate == rate


def test_lambda_of_the_critic_changes_its_targets_and_not_the_advantages() -> None:
    model = make_ppo(gae_lambda=0.4)
    collect_episodes(model.policy, model.vector_env, 8, model.buffer)
    model.buffer.finalize()
    model.buffer.values[:] = np.linspace(-1, 1, len(model.buffer.values))
    found = []
    for model.gae_lambda_value in (None, 1.0):
        model.estimate(model.buffer)
        found.append((model.buffer.advantages, model.buffer.returns))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert np.abs(found[0][1] - found[1][1]).max() > 0.1


def test_without_a_value_loss_the_head_learns_and_the_shared_decoder_does_not_learn_from_it() -> None:
    # Advantages of zero: whatever changes the decoder comes from the critic.
    class NoAdvantages(A2C):
        def estimate(self, buffer: Any) -> None:
            super().estimate(buffer)
            buffer.advantages[:] = 0

    for coefficient, moves in ((0.1, True), (0.0, False)):
        model = make_ppo(algorithm=NoAdvantages, vf_coef=coefficient, critic_epochs=1, kl_coef=0.0)
        model.learn(1)  # the head is 0 at first, and passes no gradient on to the decoder
        actor, critic = split(model, weights_of(model.policy))
        model.learn(1)
        now_actor, now_critic = split(model, weights_of(model.policy))
        assert (largest_difference(actor, now_actor) > 1e-6) == moves
        assert largest_difference(critic, now_critic) > 1e-6


def test_the_critic_has_a_learning_rate_of_its_own() -> None:
    rates = []
    for rate in (None, 1e-2):
        model = make_ppo(critic_learning_rate=rate, learning_rate=1e-3)
        model.learn(1)
        rates.append([group["lr"] for group in model.policy.optimizer.param_groups])
    assert rates == [[1e-3, 1e-3], [1e-3, 1e-2]]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"gae_lambda": 1.5}, "gae_lambda between 0 and 1"),
        ({"gae_lambda_value": -0.1}, "gae_lambda_value between 0 and 1"),
        ({"length_adaptive_alpha": 0.0}, "length_adaptive_alpha > 0"),
        ({"critic_epochs": -1}, "critic_epochs >= 0"),
        ({"critic_warmup_episodes": -1}, "critic_warmup_episodes >= 0"),
    ],
)
def test_what_is_out_of_range_is_refused(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_ppo(**argument)


def test_a_warm_up_is_resumed_where_it_stopped(tmp_path: Any) -> None:
    model = make_ppo(critic_warmup_episodes=24, policy_kwargs={"model": "builtin"}, env=make_env(tokenizer="builtin"))
    model.learn(1)
    model.save(tmp_path / "checkpoint")
    again = PPO.load(tmp_path / "checkpoint", env=make_env(tokenizer="builtin"), device="cpu")
    assert again.critic_warmup_left == 16
