"""The evaluation of a policy: its texts are scored, and compared with those of the reference or of another policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from agents.evaluation.intervals import bootstrap_interval, compare
from agents.evaluation.right_answers import (
    RightAnswers,
    check_samples,
    compare_answers,
    have_right_answers,
    measure_answers,
)
from agents.models.reference import Reference
from agents.policies.causal_lm_policy import CausalLMPolicy
from agents.rollouts.episode_buffer import EpisodeBuffer
from agents.rollouts.sampling import collect_texts, sample_texts
from text_env.vector_env import TextVectorEnv, plain

OF_TEXTS = ("distinct_1", "distinct_2", "mean_length", "terminated_ratio", "perplexity")
"""The means over texts that :func:`describe` returns whatever the environment says of them."""
MANY_PROMPTS = 2**20  # more than this are not shuffled: generated prompts may be without end


class Written(NamedTuple):
    """What one policy wrote, one text for each of n prompts.

    :param means: means over the texts, as :func:`describe` returns them, without ``kl`` and ``score_std``.
    :param kl: the KL divergence from the reference, in nats per text.
    :param scores: ``score`` and every metric that applies to all n texts, by name, float64 [n] each.
    :param infos: the n final infos.
    """

    means: dict[str, float]
    kl: float
    scores: dict[str, np.ndarray]
    infos: list[dict[str, Any]]


def evaluate(
    policy: CausalLMPolicy,
    reference: CausalLMPolicy,
    env: TextVectorEnv | VecEnv,
    n_episodes: int,
    against: CausalLMPolicy | None = None,
    seed: int = 0,
    n_texts: int = 0,
    samples_per_prompt: int = 1,
    pass_at_k: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Let a policy and its reference, or another policy, write for the same prompts, and score and compare the texts.

    In the result, ``policy`` and ``reference`` hold means over the texts of each of the two writers: ``score``, every
    metric of the environment (such as ``gold_score``) and every part of a weighted reward; ``distinct_1``,
    ``distinct_2``, ``mean_length``, ``terminated_ratio``, and ``perplexity`` under the reference. The last five are
    repeated for the policy at the top level of the result, together with ``kl``, which is the mean over the policy's
    texts of Σ log π − log π_ref, in nats. Further entries are:

    - ``score_gain_std``: the policy's gain in score, in standard deviations of the other writer's scores; None if these
      are all equal.
    - ``win_rate``, ``win_rate_interval``: the share of prompts for which the policy's text scores higher than the
      other's. Ties count half.
    - ``comparison``: what :func:`agents.evaluation.intervals.compare` returns for the score and for each metric.
    - ``intervals``: for each writer, the intervals of its means of the score and the metrics.
    - ``episodes``: the number of texts of each writer; ``prompts``: the number of different prompts; ``compared_with``:
      ``"reference"``; and ``texts``, if ``n_texts`` is greater than 0.
    - ``answers``, if the task has a right answer (see :mod:`agents.evaluation.right_answers`): ``samples_per_prompt``,
      and once more ``policy``, ``reference``, ``intervals`` and ``comparison``, here of ``pass@k``, ``majority@k``,
      ``greedy_accuracy``, ``mean_length_right`` and ``mean_length_wrong``. The share of texts that are right, and of
      those in which an answer was found, are metrics: ``correct`` and ``well_formed``.

    A part of the reward that does not apply to a text has no number there. A writer's mean is of the texts that have
    one, and is left out if none has; there is an interval where all of its texts have one, and a comparison where all
    texts of both writers do.

    With ``against``, the results of that policy are under ``against`` and ``kl_against``, ``compared_with`` is
    ``"against"``, and there is no entry ``reference``. All intervals are lists [low, high] of 95 %, clustered by
    prompt.

    :param policy: the policy that was trained.
    :param reference: the policy that it was trained from, by which KL divergence and perplexity are measured.
    :param env: the environment, which gives prompts and scores. Its prompts are used in random order, and repeatedly if
        they are fewer than ``n_episodes``.
    :param n_episodes: the number of texts of each of the two writers, at least 2.
    :param against: another policy to compare with, in place of the reference.
    :param seed: the seed of the prompt order and of the bootstrap. The texts are sampled with PyTorch's generator.
    :param n_texts: the number of pairs of texts to return, counted from the first.
    :param samples_per_prompt: the least number of texts of a prompt. If all prompts together would have fewer texts,
        only as many prompts are used as have enough.
    :param pass_at_k: for which k to estimate pass@k and majority@k, at most ``samples_per_prompt``; None: for 1 and
        ``samples_per_prompt``, if the task has a right answer.
    :return: a dict that JSON can represent.
    :raises ValueError: for fewer than 2 episodes, for fewer texts of a prompt than ``pass_at_k`` needs, and if
        ``pass_at_k`` is asked for where the task has no right answer.
    """
    if n_episodes < 2:
        raise ValueError(f"Expected at least 2 episodes, since one says nothing of the spread, got {n_episodes}.")
    check_samples(n_episodes, samples_per_prompt, pass_at_k or ())
    env = plain(env)
    role, other = ("reference", reference) if against is None else ("against", against)
    drawn = draw_prompts(len(env.prompts), n_episodes, seed, samples_per_prompt)
    prompts, frozen = [env.prompts[i] for i in drawn], Reference(reference.lm)
    ours, theirs = (write(writer, frozen, env, prompts) for writer in (policy, other))
    judged = have_right_answers([*ours.infos, *theirs.infos])
    if pass_at_k is not None and not judged:
        raise ValueError(
            "Expected each final info to hold correct=1.0 or correct=0.0 for pass_at_k, as rewards of tasks with a "
            f"right answer log it, got one with {sorted(ours.infos[0])}. Use such a reward, or leave pass_at_k out."
        )
    result = {"policy": ours.means, role: theirs.means, "kl": ours.kl, "compared_with": role}
    if against is not None:
        result["kl_against"] = theirs.kl
    result |= {"episodes": n_episodes, "prompts": len(set(drawn.tolist()))}
    result |= {name: ours.means[name] for name in OF_TEXTS}
    result |= _contest(ours, theirs, drawn, seed)
    result["intervals"] = {"policy": _intervals(ours, drawn, seed), role: _intervals(theirs, drawn, seed)}
    if judged:
        ks = sorted({1, samples_per_prompt} if pass_at_k is None else {*pass_at_k})
        figures = [_answers(writer, of, env, drawn, ks, seed) for writer, of in ((policy, ours), (other, theirs))]
        answers = compare_answers(figures[0], figures[1], role, seed)
        result["answers"] = {"samples_per_prompt": samples_per_prompt, **answers}
    if n_texts:
        result["texts"] = side_by_side({role: theirs.infos[:n_texts], "policy": ours.infos[:n_texts]})
    return result


