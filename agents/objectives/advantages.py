"""Advantage estimators: pure functions of arrays, one episode a row.

Notation: E episodes, T steps (the longest episode's), ``mask`` [E, T] true on real steps; padding is at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def gae(
    rewards: Array, values: Array, last_values: Array, mask: Array, gamma: float, gae_lambda: float
) -> tuple[Array, Array]:
    """Generalized advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16).

    δ_t = r_t + γ V_{t+1} − V_t and A_t = δ_t + γλ A_{t+1}; the target of the value function is A_t + V_t.

    :param rewards: [E, T].
    :param values: [E, T], V of the context before each step.
    :param last_values: [E], V after the last real step: 0 where the episode terminated.
    :param mask: bool [E, T].
    :param gamma: discount.
    :param gae_lambda: λ; 1 gives Monte-Carlo returns, 0 one-step advantages.
    :return: advantages [E, T] and returns [E, T]; 0 on padding.
    """
    assert rewards.shape == values.shape == mask.shape, (rewards.shape, values.shape, mask.shape)
    advantages = np.zeros_like(rewards, dtype=np.float64)
    next_value = last_values.astype(np.float64)  # [E]
    next_advantage = np.zeros(len(rewards))  # [E]
    for t in reversed(range(rewards.shape[1])):
        real = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = np.where(real, delta + gamma * gae_lambda * next_advantage, 0.0)
        next_advantage = np.where(real, advantages[:, t], next_advantage)
        next_value = np.where(real, values[:, t], next_value)
    return advantages, np.where(mask, advantages + values, 0.0)


def discounted_returns(rewards: Array, last_values: Array, mask: Array, gamma: float) -> Array:
    """G_t = r_t + γ G_{t+1} (Sutton & Barto 2018, eq. 3.9).

    :return: [E, T]; 0 on padding.
    """
    zeros = np.zeros_like(rewards, dtype=np.float64)
    return gae(rewards, zeros, last_values, mask, gamma, gae_lambda=1.0)[0]


def leave_one_out(returns: Array, group_size: int) -> Array:
    """Each return minus the mean of the *others* of its group (Kool et al. 2019, https://openreview.net/forum?id=r1lgTGL5DE).

    The baseline doesn't depend on the episode itself, so the gradient stays unbiased.

    :param returns: [E], groups one after the other.
    :param group_size: k >= 2.
    :return: [E].
    """
    groups = returns.reshape(-1, group_size)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(-1)


def group_relative(returns: Array, group_size: int, scale: bool) -> Array:
    """Each return minus the mean of its group, itself included (Shao et al. 2024, https://arxiv.org/abs/2402.03300).

    :param returns: [E], groups one after the other.
    :param group_size: k >= 2.
    :param scale: divide by the group's standard deviation (of a sample: ÷ (k − 1)); equal returns give zeros.
    :return: [E].
    """
    groups = returns.reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    if scale:
        centred = centred / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    return centred.reshape(-1)


def variance(values: Array, mean: Callable[[Array], float] = np.mean) -> float:
    """
    :param values: float [N].
    :param mean: takes the mean of an array; one that knows the arrays of other processes gives the variance over all.
    :return: the mean squared distance from the mean, a number of the array's own precision.
    """
    return values.dtype.type(mean((values - mean(values)) ** 2))


def whiten(advantages: Array, mean: Callable[[Array], float] = np.mean) -> Array:
    """Zero mean and unit variance over all real tokens of a rollout.

    :param advantages: [N], real tokens only.
    :param mean: as for :func:`variance`.
    :return: [N]; a single token or equal advantages give zeros.
    """
    centred = advantages - mean(advantages)
    return centred / (np.sqrt(variance(centred, mean)) + 1e-8)
