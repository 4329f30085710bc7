"""Weights that are not numbers: every way into the model says so, and says where."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import stable_baselines3 as sb3
import torch
from learners import make_env, make_model, make_policy, make_ppo, observation_of
from stable_baselines3.common.evaluation import evaluate_policy

from agents.models.distribution import sample
from agents.models.reference import Reference
from agents.models.reference_constraints import ReferenceMinP, ReferenceTopK, ReferenceTopP
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.policies.token_features import TokenFeatures
from agents.rollouts.sampling import sample_texts
from agents.rollouts.sb3_vec_env import TextVecEnv

OBSERVATION = observation_of([[5, 6, 7], [5, 9]], [2, 2])
SAID = r"are not finite, the first of which is '(lm\.)?model\.transformer\.wte\.weight'\. Load weights that are finite"


def broken_policy(**kwargs: Any) -> CausalLMPolicy:
    """A policy for which the token 9 is not a number, and nothing else."""
    policy = make_policy(make_env(), model=make_model("gpt2", tie_word_embeddings=False), **kwargs)
    with torch.no_grad():
        policy.lm.model.get_input_embeddings().weight[9] = float("nan")
    return policy


WAYS: dict[str, Callable[[CausalLMPolicy], Any]] = {
    "forward": lambda policy: policy.forward(OBSERVATION),
    "greedy": lambda policy: policy.forward(OBSERVATION, deterministic=True),
    "predict": lambda policy: policy.predict({name: x.numpy() for name, x in OBSERVATION.items()}),
    "evaluate_actions": lambda policy: policy.evaluate_actions(OBSERVATION, torch.tensor([3, 4])),
    "get_distribution": lambda policy: policy.get_distribution(OBSERVATION),
}


@pytest.mark.parametrize("grad", [True, False], ids=["with gradient", "without"])
@pytest.mark.parametrize("way", WAYS)
def test_every_method_names_the_context_and_the_parameter(way: str, grad: bool) -> None:
    policy = broken_policy()
    with torch.set_grad_enabled(grad), pytest.raises(FloatingPointError) as caught:
        WAYS[way](policy)
    message = str(caught.value)
    assert "log-probabilities after 1 of 2 contexts" in message
    assert "number 1 with 2 tokens, [5, 9]," in message
    assert re.search(rf"1 of the parameters of CausalLM(Policy)? {SAID}", message)


def test_a_context_without_the_broken_token_is_fine() -> None:
    broken_policy().forward(observation_of([[5, 6, 7]], [2]))


def test_a_value_that_is_not_a_number_is_told_from_a_log_probability() -> None:
    policy = make_policy(make_env())
    with torch.no_grad():
        policy.value_head.bias.fill_(float("nan"))
    for call in (
        lambda: policy.forward(OBSERVATION),
        lambda: policy.predict_values(OBSERVATION),
        lambda: policy.evaluate_actions(OBSERVATION, torch.tensor([3, 4])),
    ):
        with pytest.raises(FloatingPointError, match=r"^Expected finite numbers, but values after 2 .*head\.bias'"):
            call()


def test_infinite_weights_are_found_as_well() -> None:
    policy = make_policy(make_env())
    with torch.no_grad():
        policy.lm.model.transformer.ln_f.weight.fill_(float("inf"))
    for way in WAYS.values():
        with pytest.raises(FloatingPointError, match=r"log-probabilities after .*ln_f\.weight"):
            way(policy)


def test_numbers_that_overflow_are_told_from_weights_that_are_broken() -> None:
    policy = make_policy(make_env(), model=make_model("gpt2").half(), dtype="float16")
    with torch.no_grad():
        policy.lm.model.transformer.ln_f.weight.fill_(6e4)
        policy.lm.model.transformer.ln_f.bias.fill_(6e4)
    with pytest.raises(FloatingPointError, match="all parameters of CausalLMPolicy are finite, so numbers have overfl"):
        policy.forward(OBSERVATION)


def test_a_model_whose_weights_are_not_numbers_is_refused_at_once() -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"logits of a first context are NaN.*h\.1\.mlp\.c_fc\.bias'"):
        make_policy(make_env(), model=model)


def test_sampling_from_no_numbers_gives_a_token_all_the_same() -> None:
    """An index beyond the vocabulary would end a GPU's whole process."""
    tokens = sample(torch.full((64, 10), float("nan")))
    assert ((tokens >= 0) & (tokens < 10)).all()


def break_weights(policy: Any) -> None:
    with torch.no_grad():
        policy.lm.model.transformer.wte.weight.fill_(float("nan"))


@pytest.mark.parametrize("device_checks", [True, False], ids=["cpu", "like a gpu"])
def test_a_rollout_says_so(device_checks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU `forward` does not look, since that would wait for the device once more a token."""
    model = make_ppo()
    break_weights(model.policy)
    if not device_checks:
        monkeypatch.setattr(CausalLMPolicy, "check_numbers", lambda *_: None)
    with pytest.raises(FloatingPointError, match=SAID):
        model.learn(8)
    with pytest.raises(FloatingPointError, match=SAID):
        sample_texts(model.policy, make_env(1), ["a"])


def test_stock_algorithms_and_evaluations_say_so() -> None:
    env = TextVecEnv(make_env(2))
    model = sb3.PPO(CausalLMPolicy, env, n_steps=4, batch_size=8, policy_kwargs={"model": make_model()}, device="cpu")
    break_weights(model.policy)
    with pytest.raises(FloatingPointError, match=SAID):
        model.learn(8)
    with pytest.raises(FloatingPointError, match=SAID):
        evaluate_policy(model, env, n_eval_episodes=1)


def test_a_reference_says_so() -> None:
    reference = Reference.of(make_policy(make_env()))
    with torch.no_grad():
        reference.lm.model.transformer.wte.weight[6] = float("nan")
    batch = {
        "input_ids": torch.tensor([[5, 6, 7]]),
        "action_mask": torch.tensor([[False, True, True]]),
        "prompt_length": torch.tensor([[2]]),
    }
    with pytest.raises(FloatingPointError, match=r"number 0 with 2 tokens, \[5, 6\], are NaN: .* of CausalLM .*wte"):
        reference.log_probs(batch, torch.tensor([9, 10]))


@pytest.mark.parametrize(("make", "parameter"), [(ReferenceTopK, 5), (ReferenceTopP, 0.9), (ReferenceMinP, 0.1)])
def test_the_most_probable_of_no_numbers_are_none_which_is_said(make: Any, parameter: float) -> None:
    constraint = make(make_model(), parameter, device="cpu")
    policy = make_policy(make_env(), constraint=constraint)
    with torch.no_grad():
        constraint._lm.model.transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"the probabilities of Reference\w+\(.*\) after .* \[5, 6, 7\]"):
        policy.forward(OBSERVATION)


def test_features_of_no_numbers_say_so() -> None:
    features = TokenFeatures(make_env().single_observation_space, model=make_model())
    with torch.no_grad():
        features.encoder.lm._model.transformer.wte.weight.fill_(float("nan"))  # type: ignore[union-attr]
    with pytest.raises(FloatingPointError, match=r"hidden states after 2 of 2 contexts.*transformer\.wte\.weight"):
        features({name: x.float() for name, x in OBSERVATION.items()})
