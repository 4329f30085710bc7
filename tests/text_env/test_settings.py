"""The arguments of the environments are listed once, and both constructors show, document and check all of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.envs.registration import EnvSpec

from text_env import EpisodeSettings, TextEnv, TextVectorEnv

FIELDS = {field.name: field.default for field in dataclasses.fields(EpisodeSettings)}


@pytest.mark.parametrize("env", [TextEnv, TextVectorEnv])
def test_the_signature_of_an_environment_holds_every_setting_with_its_default(env: Any) -> None:
    parameters = inspect.signature(env).parameters
    assert {name: parameter.default for name, parameter in parameters.items() if name in FIELDS} == FIELDS
    own = {"render_mode"} if env is TextEnv else {"num_envs", "render_mode", "autoreset_mode"}
    assert set(parameters) - set(FIELDS) == own
    assert list(inspect.signature(env.__init__).parameters) == ["self", *parameters]


def test_a_subclass_with_a_constructor_of_its_own_shows_that_one() -> None:
    class Fixed(TextEnv):
        def __init__(self, length: int) -> None:
            super().__init__(max_new_tokens=length)

    assert list(inspect.signature(Fixed).parameters) == ["length"]


@pytest.mark.parametrize("env", [TextEnv, TextVectorEnv])
def test_every_setting_is_documented_where_help_looks(env: Any) -> None:
    assert re.findall(r"^:param (\w+):", inspect.getdoc(env.__init__) or "", re.MULTILINE) == list(FIELDS)


@pytest.mark.parametrize("make", [TextEnv, TextVectorEnv, lambda **kwargs: gym.make("TextRLHF-v0", **kwargs)])
def test_an_unknown_argument_is_refused_with_the_one_that_was_meant_and_the_known_ones(make: Any) -> None:
    with pytest.raises(
        TypeError,
        match=r"got an unexpected keyword argument 'max_tokens' \(did you mean 'max_new_tokens'\?\); known are",
    ) as refused:
        make(max_tokens=3)
    assert all(name in str(refused.value) for name in (*FIELDS, "render_mode"))
    with pytest.raises(TypeError, match=r"Text\w*Env got an unexpected keyword argument 'qqq'; known are"):
        make(qqq=3)


def test_arguments_without_their_names_are_refused() -> None:
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        TextEnv("builtin")  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional argument"):
        TextVectorEnv(2, "builtin")  # type: ignore[misc]


def test_settings_are_a_value_that_can_be_changed_by_copying_only() -> None:
    settings = EpisodeSettings(max_new_tokens=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.max_new_tokens = 5  # type: ignore[misc]
    assert dataclasses.replace(settings, max_new_tokens=5) == EpisodeSettings(max_new_tokens=5)


def test_a_vector_environment_made_by_names_has_a_spec_that_survives_json() -> None:
    options = {"reward": "sentiment", "max_new_tokens": 4, "metrics": {"gold_score": "sentiment"}}
    env = gym.make_vec("TextRLHF-v0", num_envs=3, **options)
    assert env.spec is not None
    again = gym.make_vec(EnvSpec.from_json(env.spec.to_json()))
    assert again.num_envs == 3
    assert again.reset(seed=0)[1]["prompt"].tolist() == env.reset(seed=0)[1]["prompt"].tolist()
    assert again.unwrapped.max_new_tokens == 4  # type: ignore[attr-defined]
