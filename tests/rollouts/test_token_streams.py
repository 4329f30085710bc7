"""An episode is one stream of tokens, some of which the policy chose: also where the environment writes in between."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learners import counted_forwards, make_env, make_model, make_policy, make_ppo, observation_of
from numpy.typing import NDArray

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from text_env.streams import TokenStream
from text_env.vector_env import TextVectorEnv

ANSWER = (40, 41)


class AnsweringEnv(TextVectorEnv):
    """After every second token it writes two of its own, as a tool that answers would."""

    def step(self, actions: NDArray[np.int64]) -> Any:
        _, rewards, terminated, truncated, infos = super().step(actions)
        episodes = self.episodes
        for row in np.flatnonzero(~episodes.finished):
            length = int(episodes._length[row])
            response = length - int(episodes._prompt_length[row])
            if response % 4 == 2 and response + len(ANSWER) < self.max_new_tokens:
                new = slice(length, length + len(ANSWER))
                episodes._input_ids[row, new] = ANSWER
                episodes._attention_mask[row, new] = 1
                episodes._length[row] = new.stop
        return episodes.observe(), rewards, terminated, truncated, infos


def answering_env(n: int = 4, max_new_tokens: int = 12) -> AnsweringEnv:
    env = make_env(n, max_new_tokens=max_new_tokens)
    return AnsweringEnv(
        n, tokenizer=env.tokenizer, prompts=["The movie", "a"], reward=env.reward, max_new_tokens=max_new_tokens
    )


def buffer_of(env: TextVectorEnv, **kwargs: Any) -> EpisodeBuffer:
    spaces = env.single_observation_space, env.single_action_space
    return EpisodeBuffer(0, *spaces, "cpu", n_envs=env.num_envs, **kwargs)


def collected(kind: str = "llama") -> tuple[AnsweringEnv, CausalLMPolicy, EpisodeBuffer]:
    env = answering_env()
    policy = make_policy(env, model=make_model(kind, ends=0.1))
    buffer = buffer_of(env)
    torch.manual_seed(3)
    collect_episodes(policy, env, env.num_envs, buffer)
    buffer.finalize()
    return env, policy, buffer


def streams_of(buffer: EpisodeBuffer) -> list[TokenStream]:
    parts = np.split(np.arange(len(buffer.tokens)), np.cumsum(buffer._stream_lengths)[:-1])
    return [
        TokenStream(tuple(buffer.tokens[part].tolist()), tuple(buffer.is_action[part].tolist()), prompt_length)
        for part, prompt_length in zip(parts, buffer._prompt_lengths, strict=True)
    ]


def test_the_buffer_holds_the_streams_that_the_environment_wrote_down() -> None:
    env, _, buffer = collected()
    streams = streams_of(buffer)
    assert streams == [env.stream(row) for row in range(env.num_envs)]
    assert max(stream.token_ids.count(ANSWER[0]) for stream in streams) >= 2, "or nothing was written in between"
    assert any(not stream.is_action[stream.prompt_length :][2] for stream in streams if len(stream.completion_ids) > 3)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_stream_is_scored_as_its_contexts_are_one_by_one_and_has_their_gradient(kind: str) -> None:
    _, policy, buffer = collected(kind)
    samples = buffer.pack(np.arange(buffer.n_episodes))
    _, packed, _ = policy.evaluate_actions(samples.observations, samples.actions)
    contexts, prompt_lengths, actions = [], [], []
    for stream in streams_of(buffer):
        for position in np.flatnonzero(stream.is_action):
            contexts.append(list(stream.token_ids[:position]))
            prompt_lengths.append(stream.prompt_length)
            actions.append(stream.token_ids[position])
    assert samples.actions.tolist() == actions
    observation = observation_of(contexts, prompt_lengths, width=32)
    _, single, _ = policy.evaluate_actions(observation, torch.tensor(actions))
    torch.testing.assert_close(packed, single, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed, samples.old_log_prob, atol=1e-5, rtol=1e-5)
    gradients = []
    for log_prob in (packed, single):
        policy.zero_grad()
        log_prob.sum().backward()
        gradients.append([p.grad.clone() for p in policy.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_tokens_that_the_environment_writes_cost_what_they_are() -> None:
    env = answering_env(n=1)
    policy = make_policy(env, model=make_model("llama"))
    with counted_forwards(policy.lm.backbone) as shapes:
        collect_episodes(policy, env, 1, buffer := buffer_of(env))
    buffer.finalize()
    assert sum(rows * columns for rows, columns in shapes) == len(buffer.tokens) - 1  # nothing follows the last one
    assert (1, 3) in shapes  # a token of the policy's and two of the environment's, at once


def test_ppo_learns_from_the_tokens_that_it_chose_and_from_no_others() -> None:
    model = make_ppo(answering_env(8), learning_rate=0.0)
    model.learn(1, log_interval=0)
    buffer = model.buffer
    assert buffer.n_tokens == int(buffer.is_action.sum()) < len(buffer.tokens)
    assert np.abs(buffer.log_ratio).max() < 1e-5  # of its own choices, to a reference that is itself
    assert model.logger.name_to_value["train/clip_fraction"] == 0


# ---- joined buffers ------------------------------------------------------------------------------------------------


def test_what_several_collectors_gathered_is_one_rollout() -> None:
    parts = []
    for seed in (1, 2):
        env = make_env(3)
        policy = make_policy(env, model=make_model(ends=0.2))
        torch.manual_seed(seed)
        env.reset(seed=seed)
        collect_episodes(policy, env, 5, buffer := buffer_of(env))
        parts.append(buffer)
    first, second = parts
    together = buffer_of(make_env(3))
    together.reset()
    together.extend(first)
    together.extend(second)
    for buffer in (together, first, second):
        buffer.finalize()
        buffer.estimate_gae(0.9, 0.8)
    assert together.n_episodes == 10
    assert streams_of(together) == streams_of(first) + streams_of(second)
    for name in ("actions", "values", "log_probs", "rewards", "lengths", "advantages", "returns"):
        expected = np.concatenate([getattr(first, name), getattr(second, name)])
        np.testing.assert_array_equal(getattr(together, name), expected)
    ours, theirs = together.pack(np.array([7])), second.pack(np.array([2]))
    assert ours.observations["input_ids"].equal(theirs.observations["input_ids"])
    assert ours.actions.equal(theirs.actions)


def test_chosen_episodes_of_another_buffer_are_appended_whole_and_in_their_order() -> None:
    env = make_env(3)
    policy = make_policy(env, model=make_model(ends=0.2))
    torch.manual_seed(1)
    env.reset(seed=1)
    collect_episodes(policy, env, 6, gathered := buffer_of(env))
    chosen = np.array([1, 2, 5])
    part = buffer_of(env)
    part.reset()
    for episodes in (chosen, chosen[:0], chosen[1:]):
        part.extend(gathered, episodes)
    kept = np.concatenate([chosen, chosen[1:]])
    for buffer in (part, gathered):
        buffer.finalize()
    assert len(set(gathered.lengths)) > 2
    assert streams_of(part) == [streams_of(gathered)[episode] for episode in kept]
    for name in ("values", "log_probs", "rewards"):
        np.testing.assert_array_equal(getattr(part, name), getattr(gathered, name)[gathered._token_index(kept)])
    ours, theirs = part.pack(np.array([4])), gathered.pack(np.array([5]))
    assert ours.observations["prompt_length"].equal(theirs.observations["prompt_length"])
    assert ours.actions.equal(theirs.actions)


def test_only_whole_episodes_that_are_not_laid_out_yet_can_be_joined() -> None:
    env = make_env(2)
    buffers = [buffer_of(env) for _ in range(3)]
    policy = make_policy(env)
    collect_episodes(policy, env, 2, buffers[0])
    for buffer in buffers[1:]:
        buffer.reset()
    observation, _ = env.reset()
    ones = np.ones(2)
    buffers[1].add(observation, ones, ones, ones > 0, ones, ones)
    with pytest.raises(ValueError, match=r"whole episodes; those of rows \[0, 1\] are not over: close"):
        buffers[2].extend(buffers[1])
    buffers[0].finalize()
    with pytest.raises(ValueError, match=r"extend before finalize"):
        buffers[2].extend(buffers[0])


def test_a_context_that_becomes_shorter_without_a_start_is_refused() -> None:
    env = make_env(1)
    buffer = buffer_of(env)
    buffer.reset()
    one = np.ones(1)
    for context, start in (([5, 6], True), ([5, 6, 1], False)):
        observation = {name: x.numpy() for name, x in observation_of([context], [1]).items()}
        buffer.add(observation, one, one, np.array([start]), one, one)
    with pytest.raises(ValueError, match=r"rows \[0\] became shorter, though no episode started there"):
        buffer.add({name: x.numpy() for name, x in observation_of([[5]], [1]).items()}, one, one, one < 0, one, one)
