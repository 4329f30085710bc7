"""Texts of a policy, to be read or measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.collector import collect_episodes
from agents.rollouts.episode_buffer import EpisodeBuffer
from text_env.vector_env import TextVectorEnv, plain


def sample_texts(
    policy: CausalLMPolicy, env: TextVectorEnv | VecEnv, prompts: Sequence[Any], deterministic: bool = False
) -> list[dict[str, Any]]:
    """Let a policy write one completion for each prompt.

    :param policy: the policy that writes.
    :param env: the environment, which scores the texts.
    :param prompts: the prompts, each in a form that a reset takes (see :meth:`text_env.episodes.Episodes.openings`).
    :param deterministic: whether the policy chooses the most probable token instead of sampling one.
    :return: the final info of each episode (``prompt``, ``completion``, ``score``, …), in the order of the prompts.
    """
    return collect_texts(policy, env, len(prompts), deterministic=deterministic, prompts=prompts)[1]


def collect_texts(
    policy: CausalLMPolicy,
    env: TextVectorEnv | VecEnv,
    n_episodes: int,
    reference: Reference | None = None,
    **options: Any,
) -> tuple[EpisodeBuffer, list[dict[str, Any]]]:
    """Let a policy write whole episodes, as in training.

    :param policy: the policy that writes.
    :param env: the environment, which scores the texts.
    :param n_episodes: the number of episodes.
    :param reference: the frozen model that the KL divergence is measured from; None: it is not measured.
    :param options: further arguments of :func:`agents.rollouts.collector.collect_episodes`.
    :return: the buffer that holds the episodes, and the final info of each episode.
    """
    env = plain(env)
    spaces = env.single_observation_space, env.single_action_space
    buffer = EpisodeBuffer(0, *spaces, policy.device, n_envs=env.num_envs, reference=reference)
    policy.set_training_mode(False)
    return buffer, collect_episodes(policy, env, n_episodes, buffer, **options)
