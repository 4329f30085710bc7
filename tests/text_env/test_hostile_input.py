"""Whatever reset and step are given, they answer with an error of theirs and stay as they were.

``HOSTILE_EXAMPLES=10000 python -m pytest tests/text_env/test_hostile_input.py`` tries more than the suite does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import ids_score, tiny_tokenizer

from text_env import NO_ACTION, TextEnv, TextVectorEnv
from text_env.rewards import RewardError

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "300"))
ROWS = 2
ALLOWED = (ValueError, RewardError, gym.error.Error)  # ResetNeeded is one of gymnasium's


def moody(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward that fails for some texts."""
    if any(ids[0] % 5 == 0 for ids in completion_ids):
        raise KeyError("a reward's own error")
    return [ids_score(ids) for ids in completion_ids]


SETTINGS = {
    "tokenizer": tiny_tokenizer(),
    "prompts": [{"prompt": "The movie", "answer": 1}, {"prompt": "I loved", "answer": 2}, {"prompt": "This"}],
    "reward": moody,
    "max_prompt_tokens": 8,
    "max_new_tokens": 3,
    "stop": "good",
    "group_size": 2,
}
SCALAR = TextEnv(**SETTINGS)
VECTORS = {mode: TextVectorEnv(ROWS, autoreset_mode=mode, **SETTINGS) for mode in AutoresetMode}

integers = st.integers(-3, 310) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 2**70, -(2**63), -(2**70)])
texts = st.text(max_size=6) | st.sampled_from(["The movie", " was", "good", "<eos>", "<pad>", "", "\ud800", "\x00"])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    st.floats(),
    st.complex_numbers(max_magnitude=2),
    texts,
    st.binary(max_size=3),
    st.sampled_from([object(), int, len, ..., NotImplemented, range(2), np.random.default_rng(0), 10**400]),
    integers.filter(lambda value: -(2**63) <= value < 2**63).map(np.int64),
    st.floats(width=32).map(np.float32),
    st.sampled_from([np.bool_(True), np.str_("good"), np.datetime64("2026-01-01"), np.array(3), np.array(None)]),
)
arrays = st.builds(
    lambda shape, kind: np.ones(shape).astype(kind),
    st.sampled_from([(), (0,), (1,), (ROWS,), (3,), (ROWS, 1), (ROWS, ROWS), (1, ROWS, 1)]),
    st.sampled_from(["int64", "int8", "uint8", "uint64", "float64", "bool", "object", "str", "complex64", "M8[s]"]),
)
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "other", 3]), st.sampled_from(["user", "system", "", None, 7])),
    max_size=2,
)


def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, min_size=ROWS, max_size=ROWS),
        st.lists(inner, max_size=2).map(iter),
        st.dictionaries(st.sampled_from(["prompt", "role", "content", 0]), inner, max_size=2),
        st.sets(integers, max_size=3),
    )


anything = st.recursive(scalars | arrays | messages, containers, max_leaves=4)
token_ids = st.lists(st.integers(2, 299), min_size=1, max_size=3)
entries = st.none() | st.sampled_from(["The movie", " was"]) | token_ids | texts | messages
good_masks = st.lists(st.booleans(), min_size=ROWS, max_size=ROWS).map(np.array)


def options(wrap: Callable[[Any], Any]) -> st.SearchStrategy[Any]:
    named = st.fixed_dictionaries({}, optional={"prompt": wrap(entries), "response": wrap(entries)})
    masked = st.fixed_dictionaries({}, optional={"prompt": wrap(entries), "reset_mask": good_masks | anything})
    odd = st.dictionaries(
        st.sampled_from(["prompt", "response", "reset_mask", "seed", "", 0, None, ("a",)]), anything, max_size=3
    )
    return st.none() | named | masked | odd | anything


seeds = st.none() | st.integers(0, 9) | integers | st.lists(integers | st.none(), max_size=3) | anything
actions = st.integers(2, 299) | integers | anything
rows_of_actions = (
    st.lists(st.integers(NO_ACTION, 299), min_size=ROWS, max_size=ROWS).map(np.array)
    | st.lists(integers, min_size=ROWS, max_size=ROWS)
    | anything
)


def calls(
    one: st.SearchStrategy[Any], wrap: Callable[[Any], Any]
) -> st.SearchStrategy[list[tuple[str, dict[str, Any]]]]:
    # One of the two is in order, mostly: an error of the options would hide what the seed does.
    reset = st.one_of(
        st.fixed_dictionaries({"seed": seeds}),
        st.fixed_dictionaries({"options": options(wrap)}),
        st.fixed_dictionaries({"seed": seeds, "options": options(wrap)}),
    )
    return st.lists(reset.map(lambda given: ("reset", given)) | one, min_size=1, max_size=6)


def state(env: TextEnv | TextVectorEnv) -> dict[str, Any]:
    """All that a call could change, by name, as values that can be compared."""
    found = {f"episodes.{name}": value for name, value in vars(env.episodes).items()}
    if isinstance(env, TextEnv):
        found |= {
            "steps": env._steps,
            "warned": env._warned,
            "time_limit": env._time_limit,
            "seed": env._np_random_seed,
        }
        generators = [env.np_random]
    else:
        found |= {"mode": env.autoreset_mode, "seed": env.np_random_seed}
        generators = list(env.np_random)
    found["generators"] = [id(generator) for generator in generators]
    found["draws"] = [repr(generator.bit_generator.state) for generator in generators]
    return {
        name: (value.dtype, value.shape, value.tobytes())
        if isinstance(value, np.ndarray)
        else list(value)
        if isinstance(value, list)
        else value
        for name, value in found.items()
    }


def play(env: Any, sequence: list[tuple[str, dict[str, Any]]]) -> None:
    """Make the calls, and check after each error that nothing has changed."""
    for method, given_arguments in sequence:
        before = state(env)
        try:
            getattr(env, method)(**given_arguments)
        except ALLOWED:
            after = state(env)
            assert [name for name in before if before[name] != after[name]] == []


quick = settings(
    max_examples=EXAMPLES // 2,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module", autouse=True)
def started() -> None:
    for env in (SCALAR, *VECTORS.values()):
        env.reset(seed=0)


@quick
@given(calls(actions.map(lambda action: ("step", {"action": action})), lambda strategy: strategy | anything))
def test_the_scalar_environment_answers_anything_with_an_error_of_its_own_and_stays_as_it_was(sequence: Any) -> None:
    play(SCALAR, sequence)


@quick
@given(
    st.sampled_from(list(VECTORS)),
    calls(
        rows_of_actions.map(lambda action: ("step", {"actions": action})),
        lambda strategy: st.lists(strategy, min_size=1, max_size=ROWS) | anything,
    ),
)
def test_the_vector_environment_answers_anything_with_an_error_of_its_own_and_stays_as_it_was(
    mode: AutoresetMode, sequence: Any
) -> None:
    play(VECTORS[mode], sequence)
