"""How often a task is solved in k attempts: by at least one of them (pass@k), and by a vote among them (majority@k).

There are more texts of a prompt than k, and the estimate is the mean over the subsets of k of them; so it is unbiased,
and varies less than with a single subset.

Notation: n texts, each with the number of its prompt in ``clusters``; a prompt has m texts, of which c are right.

The functions return an estimate for each *text*, which is that of its prompt. So a mean or an interval counts each
prompt as often as there are texts of it, as for every other number of a text.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

MAX_SUBSETS = 1_000  # in a vote; for one prompt, the standard error of so many is at most 0.016


def pass_at_k(correct: np.ndarray, clusters: np.ndarray, k: int) -> np.ndarray:
    """The probability that at least one of k texts of a prompt is right: 1 − C(m − c, k) / C(m, k).

    Chen et al. 2021, Evaluating Large Language Models Trained on Code, https://arxiv.org/abs/2107.03374, equation 1.
    The binomials are Python's integers, so that nothing overflows or cancels.

    :param correct: float64 [n], 1 for a right text and 0 for a wrong one.
    :param clusters: int [n], the number of each text's prompt.
    :param k: the number of attempts, at most the number of texts of each prompt.
    :return: float64 [n]. The mean of pass@1 is the mean of ``correct``.
    :raises ValueError: if ``correct`` holds other numbers, or a prompt has fewer than k texts.
    """
    estimates = np.empty(len(correct))
    for texts in _texts_by_prompt(correct, clusters, k):
        m, wrong = len(texts), int((correct[texts] == 0).sum())
        subsets = math.comb(m, k)
        estimates[texts] = (subsets - math.comb(wrong, k)) / subsets
    return estimates


def majority_at_k(
    correct: np.ndarray, answers: Sequence[str | None], clusters: np.ndarray, k: int, seed: int = 0
) -> np.ndarray:
    """The probability that the most frequent answer among k texts of a prompt is right.

    Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning, https://arxiv.org/abs/2203.11171. Two
    answers are the same if their strings are. Of t answers that are equally frequent each is chosen with probability
    1 / t. A text without an answer has no vote, and if none of k has one, the vote is wrong.

    The mean is over all subsets of k texts, or over ``MAX_SUBSETS`` random ones if there are more.

    :param correct: float64 [n], 1 for a right text and 0 for a wrong one.
    :param answers: n answers; None where a text has none.
    :param clusters: int [n], the number of each text's prompt.
    :param k: the number of attempts, at most the number of texts of each prompt.
    :param seed: the seed of the random subsets.
    :return: float64 [n].
    :raises ValueError: if ``correct`` holds other numbers, or a prompt has fewer than k texts.
    """
    generator = np.random.default_rng(seed)
    estimates = np.empty(len(correct))
    for texts in _texts_by_prompt(correct, clusters, k):
        given = [answers[text] for text in texts]
        ballot = list(dict.fromkeys(answer for answer in given if answer is not None))
        if not ballot:
            estimates[texts] = 0.0
            continue
        voted = np.array(
            [[answer == choice for choice in ballot] for answer in given], dtype=np.float64
        )  # [m, choices]
        # Texts of one answer agree in whether they are right, unless that depends on more than the answer.
        right = correct[texts] @ voted / voted.sum(axis=0)
        votes = _subsets(len(texts), k, generator) @ voted  # [subsets, choices]
        most = votes.max(axis=1, keepdims=True)
        chosen = (votes == most) & (most > 0)
        estimates[texts] = np.mean(chosen @ right / np.maximum(chosen.sum(axis=1), 1))
    return estimates


def _subsets(m: int, k: int, generator: np.random.Generator) -> np.ndarray:
    """Subsets of k of m things, float64 [subsets, m], 1 for what is in it: all, or ``MAX_SUBSETS`` random ones."""
    if math.comb(m, k) > MAX_SUBSETS:
        chosen = generator.random((MAX_SUBSETS, m)).argsort(axis=1)[:, :k]
    else:
        chosen = np.array(list(itertools.combinations(range(m), k)))
    subsets = np.zeros((len(chosen), m))
    np.put_along_axis(subsets, chosen, 1.0, axis=1)
    return subsets


def _texts_by_prompt(correct: np.ndarray, clusters: np.ndarray, k: int) -> Iterator[np.ndarray]:
    """The numbers of the texts of each prompt, once it is known that an estimate can be made of them."""
    if not np.isin(correct, (0, 1)).all():
        raise ValueError(f"Expected correct to be 1.0 for a right text and 0.0 for a wrong one, got {correct}.")
    _, which, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    if not 1 <= k <= sizes.min(initial=len(correct)):
        raise ValueError(
            f"Expected k to be from 1 to the number of texts of each prompt, got k={k} and a prompt of "
            f"{sizes.min(initial=len(correct))} texts: write at least k texts for each prompt, or choose a smaller k."
        )
    yield from np.split(np.argsort(which, kind="stable"), np.cumsum(sizes)[:-1])
