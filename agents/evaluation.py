"""How good is a policy: its texts scored, and compared with the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.utils import get_device

from agents.collector import collect_episodes
from agents.episode_buffer import EpisodeBuffer
from agents.policy import CausalLMPolicy
from agents.reference import Reference
from text_env.vector_env import TextVectorEnv


def load_policy(
    model: str | Path,
    env: TextVectorEnv,
    device: str = "auto",
    dtype: str = "float32",
    temperature: float = 1.0,
) -> CausalLMPolicy:
    """A policy for evaluation and sampling.

    :param model: as for ``CausalLMPolicy``; a directory of ``save_pretrained`` is one.
    :param env: gives the spaces, EOS, the minimum length and the constraint.
    :param device: where it runs. :param dtype: of the weights.
    :param temperature: 1 evaluates the model itself.
    :return: the policy.
    """
    policy = CausalLMPolicy(
        env.single_observation_space,
        env.single_action_space,
        lambda _: 0.0,
        model=model,
        dtype=dtype,
        temperature=temperature,
        min_new_tokens=env.min_new_tokens,
        constraint=env.constraint,
        eos_token_id=env.eos_token_id,
        tokenizer=env.tokenizer,
    )
    return policy.to(get_device(device))


def evaluate(policy: CausalLMPolicy, reference: CausalLMPolicy, env: TextVectorEnv, n_episodes: int) -> dict[str, Any]:
    """Sample from both at temperature 1, score and compare.

    :param policy: what was trained. :param reference: what it started from. :param env: prompts and rewards.
    :param n_episodes: of each.
    :return: ``policy`` and ``reference`` (means over episodes: ``score``, every metric of the environment such as
        ``gold_score``, ``distinct_2``, ``mean_length``, ``terminated_ratio``, ``perplexity`` under the reference),
        ``kl`` (mean per-episode Σ log π − log π_ref of the policy's own texts, nats), ``score_gain_std`` (gain in
        standard deviations of the reference's scores; None if those are all equal).
    """
    frozen = Reference(reference.lm)
    ours, theirs = (measure(writer, frozen, env, n_episodes) for writer in (policy, reference))
    gain, spread = ours["score"] - theirs["score"], theirs.pop("score_std")
    del ours["score_std"], theirs["kl"]
    return {
        "kl": ours.pop("kl"),
        "policy": ours,
        "reference": theirs,
        "score_gain_std": gain / spread if spread > 0 else None,
        "episodes": n_episodes,
    }


def measure(policy: CausalLMPolicy, reference: Reference, env: TextVectorEnv, n_episodes: int) -> dict[str, float]:
    """
    :param policy: writes. :param reference: of perplexity and KL. :param env: prompts and rewards.
    :param n_episodes: how many. :return: what :func:`describe` says of them.
    """
    policy.set_training_mode(False)
    buffer = _buffer(policy, env, reference)
    episodes = collect_episodes(policy, env, n_episodes, buffer)
    return describe(buffer, episodes)


def describe(buffer: EpisodeBuffer, episodes: list[dict[str, Any]]) -> dict[str, float]:
    """
    :param buffer: holds the episodes, and the reference. :param episodes: their final infos.
    :return: means over episodes of ``score`` and every metric, ``score_std``, ``distinct_1``, ``distinct_2``,
        ``mean_length``, ``terminated_ratio``, ``perplexity`` of the texts under the reference, and ``kl`` to it.
    """
    buffer.finalize()
    metrics = [k for k, v in episodes[0].items() if isinstance(v, float | np.floating)]
    means = {name: float(np.mean([episode[name] for episode in episodes])) for name in metrics}
    ref_log_probs = buffer.log_probs - buffer.log_ratio
    texts = [episode["completion"] for episode in episodes]
    return {
        **means,
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "mean_length": float(buffer.lengths.mean()),
        "terminated_ratio": float(np.mean([episode["finish_reason"] != "length" for episode in episodes])),
        "perplexity": float(np.exp(-ref_log_probs.mean())),
        "kl": float(buffer.episode_sums(buffer.log_ratio).mean()),
        "score_std": float(np.std([episode["score"] for episode in episodes])),
    }


def distinct_n(texts: list[str], n: int) -> float:
    """Share of distinct n-grams of words among all of them (Li et al. 2016, https://arxiv.org/abs/1510.03055).

    :param texts: completions. :param n: words in a row. :return: in [0, 1]; 0 if there are none.
    """
    grams = [tuple(words[i : i + n]) for words in (t.lower().split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def sample_texts(
    policy: CausalLMPolicy, env: TextVectorEnv, prompts: list[str], deterministic: bool = False
) -> list[dict[str, Any]]:
    """One completion for each prompt.

    :param policy: writes. :param env: scores. :param prompts: openings. :param deterministic: greedy.
    :return: each episode's final info (``prompt``, ``completion``, ``score``, …).
    """
    policy.set_training_mode(False)
    return collect_episodes(policy, env, len(prompts), _buffer(policy, env), deterministic, prompts=prompts)


def _buffer(policy: CausalLMPolicy, env: TextVectorEnv, reference: Reference | None = None) -> EpisodeBuffer:
    spaces = env.single_observation_space, env.single_action_space
    return EpisodeBuffer(0, *spaces, policy.device, n_envs=env.num_envs, reference=reference)
