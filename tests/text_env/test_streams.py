"""An episode as one stream of tokens, and which of them the policy chose."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from text_env import NO_ACTION, TextEnv, TextVectorEnv, TokenStream

EOS = 0


@pytest.fixture
def kwargs(tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "prompts": ["The movie", "I loved"],
        "reward": "sentiment",
        "max_prompt_tokens": 8,
        "max_new_tokens": 6,
    }


def test_a_token_that_the_environment_writes_belongs_to_the_completion_and_is_no_action() -> None:
    prompt = TokenStream((7, 8), (False, False), 2)
    stream = prompt.appended(5).appended(6, is_action=False).appended(EOS)
    assert stream == TokenStream((7, 8, 5, 6, EOS), (False, False, True, False, True), 2)
    assert stream.completion_ids == (5, 6, EOS)
    assert [stream.cut(length) for length in range(3)] == [
        prompt,
        prompt.appended(5),
        prompt.appended(5).appended(6, is_action=False),
    ]


def test_the_policy_chose_what_it_wrote_and_neither_the_prompt_nor_a_response_that_was_given(
    kwargs: dict[str, Any],
) -> None:
    env = TextEnv(**kwargs)
    prompt = tuple(kwargs["tokenizer"]("The movie")["input_ids"])
    env.reset(options={"prompt": "The movie", "response": [60, 61]})
    given = TokenStream((*prompt, 60, 61), (False,) * (len(prompt) + 2), len(prompt))
    assert env.stream() == given
    env.step(62)
    env.step(EOS)
    assert env.stream() == TokenStream(
        (*prompt, 60, 61, 62, EOS), (*[False] * (len(prompt) + 2), True, True), len(prompt)
    )
    assert given.token_ids == (*prompt, 60, 61)  # what was read before stays what it was


def test_each_row_has_its_own_stream_and_a_new_episode_starts_a_new_one(kwargs: dict[str, Any]) -> None:
    env = TextVectorEnv(3, **kwargs, autoreset_mode="Disabled")
    env.reset(seed=0)
    prompts = [env.stream(row) for row in range(3)]
    assert not any(any(stream.is_action) for stream in prompts)
    env.step(np.array([50, NO_ACTION, EOS]))
    expected = [prompts[0].appended(50), prompts[1], prompts[2].appended(EOS)]
    assert [env.stream(row) for row in range(3)] == expected
    mask = np.array([False, False, True])
    env.reset(options={"reset_mask": mask, "prompt": ["The movie"], "response": [[60, 61]]})
    assert env.stream(2).completion_ids == (60, 61)
    assert not any(env.stream(2).is_action)
    assert env.stream(0) == expected[0]


def test_a_stream_is_what_the_observation_shows(kwargs: dict[str, Any]) -> None:
    env = TextVectorEnv(4, **kwargs)
    obs, _ = env.reset(seed=0)
    generator = np.random.default_rng(0)
    for _ in range(20):
        for row in range(4):
            stream = env.stream(row)
            assert obs["input_ids"][row, obs["attention_mask"][row] == 1].tolist() == list(stream.token_ids)
            assert obs["prompt_length"][row] == stream.prompt_length
        obs = env.step(np.where(generator.random(4) < 0.2, EOS, 50))[0]


def test_a_row_without_an_episode_has_no_stream(kwargs: dict[str, Any]) -> None:
    env = TextVectorEnv(2, **kwargs)
    with pytest.raises(gym.error.ResetNeeded, match=r"Row 1 has not started an episode yet.*reset\(\)"):
        env.stream(1)
    env.reset(options={"reset_mask": np.array([True, False])})
    assert env.stream(0).token_ids
    with pytest.raises(gym.error.ResetNeeded):
        env.stream(1)
