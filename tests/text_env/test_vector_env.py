"""The batched face: the same as n scalar environments, in Gymnasium's conventions."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import ClipReward, TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import RecordingReward, tiny_tokenizer

from text_env import NO_ACTION, RewardError, TextEnv, TextVectorEnv
from text_env.generated import ATTEMPTS, GeneratedPrompts
from text_env.prompts import N_INSPECTED
from text_env.vector_env import plain

PROMPTS = ["The movie", "I loved", "The film was", "The music"]
TOKENIZERS = {pad: tiny_tokenizer(pad) for pad in (True, False)}
EOS = 0
Make = Callable[..., TextVectorEnv]


@pytest.fixture
def make(tokenizer: Any) -> Make:
    """Four rows with small budgets; keyword arguments override."""

    def make_env(**kwargs: Any) -> TextVectorEnv:
        defaults = {"num_envs": 4, "tokenizer": tokenizer, "prompts": PROMPTS, "reward": RecordingReward()}
        return TextVectorEnv(**{**defaults, "max_prompt_tokens": 8, "max_new_tokens": 6, **kwargs})

    return make_env


def as_gymnasium_would(mode: AutoresetMode, **kwargs: Any) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: TextEnv(**kwargs)] * 3, autoreset_mode=mode)


@settings(max_examples=40, deadline=None)
@given(
    actions=st.lists(
        st.lists(st.one_of(st.just(EOS), st.integers(0, 299)), min_size=3, max_size=3), min_size=1, max_size=20
    ),
    mode=st.sampled_from([AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP]),
    pad=st.booleans(),
    options=st.fixed_dictionaries(
        {"min_new_tokens": st.integers(0, 4), "stop": st.sampled_from([None, "a"]), "max_new_tokens": st.integers(4, 6)}
    ),
    seed=st.integers(0, 2**31),
)
def test_it_returns_step_by_step_what_gymnasium_makes_of_scalar_environments(
    actions: list[list[int]], mode: AutoresetMode, pad: bool, options: dict[str, Any], seed: int
) -> None:
    kwargs = {
        "tokenizer": TOKENIZERS[pad],
        "prompts": PROMPTS,
        "reward": {RecordingReward(): 1.0, "sentiment": 0.5},
        "metrics": {"gold_score": "sentiment"},
        "max_prompt_tokens": 8,
        **options,
    }
    native, theirs = TextVectorEnv(3, **kwargs, autoreset_mode=mode), as_gymnasium_would(mode, **kwargs)
    assert data_equivalence(native.reset(seed=seed), theirs.reset(seed=seed), exact=True)
    for step in actions:
        ours, expected = native.step(np.array(step)), theirs.step(np.array(step))
        assert [np.asarray(part).dtype for part in ours[1:4]] == [np.asarray(part).dtype for part in expected[1:4]]
        assert ours[4].keys() == expected[4].keys()
        assert_same(ours, expected)


def assert_same(ours: Any, expected: Any) -> None:
    """Everything equal: values, types, keys, and what stands where a mask is false."""
    assert type(ours) is type(expected)
    if isinstance(ours, dict):
        assert ours.keys() == expected.keys()
        for key in ours:
            assert_same(ours[key], expected[key])
    elif isinstance(ours, tuple) or (isinstance(ours, np.ndarray) and ours.dtype == object):
        for one, other in zip(ours, expected, strict=True):
            assert_same(one, other)
    elif isinstance(ours, np.ndarray):
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)
    else:
        assert ours == expected


def test_disabled_autoreset_with_masked_resets_is_what_gymnasium_does_too(tokenizer: Any) -> None:
    kwargs = {
        "tokenizer": tokenizer,
        "prompts": PROMPTS,
        "reward": "sentiment",
        "max_prompt_tokens": 8,
        "max_new_tokens": 4,
    }
    native = TextVectorEnv(3, **kwargs, autoreset_mode="Disabled")
    theirs = as_gymnasium_would(AutoresetMode.DISABLED, **kwargs)
    assert_same(native.reset(seed=1), theirs.reset(seed=1))
    generator = np.random.default_rng(0)
    for _ in range(40):
        actions = np.where(generator.random(3) < 0.3, EOS, generator.integers(300, size=3))
        ours, expected = native.step(actions), theirs.step(actions)
        assert_same(ours, expected)
        if ours[2].any():
            mask = ours[2]
            assert_same(native.reset(options={"reset_mask": mask}), theirs.reset(options={"reset_mask": mask.copy()}))


@pytest.mark.parametrize("group_size", [1, 2, 3])
def test_one_row_is_the_scalar_environment_for_every_group_size(tokenizer: Any, group_size: int) -> None:
    kwargs = {"tokenizer": tokenizer, "prompts": PROMPTS, "reward": "sentiment", "group_size": group_size}
    native, scalar = TextVectorEnv(1, **kwargs), TextEnv(**kwargs)
    obs, info = scalar.reset(seed=4)
    assert data_equivalence({k: v[0] for k, v in native.reset(seed=4)[0].items()}, obs, exact=True)
    for _ in range(12):
        _, _, terminated, _, infos = native.step(np.array([EOS]))
        assert (terminated[0], scalar.step(EOS)[2]) == (True, True)
        info = scalar.reset()[1]
        assert infos["prompt"][0] == info["prompt"]


def test_every_returned_array_is_a_fresh_copy(make: Make) -> None:
    env = make()
    results: list[Any] = [env.reset(seed=0)[0]]
    for actions in ([50] * 4, [EOS, 50, EOS, 50], [51] * 4, [NO_ACTION] * 4):
        obs, rewards, terminated, truncated, infos = env.step(np.array(actions))
        results.append({**obs, "rewards": rewards, "terminated": terminated, "truncated": truncated})
        results.extend(final for final in infos.get("final_obs", []) if final is not None)
    copies = deepcopy(results)
    env.step(np.array([EOS] * 4))
    for index, one in enumerate(results):
        assert data_equivalence(one, copies[index], exact=True)
        for other in results[:index]:
            assert not any(np.shares_memory(a, b) for a in one.values() for b in other.values())


def test_no_action_leaves_a_row_exactly_as_it_is(make: Make) -> None:
    env = make()
    before, _ = env.reset(seed=0)
    obs, rewards, terminated, _, infos = env.step(np.array([NO_ACTION, 50, EOS, NO_ACTION]))
    for row in (0, 3):
        assert all((obs[key][row] == before[key][row]).all() for key in obs)
    assert rewards[[0, 3]].tolist() == [0.0, 0.0]
    assert terminated.tolist() == [False, False, True, False]
    assert infos["_final_info"].tolist() == [False, False, True, False]
    everything = env.step(np.full(4, NO_ACTION))
    assert data_equivalence(everything[0], obs, exact=True)
    assert everything[4] == {}


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_no_action_leaves_a_finished_row_finished(make: Make, mode: str) -> None:
    env = make(autoreset_mode=mode)
    env.reset(seed=0)
    ended = env.step(np.array([EOS, 50, 50, 50]))
    later = env.step(np.array([NO_ACTION, 51, 51, 51]))
    assert (later[0]["input_ids"][0] == ended[0]["input_ids"][0]).all()
    assert not later[2].any()


def test_the_autoreset_mode_can_be_switched_and_the_metadata_follows(make: Make) -> None:
    env, other = make(), make(autoreset_mode="NextStep")
    assert env.autoreset_mode == env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    env.autoreset_mode = "Disabled"
    assert env.autoreset_mode == env.metadata["autoreset_mode"] == AutoresetMode.DISABLED
    assert other.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert "autoreset_mode" not in TextVectorEnv.metadata
    with pytest.raises(ValueError, match="Sometimes"):
        env.autoreset_mode = "Sometimes"


def test_make_vec_passes_the_autoreset_mode_on(tokenizer: Any) -> None:
    env = gym.make_vec(
        "TextRLHF-v0", 2, tokenizer=tokenizer, prompts=PROMPTS, reward="sentiment", autoreset_mode="NextStep"
    )
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert env.spec is not None
    env.close()


def test_a_real_action_for_a_finished_row_is_an_error_that_names_it_and_loses_nothing(make: Make) -> None:
    env = make(autoreset_mode="Disabled")
    env.reset(seed=0)
    before = env.step(np.array([50, EOS, 50, EOS]))[0]
    with pytest.raises(gym.error.ResetNeeded, match=r"rows \[1, 3\] are over.*'reset_mask'"):
        env.step(np.array([51, 51, 51, 51]))
    assert data_equivalence(env.step(np.full(4, NO_ACTION))[0], before, exact=True)


def test_an_action_outside_the_vocabulary_is_an_error_that_names_the_rows_and_loses_nothing(make: Make) -> None:
    env = make()
    before, _ = env.reset(seed=0)
    with pytest.raises(ValueError, match=r"got \[300, -2\] for rows \[1, 3\]"):
        env.step(np.array([50, 300, 50, -2]))
    assert data_equivalence(env.step(np.full(4, NO_ACTION))[0], before, exact=True)


@pytest.mark.parametrize("actions", [np.zeros(3, int), np.zeros((4, 1), int), np.zeros(4), 5])
def test_actions_of_another_shape_or_type_are_an_error(make: Make, actions: Any) -> None:
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"Expected 4 actions, integers of shape \(4,\)"):
        env.step(actions)


@pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
def test_after_a_reward_has_failed_the_same_step_can_be_repeated(make: Make, mode: str) -> None:
    broken = True

    def moody(completion_ids: list[Any], **_: Any) -> list[float]:
        if broken:
            raise ConnectionError("the reward server is away")
        return [1.0] * len(completion_ids)

    env, control = (
        make(reward=moody, autoreset_mode=mode),
        make(reward=lambda completions, **_: [1.0] * len(completions)),
    )
    control.autoreset_mode = mode
    for one in (env, control):
        one.reset(seed=0)
        one.step(np.full(4, 50))
    actions = np.array([EOS, 51, EOS, NO_ACTION])
    with pytest.raises(RewardError, match=r"'moody' raised ConnectionError: the reward server is away.*completion"):
        env.step(actions)
    broken = False
    assert_same(env.step(actions), control.step(actions))
    assert_same(
        env.step(np.array([NO_ACTION, 52, NO_ACTION, 52])), control.step(np.array([NO_ACTION, 52, NO_ACTION, 52]))
    )


@pytest.mark.parametrize("mode", [mode.value for mode in AutoresetMode])
@pytest.mark.parametrize(
    ("logged", "dtype"),
    [
        ([7, None], object),
        ([1, 2.5], object),
        ([0.5, None], object),
        ([True, 3], object),
        ([1, 2**70], object),
        ([1.0, "one"], object),
        ([{"a": 1}, {"b": {}}], object),
        ([{"a": 1}, None], object),
        ([[1, 2], [3, 4]], object),
        ([np.zeros(2), np.ones(3)], object),
        ([np.zeros(2), np.ones(2)], np.float64),
        ([np.float32(0.5), np.float32(1.5)], np.float32),
        ([1, 2], np.int64),
        ([1.0, 2.5], np.float64),
        ([True, False], np.bool_),
    ],
)
def test_every_row_gets_back_exactly_what_was_logged_of_it(
    make: Make, mode: str, logged: list[Any], dtype: Any
) -> None:
    def reward(log_extra: Any, **_: Any) -> list[float]:
        log_extra("what", logged)
        return [1.0, 2.0]

    env = make(reward=reward, autoreset_mode=mode)
    env.reset(seed=0)
    *_, infos = env.step(np.array([50, EOS, 50, EOS]))
    final = infos.get("final_info", infos)
    assert final["_what"].tolist() == [False, True, False, True]
    assert final["what"].dtype == dtype
    for row, value in zip((1, 3), logged, strict=True):
        assert_same(final["what"][row], value if dtype is object else np.asarray(value, dtype)[()])


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_after_a_prompt_could_not_be_made_the_same_reset_or_step_can_be_repeated(
    make: Make, mode: AutoresetMode
) -> None:
    to_make = [0]  # 1: the next prompt fails

    def moody(number: int) -> dict[str, Any]:
        if number >= N_INSPECTED * ATTEMPTS:  # a prompt that was not made with the environment
            to_make[0] -= 1
            if to_make[0] == 0:
                raise ConnectionError("the problems are away")
        return {"prompt": f"{number:013}"}

    env, control = (make(prompts=GeneratedPrompts(moody), max_prompt_tokens=None, autoreset_mode=mode) for _ in "ab")

    def both(call: Callable[[TextVectorEnv], Any], fails: bool) -> None:
        if fails:
            to_make[0] = 2  # the first row's prompt is drawn by then
            with pytest.raises(ConnectionError, match="the problems are away"):
                call(env)
        assert_same(call(env), call(control))

    both(lambda one: one.reset(seed=0), True)
    both(lambda one: one.step(np.array([EOS, 51, EOS, NO_ACTION])), mode == AutoresetMode.SAME_STEP)
    over = NO_ACTION if mode == AutoresetMode.DISABLED else 50
    both(lambda one: one.step(np.array([over, 52, over, 52])), mode == AutoresetMode.NEXT_STEP)
    both(lambda one: one.reset(options={"reset_mask": np.array([True, False, True, False])}), True)
    both(lambda one: one.reset(seed=8), True)
    both(lambda one: one.step(np.array([50, 51, 52, 53])), False)


def test_a_masked_reset_takes_prompts_and_responses_for_the_rows_that_are_reset(make: Make, tokenizer: Any) -> None:
    env = make(autoreset_mode="Disabled")
    env.reset(seed=0)
    before = env.step(np.array([50, EOS, 50, EOS]))[0]
    options = {
        "reset_mask": np.array([False, True, False, True]),
        "prompt": ["I hated", None],
        "response": [None, [60, 61]],
    }
    obs, infos = env.reset(options=options)
    assert (obs["input_ids"][[0, 2]] == before["input_ids"][[0, 2]]).all()
    given = tokenizer("I hated")["input_ids"]
    assert obs["input_ids"][1, : obs["attention_mask"][1].sum()].tolist() == given
    assert obs["input_ids"][3, obs["prompt_length"][3, 0] : obs["attention_mask"][3].sum()].tolist() == [60, 61]
    assert infos["prompt"][1] == "I hated"
    assert infos["_prompt"].tolist() == [False, True, False, True]
    assert "reset_mask" in options  # the caller's dictionary is the caller's


@pytest.mark.parametrize(
    "mask", [np.zeros(4, bool), np.ones(3, bool), np.ones(4, int), [True] * 4], ids=["empty", "short", "int", "list"]
)
def test_a_reset_mask_of_another_kind_is_refused(make: Make, mask: Any) -> None:
    env = make()
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"bool array of shape \(4,\) with at least one True"):
        env.reset(options={"reset_mask": mask})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ["The", "movie"]}, "one entry for each of the 4 rows"),
        ({"prompt": "The movie"}, "one entry for each of the 4 rows"),
        ({"response": [None, None, None, [5] * 6]}, "spends the whole budget"),
        ({"mask": 1}, "Unknown reset options"),
    ],
)
def test_a_reset_that_cannot_be_is_refused_and_no_row_is_touched(
    make: Make, options: dict[str, Any], message: str
) -> None:
    env = make()
    env.reset(seed=0)
    before, states = env.step(np.full(4, 50))[0], [generator.bit_generator.state for generator in env.np_random]
    with pytest.raises(ValueError, match=message):
        env.reset(seed=8, options=options)
    assert data_equivalence(env.step(np.full(4, NO_ACTION))[0], before, exact=True)
    assert [generator.bit_generator.state for generator in env.np_random] == states


def test_seeds_may_be_a_list_and_a_row_without_one_goes_on_with_its_generator(make: Make) -> None:
    prompts = [f"{first}{second}" for first in "abcdefgh" for second in "abcdefgh"]
    env, other = make(prompts=prompts), make(prompts=prompts)
    assert_same(env.reset(seed=3), other.reset(seed=[3, 4, 5, 6]))
    assert env.np_random_seed == (3, 4, 5, 6)
    reseeded, went_on = env.reset(seed=[3, None, 3, None])[1]["prompt"], other.reset()[1]["prompt"]
    assert reseeded[0] == reseeded[2]
    assert reseeded[[1, 3]].tolist() == went_on[[1, 3]].tolist()
    with pytest.raises(ValueError, match="a list of num_envs=4 seeds"):
        env.reset(seed=[1, 2])


def test_before_the_first_reset_a_step_is_an_error(make: Make) -> None:
    with pytest.raises(gym.error.ResetNeeded, match="never started"):
        make().step(np.full(4, 50))


def test_a_step_that_finishes_nothing_decodes_nothing(make: Make, monkeypatch: Any) -> None:
    env = make()
    env.reset(seed=0)
    monkeypatch.setattr("text_env.episodes.decode_completions", None)
    env.step(np.full(4, 50))
    with pytest.raises(TypeError):
        env.step(np.full(4, EOS))


def test_the_environment_itself_is_plain_and_one_in_wrappers_is_refused_with_their_names(make: Make) -> None:
    env = make()
    assert plain(env) is env
    wrapped = ClipReward(TransformReward(env, lambda reward: 2 * reward), 0, 1)
    with pytest.raises(ValueError, match=r"wrapped in ClipReward, TransformReward\. .*would never apply") as refused:
        plain(wrapped)
    assert "reward=, shaping= or constraint=" in str(refused.value)
    with pytest.raises(ValueError, match="Expected a text vector environment"):
        plain(TransformReward(gym.make_vec("CartPole-v1", num_envs=2), abs))


@pytest.mark.parametrize("face", ["scalar", "vector"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": [5.0]}, r"the prompt to be a text, or token ids, which are a list of integers; got \[5.0\]"),
        ({"prompt": b"The movie"}, "the prompt to be a text, or token ids"),
        ({"prompt": ["5", "6"]}, "the prompt to be a text, or token ids"),
        ({"prompt": [True, False]}, "the prompt to be a text, or token ids"),
        ({"prompt": 5}, "the prompt to be a text, or token ids"),
        ({"prompt": [[5], [6]]}, "the prompt to be a text, or token ids"),
        ({"prompt": np.ones((2, 2), np.int64)}, "the prompt to be a text, or token ids"),
        ({"prompt": np.array([5.0, 6.0])}, "the prompt to be a text, or token ids"),
        ({"prompt": {"prompt": "The movie"}}, "the prompt to be a text, or token ids"),
        ({"prompt": "half \ud800"}, "the prompt to be Unicode text"),
        ({"response": [2.5]}, "the response to be a text, or token ids"),
        ({"response": b"ab"}, "the response to be a text, or token ids"),
        ({"response": "half \udfff"}, "the response to be Unicode text"),
        ({1: "The movie", "propmt": "x"}, r"Unknown reset options \[1, 'propmt'\]"),
    ],
)
def test_an_option_of_the_wrong_type_is_refused_with_what_it_may_be(
    make: Make, tokenizer: Any, face: str, options: dict[Any, Any], message: str
) -> None:
    env: Any = make(num_envs=1)
    if face == "scalar":
        env = TextEnv(tokenizer=tokenizer, prompts=PROMPTS, reward=RecordingReward())
        given = options
    else:
        given = {name: [value] for name, value in options.items()}
    env.reset(seed=0)
    before = deepcopy(env.stream())
    with pytest.raises(ValueError, match=message):
        env.reset(options=given)
    assert env.stream() == before


def test_seeds_and_options_of_the_wrong_type_are_refused(make: Make, tokenizer: Any) -> None:
    scalar = TextEnv(tokenizer=tokenizer, prompts=PROMPTS, reward=RecordingReward())
    for env in (make(), scalar):
        for seed in ("3", 3.0, -1, b"3", {"seed": 3}, True, np.float64(3)):
            with pytest.raises(ValueError, match="Expected a seed to be an integer of at least 0, or None, got"):
                env.reset(seed=seed)  # type: ignore[arg-type]
        for options in (["prompt"], "prompt", 3):
            with pytest.raises(ValueError, match="Expected the reset options to be a mapping"):
                env.reset(options=options)  # type: ignore[arg-type]
    for prompts in (3, "The movie", b"abcd", {"prompt": "x"}, np.int64(3), iter(PROMPTS)):
        with pytest.raises(ValueError, match=r"Expected options\['prompt'\] to be a list with one entry for each"):
            make().reset(options={"prompt": prompts})
    with pytest.raises(ValueError, match="Expected a seed to be an integer"):
        make().reset(seed=[0, 1, "2", None])  # type: ignore[list-item]
    assert scalar.reset(seed=np.int64(3))[1] == scalar.reset(seed=3)[1]  # type: ignore[arg-type]
    assert data_equivalence(make().reset(seed=np.arange(4)), make().reset(seed=0))  # type: ignore[arg-type]
