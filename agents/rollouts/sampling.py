"""Texts of a policy, for whoever wants to read or to measure them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from text_env.vector_env import TextVectorEnv


def sample_texts(
    policy: CausalLMPolicy, env: TextVectorEnv, prompts: Sequence[Any], deterministic: bool = False
) -> list[dict[str, Any]]:
    """One completion for each prompt.

    :param policy: writes.
    :param env: scores.
    :param prompts: as a reset takes them.
    :param deterministic: greedy.
    :return: each episode's final info (``prompt``, ``completion``, ``score``, …).
    """
    return collect_texts(policy, env, len(prompts), deterministic=deterministic, prompts=prompts)[1]


def collect_texts(
    policy: CausalLMPolicy, env: TextVectorEnv, n_episodes: int, reference: Reference | None = None, **options: Any
) -> tuple[EpisodeBuffer, list[dict[str, Any]]]:
    """Whole episodes, as training collects them.

    :param policy: writes.
    :param env: scores.
    :param n_episodes: how many.
    :param reference: for the buffer, which measures the KL to it.
    :param options: further arguments of :func:`agents.rollouts.collector.collect_episodes`.
    :return: the buffer that holds the episodes, and each episode's final info.
    """
    spaces = env.single_observation_space, env.single_action_space
    buffer = EpisodeBuffer(0, *spaces, policy.device, n_envs=env.num_envs, reference=reference)
    policy.set_training_mode(False)
    return buffer, collect_episodes(policy, env, n_episodes, buffer, **options)
