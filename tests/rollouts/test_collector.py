"""The collector: exactly so many episodes are started, all are finished, and finished rows cost nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from learners import EOS, PROMPTS, counted_forwards, length_of, make_env, make_model, make_policy

from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import Interrupted, collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from text_env.vector_env import TextVectorEnv


class ScriptedPolicy:
    """Writes texts of given lengths, in the order in which they are started; notes what it is asked about."""

    def __init__(self, lengths: list[int]) -> None:
        self.left = list(lengths)
        self.of_row: dict[tuple[int, ...], int] = {}
        self.batches: list[list[tuple[int, ...]]] = []
        self.running: list[int] = []

    def __call__(self, observation: dict[str, torch.Tensor], deterministic: bool) -> tuple[torch.Tensor, ...]:
        lengths = observation["attention_mask"].sum(dim=1).tolist()
        written = [n - p for n, p in zip(lengths, observation["prompt_length"][:, 0].tolist(), strict=True)]
        self.batches.append([tuple(row[:n]) for row, n in zip(observation["input_ids"].tolist(), lengths, strict=True)])
        # Rows keep their order: those that go on keep their target, those that begin take the next one.
        targets = iter(self.running)
        self.running = [next(targets) if n else self.left.pop(0) for n in written]
        actions = [EOS if n + 1 == target else 5 + n for n, target in zip(written, self.running, strict=True)]
        self.running = [target for n, target in zip(written, self.running, strict=True) if n + 1 < target]
        return torch.tensor(actions), torch.zeros(len(actions), 1), torch.zeros(len(actions))


def buffer_for(env: TextVectorEnv) -> EpisodeBuffer:
    return EpisodeBuffer(0, env.single_observation_space, env.single_action_space, "cpu", n_envs=env.num_envs)


def collect(rows: int, lengths: list[int], **kwargs: Any) -> tuple[list[dict[str, Any]], EpisodeBuffer, ScriptedPolicy]:
    env = make_env(rows, reward=length_of, max_new_tokens=10)
    policy, buffer = ScriptedPolicy(lengths), buffer_for(env)
    infos = collect_episodes(policy, env, len(lengths), buffer, **kwargs)  # type: ignore[arg-type]
    buffer.finalize()
    return infos, buffer, policy


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_exactly_so_many_episodes_are_started_and_all_of_them_finished(rows: int) -> None:
    lengths = [3, 1, 7, 2, 2]
    infos, buffer, policy = collect(rows, lengths)
    assert policy.left == []
    assert sorted(info["length"] for info in infos) == sorted(lengths)
    assert buffer.n_episodes == 5
    assert [info["score"] for info in infos] == buffer.lengths.tolist()
    assert [info["length"] for info in infos] == buffer.lengths.tolist()
    assert all(info["finish_reason"] == "eos" for info in infos)


def test_free_rows_are_refilled_in_order_and_dropped_when_nothing_is_left_to_start() -> None:
    # Two rows, texts of 3, 1, 2, 1 tokens. Row 1 ends at once and takes the third text, which ends together with
    # the first; of the two free rows only one is needed for the fourth.
    infos, buffer, policy = collect(2, [3, 1, 2, 1])
    assert [len(batch) for batch in policy.batches] == [2, 2, 2, 1]
    assert buffer.lengths.tolist() == [3, 1, 2, 1]  # numbered as they were started
    assert [info["length"] for info in infos] == [3, 1, 2, 1]


def test_the_work_is_the_tokens_of_the_texts_and_no_more() -> None:
    lengths = [9, 1, 1, 4, 2, 7, 1, 3]
    _, buffer, policy = collect(4, lengths)
    assert sum(len(batch) for batch in policy.batches) == sum(lengths) == buffer.n_tokens


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_finished_rows_cost_no_row_of_any_forward_pass(kind: str) -> None:
    env = make_env(6)
    policy = make_policy(env, model=make_model(kind, ends=0.2))
    buffer = buffer_for(env)
    with counted_forwards(policy.lm.backbone) as shapes:
        infos = collect_episodes(policy, env, 6, buffer)
    lengths = np.array([info["length"] for info in infos])
    assert len(set(lengths)) > 1
    assert shapes[0][0] == len({info["prompt"] for info in infos})  # the prompts, in one go, each of them once
    # Then one row and one column for every text that has not ended yet.
    expected = [(int((lengths > step).sum()), 1) for step in range(1, lengths.max())]
    assert shapes[1:] == expected


def test_prompts_can_be_given_one_for_each_episode() -> None:
    prompts = [PROMPTS[number % 4] for number in (3, 1, 0, 2, 2, 1, 0)]
    infos, buffer, _ = collect(3, [2, 5, 1, 1, 3, 2, 1], prompts=prompts)
    assert [info["prompt"] for info in infos] == prompts
    tokenizer = make_env(1).tokenizer
    for number, prompt in enumerate(prompts):
        observation = buffer.pack(np.array([number])).observations
        ids = observation["input_ids"][0, : int(observation["prompt_length"])].tolist()
        assert ids == tokenizer(prompt)["input_ids"]


def test_the_environment_draws_prompts_where_none_are_given() -> None:
    infos, _, _ = collect(4, [1] * 30)
    assert {info["prompt"] for info in infos} == set(PROMPTS)


def test_episodes_and_infos_belong_together() -> None:
    infos, buffer, _ = collect(3, [2, 5, 1, 1, 3, 2, 1])
    tokenizer = make_env(1).tokenizer
    for number, info in enumerate(infos):
        tokens = buffer.actions[buffer.starts[number] : buffer.starts[number + 1]].tolist()
        assert tokens == [*range(5, 4 + len(tokens)), EOS]
        assert info["completion"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert info["score"] == len(tokens)


def test_every_step_is_reported_and_can_stop_the_collection() -> None:
    reported: list[int] = []

    def look(n_tokens: int, infos: dict[str, Any]) -> bool:
        reported.append(n_tokens)
        return len(reported) < 3

    with pytest.raises(Interrupted):
        collect(2, [9, 2, 5], on_step=look)
    assert reported == [2, 2, 2]


def test_greedy_collection_is_the_models_own_greedy_text() -> None:
    env = make_env(3)
    policy = make_policy(env, model=make_model(ends=0.05))
    infos = collect_episodes(policy, env, 4, buffer_for(env), deterministic=True, prompts=PROMPTS)
    for prompt, info in zip(PROMPTS, infos, strict=True):
        ids = env.tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = policy.lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=1
        )
        assert info["completion"] == env.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_environment_is_left_in_the_mode_that_the_loop_needs() -> None:
    env = make_env(2)
    assert env.autoreset_mode == AutoresetMode.SAME_STEP
    collect_episodes(ScriptedPolicy([1, 1]), env, 2, buffer_for(env))  # type: ignore[arg-type]
    assert env.autoreset_mode == AutoresetMode.DISABLED


class FromOutside:
    """A policy of which the collector knows only that it answers to observations."""

    def __init__(self, policy: CausalLMPolicy) -> None:
        self.policy = policy

    def __call__(self, observation: Any, deterministic: bool) -> Any:
        return self.policy(observation, deterministic)


@pytest.mark.parametrize("kwargs", [{}, {"min_new_tokens": 3}], ids=["plain", "minimum length"])
def test_contexts_that_are_handed_on_directly_give_what_observations_give(kwargs: dict[str, Any]) -> None:
    env = make_env(3, **kwargs)
    rollouts = []
    for reader in (lambda policy: policy, FromOutside):
        policy = make_policy(env, model=make_model(ends=0.2), **kwargs)
        torch.manual_seed(1)
        env.reset(seed=1)
        infos = collect_episodes(reader(policy), env, 8, buffer := buffer_for(env))
        buffer.finalize()
        arrays = (buffer.tokens, buffer.is_action, buffer.values, buffer.log_probs, buffer.rewards, buffer.starts)
        rollouts.append(([array.tolist() for array in arrays], infos))
    assert rollouts[0] == rollouts[1]


def test_the_prompt_of_a_group_is_read_once() -> None:
    env = make_env(8, group_size=4, prompts=["The movie was", "That film was"])
    policy = make_policy(env, model=make_model())
    with counted_forwards(policy.lm.backbone) as shapes:
        collect_episodes(policy, env, 8, buffer := buffer_for(env))
    prompts = {tuple(prompt.token_ids) for prompt in buffer.prompts}
    assert len(buffer.prompts) == 8
    assert shapes[0] == (len(prompts), max(map(len, prompts)))
    assert all(columns == 1 for _, columns in shapes[1:])
