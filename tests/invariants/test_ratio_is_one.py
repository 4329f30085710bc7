"""Invariant 1: before the first step, the policy that is trained is the one that sampled, and the reference too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learners import after_each_rollout, largest_difference, make_env, make_model, make_ppo, weights_of

from agents.algorithms.a2c import A2C
from agents.algorithms.grpo import GRPO
from agents.algorithms.on_policy import OnPolicyAlgorithm
from agents.algorithms.ppo import PPO

KINDS = ("gpt2", "llama")
LORA = {"r": 4, "target_modules": "all-linear"}


def first_log_ratios(model: PPO) -> np.ndarray:
    """log π − log π_old of every token, at the moment at which the first minibatch is about to be learned from."""
    found: list[np.ndarray] = []

    def look() -> None:
        samples = model.buffer.pack(np.arange(model.n_episodes))
        log_prob = model.policy.evaluate_actions(samples.observations, samples.actions)[1].detach()
        found.append((log_prob - samples.old_log_prob).numpy())

    after_each_rollout(model, look).learn(1)
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "policy_kwargs",
    [
        {},
        {"temperature": 0.5},
        {"min_new_tokens": 3},
        {"lora": LORA},
        {"separate_critic": True},
        {"prefix_cache": False},
    ],
    ids=str,
)
def test_every_ratio_is_one_at_the_first_minibatch(kind: str, policy_kwargs: dict[str, Any]) -> None:
    env = make_env(min_new_tokens=policy_kwargs.get("min_new_tokens", 0))
    model = make_ppo(env, make_model(kind, ends=0.2), policy_kwargs=policy_kwargs, n_episodes=12)
    log_ratio = first_log_ratios(model)
    assert model.buffer.lengths.min() < model.buffer.lengths.max()
    assert np.abs(np.expm1(log_ratio)).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_in_bfloat16_ratios_are_one_within_the_rounding_of_logits(kind: str) -> None:
    """bfloat16 keeps 8 bits: a number z is off by up to 2⁻⁹ |z|. A logit is a sum of products of hidden states, which
    are themselves results of some ten such roundings, so its error is about 10 · 2⁻⁹ of its own size; a log-probability
    is a logit minus the logarithm of a sum of exponentials of others, hence off by twice that at most. Decoding and
    training round differently, so this is how far their log-probabilities may lie apart: 0.04 × the largest logit.
    """
    model = make_ppo(model=make_model(kind, ends=0.2).bfloat16(), n_episodes=12)
    assert model.policy.lm.model.dtype == torch.bfloat16
    log_ratio = first_log_ratios(model)
    samples = model.buffer.pack(np.arange(model.n_episodes))
    hidden = model.policy.lm.hidden_states(samples.observations["input_ids"])
    largest_logit = float(model.policy.lm.model.get_output_embeddings()(hidden).abs().max().detach())
    assert np.abs(log_ratio).max() < 0.04 * largest_logit
    assert abs(log_ratio.mean()) < 0.01 * largest_logit  # and it is noise, not a bias


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_learning_rate_of_zero_nothing_changes(kind: str) -> None:
    model = make_ppo(model=make_model(kind, ends=0.2), learning_rate=0.0)
    before = weights_of(model.policy)
    model.learn(100)
    assert model._n_updates > 0
    assert all(tensor.equal(before[name]) for name, tensor in model.policy.state_dict().items())
    assert np.abs(model.buffer.log_ratio).max() < 1e-5


def test_with_a_learning_rate_above_zero_everything_changes() -> None:
    """The control: the comparison above could fail."""
    model = make_ppo()
    before = weights_of(model.policy)
    model.learn(100)
    assert largest_difference(before, weights_of(model.policy)) > 1e-4
    assert np.abs(model.buffer.log_ratio).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy_kwargs", [{}, {"lora": LORA}, {"temperature": 0.5}], ids=str)
def test_the_kl_to_the_reference_is_zero_at_the_start(kind: str, policy_kwargs: dict[str, Any]) -> None:
    model = make_ppo(make_env(min_new_tokens=2), make_model(kind, ends=0.2), policy_kwargs=policy_kwargs)
    kl: list[float] = []
    after_each_rollout(model, lambda: kl.append(float(np.abs(model.buffer.log_ratio).max()))).learn(1)
    assert kl[0] < 1e-5


def test_the_reference_stays_where_it_was_while_a_lora_policy_moves() -> None:
    model = make_ppo(policy_kwargs={"lora": LORA}, learning_rate=1e-2)
    model.learn(1)
    samples = model.buffer.pack(np.arange(model.n_episodes))
    assert model.reference is not None
    ours = model.policy.evaluate_actions(samples.observations, samples.actions)[1].detach()
    frozen = model.reference.log_probs(samples.observations, samples.actions)
    assert float((frozen - samples.old_log_prob).abs().max()) < 1e-5  # the policy had sampled from the reference
    assert float((ours - frozen).abs().max()) > 1e-3
    again = model.policy.evaluate_actions(samples.observations, samples.actions)[1].detach()
    assert again.equal(ours)  # asking the reference has left the adapter on


@pytest.mark.parametrize("algorithm", [PPO, GRPO, A2C])
def test_the_largest_distance_of_a_first_ratio_from_one_is_logged(algorithm: type[OnPolicyAlgorithm]) -> None:
    model = make_ppo(
        make_env(group_size=4), algorithm=algorithm, batch_size=4, learning_rate=1e-2, micro_batch_tokens=20
    )
    first: list[float] = []
    backward = model._backward

    def look(minibatch: np.ndarray) -> dict[str, float]:
        samples = model.buffer.pack(minibatch)
        log_prob = model.policy.evaluate_actions(samples.observations, samples.actions)[1].detach()
        first.append(float(torch.expm1(log_prob - samples.old_log_prob).abs().max()))
        return backward(minibatch)

    model._backward = look  # type: ignore[method-assign]
    model.learn(1, log_interval=0)  # writing the log would empty it
    assert len(first) > 1
    assert max(first[1:]) > 1e-3  # the control: after a step it is something else
    assert model.logger.name_to_value["train/ratio_first_max"] == pytest.approx(first[0], abs=1e-6)
    assert first[0] < 1e-5


def test_a_first_ratio_far_from_one_is_warned_of_once() -> None:
    model = make_ppo()

    def disturb() -> None:
        model.buffer.log_probs += np.log(1.15)

    after_each_rollout(model, disturb)
    with pytest.warns(UserWarning, match=r"off by 0\.13 \(train/ratio_first_max; more than 0\.1, half") as caught:
        model.learn(100)
    assert model._n_updates > 2
    assert len(caught) == 1
