"""95 % confidence intervals for means and win rates of sampled texts.

Texts of the same prompt resemble each other, so four texts for each of 64 prompts carry less information than one text
for each of 256. Therefore the prompts, not the texts, are taken to be sampled independently: ``clusters``, int [n],
holds the number of each text's prompt. If there is only one prompt, its texts are taken to be independent, and the
interval is for this prompt.

Notation: n texts of C prompts.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

LEVEL = 0.95
Z = 1.959963984540054  # a standard normal variable lies in [−Z, Z] with probability LEVEL
RESAMPLES = 2_000


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """
    :param ours: scores, [n].
    :param theirs: the scores that they are compared with, [n].
    :return: float64 [n]: 1 where ``ours`` is higher, 0 where it is lower, and ½ for a tie. The mean is the win rate.
    """
    return (np.sign(ours - theirs) + 1) / 2


def compare(ours: np.ndarray, theirs: np.ndarray, clusters: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Compare the scores of two policies' texts for the same prompts.

    :param ours: the scores of one policy's texts, [n].
    :param theirs: the scores of the other policy's texts for the same prompts, [n].
    :param clusters: int [n], the number of each text's prompt.
    :param seed: the seed of the bootstrap.
    :return: ``difference``, the mean difference, and ``win_rate``, with their 95 % intervals ``difference_interval``
        (None for a single text) and ``win_rate_interval``.
    """
    outcomes = wins(ours, theirs)
    return {
        "difference": float((ours - theirs).mean()),
        "difference_interval": finite(bootstrap_interval(ours - theirs, clusters, seed)),
        "win_rate": float(outcomes.mean()),
        "win_rate_interval": list(wilson_interval(outcomes, clusters)),
    }


def finite(interval: tuple[float, float]) -> list[float] | None:
    """
    :param interval: an interval, which may be infinite.
    :return: the same as JSON can represent it: a list, None for an infinite one.
    """
    return list(interval) if all(map(math.isfinite, interval)) else None


def bootstrap_interval(values: np.ndarray, clusters: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of a mean, by drawing prompts with replacement, each with all of its texts. It is widened
    for what few prompts don't show.

    Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; for clusters: Field & Welsh 2007,
    Bootstrapping clustered data, J. R. Statist. Soc. B 69.

    Means that are drawn from C prompts vary by a factor √((C − 1) / C) too little, and their spread is itself an
    estimate, for which Student's t makes up: the interval reaches t √(C / (C − 1)) / z times as far from the mean
    (Hesterberg 2015, What Teachers Should Know About the Bootstrap, Am. Stat. 69, section 3.2). Of 8 prompts that is
    1.29 times, of 64 it is 1.03 times. Where there are only a few different values, so are there of means, and the
    percentiles fall on one of them; so the interval is never narrower than Student's own.

    :param values: [n].
    :param clusters: int [n], the number of each text's prompt.
    :param seed: the seed of the resampling.
    :return: the low and the high end of the interval; infinite where there is one text only, which says nothing of the
        spread.
    """
    sums, sizes = _cluster_sums(values, clusters)
    count, mean = len(sums), float(values.mean())
    if count == 1:
        return -math.inf, math.inf
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = generator.integers(len(sums), size=len(sums))
        means[i] = sums[drawn].sum() / sizes[drawn].sum()
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    t = student_t(count - 1)
    widening = t / Z * math.sqrt(count / (count - 1))
    half = t * math.sqrt(count / (count - 1) * float(((sums - mean * sizes) ** 2).sum())) / len(values)
    return min(mean - widening * (mean - low), mean - half), max(mean + widening * (high - mean), mean + half)


@functools.cache
def student_t(freedom: int) -> float:
    """How far from 0, on either side, Student's t lies with probability 1 − LEVEL.

    With t = √ν tan θ its density becomes proportional to cos^(ν − 1) θ, which is integrated here.

    :param freedom: ν, at least 1.
    :return: the quantile, to four digits at least.
    """
    theta = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(theta) ** (freedom - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(LEVEL * area[-1], area, theta)))


def wilson_interval(outcomes: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Wilson's score interval for a rate, with the effective number of outcomes in place of n.

    Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953. Unlike the bootstrap's interval, it has a width even if
    all outcomes are the same.

    :param outcomes: [n], in [0, 1].
    :param clusters: int [n], the number of each text's prompt.
    :return: the low and the high end of the interval, in [0, 1].
    """
    rate, size = float(outcomes.mean()), effective_size(outcomes, clusters)
    shrink = 1 + Z**2 / size
    centre = (rate + Z**2 / (2 * size)) / shrink
    half = Z / shrink * math.sqrt(rate * (1 - rate) / size + Z**2 / (4 * size**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def effective_size(outcomes: np.ndarray, clusters: np.ndarray) -> float:
    """The number of independent outcomes whose mean would have the same variance: p (1 − p), for the rate p, over the
    variance of p that is estimated from the clusters.

    Kish 1965, Survey Sampling; with Wilson's interval: Dean & Pagano 2015, Evaluating confidence interval methods for
    binomial proportions in clustered surveys, J. Surv. Stat. Methodol. 3. The number is clipped to [C, n], since the
    variance between a few clusters may happen to be too small or too large.

    :param outcomes: [n], in [0, 1].
    :param clusters: int [n], the number of each text's prompt.
    :return: the effective number, at least 1.
    """
    sums, sizes = _cluster_sums(outcomes, clusters)
    rate, count, total = float(outcomes.mean()), len(sums), len(outcomes)
    if count == 1:
        return 1.0
    variance = count / (count - 1) * float(((sums - rate * sizes) ** 2).sum()) / total**2
    if variance == 0:
        return float(count)
    return min(max(rate * (1 - rate) / variance, float(count)), float(total))


def _cluster_sums(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the values and the number of texts of each prompt, [C] each; of each text if there is one prompt."""
    names, which = np.unique(clusters, return_inverse=True)
    if len(names) == 1:
        which = np.arange(len(values))
    return np.bincount(which, values), np.bincount(which)
