"""Advantage estimators, as pure functions of arrays with one episode per row.

Notation: E episodes; T steps, as many as the longest episode has; ``mask``, bool [E, T], true where a row has a step.
Shorter rows are padded at their end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Array = np.ndarray


def gae(
    rewards: Array, values: Array, last_values: Array, mask: Array, gamma: float, gae_lambda: float | Array
) -> tuple[Array, Array]:
    """Generalized advantage estimation (Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16).

    With δ_t = r_t + γ V_{t+1} − V_t, the advantage is A_t = δ_t + γλ A_{t+1}, and the target of the value function is
    A_t + V_t.

    :param rewards: the rewards r, float [E, T].
    :param values: the value V of the context before each step, float [E, T].
    :param last_values: the value of the context after the last step of each episode, float [E]; 0 where the episode has
        terminated.
    :param mask: bool [E, T], true where a row has a step.
    :param gamma: the discount γ.
    :param gae_lambda: λ, one number or one for each episode, [E]. 1 gives Monte-Carlo returns minus values, 0 gives
        one-step advantages.
    :return: the advantages and the targets of the value function, float64 [E, T] each, 0 on padding.
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


def length_adaptive_lambda(lengths: Array, alpha: float) -> Array:
    """λ = 1 − 1/(α l), VAPO's choice for an episode of l steps (Yue et al. 2025, https://arxiv.org/abs/2504.05118).

    The sum of the powers of λ, 1/(1 − λ), is then α times the length.

    :param lengths: int [E], the number of steps of each episode.
    :param alpha: α, greater than 0.
    :return: λ of each episode, float [E]; 0 where α l is at most 1.
    """
    return np.maximum(1.0 - 1.0 / (alpha * lengths), 0.0)


def discounted_returns(rewards: Array, last_values: Array, mask: Array, gamma: float) -> Array:
    """Discounted returns, G_t = r_t + γ G_{t+1} (Sutton & Barto 2018, Reinforcement Learning, eq. 3.9).

    :param rewards: the rewards r, float [E, T].
    :param last_values: the return that follows the last step of each episode, float [E]; 0 where the episode has
        terminated.
    :param mask: bool [E, T], true where a row has a step.
    :param gamma: the discount γ.
    :return: the returns G, float64 [E, T], 0 on padding.
    """
    zeros = np.zeros_like(rewards, dtype=np.float64)
    return gae(rewards, zeros, last_values, mask, gamma, gae_lambda=1.0)[0]


def step_advantages(rewards: Array, values: Array, lengths: Array, last: Array, gamma: float) -> Array:
    """The advantage of a *step*, several tokens that share it: what the step was paid, and what it made of the state.

    A_i = Σ_j γ^j r_{t_i + j} + γ^n V_{i+1} − V_i for a step of n tokens that begins at token t_i (Kazemnejad et al.
    2024, https://arxiv.org/abs/2410.01679, who take γ = 1).

    :param rewards: the rewards r of the tokens of S steps, step by step, float [N].
    :param values: the value V of the state at the beginning of each step, float [S].
    :param lengths: the number n of tokens of each step, int [S], at least 1.
    :param last: whether the episode ends with the step, bool [S]; the value after it is then 0.
    :param gamma: the discount γ.
    :return: the advantage of each token, float64 [N].
    """
    first = np.cumsum(lengths) - lengths  # [S], where each step begins
    place = np.arange(len(rewards)) - np.repeat(first, lengths)  # [N], of each token in its step
    paid = np.add.reduceat(gamma**place * rewards, first)  # [S]
    following = np.where(last, 0.0, np.append(values[1:], 0.0))
    return np.repeat(paid + gamma**lengths * following - values, lengths)


def leave_one_out(returns: Array, group_size: int) -> Array:
    """The return of each episode minus the mean return of the *other* episodes of its group (Kool et al. 2019,
    https://openreview.net/forum?id=r1lgTGL5DE).

    The mean of the others does not depend on the episode itself, so the policy gradient stays unbiased.

    :param returns: float [E], one group after the other.
    :param group_size: the number k of episodes in each group, at least 2.
    :return: the advantages, float [E].
    """
    groups = returns.reshape(-1, group_size)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(-1)