def _contest(ours: Written, theirs: Written, clusters: np.ndarray, seed: int) -> dict[str, Any]:
    comparison = {
        name: compare(values, theirs.scores[name], clusters, seed)
        for name, values in ours.scores.items()
        if name in theirs.scores
    }
    on_score, spread = comparison["score"], float(theirs.scores["score"].std())
    return {
        "score_gain_std": on_score["difference"] / spread if spread > 0 else None,
        "win_rate": on_score["win_rate"],
        "win_rate_interval": on_score["win_rate_interval"],
        "comparison": comparison,
    }


def _answers(
    writer: CausalLMPolicy, written: Written, env: TextVectorEnv, drawn: np.ndarray, ks: Sequence[int], seed: int
) -> RightAnswers:
    different = np.unique(drawn)
    greedy = sample_texts(writer, env, [env.prompts[i] for i in different], deterministic=True)
    return measure_answers(written.infos, drawn, greedy, different, ks, seed)


def _intervals(written: Written, clusters: np.ndarray, seed: int) -> dict[str, list[float]]:
    return {name: list(bootstrap_interval(values, clusters, seed)) for name, values in written.scores.items()}


def draw_prompts(n_prompts: int, n_episodes: int, seed: int, samples_per_prompt: int = 1) -> np.ndarray:
    """Draw prompts in random order. No prompt is drawn again before all have been drawn equally often.

    :param n_prompts: the number of prompts in the set.
    :param n_episodes: the number of prompts to draw.
    :param seed: the seed of the prompt order.
    :param samples_per_prompt: how often at least to draw a prompt that is drawn at all, at most ``n_episodes``. Only as
        many different prompts are drawn as this allows.
    :return: int [n_episodes], indices of prompts.
    """
    generator, n_different = np.random.default_rng(seed), n_episodes // samples_per_prompt
    if n_prompts > MANY_PROMPTS:
        order = generator.choice(n_prompts, n_different, replace=False)
    else:
        order = generator.permutation(n_prompts)[:n_different]
    return np.resize(order, n_episodes)


