"""Gradient checkpointing: less is kept, layers run twice, and the gradient is the same."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from learners import largest_difference, make_env, make_model, make_policy, make_ppo, observation_of, weights_of
from tiny import KINDS
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.sampling import sample_texts

OBSERVATION = observation_of([[5, 6, 7], [5, 9], [5, 6, 7, 8]], [2, 2, 2])
ACTIONS = torch.tensor([3, 4, 5])
# Dropout that would show if it were on.
DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5},
    "llama": {"attention_dropout": 0.5},
    "qwen2": {"attention_dropout": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5},
}


def switch(model: Any, on: bool) -> None:
    """As its user does; newer releases of transformers warn that this has another name now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()


def layers_of(policy: CausalLMPolicy) -> Any:
    return next(module for module in policy.lm.backbone.modules() if isinstance(module, torch.nn.ModuleList))


def gradient(policy: CausalLMPolicy) -> tuple[dict[str, torch.Tensor], int]:
    """The gradient of a loss of everything, and how often a part of the first layer ran for it."""
    runs = []
    norm = next(m for m in layers_of(policy)[0].modules() if "Norm" in type(m).__name__)
    handle = norm.register_forward_hook(lambda *_: runs.append(1))
    policy.set_training_mode(True)
    policy.optimizer.zero_grad()
    values, log_prob, entropy = policy.evaluate_actions(OBSERVATION, ACTIONS)
    assert entropy is not None
    (values.sum() + log_prob.sum() + entropy.sum()).backward()
    handle.remove()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}, len(runs)


@pytest.mark.parametrize("how", ["argument", "live model"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_run_twice_and_the_gradient_is_that_without_dropout(kind: str, how: str) -> None:
    model = make_model(kind, **DROPOUT[kind])
    plain, once = gradient(make_policy(make_env(), model=copy.deepcopy(model)))
    if how == "live model":
        switch(model, True)
    policy = make_policy(make_env(), model=model, gradient_checkpointing=how == "argument")
    checkpointed, twice = gradient(policy)
    assert (once, twice) == (1, 2)
    assert largest_difference(plain, checkpointed) == 0.0
    assert len(plain) > 10
    assert not any(module.training for module in policy.lm.modules())


def test_it_can_be_switched_on_and_off_between_two_updates() -> None:
    policy = make_policy(make_env())
    assert gradient(policy)[1] == 1
    switch(policy.lm.model, True)
    assert gradient(policy)[1] == 2
    switch(policy.lm.model, False)
    assert gradient(policy)[1] == 1


def test_a_users_own_checkpoint_function_is_the_one_that_is_called() -> None:
    model, calls = make_model(), []
    switch(model, True)
    for layer in model.transformer.h:
        own = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *args, own=own: (calls.append(1), own(*args))[1]
    gradient(make_policy(make_env(), model=model))
    assert len(calls) == len(model.transformer.h)


def test_sampling_keeps_its_memo_and_runs_no_layer_twice() -> None:
    texts = [
        sample_texts(make_policy(make_env(1), gradient_checkpointing=on), make_env(1), ["a"], deterministic=True)[0]
        for on in (False, True)
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("extra", [{"lora": {"r": 4}}, {"separate_critic": True}], ids=str)
def test_training_ends_with_the_weights_that_it_ends_with_without(extra: dict[str, Any]) -> None:
    runs = []
    for on in (False, True):
        model = make_ppo(policy_kwargs={"gradient_checkpointing": on, **extra})
        if "separate_critic" in extra:
            assert gradient(model.policy)[1] == 1 + on
        runs.append(weights_of(model.learn(60).policy))
    assert largest_difference(*runs) == 0.0


def test_a_copy_of_the_policy_is_checkpointed_by_itself() -> None:
    policy = make_policy(make_env(), gradient_checkpointing=True)
    gradient(policy)
    twin = copy.deepcopy(policy)
    expected, _ = gradient(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    actual, twice = gradient(twin)
    assert twice == 2
    assert largest_difference(expected, actual) == 0.0


def test_a_model_without_such_layers_is_refused() -> None:
    config = CONFIG_MAPPING["openai-gpt"](vocab_size=300, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match=r"got OpenAIGPTLMHeadModel, which has no GradientCheckpointingLayer: use"):
        make_policy(make_env(), model=AutoModelForCausalLM.from_config(config), gradient_checkpointing=True)


def test_both_checkpointing_and_compiling_is_refused() -> None:
    with pytest.raises(ValueError, match=r"compile_forward=True, got both"):
        make_policy(make_env(), gradient_checkpointing=True, compile_forward=True)
