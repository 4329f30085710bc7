"""How often two writers solve a task with a right answer: in one attempt, in k, by a vote, and by their likeliest text.

A task has a right answer if the final infos say so: ``correct`` is 1.0 for a right text, 0.0 for a wrong one, and None,
NaN or missing where the prompt has no right answer; such texts are left out. ``answer``, if it is there, is the answer
that was found in the text, None if there was none; and ``vote``, if it is there, is the same string for answers that
are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from agents.evaluation.intervals import bootstrap_interval, compare, finite, wilson_interval
from agents.evaluation.pass_at_k import majority_at_k, pass_at_k
from text_env.settings import check_integer


class RightAnswers(NamedTuple):
    """What one writer's texts are measured by: by name, a number for each of n texts, and the prompts of these texts.

    :param rates: ``pass@k`` and ``majority@k``, for each k, and ``greedy_accuracy``: float64 [n], in [0, 1], and int
        [n].
    :param lengths: ``mean_length_right`` and ``mean_length_wrong``: the lengths in tokens of the texts that are right
        and of those that are wrong, float64 [n], and int [n]. Either may be empty.
    """

    rates: dict[str, tuple[np.ndarray, np.ndarray]]
    lengths: dict[str, tuple[np.ndarray, np.ndarray]]


def check_samples(n_episodes: int, samples_per_prompt: int, ks: Sequence[int]) -> None:
    """
    :param n_episodes: the number of texts of a writer.
    :param samples_per_prompt: the number of texts that are written for each prompt at least.
    :param ks: for which k pass@k is asked for.
    :raises ValueError: if there are too few texts for one prompt, or for a k.
    """
    check_integer("samples_per_prompt", samples_per_prompt, 1)
    if samples_per_prompt > n_episodes:
        raise ValueError(
            f"Expected at least as many episodes as samples_per_prompt={samples_per_prompt}, got {n_episodes}: that is "
            "the number of all texts of a writer."
        )
    for k in ks:
        check_integer("each k of pass_at_k", k, 1)
    if ks and max(ks) > samples_per_prompt:
        raise ValueError(
            f"Expected each k of pass_at_k to be at most samples_per_prompt={samples_per_prompt}, got {max(ks)}: k "
            f"attempts need k texts of a prompt, so ask for samples_per_prompt={max(ks)}."
        )


def have_right_answers(infos: Sequence[Mapping[str, Any]]) -> bool:
    """
    :param infos: final infos.
    :return: whether some say of their texts that they are right or wrong, and none of the others says anything else.
    """
    verdicts = {_verdict(info) for info in infos}
    return verdicts <= {0.0, 1.0, None} and verdicts != {None}


def _verdict(info: Mapping[str, Any]) -> Any:
    verdict = info.get("correct")
    return None if verdict != verdict else verdict  # NaN says as little as None


def measure_answers(
    infos: Sequence[Mapping[str, Any]],
    drawn: np.ndarray,
    greedy: Sequence[Mapping[str, Any]],
    greedy_drawn: np.ndarray,
    ks: Sequence[int],
    seed: int,
) -> RightAnswers:
    """
    :param infos: the final infos of n sampled texts.
    :param drawn: int [n], the number of each text's prompt.
    :param greedy: the final infos of the likeliest text of each prompt.
    :param greedy_drawn: the number of each of these texts' prompt.
    :param ks: for which k to estimate pass@k and, if the answers are known and k is not 1, majority@k.
    :param seed: the seed of the subsets of texts that vote.
    :return: the writer's figures.
    """
    infos, drawn = _judged(infos, drawn)
    greedy, greedy_drawn = _judged(greedy, greedy_drawn)
    correct = np.array([info["correct"] for info in infos], dtype=np.float64)
    estimates = {f"pass@{k}": pass_at_k(correct, drawn, k) for k in ks}
    if all("answer" in info for info in infos):
        answers = [info.get("vote", info["answer"]) for info in infos]
        votes = {f"majority@{k}": majority_at_k(correct, answers, drawn, k, seed) for k in ks if k > 1}
        estimates |= votes  # a vote of one is that text
    rates = {name: (values, drawn) for name, values in estimates.items()}
    rates["greedy_accuracy"] = np.array([float(info["correct"]) for info in greedy]), greedy_drawn
    tokens = np.array([info["length"] for info in infos], dtype=np.float64)
    which = {"mean_length_right": correct == 1, "mean_length_wrong": correct == 0}
    return RightAnswers(rates, {name: (tokens[texts], drawn[texts]) for name, texts in which.items()})


def _judged(infos: Sequence[Mapping[str, Any]], drawn: np.ndarray) -> tuple[list[Mapping[str, Any]], np.ndarray]:
    """The texts that are right or wrong, and their prompts."""
    judged = [_verdict(info) is not None for info in infos]
    return list(itertools.compress(infos, judged)), drawn[judged]


def compare_answers(ours: RightAnswers, theirs: RightAnswers, role: str, seed: int) -> dict[str, Any]:
    """
    :param ours: the policy's figures.
    :param theirs: those of the other writer, for the same prompts.
    :param role: what the other writer is called in the result.
    :param seed: the seed of the bootstrap.
    :return: for ``policy`` and for the other writer the mean of each figure; ``intervals``, for each writer the 95 %
        intervals of these means; and ``comparison``, for each rate of both what
        :func:`agents.evaluation.intervals.compare` returns. A mean of no texts is None, and so is an interval where
        there is one text at most.
    """
    writers = {role: theirs, "policy": ours}
    means = {writer: _means(figures) for writer, figures in writers.items()}
    intervals = {writer: _intervals(figures, seed) for writer, figures in writers.items()}
    comparison = {
        name: compare(values, theirs.rates[name][0], prompts, seed)
        for name, (values, prompts) in ours.rates.items()
        if name in theirs.rates
    }
    return {**means, "intervals": intervals, "comparison": comparison}


def _means(figures: RightAnswers) -> dict[str, float | None]:
    every = {**figures.rates, **figures.lengths}
    return {name: float(values.mean()) if len(values) else None for name, (values, _) in every.items()}


def _intervals(figures: RightAnswers, seed: int) -> dict[str, list[float] | None]:
    intervals: dict[str, list[float] | None] = {name: list(wilson_interval(*of)) for name, of in figures.rates.items()}
    for name, (tokens, prompts) in figures.lengths.items():
        intervals[name] = finite(bootstrap_interval(tokens, prompts, seed)) if len(tokens) else None
    return intervals
