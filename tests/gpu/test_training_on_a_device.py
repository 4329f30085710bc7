"""Rollouts, updates and evaluations leave nothing behind on another device than the policy's, and learn there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import even_tokens, largest_difference, length_of, make_env, make_model, make_policy, make_ppo, weights_of
from tiny import tiny_classifier, tiny_tokenizer

from agents.algorithms.grpo import GRPO
from agents.evaluation.evaluate import evaluate
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.sampling import collect_texts
from text_env.classifier_reward import SequenceClassifierReward
from text_env.rewards import FinishedTexts, score

LORA = {"r": 4, "target_modules": "all-linear"}
TEXTS = FinishedTexts(["The movie", "I loved", "a"], [" was good", " this film so much", " b"], [[5, 6], [7], [8]])


@pytest.mark.parametrize(
    "policy_kwargs",
    [{}, {"lora": LORA}, {"separate_critic": True}, {"value_bins": (-1.0, 2.0, 11)}, {"prefix_cache": False}],
    ids=["value head", "lora", "separate critic", "value bins", "no memo"],
)
def test_an_iteration_learns_and_everything_stays_on_the_device(
    device: str, dtype: torch.dtype, policy_kwargs: dict[str, Any]
) -> None:
    model = make_ppo(
        model=make_model("llama", ends=0.2).to(dtype), device=device, policy_kwargs=policy_kwargs, learning_rate=1e-2
    )
    before = weights_of(model.policy)
    model.learn(60, log_interval=0)
    assert largest_difference(before, weights_of(model.policy)) > 1e-3
    assert {parameter.device.type for parameter in model.policy.parameters()} == {device}
    samples = model.buffer.pack(np.arange(2))
    assert {tensor.device.type for tensor in (*samples[1:], *samples.observations.values())} == {device}
    for state in model.policy.optimizer.state.values():
        assert {state[name].device.type for name in ("exp_avg", "exp_avg_sq")} == {device}
    assert model.reference is not None
    assert model.reference.log_probs(samples.observations, samples.actions).device.type == device
    assert np.isfinite(model.buffer.log_probs).all()


def test_grpo_learns_on_the_device_from_groups_and_their_exact_divergence(device: str) -> None:
    env = make_env(8, group_size=4)
    model = make_ppo(env, make_model("llama", ends=0.2), GRPO, device=device, learning_rate=1e-2)
    before = weights_of(model.policy)
    model.learn(60, log_interval=0)
    assert largest_difference(before, weights_of(model.policy)) > 1e-3


def test_an_evaluation_on_the_device_tells_long_texts_from_short_ones(device: str) -> None:
    env = make_env(8, reward=length_of, metrics={"gold_score": even_tokens})
    policy, reference = (make_policy(env, model=make_model(ends=ends)).to(device) for ends in (0.6, 0.05))
    torch.manual_seed(0)
    result = evaluate(policy, reference, env, 40)
    assert result["policy"]["score"] < result["reference"]["score"] - 1
    assert result["kl"] > 0.5
    assert 0 < result["perplexity"] < np.inf


def test_a_reward_model_on_the_device_scores_as_on_the_cpu(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_classifier("llama", tokenizer, pad_token_id=tokenizer.pad_token_id).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    name = str(dtype).removeprefix("torch.")
    here = SequenceClassifierReward(tmp_path, device=device, dtype=name, batch_size=2)
    on_cpu = SequenceClassifierReward(tmp_path, device="cpu")
    assert here.model.device.type == device
    assert here.model.dtype == dtype
    expected = score(on_cpu, TEXTS)
    assert np.std(expected) > 0.1
    assert score(here, TEXTS) == pytest.approx(expected, abs=1e-3 if dtype == torch.float32 else 0.2)


def test_a_rollout_pays_what_a_reward_model_on_the_device_says(device: str) -> None:
    tokenizer = tiny_tokenizer()
    classifier = tiny_classifier("llama", tokenizer, pad_token_id=tokenizer.pad_token_id).to(device)
    env = make_env(reward=SequenceClassifierReward(classifier, tokenizer))
    policy: CausalLMPolicy = make_policy(env, model=make_model(ends=0.2)).to(device)
    buffer, infos = collect_texts(policy, env, 6)
    buffer.finalize()
    paid = buffer.episode_sums(buffer.rewards)
    assert paid == pytest.approx([info["score"] for info in infos], abs=1e-5)
    assert np.std(paid) > 0.01
