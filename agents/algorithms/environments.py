"""The environment that an algorithm learns in: made by its name to suit the policy, and written down to be compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from transformers import PreTrainedTokenizerBase

from agents.rollouts.sb3_vec_env import TextVecEnv, make_vec_env
from text_env.constraints import name_of
from text_env.rewards import reward_name
from text_env.task_names import model_of_task, said_by_name
from text_env.vector_env import TextVectorEnv, plain

MAX_ROWS = 64  # the largest number of rows of an environment that is given by name


def as_vec_env(
    env: str | VecEnv | TextVectorEnv,
    n_episodes: int,
    group_size: int,
    policy_kwargs: dict[str, Any],
    at_once: bool = False,
) -> TextVecEnv:
    """
    :param env: the environment, as the constructor of an algorithm takes it.
    :param n_episodes: the number of episodes of a rollout.
    :param group_size: the group size of an environment that is given by name.
    :param policy_kwargs: the policy's. The model of the task that a name stands for is added to them.
    :param at_once: as for :func:`default_rows`.
    :return: the environment, as SB3 sees it.
    :raises ValueError: if it is none that the training loop can use.
    """
    if isinstance(env, str):
        said = said_by_name(env)
        if "model" not in policy_kwargs and (model := model_of_task(said.get("task"), said.get("task_kwargs"))):
            policy_kwargs["model"] = model
        options = options_by_name(env, policy_kwargs)
        if group_size > 1:
            options["group_size"] = group_size
        env = make_vec_env(env, n_envs=default_rows(n_episodes, group_size, at_once), env_kwargs=options)
    if isinstance(env, TextVecEnv):
        plain(env)  # the loop uses the innermost environment: wrappers would have no effect
        return env
    if isinstance(env, VectorEnv) and isinstance(env.unwrapped, TextVectorEnv):
        return TextVecEnv(plain(env))
    raise ValueError(
        "Expected env to be a registered name ('TextRLHF-v0'), gym.make_vec('TextRLHF-v0', num_envs=...) or "
        f"agents.make_vec_env(...), got {type(env).__name__}. For single or wrapped environments use SB3's algorithms."
    )


def default_rows(n_episodes: int, group_size: int, at_once: bool = False) -> int:
    """
    :param n_episodes: the number of episodes of a rollout.
    :param group_size: the environment's group size.
    :param at_once: whether there is a row for every episode, as where another program writes all of them side by side.
    :return: the number of rows of an environment that is made for such rollouts: whole groups, and at most ``MAX_ROWS``
        rows if a group is no larger.
    """
    rows = n_episodes if at_once else min(n_episodes, MAX_ROWS)
    return max(rows // group_size, 1) * group_size


def check_groups(learner: str, env: TextVectorEnv, n_episodes: int) -> None:
    """Episodes belong to groups by the order in which they start, so a rollout must consist of whole groups.

    :param learner: what compares the texts of a group, for the error.
    :param env: the environment.
    :param n_episodes: the number of episodes of a rollout.
    :raises ValueError: if there are no groups, or if a rollout or the rows of the environment are no whole groups.
    """
    size = env.group_size
    if size < 2:
        raise ValueError(
            f"{learner} compares the texts of one prompt with each other: expected an environment with group_size >= "
            f"2, got {size}. Make it with group_size=4, for example."
        )
    if n_episodes % size or env.num_envs % size:
        raise ValueError(
            f"Expected n_episodes and the rows of the environment to be multiples of its group_size={size}, got "
            f"n_episodes={n_episodes} and {env.num_envs} rows."
        )


def options_by_name(env: str, policy_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What an environment that is given by its registered name gets from the policy that is going to write in it.

    :param env: the name, perhaps with a module in front (``"my_module:MyText-v0"``).
    :param policy_kwargs: the policy's; its ``tokenizer`` or else that of its ``model`` becomes the environment's.
    :return: ``tokenizer`` and ``max_prompt_tokens`` (None: as long as the longest prompt is in that tokenizer), without
        what the registered name says itself. Empty for the model that the environment was made for (the built-in one,
        or its task's) and for one that has no name to go by.
    """
    said = said_by_name(env)
    own = model_of_task(said.get("task"), said.get("task_kwargs")) or "builtin"
    tokenizer = policy_kwargs.get("tokenizer") or policy_kwargs.get("model", "builtin")
    if tokenizer == own or not isinstance(tokenizer, str | Path | PreTrainedTokenizerBase):
        return {}
    options: dict[str, Any] = {} if "tokenizer" in said else {"tokenizer": tokenizer}
    if "max_prompt_tokens" not in said and "overlong_prompts" not in said:
        options["max_prompt_tokens"] = None
    return options


def environment_facts(env: TextVectorEnv) -> dict[str, Any]:
    """What has to be the same where a training goes on, because policy, memory and scores depend on it.

    :param env: the environment.
    :return: JSON values; of the tokenizer, the constraint and the reward as much as tells them from others.
    """
    vocabulary = json.dumps(sorted(env.tokenizer.get_vocab().items())).encode()
    return {
        "tokenizer": blake2b(vocabulary, digest_size=8).hexdigest(),
        "vocabulary": env.episodes.vocabulary,
        "eos_token_ids": list(env.eos_token_ids),
        "max_prompt_tokens": env.max_prompt_tokens,
        "max_new_tokens": env.max_new_tokens,
        "min_new_tokens": env.min_new_tokens,
        "stop": list(env.episodes.stop),
        "constraint": None if env.constraint is None else _without_address(name_of(env.constraint)),
        "reward": _without_address(reward_name(env.reward)),
        "group_size": env.group_size,
    }


def _without_address(name: str) -> str:
    """The name of an object as it is in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", name)


def check_facts(saved: Mapping[str, Any], env: TextVectorEnv) -> None:
    """
    :param saved: what :func:`environment_facts` said when a checkpoint was written.
    :param env: the environment in which it is to go on.
    :raises ValueError: naming every field in which the two differ, and both values.
    """
    now = environment_facts(env)
    differing = [name for name in now if saved.get(name) != now[name]]
    if differing:
        values = "; ".join(f"{name} was {saved.get(name)!r} and is {now[name]!r}" for name in differing)
        raise ValueError(
            f"Expected the environment that the checkpoint was written in, got another: {values}. Make it with the "
            "same settings; or, for a new training in another environment, save the policy by policy.save_pretrained("
            "directory) and start from it with policy_kwargs={'model': directory}."
        )


def spaces_of(facts: Mapping[str, Any]) -> tuple[spaces.Dict, spaces.Discrete[np.int64]]:
    """
    :param facts: what :func:`environment_facts` returned.
    :return: the observation space and the action space of one row of that environment.
    """
    columns = facts["max_prompt_tokens"] + facts["max_new_tokens"]
    observation_space = spaces.Dict(
        {
            "input_ids": spaces.Box(0, facts["vocabulary"] - 1, (columns,), np.int64),
            "attention_mask": spaces.Box(0, 1, (columns,), np.int8),
            "prompt_length": spaces.Box(1, facts["max_prompt_tokens"], (1,), np.int64),
        }
    )
    return observation_space, spaces.Discrete(facts["vocabulary"])
