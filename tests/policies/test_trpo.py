"""sb3-contrib's TRPO, unmodified, moves every trainable parameter of a language model.

It differentiates the KL twice, and tells actor from critic by the word "value" in a parameter's name, which
``attention.query_key_value`` has too: ``TRPOCausalLMPolicy`` is for such models, and for frozen parameters.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from learners import make_env, make_model, observation_of, weights_of
from sb3_contrib import TRPO

import agents.policies.causal_lm_policy
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.policies.trpo import TRPOCausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import TextVecEnv
from text_env.constraints import AllowedTokens

LORA = {"r": 2, "target_modules": "all-linear"}


def make_trpo(
    kind: str, policy: type[CausalLMPolicy] = TRPOCausalLMPolicy, rollout_buffer_class: Any = None, **policy_kwargs: Any
) -> TRPO:
    return TRPO(
        policy,
        TextVecEnv(make_env(8)),
        rollout_buffer_class=rollout_buffer_class,
        n_steps=8,
        batch_size=64,
        n_critic_updates=2,
        cg_max_steps=4,
        target_kl=0.05,
        seed=0,
        device="cpu",
        policy_kwargs={"model": make_model(kind, ends=0.1), **policy_kwargs},
    )


@pytest.mark.parametrize(
    ("kind", "policy_kwargs"),
    [
        ("gpt2", {}),
        ("llama", {}),
        ("gpt_neox", {}),
        ("gpt_neox", {"separate_critic": True}),
        ("gpt_neox", {"lora": LORA}),
        ("llama", {"constraint": AllowedTokens(range(0, 300, 2))}),
    ],
    ids=str,
)
def test_it_changes_every_trainable_parameter_and_no_other(kind: str, policy_kwargs: dict[str, Any]) -> None:
    model = make_trpo(kind, **policy_kwargs)
    before = weights_of(model.policy)
    trainable = {name for name, parameter in model.policy.named_parameters() if parameter.requires_grad}
    # The first update of an adapter moves one of its two factors: the other one is 0.
    for _ in range(2 if "lora" in policy_kwargs else 1):
        model.learn(64, reset_num_timesteps=False)
        assert model.logger.name_to_value["train/is_line_search_success"] == 1
        assert 0 < model.logger.name_to_value["train/kl_divergence_loss"] < 0.05
    moved = {
        name: float((parameter - before[name]).detach().abs().max())
        for name, parameter in model.policy.named_parameters()
    }
    assert {name for name, distance in moved.items() if distance > 0} == trainable
    assert min(moved[name] for name in trainable) > 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_where_no_name_misleads_it_the_ordinary_policy_does(kind: str) -> None:
    model = make_trpo(kind, CausalLMPolicy)
    before = weights_of(model.policy)
    model.learn(64)
    assert all(not tensor.equal(before[name]) for name, tensor in weights_of(model.policy).items())


def test_where_a_name_misleads_it_the_ordinary_policy_says_which_one_to_use() -> None:
    with pytest.raises(ValueError, match=r"query_key_value\.weight', one of 4: use agents"):
        make_trpo("gpt_neox", CausalLMPolicy).learn(64)


def test_the_ordinary_policys_distribution_can_be_differentiated_once_whatever_the_names() -> None:
    policy = make_trpo("gpt_neox", CausalLMPolicy).policy
    policy.get_distribution(observation_of([[5, 6, 7]], [1])).distribution.logits[0, 3].backward()
    gradient = dict(policy.named_parameters())["lm.model.gpt_neox.layers.0.attention.query_key_value.weight"].grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


class Unchecked(CausalLMPolicy):
    """The control: names as they are, and nobody who says so."""

    def _check_names(self, _: torch.Tensor) -> None:
        pass


def test_with_the_names_as_they_are_it_would_leave_out_queries_keys_and_values() -> None:
    model = make_trpo("gpt_neox", Unchecked, separate_critic=True)  # else the critic's loss would move them instead
    before = weights_of(model.policy)
    model.learn(64)
    still = {name for name, tensor in weights_of(model.policy).items() if tensor.equal(before[name])}
    assert still == {name for name in before if name.startswith("lm.") and "query_key_value" in name}
    with pytest.raises(RuntimeError, match="does not require grad"):
        make_trpo("gpt_neox", Unchecked, lora=LORA).learn(64)


def test_names_are_names_but_for_the_one_question() -> None:
    policy = make_trpo("gpt_neox").policy
    names = dict(policy.named_parameters())
    assert set(names) <= set(policy.state_dict())
    assert "lm.model.gpt_neox.layers.0.attention.query_key_value.weight" in names
    asked = {name: "value" in name for name in names}
    assert {name for name, critic in asked.items() if critic} == {"value_head.weight", "value_head.bias"}
    assert all("." in name for name in names)


def test_the_fused_attention_kernel_alone_would_have_no_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: why the distribution is computed with another one where it may be differentiated."""
    monkeypatch.setattr(agents.policies.causal_lm_policy, "sdpa_kernel", lambda *_: contextlib.nullcontext())
    with pytest.raises(RuntimeError, match="scaled_dot_product"):
        make_trpo("gpt2").learn(64)


def test_the_distribution_is_the_same_with_gradient_and_without() -> None:
    policy = make_trpo("llama").policy
    observation = observation_of([[5, 6, 7], [8, 9]], [1, 1])
    with torch.no_grad():
        expected = policy.get_distribution(observation).distribution.logits
    torch.testing.assert_close(policy.get_distribution(observation).distribution.logits, expected)


def test_it_takes_no_packed_episodes() -> None:
    with pytest.raises(ValueError, match="leave EpisodeBuffer out"):
        make_trpo("gpt2", rollout_buffer_class=EpisodeBuffer).learn(64)
