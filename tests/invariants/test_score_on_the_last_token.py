"""Invariant 7: the score lands on the true last token, also when pad is eos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import stable_baselines3 as sb3
import torch
from learners import EOS, make_env, make_model, make_policy, make_ppo
from tiny import tiny_tokenizer

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sb3_vec_env import TextVecEnv

SCORED: list[tuple[list[int], float]] = []


def numbered(completions: Sequence[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A different score for every text, written down with the text."""
    scores = [float(len(SCORED) + 1 + i) for i in range(len(completions))]
    SCORED.extend(zip(completion_ids, scores, strict=True))
    return scores


@pytest.fixture(autouse=True)
def _no_scores_yet() -> None:
    SCORED.clear()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("pad", [True, False], ids=["own pad token", "pad is eos"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_every_text_carries_its_own_score_on_its_last_token(kind: str, pad: bool, rows: int) -> None:
    env = make_env(rows, tokenizer=tiny_tokenizer(pad=pad), reward=numbered)
    assert (env.pad_token_id == EOS) is not pad
    model = make_model(kind, tokenizer=env.tokenizer, ends=0.2)
    policy = make_policy(env, model=model)
    buffer = EpisodeBuffer(0, env.single_observation_space, env.single_action_space, "cpu", n_envs=rows)
    infos = collect_episodes(policy, env, 16, buffer)
    buffer.finalize()
    assert buffer.n_episodes == 16
    assert {info["finish_reason"] for info in infos} == {"eos", "length"}
    for number, info in enumerate(infos):
        steps = slice(buffer.starts[number], buffer.starts[number + 1])
        rewards, tokens = buffer.rewards[steps], buffer.actions[steps].tolist()
        assert (rewards[:-1] == 0).all()
        assert (tokens, float(rewards[-1])) in SCORED
        assert info["score"] == rewards[-1]
        assert info["length"] == len(tokens)
        assert (tokens[-1] == EOS) == (info["finish_reason"] == "eos")
        assert EOS not in tokens[:-1]


def test_with_eos_allowed_late_an_early_eos_is_not_mistaken_for_the_end() -> None:
    """pad = eos, and EOS inside the text: only counting tells where it ends."""
    env = make_env(1, tokenizer=tiny_tokenizer(pad=False), reward=numbered, min_new_tokens=3)
    buffer = EpisodeBuffer(0, env.single_observation_space, env.single_action_space, "cpu", n_envs=1)
    script = iter([EOS, 5, EOS, 7, EOS])

    def policy(observation: Any, deterministic: bool) -> tuple[Any, Any, Any]:
        return torch.tensor([next(script)]), torch.zeros(1, 1), torch.zeros(1)

    [info] = collect_episodes(policy, env, 1, buffer)  # type: ignore[arg-type]
    buffer.finalize()
    assert buffer.actions.tolist() == [EOS, 5, EOS, 7, EOS]
    assert buffer.rewards.tolist() == [0, 0, 0, 0, 1]
    assert info["finish_reason"] == "eos"


@pytest.mark.parametrize("pad", [True, False], ids=["own pad token", "pad is eos"])
def test_the_score_is_on_the_last_token_in_a_rollout_of_stock_sb3(pad: bool) -> None:
    env = make_env(3, tokenizer=tiny_tokenizer(pad=pad), reward=numbered)
    model = sb3.A2C(
        CausalLMPolicy,
        TextVecEnv(env),
        n_steps=20,
        seed=0,
        device="cpu",
        rollout_buffer_class=EpisodeBuffer,
        policy_kwargs={"model": make_model(tokenizer=env.tokenizer, ends=0.2)},
    )
    model.learn(60)
    buffer = model.rollout_buffer
    assert isinstance(buffer, EpisodeBuffer)
    texts = {(tuple(ids), score) for ids, score in SCORED}
    paid = 0
    for start, end in zip(buffer.starts, buffer.starts[1:], strict=False):
        assert (buffer.rewards[start : end - 1] == 0).all()
        if buffer.rewards[end - 1] != 0:
            assert (tuple(buffer.actions[start:end].tolist()), float(buffer.rewards[end - 1])) in texts
            paid += 1
    assert paid == len(SCORED)
    assert buffer.n_episodes - paid <= 3  # at most one text a row was cut by the end of the rollout


@pytest.mark.parametrize("pad", [True, False], ids=["own pad token", "pad is eos"])
def test_whole_rollouts_of_ppo_pay_every_score_once(pad: bool) -> None:
    env = make_env(3, tokenizer=tiny_tokenizer(pad=pad), reward=numbered)
    model = make_ppo(env, make_model(tokenizer=env.tokenizer, ends=0.2), kl_coef=0.0)
    model.learn(1)
    last = model.buffer.starts[1:] - 1
    assert sorted(model.buffer.rewards[last]) == sorted(score for _, score in SCORED)
    assert model.buffer.rewards.sum() == sum(score for _, score in SCORED)
