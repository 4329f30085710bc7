"""How good is a policy: its texts scored, and compared with the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from agents.evaluation.intervals import bootstrap_interval, wilson_interval, wins
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sampling import collect_texts
from text_env.vector_env import TextVectorEnv


class Written(NamedTuple):
    """What one policy wrote, one text for each of n prompts.

    :param means: over the texts: what :func:`describe` says, without ``kl`` and ``score_std``.
    :param kl: to the reference, nats per text.
    :param scores: ``score`` and every metric, float64 [n] each.
    :param infos: n final infos.
    """

    means: dict[str, float]
    kl: float
    scores: dict[str, np.ndarray]
    infos: list[dict[str, Any]]


def evaluate(
    policy: CausalLMPolicy,
    reference: CausalLMPolicy,
    env: TextVectorEnv,
    n_episodes: int,
    against: CausalLMPolicy | None = None,
    seed: int = 0,
    n_texts: int = 0,
) -> dict[str, Any]:
    """Let a policy and its reference, or another policy, write for the same prompts; score and compare the texts.

    In what is returned, ``policy`` and ``reference`` are means over texts: ``score``, every metric of the environment
    (such as ``gold_score``) and every part of a weighted reward; ``distinct_1``, ``distinct_2``, ``mean_length``,
    ``terminated_ratio``, and ``perplexity`` under the reference. These five of the policy are at the top level too, and
    ``kl``: the mean per-episode Σ log π − log π_ref of its texts, nats. Of the two writers:

    - ``score_gain_std``: the gain in score, in standard deviations of the other's scores; None if those are all equal.
    - ``win_rate``, ``win_rate_interval``: share of prompts for which the policy's text scores higher; ties count half.
    - ``comparison``: for the score and each metric what :func:`compare` says.
    - ``intervals``: for each writer, the intervals of these means.
    - ``episodes`` of each, ``prompts`` that are different, ``compared_with``; ``texts``, if they were asked for.

    With ``against``, that policy's figures stand under ``against`` and ``kl_against``, nothing under ``reference``, and
    ``compared_with`` is ``"against"``, not ``"reference"``. Intervals are [low, high] of 95 %, clustered by prompt.

    :param policy: what was trained.
    :param reference: what it started from; KL and perplexity are measured by it.
    :param env: prompts and rewards; its prompts are gone through in random order, again and again if they are few.
    :param n_episodes: of each, at least 2.
    :param against: another policy, which writes in the reference's stead.
    :param seed: of the prompts and of the bootstrap; the texts are drawn from torch's generator.
    :param n_texts: how many pairs of texts to return, the first.
    :return: a plain dict, ready for JSON.
    :raises ValueError: for fewer than 2 episodes.
    """
    if n_episodes < 2:
        raise ValueError(f"Expected at least 2 episodes, since one says nothing of the spread, got {n_episodes}.")
    role, other = ("reference", reference) if against is None else ("against", against)
    drawn = draw_prompts(len(env.prompts), n_episodes, seed)
    prompts, frozen = [env.prompts[i] for i in drawn], Reference(reference.lm)
    ours, theirs = (write(writer, frozen, env, prompts) for writer in (policy, other))
    result = {"policy": ours.means, role: theirs.means, "kl": ours.kl, "compared_with": role}
    if against is not None:
        result["kl_against"] = theirs.kl
    result |= {"episodes": n_episodes, "prompts": len(set(drawn.tolist()))}
    result |= {name: mean for name, mean in ours.means.items() if name not in ours.scores}
    result |= _contest(ours, theirs, drawn, seed)
    result["intervals"] = {"policy": _intervals(ours, drawn, seed), role: _intervals(theirs, drawn, seed)}
    if n_texts:
        result["texts"] = side_by_side({role: theirs.infos[:n_texts], "policy": ours.infos[:n_texts]})
    return result


def _contest(ours: Written, theirs: Written, clusters: np.ndarray, seed: int) -> dict[str, Any]:
    comparison = {name: compare(ours.scores[name], theirs.scores[name], clusters, seed) for name in ours.scores}
    on_score, spread = comparison["score"], float(theirs.scores["score"].std())
    return {
        "score_gain_std": on_score["difference"] / spread if spread > 0 else None,
        "win_rate": on_score["win_rate"],
        "win_rate_interval": on_score["win_rate_interval"],
        "comparison": comparison,
    }


def _intervals(written: Written, clusters: np.ndarray, seed: int) -> dict[str, list[float]]:
    return {name: list(bootstrap_interval(values, clusters, seed)) for name, values in written.scores.items()}


def draw_prompts(n_prompts: int, n_episodes: int, seed: int) -> np.ndarray:
    """Go through a set of prompts in random order, as often as it takes: none is used twice before all were used once.

    :param n_prompts: in the set.
    :param n_episodes: how many to draw.
    :param seed: of the order.
    :return: int [n_episodes], indices of the set.
    """
    return np.resize(np.random.default_rng(seed).permutation(n_prompts), n_episodes)


def write(policy: CausalLMPolicy, reference: Reference, env: TextVectorEnv, prompts: Sequence[Any]) -> Written:
    """
    :param policy: writes.
    :param reference: of perplexity and KL.
    :param env: scores.
    :param prompts: n, as a reset takes them; entries of ``env.prompts`` keep their columns.
    :return: one text for each.
    """
    buffer, infos = collect_texts(policy, env, len(prompts), reference, prompts=prompts)
    scores = {
        name: np.array([info[name] for info in infos])
        for name in metrics_of(infos[0])
        if all(name in info for info in infos)
    }
    figures = describe(buffer, infos)
    kl, _ = figures.pop("kl"), figures.pop("score_std")
    return Written(figures, kl, scores, infos)


def compare(ours: np.ndarray, theirs: np.ndarray, clusters: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """
    :param ours: [n], scores of one policy's texts.
    :param theirs: [n], of the other's for the same prompts.
    :param clusters: int [n], which prompts those are.
    :param seed: of the bootstrap.
    :return: ``difference`` of the means and ``win_rate``, each with its ``…_interval``.
    """
    outcomes = wins(ours, theirs)
    return {
        "difference": float((ours - theirs).mean()),
        "difference_interval": list(bootstrap_interval(ours - theirs, clusters, seed)),
        "win_rate": float(outcomes.mean()),
        "win_rate_interval": list(wilson_interval(outcomes, clusters)),
    }


def side_by_side(infos: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """
    :param infos: for each writer n final infos, of the same prompts.
    :return: n times ``prompt``, and under each writer's name ``completion``, ``finish_reason``, ``score`` and metrics.
    """
    return [
        {"prompt": pair[0]["prompt"], **{writer: _text(info) for writer, info in zip(infos, pair, strict=True)}}
        for pair in zip(*infos.values(), strict=True)
    ]


def _text(info: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: float(info[name]) for name in metrics_of(info)}
    return {"completion": info["completion"], "finish_reason": info["finish_reason"], **numbers}


def measure_policy(
    policy: CausalLMPolicy, reference: Reference, env: TextVectorEnv, n_episodes: int
) -> dict[str, float]:
    """
    :param policy: writes.
    :param reference: of perplexity and KL.
    :param env: draws the prompts, and scores.
    :param n_episodes: how many.
    :return: what :func:`describe` says of them.
    """
    return describe(*collect_texts(policy, env, n_episodes, reference))


def describe(buffer: EpisodeBuffer, episodes: list[dict[str, Any]]) -> dict[str, float]:
    """
    :param buffer: holds the episodes, and the reference.
    :param episodes: their final infos.
    :return: means over episodes of ``score`` and every metric, ``score_std``, ``distinct_1``, ``distinct_2``,
        ``mean_length``, ``terminated_ratio``, ``perplexity`` of the texts under the reference, and ``kl`` to it.
    """
    buffer.finalize()
    # A part of the reward that does not apply to a text has no number there.
    metrics = sorted({name for episode in episodes for name in metrics_of(episode)})
    means = {name: float(np.mean([episode[name] for episode in episodes if name in episode])) for name in metrics}
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


def metrics_of(info: Mapping[str, Any]) -> list[str]:
    """
    :param info: the final info of an episode.
    :return: names of the numbers in it that somebody gave the text: ``score``, ``reward/<part>``, metrics.
    """
    return [name for name, value in info.items() if isinstance(value, float | np.floating)]


def distinct_n(texts: list[str], n: int) -> float:
    """Share of distinct n-grams of words among all of them (Li et al. 2016, https://arxiv.org/abs/1510.03055).

    :param texts: completions.
    :param n: words in a row.
    :return: in [0, 1]; 0 if there are none.
    """
    grams = [tuple(words[i : i + n]) for words in (t.lower().split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
