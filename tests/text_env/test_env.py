"""The scalar face: Gymnasium's and SB3's contracts, registration, refusals."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from stable_baselines3.common.env_checker import check_env as sb3_check_env
from stable_baselines3.common.env_util import make_vec_env
from tiny import RecordingReward, ids_score, tiny_tokenizer

from text_env import GeneratedPrompts, RewardError, TextEnv, TextVectorEnv

PROMPTS = ["The movie", "I loved", "The film was"]


@pytest.fixture
def kwargs(tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "prompts": PROMPTS,
        "reward": "sentiment",
        "max_prompt_tokens": 8,
        "max_new_tokens": 6,
    }


UNPAID = "max_episode_steps=3 cuts episodes from outside.*never paid.*max_new_tokens=3"


class Passive(gym.Wrapper[Any, Any, Any, Any]):
    """Somebody's wrapper."""


@pytest.mark.parametrize("how", ["make", "spec", "wrapper", "continuous", "sync"])
def test_the_first_episode_that_a_time_limit_cuts_is_warned_of(how: str, kwargs: dict[str, Any]) -> None:
    env: Any
    if how == "wrapper":
        env = gym.wrappers.TimeLimit(Passive(gym.make("TextRLHF-v0", **kwargs)), 3)
    elif how == "sync":
        env = gym.make_vec("TextRLHF-v0", 1, "sync", max_episode_steps=3, **kwargs)
    elif how == "continuous":
        env = gym.make("TextRLHFContinuous-v0", max_episode_steps=3, **{**kwargs, "tokenizer": "builtin"})
    else:
        env = gym.make("TextRLHF-v0", max_episode_steps=3, **kwargs)
        env = gym.make(env.spec) if how == "spec" else env
    action = np.zeros(env.action_space.shape, np.float32) + 0.5 if how == "continuous" else 50
    action = np.array([50]) if how == "sync" else action
    env.reset(seed=0)
    env.step(action)
    env.step(action)
    with pytest.warns(UserWarning, match=UNPAID):
        assert env.step(action)[3]
    env.reset()
    for _ in range(3):
        env.step(action)  # once is enough: a second warning would be an error here


def test_a_time_limit_that_cuts_nothing_is_no_reason_to_warn(kwargs: dict[str, Any]) -> None:
    for limit in (3, 6):
        env = gym.make("TextRLHF-v0", max_episode_steps=limit, **kwargs)
        env.reset(seed=0)
        for token in [50] * (limit - 1) + [0]:
            _, reward, terminated, _, info = env.step(token)
        assert terminated
        assert reward == info["score"]
    for limit in (6, 7, -1, None):
        assert gym.make_vec("TextRLHF-v0", 2, max_episode_steps=limit, **kwargs).num_envs == 2


@pytest.mark.parametrize("name", ["TextRLHF-v0", "TextRLHFContinuous-v0"])
def test_the_vector_environment_refuses_a_time_limit_in_the_same_words(name: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=UNPAID):
        gym.make_vec(name, 2, max_episode_steps=3, **{**kwargs, "tokenizer": "builtin"})
    with pytest.raises(ValueError, match="Expected max_episode_steps to be an integer of at least 1, got 0"):
        gym.make_vec(name, 2, max_episode_steps=0, **{**kwargs, "tokenizer": "builtin"})


def test_importing_text_env_imports_neither_torch_nor_stable_baselines3() -> None:
    heavy = "{'torch', 'stable_baselines3', 'sb3_contrib'}"
    code = f"import sys, text_env, text_env.checker; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_gymnasiums_check_env_passes_without_warnings(kwargs: dict[str, Any], capsys: Any) -> None:
    check_env(gym.make("TextRLHF-v0", **kwargs).unwrapped)
    check_env(gym.make("TextRLHF-v0", min_new_tokens=2, stop="good", group_size=3, **kwargs).unwrapped)


def test_sb3s_check_env_passes_without_warnings(kwargs: dict[str, Any], capsys: Any) -> None:
    sb3_check_env(gym.make("TextRLHF-v0", **kwargs), skip_render_check=False)
    for mode in ("ansi", "human", "rgb_array"):
        sb3_check_env(TextEnv(render_mode=mode, **kwargs), skip_render_check=False)


def test_sb3s_make_vec_env_takes_it_by_name(kwargs: dict[str, Any]) -> None:
    venv = make_vec_env("TextRLHF-v0", n_envs=2, env_kwargs=kwargs, seed=0)
    assert venv.reset()["input_ids"].shape == (2, 14)
    venv.close()


def test_it_is_made_by_name_with_and_without_its_module(kwargs: dict[str, Any]) -> None:
    for name in ("TextRLHF-v0", "text_env:TextRLHF-v0"):
        assert isinstance(gym.make(name, **kwargs).unwrapped, TextEnv)
        assert isinstance(gym.make_vec(name, num_envs=3, **kwargs), TextVectorEnv)