def group_relative(returns: Array, group_size: int, scale: bool) -> Array:
    """The return of each episode minus the mean return of its group, itself included (Shao et al. 2024,
    https://arxiv.org/abs/2402.03300).

    :param returns: float [E], one group after the other.
    :param group_size: the number k of episodes in each group, at least 2.
    :param scale: whether to divide by the sample standard deviation of the group's returns, plus 1e-4. Equal returns
        give zeros.
    :return: the advantages, float [E].
    """
    groups = returns.reshape(-1, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    if scale:
        centred = centred / (groups.std(axis=1, ddof=1, keepdims=True) + 1e-4)
    return centred.reshape(-1)


def informative_groups(scores: Array, group_size: int) -> Array:
    """Which episodes belong to a group whose scores are not all the same. In any other group all advantages that
    :func:`group_relative` and :func:`leave_one_out` give are 0.

    :param scores: float [E], one group after the other.
    :param group_size: the number k of episodes in each group.
    :return: bool [E].
    """
    groups = scores.reshape(-1, group_size)
    return np.repeat(groups.min(axis=1) < groups.max(axis=1), group_size)


def mean_of(values: Array) -> float:
    """
    :param values: float [N].
    :return: the mean, summed in float64: that of equal numbers is the number.
    """
    return float(values.mean(dtype=np.float64))


def variance(values: Array, mean: Callable[[Array], float] = mean_of) -> float:
    """The variance of an array: the mean squared distance from its mean.

    :param values: float [N].
    :param mean: a function that returns the mean of an array. A function that returns the mean over the arrays of
        several processes gives the variance over all of them.
    :return: the variance, a number of the array's dtype.
    """
    return values.dtype.type(mean((values - mean(values)) ** 2))


def signal_share(advantages: Array, returns: Array, mean: Callable[[Array], float] = mean_of) -> float:
    """How much of the spread of advantages can come from what was paid: min(1, σ(G) / σ(A)).

    A critic is there to make advantages vary less than the returns do. Where they vary more, the rest is the critic's
    own error; where all returns are the same, nothing but error is left. Whitening alone makes such errors as strong
    as any signal.

    :param advantages: the advantages A, float [N], without padding.
    :param returns: the returns G of the same steps, float [N].
    :param mean: a function that returns the mean of an array, as for :func:`variance`.
    :return: the share, from 0 to 1; 1 if all advantages are equal.
    """
    own, paid = variance(advantages, mean), variance(returns, mean)
    return float(np.sqrt(paid / own)) if paid < own else 1.0


def whiten(advantages: Array, mean: Callable[[Array], float] = mean_of, floor: float = 0.0) -> Array:
    """Shift and scale the advantages of a rollout to mean 0 and variance 1.

    :param advantages: float [N], without padding.
    :param mean: a function that returns the mean of an array, as for :func:`variance`.
    :param floor: the standard deviation up to which advantages count as equal, since rounding alone may have led to it.
    :return: float [N]; zeros if there is only one advantage, or if all are equal.
    """
    centred = advantages - mean(advantages)
    spread = np.sqrt(variance(centred, mean))
    return np.zeros_like(centred) if spread <= floor else centred / (spread + 1e-8)  # NaN stays NaN


def rounding_floor(
    without_penalty: Array, rounding: tuple[float, float], mean: Callable[[Array], float] = mean_of
) -> float:
    """The standard deviation up to which advantages count as equal.

    A KL penalty is small, and rounding is large beside one that is 0. Where nothing else tells texts apart, whitening
    would make of it the only signal. Where the task pays them differently, it is noise beside that.

    :param without_penalty: the returns without the KL penalty, float [N].
    :param rounding: what rounding alone may lead to: as differences of values and returns, and by the KL penalty.
    :param mean: a function that returns the mean of an array, as for :func:`variance`.
    :return: the first of the two, or their sum where the returns without the penalty are all equal.
    """
    of_sums, of_penalty = rounding
    return of_sums if np.sqrt(variance(without_penalty, mean)) > of_sums else of_sums + of_penalty


def whiten_groups(
    advantages: Array,
    returns: Array,
    without_penalty: Array,
    lengths: Array,
    group_size: int,
    rounding: tuple[float, float] = (0.0, 0.0),
) -> Array:
    """Whiten the advantages of each group of episodes over the tokens of the group, times their :func:`signal_share`.

    :param advantages: float [N], without padding, one episode after the other.
    :param returns: the returns of the same steps, float [N].
    :param without_penalty: the same without the KL penalty, float [N].
    :param lengths: int [E], the number of advantages of each episode; N in all.
    :param group_size: the number k of episodes in each group.
    :param rounding: as for :func:`rounding_floor`.
    :return: float [N]; zeros for a group whose advantages, or whose returns, are all equal.
    """
    ends = np.cumsum(lengths.reshape(-1, group_size).sum(axis=1))
    groups = zip(*(np.split(values, ends[:-1]) for values in (advantages, returns, without_penalty)), strict=True)
    return np.concatenate([signal_share(a, g) * whiten(a, floor=rounding_floor(t, rounding)) for a, g, t in groups])
