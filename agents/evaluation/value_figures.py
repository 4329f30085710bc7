"""How good the values of a critic are, as pure functions of the values and of what really followed.

The true value of a state is the mean of the returns that follow it, of which only m samples are known: *branches*, that
were written from the state on. Their mean differs from the true value by chance, with a variance of σ²/m, where σ² is
the variance of the state's returns. A perfect critic would seem to err by as much. So the mean of this variance over
the states is estimated, and taken away wherever a squared distance from the true values is meant.

Notation: S states; m branches of each; N pairs of siblings, states that share a prefix and differ afterwards.
"""

from __future__ import annotations

import numpy as np

from agents.evaluation.intervals import wins

DECIDED = 2.0  # in standard errors: how far apart the branches of two siblings are, for their order to be known


def sampling_variance(outcomes: np.ndarray) -> np.ndarray:
    """
    :param outcomes: returns, float [..., m], at least two branches of each state.
    :return: the estimated variance of each mean of m branches around the true value, float [...].
    """
    return np.asarray(outcomes.var(axis=-1, ddof=1) / outcomes.shape[-1])


def value_figures(values: np.ndarray, outcomes: np.ndarray) -> dict[str, float | None]:
    """
    :param values: the critic's values, float [S], of at least two states.
    :param outcomes: the returns that followed, float [S, m].
    :return: ``mean_value`` and ``mean_outcome``; ``bias``, their difference; ``rmse``, the root mean squared distance
        of the values from the true ones; ``branch_rmse``, that of a single branch; ``worth_branches``, of how many
        branches the mean would be as near as the critic's value; ``explained_variance``, the share of the true values'
        variance that the critic explains, 1 at best, 0 for a constant and below for one that misleads; and
        ``kendall_tau`` (see :func:`kendall_tau`). Chance is taken away from all but the last, which it lowers. None
        stands for what can't be said: there is no variance to explain, or no error to compare with.
    """
    means, noise = outcomes.mean(axis=-1), float(sampling_variance(outcomes).mean())
    branch_variance = noise * outcomes.shape[-1]
    squared = max(0.0, float(((values - means) ** 2).mean()) - noise)
    spread = float(means.var(ddof=1)) - noise
    unexplained = float((values - means).var(ddof=1)) - noise
    return {
        "mean_value": float(values.mean()),
        "mean_outcome": float(means.mean()),
        "bias": float((values - means).mean()),
        "rmse": squared**0.5,
        "branch_rmse": branch_variance**0.5,
        "worth_branches": branch_variance / squared if squared > 0 else None,
        "explained_variance": 1 - unexplained / spread if spread > 0 else None,
        "kendall_tau": kendall_tau(values, means),
    }


def kendall_tau(left: np.ndarray, right: np.ndarray) -> float | None:
    """Kendall's τ_b, how well two orders agree: the pairs that both order alike less those that they order differently,
    over the geometric mean of the numbers of pairs that each of the two orders at all (Kendall 1945,
    https://doi.org/10.1093/biomet/33.3.239).

    :param left: float [S].
    :param right: float [S].
    :return: τ_b, from −1 to 1; None if one of the two is constant.
    """
    signs = [np.sign(x[:, None] - x[None, :]) for x in (left, right)]
    ordered = np.sqrt(np.prod([np.abs(sign).sum() for sign in signs]))
    return float((signs[0] * signs[1]).sum() / ordered) if ordered > 0 else None


def calibration_bins(values: np.ndarray, outcomes: np.ndarray, n_bins: int = 8) -> list[dict[str, float]]:
    """What really followed where the critic said little, and where it said much.

    :param values: the critic's values, float [S].
    :param outcomes: the returns that followed, float [S, m].
    :param n_bins: the number of bins, each of as many states as any other, as far as that goes.
    :return: for each bin, from the lowest values to the highest: ``states``, their number, ``value`` and ``outcome``,
        the means over them, and ``outcome_se``, the standard error of the latter.
    """
    means = outcomes.mean(axis=-1)
    bins = [part for part in np.array_split(np.argsort(values, kind="stable"), n_bins) if len(part)]
    return [
        {
            "states": len(part),
            "value": float(values[part].mean()),
            "outcome": float(means[part].mean()),
            "outcome_se": float(means[part].std() / np.sqrt(len(part))),
        }
        for part in bins
    ]


def decided_pairs(outcomes: np.ndarray) -> np.ndarray:
    """
    :param outcomes: the returns of pairs of siblings, float [N, 2, m].
    :return: bool [N], whether the means of the two are more than :data:`DECIDED` standard errors apart.
    """
    gap = outcomes[:, 0].mean(axis=-1) - outcomes[:, 1].mean(axis=-1)
    return np.asarray(np.abs(gap) > DECIDED * np.sqrt(sampling_variance(outcomes).sum(axis=-1)))


def ordered_right(estimates: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """
    :param estimates: what somebody says that the siblings of each pair are worth, float [N, 2].
    :param outcomes: the returns of the siblings, float [N, 2, m].
    :return: float [N]: 1 where the estimates order the two as the means of their branches do, 0 where they order them
        the other way round, and ½ where they, or the means, are equal.
    """
    means = outcomes.mean(axis=-1)
    said, true = wins(estimates[:, 0], estimates[:, 1]), wins(means[:, 0], means[:, 1])
    return np.asarray((1 + (2 * said - 1) * (2 * true - 1)) / 2)