def test_no_time_limit_is_registered_since_it_would_swallow_the_score() -> None:
    assert gym.spec("TextRLHF-v0").max_episode_steps is None


def test_an_environment_made_by_names_has_a_spec_that_survives_json(tokenizer: Any, tmp_path: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    env = gym.make(
        "TextRLHF-v0",
        tokenizer=str(tmp_path / "tokenizer"),
        prompts=str(tmp_path / "prompts.txt"),
        reward="sentiment",
        metrics={"gold_score": "sentiment"},
    )
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert env.reset(seed=0)[1] == again.reset(seed=0)[1]


def test_by_default_it_is_the_built_in_model_prompts_and_reward() -> None:
    env = gym.make("TextRLHF-v0")
    env.reset(seed=0)
    env.action_space.seed(0)
    for _ in range(48):
        _, reward, terminated, _, info = env.step(env.action_space.sample())
        if terminated:
            break
    assert np.isfinite(reward)
    assert info["score"] == reward
    assert gym.make("TextRLHF-v0").unwrapped.reward is env.unwrapped.reward  # one reward model for all of them
    held_out = {prompt.text for prompt in TextEnv(prompts="builtin:eval", reward="sentiment").prompts}
    assert held_out.isdisjoint(prompt.text for prompt in env.unwrapped.prompts)


def test_what_was_decided_at_construction_can_be_read_and_not_set(kwargs: dict[str, Any], tokenizer: Any) -> None:
    env, reward = TextEnv(min_new_tokens=1, group_size=2, **kwargs | {"reward": len}), len
    read = (env.tokenizer, env.eos_token_id, env.pad_token_id, env.max_prompt_tokens, env.max_new_tokens)
    assert read == (tokenizer, tokenizer.eos_token_id, tokenizer.pad_token_id, 8, 6)
    assert (env.min_new_tokens, env.group_size, env.reward) == (1, 2, reward)
    assert [prompt.text for prompt in env.prompts] == PROMPTS
    with pytest.raises(AttributeError):
        env.max_new_tokens = 3  # type: ignore[misc]


def test_a_text_is_written_token_by_token_and_paid_at_its_end(kwargs: dict[str, Any], tokenizer: Any) -> None:
    env = TextEnv(**kwargs | {"metrics": {"gold_score": "sentiment"}, "reward": RecordingReward()})
    env.reset(options={"prompt": "The movie"})
    tokens = [*tokenizer(" was good")["input_ids"], tokenizer.eos_token_id]
    steps = [env.step(token) for token in tokens]
    assert [step[1] for step in steps] == [0.0] * (len(tokens) - 1) + [ids_score(tokens)]
    assert [step[2] for step in steps] == [False] * (len(tokens) - 1) + [True]
    gold = 0.4404  # what vaderSentiment says of "good", rule by rule: 1.9 / sqrt(1.9² + 15)
    assert steps[-1][4] == {
        "prompt": "The movie",
        "completion": " was good",
        "finish_reason": "eos",
        "score": ids_score(tokens),
        "gold_score": pytest.approx(gold, abs=1e-4),
    }


@pytest.mark.parametrize("action", [-1, 300, 10**9])
def test_an_action_outside_the_vocabulary_is_an_error_that_loses_nothing(kwargs: dict[str, Any], action: int) -> None:
    env = TextEnv(**kwargs)
    obs, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=r"Expected every action to be a token in \[0, 300\), got \[" + str(action)):
        env.step(action)
    assert env.step(5)[0]["attention_mask"].sum() == obs["attention_mask"].sum() + 1


@pytest.mark.parametrize("action", [1.5, [1, 2], "the", None])
def test_an_action_that_is_no_integer_is_an_error(kwargs: dict[str, Any], action: Any) -> None:
    env = TextEnv(**kwargs)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="Expected 1 actions, integers"):
        env.step(action)


def test_every_integer_type_will_do_as_action(kwargs: dict[str, Any]) -> None:
    env = TextEnv(**kwargs)
    for action in (7, np.int32(7), np.uint8(7), np.array(7)):
        env.reset(seed=0)
        assert 7 in env.step(action)[0]["input_ids"]


def test_a_step_before_the_first_reset_or_after_the_end_is_an_error_that_says_what_to_do(
    kwargs: dict[str, Any],
) -> None:
    env = TextEnv(**kwargs)
    with pytest.raises(gym.error.ResetNeeded, match="never started"):
        env.step(5)
    env.reset(seed=0)
    last = env.step(env.eos_token_id)
    with pytest.raises(gym.error.ResetNeeded, match=r"A step after the end.*reset\(\)"):
        env.step(5)
    assert last[2]
    env.reset()
    env.step(5)


