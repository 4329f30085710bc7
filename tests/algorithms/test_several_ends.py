"""A model whose generation config lists several ends of text: policy, reference, penalty and files know all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stable_baselines3
import torch
from learners import PROMPTS, even_tokens, largest_difference, make_ppo, plain_log_probs, weights_of
from tiny import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from agents.algorithms.ppo import PPO
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy, load_policy
from agents.rollouts.sb3_vec_env import make_vec_env
from text_env.vector_env import TextVectorEnv

EOS, ENDS = 0, (0, 2, 3)  # the tokenizer's, and with it those of the model


@pytest.fixture
def model(tmp_path: Path) -> str:
    """The name of a random Llama that ends its texts by 2 or 3, which the tokenizer knows nothing of."""
    llama = tiny_model("llama", initializer_range=0.2)
    with torch.no_grad():  # each of the ends has a good chance
        llama.model.norm.weight.mul_(2.0)
        llama.lm_head.weight[[2, 3]] = llama.lm_head.weight[40:240].mean(dim=0) + 0.3
    llama.generation_config.eos_token_id = [2, 3]
    llama.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [2, 3]
    return str(tmp_path / "model")


def make(model: str, **kwargs: Any) -> TextVectorEnv:
    settings = {"prompts": PROMPTS, "reward": even_tokens, "max_prompt_tokens": 16, "max_new_tokens": 24}
    return TextVectorEnv(4, tokenizer=model, **{**settings, **kwargs})


def learner(model: str, env: TextVectorEnv | None = None, **kwargs: Any) -> PPO:
    return make_ppo(make(model) if env is None else env, model, **{"n_episodes": 64, "batch_size": 32, **kwargs})


def last_tokens(ppo: PPO) -> np.ndarray:
    return ppo.buffer.actions[ppo.buffer.starts[1:] - 1]


def test_texts_end_at_each_of_them_and_none_of_these_pays_the_penalty(model: str) -> None:
    ppo = learner(model, missing_eos_penalty=100.0).learn(1, log_interval=0)
    ended = np.isin(last_tokens(ppo), ENDS)
    assert {2, 3} <= set(last_tokens(ppo).tolist())
    assert 0 < ended.mean() < 1
    rewards = ppo.buffer.rewards[ppo.buffer.starts[1:] - 1]
    assert (rewards[ended] > -50).all()
    assert (rewards[~ended] < -50).all()
    assert ppo.logger.name_to_value["completions/clipped_ratio"] == np.mean(~ended)
    inside = np.ones(len(ppo.buffer.actions), bool)
    inside[ppo.buffer.starts[1:] - 1] = False
    assert not np.isin(ppo.buffer.actions[inside], ENDS).any()


def test_policy_and_reference_forbid_all_of_them_before_the_minimum_length(model: str) -> None:
    ppo = learner(model, make(model, min_new_tokens=5)).learn(1)
    assert ppo.reference is not None
    assert ppo.policy.distribution.eos_token_ids == ppo.reference.distribution.eos_token_ids == ENDS
    assert ppo.buffer.lengths.min() >= 6
    loaded = Reference.load(model, 300, "cpu", min_new_tokens=5)
    loaded.distribution.check_same(ppo.policy.distribution, "loaded", "policy")
    samples = ppo.buffer.pack(np.arange(8))
    fresh = learner(model, make(model, min_new_tokens=5))
    log_probs = loaded.log_probs(samples.observations, samples.actions)
    with torch.no_grad():
        _, ours, _ = fresh.policy.evaluate_actions(samples.observations, samples.actions)
    assert torch.allclose(log_probs, ours, atol=1e-5)


def test_what_is_sampled_is_what_is_scored(model: str) -> None:
    ppo = learner(model, make(model, min_new_tokens=3), learning_rate=0.0).learn(1, log_interval=0)
    assert ppo.logger.name_to_value["train/ratio_first_max"] < 1e-4
    buffer = ppo.buffer
    prompt_length = int(buffer.pack(np.array([0])).observations["prompt_length"][0])
    context = buffer.pack(np.array([0])).observations["input_ids"][0, :prompt_length].tolist()
    for step, action in enumerate(buffer.actions[: buffer.starts[1]].tolist()):
        expected = plain_log_probs(ppo.policy, context, step)
        assert (expected[list(ENDS)] == -torch.inf).all() == (step < 3)
        assert buffer.log_probs[step] == pytest.approx(float(expected[action]), abs=1e-4)
        context.append(action)


def test_a_policy_without_an_environment_takes_the_models_own(model: str) -> None:
    env = make_vec_env(
        "TextRLHF-v0",
        2,
        env_kwargs={"tokenizer": model, "reward": even_tokens, "prompts": PROMPTS, "max_new_tokens": 4},
    )
    kwargs = {"model": model, "min_new_tokens": 2}
    ppo = stable_baselines3.PPO(CausalLMPolicy, env, n_steps=4, batch_size=8, policy_kwargs=kwargs, device="cpu")
    assert ppo.policy.distribution.eos_token_ids == ENDS
    ppo.learn(8)


@pytest.mark.parametrize("ids", [2, [3, 2], (2, 3)])
def test_a_policy_is_given_one_or_several(model: str, ids: Any) -> None:
    env = make(model)
    policy = CausalLMPolicy(
        env.single_observation_space, env.single_action_space, lambda _: 0.1, model, eos_token_id=ids
    )
    assert policy.distribution.eos_token_ids == tuple(sorted({ids} if isinstance(ids, int) else ids))


def test_an_end_outside_the_vocabulary_is_refused(model: str) -> None:
    with pytest.raises(ValueError, match=r"lie in \[0, 300\), the environment's tokens, got eos_token_id \[300\]"):
        learner(model, policy_kwargs={"eos_token_id": [2, 300]})


def test_a_policy_that_knows_fewer_ends_than_the_environment_is_refused_where_it_matters(model: str) -> None:
    with pytest.raises(ValueError, match=r"eos_token_ids is \(0, 2\) for the policy and \(0, 2, 3\) for the env"):
        learner(model, make(model, min_new_tokens=1), policy_kwargs={"eos_token_id": [0, 2]})
    learner(model, policy_kwargs={"eos_token_id": [0, 2]})


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_a_saved_policy_ends_its_texts_where_it_was_trained_to(model: str, tmp_path: Path, lora: Any) -> None:
    ppo = learner(model, make(model, eos_token_ids=[5, 7]), policy_kwargs={"lora": lora}).learn(1)
    ppo.policy.save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "generation_config.json").read_text())["eos_token_id"]
    assert said == [0, 5, 7]
    env = make(str(tmp_path / "saved"))
    assert env.eos_token_ids == (0, 5, 7)
    assert load_policy(str(tmp_path / "saved"), env, "cpu").distribution.eos_token_ids == (0, 5, 7)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    if lora is None:  # of an adapter transformers reads the base's
        assert loaded.generation_config.eos_token_id == [0, 5, 7]
    assert ppo.policy.lm.model.generation_config.eos_token_id == [2, 3]  # the model itself is left alone


def test_a_resumed_run_is_the_run_that_was_never_stopped(model: str, tmp_path: Path) -> None:
    whole = learner(model, make(model, min_new_tokens=2)).learn(1)
    whole.save(tmp_path / "checkpoint")
    whole.learn(1, reset_num_timesteps=False)
    resumed = PPO.load(tmp_path / "checkpoint", env=make(model, min_new_tokens=2), device="cpu")
    resumed.learn(1, reset_num_timesteps=False)
    assert np.array_equal(whole.buffer.actions, resumed.buffer.actions)
    assert largest_difference(weights_of(whole.policy), weights_of(resumed.policy)) == 0.0
    assert PPO.load(tmp_path / "checkpoint", device="cpu").policy.distribution.eos_token_ids == ENDS
    with pytest.raises(ValueError, match=r"eos_token_ids was \[0, 2, 3\] and is \[0\]"):
        PPO.load(tmp_path / "checkpoint", env=make(model, min_new_tokens=2, eos_token_ids=()), device="cpu")


def test_an_environment_by_name_ends_texts_as_the_policys_model_does(model: str) -> None:
    ppo = PPO("CausalLMPolicy", "TextRLHF-v0", n_episodes=4, policy_kwargs={"model": model}, device="cpu", seed=0)
    assert ppo.vector_env.eos_token_ids == ppo.policy.distribution.eos_token_ids == ENDS
