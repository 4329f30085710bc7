"""The memo of continuations: one request a text, one token at a time, and the environment says where a text ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from learners import EOS, make_env, make_model, make_policy

from agents.models.contexts import Contexts
from agents.rollouts.backend import Continuation, Request, Sampling
from agents.rollouts.collector import collect_episodes, first_contexts
from agents.rollouts.continuations import Continuations
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.state import checkpoint
from text_env.constraints import AllowedTokens, ForbiddenTokens
from text_env.vector_env import TextVectorEnv

SAMPLING = Sampling(1.0, (EOS,), 0, 8, (), 300, 300, None, 24)


class Scripted:
    """A backend that writes what it is told to, text after text; notes what it is asked."""

    def __init__(self, *texts: Sequence[int], version: int = 1) -> None:
        self.texts = [list(text) for text in texts]
        self.version = version
        self.asked: list[list[Request]] = []

    def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Continuation]:
        self.asked.append(list(requests))
        texts = [self.texts.pop(0) for _ in requests]
        return [Continuation(np.array(text), -np.array(text) / 100, self.version) for text in texts]

    def take_weights(self, policy: Any, version: int) -> None:
        self.version = version


def contexts_of(*rows: Sequence[int], prompt: int = 2) -> Contexts:
    input_ids = np.full((len(rows), 24), 1)
    for row, ids in zip(input_ids, rows, strict=True):
        row[: len(ids)] = ids
    length = np.array(list(map(len, rows)))
    return Contexts(input_ids, length, length - prompt)


def test_a_text_is_asked_for_once_and_handed_out_a_token_at_a_time() -> None:
    backend = Scripted([5, 6, 7], [8, EOS])
    memo = Continuations(backend, SAMPLING)
    memo.begin()
    tokens, values, log_probs = memo.write(contexts_of([2, 3], [2, 4]))
    assert tokens.tolist() == [5, 8]
    assert values.shape == (2, 1)
    assert log_probs.tolist() == [-0.05, -0.08]
    assert memo.write(contexts_of([2, 3, 5], [2, 4, 8]))[0].tolist() == [6, EOS]
    assert memo.write(contexts_of([2, 3, 5, 6]))[0].tolist() == [7]
    [asked] = backend.asked
    assert [(request.token_ids, request.step) for request in asked] == [([2, 3], 0), ([2, 4], 0)]
    assert memo.versions == [1] * 5


def test_the_same_context_twice_has_two_continuations_and_two_seeds() -> None:
    backend = Scripted([5, 6], [5, 7])
    memo = Continuations(backend, SAMPLING)
    memo.begin()
    assert memo.write(contexts_of([2, 3], [2, 3]))[0].tolist() == [5, 5]
    assert sorted(memo.write(contexts_of([2, 3, 5], [2, 3, 5]))[0].tolist()) == [6, 7]
    one, other = backend.asked[0]
    assert one.seed != other.seed


def test_a_context_that_another_row_grows_into_is_not_taken_from_its_own_row() -> None:
    backend = Scripted([5, 6], [7])
    memo = Continuations(backend, SAMPLING)
    memo.begin()
    assert memo.write(contexts_of([2, 3], [2, 3, 5]))[0].tolist() == [5, 7]
    assert memo.write(contexts_of([2, 3, 5]))[0].tolist() == [6]
    assert len(backend.asked) == 1


def test_a_text_that_stopped_too_early_is_gone_on_with_from_where_it_is() -> None:
    backend = Scripted([5], [6, EOS])
    memo = Continuations(backend, SAMPLING)
    memo.begin()
    memo.write(contexts_of([2, 3]))
    assert memo.write(contexts_of([2, 3, 5]))[0].tolist() == [6]
    assert [(request.token_ids, request.step) for [request] in backend.asked] == [([2, 3], 0), ([2, 3, 5], 1)]


def test_what_is_left_of_one_rollout_is_not_used_in_the_next() -> None:
    backend = Scripted([5, 6], [5, 7])
    memo = Continuations(backend, SAMPLING)
    memo.begin()
    memo.write(contexts_of([2, 3]))
    memo.begin()
    memo.write(contexts_of([2, 3]))
    assert memo.write(contexts_of([2, 3, 5]))[0].tolist() == [7]


@pytest.mark.parametrize(
    ("text", "log_probs"),
    [
        ([], []),
        ([5, 6], [-1.0, float("nan")]),
        ([5, 6], [-1.0]),
        ([5, -1], [-1.0, -1.0]),
        ([5, SAMPLING.n_tokens], [-1.0, -1.0]),
    ],
)
def test_a_continuation_that_cannot_be_one_is_refused(text: list[int], log_probs: list[float]) -> None:
    class Wrong(Scripted):
        def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Continuation]:
            return [Continuation(np.array(text, np.int64), np.array(log_probs), 1)]

    memo = Continuations(Wrong(), SAMPLING)
    memo.begin()
    with pytest.raises(
        ValueError, match=r"at least one token after \[2, 3\], between 0 and .* with finite log-probabilities"
    ):
        memo.write(contexts_of([2, 3]))
    with pytest.raises(ValueError, match="a backend samples"):
        memo.write(contexts_of([2, 3]), deterministic=True)


def test_what_was_written_ahead_is_found_by_its_context_and_the_rest_is_asked_for(tmp_path: Any) -> None:
    backend = Scripted([5, EOS], [6, EOS], [7, EOS])
    memo = Continuations(backend, SAMPLING)
    memo.begin()
    memo.write_ahead(contexts_of([2, 3], [2, 4]))
    state = memo.state()
    memo.begin()
    assert memo.write(contexts_of([2, 4], [2, 9]))[0].tolist() == [6, 7]
    assert len(backend.asked) == 2
    checkpoint.save(tmp_path / "saved", {"ahead": state})
    again = Continuations(Scripted([8, EOS]), SAMPLING)
    again.load_state(checkpoint.load(tmp_path / "saved")["ahead"])
    again.begin()
    tokens, _, log_probs = again.write(contexts_of([2, 3], [2, 4], [2, 3]))
    assert tokens.tolist() == [5, 6, 8]
    assert log_probs.tolist() == [-0.05, -0.06, -0.08]


def test_who_could_not_write_ahead_says_so_when_the_texts_are_needed() -> None:
    class Gone(Scripted):
        def write(self, requests: Sequence[Request], sampling: Sampling) -> list[Continuation]:
            raise ConnectionError("nobody is there")

    memo = Continuations(Gone(), SAMPLING)
    memo.begin()
    memo.write_ahead(contexts_of([2, 3]))
    assert memo.state() == {}
    with pytest.raises(ConnectionError, match="nobody is there"):
        memo.begin()


def buffer_for(env: TextVectorEnv) -> EpisodeBuffer:
    return EpisodeBuffer(0, env.single_observation_space, env.single_action_space, "cpu", n_envs=env.num_envs)


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (12, {}),
        (5, {}),  # rows are refilled
        (12, {"stop": ["a", "good"], "max_new_tokens": 12}),
        (12, {"min_new_tokens": 3}),
        (12, {"group_size": 4}),
        (12, {"shaping": lambda completions, **_: [len(text) / 10 for text in completions]}),
    ],
    ids=["plain", "fewer rows", "stop strings", "minimum length", "groups", "shaping"],
)
def test_a_replayed_rollout_is_what_the_environment_says_of_these_tokens(rows: int, settings: dict[str, Any]) -> None:
    """Texts of a policy, written down and handed out again, with tokens behind their ends that nobody must see."""
    env = make_env(rows, **settings)
    policy = make_policy(env, model=make_model(ends=0.2), min_new_tokens=env.min_new_tokens)
    env.reset(seed=3)
    with env.left_as_it_was():
        expected = buffer_for(env)
        infos = collect_episodes(policy, env, 12, expected)
    texts = [
        [*expected._stream["token"].array[(segment := expected._stream["segment"].array) == number]]
        for number in range(12)
    ]
    prompts = [len(prompt.token_ids) for prompt in expected.prompts]
    del segment
    backend = Scripted(*([*text[n:], 7, 8, 9] for text, n in zip(texts, prompts, strict=True)))
    memo, replayed = Continuations(backend, Sampling.of(policy, env)), buffer_for(env)
    memo.begin()
    assert collect_episodes(memo, env, 12, replayed) == infos
    for name, column in expected._stream.items():
        assert replayed._stream[name].array.tolist() == column.array.tolist(), name
    assert replayed._logged["rewards"].array.tolist() == expected._logged["rewards"].array.tolist()
    assert sum(map(len, backend.asked)) == 12
    assert {info["finish_reason"] for info in infos} >= ({"stop"} if "stop" in settings else {"eos"})


def test_the_first_contexts_of_the_next_rollout_are_known_before_it_begins() -> None:
    env = make_env(6, group_size=2)
    env.reset(seed=1)
    generators = [generator.bit_generator.state for generator in env.np_random]
    known = first_contexts(env, 4)
    assert [generator.bit_generator.state for generator in env.np_random] == generators
    backend = Scripted(*[[5, EOS]] * 4)
    collect_episodes(Continuations(backend, SAMPLING), env, 4, buffer_for(env))
    begun = [request.token_ids for request in backend.asked[0]]
    assert begun == [ids[:n].tolist() for ids, n in zip(known.input_ids, known.length, strict=True)]
    assert begun[0] == begun[1]


def test_seeds_come_from_the_generator_that_the_policy_samples_with() -> None:
    seeds = []
    for _ in range(2):
        torch.manual_seed(4)
        backend = Scripted([5, EOS], [5, EOS])
        memo = Continuations(backend, SAMPLING)
        memo.begin()
        memo.write(contexts_of([2, 3], [2, 4]))
        seeds.append([request.seed for request in backend.asked[0]])
    assert seeds[0] == seeds[1]


def test_a_backend_is_told_all_of_the_distribution_but_the_weights() -> None:
    env = make_env(2, min_new_tokens=2, stop="x", constraint=[AllowedTokens(range(100)), ForbiddenTokens([5])])
    policy = make_policy(env, min_new_tokens=2, temperature=0.7, constraint=env.constraint)
    sampling = Sampling.of(policy, env)
    allowed = tuple(token for token in range(100) if token != 5)
    assert sampling == (0.7, (EOS,), 2, 8, ("x",), 300, 300, allowed, 24)


def test_a_constraint_that_looks_at_the_context_is_refused() -> None:
    def no_repetition(contexts: Contexts, n_tokens: int) -> np.ndarray:
        return np.ones((len(contexts.length), n_tokens), bool)

    env = make_env(2, constraint=no_repetition)
    policy = make_policy(env, constraint=no_repetition)
    with pytest.raises(
        ValueError, match=r"AllowedTokens or ForbiddenTokens .* got no_repetition\. Use rollouts='local'"
    ):
        Sampling.of(policy, env)