def test_a_reward_that_fails_loses_nothing_so_the_step_can_be_repeated(kwargs: dict[str, Any]) -> None:
    broken = True

    def moody(completions: list[str], **_: Any) -> list[float]:
        return [float("nan") if broken else 2.0 for _ in completions]

    env = TextEnv(**kwargs | {"reward": moody})
    env.reset(options={"prompt": "I loved"})
    before = env.step(60)[0]
    with pytest.raises(RewardError, match=r"'moody' must return finite numbers.*prompt 'I loved'"):
        env.step(env.eos_token_id)
    broken = False
    after, reward, terminated, _, _ = env.step(env.eos_token_id)
    assert (reward, terminated) == (2.0, True)
    assert after["attention_mask"].sum() == before["attention_mask"].sum() + 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens to be an integer of at least 1, got 0"),
        ({"max_prompt_tokens": 1.5}, "max_prompt_tokens to be an integer"),
        ({"min_new_tokens": 7}, "min_new_tokens to be at most max_new_tokens=6, got 7"),
        ({"group_size": 0}, "group_size to be an integer of at least 1"),
        ({"stop": ""}, "stop to be a non-empty string"),
        ({"stop": ["a", 1]}, "stop to be a non-empty string"),
        ({"render_mode": "hologram"}, "render_mode to be None or one of"),
        ({"overlong_prompts": "drop"}, "overlong_prompts to be one of"),
        ({"metrics": {"score": "sentiment"}}, "Expected another name .* got 'score', which the final info has already"),
        (
            {"tokenizer": "no/such/tokenizer"},
            "Expected tokenizer, or model .* to be 'builtin'.*'no/such/tokenizer', which is no directory",
        ),
    ],
)
def test_an_argument_out_of_range_is_refused_with_what_was_expected(
    kwargs: dict[str, Any], wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TextEnv(**kwargs | wrong)


def test_a_tokenizer_without_eos_is_refused_and_one_without_pad_pads_with_eos(kwargs: dict[str, Any]) -> None:
    without_pad = tiny_tokenizer(pad=False)
    env = TextEnv(**kwargs | {"tokenizer": without_pad})
    obs, _ = env.reset(seed=0)
    assert env.pad_token_id == env.eos_token_id == obs["input_ids"][-1]
    without_pad.eos_token = None
    with pytest.raises(ValueError, match=r"Expected a tokenizer with an eos token.*has none\. Set one"):
        TextEnv(**kwargs | {"tokenizer": without_pad})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "a prompt of at least one token"),
        ({"prompt": "a much longer prompt than that"}, "at most max_prompt_tokens=8"),
        ({"prompt": [5, 300]}, r"prompt's token ids to lie in \[0, 300\), got \[300\]"),
        ({"response": [5, -1]}, r"response's token ids to lie in \[0, 300\), got \[-1\]"),
        ({"response": [5] * 6}, "spends the whole budget of max_new_tokens=6"),
        ({"response": [5, 0, 5]}, "holds the end-of-text token 0"),
        ({"response": " all good"}, r"holds one of the stop strings \('good',\)"),
        ({"promt": "The"}, r"Unknown reset options \['promt'\]; known are"),
    ],
)
def test_a_reset_that_cannot_be_is_refused_and_the_running_episode_goes_on(
    kwargs: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    env = TextEnv(stop="good", **kwargs)
    env.reset(seed=0)
    before, state = env.step(5)[0], env.np_random.bit_generator.state
    with pytest.raises(ValueError, match=message):
        env.reset(seed=1, options=options)
    assert env.np_random.bit_generator.state == state
    assert env.step(6)[0]["attention_mask"].sum() == before["attention_mask"].sum() + 1


def test_a_prompt_that_cannot_be_made_leaves_the_running_episode_its_group_and_the_seed(kwargs: dict[str, Any]) -> None:
    broken = False

    def moody(number: int) -> dict[str, Any]:
        if broken:
            raise ConnectionError("the problems are away")
        return {"prompt": f"{number:013}"}

    kwargs |= {"prompts": GeneratedPrompts(moody), "max_prompt_tokens": None}
    env, control = TextEnv(group_size=2, **kwargs), TextEnv(group_size=2, **kwargs)
    for one in (env, control):
        one.reset(seed=0)
        one.step(5)
    broken = True
    with pytest.raises(ConnectionError, match="the problems are away"):
        env.reset(seed=1)
    broken = False
    assert env.np_random_seed == 0
    assert data_equivalence(env.step(6), control.step(6), exact=True)
    for seed in (None, None, 1, None):  # the rest of the group, a group of its own, and one of another seed
        assert data_equivalence(env.reset(seed=seed), control.reset(seed=seed), exact=True)
    assert env.np_random_seed == 1