def write(policy: CausalLMPolicy, reference: Reference, env: TextVectorEnv, prompts: Sequence[Any]) -> Written:
    """Let a policy write one text for each prompt.

    :param policy: the policy that writes.
    :param reference: the frozen model by which KL divergence and perplexity are measured.
    :param env: the environment, which scores the texts.
    :param prompts: n prompts, each in a form that a reset takes. Entries of ``env.prompts`` keep their columns.
    :return: the texts and their scores.
    """
    buffer, infos = collect_texts(policy, env, len(prompts), reference, prompts=prompts)
    scores = {
        name: np.array([info[name] for info in infos])
        for name in metrics_of(infos[0])
        if all(name in metrics_of(info) for info in infos)
    }
    figures = describe(buffer, infos)
    kl, _ = figures.pop("kl"), figures.pop("score_std")
    return Written(figures, kl, scores, infos)


def side_by_side(infos: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """
    :param infos: for each writer n final infos, of the same prompts in the same order.
    :return: n dicts with ``prompt`` and, under each writer's name, ``completion``, ``finish_reason``, ``score`` and
        metrics.
    """
    return [
        {"prompt": pair[0]["prompt"], **{writer: _text(info) for writer, info in zip(infos, pair, strict=True)}}
        for pair in zip(*infos.values(), strict=True)
    ]


def _text(info: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {name: float(info[name]) for name in metrics_of(info)}
    return {"completion": info["completion"], "finish_reason": info["finish_reason"], **numbers}


def measure_policy(
    policy: CausalLMPolicy, reference: Reference, env: TextVectorEnv | VecEnv, n_episodes: int
) -> dict[str, float]:
    """Let a policy write texts, and measure them.

    :param policy: the policy that writes.
    :param reference: the frozen model by which KL divergence and perplexity are measured.
    :param env: the environment, which draws the prompts and scores the texts.
    :param n_episodes: the number of texts.
    :return: what :func:`describe` returns for the texts.
    """
    return describe(*collect_texts(policy, env, n_episodes, reference))


def describe(buffer: EpisodeBuffer, episodes: list[dict[str, Any]]) -> dict[str, float]:
    """
    :param buffer: the buffer that holds the episodes, with the reference.
    :param episodes: the final infos of the episodes.
    :return: the means over episodes of ``score`` and every metric; ``score_std``; ``distinct_1`` and ``distinct_2``
        (see :func:`distinct_n`); ``mean_length`` in tokens; ``terminated_ratio``, the share of texts that the budget
        did not cut off; ``perplexity`` of the texts under the reference; and ``kl``, the KL divergence from the
        reference in nats per episode.
    """
    buffer.finalize()
    # A part of the reward that does not apply to a text has no number there.
    metrics = dict.fromkeys(name for episode in episodes for name in metrics_of(episode))  # the score first
    means = {name: float(np.mean([e[name] for e in episodes if name in metrics_of(e)])) for name in metrics}
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
    :return: the names of the scores in it: ``score``, ``reward/<part>`` for each part of a weighted reward, and the
        metrics. NaN is none: it says that a score does not apply to the text, as None does.
    """
    return [name for name, value in info.items() if isinstance(value, float | np.floating) and not np.isnan(value)]


def distinct_n(texts: list[str], n: int) -> float:
    """The share of distinct n-grams among all n-grams of words (Li et al. 2016, https://arxiv.org/abs/1510.03055).

    :param texts: completions.
    :param n: the number of words of an n-gram.
    :return: the share, in [0, 1]; 0 if there are no n-grams.
    """
    grams = [tuple(words[i : i + n]) for words in (t.lower().split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
