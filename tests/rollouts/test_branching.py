"""Branches: values that are measured, on tasks whose values can be worked out by hand, and what they leave alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learners import EOS, counted_forwards, make_env, make_model, make_policy
from tiny import tiny_model

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.branching import Branches, branch, step_starts
from agents.rollouts.sampling import collect_texts
from text_env.probes import VOCABULARY, make_probe
from text_env.vector_env import TextVectorEnv

SEVEN, OTHER = VOCABULARY.index("7"), VOCABULARY.index("3")


def uniform_policy(env: TextVectorEnv, n_tokens: int) -> CausalLMPolicy:
    """Every token with the same probability, whatever came before."""
    model = tiny_model("gpt2", n_tokens, num_hidden_layers=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    return make_policy(env, model=model)


def branched(policy: CausalLMPolicy, env: TextVectorEnv, *args: Any) -> Branches:
    branches = branch(policy, env, *args)
    branches.buffer.finalize()
    return branches


def test_once_the_first_token_has_decided_every_branch_says_so() -> None:
    env = make_probe("early-credit", 8)
    policy = uniform_policy(env, len(VOCABULARY))
    states = [[SEVEN], [OTHER], [SEVEN, OTHER], [OTHER, SEVEN, SEVEN]]
    branches = branched(policy, env, ["0"] * 4, states, 5)
    np.testing.assert_array_equal(branches.scores, np.repeat([[1.0], [0.0], [1.0], [0.0]], 5, axis=1))
    np.testing.assert_array_equal(branches.returns(1.0), branches.scores)


def test_the_mean_over_enough_branches_is_the_value_worked_out_by_hand() -> None:
    # The share of sevens in four tokens, each 1 of 12, of which one ends the text. Of m tokens that are left, the
    # expected number of sevens is E_m = 1/12 · (1 + E_{m−1}) + 10/12 · E_{m−1}, with E_0 = 0:
    # 0.0833, 0.1597, 0.2297, 0.2939.
    env = make_probe("fixed-token", 512)
    policy = uniform_policy(env, len(VOCABULARY))
    states = [[], [OTHER], [SEVEN, OTHER], [SEVEN, SEVEN, SEVEN]]
    values = branched(policy, env, ["0"] * 4, states, 4000).scores.mean(axis=1)
    expected = np.array([0.2939, 0.2297, 1 + 0.1597, 3 + 0.0833]) / 4
    np.testing.assert_allclose(values, expected, atol=0.01)  # the standard error is 0.002


def test_a_branch_has_what_is_left_of_the_budget_and_is_scored_as_a_whole_text() -> None:
    seen: list[list[int]] = []

    def remember(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(map(list, completion_ids))
        return [float(len(ids)) for ids in completion_ids]

    env = make_env(4, reward=remember, max_new_tokens=6)
    policy = make_policy(env, model=make_model(ends=0.1))
    states = [[7, 8, 9, 10, 11], [], [12, 13]]
    branches = branched(policy, env, ["a", "The movie", "a"], states, 4)
    assert len(seen) == 12
    for state in states:
        own = [ids for ids in seen if ids[: len(state)] == state]
        assert len(own) >= 4
        assert all(len(ids) == 6 or ids[-1] == EOS for ids in own)
    # In the order of the states, whatever order they were continued in; only chosen tokens are actions.
    assert branches.scores.shape == (3, 4)
    assert (branches.scores[0] == 6).all()
    written = np.empty(12)
    written[:] = [info["score"] for info in branches.episodes]
    given = np.repeat([len(states[i]) for i in branches.order], 4)
    np.testing.assert_array_equal(branches.buffer.lengths, written - given)


def test_rewards_are_given_the_columns_of_the_prompt_that_is_continued() -> None:
    prompts = [{"prompt": "a", "answer": "one"}, {"prompt": "a", "answer": "two"}]  # told apart by nothing else

    def reward(completions: list[str], answer: list[str | None], **_: Any) -> list[float]:
        return [{"one": 1.0, "two": 2.0}[str(expected)] for expected in answer]

    env = make_env(6, prompts=prompts, reward=reward)
    policy = make_policy(env, model=make_model())
    buffer, episodes = collect_texts(policy, env, 10)
    buffer.finalize()
    assert {episode["score"] for episode in episodes} == {1.0, 2.0}
    states = [buffer.response_before(episode, 2) for episode in range(10)]
    branches = branch(policy, env, buffer.prompts, states, 3)
    expected = np.repeat([[episode["score"]] for episode in episodes], 3, axis=1)
    np.testing.assert_array_equal(branches.scores, expected)


def test_a_state_of_a_rollout_is_what_the_policy_saw_there() -> None:
    env = make_env(3)
    policy = make_policy(env, model=make_model(ends=0.1))
    given = ["a", "The movie", "I loved this", "a"]
    buffer, _ = collect_texts(policy, env, 4, prompts=given, responses=[[7, 8], None, [9], []])
    buffer.finalize()
    assert [prompt.text for prompt in buffer.prompts] == given
    for episode, begun in enumerate(([7, 8], [], [9], [])):
        chosen = buffer.actions[buffer.starts[episode] : buffer.starts[episode + 1]].tolist()
        for action in range(len(chosen)):
            assert buffer.response_before(episode, action).tolist() == [*begun, *chosen[:action]]


def test_joined_buffers_have_the_prompts_of_both() -> None:
    env = make_env(3)
    policy = make_policy(env, model=make_model(ends=0.1))
    one, _ = collect_texts(policy, env, 2, prompts=["a", "The movie"])
    other, _ = collect_texts(policy, env, 1, prompts=["I loved this"])
    one.extend(other)
    assert [prompt.text for prompt in one.prompts] == ["a", "The movie", "I loved this"]


def test_the_environment_goes_on_as_if_nobody_had_branched() -> None:
    played = []
    for branching in (False, True):
        env = make_env(4, group_size=2)
        policy = make_policy(env, model=make_model(ends=0.2))
        observation, _ = env.reset(seed=3)
        rng = np.random.default_rng(0)
        told = []
        for step in range(20):
            if branching and step in (1, 7):
                branch(policy, env, ["a", "The movie"], [[5], [6, 7]], 3)
            observation, rewards, ended, _, _ = env.step(rng.integers(0, 40, 4))
            told.append((observation["input_ids"], rewards, ended, env.autoreset_mode))
        played.append(told)
    for plain, disturbed in zip(*played, strict=True):
        np.testing.assert_array_equal(plain[0], disturbed[0])
        np.testing.assert_array_equal(plain[1], disturbed[1])
        np.testing.assert_array_equal(plain[2], disturbed[2])
        assert plain[3] == disturbed[3]


def test_the_memo_reads_each_state_about_once_however_often_it_is_continued() -> None:
    env = make_env(64, max_new_tokens=48)
    policy = make_policy(env, model=make_model())
    buffer, _ = collect_texts(policy, env, 8)
    buffer.finalize()
    states = [(episode, first) for episode in range(8) for first in range(0, int(buffer.lengths[episode]), 12)]
    prompts = [buffer.prompts[episode] for episode, _ in states]
    responses = [buffer.response_before(*state) for state in states]
    contexts = sum(len(prompt.token_ids) + len(ids) for prompt, ids in zip(prompts, responses, strict=True))
    policy.clear_cache()
    with counted_forwards(policy.lm.backbone) as shapes:
        branch(policy, env, prompts, responses, 8)
    read = sum(rows * columns for rows, columns in shapes if columns > 1)
    assert read < 1.2 * contexts  # padding included; without the memo, more than 8 times as many


def test_a_state_without_a_response_may_be_none_as_for_a_reset() -> None:
    env = make_env(2)
    policy = make_policy(env, model=make_model(ends=0.1))
    branches = branch(policy, env, ["a", "The movie"], [None, [5, 6]], 2)
    assert branches.order.tolist() == [1, 0]
    assert [episode["prompt"] for episode in branches.episodes] == ["The movie"] * 2 + ["a"] * 2


def test_what_cannot_be_continued_is_refused() -> None:
    env = make_env(2)
    policy = make_policy(env, model=make_model())
    with pytest.raises(ValueError, match="n_branches >= 1, got 0"):
        branch(policy, env, ["a"], [[]], 0)
    with pytest.raises(ValueError, match=r"can be continued.*end-of-text token"):
        branch(policy, env, ["a"], [[5, EOS]], 2)


def test_a_step_has_so_many_tokens_or_ends_where_a_string_is_complete() -> None:
    tokenizer = make_env(1).tokenizer
    assert step_starts([5, 6, 7, 8, 9], 2, None, tokenizer) == [0, 2, 4]
    assert step_starts([5, 6], 2, None, tokenizer) == [0]
    text = "I am.\nIt was\n\nso"
    ids = tokenizer(text)["input_ids"]
    for split, pieces in (("\n", ["I am.\n", "It was\n", "\n", "so"]), ("\n\n", ["I am.\nIt was\n\n", "so"])):
        first = step_starts(ids, 99, split, tokenizer)
        assert [tokenizer.decode(ids[i:j]) for i, j in zip(first, [*first[1:], len(ids)], strict=True)] == pieces
    # A string at the very end begins no further step.
    assert step_starts(tokenizer("am\n")["input_ids"], 99, "\n", tokenizer) == [0]
